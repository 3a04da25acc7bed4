"""Batches: what a token has stays with it, whichever side is padded."""

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

from tinybert.collation import Collator

ROWS = [
    {"input_ids": [2, 5, 3], "attention_mask": [1] * 3, "labels": [-100, 1, -100]},
    {"input_ids": [2, 6, 7, 3], "attention_mask": [1] * 4, "labels": [-100, 0, 2, -100]},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_and_teacher_logits_of_tokens_are_padded_with_them(
    side: str, tokenizer: BertTokenizerFast
) -> None:
    """One place off, every word would be taught the tag of its neighbour."""
    tokenizer = BertTokenizerFast(vocab=tokenizer.get_vocab(), padding_side=side)
    logits = [np.arange(len(row["input_ids"]) * 2) + 10 * place for place, row in enumerate(ROWS)]
    rows = [row | {"teacher_logits": some.tolist()} for row, some in zip(ROWS, logits, strict=True)]
    batch = Collator(tokenizer, "token_classification")(rows)
    real = slice(0, 3) if side == "right" else slice(1, 4)
    assert batch["labels"][0, real].tolist() == [-100, 1, -100]
    assert batch["labels"][1].tolist() == [-100, 0, 2, -100]
    assert (batch["labels"] != -100).sum() == 3
    assert batch["teacher_logits"].dtype == torch.float32
    assert batch["teacher_logits"].shape == (2, 4, 2)
    np.testing.assert_array_equal(batch["teacher_logits"][0, real].flatten(), logits[0])
    np.testing.assert_array_equal(batch["teacher_logits"][1].flatten(), logits[1])
    assert rows[0].keys() == ROWS[0].keys() | {"teacher_logits"}, "rows are the data set's, and stay whole"


def test_labels_of_rows_stay_one_a_row(tokenizer: BertTokenizerFast) -> None:
    """A list of as many labels as tokens is no list of tokens' labels."""
    rows = [row | {"labels": [0.0, 1.0, 1.0], "teacher_logits": [1.0, 2.0]} for row in ROWS]
    batch = Collator(tokenizer)(rows)
    assert batch["labels"].shape == (2, 3)
    assert batch["teacher_logits"].shape == (2, 2)
    rows = [row | {"labels": 1, "start_positions": 2} for row in ROWS]
    batch = Collator(tokenizer, "question_answering")(rows)
    assert batch["labels"].shape == batch["start_positions"].shape == (2,)
