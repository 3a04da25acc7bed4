"""EM, F1 and the best span: by hand as SQuAD's own script counts, and against trying every span."""

import random
from typing import Any

import datasets
import numpy as np
import pytest

from tinybert.answers import LONGEST_ANSWER, best_answers, exact_match, normalised, score_answers, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("an apple, a pear", "apple pear"),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("the", ""),
        ("24\u201310", "24\u201310"),  # a dash that is not ASCII is no punctuation there
    ],
)
def test_answers_are_compared_without_case_articles_and_punctuation(text: str, expected: str) -> None:
    """Figures of another normalisation cannot be put beside those of the literature."""
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Denver Broncos", "Denver Broncos.", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("in Denver in 1998", "Denver 1998", 0, 2 * 2 / 6),
        ("Carolina", "Denver", 0, 0),
        ("in in", "in", 0, 2 / 3),  # a word counts as often as it is in both
        ("", "", 1, 1),
        ("", "Denver", 0, 0),
        ("Denver", "", 0, 0),
    ],
)
def test_a_pair_of_answers_is_scored_as_by_hand(answer: str, gold: str, exact: float, f1: float) -> None:
    """Also where there should be no answer, or none was given."""
    assert exact_match(answer, gold) == exact
    assert word_f1(answer, gold) == pytest.approx(f1)


def test_the_nearest_gold_answer_counts_and_none_is_an_answer() -> None:
    """Three people wrote each gold answer of the dev set; a question without any wants "".'"""
    found = score_answers(["Denver", "", "Rome"], [["Denver Broncos", "denver", "the"], [], []])
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}


def data(golds: list[list[str]], owners: list[int], chars: list[list[tuple[int, int]]]) -> Any:
    """Questions on one context, "0123456789", and windows that show some of its characters."""
    rows = datasets.Dataset.from_dict({"context": ["0123456789"] * len(golds), "answers": golds})
    windows = {
        "row": owners,
        "length": [len(some) for some in chars],
        "first_chars": [[first for first, _ in some] for some in chars],
        "last_chars": [[last for _, last in some] for some in chars],
    }
    return rows, datasets.Dataset.from_dict(windows)


def test_the_best_span_over_all_windows_is_the_answer() -> None:
    """Tried against every span, at random; questions' windows are mixed."""
    draw, generator = random.Random(0), np.random.default_rng(0)
    golds = [["1"]] * 4
    owners = [0, 1, 0, 3, 2, 2, 1]
    chars = []
    for _ in owners:
        begin = draw.randint(0, 6)
        shown = [(place, place + 1) for place in range(begin, draw.randint(begin + 1, 10))]
        chars.append([(-1, -1)] * draw.randint(1, 3) + shown + [(-1, -1)])
    rows, windows = data(golds, owners, chars)
    logits = generator.normal(size=(sum(map(len, chars)), 2)).astype(np.float32)
    best: dict[int, tuple[float, str]] = {}
    offset = 0
    for owner, some in zip(owners, chars, strict=True):
        for begin in range(len(some)):
            for end in range(begin, len(some)):
                if some[begin][0] >= 0 and some[end][0] >= 0:
                    score = float(logits[offset + begin, 0] + logits[offset + end, 1])
                    text = "0123456789"[some[begin][0] : some[end][1]]
                    best[owner] = max(best.get(owner, (-np.inf, "")), (score, text))
        offset += len(some)
    assert best_answers(rows, windows, logits) == [best[row][1] for row in range(4)]
    assert len({text for _, text in best.values()}) > 1


def test_no_answer_wins_where_its_score_does_and_only_in_sets_that_have_such_questions() -> None:
    """SQuAD 1.1 has an answer to everything; in 2.0 half of the questions have none."""
    chars = [[(-1, -1), (3, 4), (5, 6)]] * 2
    logits = np.array([[0, 0], [1, 1], [0, 0], [3, 3], [1, 1], [0, 0]], np.float32)
    for golds, expected in (([["3"], []], ["3", ""]), ([["3"], ["3"]], ["3", "3"])):
        rows, windows = data(golds, [0, 1], chars)
        assert best_answers(rows, windows, logits) == expected
    # Of two windows of one question, one without an answer does not make it unanswerable.
    rows, windows = data([[]], [0, 0], chars)
    assert best_answers(rows, windows, logits) == ["3"]


def test_spans_end_after_they_begin_and_are_not_too_long() -> None:
    """The ends with the highest logits may lie before the starts, or a page apart."""
    context = "".join(str(place % 10) for place in range(50))
    rows, windows = data([["1"]], [0], [[(-1, -1), *((place, place + 1) for place in range(50))]])
    rows = datasets.Dataset.from_dict({"context": [context], "answers": [["1"]]})
    logits = np.zeros((51, 2), np.float32)
    logits[31, 0] = logits[11, 1] = 5  # backwards
    logits[31, 1] = 1
    assert best_answers(rows, windows, logits) == [context[30:31]]
    logits = np.zeros((51, 2), np.float32)
    logits[1, 0] = logits[50, 1] = 5
    assert len(best_answers(rows, windows, logits)[0]) <= LONGEST_ANSWER
    logits[1 + LONGEST_ANSWER - 1, 1] = 1
    assert best_answers(rows, windows, logits) == [context[:LONGEST_ANSWER]]
