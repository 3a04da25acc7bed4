"""CoNLL files: a word and its tags a line, a blank line between sentences."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from tinybert.errors import InputError, one_line

CONLL_ENDINGS = (".conll", ".conll2003", ".bio", ".iob", ".iob2", ".txt")
WORDS = ("tokens", "words", "token", "word", "form")
TAGS = ("ner_tags", "tags", "labels", "ner", "tag", "label", "chunk_tags", "chunk", "pos_tags", "pos", "upos")
_BETWEEN = re.compile(r"\s*(-DOCSTART-(\s|$)|$)")  # lines that end a sentence
_RANGE = re.compile(r"\d+[-.]\d+")  # CoNLL-U's numbers of words written as one, and of words left out


def is_conll(path: Path) -> bool:
    """Return whether a path is a file that its ending says holds words and tags."""
    return path.name.lower().removesuffix(".gz").endswith(CONLL_ENDINGS) and path.is_file()


def is_header(cells: Sequence[str]) -> bool:
    """Return whether the cells of a first line name a column of words and, last, one of tags."""
    names = [cell.strip().lower() for cell in cells]
    return len(names) > 1 and names[-1] in TAGS and not set(WORDS).isdisjoint(names)


def is_tsv(path: Path) -> bool:
    """Return whether a path is a file of cells between tabs: of words and tags, or a table."""
    return path.name.lower().removesuffix(".gz").endswith(".tsv") and path.is_file()


def names_words(path: Path) -> bool:
    """Return whether the first line of a file of cells between tabs, but for comments, is a `is_header`.

    Raises:
        InputError: The file cannot be read.
    """
    start = _first(_lines(path))
    return start is not None and is_header(start[1].split("\t"))


def read_conll(path: Path, words: str | None = None, tags: str | None = None) -> pa.Table:
    """Read the sentences of a CoNLL file.

    Columns are parted by tabs where the first line has one, else by white space. A first line such as
    ``token<tab>label`` names them; otherwise they are numbered from 1. ``-DOCSTART-`` lines are left out, and
    comments: lines before a sentence that start with ``#`` and have another number of cells, or, where white
    space parts columns, have ``#`` for a word and for a tag what is a tag nowhere else. Where another column
    than that of words numbers them first, so are CoNLL-U's ranges (``1-2``) and empty nodes (``8.1``).

    Args:
        path: The file, gzipped or not.
        words: The column of words, by name or number; the one that a header calls so, or the first.
        tags: The column of tags; the last unless given.

    Returns:
        Columns ``words`` and ``tags``, lists of text of the same length, a row for each sentence.

    Raises:
        InputError: The file cannot be read, has no such column or two of that name, a line has more or fewer
            cells, or no column of words was named and the first has numbers alone.
    """
    lines = list(_lines(path))
    start = _first(lines)
    if start is None:
        raise InputError(f"{path} has no rows: expected a word and its tag a line")
    mark = "\t" if "\t" in start[1] else None
    names = [cell.strip() for cell in start[1].split(mark)]
    if len(names) < 2:
        raise InputError(f"{path}: line {start[0]} has one column: expected a word and, last, its tag")
    named = is_header(names)
    if named:
        del lines[: lines.index(start) + 1]
    else:
        names = [str(place + 1) for place in range(len(names))]
    usual = next((name for name in names if name.lower() in WORDS), names[0])
    places = _place(path, words or usual, names), _place(path, tags or names[-1], names)
    sentences = _sentences(path, lines, mark, (start[0], len(names)), places)
    counted = all(row[0].isdigit() or _RANGE.fullmatch(row[0]) for sentence in sentences for row in sentence)
    if counted and words is None and not named:
        raise InputError(
            f"{path} has numbers alone in its first column, as CoNLL-U has: name the columns of words "
            "and of tags by number, such as --text_columns 2 --label_column 4"
        )
    if counted and places[0] != 0:
        sentences = [[row for row in sentence if row[0].isdigit()] for sentence in sentences]
    kind = pa.list_(pa.string())
    columns = ([[row[place] for row in sentence] for sentence in sentences] for place in (1, 2))
    return pa.table([pa.array(column, kind) for column in columns], ["words", "tags"])


def _sentences(
    path: Path,
    lines: Sequence[tuple[int, str]],
    mark: str | None,
    expected: tuple[int, int],
    places: tuple[int, int],
) -> list[list[tuple[str, str, str]]]:
    """Return the first cell, the word and the tag of the lines of each sentence.

    Args:
        path: Where they are from, for messages.
        lines: Those after the header, numbered.
        mark: What parts cells; white space if ``None``.
        expected: The number of the line that tells how many cells each has, and how many.
        places: Those of the word and of the tag.

    Raises:
        InputError: A line has more or fewer cells.
    """
    split = [(number, line, [cell.strip() for cell in line.split(mark)]) for number, line in lines]
    word, tag = places
    tags = {cells[tag] for _, line, cells in split if len(cells) == expected[1] and line[0] != "#"}
    sentences: list[list[tuple[str, str, str]]] = []
    ended = True
    for number, line, cells in split:
        fits = len(cells) == expected[1]
        # With white space between columns, "# O" may be a word and its tag, and "# doc1" is none.
        unlike = not fits or (mark is None and cells[0] == "#" and cells[tag] not in tags)
        if _BETWEEN.match(line) or (ended and line.startswith("#") and unlike):
            ended = True
            continue
        if not fits:
            raise InputError(
                f"{path}: line {number} has {len(cells)} columns and line {expected[0]} has {expected[1]}: "
                "expected a word and its tags a line (CoNLL); correct it, or part sentences by an empty line"
            )
        if ended:
            sentences.append([])
        sentences[-1].append((cells[0], cells[word], cells[tag]))
        ended = False
    return sentences


def _first(lines: Iterable[tuple[int, str]]) -> tuple[int, str] | None:
    """Return the first line that has words, or names columns: none that is a comment or between sentences."""
    said = (line for line in lines if not line[1].startswith("#") and not _BETWEEN.match(line[1]))
    return next(said, None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines; only a line feed ends one."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): correct the file") from error


def _place(path: Path, wanted: str, names: Sequence[str]) -> int:
    if wanted not in names:
        raise InputError(
            f"{path} has no column {wanted!r}; it has {', '.join(names)}: mend --text_columns or "
            "--label_column"
        )
    if names.count(wanted) > 1:
        raise InputError(f"{path} has more than one column called {wanted!r}: rename or remove them")
    return names.index(wanted)
