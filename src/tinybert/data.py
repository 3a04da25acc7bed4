"""Files, GLUE folders and hub names -> rows of text and label -> tokens."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from tinybert.errors import InputError, one_line
from tinybert.row_store import row_fingerprint, store_rows
from tinybert.tables import ENDINGS as ENDINGS
from tinybert.tables import Source, open_source
from tinybert.tasks import (
    Kind,
    Task,
    find_label_column,
    find_task,
    find_text_columns,
    listed,
    main_metric,
    read_labels,
)

_PIECE_ROWS = 1 << 16  # large, as all pieces are kept


@dataclass(frozen=True)
class TaskData:
    """Rows in one form, whatever they came from.

    Attributes:
        rows: Columns ``text``, ``text_pair`` (for pairs) and, if labelled, ``label``: a class id (int64) or a
            score (float64), or for multi_label a list of zeros and ones (float32), one for each name.
        kind: Classification, regression or multi_label.
        label_names: Class names in the order of their ids; empty for regression, or if nothing told them.
        metric: The key of `tasks.compute_metrics` that chooses the best checkpoint.
        source: What the rows were read from, for reports and error messages.
        fingerprint: SHA-256 of the values in ``rows``: the same on every machine, other if a row differs.
    """

    rows: datasets.Dataset
    kind: Kind
    label_names: tuple[str, ...]
    metric: str
    source: str
    fingerprint: str


def load_data(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    kind: Kind | None = None,
    label_names: Sequence[str] | None = None,
    require_labels: bool = True,
    name: str | None = None,
) -> TaskData:
    """Read rows of text, or of text pairs, with their labels.

    CSV has the usual quoting; TSV has none (GLUE's way: ``"`` is an ordinary character). Cells are text as
    they stand: "NA" and "null" stay. Rows are counted from 1 in messages, without the header. What labels
    mean: `tasks.read_labels`. Labels that are all -1 (GLUE's test sets) count as none. A column of lists, or
    several columns of zeros and ones, is multi_label: any number of the classes may hold.

    Args:
        source: A file with one of `ENDINGS`; a folder with ``train``, ``dev`` and ``test`` files; or, if
            there is no such path, a hub name: ``"glue/sst2"``, ``"owner/name"`` or ``"owner/name/config"``.
        split: ``"train"``, ``"validation"`` (or ``"dev"``) or ``"test"`` of a folder or hub name.
        text_columns: One or two columns; found by their usual names if not given.
        label_column: Likewise.
        label_columns: Columns of zeros and ones, one for each class, in place of ``label_column``.
        kind: If not given, GLUE's table or the labels decide: a number that is no integer means regression.
        label_names: The classes in the order of their ids, such as a teacher's ``id2label``.
        require_labels: Whether rows without labels are an error.
        name: What tells the task, for rows that were copied from a source of that name.

    Raises:
        InputError: The source cannot be read, or a column, text or label is missing or cannot be understood.
    """
    opened = open_source(source, split)
    table = pa.concat_tables([opened.schema.empty_table(), *opened.tables(_PIECE_ROWS)])
    origin = opened.origin
    if table.num_rows == 0:
        raise InputError(f"{origin} has no rows: expected a header and at least one row")
    texts, task = find_texts(opened, text_columns, name)
    keys = zip(("text", "text_pair"), texts, strict=False)
    columns = {key: read_texts(table, column, origin) for key, column in keys}
    given = tuple(label_names) if label_names is not None else None
    found = None
    if label_columns is not None:
        found = _label_flags(table, label_columns, given, origin)
    elif label := find_label_column(table.column_names, label_column, texts, require_labels, origin):
        found = _label_column(table, label, kind, given, task, origin)
    if found is not None and kind not in (None, found[1]):
        raise InputError(f"the labels of {origin} are {found[1]}, and {kind} is expected: give other rows")
    if found is None and require_labels:
        raise InputError(f"{origin} has no labels (all are empty or -1): give a labelled file")
    if found is None:
        kind = kind or (task.kind if task else "classification")
        classes = () if kind == "regression" else given or (task.label_names if task else ())
    else:
        columns["label"], kind, classes = found
    rows, fingerprint = store_rows(pa.table(columns))
    return TaskData(rows, kind, classes, main_metric(kind, task), origin, fingerprint)


def tokenize(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Turn text into token ids, unpadded; the result is cached on disk.

    Args:
        data: The rows; a pair is joined by the tokenizer and cut at its longer side first.
        tokenizer: The teacher's (and so the student's) tokenizer.
        max_length: The most tokens a row may have, special ones included.

    Returns:
        Columns ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer makes them, ``length``
        (tokens) and, if labelled, ``labels``; rows in the order of ``data.rows``.
    """

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = encode_texts(tokenizer, batch["text"], batch.get("text_pair"), max_length)
        if "label" in batch:
            encoded["labels"] = batch["label"]
        return encoded

    # The first call writes the truncation into a fast tokenizer, and the cache's key is made of its state.
    encode(data.rows[:1])
    return data.rows.map(encode, batched=True, remove_columns=data.rows.column_names, desc="Tokenizing")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int
) -> dict[str, list[Any]]:
    """Return the token ids of texts, or of pairs, and their ``length``; as `tokenize` does, in memory."""
    encoded = dict(tokenizer(texts, pairs, truncation="longest_first", max_length=max_length, padding=False))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return encoded


def split_rows(data: TaskData, sizes: Mapping[str, int | None], seed: int) -> dict[str, TaskData]:
    """Deal the rows into parts, at random but always the same.

    Rows are ordered by SHA-256 of (seed, row) and dealt to the parts in the order of ``sizes``. A hash and
    not a random generator, because numpy may change its streams between versions, and because a row's place
    then depends neither on the file's order nor on the machine.

    Args:
        data: What to split.
        sizes: Rows a part; one may be ``None``: the rest.
        seed: Another seed gives another split.

    Raises:
        InputError: A size below 1, two rests, or fewer rows than asked for.
    """
    total = len(data.rows)
    wanted = sum(size for size in sizes.values() if size is not None)
    rests = sum(size is None for size in sizes.values())
    if rests > 1 or any(size is not None and size < 1 for size in sizes.values()):
        raise InputError(f"sizes are {dict(sizes)}: expected numbers of 1 or more, and at most one None")
    if wanted + rests > total:
        raise InputError(f"{data.source} has {total} rows, too few for {dict(sizes)}: ask for smaller parts")
    keys = [
        hashlib.sha256(json.dumps([seed, *row]).encode()).digest()
        for batch in data.rows.iter(1000)
        for row in zip(*(batch[name] for name in data.rows.column_names), strict=True)
    ]
    order = sorted(range(total), key=keys.__getitem__)
    parts, start = {}, 0
    for name, size in sizes.items():
        end = start + (total - wanted if size is None else size)
        rows = data.rows.select(order[start:end])
        parts[name] = replace(data, rows=rows, fingerprint=row_fingerprint(rows))
        start = end
    return parts


def find_texts(
    source: Source, text_columns: Sequence[str] | None, name: str | None = None
) -> tuple[tuple[str, ...], Task | None]:
    """Return the text columns of a source, and the known task that it is of, if any.

    Args:
        source: An opened source.
        text_columns: The user's choice.
        name: What tells the task, for rows that were copied from a source of that name.

    Raises:
        InputError: The columns are not there, or two have the same name.
    """
    names, origin = source.schema.names, source.origin
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise InputError(f"{origin} has more than one column called {listed(twins)}: rename or remove them")
    task = find_task(name or source.name)
    if task is not None and not set(task.text_columns) <= set(names):
        task = None
    return find_text_columns(names, text_columns, task, origin), task


def _class_names(table: pa.Table, column: str) -> tuple[str, ...]:
    """The names that `datasets.ClassLabel` left in a schema (parquet files, hub data)."""
    try:
        feature = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][column]
        return tuple(feature.get("feature", feature)["names"])
    except (TypeError, KeyError, ValueError):
        return ()


