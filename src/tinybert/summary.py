"""A run's record -> the sentence and the table that its report and its model card share."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tinybert.errors import InputError, one_line

RECORD = "run.json"

RunKind = Literal["finetune", "distill", "general", "prune"]

_MODEL = {"name": str, "metrics": {str: float}, "parameters": int, "file_size": int}
_SHAPE = {
    "command": [str],
    "finished": str,
    "seconds": float,
    "versions": {str: str},
    "arguments": dict,
    "training": dict,
    "data": {str: dict},
    "metric": (str, None),
    "models": [_MODEL],
    "stages": {str: dict},
}
# What not every record has.
_SOME = {"removed": {str: {"before": int, "after": int}}, "error_of_difference": (float, None)}
_KINDS = {str: "text", float: "a finite number", int: "a whole number", dict: "an object", list: "a list"}
_PARTS = {"pieces": "word pieces", "neurons": "feed-forward neurons a layer"}
_BEYOND = 1e18  # no size, time or score is


# What a table calls a share of the score of the model that the others are held to.
_OF_WHOLE = {"teacher": "of the teacher's", "before": "of what it was"}


@dataclass(frozen=True)
class Line:
    """One model in the closing table; None is what nobody knows.

    Attributes:
        name: Its part: teacher, student, student int8.
        score: Its metric, as a fraction where the metric is one.
        parameters: Their number.
        file_size: Bytes on disk.
        seconds: What making it took.
        latency: Milliseconds an answer.
        retention: Its score as a share of the teacher's.
    """

    name: str
    score: float | None = None
    parameters: int | None = None
    file_size: int | None = None
    seconds: float | None = None
    latency: float | None = None
    retention: float | None = None


def read_record(folder: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run directory and check that it is what a run leaves.

    Raises:
        InputError: There is none, or it is damaged; the message says where.
    """
    path = folder / RECORD
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {RECORD}: give the output folder of a finished run, such as tinybert "
            "distill leaves"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}): make the run again") from error
    wrong = misfit(record, _SHAPE, "it")
    some = {name: shape for name, shape in _SOME.items() if not wrong and name in record}
    wrong = wrong or misfit(record, some, "it")
    if not wrong and not record["models"]:
        wrong = "it names no model, and one at least was expected"
    if wrong:
        raise InputError(f"{path} is damaged ({wrong}): make the run again")
    return record


def misfit(value: object, shape: Any, where: str) -> str:
    """Say where a value read from JSON has not the shape it should have; nothing where it has.

    Args:
        value: What was read.
        shape: A type; a tuple of what it may be; a list of one shape, for all entries; or a dict: of names
            that must be there, or of ``str``, for all values.
        where: What the value is called.
    """
    if isinstance(shape, tuple):
        return "" if value is None else misfit(value, shape[0], where)
    kind = shape if isinstance(shape, type) else type(shape)
    if not _is(value, kind):
        return f"{where} is {repr(value)[:60]}, expected {_KINDS[kind]}"
    parts: list[tuple[object, Any, str]] = []
    if isinstance(value, list) and isinstance(shape, list):
        parts = [(entry, shape[0], f"{where} {place}") for place, entry in enumerate(value, start=1)]
    elif isinstance(value, dict) and isinstance(shape, dict):
        missing = [name for name in shape if name is not str and name not in value]
        if missing:
            return f"{where} has no {missing[0]!r}"
        parts = [
            (value[name], shape.get(str) or shape[name], repr(name))
            for name in (value if str in shape else shape)
        ]
    return next(filter(None, (misfit(*part) for part in parts)), "")


def _is(value: object, kind: type) -> bool:
    if kind is float or kind is int:
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and abs(value) < _BEYOND  # type: ignore[arg-type]
    return isinstance(value, kind)


def run_kind(record: Mapping[str, Any]) -> RunKind:
    """Return which command made a run."""
    if "removed" in record:
        return "prune"
    if "corpus" in record["arguments"]:
        return "general"
    return "distill" if "teacher" in record["arguments"] else "finetune"


