"""A dict of results -> one HTML page that holds all it needs and asks nothing of any server."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tinybert.charts import Series, line_chart, scatter_chart
from tinybert.errors import InputError

# What no HTML page may hold: control characters other than tab and line feed, and noncharacters.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")


@cache
def _part(ending: str) -> str:
    return Path(__file__).with_name(f"report.{ending}").read_text(encoding="utf-8")


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError('the report needs jinja2: pip install "tinybert[report]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    return environment.from_string(_part("html"))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json_for_script(value: object) -> str:
    """Return JSON in which no HTML parser sees a tag, a comment or an entity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _panel(panel: Mapping[str, Any]) -> dict[str, Any]:
    from markupsafe import Markup

    series = [Series(name, points) for name, points in panel["series"].items()]
    return {"title": panel["title"], "chart": Markup(line_chart(panel["title"], series, "step"))}


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {name for panel in stage["panels"] for name in panel["series"]}
    return {**stage, "kinds": kinds, "panels": [_panel(panel) for panel in stage["panels"]]}


def render(results: Mapping[str, Any]) -> str:
    """Return the page.

    Every text among the results is data: it is escaped where it stands, and none of it can become markup,
    style or script. The page's security policy lets only its own style and script run, by their hashes.

    Args:
        results: All text and numbers, ready to be shown:

            - ``name`` of the run; ``verdict``: sentences, the first the most important.
            - ``table``: ``header``, ``rows`` (lists of cells), ``notes``.
            - ``tradeoff``: ``points`` (name, x, y), ``x_label``, ``y_label``; or None.
            - ``stages``: each a ``title``, ``sentences`` and ``panels``: a ``title`` and ``series``, lists of
              (step, value) by name.
            - ``attention``: ``reason`` where there are no maps, else None with ``notes`` and what
              `tinybert.attention_maps.attention_maps` returns: ``layers``, ``sentences``.
            - ``disagreements``: ``reason`` or None with ``sentences`` and ``rows``: ``number``, ``text``,
              ``pair`` or None, ``gold``, and of ``teacher`` and ``student`` ``answer``, ``confidence``,
              ``is_right``.
            - ``made``: ``command`` and ``groups``, each a ``title`` and ``entries``, pairs of texts.

    Raises:
        InputError: jinja2 is not installed.
    """
    template = _template()
    from markupsafe import Markup  # comes with jinja2

    style, script = _part("css"), _part("js")
    attention, tradeoff = results["attention"], results["tradeoff"]
    shown = {name: attention.get(name) for name in ("layers", "sentences")}
    page = template.render(
        **{name: results[name] for name in ("name", "verdict", "table", "disagreements", "made")},
        stages=[_stage(stage) for stage in results["stages"]],
        tradeoff=Markup(scatter_chart(**tradeoff)) if tradeoff else "",
        attention=attention,
        attention_json=Markup(_json_for_script(shown)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return _NOT_TEXT.sub("\ufffd", page)
