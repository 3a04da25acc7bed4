"""Words with a tag each: lists in a table -> ids -> word pieces, of which a word's first has its tag."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from tinybert.columns import class_names, encode_lists, given_columns, is_list, read_lists, strings
from tinybert.conll import TAGS, WORDS
from tinybert.entities import complete_tags
from tinybert.errors import InputError
from tinybert.tasks import listed, read_labels, warn_of_case

logger = logging.getLogger(__name__)

UNREAD = -100  # the label of a piece that has none, which torch's cross-entropy leaves out


def given_words(text_columns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the column of words that a user gave; none if none was.

    Raises:
        InputError: Several were.
    """
    return given_columns(text_columns, (1,), "one, that of words, for token_classification")


def find_word_columns(
    schema: pa.Schema, text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[str, str] | None:
    """Return the columns of words and of tags, given or by their usual names, if both hold lists.

    Raises:
        InputError: Several text columns were given.
    """
    lists = [field.name for field in schema if is_list(field.type)]
    lower = {name.lower().strip(): name for name in reversed(lists)}
    words = list(given_words(text_columns)) or [lower[name] for name in WORDS if name in lower][:1]
    tags = [label_column] if label_column else [lower[name] for name in TAGS if name in lower][:1]
    found = [*words, *tags]
    return (found[0], found[1]) if len(found) == 2 and set(found) <= set(lists) else None


def read_token_rows(
    table: pa.Table, columns: tuple[str, str], given: Sequence[str] | None, origin: str
) -> tuple[pa.Table, tuple[str, ...]]:
    """Understand words and tags.

    Args:
        table: Sentences.
        columns: Those of its columns that hold lists of words and of tags: names, or ids of `ClassLabel`.
        given: The tags in the order of their ids, such as a teacher's; otherwise the data's own, and where
            these are B- and I- of types, both of every type.
        origin: What has these rows, for messages.

    Returns:
        Columns ``words`` and ``label``, lists of text and of ids; and the names of the ids.

    Raises:
        InputError: An empty sentence or word, tags that are not as many as words, an unknown tag.
    """
    words, tags = (
        read_lists(table, column, origin, "sentence", "fill it or remove the row") for column in columns
    )
    counts, tag_counts = (pc.list_value_length(lists).to_numpy() for lists in (words, tags))
    if not counts.all():
        row = int(np.argmin(counts)) + 1
        raise InputError(f"{origin}: sentence {row} has no words: fill it or remove it")
    if (counts != tag_counts).any():
        row = int(np.argmax(counts != tag_counts))
        raise InputError(
            f"{origin}: sentence {row + 1} has {counts[row]} words and {tag_counts[row]} tags: "
            "give each word one tag"
        )
    flat = strings(pa.table({columns[0]: words.flatten()}), columns[0], origin).combine_chunks()
    empty = pc.index(pc.equal(pc.utf8_trim_whitespace(flat.fill_null("")), ""), True).as_py()
    if empty >= 0:
        row = pc.list_parent_indices(words)[empty].as_py() + 1
        raise InputError(f"{origin}: sentence {row} has an empty word: fill it or remove it with its tag")
    values, codes, where = encode_lists(tags, origin, "tag", "sentence")
    known = class_names(table, columns[1])
    names = tuple(given or known or ())
    if not names and not all(value.lstrip("-").isdigit() for value in values):
        warn_of_case(values, where)
        names = complete_tags(values)
    _, names, meanings = read_labels(values, "classification", names, known, where)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    ids = pa.array(np.array(meanings, np.int64)[codes])
    return pa.table(
        {"words": pa.ListArray.from_arrays(offsets, flat), "label": pa.ListArray.from_arrays(offsets, ids)}
    ), names


def check_word_columns(found: tuple[str, str] | None, names: Sequence[str], origin: str) -> tuple[str, str]:
    """Return the columns that were found.

    Raises:
        InputError: None were.
    """
    if found is None:
        raise InputError(
            f"{origin} has no columns of lists of words and of tags, such as tokens and ner_tags; it has "
            f"{listed(names)}: name them with --text_columns and --label_column, or give a CoNLL file"
        )
    return found


def tokenize_words(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Turn words into token ids, unpadded; a word's tag is the label of its first piece.

    Words beyond ``max_length``, or of which the tokenizer leaves nothing, have no label: a warning says how
    many.

    Returns:
        As ``tinybert.data.tokenize``, with ``labels`` as lists as long as ``input_ids``, -100 where a piece
        has no label.
    """

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels, cut = [], []
        for row, tags in enumerate(batch["label"]):
            words = np.array([-1 if word is None else word for word in encoded.word_ids(row)])
            first = (words >= 0) & (words != np.concatenate([[-1], words[:-1]]))
            labels.append(np.where(first, np.asarray(tags)[words], UNREAD).tolist())
            cut.append(len(tags) - int(first.sum()))
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return dict(encoded) | {"length": lengths, "labels": labels, "cut": cut}

    # As for texts: the first call settles the state that the cache's key is made of.
    encode(rows[:1])
    made = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
    cut = np.asarray(made["cut"])
    if cut.any():
        logger.warning(
            "%d words of %d sentences are neither trained on nor scored: they lie beyond --max_length %d, "
            "or the tokenizer leaves nothing of them",
            cut.sum(),
            (cut > 0).sum(),
            max_length,
        )
    return made.remove_columns("cut")


def read_tags(rows: datasets.Dataset, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the tags that a model gives and the gold ones (words,), and how many words each sentence has.

    Args:
        rows: Of `tokenize_words`; words without a label are left out.
        logits: (tokens, C) of all of them, one after another.
    """
    labels = [np.asarray(row) for row in rows["labels"]]
    gold = np.concatenate(labels)
    read = gold != UNREAD
    return logits[read].argmax(1), gold[read], [int((row != UNREAD).sum()) for row in labels]