def _strings(table: pa.Table, column: str, origin: str) -> pa.ChunkedArray:
    cells = table.column(column)
    kind = cells.type.value_type if pa.types.is_dictionary(cells.type) else cells.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (number or text or pa.types.is_null(kind)):
        raise InputError(f"{origin}: column {column!r} holds {_shown(str(kind))}: expected text or numbers")
    try:
        cells.validate(full=True)  # a parquet file may hold bytes that are no text
        cells = cells.cast(kind)
        if pa.types.is_floating(kind):
            cells = pc.if_else(pc.is_nan(cells), None, cells)
        return cells.cast(pa.string())
    except pa.ArrowException as error:
        raise InputError(f"{origin}: column {column!r} is not UTF-8 text: {one_line(error)}") from error


def read_texts(table: pa.Table, column: str, origin: str, first: int = 0) -> pa.ChunkedArray:
    """Return a column of a table as text.

    Args:
        table: Rows, or some of them.
        column: Which of its columns.
        origin: What has these rows, for messages.
        first: How many rows were before these.

    Raises:
        InputError: The column holds something else, or an empty text.
    """
    cells = _strings(table, column, origin)
    empty = pc.equal(pc.utf8_trim_whitespace(cells.fill_null("")), "")
    row = first + pc.index(empty, True).as_py() + 1
    if row > first:
        raise InputError(f"{origin}: column {column!r} is empty in row {row}: fill it or remove the row")
    return cells


def class_ids(
    table: pa.Table, column: str, names: Sequence[str], task: Task | None, origin: str, first: int = 0
) -> np.ndarray:
    """Return the class ids (rows,) of a column of labels, matched by name.

    Args:
        table: Rows, or some of them.
        column: Which of its columns.
        names: The classes in the order of their ids, such as a teacher's ``id2label``.
        task: The task that the rows are known to belong to.
        origin: What has these rows, for messages.
        first: How many rows were before these.

    Raises:
        InputError: A label is missing or none of these.
    """
    known = _class_names(table, column) or (task.label_names if task else ())
    cells = _strings(table, column, origin)
    found = _labels(cells, "classification", tuple(names), known, origin, first)
    if found is None:
        raise InputError(f"{origin} has no labels (all are empty or -1): give a labelled file")
    return found[0].to_numpy()


