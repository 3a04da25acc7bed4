"""Questions from every form of file, and windows from which each answer can be read again."""

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertTokenizerFast

from conftest import write_csv
from tinybert.data import load_data, tokenize
from tinybert.errors import InputError

CONTEXT = "the film was good. a plot was dull. the cast was good and great"
QUESTIONS = [
    {"id": "a", "question": "the plot", "answers": [{"text": "dull", "answer_start": 30}]},
    {"id": "b", "question": "the cast", "answers": [{"text": "good", "answer_start": 47}]},
    {"id": "c", "question": "the story", "answers": [], "is_impossible": True},
]
STARTS = [[30], [49], []]
TEXTS = [["dull"], ["good"], []]


def squad(path: Path, questions: list[dict[str, Any]], **dump: Any) -> Path:
    paragraphs = [{"context": CONTEXT, "qas": questions}]
    path.write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "x", "paragraphs": paragraphs}]}, **dump)
    )
    return path


def test_squad_files_and_columns_give_the_same_rows(tmp_path: Path) -> None:
    """A start that is off by some characters means the nearest place where the answer stands."""
    squad(tmp_path / "a.json", QUESTIONS)
    squad(tmp_path / "b.json", QUESTIONS, indent=1)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    flat = [
        {
            "id": entry["id"],
            "question": entry["question"],
            "context": CONTEXT,
            "answers": {key: [one[key] for one in entry["answers"]] for key in ("text", "answer_start")},
        }
        for entry in QUESTIONS
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, flat)))
    datasets.Dataset.from_list(flat).to_parquet(str(tmp_path / "e.parquet"))
    plain = [
        (entry["id"], entry["question"], CONTEXT, *([one["text"], one["answer_start"]]))
        for entry in QUESTIONS
        for one in entry["answers"] or [{"text": "", "answer_start": ""}]
    ]
    write_csv(tmp_path / "f.csv", plain, ("id", "question", "context", "answer", "answer_start"))
    for path in sorted(tmp_path.iterdir()):
        data = load_data(path)
        assert (data.kind, data.metric, data.label_names) == ("question_answering", "f1", ())
        assert data.rows["id"][:] == ["a", "b", "c"]
        assert data.rows["answers"][:] == TEXTS
        assert data.rows["starts"][:] == STARTS, path
        assert set(data.rows["context"]) == {CONTEXT}


def test_answers_without_starts_are_where_they_first_stand(tmp_path: Path) -> None:
    """Many tables have question, passage and answer, and nothing else."""
    rows = [("the cast", CONTEXT, "good"), ("the plot", CONTEXT, " dull ")]
    path = write_csv(tmp_path / "a.csv", rows, ("q", "page", "truth"))
    with pytest.raises(
        InputError, match="has no columns of questions, contexts and answers; it has 'q', 'page'"
    ):
        load_data(path, kind="question_answering")
    columns: dict[str, Any] = {"text_columns": ["q", "page"], "label_column": "truth"}
    data = load_data(path, kind="question_answering", **columns)
    assert data.rows["starts"][:] == [[13], [30]]
    assert data.rows["answers"][:] == [["good"], ["dull"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": [{"text": "superb", "answer_start": 0}]},
            r"question 1 \('x'\) has the answer 'superb', which",
        ),
        ({"answers": [{"text": 3, "answer_start": 0}]}, "question 1 has the answer 3: expected text"),
        (
            {"answers": [{"text": "good", "answer_start": "here"}]},
            "starts at 'here': expected a whole number",
        ),
        ({"answers": [{"text": "good", "answer_start": 1.5}]}, "starts at 1.5: expected a whole number"),
        (
            {"answers": [{"text": "good", "answer_start": 10**999}]},
            "starts at 1000.*: expected a whole number",
        ),
        ({"answers": [{"text": "good", "answer_start": math.inf}]}, "starts at inf: expected a whole number"),
        ({"question": " "}, "question 1 has ' ' for its question: expected text"),
        ({"question": None}, "question 1 has None for its question"),
    ],
)
def test_questions_that_cannot_be_read_are_refused_in_one_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """An answer that is nowhere would be trained as "there is none"."""
    path = squad(tmp_path / "a.json", [{"question": "x", "answers": []} | change])
    with pytest.raises(InputError, match=message) as caught:
        load_data(path)
    assert "\n" not in str(caught.value)


def test_files_of_another_form_are_refused_with_what_is_expected(tmp_path: Path) -> None:
    """Of a damaged file nothing at all is read."""
    path = squad(tmp_path / "a.json", QUESTIONS)
    with pytest.raises(
        InputError, match="is for question_answering by its form, and classification is expected"
    ):
        load_data(path, kind="classification")
    path.write_text('{"data": [{"paragraphs": [{"qas": []}, {"qas": [{"id": "x"}]}]}]}')
    with pytest.raises(InputError, match="is not of SQuAD's form"):
        load_data(path)
    path.write_text('{"data": [{"paragraphs": []}]}')
    with pytest.raises(InputError, match="has no questions: expected at least one"):
        load_data(path)
    path.write_text('{"data": [{"paragraphs": ')
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_data(path)
    mixed = [{"question": "x", "context": CONTEXT, "answers": some} for some in ("good", ["dull"])]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    with pytest.raises(
        InputError, match="column 'answers' is empty or mixes texts with lists: write one form"
    ):
        load_data(tmp_path / "b.jsonl")


