"""What a record says: read whole or refused in one line, and put into sentences that do not boast."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert.errors import InputError
from tinybert.summary import (
    Line,
    cells,
    command_line,
    misfit,
    model_lines,
    read_record,
    run_kind,
    standard_error,
    verdict,
    with_retention,
)

TEACHER = {"name": "teacher", "metrics": {"accuracy": 0.9}, "parameters": 22_000_000, "file_size": 88_000_000}
STUDENT = {
    "name": "student",
    "metrics": {"accuracy": 0.891},
    "parameters": 11_000_000,
    "file_size": 44_000_000,
}
RECORD: dict[str, Any] = {
    "command": ["/usr/bin/tinybert", "distill", "--teacher", "runs/my teacher"],
    "finished": "2026-01-01T00:00:00+00:00",
    "seconds": 61.5,
    "versions": {"torch": "2.13.0"},
    "arguments": {"teacher": "runs/my teacher", "train": "train.csv", "eval": "dev.csv", "max_length": 64},
    "training": {"seed": 42},
    "data": {
        "train": {"source": "x/train.csv", "rows": "7000", "fingerprint": "ab"},
        "eval": {"source": "x/dev.csv", "rows": "1000", "fingerprint": "cd"},
    },
    "metric": "accuracy",
    "models": [TEACHER, STUDENT | {"seconds": 61.5}],
    "stages": {},
}
HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def changed(**values: Any) -> dict[str, Any]:
    return deepcopy(RECORD) | values


def lines_of(record: dict[str, Any]) -> list[Line]:
    return with_retention(model_lines(record), record["metric"])


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """The report stands on it."""
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged .Expecting value.*: make the run again"),
        (b'{"command": ["tinybert"', "is damaged .Expecting"),
        (b"\xff\xfe", "is damaged .*decode"),
        (b"[" * 100_000, "is damaged"),
        (b"[1]", r"is damaged \(it is \[1\], expected an object\)"),
        (b"{}", "is damaged .it has no 'command'"),
        (json.dumps(changed(models=[])).encode(), "names no model"),
        (
            json.dumps(changed(models=[STUDENT | {"parameters": "many"}])).encode(),
            "'parameters' is 'many', exp",
        ),
        (json.dumps(changed(models=[{"name": "student"}])).encode(), "'models' 1 has no 'metrics'"),
        (json.dumps(changed(seconds=float("nan"))).encode(), "'seconds' is nan, expected a finite number"),
        (json.dumps(changed(seconds=True)).encode(), "'seconds' is True, expected a finite number"),
        (json.dumps(changed(versions={"torch": 2})).encode(), "'torch' is 2, expected text"),
        (json.dumps(changed(metric=["accuracy"])).encode(), "'metric' is .*, expected text"),
        (json.dumps(changed(stages={"x": 1})).encode(), "'x' is 1, expected an object"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    """A run that was copied by halves is said so, and where."""
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_is_said_so(tmp_path: Path) -> None:
    """The usual slip: the folder above."""
    with pytest.raises(InputError, match=r"holds no run\.json: give the output folder of a finished run"):
        read_record(tmp_path / "nowhere")


@settings(max_examples=200)
@given(st.sampled_from(sorted(RECORD)), HOSTILE)
def test_whatever_a_record_holds_it_is_refused_or_summed_up(key: str, value: object) -> None:
    """A traceback about somebody's JSON helps nobody."""
    record = changed(**{key: value})
    if not misfit(record, {"models": [{"name": str}], "metric": (str, None)}, "it") and record["models"]:
        from tinybert.summary import _SHAPE

        if not misfit(record, _SHAPE, "it"):
            assert verdict(record, lines_of(record))
            assert command_line(record["command"]) is not None


