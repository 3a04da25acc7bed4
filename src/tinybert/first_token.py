"""A classifier that reads the first token, its last layer run at that token alone: the same answer, sooner.

Every other token of the last layer is needed as a key and a value only. Its queries, attention output and
feed-forward network, 5/6 of a TinyBERT layer, are left out: a fifth of a model of four layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinybert.anatomy import FAMILIES, Encoder, Layer


def reads_first_token(model: PreTrainedModel) -> bool:
    """Return whether a model is a sequence classifier of a family whose parts are known."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    known = is_classifier and model.config.model_type in FAMILIES
    return known and not getattr(model.config, "is_decoder", False)


class FirstToken(nn.Module):
    """``model``'s logits from its own parts.

    Args:
        model: One that ``reads_first_token``; its parameters are used, not copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the parts."""
        super().__init__()
        self.model = model
        self.encoder = Encoder(model)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits (B, C) of ``input_ids``, ``attention_mask`` and maybe token types, (B, T) each."""
        states = self.encoder.embed(batch)
        masked = 1 - batch["attention_mask"][:, None, None, :].to(states.dtype)
        unread = masked * torch.finfo(states.dtype).min
        count = states.shape[0]
        *layers, last = self.encoder.layers
        if last.position_bias is not None:  # MPNet's: the same for all layers, by the distance of two tokens
            unread = unread + last.position_bias(states)
        for layer in layers:
            states = _run(layer, states, states, unread, count)
        states = _run(last, states[:, :1], states, unread[:, :, :1], count)
        head: Any = self.encoder.sequence_head()  # a classifier has one
        return head.out(head.activation(head.dense(states[:, 0])))


def _run(layer: Layer, queried: Tensor, states: Tensor, unread: Tensor, count: int) -> Tensor:
    """Return a layer's output at some tokens: (B, Q, d) of (B, T, d).

    One dimension of each shape is dynamic and told, so that a graph has no nodes that work shapes out.

    Args:
        layer: The layer.
        queried: The states (B, Q, d) whose outputs are wanted.
        states: All of them (B, T, d).
        unread: What is added to the scores (B, 1 or h, 1 or Q, T).
        count: B.
    """
    width = layer.query.out_features
    size = width // layer.heads

    def split(projected: Tensor) -> Tensor:
        return projected.reshape(count, -1, layer.heads, size).transpose(1, 2)

    query, key, value = split(layer.query(queried)), split(layer.key(states)), split(layer.value(states))
    scores = query @ key.transpose(-1, -2) * size**-0.5 + unread
    context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(count, -1, width)
    return layer.norm2(layer.feed(layer.norm1(layer.out(context) + queried)))