def has_chosen(record: Mapping[str, Any]) -> bool:
    """Return whether the eval rows chose a checkpoint; a student that stays as solved has one only."""
    return set(record["stages"]) != {"closed_form"}


def is_error(metric: str | None) -> bool:
    """Return whether a metric is better the lower it is, and no fraction."""
    return metric is not None and metric.endswith(("error", "loss", "mse"))


def model_lines(record: Mapping[str, Any]) -> list[Line]:
    """Return the models of a record, in its order."""
    return [
        Line(
            model["name"],
            model["metrics"].get(record["metric"]),
            model["parameters"],
            model["file_size"],
            model.get("seconds") if not misfit(model.get("seconds"), float, "") else None,
        )
        for model in record["models"]
    ]


def with_retention(lines: Sequence[Line], metric: str | None) -> list[Line]:
    """Return the lines with each score's share of the teacher's, or of what the model was before pruning."""
    whole = next((line for line in lines if line.name in _OF_WHOLE), Line(""))
    if whole.score is None or whole.score <= 0 or is_error(metric):
        return list(lines)
    return [
        line if line is whole or line.score is None else replace(line, retention=line.score / whole.score)
        for line in lines
    ]


def cells(lines: Sequence[Line], metric: str | None) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table as text, without columns that nobody could fill."""
    share = next((_OF_WHOLE[line.name] for line in lines if line.name in _OF_WHOLE), "of the teacher's")
    columns = {
        metric or "score": [score_text(line.score, metric) for line in lines],
        share: ["" if line.retention is None else f"{line.retention:.1%}" for line in lines],
        "parameters": ["" if line.parameters is None else f"{line.parameters / 1e6:.2f} M" for line in lines],
        "file": [size_text(line.file_size) for line in lines],
        "an answer takes": ["" if line.latency is None else f"{line.latency:.1f} ms" for line in lines],
        "made in": ["" if line.seconds is None else f"{line.seconds:.0f} s" for line in lines],
    }
    filled = {name: values for name, values in columns.items() if any(values)}
    rows = [[line.name, *(values[place] for values in filled.values())] for place, line in enumerate(lines)]
    return ["model", *filled], rows


def score_text(score: float | None, metric: str | None) -> str:
    """Return a score as it is written: errors as they are, all others in percent."""
    if score is None:
        return ""
    return f"{score:.4f}" if is_error(metric) else f"{100 * score:.2f}"


def size_text(size: int | None) -> str:
    """Return a file's size in words."""
    return "" if size is None else f"{size / 1e6:.1f} MB"


def eval_rows(record: Mapping[str, Any]) -> int | None:
    """Return how many rows the scores of a record are from, where it says so."""
    rows = str(record["data"].get("eval", {}).get("rows", ""))
    return int(rows) if rows.isascii() and rows.isdigit() and 0 < len(rows) < 12 else None


def standard_error(metric: str | None, score: float | None, rows: int | None) -> float | None:
    """Return the standard error of an accuracy on so many rows, sqrt(p (1 - p) / n); None of any other."""
    if metric != "accuracy" or score is None or not rows or not 0 <= score <= 1:
        return None
    return math.sqrt(score * (1 - score) / rows)


