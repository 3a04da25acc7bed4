"""A corpus is read in pieces, from any row on, and says in one line what is wrong with it."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from tinybert import corpus as corpus_room
from tinybert.corpus import Corpus, open_corpus
from tinybert.errors import InputError

# Paragraphs of documents; JSON and Parquet hold documents of one text.
DOCUMENTS = [
    ["the film\u2028was", "a plot\x85and\x0b\x0c\x1cwas"],
    ["fine"],
    ["very good cast", "dull", "bad"],
]
TEXTS = [text for document in DOCUMENTS for text in document]


def lines_of(documents: list[list[str]], ending: str = "\n") -> bytes:
    return (ending + ending).join(ending.join(document) for document in documents).encode()


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pa.parquet.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def documents(corpus: Corpus, shard: int = 0, start_row: int = 0) -> list[list[str]]:
    """The documents of a shard from a row on; the last must be ended."""
    found: list[list[str]] = [[]]
    for _, texts in corpus.read(shard, start_row):
        for text in texts:
            if text:
                found[-1].append(text)
            else:
                found.append([])
    assert found[-1] == []
    return [document for document in found if document]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("t.txt", bytes),
        ("no_ending", bytes),
        ("t.tok", bytes),
        ("T.TXT.GZ", gzip.compress),
        ("t.txt.bz2", bz2.compress),
        ("t.txt.xz", lzma.compress),
        ("wiki_00.bz2", bz2.compress),
        ("a [1] *.txt", bytes),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_are_paragraphs_and_blank_lines_end_documents(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes], ending: str
) -> None:
    """A line cut at U+2028, or a file name taken for a pattern, would lose text without a word."""
    path = write(tmp_path / name, change(b"\xef\xbb\xbf" + lines_of(DOCUMENTS, ending)))
    assert documents(open_corpus([path])) == DOCUMENTS


@pytest.mark.parametrize("blank", ["", " \t ", "\u2028", "\u3000"])
def test_a_line_of_white_space_is_blank(tmp_path: Path, blank: str) -> None:
    """It would be a paragraph without pieces, and two articles would be one document."""
    path = write(tmp_path / "t.txt", f"good\n{blank}\n{blank}\nbad\n{blank}\n".encode())
    assert documents(open_corpus([path])) == [["good"], ["bad"]]


@pytest.mark.parametrize("kind", ["t.jsonl", "t.json", "list.json", "t.jsonl.gz", "t.parquet"])
def test_each_row_is_a_document_and_blank_rows_are_none(tmp_path: Path, kind: str) -> None:
    """Rows that became one document would share blocks."""
    rows = [{"text": text, "id": place} for place, text in enumerate([None, *TEXTS, " ", "", None])]
    if kind == "t.parquet":
        path = write_parquet(tmp_path / kind, {name: [row[name] for row in rows] for name in ("id", "text")})
    elif kind == "list.json":
        path = write(tmp_path / kind, json.dumps(rows, indent=1).replace("[\n", "[").encode())
    else:
        change = gzip.compress if kind.endswith(".gz") else bytes
        path = write(tmp_path / kind, change(b"\xef\xbb\xbf" + jsonl([*rows, {"id": 7}]) + b"\n\n"))
    assert documents(open_corpus([path])) == [[text] for text in TEXTS]


def test_columns_that_we_do_not_need_may_change_their_types(tmp_path: Path) -> None:
    """Crawled text has records beside it whose shape changes after a million rows."""
    rows = [{"text": "good", "meta": 1}] * 300 + [{"meta": {"a": ["b"]}, "text": "bad", "new": None}]
    assert documents(open_corpus([write(tmp_path / "t.jsonl", jsonl(rows))])) == [["good"]] * 300 + [["bad"]]


def test_half_a_character_does_not_stop_the_reading(tmp_path: Path) -> None:
    """JSON can spell it, and the tokenizer raises a TypeError on it in the third hour."""
    path = write(tmp_path / "t.jsonl", rb'{"text": "good \ud83d bad"}')
    assert documents(open_corpus([path])) == [["good ? bad"]]


@pytest.mark.parametrize("kind", ["t.txt", "t.jsonl", "t.parquet"])
def test_reading_goes_on_exactly_from_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A resumed run would see a paragraph twice, or never."""
    monkeypatch.setattr(corpus_room, "_ROWS", 7)
    texts = [f"the film {place}" if place % 3 else "" for place in range(300)]
    rows = [{"text": text} for text in texts]
    if kind == "t.parquet":
        path = write_parquet(tmp_path / kind, {"text": texts})
    else:
        path = write(tmp_path / kind, jsonl(rows) if kind == "t.jsonl" else "\n".join(texts).encode())
    corpus = open_corpus([path])
    pieces = list(corpus.read(0))
    marks = [0, *(row for row, _ in pieces)]
    assert len(set(marks)) == 44
    for place, mark in enumerate(marks):
        rest = [text for _, piece in pieces[place:] for text in piece]
        assert [text for _, piece in corpus.read(0, mark) for text in piece] == (rest or [""])
    for start in (1, 127, 128, 129, 256):
        rest = [text for text in texts[start:] if text]
        assert [text for _, piece in corpus.read(0, start) for text in piece if text] == rest


