"""Unlabelled text, streamed: files, folders, globs and hub names -> numbered shards of texts, in pieces."""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet
from fsspec.compression import compr
from fsspec.utils import infer_compression

from tinybert.errors import InputError, one_line

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
END = ""  # what stands for the end of a document in a piece of reading
_REFUSED = (".csv", ".tsv", ".zip", ".tar", ".arrow")  # as lines of text they would be rubbish
_ROWS, _CHARACTERS = 1000, 1 << 18  # the most of a piece of reading, but for a single longer row
_BATCH = 128  # rows that `datasets` gives at once; they are in memory whole, however long they are
_HEAD = 1 << 16  # bytes at either end of a file that its fingerprint is taken of
_RATIO = 1 << 21  # bytes of text that tell how far a file is compressed
_Choose = Callable[[str, dict[str, bool]], str]  # a source, which of its columns are text -> the one to read


@dataclass(frozen=True)
class _Shard:
    """One file, or one part of a hub data set.

    Attributes:
        name: What is read, for error messages.
        kind: Lines of text, lines of JSON, or a table.
        size: Bytes on the disk; rows of a hub's part; None where unknown.
        unit: What ``size`` counts: sizes of one unit may be compared.
        path: The file.
        column: The column of text, of all but lines of text; None in a file without a row.
        hub: The rows of a hub's part.
        rows: Rows of a table, if known.
    """

    name: str
    kind: Literal["text", "jsonl", "table"]
    size: int | None
    unit: str
    path: Path | None = None
    column: str | None = None
    hub: datasets.IterableDataset | None = field(default=None, repr=False)
    rows: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in shards, each read in pieces from any row on; made by `open_corpus`."""

    _shards: tuple[_Shard, ...]

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    @property
    def names(self) -> list[str]:
        """What each shard is: a path, or a hub name and which part."""
        return [shard.name for shard in self._shards]

    def read(self, shard: int, start_row: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Read a shard from a row on.

        A row is a line of text or JSON, or a row of a table. A line ends at ``\\n``, ``\\r\\n`` or a lone
        ``\\r``, as Python's text files do, and at nothing else.

        Args:
            shard: Which, from 0.
            start_row: Rows to pass over. They are read, but nothing is made of them.

        Yields:
            The number of the row after the piece, and its texts: never blank, but `END`, the empty string,
            after the last text of each document (and possibly once more).

        Raises:
            InputError: The shard cannot be read on; what was yielded before stands.
        """
        source = self._shards[shard]
        with _errors(source.name):
            yield from _pieces(_texts(source, start_row), start_row)

    def head(self, shard: int, characters: int) -> tuple[list[str], float | None]:
        """Return the texts at the start of a shard, and which share of the shard they are.

        Args:
            shard: Which, from 0.
            characters: How much to read; reading stops with the first piece that reaches it.

        Returns:
            Texts as `read` yields them, and the share: 1 where they are all there is, an estimate where
            the file is compressed, None where the hub does not tell.
        """
        source = self._shards[shard]
        texts: list[str] = []
        rows = 0
        for rows, piece in self.read(shard):  # noqa: B007
            texts += piece
            characters -= sum(map(len, piece))
            if characters <= 0:
                break
        else:
            return texts, 1.0
        if source.path is None or source.kind == "table":
            return texts, min(1.0, rows / source.rows) if source.rows else None
        return texts, _share_of_lines(source.path, rows)

    def sizes(self) -> list[tuple[str, int | None]]:
        """Return each shard's unit, such as ``"bytes of .txt.gz"``, and how many; None if unknown."""
        return [(shard.unit, shard.size) for shard in self._shards]

    def fingerprint(self) -> str:
        """Return what tells this corpus from another: names, sizes, ends of files; not folders."""
        digest = hashlib.sha256()
        for shard in self._shards:
            name = shard.path.name if shard.path else shard.name
            digest.update(json.dumps([name, shard.kind, shard.column, shard.size]).encode())
            if shard.path:
                with _errors(shard.name), shard.path.open("rb") as file:
                    digest.update(file.read(_HEAD))
                    file.seek(max(0, (shard.size or 0) - _HEAD))
                    digest.update(file.read(_HEAD))
        return digest.hexdigest()[:16]


