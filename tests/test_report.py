"""The page: complete, valid, silent towards the network, and deaf to what data would have it do."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chromium import Chromium
from tinybert.errors import InputError
from tinybert.report import render

ALERT = "<script>alert(1)</script>"
HOSTILE = (
    ALERT,
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "--></section></main>",
    '" onload="alert(1)" x="',
    "'><img src=x onerror=alert(1)>",
    "</title></style><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;b&gt; &amp;",
    "javascript:alert(1)",
    "\x00\x07\x1b[31m\r\n\ud800\ufffe",
    "\u202eright to left\u2028\u2029",
    "x" * 4000,
)
VOID = {"meta", "br", "rect", "circle", "path"}


def page_results(text: str = "a film", *, attention: bool = True) -> dict[str, Any]:
    """Everything a page can have, with one text in every place that data can reach."""
    maps = base64.b64encode(bytes([200, 55, 0, 255] * 2 + [128, 127, 10, 245] * 2)).decode()
    pair = {"teacher": {"layer": 3, "heads": 2}, "student": {"layer": 1, "heads": 2}}
    other = {"teacher": {"layer": 6, "heads": 2}, "student": {"layer": 2, "heads": 2}}
    sentence = {"text": text, "pieces": [text, "b"], "teacher": maps, "student": maps}
    answer = {"answer": text, "confidence": "61%", "is_right": False}
    row = {"number": 1, "text": text, "pair": text, "gold": text, "teacher": answer, "student": answer}
    shown: dict[str, Any] = {
        "reason": None,
        "layers": [pair, other],
        "sentences": [sentence] * 2,
        "notes": [text],
    }
    return {
        "name": text,
        "verdict": [text, text],
        "table": {"header": ["model", text], "rows": [[text, "1"], [text, ""]], "notes": [text]},
        "tradeoff": {"points": [(text, 1.0, 2.0), ("b", 3.0, 4.0)], "x_label": text, "y_label": text},
        "stages": [
            {
                "title": text,
                "sentences": [text],
                "panels": [{"title": text, "series": {"training": [(1, 2.0)], "eval": [(1, 3.0)]}}],
            }
        ],
        "attention": shown if attention else {"reason": text},
        "disagreements": {"reason": None, "sentences": [text], "rows": [row]},
        "made": {"command": text, "groups": [{"title": text, "entries": [(text, text)]}]},
    }


class Page(HTMLParser):
    """What a parser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def check(page: str) -> Page:
    """Check what holds of every page; return it parsed."""
    parsed = Page(page)
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = {tag for tag, _ in parsed.tags}
    assert known.isdisjoint({"img", "iframe", "link", "object", "embed", "base"})
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes, "the page's policy forbids it"
        for name in ("src", "srcset", "action", "href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        for name in ("for", "aria-labelledby"):
            assert name not in attributes or attributes[name] in ids
        if (attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len([1 for tag, _ in parsed.tags if tag == "script"]) in (0, 2)
    assert not re.search("url\\(|@import|https?://", page.replace("http://www.w3.org/2000/svg", ""))
    page.encode()
    return parsed


@pytest.mark.parametrize("attention", [True, False])
def test_a_page_is_valid_and_asks_nothing_of_anybody(attention: bool) -> None:
    """It is opened from a mail on a train, and must neither break nor tell anyone."""
    parsed = check(render(page_results(attention=attention)))
    text = " ".join(parsed.text)
    for words in ("Models", "Losses", "Attention", "disagree", "How it was made", "61%"):
        assert words in text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_and_never_run(text: str) -> None:
    """Rows come from strangers; a page that runs what they wrote is an attack on whoever opens it."""
    plain, hostile = check(render(page_results())), check(render(page_results(text)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    expected = re.sub("[\x00-\x08\x0b-\x1f\ud800\ufffe]", "\ufffd", text)
    assert "".join(hostile.text).count(expected) >= 20


def test_the_maps_come_through_their_script_unchanged() -> None:
    """Escaping for HTML must not change what the page's script reads."""
    for text in HOSTILE:
        if "\x00" not in text:
            data = json.loads(check(render(page_results(text))).scripts[0])
            assert data["sentences"][0]["text"] == text
            assert data["layers"][1]["teacher"] == {"layer": 6, "heads": 2}


def test_only_the_pages_own_style_and_script_may_run() -> None:
    """Were an escape forgotten, the browser would still refuse what it let in."""
    page = render(page_results(ALERT))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, found in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (content,) = re.findall(found, page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"


def test_without_jinja2_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one package that the page needs and training does not."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r'needs jinja2: pip install "tinybert\[report\]"'):
        render(page_results())


@settings(max_examples=25)
@given(st.text(max_size=60))
def test_any_text_leaves_the_page_whole(text: str) -> None:
    """Beyond the attacks that somebody thought of."""
    check(render(page_results(text)))


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_in_dark() -> None:
    """WCAG AA: 4.5 to 1 for text, on the ground and on what is raised from it."""
    style = re.search("<style>(.*?)</style>", render(page_results()), flags=re.DOTALL)
    assert style is not None
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style[1].split("@media", 2)[:2])
    assert set(light) == set(dark) > {"ink", "ground"}
    for colours in (light, dark):
        for text in ("ink", "soft", "student", "teacher"):
            for ground in ("ground", "raised"):
                assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert shutil.which("chromium"), "this test looks at pages with chromium: install it"
    with Chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_in_any_window(browser: Chromium, tmp_path: Path, width: int, dark: bool) -> None:
    """On a phone nothing sticks out, no request leaves, and nothing of the data runs."""
    for text in HOSTILE:
        path = tmp_path / "report.html"
        path.write_bytes(render(page_results(text)).encode())
        browser.requests.clear()
        browser.messages.clear()
        browser.open(path, width=width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.requests == [path.resolve().as_uri()]
        assert browser.messages == []
        assert browser.evaluate("document.querySelectorAll('#teacher-map .cell').length") == 4
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
def test_the_maps_are_chosen_by_keyboard_and_their_numbers_are_right(
    browser: Chromium, tmp_path: Path
) -> None:
    """Whoever has no mouse sees the same; and what is seen is what was packed."""
    path = tmp_path / "report.html"
    path.write_text(render(page_results()))
    browser.open(path)
    for _ in range(40):
        browser.press("Tab", 9)
        if browser.evaluate("document.activeElement.id") == "layer":
            break
    assert browser.evaluate("document.activeElement.id") == "layer"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.evaluate("document.getElementById('student-layer').textContent") == "2"
    browser.press("ArrowUp", 38)
    assert browser.evaluate("document.getElementById('student-layer').textContent") == "1"
    browser.press("Tab", 9)
    browser.press("ArrowDown", 40)  # the first head
    shown = browser.evaluate("[...document.querySelectorAll('#looks td')].map((cell) => cell.textContent)")
    assert shown == ["0.78", "0.78", "0.22", "0.22"], "200 and 55 of 255"
    assert "0 %" in browser.evaluate("document.getElementById('attention-said').textContent")