def test_pieces_are_bounded_in_rows_and_characters(tmp_path: Path) -> None:
    """A piece is tokenised in one call, which takes a hundred bytes a character."""
    path = write(tmp_path / "t.txt", b"a\n" * 2500 + (b"b" * 100_000 + b"\n") * 9)
    sizes = [(len(piece), sum(map(len, piece))) for _, piece in open_corpus([path]).read(0)]
    assert sizes[:2] == [(1000, 1000), (1000, 1000)]
    assert max(characters for _, characters in sizes) < 400_000
    assert sum(characters for _, characters in sizes) == 902_500


def test_folders_and_globs_are_read_in_order_without_what_is_no_text(tmp_path: Path) -> None:
    """Notes and hidden files in the folder would become training text."""
    folder = tmp_path / "corpus"
    (folder / "AA").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("b.txt", "a.jsonl", "AA/wiki_00", ".git/x.txt", ".hidden.txt", "README.md", "empty.txt"):
        write(
            folder / name, b'{"text": "good"}' if name.endswith("jsonl") else b"good" * (name != "empty.txt")
        )
    names = [str(folder / name) for name in ("AA/wiki_00", "a.jsonl", "b.txt")]
    assert open_corpus([str(folder)]).names == names
    assert open_corpus([str(folder / "?.*"), str(folder)]).names == [*names[1:], names[0]]


def test_the_column_is_text_or_the_one_asked_for_or_the_only_one(tmp_path: Path) -> None:
    """The title, or the address, would be distilled in place of the text."""
    rows = {"id": [1], "title": ["bad"], "content": ["good"]}
    parquet = write_parquet(tmp_path / "t.parquet", rows)
    lines = write(tmp_path / "t.jsonl", jsonl([{name: cells[0] for name, cells in rows.items()}]))
    for path in (parquet, lines):
        assert documents(open_corpus([path], text_column="content")) == [["good"]]
        expected = r"has the columns id, title \(text\), content \(text\): expected one .* with --columns$"
        with pytest.raises(InputError, match=expected):
            open_corpus([path], option="columns")
        with pytest.raises(InputError, match=r"expected 'body' with text"):
            open_corpus([path], text_column="body")
        with pytest.raises(InputError, match=r"expected 'id' with text"):
            open_corpus([path], text_column="id")
    assert documents(open_corpus([write_parquet(tmp_path / "o.parquet", {"n": [1], "body": ["good"]})])) == [
        ["good"]
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"good\n" * 999 + b"caf\xe9\n", "is not UTF-8 text .* save it as UTF-8"),
        ("t.txt.bz2", bz2.compress(b"good\n" * 999 + b"caf\xe9\n"), "is not UTF-8 text .* save it as UTF-8"),
        ("t.txt.gz", gzip.compress(bytes(range(60)) * 5000)[:-30], "cannot be read .*end-of-stream"),
        ("t.txt.gz", b"no gzip at all", "cannot be read .*gzip"),
        ("t.txt.xz", lzma.compress(b"good\n" * 9999)[:-40], "cannot be read"),
        ("t.txt.zst", b"\x28\xb5\x2f\xfd123456", "cannot be read .*zst"),
        ("t.jsonl", jsonl([{"text": "good"}] * 150) + b'{"text": "go', "line 151 is not JSON"),
        ("t.jsonl", jsonl([{"text": "good"}] * 150) + b"3", "line 151 is 3: expected an object"),
        ("t.jsonl", jsonl([{"text": "good"}] * 150 + [{"text": 3}]), "line 151 has 3 as 'text'"),
        ("t.json", b'[{"text": "good"}, {"te', "cannot be read"),
        ("t.parquet", b"PAR1 and no more PAR1", "cannot be read"),
    ],
)
def test_damage_names_the_file_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A traceback from the depth of a library does not say which of a thousand files to repair."""
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        list(open_corpus([path]).read(0))
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_within_a_parquet_file_names_it(tmp_path: Path) -> None:
    """The end of the file, where the columns are described, can be whole."""
    path = Path(write_parquet(tmp_path / "t.parquet", {"text": [f"film {i}" for i in range(999)]}))
    content = bytearray(path.read_bytes())
    content[100:3000] = b"\xff" * 2900
    corpus = open_corpus([write(path, bytes(content))])
    with pytest.raises(InputError, match=r"t\.parquet cannot be read"):
        list(corpus.read(0))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.txt", "nothing.txt: no such file or folder"),
        ("data/nothing.csv", "data/nothing.csv: no such file or folder"),
        ("no*.txt", r"no\*.txt: no file matches this pattern"),
        (".", r"is a folder with no text in .*it has notes.md"),
        ("t.csv", r"t.csv is no text: expected .txt"),
        ("empty.txt", "the corpus is empty"),
    ],
)
def test_what_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    """`datasets` takes a missing file for one without rows, and trains on nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    write(tmp_path / "notes.md", b"good")
    if source != ".":
        write(tmp_path / "t.csv", b"good")
        write(tmp_path / "empty.txt", b"")
    with pytest.raises(InputError, match=message):
        open_corpus([source])
    with pytest.raises(InputError, match="expected a list"):
        open_corpus(source)


