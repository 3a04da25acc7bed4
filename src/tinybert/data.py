"""Files, GLUE folders and hub names -> rows of text and label -> tokens."""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from tinybert.errors import InputError
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

ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".json", ".jsonl", ".jsonl.gz", ".parquet")
_PARSE_BYTES = 1 << 26  # one row must fit into one of pyarrow's blocks


@dataclass(frozen=True)
class TaskData:
    """Rows in one form, whatever they came from.

    Attributes:
        rows: Columns ``text``, ``text_pair`` (for pairs) and, if labelled, ``label``: a class id (int64) or a
            score (float64).
        kind: Classification or regression.
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
    kind: Kind | None = None,
    label_names: Sequence[str] | None = None,
    require_labels: bool = True,
) -> TaskData:
    """Read rows of text, or of text pairs, with their labels.

    CSV has the usual quoting; TSV has none (GLUE's way: ``"`` is an ordinary character). Cells are text as
    they stand: "NA" and "null" stay. Rows are counted from 1 in messages, without the header. What labels
    mean: `tasks.read_labels`. Labels that are all -1 (GLUE's test sets) count as none.

    Args:
        source: A file with one of `ENDINGS`; a folder with ``train``, ``dev`` and ``test`` files; or, if
            there is no such path, a hub name: ``"glue/sst2"``, ``"owner/name"`` or ``"owner/name/config"``.
        split: ``"train"``, ``"validation"`` (or ``"dev"``) or ``"test"`` of a folder or hub name.
        text_columns: One or two columns; found by their usual names if not given.
        label_column: Likewise.
        kind: If not given, GLUE's table or the labels decide: a number that is no integer means regression.
        label_names: The classes in the order of their ids, such as a teacher's ``id2label``.
        require_labels: Whether rows without labels are an error.

    Raises:
        InputError: The source cannot be read, or a column, text or label is missing or cannot be understood.
    """
    source = os.fspath(source)
    table, origin, task = _read(source, split)
    if table.num_rows == 0:
        raise InputError(f"{origin} has no rows: expected a header and at least one row")
    names = table.column_names
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise InputError(f"{origin} has more than one column called {listed(twins)}: rename or remove them")
    if task is not None and not set(task.text_columns) <= set(names):
        task = None
    texts = find_text_columns(names, text_columns, task, origin)
    label = find_label_column(names, label_column, texts, require_labels, origin)
    columns = {
        name: _texts(table, column, origin)
        for name, column in zip(("text", "text_pair"), texts, strict=False)
    }
    given = tuple(label_names) if label_names is not None else None
    found = None
    if label is not None:
        known = _class_names(table, label) or (task.label_names if task else ())
        cells = _strings(table, label, origin)
        found = _labels(cells, kind or (task.kind if task else None), given, known, origin)
    if found is None and require_labels:
        raise InputError(f"{origin} has no labels (all are empty or -1): give a labelled file")
    if found is None:
        kind = kind or (task.kind if task else "classification")
        classes = () if kind == "regression" else given or (task.label_names if task else ())
    else:
        columns["label"], kind, classes = found
    rows, fingerprint = _store(pa.table(columns))
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
        pair = batch.get("text_pair")
        encoded = dict(
            tokenizer(batch["text"], pair, truncation="longest_first", max_length=max_length, padding=False)
        )
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if "label" in batch:
            encoded["labels"] = batch["label"]
        return encoded

    # The first call writes the truncation into a fast tokenizer, and the cache's key is made of its state.
    encode(data.rows[:1])
    return data.rows.map(encode, batched=True, remove_columns=data.rows.column_names, desc="Tokenizing")


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
        parts[name] = replace(data, rows=rows, fingerprint=_fingerprint(rows))
        start = end
    return parts


def _read(source: str, split: str | None) -> tuple[pa.Table, str, Task | None]:
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_split(path, split)
    name = path.name.lower()
    if not path.exists():
        if not name.endswith(ENDINGS) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){1,2}", source):
            return _read_hub(source, split)
        raise InputError(f"{source}: no such file or folder; give a {', '.join(ENDINGS)} file or a hub name")
    ending = name.removesuffix(".gz").rpartition(".")[2]
    if not name.endswith(ENDINGS):
        raise InputError(f"{path} has an unknown ending: expected {', '.join(ENDINGS)}")
    try:
        if ending == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                table = file.read()
        else:
            with pa.input_stream(str(path), compression="gzip" if name.endswith(".gz") else None) as stream:
                content = stream.read()
            if not content.strip():
                raise InputError("the file is empty: expected at least one row")
            parse = _parse_json if ending.startswith("json") else _parse_table
            table = parse(content, ending)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            raise InputError(f"{path} is not UTF-8 text ({_line(error)}): save it as UTF-8") from error
        raise InputError(f"{path} cannot be read as {ending} ({_line(error)}): correct the file") from error
    return table, str(path), find_task(str(path.absolute()))


def _file_of_split(folder: Path, split: str | None) -> Path:
    if split is None:
        raise InputError(f"{folder} is a folder: say which split (train, validation or test), or name a file")
    # MNLI has two development sets; the matched one is its usual score.
    stems = {"validation": ("dev", "validation", "dev_matched", "validation_matched")}
    stems["dev"] = stems["validation"]
    for stem in stems.get(split, (split, split.replace("validation", "dev"))):
        for ending in ENDINGS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    there = listed(sorted(entry.name for entry in folder.iterdir()))
    raise InputError(f"{folder} has no file for the split {split!r}, such as {split}.tsv; it has {there}")


def _read_hub(source: str, split: str | None) -> tuple[pa.Table, str, Task | None]:
    task = find_task(source)
    owner, name, *configuration = source.split("/")
    if split is None:
        raise InputError(f"{source} is a hub name: say which split (train, validation or test)")
    if owner == "glue":
        owner, name, configuration = "nyu-mll", "glue", [name]
    split = "validation" if split == "dev" else split
    if configuration == ["mnli"] and split in ("validation", "test"):
        split += "_matched"
    try:
        rows = datasets.load_dataset(f"{owner}/{name}", *configuration, split=split)
    except Exception as error:  # network, hub and builder each have their own families of errors
        raise InputError(
            f"{source} is no local path, and the hub did not give its split {split!r}: {_line(error)}"
        ) from error
    table = rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata)
    return table, f"{source} ({split})", task


def _parse_table(content: bytes, ending: str) -> pa.Table:
    """CSV or TSV, every cell as text; pyarrow as it neither guesses types nor forgives ragged rows."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnicodeError("it starts as UTF-16 does")
    content = content if content.endswith(b"\n") else content + b"\n"
    quoted = ending == "csv"
    read = pa.csv.ReadOptions(block_size=_PARSE_BYTES, use_threads=False)  # threads lose the row number
    parse = pa.csv.ParseOptions(
        delimiter="," if quoted else "\t", quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    names = pa.csv.open_csv(pa.BufferReader(content), read, parse).schema.names
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=[], strings_can_be_null=False
    )
    table = pa.csv.read_csv(pa.BufferReader(content), read, parse, convert)
    # pyarrow closes an open quote at the end of the file, having swallowed every row after it.
    if quoted and content.count(b'"') % 2 and table.num_rows and "\n" in table.column(-1)[-1].as_py():
        raise InputError(f'a quote (") is never closed: row {table.num_rows} runs to the end of the file')
    return table


def _parse_json(content: bytes, ending: str) -> pa.Table:
    """JSON lines, or one list of objects; Python's reader because pyarrow's makes dates of texts."""
    text = content.decode("utf-8-sig")
    if ending == "json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise InputError(f"line {number} is not JSON ({_line(error)}): correct it") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f'row {number} is {_shown(row)}: expected an object such as {{"text": ...}}')
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except UnicodeError:
        raise
    except (pa.ArrowException, OverflowError):  # mixed types
        if any(isinstance(value, list | dict) for value in values):
            return pa.nulls(len(values), pa.list_(pa.null()))  # refused if it is asked for
        plain = (str, type(None))
        return pa.array([value if isinstance(value, plain) else json.dumps(value) for value in values])


def _class_names(table: pa.Table, column: str) -> tuple[str, ...]:
    """The names that `datasets.ClassLabel` left in a schema (parquet files, hub data)."""
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(features[column]["names"])
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
        raise InputError(f"{origin}: column {column!r} is not UTF-8 text: {_line(error)}") from error


def _texts(table: pa.Table, column: str, origin: str) -> pa.ChunkedArray:
    cells = _strings(table, column, origin)
    empty = pc.equal(pc.utf8_trim_whitespace(cells.fill_null("")), "")
    row = pc.index(empty, True).as_py() + 1
    if row:
        raise InputError(f"{origin}: column {column!r} is empty in row {row}: fill it or remove the row")
    return cells


def _labels(
    cells: pa.ChunkedArray,
    kind: Kind | None,
    given: tuple[str, ...] | None,
    known: tuple[str, ...],
    origin: str,
) -> tuple[pa.Array, Kind, tuple[str, ...]] | None:
    """(label column, kind, class names), or None if the labels are all empty or all -1."""
    encoded = pc.utf8_trim_whitespace(cells.fill_null("")).combine_chunks().dictionary_encode()
    values: list[str] = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()

    def where(value: str) -> str:
        return f"{origin}: label {_shown(value)} in row {int(np.argmax(codes == values.index(value))) + 1}"

    if values in ([""], ["-1"], ["-1.0"]):
        return None
    if "" in values:
        raise InputError(f"{where('')} is empty: fill it or remove the row")
    kind, names, meanings = read_labels(values, kind, given, known, where)
    # Each different label is understood once, and spread over the rows.
    dtype = np.float64 if kind == "regression" else np.int64
    return pa.array(np.array(meanings, dtype=dtype)[codes]), kind, names


def _store(table: pa.Table) -> tuple[datasets.Dataset, str]:
    """Rows in the `datasets` cache, mapped into memory, under a name made of their content.

    So a changed file is never mistaken for the one before, and what is computed from the rows is cached too.
    """
    fingerprint = _fingerprint(datasets.Dataset(table))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tinybert" / fingerprint
    final = folder / "rows.arrow"
    if not final.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                part = Path(scratch) / "rows.arrow"
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=1000)
                part.replace(final)
        except OSError as error:
            raise InputError(f"cannot write {folder} ({_line(error)}): set HF_DATASETS_CACHE") from error
    return datasets.Dataset.from_file(str(final)), fingerprint


def _fingerprint(rows: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
