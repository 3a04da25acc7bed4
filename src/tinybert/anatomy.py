"""Where each family keeps its parts: a model as embeddings, post-norm layers and a head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from tinybert.errors import InputError

Batch = Mapping[str, Tensor]

# What families call the projection of the queries, alone or with others.
_QUERIES = ("query", "q_lin", "q", "query_proj", "Wqkv")

_BERT = {
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "activation": "intermediate.intermediate_act_fn",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTILBERT = {
    "layers": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "up": "ffn.lin1",
    "activation": "ffn.activation",
    "down": "ffn.lin2",
    "norm2": "output_layer_norm",
}
_MPNET = _BERT | {
    "query": "attention.attn.q",
    "key": "attention.attn.k",
    "value": "attention.attn.v",
    "out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}


class Family(NamedTuple):
    """Paths of a family's parts: in its base model, and of the sequence head in the whole model."""

    paths: Mapping[str, str]
    pooler: tuple[str, Callable[[Tensor], Tensor], str]  # dense, activation, linear: sequence head


FAMILIES = {
    "bert": Family(_BERT, ("bert.pooler.dense", torch.tanh, "classifier")),
    "roberta": Family(_BERT, ("classifier.dense", torch.tanh, "classifier.out_proj")),
    "xlm-roberta": Family(_BERT, ("classifier.dense", torch.tanh, "classifier.out_proj")),
    "electra": Family(_BERT, ("classifier.dense", F.gelu, "classifier.out_proj")),
    "distilbert": Family(_DISTILBERT, ("pre_classifier", F.relu, "classifier")),
    "mpnet": Family(_MPNET, ("classifier.dense", torch.tanh, "classifier.out_proj")),
}


