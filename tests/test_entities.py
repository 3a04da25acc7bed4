"""Entity F1: counted by hand, and against an implementation of its own."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinybert.entities import are_entity_tags, complete_tags, entity_counts, tag_metrics
from tinybert.errors import InputError


def metrics(predicted: list[str], gold: list[str], names: list[str] | None = None) -> dict[str, float]:
    """Score sentences given as ``"B-X I-X O"``."""
    names = names or sorted({tag for text in predicted + gold for tag in text.split()} | {"B-X", "I-X"})
    ids = [
        np.array([names.index(tag) for text in some for tag in text.split()]) for some in (predicted, gold)
    ]
    lengths = [len(text.split()) for text in gold]
    found = tag_metrics(*ids, lengths, names)
    if "f1" in found:
        counts = entity_counts(*ids, lengths, names)
        assert counts.shape == (len(gold), 3)
        right, predicted_in_all, gold_in_all = counts.sum(0)
        assert found["f1"] == pytest.approx(2 * right / max(predicted_in_all + gold_in_all, 1))
    return found


@pytest.mark.parametrize(
    ("predicted", "gold", "precision", "recall"),
    [
        (["B-X I-X O"], ["B-X I-X O"], 1, 1),
        (["B-X O O"], ["B-X I-X O"], 0, 0),  # the end is wrong
        (["B-Y I-Y O"], ["B-X I-X O"], 0, 0),  # the type is wrong
        (["B-X I-X O B-Y"], ["B-X I-X O O"], 1 / 2, 1),
        (["B-X B-X O"], ["B-X I-X O"], 0, 0),  # two entities, neither of them that one
        (["O I-X O"], ["O B-X O"], 1, 1),  # BIO and BIO2 begin an entity otherwise, and it is the same one
        (["O O", "B-X O"], ["B-X O", "B-X O"], 1, 1 / 2),
        (["B-X", "I-X"], ["B-X", "B-X"], 1, 1),  # no entity reaches over the end of a sentence
        (["O O"], ["O B-X"], 0, 0),
    ],
)
def test_entities_count_as_by_hand(
    predicted: list[str], gold: list[str], precision: float, recall: float
) -> None:
    """Scored word by word, a model that cuts every name in two would look fine."""
    found = metrics(predicted, gold)
    assert (found["precision"], found["recall"]) == (precision, recall)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert found["f1"] == pytest.approx(f1)


def test_accuracy_is_over_words_and_alone_where_tags_are_no_entities() -> None:
    """Parts of speech have no entities: their F1 would be that of letters cut off their names."""
    assert metrics(["B-X O O O"], ["B-X I-X O O"])["accuracy"] == 0.75
    assert metrics(["NOUN VERB"], ["NOUN ADV"], ["ADV", "NOUN", "VERB"]) == {"accuracy": 0.5}
    with pytest.raises(InputError, match="no word has one"):
        metrics([], [])


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """The entities of BIO tags, as CoNLL's evaluation reads them."""
    found, start = set(), 0
    for place in range(1, len(tags) + 1):
        goes_on = place < len(tags) and tags[place] != "O" and tags[place][0] == "I"
        if goes_on and tags[place][2:] == tags[place - 1][2:] and tags[place - 1] != "O":
            continue
        if tags[start] != "O":
            found.add((start, place, tags[start][2:]))
        start = place
    return found


TAGS = ["B-X", "B-Y", "I-X", "I-Y", "O"]
SENTENCES = st.lists(
    st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), min_size=1, max_size=9), min_size=1, max_size=4
)


@given(SENTENCES)
def test_any_tags_are_scored_as_by_another_implementation(sentences: list[list[tuple[str, str]]]) -> None:
    """What a model predicts need not be well-formed: I- after O, after another type, or first of all."""
    predicted, gold = ([" ".join(pair[side] for pair in some) for some in sentences] for side in (0, 1))
    sets = [
        {(number, *entity) for number, text in enumerate(some) for entity in entities(text.split())}
        for some in (predicted, gold)
    ]
    right = len(sets[0] & sets[1])
    found = metrics(predicted, gold, TAGS)
    total = len(sets[0]) + len(sets[1])
    assert found["f1"] == pytest.approx(2 * right / total if total else 0)


def test_bilou_is_read_as_iobes_is() -> None:
    """The same scheme under other letters; unread, each last word would be an entity of its own."""
    iobes = metrics(["B-X E-X S-X O"], ["B-X E-X O S-X"])
    assert metrics(["B-X L-X U-X O"], ["B-X L-X O U-X"]) == iobes
    assert iobes["f1"] == 0.5


def test_a_type_gets_both_tags_and_other_names_stay_as_they_are() -> None:
    """CoNLL-2000 has I-LST in its test set alone: without it, a fine-tuned model cannot be scored there."""
    assert complete_tags(["O", "B-LST", "I-NP", "B-NP"]) == ("B-LST", "B-NP", "I-LST", "I-NP", "O")
    assert complete_tags(["NOUN", "ADV"]) == ("ADV", "NOUN")
    assert complete_tags(["S-X", "O"]) == ("O", "S-X")
    assert are_entity_tags(["O", "B-X"])
    assert not are_entity_tags(["O"])
    assert not are_entity_tags(["B-X", "VERB"])
    assert all(re.fullmatch(r"O|[BI]-\w+", tag) for tag in complete_tags(["I-PER", "O"]))
