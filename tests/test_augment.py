"""Augmented copies: what may change in them, and what they depend on."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

import tinybert.augment
from conftest import BAD, FILLERS, GOOD, PIECES, make_masked_lm
from tinybert.augment import Augmenter, AugmentSettings
from tinybert.errors import InputError
from tinybert.masked_words import MaskedWords
from tinybert.word_vectors import WordVectors

# Words the tokenizer cuts in two or does not know, in several scripts.
STRANGERS = ("films", "plots", "Ängste", "œuvre", "кино", "плохо", "फिल्म", "映画", "café", "naïve", "zebra")
LEFT_ALONE = {"the", "a", "was", "and", "with", "very"}  # of FILLERS
ALLOWED = {word.casefold() for word in (*GOOD, *BAD, *FILLERS, *STRANGERS)} - LEFT_ALONE
VECTORS = WordVectors(
    [word.casefold() for word in (*STRANGERS, *GOOD, *BAD)],
    np.random.default_rng(0).normal(size=(len(STRANGERS) + 8, 6)),
)


def make_masked_words(share: float = 0.1, budget: int = 2048) -> MaskedWords:
    tokenizer = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(PIECES)})
    return MaskedWords(make_masked_lm(), tokenizer, masked_share=share, tokens_per_batch=budget, positions=64)


MASKED_WORDS = make_masked_words()
AUGMENTERS = {
    "both": Augmenter(MASKED_WORDS, VECTORS, settings=AugmentSettings(copies=6, candidates=5)),
    "masked LM": Augmenter(MASKED_WORDS, settings=AugmentSettings(copies=6, candidates=5)),
    "vectors": Augmenter(None, VECTORS, settings=AugmentSettings(copies=6, candidates=5)),
}

_words = st.sampled_from([*GOOD, *BAD, *FILLERS, *STRANGERS]).flatmap(
    lambda word: st.sampled_from([word, word.title(), word.upper(), f"un{word}", f"{word}s", f"{word}'s"])
)
_between = st.sampled_from([" ", "  ", "\t", ", ", ". ", "-", " \u2013 ", "\u00a0", "\n", '"', "\u200b"])
TEXTS = st.lists(
    st.one_of(_words, st.text(max_size=6), st.sampled_from(["[MASK]", "[SEP]", "##s", "3d", "u.s.", "é"])),
    max_size=12,
).flatmap(
    lambda parts: st.lists(_between, min_size=len(parts), max_size=len(parts)).map(
        lambda gaps: "".join(part + gap for part, gap in zip(parts, gaps, strict=True))
    )
)


def is_made_of(copy: str, text: str, augmenter: Augmenter) -> bool:
    """Whether a copy is the text with candidates in the place of words, and equal to it everywhere else."""
    pattern, place = "", 0
    for exchange in augmenter.exchanges([text])[text]:
        choices = "|".join(map(re.escape, (text[exchange.start : exchange.end], *exchange.candidates)))
        pattern += f"{re.escape(text[place : exchange.start])}(?:{choices})"
        place = exchange.end
    return re.fullmatch(pattern + re.escape(text[place:]), copy) is not None


@pytest.mark.parametrize("name", AUGMENTERS)
@given(text=TEXTS)
@settings(max_examples=150)
def test_all_but_the_exchanged_words_survives_to_the_last_character(name: str, text: str) -> None:
    """Spaces, quotes, accents and case that are lost teach the student another language."""
    augmenter = AUGMENTERS[name]
    (copies,) = augmenter.copies_of([(text,)], [0])
    assert len(copies) <= 6
    assert len({text, *(copy for (copy,) in copies)}) == len(copies) + 1
    assert all(is_made_of(copy, text, augmenter) for (copy,) in copies)


@pytest.mark.parametrize("name", AUGMENTERS)
@given(text=TEXTS)
@settings(max_examples=150)
def test_candidates_are_other_words_in_the_case_of_the_original(name: str, text: str) -> None:
    """Special tokens, pieces of words, punctuation and the word itself would be no exchange."""
    for exchange in AUGMENTERS[name].exchanges([text])[text]:
        original = text[exchange.start : exchange.end]
        assert original.casefold() not in LEFT_ALONE
        assert len(set(exchange.candidates)) == len(exchange.candidates) > 0
        for candidate in exchange.candidates:
            assert candidate.casefold() != original.casefold()
            assert candidate.casefold() in ALLOWED
            if len(original) > 1 and original.isupper():
                assert candidate == candidate.upper()
            elif original[0].istitle():
                assert candidate == candidate[:1].title() + candidate[1:]


@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_copies_depend_on_seed_row_number_and_text_alone(
    rows: list[tuple[str, str]], seed: int, order: random.Random
) -> None:
    """The same command must give the same rows on a machine with smaller batches or more processes."""
    options = AugmentSettings(copies=4, candidates=5)
    made = Augmenter(MASKED_WORDS, VECTORS, settings=options, seed=seed).copies_of(rows, range(len(rows)))
    other = Augmenter(make_masked_words(budget=16), VECTORS, settings=options, seed=seed)
    numbers = list(range(len(rows)))
    order.shuffle(numbers)
    assert {number: other.copies_of([rows[number]], [number])[0] for number in numbers} == dict(
        enumerate(made)
    )


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
@settings(max_examples=60)
def test_a_copy_of_a_pair_changes_one_side(rows: list[tuple[str, str]]) -> None:
    """With both sides changed at once nothing would be left that the label was given for."""
    augmenter = AUGMENTERS["both"]
    for row, copies in zip(rows, augmenter.copies_of(rows, range(len(rows))), strict=True):
        exchangeable = [bool(augmenter.exchanges([text])[text]) for text in row]
        changed = [[one != other for one, other in zip(row, copy, strict=True)] for copy in copies]
        assert all(sum(sides) == 1 for sides in changed)
        if len(copies) == 6 and all(exchangeable):
            assert {sides.index(True) for sides in changed} == {0, 1}


def exchanged(text: str, augmenter: Augmenter = AUGMENTERS["both"]) -> list[str]:
    return [text[exchange.start : exchange.end] for exchange in augmenter.exchanges([text])[text]]


def test_which_words_are_left_alone() -> None:
    """Half a contraction exchanged is no word of any language; a stop word's exchange turns the sense.

    What is left alone is not put in either: "of" for "great" is no other opinion.
    """
    assert exchanged("The film was not very good.") == ["film", "good"]
    assert exchanged("film's don't u.s. good@bad 3good good_bad well-good good.") == ["good", "good"]
    assert exchanged("the plot 's good ' plot ' it 'll n't 'good'") == ["plot", "good", "plot", "good"]
    assert exchanged("unknown words have no candidates") == []
    assert exchanged("ZEBRA Zebra zebra кино фильм") == ["ZEBRA", "Zebra", "zebra", "кино"]
    all_words = Augmenter(MASKED_WORDS, settings=AugmentSettings(stop_words="none"))
    assert exchanged("The film was good", all_words) == ["The", "film", "was", "good"]


def test_title_case_finds_its_lower_case_vector_and_comes_back() -> None:
    for exchange in AUGMENTERS["vectors"].exchanges(["Zebra КИНО"])["Zebra КИНО"]:
        assert all(word[0].istitle() or not word[0].isalpha() for word in exchange.candidates)


def test_an_accent_written_apart_makes_no_other_word() -> None:
    """\u00e9, and e with its accent after it, are one letter: one for the other would be no exchange."""
    (exchange,) = AUGMENTERS["both"].exchanges(["cafe\u0301"])["cafe\u0301"]
    assert (exchange.start, exchange.end) == (0, 5)
    assert "café" not in exchange.candidates
    assert exchange.candidates == AUGMENTERS["both"].exchanges(["café"])["café"][0].candidates


def test_stop_words_come_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(["Film", "", "кино"]), encoding="utf-8")
    chosen = Augmenter(MASKED_WORDS, VECTORS, settings=AugmentSettings(stop_words=str(path)))
    assert exchanged("the film was good кино", chosen) == ["the", "was", "good"]


def test_every_word_is_exchanged_as_often_as_the_probability_says() -> None:
    """p_t of Algorithm 1, against its binomial spread; a text of many words keeps copies apart."""
    text = " ".join(GOOD + BAD)
    chosen = AugmentSettings(copies=400, candidates=5, replace_probability=0.3)
    (copies,) = Augmenter(MASKED_WORDS, settings=chosen).copies_of([(text,)], [0])
    assert len(copies) == 400
    for place, word in enumerate(text.split()):
        share = np.mean([copy.split()[place] != word for (copy,) in copies])
        assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_it_maps_over_a_data_set_and_carries_the_other_columns() -> None:
    rows = Dataset.from_dict(
        {"id": [7, 8], "text": ["a good film", "the"], "label": ["yes", "no"], "more": [[1], [2, 3]]}
    )
    augmenter = Augmenter(MASKED_WORDS, settings=AugmentSettings(copies=3))
    made = rows.map(augmenter, batched=True, with_indices=True, batch_size=1)
    assert made[0] == rows[0]
    assert made[len(made) - 1] == rows[1]
    assert made["id"] == [7, 7, 7, 7, 8]
    assert made["label"] == ["yes"] * 4 + ["no"]
    assert made["more"] == [[1]] * 4 + [[2, 3]]
    assert len(set(made["text"])) == 5


def test_a_text_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Premises come back with every hypothesis; their candidates are the same."""
    masked_words = make_masked_words()
    seen: list[str] = []
    read = masked_words.read

    def watch(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        return read(texts)

    monkeypatch.setattr(masked_words, "read", watch)
    augmenter = Augmenter(masked_words)
    first = augmenter.exchanges(["a good film", "a bad film", "a good film"])
    again = augmenter.exchanges(["a bad film", "a dull film"])
    assert seen == ["a good film", "a bad film", "a dull film"]
    assert again["a bad film"] == first["a bad film"]


def test_what_is_remembered_is_bounded_by_words_not_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand long texts would be most of a gigabyte."""
    monkeypatch.setattr(tinybert.augment, "_REMEMBERED", 12)
    augmenter = Augmenter(MASKED_WORDS)
    asked: list[str] = []
    find = augmenter._find

    def watch(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return find(texts)

    monkeypatch.setattr(augmenter, "_find", watch)
    short, long, other = "a good film", " ".join(GOOD + BAD), "the dull plot"  # two words, eight, two
    for text in (short, long, short, long, other, short, other, long):
        augmenter.exchanges([text])
    assert asked == [short, long, other, short, long]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "--copies must be 1 or more, got 0"),
        ({"candidates": -1}, "--candidates must be 1 or more"),
        ({"replace_probability": 0.0}, "--replace_probability must be above 0 and at most 1"),
        ({"replace_probability": float("nan")}, "--replace_probability must be above 0"),
        ({"masked_share": 1.5}, "--masked_share must be from 0 to 1"),
        ({"keep_if_teacher_agrees": 2.0}, "--keep_if_teacher_agrees must be from 0 to 1"),
        ({"stop_words": "nowhere.txt"}, "--stop_words nowhere.txt cannot be read .*: give 'english'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AugmentSettings(**options)


def test_something_must_propose_words() -> None:
    with pytest.raises(InputError, match="give --masked_lm, --word_vectors or both"):
        Augmenter()