def _labels(
    cells: pa.ChunkedArray,
    kind: Kind | None,
    given: tuple[str, ...] | None,
    known: tuple[str, ...],
    origin: str,
    first: int = 0,
) -> tuple[pa.Array, Kind, tuple[str, ...]] | None:
    """(label column, kind, class names), or None if the labels are all empty or all -1."""
    encoded = pc.utf8_trim_whitespace(cells.fill_null("")).combine_chunks().dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()

    def where(value: str) -> str:
        row = first + int(np.argmax(codes == values.index(value))) + 1
        return f"{origin}: label {_shown(value)} in row {row}"

    if values in ([""], ["-1"], ["-1.0"]):
        return None
    if "" in values:
        raise InputError(f"{where('')} is empty: fill it or remove the row")
    kind, names, meanings = read_labels(values, kind, given, known, where)
    # Each different label is understood once, and spread over the rows.
    dtype = np.float64 if kind == "regression" else np.int64
    return pa.array(np.array(meanings, dtype=dtype)[codes]), kind, names


def _label_column(
    table: pa.Table,
    column: str,
    kind: Kind | None,
    given: tuple[str, ...] | None,
    task: Task | None,
    origin: str,
) -> tuple[pa.Array, Kind, tuple[str, ...]] | None:
    """(label column, kind, class names) of a column of labels or of lists of them; None if it has none."""
    known = _class_names(table, column)
    if pa.types.is_list(table.schema.field(column).type):
        return _label_lists(table.column(column), given, known, origin)
    if kind == "multi_label":
        raise InputError(
            f"{origin}: column {column!r} holds one label a row, and any number of them is expected: give "
            "lists, or --label_columns of 0 and 1"
        )
    known = known or (task.label_names if task else ())
    cells = _strings(table, column, origin)
    return _labels(cells, kind or (task.kind if task else None), given, known, origin)


def _label_flags(
    table: pa.Table, columns: Sequence[str], given: tuple[str, ...] | None, origin: str
) -> tuple[pa.Array, Kind, tuple[str, ...]]:
    """(label column, kind, names) of one column of zeros and ones for each label."""
    missing = [name for name in columns if name not in table.column_names]
    if missing or len(set(columns)) != len(columns) or len(columns) < 2:
        raise InputError(
            f"--label_columns is {listed(columns)}: expected two or more different columns of "
            f"{listed(table.column_names)}"
        )
    names = given or tuple(columns)
    if set(names) != set(columns):
        raise InputError(
            f"{origin} has the labels {listed(columns)}, and the model {listed(names)}: name the columns so"
        )
    answers = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0, "0.0": 0.0, "1.0": 1.0}
    flags = np.empty((table.num_rows, len(names)), np.float32)
    for place, name in enumerate(names):
        cells = pc.utf8_lower(pc.utf8_trim_whitespace(_strings(table, name, origin).fill_null("")))
        encoded = cells.combine_chunks().dictionary_encode()
        values, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        unknown = [number for number, value in enumerate(values) if value not in answers]
        if unknown:
            row = int(np.argmax(codes == unknown[0])) + 1
            raise InputError(
                f"{origin}: {name!r} is {_shown(values[unknown[0]])} in row {row}: expected 0 or 1"
            )
        flags[:, place] = np.array([answers[value] for value in values])[codes]
    return _flag_lists(flags), "multi_label", names


def _label_lists(
    cells: pa.ChunkedArray, given: tuple[str, ...] | None, known: tuple[str, ...], origin: str
) -> tuple[pa.Array, Kind, tuple[str, ...]]:
    """(label column, kind, names) of a column of lists of names or ids; an empty list is no label at all."""
    lists = cells.combine_chunks()
    if lists.null_count:
        row = pc.index(lists.is_null(), True).as_py() + 1
        raise InputError(f"{origin}: the labels of row {row} are missing: give a list, which may be empty")
    flat = _strings(pa.table({"labels": lists.flatten()}), "labels", origin).combine_chunks()
    encoded = pc.utf8_trim_whitespace(flat.fill_null("")).dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    rows = pc.list_parent_indices(lists).to_numpy()
    codes = encoded.indices.to_numpy()

    def where(value: str) -> str:
        row = rows[int(np.argmax(codes == values.index(value)))] + 1
        return f"{origin}: label {_shown(value)} in row {row}"

    if "" in values:
        raise InputError(f"{where('')} is empty: fill it or remove it from its list")
    _, names, meanings = read_labels(values, "classification", given, known, where)
    if len(names) < 2:
        raise InputError(f"{origin} has the labels {listed(names)}: expected two or more")
    flags = np.zeros((len(lists), len(names)), np.float32)
    flags[rows, np.array(meanings, np.int64)[codes]] = 1
    return _flag_lists(flags), "multi_label", names


def _flag_lists(flags: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(flags.ravel()), flags.shape[1]).cast(
        pa.list_(pa.float32())
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
