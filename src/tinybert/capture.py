"""One forward pass of a stock transformers model -> its states, without eager attention.

transformers lets a model's attention be exchanged by name. Ours notes the queries and keys it is given
and hands on to SDPA, so the unnormalised scores of equation 7 are at hand (as Q and K) while the model
keeps its fast attention. ``outputs.attentions`` would be probabilities, and only with eager attention.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tinybert.anatomy import head_at
from tinybert.attention import attend, suits
from tinybert.errors import InputError
from tinybert.losses import States

_NAME = "tinybert_capture"


class _Call(NamedTuple):
    query: Tensor
    key: Tensor
    scaling: float


# Set for one forward pass, so nothing global holds on to a graph. Not a ContextVar: torch.compile cannot
# trace one and would cut a model in two at each of its layers.
_calls: list[_Call] | None = None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    biased = kwargs.get("position_bias") is not None
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _calls is not None:
        if biased:
            raise InputError(
                f"{type(module).__name__} adds a position bias to its attention scores, which equation 7 "
                "does not cover: set attention_weight to 0 for this model"
            )
        _calls.append(_Call(query, key, scaling))
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
    if not (biased or causal) and suits(query, key, attention_mask, kwargs.get("dropout", 0.0)):
        return attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# Under both names: registered as attention alone, transformers would drop the mask without a word and
# padding would be attended to.
AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


def _pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a DDP or compiled wrapper."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextmanager
def _recording(model: PreTrainedModel, scores: bool) -> Iterator[list[_Call]]:
    global _calls
    calls: list[_Call] = []
    before = model.config._attn_implementation
    if not scores and before != "sdpa":
        yield calls
        return
    model.config._attn_implementation = _NAME
    _calls = calls if scores else None
    try:
        yield calls
    finally:
        _calls = None
        model.config._attn_implementation = before


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode under no_grad, then give it back in the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _first_layers(model: PreTrainedModel, layers: int | None) -> Iterator[int]:
    """Run only a model's first layers for a while, without a copy of them; yield how many that is."""
    whole = model.config.num_hidden_layers
    if layers is None or layers == whole:
        yield whole
        return
    for owner in model.base_model.modules():
        for name, stack in owner.named_children():
            if isinstance(stack, nn.ModuleList) and len(stack) == whole:
                setattr(owner, name, stack[:layers])
                try:
                    yield layers
                finally:
                    setattr(owner, name, stack)
                return
    yield whole


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    states: bool = True,
    scores: bool = True,
    layers: int | None = None,
    places: Tensor | None = None,
) -> States:
    """Run one forward pass and return what it shows.

    Args:
        model: A transformers encoder with or without a head, maybe wrapped by DDP.
        inputs: Its inputs; labels and whatever else its ``forward`` does not take are left out.
        states: Whether to keep the hidden states (layer 0 = embedding output, then each layer's output).
        scores: Whether to keep queries and keys, in the order of the layers.
        layers: How many layers to run, from below, where nobody reads those above; all unless given.
        places: Where alone to run a token head, boolean (B, T); the logits are then (N, V), row by row.

    Raises:
        InputError: The model does not compute its attention through transformers' AttentionInterface, so
            its scores cannot be had.
    """
    pretrained = _pretrained(model)
    accepted = inspect.signature(pretrained.forward).parameters
    taken = {name: value for name, value in inputs.items() if name in accepted and name != "labels"}
    head = nullcontext() if places is None else head_at(pretrained, places)
    with _first_layers(pretrained, layers) as run, _recording(pretrained, scores) as calls, head:
        outputs = model(**taken, output_hidden_states=states)
    if scores and len(calls) != run:
        raise InputError(
            f"the attention scores of {type(pretrained).__name__} cannot be captured ({len(calls)} of {run} "
            "layers use transformers' AttentionInterface): use a BERT, RoBERTa, ELECTRA or DistilBERT model, "
            "or set attention_weight to 0"
        )
    logits = getattr(outputs, "logits", None)
    if logits is not None and places is not None:
        # A model that was compiled before, for whole sequences, does not see the hook that chooses.
        logits = logits[places] if logits.shape[:2] == places.shape else logits[0]
    return States(
        hidden=tuple(outputs.hidden_states) if states else (),
        queries=tuple(call.query for call in calls),
        keys=tuple(call.key for call in calls),
        scaling=tuple(call.scaling for call in calls),
        logits=logits,
    )


def check_capturable(model: PreTrainedModel) -> None:
    """Find out before any time is spent whether ``capture`` can have a model's attention scores.

    Raises:
        InputError: It cannot; the message names the model and what to do.
    """
    ids = torch.arange(4, device=model.device).remainder(model.config.vocab_size)[None]
    with evaluating(model):
        capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
