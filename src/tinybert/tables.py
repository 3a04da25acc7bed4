"""Files, GLUE folders and hub names <-> tables of cells, in pieces: memory does not grow with the file."""

import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tinybert.errors import InputError, one_line

ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".json", ".jsonl", ".jsonl.gz", ".parquet")
OUTPUT_ENDINGS = tuple(ending for ending in ENDINGS if ending != ".json")
_BLOCK = 1 << 20  # bytes read at once
_LONGEST_ROW = 1 << 26  # bytes; pyarrow takes no row that is longer than its blocks
MIXED = pa.list_(pa.null())  # lists or objects beside other values; refused where text is asked for
# GLUE's own files of CoLA have no header: how their first row is told, and what it would be.
_COLA = re.compile(rb"[^\t\n]+\t[01]\t\*?\t[^\t\n]+(\n|$)")
_COLA_HEADER = b"source\tlabel\tmark\tsentence\n"


@dataclass(frozen=True)
class Source:
    """A table that is read in pieces, as often as asked.

    Attributes:
        origin: What is read, for reports and error messages.
        name: Its whole name: a file's absolute path, or the hub name as given.
        schema: Columns and their types; of hub data and parquet files also what `datasets` knows of them.
        parts: Reads anew, in tables of any size; the number is a hint.
    """

    origin: str
    name: str
    schema: pa.Schema
    parts: Callable[[int], Iterable[pa.Table]] = field(repr=False)

    def tables(self, rows: int = 1000) -> Iterator[pa.Table]:
        """Read from the start, in tables of exactly ``rows`` rows but for the last.

        Raises:
            InputError: The file cannot be read on; what was yielded before stands.
        """
        rest = self.schema.empty_table()
        for part in self.parts(rows):
            rest = pa.concat_tables([rest, part])
            while rest.num_rows >= rows:
                yield rest.slice(0, rows)
                rest = rest.slice(rows)
        if rest.num_rows:
            yield rest


def open_source(source: str | os.PathLike[str], split: str | None = None) -> Source:
    """Find a file or a hub's split and learn its columns.

    CSV has the usual quoting; TSV has none (GLUE's way: ``"`` is an ordinary character). Their cells are
    text as they stand. JSON lines are read twice, here for their columns and types and then for their values;
    a column of text and numbers becomes text, one that mixes lists or objects with others reads as empty. A
    ``.json`` file that holds one list is read whole.

    Args:
        source: A file with one of `ENDINGS`; a folder with ``train``, ``dev`` and ``test`` files; or, if
            there is no such path, a hub name: ``"glue/sst2"``, ``"owner/name"`` or ``"owner/name/config"``.
        split: ``"train"``, ``"validation"`` (or ``"dev"``) or ``"test"`` of a folder or hub name.

    Raises:
        InputError: There is no such source, or it cannot be read.
    """
    source, path = os.fspath(source), find_file(source, split)
    known = path.name.lower().endswith(ENDINGS)
    if not path.exists():
        if not known and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){1,2}", source):
            return _open_hub(source, split)
        raise InputError(f"{source}: no such file or folder; give a {', '.join(ENDINGS)} file or a hub name")
    if not known:
        raise InputError(f"{path} has an unknown ending: expected {', '.join(ENDINGS)}")
    with _file_errors(path):
        if _format(path) == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
            read = partial(_read_parquet, path)
        elif _format(path) in ("csv", "tsv"):
            _start(path)
            with _Blocks(path) as blocks, _open_delimited(path, blocks) as reader:
                schema = pa.schema([(name, pa.string()) for name in reader.schema.names])
            read = partial(_read_delimited, path, schema)
        else:
            document = _start(path).startswith(b"[") and _format(path) == "json"
            schema = _json_schema(path, document)
            read = partial(_read_json, path, schema, document)

    def parts(rows: int) -> Iterator[pa.Table]:
        with _file_errors(path):
            yield from read(rows)

    return Source(str(path), str(path.absolute()), schema, parts)