def open_corpus(
    sources: Sequence[str], *, text_column: str | None = None, option: str = "text_column"
) -> Corpus:
    """Find files and hub data sets, and learn where their text is; nothing is read but their starts.

    Lines of text (``.txt``, or no known ending): a paragraph a line; a blank line ends a document, and so
    does the end of the file. ``.jsonl``, ``.json`` (an object a line; or one list, which is read whole),
    ``.parquet`` and hub data: a document a row. All but Parquet may be compressed.

    Args:
        sources: Files, globs, folders (with all below them: files with a known ending or none; hidden and
            empty ones are passed over) and hub names (``"owner/name"`` or ``"owner/name/config"``; their
            split ``train``). A file that is found twice is read once.
        text_column: Of JSON, Parquet and hub data: the column of text. Otherwise ``text`` or, if there is
            none, the only column of text.
        option: What the option that gives it is called, for messages.

    Raises:
        InputError: There is no such source, it cannot be read, it is empty, or which column is meant is
            not clear.
    """
    if isinstance(sources, str):
        raise InputError(f"the corpus is {sources!r}: expected a list, such as [{sources!r}]")
    shards: dict[str, _Shard] = {}
    choose = partial(_choose_column, asked=text_column, option=option)
    for source in sources:
        paths = find_files(source)
        found = _open_hub(source, choose) if paths is None else [_open_file(path, choose) for path in paths]
        for shard in found:
            shards.setdefault(str(shard.path.resolve()) if shard.path else shard.name, shard)
    if not any(shard.size is None or shard.size > 0 for shard in shards.values()):
        raise InputError(f"the corpus is empty ({', '.join(sources) or 'no source'}): name files with text")
    return Corpus(tuple(shards.values()))


def _endings(path: Path) -> tuple[str, str]:
    """Return the format's ending and the compression's, in lower case; empty where there is none."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def find_files(source: str) -> list[Path] | None:
    """Return the files that a source of `open_corpus` names; None of a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        below = sorted(entry for entry in path.rglob("*") if entry.is_file())
        shown = [e for e in below if not any(part.startswith(".") for part in e.relative_to(path).parts)]
        files = [e for e in shown if _endings(e)[0] in ("", *ENDINGS) and e.stat().st_size]
        if not files:
            there = ", ".join(entry.name for entry in shown[:10]) or "nothing"
            raise InputError(
                f"{source} is a folder with no text in {', '.join(ENDINGS)} files (it has {there})"
            )
        return files
    if path.exists():
        return [path]
    if glob.has_magic(source):
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not (files := [match for match in matches if match.is_file()]):
            raise InputError(
                f"{source}: no file matches this pattern; name a file, a folder or another pattern"
            )
        return files
    if (
        not _endings(path)[1]
        and path.suffix not in (*ENDINGS, *_REFUSED)
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){1,2}", source)
    ):
        return None
    raise InputError(f"{source}: no such file or folder; name a file, a folder, a pattern or a hub name")


def _open_file(path: Path, choose: _Choose) -> _Shard:
    format_, compression = _endings(path)
    if format_ in _REFUSED:
        raise InputError(f"{path} is no text: expected {', '.join(ENDINGS)}, and .csv and .tsv made .parquet")
    name = str(path)
    with _errors(name):
        size = path.stat().st_size
        shard = _Shard(name, "text", size, f"bytes of {format_}{compression}", path)
        if format_ == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
            kinds = {column.name: _is_text(column.type) for column in schema}
            return replace(shard, kind="table", column=choose(name, kinds), rows=rows)
        if format_ not in (".json", ".jsonl"):
            return shard
        tables = _tables(shard)
        lines = (line.removeprefix("\ufeff") for table in tables for line in table.column(0).to_pylist())
        start = list(islice(filter(str.strip, lines), 100))
        if format_ == ".json" and start and start[0].lstrip().startswith("["):
            listed = replace(shard, kind="table")
            first = next((table for table in _tables(listed)), pa.table({}))
            return replace(listed, column=choose(name, _kinds(first.to_pylist())))
        objects = [_object(line, number) for number, line in enumerate(start, start=1)]
        column = choose(name, _kinds(objects)) if objects else None
        return replace(shard, kind="jsonl", column=column)