def test_the_verdict_says_what_was_kept_and_how_sure_that_is() -> None:
    """Nine tenths of a point on a thousand rows are nothing, and a reader has to be told."""
    first, second, third = verdict(RECORD, lines_of(RECORD))
    assert first == (
        "The student keeps 99.0% of its teacher's accuracy (89.10 against 90.00) and is 2.0 times smaller "
        "(44.0 MB instead of 88.0 MB)."
    )
    assert second == "On 1,000 eval rows one standard error of a score is 1.0 points."
    assert "chose the checkpoint" in third
    solved = changed(stages={"closed_form": {"seconds": 9.0}})
    assert not any("checkpoint" in sentence for sentence in verdict(solved, lines_of(solved)))
    paired = verdict(changed(error_of_difference=0.006), lines_of(RECORD))[1]
    assert paired == (
        "On these 1,000 eval rows one standard error of the difference is 0.6 points: a difference of 0.9 "
        "points may well be chance."
    )
    surer = verdict(changed(error_of_difference=0.002), lines_of(RECORD))[1]
    assert surer.endswith("0.9 points is more than chance.")


def test_a_student_that_is_not_smaller_or_not_faster_is_not_said_to_be() -> None:
    """A verdict that always sounds like success is worth nothing."""
    record = changed(models=[TEACHER, TEACHER | {"name": "student"}])
    assert "smaller" not in verdict(record, lines_of(record))[0]
    slow = [Line("teacher", 0.9, 2, 8, latency=5.0), Line("student", 0.8, 1, 4, latency=10.0)]
    assert verdict(RECORD, slow)[0].endswith("but 2.0 times slower.")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            changed(models=[STUDENT | {"name": "model"}], arguments={"model": "m"}),
            "This model reaches accuracy 89.10",
        ),
        (changed(metric=None), "it was not scored"),
        (
            changed(
                metric="hidden_error",
                arguments={"corpus": ["a"], "teacher": "t"},
                models=[
                    STUDENT | {"name": "start", "metrics": {"hidden_error": 0.5}},
                    STUDENT | {"metrics": {"hidden_error": 0.25}},
                ],
            ),
            "The student's hidden_error on held-out text is 0.2500, down from 0.5000 at the start",
        ),
        (
            changed(models=[TEACHER | {"metrics": {"accuracy": -0.1}}, STUDENT]),
            "The student has accuracy .89.10",
        ),
    ],
)
def test_every_kind_of_run_has_its_sentence(record: dict[str, Any], said: str) -> None:
    """An error of 0.25 is no 25 per cent, and a run without a teacher keeps nothing of one."""
    import re

    assert re.search(said, " ".join(verdict(record, lines_of(record))))


def test_kinds_of_run_are_told_by_their_arguments() -> None:
    """Each kind has other sections."""
    arguments = [{"model": "m"}, {"teacher": "t", "train": "f"}, {"teacher": "t", "corpus": ["f"]}]
    assert [run_kind({"arguments": one}) for one in arguments] == ["finetune", "distill", "general"]
    assert run_kind({"arguments": {"model": "m", "corpus": ["f"]}, "removed": {}}) == "prune"


def test_the_table_has_the_columns_that_somebody_filled() -> None:
    """A column of dashes says nothing."""
    header, rows = cells(lines_of(RECORD), "accuracy")
    assert header == ["model", "accuracy", "of the teacher's", "parameters", "file", "made in"]
    assert rows == [
        ["teacher", "90.00", "", "22.00 M", "88.0 MB", ""],
        ["student", "89.10", "99.0%", "11.00 M", "44.0 MB", "62 s"],
    ]
    assert cells([Line("a", latency=1.25)], None) == (["model", "an answer takes"], [["a", "1.2 ms"]])


def test_the_standard_error_is_that_of_a_share() -> None:
    """sqrt(p (1 - p) / n), and of nothing but a share."""
    assert standard_error("accuracy", 0.5, 100) == pytest.approx(0.05)
    assert standard_error("matthews", 0.5, 100) is None
    assert standard_error("accuracy", 0.5, None) is None


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/x/bin/tinybert", "distill", "--train", "a b.csv"], "tinybert distill --train 'a b.csv'"),
        (["/x/tinybert/__main__.py", "general"], "tinybert general"),
        (
            ["tinybert", "finetune", "--hub_token", "hf_secret", "--seed", "1"],
            "tinybert finetune --hub_token ... --seed 1",
        ),
        (["tinybert", "finetune", "--hub_token=hf_secret"], "tinybert finetune --hub_token=..."),
        (["train.py"], "train.py"),
        ([], ""),
    ],
)
def test_the_command_can_be_pasted_and_holds_no_secret(words: list[str], shown: str) -> None:
    """A report is sent around; the token that was typed for the hub is not for everybody."""
    assert command_line(words) == shown