def check_family(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Check that what one model computes can be written as the other: one known family, or BERT for student.

    Raises:
        InputError: It cannot. MPNet's scores have a bias by distance, for which BERT has no place.
    """
    family, other = teacher.config.model_type, student.config.model_type
    if family not in FAMILIES or other not in (family, "bert") or (family, other) == ("mpnet", "bert"):
        raise InputError(
            f"no closed-form start from {family} to {other}: teacher and student must be of one family of "
            f"{', '.join(FAMILIES)}, or the student BERT and the teacher any of them but mpnet; "
            "start at random (init random) instead"
        )


def feed_forward_name(config: PreTrainedConfig) -> str:
    """Return what a configuration calls its number of feed-forward neurons a layer."""
    return "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"


def first_position(config: PreTrainedConfig) -> int:
    """Return the row of the position table that the first token takes.

    RoBERTa counts from the one after its padding's id, and so does MPNet, which has that fixed at 1.
    """
    if config.model_type in ("roberta", "xlm-roberta"):
        return int(config.pad_token_id) + 1
    return 2 if config.model_type == "mpnet" else 0


class SequenceHead(NamedTuple):
    """A head on the first token: out(activation(dense(state))); a bare pooler has no ``out``."""

    dense: nn.Linear
    activation: Callable[[Tensor], Tensor]
    out: nn.Linear | None


class Layer:
    """One post-norm Transformer layer of any family, in the pieces the solution needs."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    norm2: nn.LayerNorm

    def __init__(
        self,
        layer: nn.Module,
        paths: Mapping[str, str],
        heads: int,
        position_bias: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Find the pieces of one layer; ``position_bias`` adds (B, h, T, T) to its scores (MPNet)."""
        for name in paths.keys() - {"layers"}:
            setattr(self, name, attrgetter(paths[name])(layer))
        self.heads, self.position_bias = heads, position_bias

    def attend(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) -> the attention block's output before its layer norm."""
        query, key, value = (
            linear(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        seen = mask[:, None, None, :]
        if self.position_bias is not None:
            seen = self.position_bias(states).masked_fill(~seen, float("-inf"))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out(context.transpose(1, 2).flatten(2)) + states

    def feed(self, states: Tensor) -> Tensor:
        """(B, T, d) -> the feed-forward block's output before its layer norm."""
        return self.down(self.activation(self.up(states))) + states


class Encoder:
    """A model of any family as embeddings and layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the pieces of a model of one of ``FAMILIES``."""
        self.model, self.base, config = model, model.base_model, model.config
        paths = FAMILIES[config.model_type].paths
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        bias = getattr(getattr(self.base, "encoder", None), "compute_position_bias", None)
        stack = attrgetter(paths["layers"])(self.base)
        self.layers = [Layer(part, paths, self.heads, bias) for part in stack]
        self.project: nn.Linear | None = getattr(self.base, "embeddings_project", None)
        self.first_position = first_position(config)
        has_types = hasattr(self.base.embeddings, "token_type_embeddings")
        self.inputs = ("input_ids", "token_type_ids") if has_types else ("input_ids",)

    def sequence_head(self) -> SequenceHead | None:
        """Return what reads the first token's state, if this model has that."""
        dense, activation, out = FAMILIES[self.model.config.model_type].pooler
        if self.model is self.base:  # an encoder with a pooler and nothing above it
            pooler = getattr(self.base, "pooler", None)
            return None if pooler is None else SequenceHead(pooler.dense, activation, None)
        try:
            return SequenceHead(attrgetter(dense)(self.model), activation, attrgetter(out)(self.model))
        except AttributeError:
            return None

    def embed(self, batch: Batch) -> Tensor:
        """Return the states the first layer reads (B, T, d)."""
        embeddings: Any = self.base.embeddings
        states = embeddings(**{name: batch[name] for name in self.inputs if name in batch})
        return states if self.project is None else self.project(states)


@contextmanager
def head_at(model: PreTrainedModel, places: Tensor | tuple[Sequence[int], Sequence[int]]) -> Iterator[None]:
    """Let a model's token head see chosen places alone for a while: its logits are then (1, N, V).

    A masked-LM head is as dear as several layers and its logits are V wide, while one piece in seven is
    masked. The hidden states that the model returns stay whole.

    Args:
        model: Any transformers model whose head reads the last hidden state token by token.
        places: A boolean mask (B, T) with N places, taken row by row; or N rows and N columns.
    """

    def choose(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[places][None]
        return output

    handle = model.base_model.register_forward_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def states_pass_by(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters that hidden states and scores do not depend on: pooler and head.

    DDP would wait for their gradients for ever.
    """
    encoder = model.base_model
    pooler = getattr(encoder, "pooler", None)
    unread = set() if pooler is None else {id(parameter) for parameter in pooler.parameters()}
    read = {id(parameter) for parameter in encoder.parameters()} - unread
    return [parameter for parameter in model.parameters() if id(parameter) not in read]


def matrix(linear: nn.Linear) -> Tensor:
    """Return a linear layer as (in + 1, out) in float64, bias last."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return torch.cat([linear.weight.T, bias[None]]).double()


def assign(linear: nn.Linear, weights: Tensor) -> None:
    """Copy (in + 1, out), bias last, into a linear layer."""
    linear.weight.copy_(weights[:-1].T)
    linear.bias.copy_(weights[-1])


@contextmanager
def dropping(model: nn.Module, states: float | None, attention: float | None) -> Iterator[None]:
    """Set the dropout rates of a model's states and of its attention probabilities; then set them back.

    None leaves them as they are. Of attention is what lies in a module that has the projection of the
    queries, but for what it does to its output.
    """
    rates = []
    for module in model.modules():
        attends = any(hasattr(module, name) for name in _QUERIES)
        for name, child in (*vars(module).items(), *module.named_children()):
            holder = (child, "p", child.p) if isinstance(child, nn.Dropout) else (module, name, child)
            rate = attention if attends and not name.startswith("out") else states
            if "drop" in name and isinstance(holder[2], float) and rate is not None:
                rates.append((*holder, rate))
    for holder, name, _, rate in rates:
        setattr(holder, name, rate)
    try:
        yield
    finally:
        for holder, name, before, _ in rates:
            setattr(holder, name, before)