def _open_hub(source: str, choose: _Choose) -> list[_Shard]:
    owner, name, *configuration = source.split("/")
    try:
        data = datasets.load_dataset(f"{owner}/{name}", *configuration, split="train", streaming=True)
        kinds = _kinds([] if data.features else list(data.take(100)))
        for column, feature in (data.features or {}).items():
            kinds[column] = isinstance(feature, datasets.Value) and _is_text(feature.pa_type)
        count = data.num_shards
        splits = data.info.splits or {}
        rows = splits["train"].num_examples // count if "train" in splits else None
    except Exception as error:  # network, hub and builder each have their own families of errors
        raise InputError(
            f"{source} is no local path, and the hub did not give its split 'train': {one_line(error)}"
        ) from error
    column = choose(source, kinds)
    data = data.select_columns([column])
    whole = _Shard(source, "table", rows, f"rows of {source}", column=column, rows=rows)
    parts = (data.shard(num_shards=count, index=part) for part in range(count))
    return [
        replace(whole, name=f"{source} (part {part} of {count})", hub=hub)
        for part, hub in enumerate(parts, start=1)
    ]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _kinds(objects: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Of each column whether it is text, as far as these rows tell; one that is null in all may be."""
    kinds: dict[str, bool] = {}
    for row in objects:
        for name, value in row.items():
            kinds[name] = kinds.get(name, True) and isinstance(value, str | None)
    return kinds


def _choose_column(origin: str, kinds: dict[str, bool], asked: str | None, option: str) -> str:
    texts = [name for name, text in kinds.items() if text]
    if asked in texts or (asked is None and "text" in texts):
        return asked or "text"
    if asked is None and len(texts) == 1:
        return texts[0]
    there = ", ".join(f"{name} (text)" if text else name for name, text in kinds.items()) or "none"
    wanted = "one of text, or one called 'text'" if asked is None else f"{asked!r} with text"
    raise InputError(f"{origin} has the columns {there}: expected {wanted}; say which with --{option}")


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is said in one line that names the shard."""
    try:
        yield
    except InputError as error:
        raise error if name in str(error) else InputError(f"{name}: {error}") from error
    except UnicodeError as error:
        raise InputError(f"{name} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from error
    except MemoryError:
        raise
    except Exception as error:  # each compression and each builder has its own family of errors
        raise InputError(f"{name} cannot be read ({one_line(error)}): correct or remove it") from error


def _tables(shard: _Shard) -> Iterator[pa.Table]:
    """Read a shard from the start, in tables of a few rows."""
    if shard.path is None:
        assert shard.hub is not None
        # Not as Arrow tables: rows that a function makes have a type of their own where they are null.
        for rows in shard.hub.iter(_BATCH):
            yield pa.table({name: pa.array(cells, pa.large_string()) for name, cells in rows.items()})
        return
    if _endings(shard.path)[0] == ".parquet":
        # `datasets` reads as pyarrow does by itself: a whole row group at once, and few files have several.
        with pa.parquet.ParquetFile(shard.path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield from file.iter_batches(_BATCH, columns=[shard.column])
        return
    # To `datasets` a path is a pattern, and one that matches nothing is a file without rows.
    files = {"train": [glob.escape(str(shard.path))]}
    options: dict[str, Any] = {"data_files": files, "split": "train", "streaming": True}
    if shard.kind == "table":
        data = datasets.load_dataset("json", **options)
    else:
        # Its own chunks, ten million characters, take a hundred megabytes while they are cut into lines.
        data = datasets.load_dataset("text", chunksize=_CHARACTERS, **options)
    yield from data.with_format("arrow").iter(_BATCH)


def _texts(shard: _Shard, start_row: int) -> Iterator[list[str]]:
    """Yield of each row from one on its texts: none, one, or one and the end of its document."""
    row = 0
    for table in _tables(shard):
        rows = table.num_rows
        if row + rows > start_row:
            column = table.column(shard.column if shard.kind == "table" else 0)
            cells = column.slice(max(0, start_row - row)).to_pylist()
            if not (row or start_row) and shard.kind != "table":
                # A byte order mark; with the encoding that takes it away, compressed files still have it.
                cells[0] = cells[0].removeprefix("\ufeff")
            if shard.kind == "text":
                yield from ([cell] if cell and not cell.isspace() else [END] for cell in cells)
            else:
                if shard.kind == "jsonl":
                    first = max(row, start_row) + 1
                    cells = [_text_of(cell, first + place, shard.column) for place, cell in enumerate(cells)]
                yield from ([cell, END] if cell and not cell.isspace() else [] for cell in cells)
        row += rows


def _pieces(rows: Iterable[list[str]], start_row: int) -> Iterator[tuple[int, list[str]]]:
    row = first = start_row
    texts: list[str] = []
    characters = 0
    for row, more in enumerate(rows, start=start_row + 1):
        texts += more
        characters += len(more[0]) if more else 0
        if row - first >= _ROWS or characters >= _CHARACTERS:
            yield row, texts
            first, texts, characters = row, [], 0
    yield row, [*texts, END]


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"line {number} is not JSON ({one_line(error)}): correct it") from error
    if not isinstance(row, dict):
        raise InputError(f'line {number} is {row!r:.60}: expected an object such as {{"text": ...}}')
    return row


def _text_of(line: str, number: int, column: str | None) -> str | None:
    # Not pyarrow's reader, nor that of `datasets`: columns that we do not need may change their types.
    if not line or line.isspace():
        return None
    text = _object(line, number).get(column or "text")
    if not isinstance(text, str | None):
        raise InputError(f"line {number} has {text!r:.60} as {column!r}: expected text or null")
    # JSON can spell half a character (\ud83d), which no tokenizer takes.
    return text and text.encode("utf-8", "replace").decode()


def _share_of_lines(path: Path, lines: int) -> float:
    """Which share of a file its first lines are; of a compressed file by how far its start is compressed."""
    size = path.stat().st_size
    with path.open("rb") as raw:
        compression = infer_compression(path.name)
        if compression is None:
            return min(1.0, sum(map(len, islice(raw, lines))) / size)
        file = compr[compression](raw, mode="rb")
        head = known = sum(map(len, islice(file, lines)))
        ratio = 0.0
        while known < _RATIO or not ratio:
            place = raw.tell()
            if not (more := file.read(1 << 12)):
                return min(1.0, head / known)
            if raw.tell() != place:  # all that the bytes before place hold had come: bz2 holds back much
                ratio = known / place
            known += len(more)
        return min(1.0, head / (ratio * size))
