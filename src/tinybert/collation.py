"""Rows of different lengths -> one padded batch, with what they have for each token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Kinds of tasks whose logits are (B, T, C): one row of them for each token.
PER_TOKEN = ("token_classification", "question_answering")


class Collator:
    """Pads rows: token ids as the tokenizer says, labels of tokens by -100, logits of tokens by 0.

    Args:
        tokenizer: Pads.
        kind: What the task is; in ``PER_TOKEN`` rows may have ``teacher_logits`` (T * C numbers), and
            ``labels`` of token classification are (T).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: str = "classification") -> None:
        """Note what comes for each token."""
        self._pad = DataCollatorWithPadding(tokenizer)
        self._fill: dict[str, float] = {"teacher_logits": 0.0} if kind in PER_TOKEN else {}
        if kind == "token_classification":
            self._fill["labels"] = -100

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Return the batch of some rows."""
        taken = {name: fill for name, fill in self._fill.items() if name in rows[0]}
        batch = self._pad([{name: row[name] for name in row if name not in taken} for row in rows])
        real = batch["attention_mask"].bool()
        for name, fill in taken.items():
            flat = np.concatenate([np.asarray(row[name]) for row in rows])
            if name == "teacher_logits":
                flat = flat.astype(np.float32).reshape(int(real.sum()), -1)
            batch[name] = spread(torch.from_numpy(flat), real, fill)
        return batch


def spread(values: Tensor, real: Tensor, fill: float) -> Tensor:
    """Put what real tokens have, row after row, where it belongs: (N, ...) -> (B, T, ...).

    Args:
        values: One entry for each of the N real tokens.
        real: (B, T), N of them true.
        fill: What stands elsewhere.
    """
    batch = values.new_full((*real.shape, *values.shape[1:]), fill)
    batch[real] = values
    return batch