def rows_of_parts(parts: list[list[str | None]]) -> Any:
    for part in parts:
        for text in part:
            yield {"id": 1, "text": text}


@pytest.mark.parametrize("known", [True, False])
def test_hub_data_come_in_their_shards(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """A shard is what a resumed run does not have to read again."""
    features = datasets.Features({"id": datasets.Value("int64"), "text": datasets.Value("string")})
    asked = []

    def load_dataset(*names: str, **options: Any) -> datasets.IterableDataset:
        asked.append((names, options))
        parts = [["good", None, "bad"], ["fine"]]
        return datasets.IterableDataset.from_generator(
            rows_of_parts, features if known else None, gen_kwargs={"parts": parts}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus(["owner/name/subset"])
    assert asked == [(("owner/name", "subset"), {"split": "train", "streaming": True})]
    assert corpus.names == ["owner/name/subset (part 1 of 2)", "owner/name/subset (part 2 of 2)"]
    assert [documents(corpus, shard) for shard in (0, 1)] == [[["good"], ["bad"]], [["fine"]]]
    assert documents(corpus, 0, 2) == [["bad"]]
    assert [size for _, size in corpus.sizes()] == [None, None]


def test_a_hub_that_does_not_answer_is_one_line() -> None:
    """The tests are offline, so this is what the hub's own error becomes."""
    with pytest.raises(InputError, match=r"^owner/name is no local path, and the hub did not .*$"):
        open_corpus(["owner/name"])


def test_the_fingerprint_tells_corpora_apart_but_not_their_folders(tmp_path: Path) -> None:
    """A run resumed on other text would go on as if nothing had happened."""

    def fingerprint(name: str, content: bytes, **options: Any) -> str:
        path = tmp_path / str(len(list(tmp_path.iterdir()))) / name
        path.parent.mkdir()
        return open_corpus([write(path, content)], **options).fingerprint()

    long = b"good\n" * 50_000
    row = jsonl([{"text": "good", "title": "bad"}])
    ours = fingerprint("t.txt", long)
    assert fingerprint("t.txt", long) == ours
    others = [
        fingerprint("u.txt", long),
        fingerprint("t.txt", b"x" + long[1:]),
        fingerprint("t.txt", long[:-1] + b"x"),
        fingerprint("t.txt", long + b"\n"),
        fingerprint("t.jsonl", row),
        fingerprint("t.jsonl", row, text_column="title"),
    ]
    assert len({ours, *others}) == 7


@pytest.mark.parametrize("kind", ["t.txt", "t.txt.gz", "t.jsonl", "t.jsonl.bz2", "t.parquet"])
def test_a_head_knows_its_share(tmp_path: Path, kind: str) -> None:
    """The length of a pass is reckoned from it."""
    texts = [f"film {place:05} was {place * place % 977:03}" for place in range(20_000)]
    content = jsonl([{"text": t} for t in texts]) if "json" in kind else "\n".join(texts).encode()
    if kind == "t.parquet":
        path = write_parquet(tmp_path / kind, {"text": texts})
    else:
        change = {"gz": gzip.compress, "bz2": bz2.compress}.get(kind.rpartition(".")[2], bytes)
        path = write(tmp_path / kind, change(content))
    corpus = open_corpus([path])
    for characters in (1, 100_000):
        found, share = corpus.head(0, characters)
        assert share == pytest.approx(len([text for text in found if text]) / 20_000, rel=0.03)
        assert share < 1
    assert corpus.head(0, 10**7)[1] == 1


@pytest.mark.parametrize("change", [gzip.compress, lzma.compress, lambda content: bz2.compress(content, 1)])
def test_a_head_of_a_long_compressed_file_is_reckoned_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    """How long the text is nobody knows without reading all of it."""
    monkeypatch.setattr(corpus_room, "_RATIO", 1 << 19)
    generator = random.Random(0)
    texts = [" ".join(f"{generator.randrange(10**6):06}" for _ in range(10)) for _ in range(15_000)]
    ending = {gzip.compress: "gz", lzma.compress: "xz"}.get(change, "bz2")
    path = write(tmp_path / f"t.txt.{ending}", change("\n".join(texts).encode()))
    found, share = open_corpus([path]).head(0, 30_000)
    assert share == pytest.approx(len([text for text in found if text]) / 15_000, rel=0.06)
