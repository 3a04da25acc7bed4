"""The rows of a run: which, how they are read, and what must fit between them and a model."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from tinybert import models
from tinybert.data import TaskData, load_data
from tinybert.errors import InputError
from tinybert.tasks import Kind


@dataclass
class DataArguments:
    """Which rows, and how they are read."""

    train: str = field(
        metadata={"help": "Training rows: CSV, TSV, JSON(L), Parquet, a GLUE folder or a hub name."}
    )
    eval: str = field(metadata={"help": "Rows that choose the checkpoint, in the same form."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns; found by the usual names unless given."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Label column; found by the usual names unless given."}
    )
    label_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns of 0 and 1, a label each, of which any number may hold: multi_label."},
    )
    kind: Kind | None = field(
        default=None,
        metadata={"help": "classification, regression or multi_label; told by the labels unless given."},
    )
    max_length: int = field(default=128, metadata={"help": "Word pieces a row, special ones included."})


def load_rows(arguments: DataArguments, teacher: PreTrainedModel | None = None) -> tuple[TaskData, TaskData]:
    """Read the training and the eval rows; the teacher's classes are the classes where there is one.

    Raises:
        InputError: See ``load_data``; or one class only, or another kind of task than the teacher's.
    """
    kind, names = classes(teacher) if teacher is not None else (arguments.kind, ())
    if arguments.kind not in (None, kind):
        raise InputError(f"the teacher does {kind}, but --kind {arguments.kind} was given: leave it out")
    columns: dict[str, Any] = {
        "text_columns": arguments.text_columns,
        "label_column": arguments.label_column,
        "label_columns": arguments.label_columns,
    }
    train = load_data(arguments.train, split="train", kind=kind, label_names=names or None, **columns)
    names = train.label_names
    if train.kind == "classification" and len(names) < 2:
        raise InputError(f"{arguments.train} has one class only, {names[0]!r}: there is nothing to learn")
    held_out = load_data(
        arguments.eval, split="validation", kind=train.kind, label_names=names or None, **columns
    )
    return train, held_out


def classes(model: PreTrainedModel) -> tuple[Kind, tuple[str, ...]]:
    """Return what a fine-tuned model does, and its class names."""
    names = models.label_names(model.config)
    if model.config.problem_type == "multi_label_classification":
        return "multi_label", names
    return ("classification" if names else "regression"), names


def checked_length(max_length: int, *readers: PreTrainedModel) -> int:
    """Return ``max_length`` after checking that every model has that many positions.

    Raises:
        InputError: One has not.
    """
    for reader in readers:
        positions = models.positions_of(reader.config)
        if not 3 <= max_length <= positions:
            raise InputError(f"--max_length is {max_length}: it must be from 3 to {positions} here")
    return max_length


def provenance(**sets: TaskData) -> dict[str, dict[str, str]]:
    """Return where named sets of rows came from and their fingerprints, for the record of a run."""
    return {
        name: {"source": data.source, "rows": str(data.rows.num_rows), "fingerprint": data.fingerprint}
        for name, data in sets.items()
    }
