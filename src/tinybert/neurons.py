"""Fewer feed-forward neurons a layer: the best are kept, and what they write is solved anew.

Layer by layer, on the smaller model's *own* states so far: where t is what the whole model's second norm
reads, less what the residual already brings, the output matrix is the ridge regression of t on the kept
neurons' activations. Each token is weighed by the inverse of its state's variance, as the norm that follows
divides by it. So each layer also mends what the layers below it lost. All else stays as it was, bit by bit.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinybert.anatomy import FAMILIES, Batch, Encoder, Layer, assign, feed_forward_name, matrix
from tinybert.errors import InputError
from tinybert.moments import Moments, choose

_RIDGE = 1e-2  # towards the old weights, relative to the mean square; as the closed form has it


@dataclass
class _States:
    """One batch of calibration text between two layers.

    Attributes:
        mask: Real tokens (B, T), bool.
        whole: States of the model as it was (B, T, d); later what its second norm reads.
        smaller: The smaller model's (B, T, d).
    """

    mask: Tensor
    whole: Tensor
    smaller: Tensor


def check_neurons(model: PreTrainedModel, count: int) -> None:
    """Check that a model can do with so many neurons a layer.

    Raises:
        InputError: Another family, or a number that is no cut.
    """
    if model.config.model_type not in FAMILIES:
        raise InputError(
            f"--neurons is for {', '.join(FAMILIES)}, and this model is {model.config.model_type}: leave it "
            "out"
        )
    most = _feed_forward(Encoder(model).layers)
    if not 1 <= count < most:
        raise InputError(f"--neurons is {count}: it must be from 1 to {most - 1}, below the model's {most}")


def _feed_forward(layers: list[Layer]) -> int:
    return layers[0].up.out_features


@torch.no_grad()
def cut_neurons(model: PreTrainedModel, batches: Iterable[Batch], count: int) -> PreTrainedModel:
    """Return a copy of a model with fewer feed-forward neurons a layer, the same number in each.

    Stock configurations have one number for all layers, so each keeps its best ``count``. These are chosen
    greedily, those first whose linear combinations fit t best (``moments.choose``), and re-solved.

    Args:
        model: Of a family in ``anatomy.FAMILIES``, with any head; read only.
        batches: Tokenised text, about as much as fits in memory (8 d bytes a token).
        count: Neurons to keep in each layer.

    Raises:
        InputError: See ``check_neurons``; or there is no text.
    """
    check_neurons(model, count)
    config = copy.deepcopy(model.config)
    setattr(config, feed_forward_name(config), count)
    smaller = type(model)(config)
    was_training = model.training
    model.eval(), smaller.eval()
    cut = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if tensor.shape == cut[name].shape:
            cut[name] = tensor
    smaller.load_state_dict(cut)
    whole, new = Encoder(model), Encoder(smaller)
    states = [_States(_mask(batch), whole.embed(batch), whole.embed(batch)) for batch in batches]
    if not states:
        raise InputError("there is no text to choose neurons on: give some")
    for layer, smaller_layer in zip(whole.layers, new.layers, strict=True):
        moments = Moments()
        for batch in states:
            _feed_half(layer, smaller_layer, batch, moments)
        kept = choose(moments, count)
        _assign(layer, smaller_layer, kept, moments)
        for batch in states:
            batch.whole = layer.norm2(batch.whole)
            batch.smaller = smaller_layer.norm2(smaller_layer.feed(batch.smaller))
    model.train(was_training)
    return smaller


def _feed_half(layer: Layer, smaller: Layer, batch: _States, moments: Moments) -> None:
    """Go through attention and the whole feed-forward block; count neurons and what they should write."""
    mask = batch.mask
    batch.whole = layer.feed(layer.norm1(layer.attend(batch.whole, mask)))
    batch.smaller = smaller.norm1(smaller.attend(batch.smaller, mask))
    own, goal = batch.smaller[mask], batch.whole[mask]
    moments.add(layer.activation(layer.up(own)), goal - own, 1 / goal.var(1).clamp_min(1e-6))


def _assign(layer: Layer, smaller: Layer, kept: Tensor, moments: Moments) -> None:
    """Keep some neurons of a layer; solve their output matrix."""
    assign(smaller.up, matrix(layer.up)[:, kept])
    places = [*kept.tolist(), -1]  # the bias last
    identity = torch.eye(len(moments.gram), dtype=torch.float64)
    assign(smaller.down, moments.mapped(identity[:, places]).ridge(matrix(layer.down)[places], _RIDGE))


def _mask(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool()
