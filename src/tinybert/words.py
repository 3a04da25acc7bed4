"""What a word is, where the words of a text are, and in which letter case one takes another's place."""

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

_APOSTROPHES = "'\u2019\u02bc"
_INNER = _APOSTROPHES + "-\u2010\u2011"
_JOINING = _APOSTROPHES + ".@/\\_&+#:"


def is_word(text: str) -> bool:
    """Return whether a text is one word: letters with their marks, inside them apostrophes and hyphens.

    A single letter is one only in scripts that have no letter case: elsewhere it is an initial, an ending or
    a label.
    """
    if len(text) == 1 and text.lower() != text.upper():
        return False
    if text.isalpha():
        return True
    kinds = ["-" if character in _INNER else unicodedata.category(character)[0] for character in text]
    inner = [place for place, kind in enumerate(kinds) if kind == "-"]
    return (
        "L" in kinds
        and set(kinds) <= {"L", "M", "-"}
        and kinds[0] == "L"
        and all(kinds[place - 1] in "LM" and kinds[place + 1 : place + 2] == ["L"] for place in inner)
    )


def folded(word: str) -> str:
    """Return a word's form that does not depend on letter case, nor on how its accents are encoded."""
    return unicodedata.normalize("NFC", word).casefold()


class Word(NamedTuple):
    """Where a word stands: ``text[start:end]``, and its tokens ``[first:last]``."""

    start: int
    end: int
    first: int
    last: int


def words_of(text: str, word_ids: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> list[Word]:
    """Find the words of a text by its tokenizer's own account of it.

    Left out is what has other characters than letters in it, and what is joined to something (``don't``,
    ``'ll``, ``u.s.``, ``name@host``, ``3d``): an exchange would leave half a word behind.

    Args:
        text: The text as it was tokenised.
        word_ids: For each token the number of its word, or None for special tokens.
        offsets: For each token where it starts and ends in the text.
    """
    words = []
    for number, group in groupby(range(len(word_ids)), key=lambda token: word_ids[token]):
        # Where only spaces part words, their punctuation comes as tokens of theirs.
        tokens = [token for token in group if number is not None]
        lettered = [token for token in tokens if any(map(str.isalpha, text[slice(*offsets[token])]))]
        if not lettered:
            continue
        first, last = lettered[0], lettered[-1] + 1
        start, end = offsets[first][0], offsets[last - 1][1]
        start += len(text[start:end]) - len(text[start:end].lstrip())
        end -= len(text[start:end]) - len(text[start:end].rstrip())
        while end < len(text) and _is_mark(text[end]):  # a tokenizer that strips accents leaves them out
            end += 1
        if is_word(text[start:end]) and not _is_joined(text, start, end):
            words.append(Word(start, end, first, last))
    return words


def in_case_of(original: str, word: str) -> str:
    """Return a word in the letter case of the one whose place it takes.

    A lower-case word becomes Title case or UPPER case where the original is; a word with capitals of its own
    keeps them, unless all is upper case.
    """
    if len(original) > 1 and original.isupper():
        return word.upper()
    if original[:1].istitle() and word == word.lower():
        return word[:1].title() + word[1:]
    return word


def _is_joined(text: str, start: int, end: int) -> bool:
    """Return whether a word goes on past its ends: at a digit or, over a joining sign, at anything."""
    before, after = text[max(0, start - 2) : start][::-1], text[end : end + 2]
    if before and before[0] in _APOSTROPHES and end - start <= 2:
        return True  # 's, 're, 'll: also where a space parts them from their word
    return any(
        beside[0].isnumeric() or (beside[0] in _JOINING and beside[1:].isalnum())
        for beside in (before, after)
        if beside
    )


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
