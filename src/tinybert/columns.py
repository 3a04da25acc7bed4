"""The columns of a table -> texts and labels, each value understood or refused in one line."""

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tinybert.errors import InputError, one_line
from tinybert.tables import MIXED, Source
from tinybert.tasks import Kind, Task, find_task, listed, read_labels

_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text", "text_pair"),
    ("text1", "text2"),
)
_TEXTS = ("text", "sentence", "review", "content", "comment", "message", "document", "tweet", "question")

Labels = tuple[pa.Array, Kind, tuple[str, ...]]  # a column of ids, flags or scores; kind; class names


def check_names(source: Source) -> None:
    """Check that no two columns of a source have the same name.

    Raises:
        InputError: Two have.
    """
    twins = [name for name, count in Counter(source.schema.names).items() if count > 1]
    if twins:
        raise InputError(
            f"{source.origin} has more than one column called {listed(twins)}: rename or remove them"
        )


def given_columns(given: Sequence[str] | None, counts: tuple[int, ...], expected: str) -> tuple[str, ...]:
    """Return the text columns that a user gave; none if none were.

    Args:
        given: The user's choice.
        counts: How many there may be.
        expected: That in words, for messages.

    Raises:
        InputError: There are more or fewer, or one twice.
    """
    columns = (given,) if isinstance(given, str) else tuple(given or ())
    if columns and (len(columns) not in counts or len(set(columns)) != len(columns)):
        raise InputError(f"--text_columns is {listed(columns)}: expected {expected}")
    return columns


def find_texts(
    source: Source, text_columns: Sequence[str] | None, name: str | None = None
) -> tuple[tuple[str, ...], Task | None]:
    """Return the text columns of a source, and the known task that it is of, if any.

    Args:
        source: An opened source.
        text_columns: The user's choice.
        name: What tells the task, for rows that were copied from a source of that name.

    Raises:
        InputError: A given column is missing, they are too many, there is no usual one, or two columns have
            the same name.
    """
    check_names(source)
    names = source.schema.names
    task = find_task(name or source.name)
    layouts = [columns for columns in (task.text_columns, task.archive_columns) if columns] if task else []
    known = next((columns for columns in layouts if set(columns) <= set(names)), None)
    return _text_columns(names, text_columns, known, source.origin), task if known else None


def _text_columns(
    names: Sequence[str], given: Sequence[str] | None, known: tuple[str, ...] | None, origin: str
) -> tuple[str, ...]:
    """Return the text columns: those that were given, else those of a known task, else the usual ones."""
    if wanted := given_columns(given, (1, 2), "one column, or two different ones"):
        missing = [name for name in wanted if name not in names]
        if missing:
            raise InputError(
                f"{origin} has no column {listed(missing)}; it has {listed(names)}: mend --text_columns"
            )
        return wanted
    if known is not None:
        return known
    lower = {name.lower().strip(): name for name in reversed(names)}
    for usual in (*_PAIRS, *((name,) for name in _TEXTS)):
        if all(name in lower for name in usual):
            return tuple(lower[name] for name in usual)
    separator = next((mark for mark in ";|\t," if mark in names[0]), None) if len(names) == 1 else None
    if separator:
        raise InputError(
            f"{origin} has one column, {names[0]!r}, as if its separator were {separator!r}: save it with "
            "commas as .csv or with tabs as .tsv"
        )
    raise InputError(f"{origin} has no usual text column; it has {listed(names)}: give --text_columns A [B]")


def class_names(table: pa.Table, column: str) -> tuple[str, ...]:
    """The names that `datasets.ClassLabel` left in a schema (parquet files, hub data)."""
    try:
        feature = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"][column]
        return tuple(feature.get("feature", feature)["names"])
    except (TypeError, KeyError, ValueError):
        return ()


def strings(table: pa.Table, column: str, origin: str) -> pa.ChunkedArray:
    """Return a column of texts, numbers or truth values as text, None where a cell is empty or NaN."""
    cells = table.column(column)
    kind = cells.type.value_type if pa.types.is_dictionary(cells.type) else cells.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not (number or text or pa.types.is_null(kind)):
        raise InputError(f"{origin}: column {column!r} holds {shown(str(kind))}: expected text or numbers")
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
    cells = strings(table, column, origin)
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
    known = class_names(table, column) or (task.label_names if task else ())
    cells = strings(table, column, origin)
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
) -> Labels | None:
    """(label column, kind, class names), or None if the labels are all empty or all -1."""
    encoded = pc.utf8_trim_whitespace(cells.fill_null("")).combine_chunks().dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()

    def where(value: str) -> str:
        row = first + int(np.argmax(codes == values.index(value))) + 1
        return f"{origin}: label {shown(value)} in row {row}"

    if values in ([""], ["-1"], ["-1.0"]):
        return None
    if "" in values:
        raise InputError(f"{where('')} is empty: fill it or remove the row")
    kind, names, meanings = read_labels(values, kind, given, known, where)
    # Each different label is understood once, and spread over the rows.
    dtype = np.float64 if kind == "regression" else np.int64
    return pa.array(np.array(meanings, dtype=dtype)[codes]), kind, names


