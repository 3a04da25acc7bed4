"""Files and hub names become rows, and rows become tokens."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from tinybert.data import ENDINGS, load_data, split_rows, tokenize
from tinybert.errors import InputError

WORDS = ["good", "bad", "film", "a", "the"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that nothing is answered by an earlier run."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def tokenizer() -> BertTokenizerFast:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={piece: place for place, piece in enumerate(pieces)})


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(data) -> list[str]:
    return list(data.rows["text"])


def labels(data) -> list[float]:
    return list(data.rows["label"])


ROWS = [("a good film", 1), ("a bad, bad film", 0), ("the film", 1)]


def table_bytes(ending: str) -> bytes:
    if ending.startswith(".json"):
        objects = [{"text": text, "label": label} for text, label in ROWS]
        text = json.dumps(objects) if ending == ".json" else "\n".join(map(json.dumps, objects))
    else:
        stream = io.StringIO()
        delimiter = "\t" if ending.startswith(".tsv") else ","
        csv.writer(stream, delimiter=delimiter).writerows([("text", "label"), *ROWS])
        text = stream.getvalue()
    return gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode()


@pytest.mark.parametrize("ending", [*ENDINGS[:-1], ".TSV"])
def test_the_same_rows_are_read_from_every_format(tmp_path: Path, ending: str) -> None:
    """One of the promised formats could not be read, or would be read as other data than the rest."""
    data = load_data(write(tmp_path / f"reviews{ending}", table_bytes(ending.lower())))
    plain = load_data(write(tmp_path / "plain.jsonl", table_bytes(".jsonl")))
    assert list(zip(texts(data), labels(data), strict=True)) == ROWS
    assert (data.kind, data.label_names, data.metric) == ("classification", ("0", "1"), "accuracy")
    assert data.fingerprint == plain.fingerprint


def test_parquet_class_names_are_kept_and_meet_a_teacher_by_name(tmp_path: Path) -> None:
    """A teacher whose classes stand in another order would be trained on swapped labels."""
    path = str(tmp_path / "rows.parquet")
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"])
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(path)
    assert load_data(path).label_names == ("neg", "pos")
    assert labels(load_data(path, label_names=["POS", "NEG"])) == [1, 0]


def test_a_tsv_is_read_byte_for_byte(tmp_path: Path) -> None:
    """A quotation mark would swallow rows, and U+2028 cut one in two: texts meet wrong labels."""
    odd = ['"', 'said "no', '""', "a\u2028b\x85c\x0bd\x0ce\x1cf", "nul\x00nul", " two  spaces ", "\\N", "'"]
    odd += ["NA", "null", "None", "nan", "-", "1", "é\U0001f600", "x" * 1_200_000]
    body = "".join(f"{text}\t{place % 2}\n" for place, text in enumerate(odd))
    for name, content in (("a", f"sentence\tlabel\n{body}"), ("b", f"\ufeffsentence\tlabel\n{body}".strip())):
        data = load_data(write(tmp_path / f"{name}.tsv", content))
        assert texts(data) == odd
        assert labels(data) == [place % 2 for place in range(len(odd))]
    crlf = load_data(write(tmp_path / "c.tsv", "sentence\tlabel\r\na \t1\r\nb\t0\r\n"))
    assert texts(crlf) == ["a ", "b"]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_csv_and_json_texts_come_back_as_they_were_written(tmp_path: Path, written: list[str]) -> None:
    """Some texts would be changed on the way in: quotes, line ends, odd spaces."""
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [["text", "label"], *[[text, "1"] for text in written]]
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    lines = [json.dumps({"text": text, "label": 1}, ensure_ascii=False) for text in written]
    write(tmp_path / "t.jsonl", "\n".join(lines))
    assert texts(load_data(tmp_path / "t.csv")) == written
    assert texts(load_data(tmp_path / "t.jsonl")) == written


def test_texts_that_look_like_dates_or_numbers_stay_texts(tmp_path: Path) -> None:
    """Dates would be printed as timestamps and numbers lose their zeros before the model sees them."""
    content = (
        '{"text": "2019-01-01", "label": "a"}\n{"text": "007", "label": "b"}\n{"text": 5, "label": "b"}\n'
    )
    assert texts(load_data(write(tmp_path / "t.jsonl", content))) == ["2019-01-01", "007", "5"]
    assert texts(load_data(write(tmp_path / "t.csv", "text,label\n2019-01-01,1\n007,0\n"))) == [
        "2019-01-01",
        "007",
    ]


def test_a_glue_folder_gives_columns_classes_and_metric(tmp_path: Path) -> None:
    """A user with the GLUE archive would have to know all of this by heart."""
    write(tmp_path / "MRPC/train.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n")
    write(tmp_path / "MRPC/dev.tsv", "sentence1\tsentence2\tlabel\nc\td\t0\ne\tf\t1\n")
    data = load_data(tmp_path / "MRPC", split="validation")
    assert data.rows.column_names == ["text", "text_pair", "label"]
    assert list(data.rows["text_pair"]) == ["d", "f"]
    assert data.label_names == ("not_equivalent", "equivalent")
    assert data.metric == "accuracy_f1"
    assert labels(load_data(tmp_path / "MRPC", split="train")) == [1]  # one class in the file, still class 1
    assert load_data(tmp_path / "MRPC", split="dev").fingerprint == data.fingerprint


def test_scores_make_a_regression_and_a_glue_score_is_one_even_where_all_are_integers(tmp_path: Path) -> None:
    """STS-B would be trained as a classification of 6 scores because a small file has whole ones only."""
    content = "sentence1\tsentence2\tlabel\na\tb\t5\nc\td\t0\n"
    assert load_data(write(tmp_path / "STS-B/dev.tsv", content)).kind == "regression"
    other = load_data(write(tmp_path / "other.tsv", content.replace("5", "4.5")))
    assert (other.kind, other.label_names, labels(other)) == ("regression", (), [4.5, 0.0])
    assert load_data(write(tmp_path / "c.tsv", content)).kind == "classification"


def test_unlabelled_rows_are_read_where_labels_are_not_required(tmp_path: Path) -> None:
    """Augmentation and GLUE's test sets need texts only."""
    for content in ("text\na\nb\n", "text\tlabel\na\t-1.0\nb\t-1.0\n", "text\tlabel\na\t\nb\t\n"):
        path = write(tmp_path / "t.tsv", content)
        data = load_data(path, require_labels=False)
        assert (data.rows.column_names, texts(data)) == (["text"], ["a", "b"])
        with pytest.raises(InputError, match=r"no (usual label column|labels)"):
            load_data(path)


