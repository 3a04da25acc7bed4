"""Tables come in pieces, whole and in order, and go out so that they come back the same."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tinybert import tables
from tinybert.errors import InputError
from tinybert.tables import ENDINGS, OUTPUT_ENDINGS, open_source, open_writer

QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path | str, rows: int = 1000, split: str | None = None) -> list[dict[str, Any]]:
    return [row for table in open_source(path, split).tables(rows) for row in table.to_pylist()]


def write(path: Path, *pieces: pa.Table) -> Path:
    with open_writer(path) as writer:
        for piece in pieces:
            writer.write(piece)
    return path


def sizes(pieces: Iterable[pa.Table]) -> list[int]:
    return [piece.num_rows for piece in pieces]


ROWS = [{"text": f'row {place}, "so" called\u2028', "label": str(place % 3)} for place in range(25)]


def plain_file(folder: Path, ending: str) -> Path:
    """The rows in some format, not by our own writer."""
    path = folder / f"t{ending}"
    if ending == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
        return path
    if ending.startswith(".json"):
        lines = map(json.dumps, ROWS)
        text = json.dumps(ROWS) if ending == ".json" else "\n".join(lines)
    elif ending.startswith(".csv"):
        cells = ((row["text"].replace('"', '""'), row["label"]) for row in ROWS)
        text = "text,label\n" + "\n".join(f'"{text}",{label}' for text, label in cells)
    else:
        text = "text\tlabel\n" + "\n".join(f"{row['text']}\t{row['label']}" for row in ROWS)
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_pieces_have_the_size_asked_for_and_together_are_the_file(tmp_path: Path, ending: str) -> None:
    """Rows would be lost or doubled at the seams, or a label meet the text of another row."""
    source = open_source(plain_file(tmp_path, ending))
    assert source.schema.names == ["text", "label"]
    for rows in (1, 7, 10, 25, 26):
        pieces = list(source.tables(rows))
        assert sizes(pieces) == [rows] * (25 // rows) + [25 % rows] * (25 % rows > 0)
        assert [row for piece in pieces for row in piece.to_pylist()] == ROWS
        assert all(piece.schema == source.schema for piece in pieces)


def test_hub_data_come_in_pieces_with_their_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of hub data would have to be given by hand."""
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows = datasets.Dataset.from_dict({"text": list("abcde"), "label": [0, 1, 0, 1, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: rows)
    source = open_source("owner/name", "dev")
    assert (source.origin, source.name) == ("owner/name (validation)", "owner/name")
    assert b'"names": ["no", "yes"]' in source.schema.metadata[b"huggingface"]
    assert sizes(source.tables(2)) == [2, 2, 1]
    assert [row for piece in source.tables(2) for row in piece.to_pylist()] == rows.to_list()


def test_parquet_keeps_types_and_class_names(tmp_path: Path) -> None:
    """A score would come back as a rounded text, and a teacher's classes by number only."""
    features = datasets.Features(score=datasets.Value("float32"), label=datasets.ClassLabel(names=["n", "p"]))
    rows = datasets.Dataset.from_dict({"score": [0.1, 2, None], "label": [1, 0, 1]}, features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(tmp_path / "a.parquet")
    again = open_source(write(tmp_path / "b.parquet", *source.tables(2)))
    for one in (source, again):
        assert pa.concat_tables(one.tables(2)).to_pylist() == rows.to_list()
        assert one.schema.types == [pa.float32(), pa.int64()]
        assert b'"names": ["n", "p"]' in one.schema.metadata[b"huggingface"]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 5, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**63, 2**70]),
    st.floats(allow_nan=False),
    st.sampled_from(["", "a", "007", "2019-01-01"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from("ab"), SCALARS))


@QUICK
@given(
    st.lists(st.dictionaries(st.sampled_from(["x", "y"]), VALUES), min_size=1, max_size=6)
    | st.lists(st.dictionaries(st.sampled_from(["x", "y"]), SCALARS), min_size=1, max_size=6)
)
@example([{"x": 1}, {"x": 2.5}])
@example([{"x": 2**53 + 1}, {"x": 2.5}])
@example([{"x": [1]}, {"x": "a"}])
@example([{"x": 1}, {"y": None}, {"x": True}])
def test_json_pieces_have_the_types_of_the_whole(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """A column's type would change half-way, as its first rows hold whole numbers only, or nothing."""
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = open_source(tmp_path / "t.jsonl")
    pieces = list(source.tables(1))
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            expected = pa.array(values)
        except (pa.ArrowException, OverflowError):
            texts = [value if isinstance(value, str | None) else json.dumps(value) for value in values]
            nested = any(isinstance(value, list | dict) for value in values)
            empty = (isinstance(value, list) and value in ([], [None], [None, None]) for value in values)
            bare = [value if keep else None for value, keep in zip(values, empty, strict=True)]
            expected = pa.array(bare, pa.list_(pa.null())) if nested else pa.array(texts)
        assert source.schema.field(name).type == expected.type
        if pieces:
            assert pa.concat_tables(pieces).column(name).to_pylist() == expected.to_pylist()


CELLS = ["a", "b", '"', '""', ",", "\n", "\r\n", "\r", '5" nails', '"x"', '"x\ny"', '"a,b"', "\ufeff", ""]


@QUICK
@given(st.lists(st.sampled_from([*CELLS, "\n", "\n", ",", ","]), max_size=40), st.integers(1, 9))
@example(["a,b\r\n", "c,d\r\n"], 1)
@example(["\r\n", "a"], 1)
def test_small_blocks_make_no_difference_to_csv(tmp_path: Path, parts: list[str], block: int) -> None:
    """Where the file happens to be cut, rows would be lost or refused."""
    text = "x,y\na,b\n" + "".join(parts)
    (tmp_path / "t.csv").write_bytes(text.encode())
    options = pa.csv.ParseOptions(newlines_in_values=True)
    convert = pa.csv.ConvertOptions(column_types={"x": pa.string(), "y": pa.string()}, null_values=[])
    whole = text if text.endswith("\n") else text + "\n"
    expected: list[dict[str, Any]] | None
    try:
        reader = pa.csv.ReadOptions(use_threads=False)
        source = pa.BufferReader(whole.encode())
        expected = pa.csv.read_csv(source, reader, options, convert).to_pylist()
    except pa.ArrowException:
        expected = None
    if expected and text.count('"') % 2 and "\n" in expected[-1]["y"]:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK", block)
        if expected is None:
            with pytest.raises(InputError):
                read(tmp_path / "t.csv")
        else:
            assert read(tmp_path / "t.csv") == expected


def test_one_stray_quote_does_not_end_the_small_blocks(tmp_path: Path, monkeypatch) -> None:
    """One inch sign in a cell would have the rest of the file held in blocks as large as they may be."""
    (tmp_path / "t.csv").write_text('x,y\n5" nails,1\n' + "a,1\n" * 2000)
    monkeypatch.setattr(tables, "_BLOCK", 64)
    monkeypatch.setattr(tables, "_LONGEST_ROW", 1024)
    blocks = tables._Blocks(tmp_path / "t.csv")
    lengths = [len(block) for block in iter(lambda: blocks.read(1024), b"")]
    assert max(lengths) == 1024
    assert lengths.count(64) > 90
    assert len(read(tmp_path / "t.csv")) == 2001


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".csv.gz"])
def test_what_is_wrong_late_in_a_file_is_said_when_it_is_reached(tmp_path: Path, ending: str) -> None:
    """A ragged row after the first piece would pass, or be counted from that piece."""
    good = {".jsonl": '{"x": "a", "y": "b"}\n'}.get(ending, "a,b\n" if "csv" in ending else "a\tb\n")
    text = ("" if ending == ".jsonl" else good.replace("a", "x").replace("b", "y")) + good * 9 + "c\n" + good
    path = tmp_path / f"t{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    said = r"line 10 is not JSON" if ending == ".jsonl" else r"Row #11: Expected 2 columns, got 1"
    with pytest.raises(InputError, match=said) as caught:
        read(path, 2)
    assert str(path) in str(caught.value)