def verdict(record: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """Return in a few sentences what came out, and how sure that is.

    Args:
        record: Of the run.
        lines: Its models.
    """
    metric, by_name = record["metric"], {line.name: line for line in lines}
    made = by_name[record["models"][-1]["name"]]
    teacher, start = by_name.get("teacher"), by_name.get("start")
    if run_kind(record) == "prune":
        return _verdict_of_pruning(record, by_name.get("before"), made)
    if made.score is None:
        return [f"A model of {_size(made)} was made; it was not scored."]
    if is_error(metric):
        came = "" if start is None or start.score is None else f", down from {start.score:.4f} at the start"
        return [f"The student's {metric} on held-out text is {made.score:.4f}{came}; it has {_size(made)}."]
    rows, score = eval_rows(record), score_text(made.score, metric)
    if teacher is None or teacher.score is None:
        said = [f"This model reaches {metric} {score} with {_size(made)}."]
        error = standard_error(metric, made.score, rows)
        if error is not None:
            said.append(f"On {rows:,} eval rows one standard error is {100 * error:.1f} points.")
        return [*said, "These rows also chose the checkpoint: on others it may score a little lower."]
    kept = f"{made.score / teacher.score:.1%} of its teacher's {metric}" if teacher.score > 0 else metric
    verb = "reaches" if record["arguments"].get("baseline") else "keeps" if teacher.score > 0 else "has"
    said = [
        f"The student {verb} {kept} ({score} against "
        f"{score_text(teacher.score, metric)}){_smaller(made, teacher)}{_faster(made, teacher)}."
    ]
    error = record.get("error_of_difference")
    said.append(_certainty(made.score - teacher.score, made.score, metric, rows, error))
    if has_chosen(record):
        said.append("These rows also chose the checkpoint: on others the student may score a little lower.")
    return said


def _verdict_of_pruning(record: Mapping[str, Any], before: Line | None, made: Line) -> list[str]:
    metric = record["metric"]
    removed = (
        f"{entry['after']:,} of {entry['before']:,} {_PARTS.get(name, name)}"
        for name, entry in record["removed"].items()
    )
    was = f" instead of {before.parameters / 1e6:.2f} million" if before and before.parameters else ""
    said = [f"Made smaller without training, it keeps {' and '.join(removed)}; it has {_size(made)}{was}."]
    if made.score is None or before is None or before.score is None:
        return [*said, "It was not scored: --data scores before and after."]
    scores = f"{score_text(made.score, metric)}, where the whole model has {score_text(before.score, metric)}"
    said.append(f"Its {metric} is {scores}.")
    error = standard_error(metric, made.score, eval_rows(record))
    if error is not None:
        rows = eval_rows(record)
        said.append(f"On these {rows:,} rows one standard error of a score is {100 * error:.1f} points.")
    return said


def _certainty(
    difference: float, score: float, metric: str | None, rows: int | None, error_of_difference: float | None
) -> str:
    points = f"{100 * abs(difference):.1f} points"
    if error_of_difference is not None and rows:
        found = "may well be" if abs(difference) <= 2 * error_of_difference else "is more than"
        return (
            f"On these {rows:,} eval rows one standard error of the difference is "
            f"{100 * error_of_difference:.1f} points: a difference of {points} {found} chance."
        )
    error = standard_error(metric, score, rows)
    if error is None:
        return "How far chance moves this score on these rows was not measured."
    return f"On {rows:,} eval rows one standard error of a score is {100 * error:.1f} points."


def _size(line: Line) -> str:
    size = f" ({size_text(line.file_size)})" if line.file_size is not None else ""
    return f"{(line.parameters or 0) / 1e6:.2f} million parameters{size}"


def _smaller(made: Line, teacher: Line) -> str:
    if not made.parameters or not teacher.parameters or made.parameters >= teacher.parameters:
        return f" with {_size(made)}"
    sizes = f"{size_text(made.file_size)} instead of {size_text(teacher.file_size)}"
    return f" and is {teacher.parameters / made.parameters:.1f} times smaller ({sizes})"


def _faster(made: Line, teacher: Line) -> str:
    if not made.latency or not teacher.latency:
        return ""
    ratio = teacher.latency / made.latency
    return f", and {ratio:.1f} times faster" if ratio >= 1 else f", but {1 / ratio:.1f} times slower"


def without_secrets(command: Sequence[str]) -> list[str]:
    """Return the words of a command, ``...`` in place of the secrets that were among its options."""
    shown, hides_next = [], False
    for word in command:
        option, equals, _ = word.partition("=")
        is_secret = option.startswith("--") and option.endswith(("token", "password", "key"))
        shown.append("..." if hides_next else f"{option}=..." if is_secret and equals else word)
        hides_next = is_secret and not equals
    return shown


def command_line(command: Sequence[str]) -> str:
    """Return a command as a shell takes it, without its secrets."""
    shown = without_secrets(command)
    if shown and Path(shown[0]).name in ("tinybert", "__main__.py"):
        shown[0] = "tinybert"
    return shlex.join(shown)
