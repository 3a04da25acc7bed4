"""One forward pass of a stock transformers model -> its states, without eager attention.

transformers lets a model's attention be exchanged by name. Ours notes the queries and keys it is given
and hands on to SDPA, so the unnormalised scores of equation 7 are at hand (as Q and K) while the model
keeps its fast attention. ``outputs.attentions`` would be probabilities, and only with eager attention.
MPNet computes its scores itself: forward hooks note what its query and key projections give.

Families whose scores are more than scaled products of queries and keys, or leave out pairs of tokens, are
refused by name: DeBERTa, and ModernBERT where it attends locally. Their states and logits are there.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from tinybert.anatomy import head_at
from tinybert.attention import attend, suits
from tinybert.errors import InputError
from tinybert.losses import States

_NAME = "tinybert_capture"
_LABELS = ("labels", "start_positions", "end_positions")

# Families whose hidden states are the outputs of a stack of layers and stay the same when it is cut short.
# ALBERT runs one layer many times and ModernBERT normalises the last state once more: they run all layers.
_CUT_SHORT = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet", "deberta-v2")
_BEYOND_PRODUCTS = dict.fromkeys(
    ("deberta", "deberta-v2"),
    "they are sums of products of contents and of positions, and equation 7 is about the former alone",
)


class _Call(NamedTuple):
    query: Tensor
    key: Tensor
    scaling: float
    beyond: str = ""  # why equation 7 does not cover this layer's scores


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
        beyond = "they add a position bias, which equation 7 does not cover" if biased else ""
        if kwargs.get("sliding_window") is not None:
            beyond = "some layers attend within a window alone, and equation 7 compares all pairs of tokens"
        _calls.append(_Call(query, key, scaling, beyond))
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


def _note(attention: MPNetSelfAttention, projection: nn.Module, inputs: Any, output: Tensor) -> None:
    """Note what a projection gives; a forward hook. Each layer's key follows its query."""
    if _calls is None:
        return
    split = output.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
    if projection is attention.q:
        _calls.append(_Call(split, split, attention.attention_head_size**-0.5))
    else:
        _calls[-1] = _calls[-1]._replace(key=split)


@contextmanager
def _recording(model: PreTrainedModel, scores: bool) -> Iterator[list[_Call]]:
    global _calls
    calls: list[_Call] = []
    before = model.config._attn_implementation
    # Without scores too: a model that was compiled without hooks does not see them later.
    hooks = [
        projection.register_forward_hook(partial(_note, attention))
        for attention in model.modules()
        if isinstance(attention, MPNetSelfAttention)
        for projection in (attention.q, attention.k)
    ]
    # MPNet reads the setting for its mask alone, and adds that to its scores: SDPA's is boolean.
    if not hooks and (scores or before == "sdpa"):
        model.config._attn_implementation = _NAME
    _calls = calls if scores else None
    try:
        yield calls
    finally:
        _calls = None
        for hook in hooks:
            hook.remove()
        if model.config._attn_implementation != before:
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
    """Run only a model's first layers for a while, without a copy of them; yield how many that is.

    One at least: transformers takes the embedding output from the first layer's input.
    """
    whole = model.config.num_hidden_layers
    if layers is None or layers == whole or model.config.model_type not in _CUT_SHORT:
        yield whole
        return
    layers = max(layers, 1)
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


def _refuse(model: PreTrainedModel, why: str) -> NoReturn:
    raise InputError(
        f"the attention scores of {type(model).__name__} cannot be captured ({why}): "
        "set attention_weight to 0, as hidden states and predictions can be distilled all the same"
    )


def _check_scores(model: PreTrainedModel, calls: list[_Call], layers: int) -> None:
    for call in calls:
        if call.beyond:
            _refuse(model, call.beyond)
    if len(calls) != layers:
        _refuse(model, f"{len(calls)} of {layers} layers use transformers' AttentionInterface")


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

    Queries and keys are those whose scaled product the model computes: ModernBERT's are rotated. MPNet adds
    to every layer's product one bias that depends on the tokens' distance alone. It is left out: equation 7
    compares the products, and a student made by ``make_student`` starts with its teacher's bias.

    Args:
        model: A transformers encoder with or without a head, maybe wrapped by DDP.
        inputs: Its inputs; labels and whatever else its ``forward`` does not take are left out.
        states: Whether to keep the hidden states (layer 0 = embedding output, then each layer's output).
        scores: Whether to keep queries and keys, in the order of the layers.
        layers: How many layers to run, from below, where nobody reads those above; all unless given, and in
            families where the states of fewer would be others.
        places: Where alone to run a token head, boolean (B, T); the logits are then (N, V), row by row.

    Raises:
        InputError: The model does not show the scores of equation 7: the message says why. Or its hidden
            states are not one for the embeddings and one a layer.
    """
    pretrained = _pretrained(model)
    if scores and pretrained.config.model_type in _BEYOND_PRODUCTS:
        _refuse(pretrained, _BEYOND_PRODUCTS[pretrained.config.model_type])
    accepted = inspect.signature(pretrained.forward).parameters
    taken = {name: value for name, value in inputs.items() if name in accepted and name not in _LABELS}
    head = nullcontext() if places is None else head_at(pretrained, places)
    with _first_layers(pretrained, layers) as run, _recording(pretrained, scores) as calls, head:
        outputs = model(**taken, output_hidden_states=states)
    if scores:
        _check_scores(pretrained, calls, run)
    if states and len(outputs.hidden_states) != run + 1:
        raise InputError(
            f"{type(pretrained).__name__} shows {len(outputs.hidden_states)} hidden states for {run} layers, "
            f"and {run + 1} were expected: use a model with one a layer, or distil its predictions alone"
        )
    logits = getattr(outputs, "logits", None)
    if "start_logits" in outputs:
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
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