def test_a_late_open_quote_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row after the quote would be one text."""
    monkeypatch.setattr(tables, "_BLOCK", 64)
    (tmp_path / "t.csv").write_text("x,y\n" + '"a","b"\n' * 99 + 'a,"b\n' + "a,b\n" * 50)
    with pytest.raises(InputError, match="never closed: row 100 runs"):
        read(tmp_path / "t.csv", 10)


def test_a_file_may_begin_with_much_white_space_and_may_be_nothing_else(tmp_path: Path) -> None:
    """A file would be called empty by its first block."""
    path = tmp_path / "t.jsonl"
    path.write_text("\n" * (1 << 20) + '{"x": 1}')
    assert read(path) == [{"x": 1}]
    path.write_text("\n" * (1 << 21))
    with pytest.raises(InputError, match="is empty"):
        open_source(path)


def test_reading_may_stop_anywhere(tmp_path: Path) -> None:
    """The thread that reads ahead would be waited for, for ever, or read a closed file."""
    path = tmp_path / "t.csv"
    path.write_text("x,y\n" + "some text,1\n" * 400_000)
    for _ in range(20):
        pieces = open_source(path).tables(10)
        assert next(pieces).num_rows == 10
        del pieces


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
ODD = st.sampled_from(["\u2028", "\x85", '"', "a\rb", "\r\n", "\t", ",", " ", "", "NA", "\ufeff", "\x1c"])


@QUICK
@given(
    st.sampled_from([ending for ending in OUTPUT_ENDINGS if "tsv" not in ending]),
    st.lists(st.tuples(TEXT | ODD, TEXT | ODD), min_size=1, max_size=6),
    st.integers(1, 2),
)
def test_texts_come_back_as_they_were_written(
    tmp_path: Path, ending: str, rows: list[tuple[str, str]], width: int
) -> None:
    """A text would change on its way through a file: quotes, line ends, odd spaces, empty rows."""
    names = ["text", "odd, name"][:width]
    table = pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)})
    path = write(tmp_path / f"t{ending}", table.slice(0, 1), table.slice(1))
    assert read(path) == table.to_pylist()


@QUICK
@given(
    st.sampled_from([".tsv", ".tsv.gz"]),
    st.lists(st.tuples(TEXT | ODD, TEXT | ODD), min_size=1, max_size=6),
    st.integers(1, 2),
)
def test_a_tsv_comes_back_as_it_was_written_or_is_not_written(
    tmp_path: Path, ending: str, rows: list[tuple[str, str]], width: int
) -> None:
    """TSV cannot hold every text, and would make two rows of one."""
    table = pa.table({name: [row[place] for row in rows] for place, name in enumerate("xy"[:width])})
    cells = [cell for row in table.to_pylist() for cell in row.values()]
    if any(set(cell) & set("\t\r\n") for cell in cells) or (width == 1 and "" in cells):
        with pytest.raises(InputError, match=r"choose .parquet, .jsonl or .csv"):
            write(tmp_path / f"t{ending}", table)
    else:
        assert read(write(tmp_path / f"t{ending}", table)) == table.to_pylist()


@QUICK
@given(st.sampled_from(OUTPUT_ENDINGS), st.lists(st.tuples(st.floats(), st.integers(-(2**63), 2**63 - 1))))
def test_numbers_come_back_equal(tmp_path: Path, ending: str, rows: Sequence[tuple[float, int]]) -> None:
    """A teacher's probabilities would be rounded on their way to the student."""
    rows = [*rows, (0.1, 7)]
    table = pa.table({"score": [row[0] for row in rows], "count": [row[1] for row in rows]})
    back = read(write(tmp_path / f"t{ending}", table))
    assert [str(float(row["score"])) for row in back] == [str(float(row[0])) for row in rows]
    assert [int(row["count"]) for row in back] == [row[1] for row in rows]