def read_label_column(
    table: pa.Table,
    column: str,
    kind: Kind | None,
    given: tuple[str, ...] | None,
    task: Task | None,
    origin: str,
) -> Labels | None:
    """(label column, kind, class names) of a column of labels or of lists of them; None if it has none."""
    known = class_names(table, column)
    if is_list(table.schema.field(column).type):
        lists = read_lists(table, column, origin, "row", "give a list, which may be empty")
        return _label_lists(lists, given, known, origin)
    if kind == "multi_label":
        raise InputError(
            f"{origin}: column {column!r} holds one label a row, and any number of them is expected: give "
            "lists, or --label_columns of 0 and 1"
        )
    known = known or (task.label_names if task else ())
    cells = strings(table, column, origin)
    return _labels(cells, kind or (task.kind if task else None), given, known, origin)


def read_label_flags(
    table: pa.Table, columns: Sequence[str], given: tuple[str, ...] | None, origin: str
) -> Labels:
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
        cells = pc.utf8_lower(pc.utf8_trim_whitespace(strings(table, name, origin).fill_null("")))
        encoded = cells.combine_chunks().dictionary_encode()
        values, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        unknown = [number for number, value in enumerate(values) if value not in answers]
        if unknown:
            row = int(np.argmax(codes == unknown[0])) + 1
            raise InputError(
                f"{origin}: {name!r} is {shown(values[unknown[0]])} in row {row}: expected 0 or 1"
            )
        flags[:, place] = np.array([answers[value] for value in values])[codes]
    return _flag_lists(flags), "multi_label", names


def is_list(kind: pa.DataType) -> bool:
    """Return whether cells of this type are lists: large ones, as polars writes, or of one length, too."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def refuse_mixed(table: pa.Table, column: str, origin: str) -> None:
    """Refuse a column of lists beside other values, of which `open_source` keeps neither.

    Raises:
        InputError: It is one.
    """
    cells = table.column(column)
    if cells.type == MIXED and cells.null_count:
        raise InputError(f"{origin}: column {column!r} is empty or mixes texts with lists: write one form")


def read_lists(table: pa.Table, column: str, origin: str, unit: str, advice: str) -> pa.ListArray:
    """Return a column of lists of any sort as plain ones.

    Args:
        table: Rows.
        column: Which of its columns.
        origin: What has these rows, for messages.
        unit: What a row is called there.
        advice: What to do about a row without a list.

    Raises:
        InputError: There is one.
    """
    refuse_mixed(table, column, origin)
    cells = table.column(column)
    lists = cells.cast(pa.list_(cells.type.value_type)).combine_chunks()
    if lists.null_count:
        row = pc.index(lists.is_null(), True).as_py() + 1
        raise InputError(f"{origin}: column {column!r} is empty in {unit} {row}: {advice}")
    return lists


def _label_lists(
    lists: pa.ListArray, given: tuple[str, ...] | None, known: tuple[str, ...], origin: str
) -> Labels:
    """(label column, kind, names) of a column of lists of names or ids; an empty list is no label at all."""
    values, codes, where = encode_lists(lists, origin)
    _, names, meanings = read_labels(values, "classification", given, known, where)
    if len(names) < 2:
        raise InputError(f"{origin} has the labels {listed(names)}: expected two or more")
    flags = np.zeros((len(lists), len(names)), np.float32)
    rows = pc.list_parent_indices(lists).to_numpy()
    flags[rows, np.array(meanings, np.int64)[codes]] = 1
    return _flag_lists(flags), "multi_label", names


def encode_lists(
    lists: pa.ListArray, origin: str, what: str = "label", unit: str = "row"
) -> tuple[list[str], np.ndarray, Callable[[str], str]]:
    """Return the different labels in lists, the place of each entry's among them, and where one first is.

    Args:
        lists: Names, or ids, in lists.
        origin: What has these rows, for messages.
        what: What an entry is called there.
        unit: What a row is called there.

    Raises:
        InputError: The lists hold something else, or an empty label.
    """
    flat = strings(pa.table({what: lists.flatten()}), what, origin).combine_chunks()
    encoded = pc.utf8_trim_whitespace(flat.fill_null("")).dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()
    rows = pc.list_parent_indices(lists).to_numpy()

    def where(value: str) -> str:
        row = rows[int(np.argmax(codes == values.index(value)))] + 1
        return f"{origin}: {what} {shown(value)} in {unit} {row}"

    if "" in values:
        raise InputError(f"{where('')} is empty: fill it or remove it from its list")
    return values, codes, where


def _flag_lists(flags: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(flags.ravel()), flags.shape[1]).cast(
        pa.list_(pa.float32())
    )


def shown(value: object) -> str:
    """Return a value for a one-line message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
