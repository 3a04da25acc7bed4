"""CoNLL files: a word and its tags a line, a blank line between sentences."""

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from tinybert.errors import InputError, one_line

CONLL_ENDINGS = (".conll", ".conll2003", ".bio", ".iob", ".iob2", ".txt")
WORDS = ("tokens", "words", "token", "word", "form")
TAGS = ("ner_tags", "tags", "labels", "ner", "tag", "label", "chunk_tags", "chunk", "pos_tags", "pos", "upos")


def is_conll(path: Path) -> bool:
    """Return whether a path is a file that its ending says holds words and tags."""
    return path.name.lower().removesuffix(".gz").endswith(CONLL_ENDINGS) and path.is_file()


def is_header(cells: Sequence[str]) -> bool:
    """Return whether the cells of a first line name a column of words and, last, one of tags."""
    names = [cell.strip().lower() for cell in cells]
    return len(names) > 1 and names[-1] in TAGS and not set(WORDS).isdisjoint(names)


def read_conll(path: Path, words: str | None = None, tags: str | None = None) -> pa.Table:
    """Read the sentences of a CoNLL file.

    Columns are parted by tabs where the first line has one, else by white space. A first line such as
    ``token<tab>label`` names them; otherwise they are numbered from 1. ``-DOCSTART-`` lines, and lines that
    start with ``#`` before a sentence and have another number of cells, are left out.

    Args:
        path: The file, gzipped or not.
        words: The column of words, by name or number; the one that a header calls so, or the first.
        tags: The column of tags; the last unless given.

    Returns:
        Columns ``words`` and ``tags``, lists of text of the same length, a row for each sentence.

    Raises:
        InputError: The file cannot be read, has no such column, a line has more or fewer cells, or no column
            of words was named and the first has numbers alone.
    """
    lines = _lines(path)
    start = next(lines, None)
    if start is None:
        raise InputError(f"{path} has no rows: expected a word and its tag a line")
    mark = "\t" if "\t" in start[1] else None
    first = start[1].split(mark)
    named = is_header(first)
    names = [cell.strip() for cell in first] if named else [str(place + 1) for place in range(len(first))]
    if len(first) < 2:
        raise InputError(f"{path}: line {start[0]} has one column: expected a word and, last, its tag")
    usual = next((name for name in names if name.lower() in WORDS), names[0])
    places = _place(path, words or usual, names), _place(path, tags or names[-1], names)
    sentences: tuple[list[list[str]], list[list[str]]] = ([], [])
    ended = True
    for number, line in _from(start, lines, named):
        cells = line.split(mark)
        comment = ended and line.startswith("#") and len(cells) != len(names)
        if not line.strip() or cells[0] == "-DOCSTART-" or comment:
            ended = True
            continue
        if len(cells) != len(names):
            raise InputError(
                f"{path}: line {number} has {len(cells)} columns and line {start[0]} has {len(names)}: "
                "expected a word and its tags a line (CoNLL); correct it, or part sentences by an empty line"
            )
        for column, place in zip(sentences, places, strict=True):
            if ended:
                column.append([])
            column[-1].append(cells[place].strip())
        ended = False
    if words is None and not named and all(word.isdigit() for sentence in sentences[0] for word in sentence):
        raise InputError(
            f"{path} has numbers alone in its first column, as CoNLL-U has: name the columns of words "
            "and of tags by number, such as --text_columns 2 --label_column 4"
        )
    kind = pa.list_(pa.string())
    return pa.table({"words": pa.array(sentences[0], kind), "tags": pa.array(sentences[1], kind)})


def _from(start: tuple[int, str], rest: Iterator[tuple[int, str]], named: bool) -> Iterator[tuple[int, str]]:
    if not named:
        yield start
    yield from rest


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, from the first that says anything; only a line feed ends one."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    begun = False
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                line = line.rstrip("\r\n")
                begun = begun or (bool(line.strip()) and not re.match(r"# ", line))
                if begun:
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): correct the file") from error


def _place(path: Path, wanted: str, names: Sequence[str]) -> int:
    if wanted not in names:
        raise InputError(
            f"{path} has no column {wanted!r}; it has {', '.join(names)}: mend --text_columns or "
            "--label_column"
        )
    return names.index(wanted)