@pytest.mark.parametrize("ending", OUTPUT_ENDINGS)
def test_what_is_empty_stays_empty_and_truth_has_one_spelling(tmp_path: Path, ending: str) -> None:
    """The word None would be learnt from, and True and true be two classes."""
    table = pa.table({"text": ["a", None], "label": [True, None], "none": pa.nulls(2)})
    back = read(write(tmp_path / f"t{ending}", table))
    typed = ending == ".parquet" or "json" in ending
    empty = None if typed else ""
    assert back == [
        {"text": "a", "label": True if typed else "true", "none": empty},
        {"text": empty, "label": empty, "none": empty},
    ]


def test_lists_and_objects_go_through_json_lines_and_parquet_only(tmp_path: Path) -> None:
    """A list would be written as Python prints it, which nothing reads."""
    table = pa.table({"text": ["a", "b"], "tags": [["x"], []], "more": [{"a": 1}, None]})
    for ending in (".jsonl", ".parquet"):
        assert read(write(tmp_path / f"t{ending}", table), 1) == table.to_pylist()
    for ending in (".csv", ".tsv.gz"):
        with pytest.raises(InputError, match=r"'tags' holds \['x'\], no text .* choose .parquet or .jsonl"):
            write(tmp_path / f"t{ending}", table)
    with pytest.raises(InputError, match=r"bytes is not JSON serializable\): choose .parquet"):
        write(tmp_path / "t.jsonl", pa.table({"raw": [b"\0"]}))


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    """A zipped file would differ by the time it was written, and look like other data."""
    table = pa.Table.from_pylist(ROWS)
    for ending in OUTPUT_ENDINGS:
        one, two = write(tmp_path / f"a{ending}", table), write(tmp_path / f"b{ending}", table)
        assert one.read_bytes() == two.read_bytes()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """The user would learn of it after the work, and by a traceback."""
    table = pa.table({"text": ["a"]})
    for name in ("t.json", "t.xlsx", "t", "t.parquet.gz"):
        with pytest.raises(InputError, match=r"give it one of the endings \.csv, .*\.parquet"):
            write(tmp_path / name, table)
    with pytest.raises(InputError, match=r"cannot write .*gone.* name another file"):
        write(tmp_path / "gone" / "t.csv", table)
    for ending in (".csv", ".parquet"):
        with pytest.raises(ValueError, match=r"[Tt]able schema|columns \['other'\] came after"):
            write(tmp_path / f"t{ending}", table, pa.table({"other": ["a"]}))


PEAKS = """
import resource, sys
from pathlib import Path
from tinybert.tables import open_source, open_writer
for path in sys.argv[1:]:
    rows = 0
    with open_writer(Path(path).with_name("out" + Path(path).suffix)) as writer:
        for piece in open_source(path).tables(1000):
            writer.write(piece)
            rows += piece.num_rows
    print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is counted in other units")
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    """Labelling a file larger than memory would end without a word, after hours."""
    letters = random.Random(0).choices("abcdefgh ", k=1_000_000)
    texts = ["".join(letters[start : start + 1000]) for start in range(0, len(letters), 1000)]
    megabyte = pa.table({"text": texts, "label": ["1"] * len(texts)})
    paths = [write(tmp_path / f"{size}{ending}", *[megabyte] * size) for size in (32, 128)]
    printed = subprocess.check_output([sys.executable, "-c", PEAKS, *map(str, paths)], text=True)
    (few, small), (many, large) = (map(int, line.split()) for line in printed.splitlines())
    assert (few, many) == (32_000, 128_000)
    assert large < small + 48
