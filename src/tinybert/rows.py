"""The rows of a run: which, how they are read, and what must fit between them and a model."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedModel

from tinybert import models
from tinybert.data import TaskData, load_data
from tinybert.errors import InputError, refuse_given
from tinybert.tasks import Kind

logger = logging.getLogger(__name__)

# What rows of any kind have of text; a question may be asked of many contexts, and these be one for many.
_TEXTS = ("text", "text_pair", "words", "question", "context")
_PIECE_ROWS = 1 << 14
_LISTS = (pa.ListArray, pa.LargeListArray)
_BETWEEN = pa.scalar("\n", pa.large_string())

MAX_LENGTH_HELP = "Word pieces a row, special ones included: 128, or 384 for questions, unless given."
STRIDE_HELP = (
    "Word pieces by which windows of a question's context overlap; a third of max_length unless given."
)


@dataclass
class DataArguments:
    """Which rows, and how they are read."""

    train: str = field(
        metadata={
            "help": "Training rows: CSV, TSV, JSON(L), Parquet, CoNLL, SQuAD, a GLUE folder or a hub name."
        }
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
        metadata={
            "help": "classification, regression, multi_label, token_classification or question_answering; "
            "told by the teacher or the rows unless given."
        },
    )
    max_length: int | None = field(default=None, metadata={"help": MAX_LENGTH_HELP})
    stride: int | None = field(default=None, metadata={"help": STRIDE_HELP})


class RowColumns(Protocol):
    """The options by which a command is told the columns of its rows."""

    text_columns: list[str] | None
    label_column: str | None
    label_columns: list[str] | None


def rows_to_score(model: PreTrainedModel, source: str, columns: RowColumns) -> TaskData:
    """Read labelled rows for a model to be scored on: of its kind of task, labels by its names.

    Raises:
        InputError: See ``load_data``; or a stride where there are no windows.
    """
    kind, names = models.task_of(model)
    _check_stride(kind, columns)
    return load_data(
        source,
        split="validation",
        text_columns=columns.text_columns,
        label_column=columns.label_column,
        label_columns=columns.label_columns,
        kind=kind,
        label_names=names or None,
    )


def load_rows(arguments: DataArguments, teacher: PreTrainedModel | None = None) -> tuple[TaskData, TaskData]:
    """Read the training and the eval rows; the teacher's classes are the classes where there is one.

    Raises:
        InputError: See ``load_data``; or one class only, another kind of task than the teacher's, a stride
            where there are no windows.
    """
    kind, names = models.task_of(teacher) if teacher is not None else (arguments.kind, ())
    if arguments.kind not in (None, kind):
        raise InputError(f"the teacher does {kind}, but --kind {arguments.kind} was given: leave it out")
    columns: dict[str, Any] = {
        "text_columns": arguments.text_columns,
        "label_column": arguments.label_column,
        "label_columns": arguments.label_columns,
    }
    train = load_data(arguments.train, split="train", kind=kind, label_names=names or None, **columns)
    _check_stride(train.kind, arguments)
    names = train.label_names
    if train.kind in ("classification", "token_classification") and len(names) < 2:
        raise InputError(f"{arguments.train} has one class only, {names[0]!r}: there is nothing to learn")
    held_out = load_data(
        arguments.eval, split="validation", kind=train.kind, label_names=names or None, **columns
    )
    check_held_out(train, held_out)
    return train, held_out


def _check_stride(kind: Kind, options: object) -> None:
    if kind != "question_answering":
        refuse_given(options, ["stride"], f"where the task is {kind}, whose rows are cut, not windowed")


def check_held_out(train: TaskData, held_out: TaskData) -> None:
    """Say so where a twentieth of the eval rows or more have their text among the training rows.

    Raises:
        InputError: The ones are single texts and the others pairs.
    """
    shapes = [
        "pairs of texts" if "text_pair" in data.rows.column_names else "single texts"
        for data in (train, held_out)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{train.source} has {shapes[0]} and {held_out.source} {shapes[1]}: give files of one kind, or "
            "say which columns are read with --text_columns"
        )
    shared, count = shared_rows(train.rows, held_out.rows), held_out.rows.num_rows
    if shared and shared >= count / 20:
        logger.warning(
            "%d of the %d rows of %s are in %s too: on them, scores say what was learnt by heart, no more",
            shared,
            count,
            held_out.source,
            train.source,
        )


def shared_rows(train: Dataset, held_out: Dataset) -> int:
    """Return how many of the held-out rows have a text, or all texts, that a training row has, too."""
    names = [name for name in _TEXTS if name in held_out.column_names]
    asked = pa.chunked_array(_texts_of(held_out, names), pa.large_string())
    parts = (texts.filter(pc.is_in(texts, value_set=asked)) for texts in _texts_of(train, names))
    found = pa.chunked_array(parts, pa.large_string())
    return pc.sum(pc.is_in(asked, value_set=found)).as_py() or 0


def _texts_of(rows: Dataset, names: list[str]) -> Iterator[pa.Array]:
    """Yield each row's texts as one, in pieces."""
    for batch in rows.select_columns(names).with_format("arrow").iter(_PIECE_ROWS):
        columns = (batch.column(name).combine_chunks() for name in names)
        whole = (pc.binary_join(part, " ") if isinstance(part, _LISTS) else part for part in columns)
        yield pc.binary_join_element_wise(*(part.cast(pa.large_string()) for part in whole), _BETWEEN)


def row_length(max_length: int | None, kind: Kind, *readers: PreTrainedModel) -> int:
    """Return the tokens a row may have: those asked for, else what suits the kind of task and the models.

    Raises:
        InputError: A model has not that many positions.
    """
    if max_length is None:
        usual = 384 if kind == "question_answering" else 128
        return min(usual, *(models.positions_of(reader.config) for reader in readers))
    return checked_length(max_length, *readers)


def checked_length(max_length: int, *readers: PreTrainedModel, option: str = "max_length") -> int:
    """Return a length after checking that every model has that many positions; ``option`` gave it.

    Raises:
        InputError: One has not.
    """
    for reader in readers:
        positions = models.positions_of(reader.config)
        if not 3 <= max_length <= positions:
            raise InputError(f"--{option} is {max_length}: it must be from 3 to {positions} here")
    return max_length


def provenance(**sets: TaskData) -> dict[str, dict[str, str]]:
    """Return where named sets of rows came from and their fingerprints, for the record of a run."""
    return {
        name: {"source": data.source, "rows": str(data.rows.num_rows), "fingerprint": data.fingerprint}
        for name, data in sets.items()
    }
