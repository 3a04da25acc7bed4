"""What a distillation step cannot do without: its matrix products and its attention, alone.

Read by ``train_step.py``, which runs these in turn with whole steps, so that a busy machine slows all.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from tinybert.mapping import layer_map


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds one call takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the matrix products of a layer: attention's four, feed-forward's two."""
    width, inner = config.hidden_size, config.intermediate_size
    return [(width, width)] * 4 + [(width, inner), (inner, width)]


def make_rate(
    config: PreTrainedConfig, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], dict[str, float]]:
    """Return a function that measures FLOP/s of torch.matmul at the shapes of a layer and as one rate.

    ``all`` is the FLOPs of the six products of a layer over the seconds of all six: the most that a model
    of such layers can reach.
    """
    pairs = [
        (torch.randn(tokens, inputs, device=device), torch.randn(outputs, inputs, device=device))
        for inputs, outputs in products(config)
    ]
    operands = [(states.to(dtype), weight.to(dtype).T) for states, weight in pairs]

    def measure() -> dict[str, float]:
        rates: dict[str, float] = {}
        flops = seconds = 0.0
        for states, weight in operands:
            taken = seconds_of(lambda states=states, weight=weight: torch.matmul(states, weight), device)
            work = 2.0 * states.numel() * weight.shape[1]
            name = "x".join(str(size) for size in (*states.shape, weight.shape[1]))
            rates[name] = max(rates.get(name, 0.0), work / taken)
            flops, seconds = flops + work, seconds + taken
        return {"all": flops / seconds, **rates}

    return measure


class Floor:
    """The matrix products and the attention of one step in one precision, nothing between them.

    Teacher forward; student forward and backward with the projections of M + 1 layers. No casts, biases,
    norms, dropout, masks, losses or optimiser. Each layer has weights of its own, as in the models: they
    are read from memory and not from a cache.
    """

    def __init__(
        self,
        teacher: PreTrainedConfig,
        student: PreTrainedConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the operands."""
        self.device = device

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        def weights(config: PreTrainedConfig) -> list[Tensor]:
            layers = range(config.num_hidden_layers)
            return [made(outputs, inputs) for _ in layers for inputs, outputs in products(config)]

        def heads(config: PreTrainedConfig) -> list[Tensor]:
            size = config.hidden_size // config.num_attention_heads
            shape = (batch, length, config.num_attention_heads, size)
            return [made(*shape).transpose(1, 2) for _ in ("query", "key", "value")]

        tokens, layers = batch * length, student.num_hidden_layers
        self.teacher_weights, self.student_weights = weights(teacher), weights(student)
        self.student_weights += [made(teacher.hidden_size, student.hidden_size) for _ in range(layers + 1)]
        self.states = {
            width: made(tokens, width)
            for config in (teacher, student)
            for width in (config.hidden_size, config.intermediate_size)
        }
        self.teacher_heads, self.student_heads = heads(teacher), heads(student)
        self.teacher_layers, self.student_layers = teacher.num_hidden_layers, layers

    def _products(self) -> None:
        for weight in self.teacher_weights:
            torch.mm(self.states[weight.shape[1]], weight.T)
        for weight in self.student_weights:
            inputs, gradient = self.states[weight.shape[1]], self.states[weight.shape[0]]
            torch.mm(inputs, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, inputs)

    def _attention(self) -> None:
        with torch.no_grad():
            for _ in range(self.teacher_layers):
                F.scaled_dot_product_attention(*self.teacher_heads)
        gradient = torch.ones_like(self.student_heads[0])
        for _ in range(self.student_layers):
            states = [state.detach().requires_grad_() for state in self.student_heads]
            F.scaled_dot_product_attention(*states).backward(gradient)

    def measure(self) -> tuple[float, float]:
        """Return the seconds of the matrix products and of the attention of one step."""
        return seconds_of(self._products, self.device), seconds_of(self._attention, self.device)


def optimizer_seconds(student: PreTrainedModel, device: torch.device) -> Callable[[], dict[str, float]]:
    """Return a function that measures what the word embeddings and the optimiser cost in a step.

    The gradient of the table of word pieces is dense: a step fills, clips and applies every row of it,
    the few hundred that its tokens use and all others.
    """
    table = student.get_input_embeddings()
    ids = torch.randint(table.num_embeddings, (512,), device=device)
    gradient = torch.randn(512, table.embedding_dim, device=device)
    alone = nn.Embedding(table.num_embeddings, table.embedding_dim, device=device)
    everything = list(student.parameters())
    ours = torch.optim.AdamW([alone.weight], fused=True)
    whole = torch.optim.AdamW(everything, fused=True)
    one_by_one = torch.optim.AdamW(everything, foreach=False)

    def measure() -> dict[str, float]:
        alone.weight.grad = None
        looked_up = alone(ids)
        parts = {"table: gradient": seconds_of(lambda: looked_up.backward(gradient), device)}
        for parameter in everything:
            parameter.grad = torch.ones_like(parameter)
        parts |= {
            "table: clip": seconds_of(lambda: nn.utils.clip_grad_norm_([alone.weight], 1.0), device),
            "table: AdamW, fused": seconds_of(ours.step, device),
            "student: clip": seconds_of(lambda: nn.utils.clip_grad_norm_(everything, 1.0), device),
            "student: AdamW, fused": seconds_of(whole.step, device),
            "student: AdamW, plain": seconds_of(one_by_one.step, device),
            "student: zero_grad": seconds_of(whole.zero_grad, device),
        }
        return parts

    return measure


def model_flops(teacher: PreTrainedConfig, student: PreTrainedConfig, lengths: list[int]) -> float:
    """Return the floating-point operations that a step over texts of these lengths needs.

    Over n real tokens of texts of t tokens each: 2 n P for a forward pass through the P weights of the
    layers' matrix products, 4 n t d a layer for its two attention products; once for the teacher up to its
    last mapped layer, three times (forward, two backward) for the student and its M + 1 projections of
    d' x d. The losses themselves, norms, softmax, padding and anything done twice are not counted.
    """

    def forward(config: PreTrainedConfig, layers: int) -> float:
        weights = sum(inputs * outputs for inputs, outputs in products(config))
        attention = 4 * config.hidden_size * sum(length**2 for length in lengths)
        return layers * (2 * weights * sum(lengths) + attention)

    depth = student.num_hidden_layers
    projections = 2 * (depth + 1) * student.hidden_size * teacher.hidden_size * sum(lengths)
    last = layer_map("uniform", depth, teacher.num_hidden_layers)[-1]
    return forward(teacher, last) + 3 * (forward(student, depth) + projections)
