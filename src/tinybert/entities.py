"""Entities in tags (B-PER, I-PER, O): what makes a set of tags a scheme, and precision, recall and F1."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from tinybert.errors import InputError

_TAG = re.compile(r"([BIESLU])-(.+)")
# seqeval calls the last word of an entity E and a single one S.
_SAME = {"L": "E", "U": "S"}


def are_entity_tags(names: Iterable[str]) -> bool:
    """Return whether names are tags of entities: O and prefixed types, as in BIO, BIO2, IOBES and BILOU."""
    marked = [name for name in names if name != "O"]
    return bool(marked) and all(_TAG.fullmatch(name) for name in marked)


def complete_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the sorted tags with B- and I- of every type, where they are of that scheme.

    A type that was seen only in single words has no I- tag among them, and still may be longer elsewhere.
    """
    known = set(tags)
    prefixes = {name[0] for name in known if name != "O"}
    if are_entity_tags(known) and prefixes <= {"B", "I"}:
        known |= {f"{prefix}-{name[2:]}" for name in known if name != "O" for prefix in "BI"}
    return tuple(sorted(known))


def tag_metrics(
    predicted: np.ndarray, gold: np.ndarray, lengths: Sequence[int], names: Sequence[str]
) -> dict[str, float]:
    """Score tags.

    An entity counts as found where type, first and last word agree (Tjong Kim Sang and De Meulder 2003, as
    seqeval reads tags by default: an I- after another type begins an entity). Over all entities.

    Args:
        predicted: Tag ids (words,) of all sentences, one after another.
        gold: Likewise.
        lengths: Words of each sentence.
        names: The tags in the order of their ids.

    Returns:
        ``accuracy`` over the words and, where the tags are those of entities, ``f1``, ``precision`` and
        ``recall``.

    Raises:
        InputError: There is nothing to score.
    """
    if len(gold) == 0:
        raise InputError("cannot score tags: no word has one")
    metrics = {"accuracy": float((predicted == gold).mean())}
    if not are_entity_tags(names):
        return metrics
    sentences = [_sentences(ids, lengths, names) for ids in (gold, predicted)]
    precision, recall, f1, _ = precision_recall_fscore_support(*sentences, average="micro", zero_division=0)
    return metrics | {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def entity_counts(
    predicted: np.ndarray, gold: np.ndarray, lengths: Sequence[int], names: Sequence[str]
) -> np.ndarray:
    """Return of each sentence how many entities were found, predicted and gold (sentences, 3).

    The F1 over some of them is twice the sum of the first over those of the others. Arguments: `tag_metrics`.
    """
    counts = []
    for own, right in zip(*(_sentences(ids, lengths, names) for ids in (predicted, gold)), strict=True):
        found, known = set(get_entities(own)), set(get_entities(right))
        counts.append((len(found & known), len(found), len(known)))
    return np.array(counts).reshape(-1, 3)


def _sentences(ids: np.ndarray, lengths: Sequence[int], names: Sequence[str]) -> list[list[str]]:
    """Return the tags of each sentence as seqeval reads them."""
    read = np.array([_TAG.sub(lambda tag: f"{_SAME.get(tag[1], tag[1])}-{tag[2]}", name) for name in names])
    return [part.tolist() for part in np.split(read[ids], np.cumsum(np.asarray(lengths))[:-1])]
