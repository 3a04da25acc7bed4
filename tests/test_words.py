"""Words: what is one, where they stand, and the letter case of what takes their place."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from tinybert.words import in_case_of, is_word, words_of


@pytest.mark.parametrize(
    "text", ["film", "Ängste", "кино", "映", "फिल्म", "rock-and-roll", "l'homme", "cafe\u0301", "o\u2019clock"]
)
def test_words_of_any_script_are_words(text: str) -> None:
    assert is_word(text)


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "Ж", "3d", "42", "##ing", "[MASK]", "-", "'s", "film-", "a--b", "\u0301", "a b", "a.b"],
)
def test_what_is_no_word(text: str) -> None:
    """Initials, numbers, pieces and punctuation would be put into sentences as if they were words."""
    assert not is_word(text)


@given(st.text(max_size=5))
def test_a_word_is_made_of_letters_and_what_may_stand_between_them(text: str) -> None:
    if is_word(text):
        kinds = {
            unicodedata.category(character)[0]
            for character in text
            if character not in "'\u2019\u02bc-\u2010\u2011"
        }
        assert "L" in kinds <= {"L", "M"}
        assert text[0].isalpha()


def spelled(text: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[str]:
    offsets = [offset for _, offset in pre_tokenizer.pre_tokenize_str(text)]
    return [text[word.start : word.end] for word in words_of(text, list(range(len(offsets))), offsets)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A good film, isn't it?", ["good", "film", "it"]),
        (
            "the plot 's thin ; they 're bad , 'good' bad",
            ["the", "plot", "thin", "they", "bad", "good", "bad"],
        ),
        ("u.s. a.good name@host 3d 4good one_two three/four", []),
        ("well-made (fine) \u201cgood\u201d end. Next", ["well", "made", "fine", "good", "end", "Next"]),
        ("rock'n'roll l'homme O'Neil's", []),
    ],
)
def test_words_are_found_where_nothing_is_joined_to_them(text: str, words: list[str]) -> None:
    """ "Isn't" with another word for "isn" is no English."""
    assert spelled(text, pre_tokenizers.BertPreTokenizer()) == words


def test_punctuation_that_a_tokenizer_leaves_on_a_word_is_not_the_word() -> None:
    """Where only spaces part words, "film," is one word of two tokens."""
    text = "(good film), fine"
    offsets = [(0, 1), (1, 5), (5, 10), (10, 12), (12, 17)]
    found = words_of(text, [0, 0, 1, 1, 2], offsets)
    assert [(text[word.start : word.end], word.first, word.last) for word in found] == [
        ("good", 1, 2),
        ("film", 2, 3),
        ("fine", 4, 5),
    ]


def test_accents_that_a_tokenizer_strips_belong_to_the_word() -> None:
    """Left behind, they would land on the last letter of another word."""
    text = "cafe\u0301 noir"
    stripped = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]).normalize_str(text)
    assert stripped == "cafe noir"
    assert [text[word.start : word.end] for word in words_of(text, [0, 1], [(0, 4), (6, 10)])] == [
        "cafe\u0301",
        "noir",
    ]


def test_special_tokens_are_no_words() -> None:
    assert words_of("film", [None, 0, None], [(0, 0), (0, 4), (0, 0)])[0].first == 1
    assert words_of("film", [None], [(0, 4)]) == []


@pytest.mark.parametrize(
    ("original", "word", "result"),
    [
        ("film", "movie", "movie"),
        ("Film", "movie", "Movie"),
        ("FILM", "movie", "MOVIE"),
        ("film", "Paris", "Paris"),
        ("Film", "iPhone", "iPhone"),
        ("Ж", "кино", "Кино"),
        ("映画", "film", "film"),
        ("Дом", "ǆep", "ǅep"),
    ],
)
def test_a_word_takes_the_letter_case_of_the_one_it_replaces(original: str, word: str, result: str) -> None:
    assert in_case_of(original, word) == result