@pytest.mark.parametrize(("max_length", "stride"), [(12, 3), (16, None), (64, None)])
def test_every_answer_is_in_some_window_and_reads_as_it_should(
    max_length: int, stride: int | None, tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A window is a row: its answer by tokens must be the answer by characters."""
    data = load_data(squad(tmp_path / "a.json", QUESTIONS))
    windows = tokenize(data, tokenizer, max_length, stride)
    assert max(windows["length"]) <= max_length
    assert len(windows) == 3 if max_length == 64 else len(windows) > 5
    found: dict[int, set[str]] = {row: set() for row in range(3)}
    for window in windows:
        first, last = window["start_positions"], window["end_positions"]
        if (first, last) != (0, 0):
            chars = window["first_chars"][first], window["last_chars"][last]
            found[window["row"]].add(CONTEXT[slice(*chars)])
            assert chars[0] == STARTS[window["row"]][0]
        shown = [
            pair for pair in zip(window["first_chars"], window["last_chars"], strict=True) if pair[0] >= 0
        ]
        assert all(before[1] <= after[0] for before, after in pairwise(shown))
        assert len(shown) == window["length"] - 3 - len(data.rows[window["row"]]["question"].split())
    assert found == {0: {"dull"}, 1: {"good"}, 2: set()}


def test_long_questions_are_cut_and_counted_and_a_stride_must_leave_room(
    tmp_path: Path, tokenizer: BertTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokenizer would refuse a question that fills the window with a line about itself."""
    long = {"id": "d", "question": "the film " * 20, "answers": []}
    data = load_data(squad(tmp_path / "a.json", [*QUESTIONS, long]))
    windows = tokenize(data, tokenizer, 16)
    assert "1 questions are longer than 4 tokens and were cut there" in caplog.text
    assert set(windows["row"]) == {0, 1, 2, 3}
    with pytest.raises(InputError, match="--stride is 8: windows of --max_length 16 must overlap by 0 to 7"):
        tokenize(data, tokenizer, 16, 8)


@pytest.mark.parametrize("start", ["47", "47.0"])
def test_starts_may_be_whole_floats_and_cells_empty(start: str, tmp_path: Path) -> None:
    """So pandas writes a column of whole numbers that has gaps."""
    header = ("question", "context", "answers", "answer_start")
    path = write_csv(
        tmp_path / "a.csv", [("cast", CONTEXT, "good", start), ("plot", CONTEXT, "", "")], header
    )
    assert load_data(path).rows["starts"][:] == [[49], []]
    columns = {"question": ["cast", "plot"], "context": [CONTEXT] * 2, "answers": ["good", "dull"]}
    pq.write_table(pa.table(columns | {"answer_start": [float(start), math.nan]}), tmp_path / "a.parquet")
    assert load_data(tmp_path / "a.parquet").rows["starts"][:] == [[49], [30]]


def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path: Path) -> None:
    """gzip has errors of its own kind for it, which showed as a traceback."""
    many = [entry | {"id": str(number * 7919 % 1013)} for number in range(999) for entry in QUESTIONS]
    for questions in (QUESTIONS, many):
        packed = gzip.compress(squad(tmp_path / "a.json", questions).read_bytes())
        for damaged in (packed[:-20], packed[:-20] + b"\0" * 20):
            (tmp_path / "a.json.gz").write_bytes(damaged)
            with pytest.raises(InputError, match=r"a\.json\.gz cannot be read as JSON") as caught:
                load_data(tmp_path / "a.json.gz")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [["ask"], ["ask", "context", "question"], ["ask", "ask"], "ask"])
def test_the_columns_of_questions_are_two(columns: Any, tmp_path: Path) -> None:
    """Another number of names was ignored, and the usual columns were read."""
    rows = [("what", "the cast", CONTEXT, "good")]
    path = write_csv(tmp_path / "a.csv", rows, ("ask", "question", "context", "answers"))
    with pytest.raises(
        InputError, match=r"--text_columns is 'ask'.*: expected two different ones, QUESTION CONTEXT"
    ):
        load_data(path, text_columns=columns)
    assert load_data(path, text_columns=["ask", "context"]).rows["question"][:] == ["what"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    """There is no telling which is meant."""
    for twin in ("id", "question"):
        path = write_csv(
            tmp_path / f"{twin}.csv",
            [("1", "2", "the cast", CONTEXT, "good")],
            (twin, twin, "question", "context", "answers"),
        )
        with pytest.raises(InputError, match=f"more than one column called '{twin}'"):
            load_data(path)


@pytest.mark.parametrize("options", [{"text_columns": ["question", "context"]}, {"label_column": "answers"}])
def test_columns_have_no_meaning_with_squads_json(options: dict[str, Any], tmp_path: Path) -> None:
    """They were ignored in silence."""
    (option,) = options
    with pytest.raises(InputError, match=f"--{option} has no meaning with .*a.json, .*: leave it out"):
        load_data(squad(tmp_path / "a.json", QUESTIONS), **options)


def test_questions_of_which_none_has_an_answer_are_read_as_from_squads_json(tmp_path: Path) -> None:
    """Empty lists alone are no mixture."""
    rows = [{"question": "the cast", "context": CONTEXT, "answers": []}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_data(tmp_path / "a.jsonl").rows["answers"][:] == [[], []]