def _format(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def find_file(source: str | os.PathLike[str], split: str | None) -> Path:
    """Return the path that a source would be; of a folder, that of its split's file."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return folder
    if split is None:
        raise InputError(f"{folder} is a folder: say which split (train, validation or test), or name a file")
    # MNLI has two development sets; the matched one is its usual score.
    stems = {"validation": ("dev", "validation", "dev_matched", "validation_matched")}
    stems["dev"] = stems["validation"]
    for stem in stems.get(split, (split, split.replace("validation", "dev"))):
        for ending in ENDINGS:
            if (folder / (stem + ending)).is_file():
                return folder / (stem + ending)
    names = sorted(entry.name for entry in folder.iterdir())
    there = ", ".join(map(repr, names[:20])) + " and more" * (len(names) > 20) if names else "none"
    raise InputError(f"{folder} has no file for the split {split!r}, such as {split}.tsv; it has {there}")


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is said in one line that names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        reason = one_line(error)
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            raise InputError(f"{path} is not UTF-8 text ({reason}): save it as UTF-8") from error
        raise InputError(f"{path} cannot be read as {_format(path)} ({reason}): correct the file") from error


def _open_hub(source: str, split: str | None) -> Source:
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
            f"{source} is no local path, and the hub did not give its split {split!r}: {one_line(error)}"
        ) from error
    # The table is mapped into memory, and so are its slices.
    table = rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata)

    def parts(size: int) -> Iterator[pa.Table]:
        return (table.slice(start, size) for start in range(0, table.num_rows, size))

    return Source(f"{source} ({split})", source, table.schema, parts)


def _stream(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else None)


def _start(path: Path) -> bytes:
    """How a file begins, without leading white space."""
    with _stream(path) as stream:
        start = stream.read(_BLOCK)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UnicodeError("it starts as UTF-16 does")
        start = start.removeprefix(b"\xef\xbb\xbf")
        while not (start := start.lstrip()):
            start = stream.read(_BLOCK)
            if not start:
                raise InputError("the file is empty: expected at least one row")
    return start


class _Blocks(io.RawIOBase):
    """CSV or TSV, with a header, in blocks that each hold the end of a row.

    pyarrow reads 32 blocks ahead, so they must be small, but refuses a row that reaches over a whole block.
    """

    def __init__(self, path: Path) -> None:
        self.quotes = 0
        self._stream = _stream(path)
        self._quoted = _format(path) == "csv"
        self._header = _COLA_HEADER if not self._quoted and _COLA.match(_start(path)) else b""
        self._inside = 0  # 1 if the next byte stands between quotes
        self._end = b""  # what is missing if the file ends here

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block, ended, self._header = bytearray(self._header), False, b""
        while len(block) < size:
            more = self._stream.read(min(_BLOCK, size - len(block))) or self._end
            self._end = b"\n" if more and not more.endswith(b"\n") else b""
            block += more
            outside = more.split(b'"') if self._quoted else [more]
            ended |= any(b"\n" in text or b"\r" in text for text in outside[self._inside :: 2])
            self._inside = (self._inside + len(outside) - 1) % 2
            self.quotes += len(outside) - 1
            # Where \r\n is cut in two, pyarrow may take the next block for the end of the file.
            if not more or (ended and more[-1:] != b"\r"):
                return bytes(block)
        self._inside = 1 - self._inside  # a quote within a cell (5" nails) had opened nothing
        return bytes(block)


def _open_delimited(path: Path, blocks: _Blocks, names: Sequence[str] = ()) -> pa.csv.CSVStreamingReader:
    """Every cell of the named columns as text; pyarrow as it does not forgive ragged rows."""
    csv = _format(path) == "csv"
    read = pa.csv.ReadOptions(block_size=_LONGEST_ROW, use_threads=False)  # threads lose the row number
    mark, quote = (",", '"') if csv else ("\t", False)
    parse = pa.csv.ParseOptions(delimiter=mark, quote_char=quote, newlines_in_values=csv)
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), null_values=[])
    return pa.csv.open_csv(blocks, read, parse, convert)


def _read_delimited(path: Path, schema: pa.Schema, _rows: int) -> Iterator[pa.Table]:
    count, last = 0, ""
    # The reader waits for its own thread when it is closed, but would wait for ever where it is only dropped.
    with _Blocks(path) as blocks, _open_delimited(path, blocks, schema.names) as reader:
        for batch in filter(len, reader):
            count += batch.num_rows
            last = batch.column(batch.num_columns - 1)[-1].as_py()
            yield pa.Table.from_batches([batch])
        # pyarrow closes an open quote at the end of the file, having swallowed every row after it.
        if blocks.quotes % 2 and "\n" in last:
            raise InputError(f'a quote (") is never closed: row {count} runs to the end of the file')


def _read_parquet(path: Path, rows: int) -> Iterator[pa.Table]:
    # By itself pyarrow reads a whole row group at once, and keeps them all until the end.
    with pa.parquet.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False) as file:
        for batch in file.iter_batches(rows):
            yield pa.Table.from_batches([batch])


def _objects(path: Path, document: bool) -> Iterator[dict[str, Any]]:
    """JSON lines, or one list of objects; Python's reader because pyarrow's makes dates of texts."""
    # Only "\n" ends a line: JSON texts may hold U+2028 as it is.
    with _stream(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as text:
        rows = json.loads(text.read()) if document else _json_lines(text)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise InputError(f'row {number} is {row!r:.60}: expected an object such as {{"text": ...}}')
            yield row


def _json_lines(text: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(text, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} is not JSON ({one_line(error)}): correct it") from error


def _json_schema(path: Path, document: bool) -> pa.Schema:
    # One value of each shape tells as much of a column's type as all values do.
    columns: dict[str, dict[Any, Any]] = {}
    for row in _objects(path, document):
        for name, value in row.items():
            columns.setdefault(name, {}).setdefault(_shape(value), value)
    return pa.schema([(name, _json_type(list(values.values()))) for name, values in columns.items()])


def _shape(value: Any) -> Any:
    """Whatever pyarrow's choice of a type depends on."""
    if isinstance(value, dict):
        return "object", tuple((name, _shape(item)) for name, item in value.items())
    if isinstance(value, list):
        return "list", frozenset(map(_shape, value))
    if type(value) is int:  # too large for a float64, or for an int64
        return abs(value) <= 1 << 53, -(1 << 63) <= value < 1 << 63
    return type(value)


def _json_type(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError):  # mixed types
        return MIXED if any(isinstance(value, list | dict) for value in values) else pa.string()


def _read_json(path: Path, schema: pa.Schema, document: bool, rows: int) -> Iterator[pa.Table]:
    objects = _objects(path, document)
    while piece := list(islice(objects, rows)):
        columns = [_json_column([row.get(column.name) for row in piece], column.type) for column in schema]
        yield pa.Table.from_arrays(columns, schema=schema)


def _json_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        values = [value if isinstance(value, str | None) else json.dumps(value) for value in values]
    if kind == MIXED:
        empty = (isinstance(value, list) and value.count(None) == len(value) for value in values)
        values = [value if bare else None for value, bare in zip(values, empty, strict=True)]
    return pa.array(values, kind)


@dataclass
class Writer:
    """Appends to one file; made by `open_writer`."""

    path: Path
    file: BinaryIO
    stack: ExitStack
    _names: list[str] = field(default_factory=list)
    _parquet: pa.parquet.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append rows; every table must have the columns of the first."""
        if _format(self.path) == "parquet":
            if self._parquet is None:
                self._parquet = self.stack.enter_context(pa.parquet.ParquetWriter(self.file, table.schema))
            self._parquet.write_table(table)
            return
        if self._names and self._names != table.column_names:
            raise ValueError(f"columns {table.column_names} came after {self._names}")
        try:
            if _format(self.path) == "jsonl":
                lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
            else:
                lines = list(self._lines(table, _format(self.path) == "csv"))
        except InputError as error:
            raise InputError(f"cannot write {self.path}: {error}") from error
        except TypeError as error:  # JSON knows neither dates nor bytes
            raise InputError(f"cannot write {self.path} ({one_line(error)}): choose .parquet") from error
        self.file.write("".join(line + "\n" for line in lines).encode())
        self._names = table.column_names

    def _lines(self, table: pa.Table, quoted: bool) -> Iterator[str]:
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        for row in rows if self._names else chain([table.column_names], rows):
            cells = [_cell(name, value, quoted) for name, value in zip(table.column_names, row, strict=True)]
            if cells == [""] and not quoted:
                raise InputError(
                    "a row is empty, and an empty line is no row: choose .parquet, .jsonl or .csv"
                )
            yield (("," if quoted else "\t").join(cells)) or '""'


def _cell(name: str, value: object, quoted: bool) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise InputError(f"column {name!r} holds {value!r:.60}, no text or number: choose .parquet or .jsonl")
    text = value if isinstance(value, str) else json.dumps(value)
    if quoted:
        # Not csv.writer: before Python 3.13 it leaves a lone carriage return, which ends a row, unquoted.
        return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n\ufeff]', text) else text
    if re.search("[\t\r\n]", text):
        raise InputError(f"column {name!r} has a tab or line break: choose .parquet, .jsonl or .csv")
    return text


@contextmanager
def open_writer(path: Path, into: Path | None = None) -> Iterator[Writer]:
    """Open a file that tables are appended to, in the format of its ending.

    `open_source` reads the same texts back, and equal numbers; ``None`` is ``null``, or an empty cell in CSV
    and TSV. The file is complete once the context is left.

    Args:
        path: Where to write, with one of `OUTPUT_ENDINGS`; a file that is there is replaced.
        into: The file to write in its place; the format is that of ``path``, and messages name it.

    Raises:
        InputError: The ending is unknown, the file cannot be opened or, when writing, the format cannot hold
            a value.
    """
    if not path.name.lower().endswith(OUTPUT_ENDINGS):
        raise InputError(f"cannot write {path}: give it one of the endings {', '.join(OUTPUT_ENDINGS)}")
    try:
        file = (into or path).open("wb")
    except OSError as error:
        raise InputError(f"cannot write {path} ({one_line(error)}): name another file") from error
    with file, ExitStack() as stack:
        out: BinaryIO = file
        if path.suffix.lower() == ".gz":
            # The name and time that gzip notes would make other bytes of the same rows.
            out = cast(BinaryIO, stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0)))
        yield Writer(path, out, stack)