def test_named_columns_win_over_the_usual_ones(tmp_path: Path) -> None:
    """The user's own choice would be ignored."""
    path = write(tmp_path / "t.csv", "text,label,body,Label,mood\na,0,x,1,up\nb,1,y,0,down\n")
    data = load_data(path, text_columns=["body", "text"], label_column="mood")
    assert (texts(data), list(data.rows["text_pair"]), labels(data)) == (["x", "y"], ["a", "b"], [1, 0])
    assert labels(load_data(path, label_column="Label")) == [1, 0]


PAIR = "sentence1\tsentence2\tlabel\n"
BAD_FILES = {
    "no rows": ("t.csv", "text,label\n", "no rows"),
    "header without line end": ("t.csv", "text,label", "no rows"),
    "nothing": ("t.tsv", "", "is empty"),
    "blank": ("t.jsonl", " \n\n", "is empty"),
    "no text column": ("t.csv", "foo,label\na,1\n", "it has 'foo', 'label': give --text_columns"),
    "no label column": ("t.csv", "text,bar\na,1\n", "it has 'text', 'bar': give --label_column"),
    "many columns": ("t.csv", ",".join(f"c{i}" for i in range(5000)) + "\n" + "1," * 4999 + "1", "4980 more"),
    "twins": ("t.csv", "text,text,label\na,b,1\n", "more than one column called 'text'"),
    "missing label": ("t.csv", "text,label\na,1\nb,\n", "label '' in row 2 is empty"),
    "null label": ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', "label '' in row 2 is empty"),
    "nan label": ("t.jsonl", '{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}', "in row 2 is empty"),
    "wordy score": ("STS-B/dev.tsv", f"{PAIR}a\tb\t1\nc\td\tx\n", "label 'x' in row 2 is not a number"),
    "unknown class": ("RTE/dev.tsv", f"{PAIR}a\tb\t1\nc\td\t2\n", "label '2' in row 2 is not one of"),
    "unknown ending": ("t.xlsx", "text,label\na,1\n", r"expected .csv, .csv.gz, .tsv"),
    "empty text": ("t.csv", "text,label\na,1\n \u2028,0\n", "'text' is empty in row 2"),
    "null text": ("t.jsonl", '{"text": null, "label": 1}', "'text' is empty in row 1"),
    "ragged": ("t.tsv", "text\tlabel\na\t1\nb\n", "Row #3: Expected 2 columns, got 1"),
    "bare carriage return": ("t.tsv", "text\tlabel\na\rb\t1\n", "Expected 2 columns, got 1"),
    "open quote": ("t.csv", 'label,text\n1,"a\n0,b\n1,c\n', "quote .* is never closed: row 1"),
    "open quote, ragged": ("t.csv", 'text,label\n"a,1\nb,0\n', "Expected 2 columns, got 1"),
    "latin-1": ("t.csv", "text,label\ncaf\xe9,1\n".encode("latin-1"), "not UTF-8"),
    "latin-1 header": ("t.tsv", "t\xe9xt\tlabel\na\t1\n".encode("latin-1"), "not UTF-8"),
    "latin-1 json": ("t.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8"),
    "utf-16": ("t.csv", "text,label\na,1\n".encode("utf-16"), "not UTF-8"),
    "surrogate": ("t.jsonl", '{"text": "\\ud800", "label": 1}', "not UTF-8"),
    "broken json line": ("t.jsonl", '{"text": "a", "label": 1}\n{"text": ', "line 2 is not JSON"),
    "broken json list": ("t.json", '[{"text": "a"', "cannot be read as json"),
    "deep json": ("t.json", "[" * 100_000, "cannot be read as json"),
    "not objects": ("t.json", "[1, 2]", "row 1 is 1: expected an object"),
    "list text": ("t.jsonl", '{"text": ["a"], "label": 1}', "column 'text' holds 'list"),
    "mixed list text": ("t.jsonl", '{"text": ["a"], "label": 1}\n{"text": "b", "label": 1}', "holds 'list"),
    "object text": ("t.jsonl", '{"text": {"a": 1}, "label": 1}', "column 'text' holds 'struct"),
    "not gzip": ("t.csv.gz", "text,label\na,1\n", "cannot be read as csv"),
    "cut gzip": ("t.csv.gz", gzip.compress(b"text,label\na,1\n" * 99)[:-20], "cannot be read as csv"),
    "not parquet": ("t.parquet", "text,label\na,1\n", "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    """The user would see a traceback, or train on rows that were silently misread."""
    name, content, message = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        load_data(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_columns_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    """The user would have to open the file to learn what its columns are called."""
    path = write(tmp_path / "t.csv", "text,label\na,1\n")
    with pytest.raises(InputError, match=r"no column 'body'; it has 'text', 'label'"):
        load_data(path, text_columns=["body"])
    with pytest.raises(InputError, match=r"no label column 'mood'; beside the text it has 'label'"):
        load_data(path, label_column="mood")
    with pytest.raises(InputError, match="no label column 'text'"):
        load_data(path, label_column="text")
    with pytest.raises(InputError, match="one column, or two different ones"):
        load_data(path, text_columns=["text", "text"])


def test_bytes_that_are_no_text_are_refused_in_parquet(tmp_path: Path) -> None:
    """Arrow does not look, and Python would fail far away, in the tokenizer."""
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    path = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"text": bad, "label": [1]}), path)
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_data(path)


def test_a_missing_local_file_never_asks_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path would wait for a time-out, and then speak of the hub."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    write(tmp_path / "folder/train.tsv", "text\tlabel\na\t1\n")
    for source in ("data/train.csv", "train.jsonl", str(tmp_path / "gone"), "../data/x", "word"):
        with pytest.raises(InputError, match="no such file or folder"):
            load_data(source, split="train")
    with pytest.raises(InputError, match=r"no file for the split 'test'.*it has 'train.tsv'"):
        load_data(tmp_path / "folder", split="test")
    with pytest.raises(InputError, match="say which split"):
        load_data(tmp_path / "folder")
    with pytest.raises(InputError, match="say which split"):
        load_data("owner/name")


def test_a_hub_name_is_asked_for_by_owner_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`glue/sst2` would be looked for under an owner called glue; unlabelled test sets would be scored."""
    asked = []

    def load_dataset(*names: str, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        names_of_classes = datasets.ClassLabel(names=["negative", "positive"])
        features = datasets.Features(sentence=datasets.Value("string"), label=names_of_classes)
        label = -1 if split == "test" else 1
        return datasets.Dataset.from_dict({"sentence": ["a"], "label": [label]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("glue/sst2", split="dev")
    assert (labels(data), data.label_names, data.metric) == ([1], ("negative", "positive"), "accuracy")
    assert load_data("owner/name/part", split="test", require_labels=False).rows.column_names == ["text"]
    load_data("glue/mnli", split="validation")
    assert asked == [
        ("nyu-mll/glue", "sst2", "validation"),
        ("owner/name", "part", "test"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
    ]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user would see forty lines of a network library."""

    def fail(*names: str, split: str) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"owner/name is no local path, and the hub .*: no route"):
        load_data("owner/name", split="train")


def test_a_changed_file_is_noticed_even_with_the_old_time_and_size(tmp_path: Path) -> None:
    """The rows of yesterday's file would be trained on."""
    path = write(tmp_path / "t.csv", "text,label\nold,1\n")
    stamp = path.stat().st_mtime_ns
    first = load_data(path)
    write(path, "text,label\nnew,1\n")
    os.utime(path, ns=(stamp, stamp))
    second = load_data(path)
    assert (texts(first), texts(second)) == (["old"], ["new"])
    assert first.fingerprint != second.fingerprint


def test_the_fingerprint_is_a_fixed_function_of_the_rows(tmp_path: Path) -> None:
    """Two machines would disagree on whether they trained on the same data."""
    data = load_data(write(tmp_path / "t.csv", "text,label\na good film,1\nbad,0\n"))
    content = b'{"label": [1, 0], "text": ["a good film", "bad"]}'
    assert data.fingerprint == hashlib.sha256(content).hexdigest()
    moved = load_data(write(tmp_path / "u.csv", "text,label\nbad,0\na good film,1\n"))
    assert moved.fingerprint != data.fingerprint


NAMED = [["joy", "fear"], [], ["anger"], ["fear"]]
FLAGS = [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # anger, fear, joy


def write_lists(path: Path, lists: list[object]) -> Path:
    rows = [json.dumps({"text": f"text {place}", "labels": cell}) for place, cell in enumerate(lists)]
    return write(path, "\n".join(rows))


def test_lists_of_labels_and_columns_of_zeros_and_ones_are_the_same_rows(tmp_path: Path) -> None:
    """Both forms are common, and a teacher's order of labels wins over either."""
    lists = load_data(write_lists(tmp_path / "a.jsonl", NAMED))
    assert (lists.kind, lists.label_names, lists.metric) == (
        "multi_label",
        ("anger", "fear", "joy"),
        "f1_micro",
    )
    assert lists.rows["label"] == FLAGS
    rows = ["text,anger,fear,joy", "text 0,0,1,True", "text 1,0,0,0", "text 2,1,0,0.0", "text 3,0,1,false"]
    flags = load_data(write(tmp_path / "b.csv", "\n".join(rows)), label_columns=["anger", "fear", "joy"])
    assert flags.rows["label"] == FLAGS
    assert flags.fingerprint == lists.fingerprint
    teacher = ("joy", "anger", "fear")
    turned = [[row[2], row[0], row[1]] for row in FLAGS]
    for source, columns in (("a.jsonl", None), ("b.csv", ["fear", "anger", "joy"])):
        data = load_data(tmp_path / source, label_columns=columns, label_names=teacher)
        assert (data.label_names, data.rows["label"]) == (teacher, turned)


def test_lists_of_ids_and_parquet_lists_with_class_names_are_understood(tmp_path: Path) -> None:
    """The hub keeps ids with their names beside them."""
    ids = load_data(write_lists(tmp_path / "a.jsonl", [[2, 1], [], [0], [1]]))
    assert (ids.label_names, ids.rows["label"]) == (("0", "1", "2"), FLAGS)
    feature = datasets.List(datasets.ClassLabel(names=["anger", "fear", "joy"]))
    rows = {"text": ["a", "b", "c", "d"], "labels": [[2, 1], [], [0], [1]]}
    hub = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"text": datasets.Value("string"), "labels": feature})
    )
    hub.to_parquet(tmp_path / "b.parquet")
    data = load_data(tmp_path / "b.parquet")
    assert (data.label_names, data.rows["label"]) == (("anger", "fear", "joy"), FLAGS)


@pytest.mark.parametrize(
    ("lists", "options", "words"),
    [
        ([["joy"], None], {}, "column 'labels' is empty in row 2: give a list, which may be empty"),
        ([["joy"], "fear"], {}, "column 'labels' is empty or mixes texts with lists: write one form"),
        ([["joy"], ["fear", " "]], {}, "label '' in row 2 is empty"),
        ([["joy"], []], {}, "expected two or more"),
        ([["joy"], ["fear"]], {"label_names": ("joy", "anger")}, "label 'fear' in row 2 is not one of"),
        ([["joy"], ["fear"]], {"kind": "classification"}, "are multi_label, and classification is expected"),
        (["joy", "fear"], {"kind": "multi_label"}, "holds one label a row, and any number"),
        (
            [1, 0],
            {"label_columns": ["labels", "text"], "label_column": "labels"},
            "--label_column has no meaning beside --label_columns: leave one of them out",
        ),
        ([1, 2], {"label_columns": ["labels"]}, "expected two or more different columns"),
        ([1, 2], {"label_columns": ["labels", "joy"]}, "expected two or more different columns"),
        ([1, 2], {"label_columns": ["labels", "text"]}, "'labels' is '2' in row 2: expected 0 or 1"),
        ([1, 0], {"label_columns": ["labels", "text"], "label_names": ("a", "b")}, "name the columns so"),
    ],
)
def test_labels_of_any_number_that_are_none_are_refused(
    lists: list[object], options: dict[str, object], words: str, tmp_path: Path
) -> None:
    """One line that names the row."""
    with pytest.raises(InputError, match=words) as caught:
        load_data(write_lists(tmp_path / "a.jsonl", lists), **options)
    assert "\n" not in str(caught.value)


def test_tokens_are_those_of_the_tokenizer_and_labels_follow(tmp_path: Path, tokenizer) -> None:
    """The model would be fed other tokens than at inference, or the labels of other rows."""
    path = write(tmp_path / "t.csv", "sentence1,sentence2,label\na good film,bad,1\nthe film,a a a a a a,0\n")
    data = load_data(path)
    tokens = tokenize(data, tokenizer, 8)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
    for row, text, pair in zip(tokens, texts(data), data.rows["text_pair"], strict=True):
        expected = tokenizer(text, pair, truncation="longest_first", max_length=8)
        assert row["input_ids"] == expected["input_ids"]
        assert row["token_type_ids"] == expected["token_type_ids"]
        assert row["length"] == len(row["input_ids"]) <= 8
    assert list(tokens["labels"]) == [1, 0]
    assert list(tokens["length"]) == [7, 8]


def test_unlabelled_rows_become_tokens_without_labels(tmp_path: Path, tokenizer) -> None:
    """The trainer would look for a loss where there is nothing to learn from."""
    data = load_data(write(tmp_path / "t.tsv", "text\na good film\n"), require_labels=False)
    assert "labels" not in tokenize(data, tokenizer, 8).column_names


def test_tokens_are_cached_per_content_length_and_tokenizer(tmp_path: Path, tokenizer) -> None:
    """Every run would tokenize again, or a run with another length would be given the wrong tokens."""
    data = load_data(write(tmp_path / "t.csv", "text,label\na good film,1\n"))
    first, again = tokenize(data, tokenizer, 8), tokenize(data, tokenizer, 8)
    assert first.cache_files == again.cache_files != []
    shorter = tokenize(data, tokenizer, 3)
    assert shorter.cache_files != first.cache_files
    assert list(shorter["length"]) == [3]
    assert tokenize(data, tokenizer, 8).cache_files == first.cache_files


def test_a_split_is_the_same_for_ever_and_in_any_order_of_the_file(tmp_path: Path) -> None:
    """Two runs, or two versions of a library, would be compared on different test sets."""
    lines = [f"film {place},{place % 2}\n" for place in range(50)]
    data = load_data(write(tmp_path / "a.csv", "text,label\n" + "".join(lines)))
    turned = load_data(write(tmp_path / "b.csv", "text,label\n" + "".join(reversed(lines))))
    parts = split_rows(data, {"test": 5, "train": None, "dev": 5}, seed=1)
    again = split_rows(turned, {"test": 5, "train": None, "dev": 5}, seed=1)
    assert {name: len(part.rows) for name, part in parts.items()} == {"test": 5, "train": 40, "dev": 5}
    assert texts(parts["test"]) == ["film 28", "film 4", "film 46", "film 18", "film 38"]
    for name, part in parts.items():
        assert texts(part) == texts(again[name])
        assert part.fingerprint == again[name].fingerprint
        assert labels(part) == [int(text.split()[1]) % 2 for text in texts(part)]
    assert sorted(text for part in parts.values() for text in texts(part)) == sorted(texts(data))
    assert texts(split_rows(data, {"test": 5}, seed=2)["test"]) != texts(parts["test"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"a": 3}, "few"), ({"a": 2, "b": None}, "few"), ({"a": 0}, "or more"), ({"a": None, "b": None}, "one")],
)
def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path, sizes, message: str) -> None:
    """A part would be silently empty or smaller than was asked for."""
    data = load_data(write(tmp_path / "t.csv", "text,label\na,1\nb,0\n"))
    with pytest.raises(InputError, match=message):
        split_rows(data, sizes, seed=0)


def test_a_cache_that_cannot_be_written_is_a_users_error(tmp_path: Path, monkeypatch) -> None:
    """A full or read-only disk would show as a traceback from within Arrow."""
    path = write(tmp_path / "t.csv", "text,label\na,1\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)  # a file where a folder must be
    with pytest.raises(InputError, match="set HF_DATASETS_CACHE"):
        load_data(path)


def test_another_process_finds_the_cached_tokens(tmp_path: Path, cache: Path, tokenizer) -> None:
    """A second run would tokenize everything again: hashes that change from process to process."""
    write(tmp_path / "t.csv", "text,label\na good film,1\n")
    code = (
        "from transformers import BertTokenizerFast\n"
        "from tinybert.data import load_data, tokenize\n"
        f"vocab = {{p: i for i, p in enumerate({['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]})}}\n"
        f"data = load_data({str(tmp_path / 't.csv')!r})\n"
        "print(tokenize(data, BertTokenizerFast(vocab=vocab), 8).cache_files[0]['filename'])\n"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    other = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()
    own = tokenize(load_data(tmp_path / "t.csv"), tokenizer, 8).cache_files
    assert other.startswith(str(cache))
    assert [file["filename"] for file in own] == [other]


@pytest.mark.parametrize("kind", [pa.large_list(pa.large_string()), pa.list_(pa.string(), 2)])
def test_lists_of_labels_may_be_large_or_all_of_one_length(kind: pa.DataType, tmp_path: Path) -> None:
    """So polars writes every list, however short, and numpy's rows become lists."""
    labels = pa.array([["x", "x"], ["y", "y"], ["x", "y"]], kind)
    pa.parquet.write_table(pa.table({"text": ["a", "b", "c"], "labels": labels}), tmp_path / "rows.parquet")
    data = load_data(tmp_path / "rows.parquet")
    assert data.kind == "multi_label"
    assert data.rows["label"][:] == [[1, 0], [0, 1], [1, 1]]


def test_glues_own_files_of_cola_and_mrpc_are_read(tmp_path: Path) -> None:
    """The ones have no header, the others columns that are called so nowhere else."""
    rows = 'gj04\t1\t\tOur friends won\'t buy this analysis.\ngj04\t0\t*\tThe "in" was him.\n'
    write(tmp_path / "CoLA/train.tsv", rows)
    write(tmp_path / "CoLA/test.tsv", "index\tsentence\n0\tBill whistled.\n")
    cola = load_data(tmp_path / "CoLA", split="train")
    assert texts(cola) == ["Our friends won't buy this analysis.", 'The "in" was him.']
    assert (labels(cola), cola.label_names[1], cola.metric) == ([1, 0], "acceptable", "matthews")
    assert texts(load_data(tmp_path / "CoLA", split="test", require_labels=False)) == ["Bill whistled."]
    assert texts(load_data(write(tmp_path / "a.tsv.gz", gzip.compress(rows.encode())))) == texts(cola)
    write(tmp_path / "MRPC/dev.tsv", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n")
    mrpc = load_data(tmp_path / "MRPC", split="dev")
    assert (texts(mrpc), list(mrpc.rows["text_pair"]), labels(mrpc)) == (["a"], ["b"], [1])
    assert (mrpc.label_names[1], mrpc.metric) == ("equivalent", "accuracy_f1")
    write(tmp_path / "MNLI/dev_matched.tsv", "sentence1\tsentence2\tlabel1\tgold_label\na\tb\tx\tneutral\n")
    mnli = load_data(tmp_path / "MNLI", split="dev")
    assert (labels(mnli), mnli.label_names[0]) == ([1], "entailment")


def test_classes_that_differ_by_case_alone_are_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A slip of the hand makes a third class, which the eval rows may not have."""
    path = write(tmp_path / "t.csv", "text,label\na,positive\nb,Positive\nc,negative\n")
    assert load_data(path).label_names == ("Positive", "negative", "positive")
    (record,) = caplog.records
    assert (
        "t.csv: label 'Positive' in row 2 differs from another by letter case alone ('Positive', 'positive')"
        in (record.getMessage())
    )
    caplog.clear()
    assert labels(load_data(path, label_names=("negative", "positive"))) == [1, 1, 0]
    assert not caplog.records
