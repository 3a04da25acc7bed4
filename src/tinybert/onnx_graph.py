"""A model -> an ONNX graph: traced, named, its axes dynamic, shaped as ONNX Runtime is fast at."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert import models
from tinybert.capture import evaluating
from tinybert.errors import InputError, one_line
from tinybert.first_token import FirstToken, reads_first_token
from tinybert.sessions import MISSING

# How a model class's name ends, and what it answers with.
_OUTPUTS: dict[str, tuple[str, ...]] = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "Model": ("last_hidden_state",),
}
_ONE_ANSWER = "ForSequenceClassification"  # for all tokens together
_OPSET = 17  # layer norm as one node; read by ONNX Runtime since 1.12


def outputs_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of what a model answers with, after its head.

    Raises:
        InputError: The head is of another kind.
    """
    name = type(model).__name__
    for ending, outputs in _OUTPUTS.items():
        if name.endswith(ending):
            return outputs
    raise InputError(f"cannot export a {name}: expected one of *{', *'.join(_OUTPUTS)}")


def made_batches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Return batches of random pieces, of several lengths and paddings, pairs of texts where there are."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    longest = min(models.positions_of(config), 512)
    has_pairs = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1
    batches = []
    for count, length in ((1, 2), (3, 9), (4, 33), (2, longest)):
        length = min(length, longest)
        ids = torch.randint(config.vocab_size, (count, length), generator=generator)
        lengths = torch.linspace(length, length // 2 + 1, count).long()
        mask = (torch.arange(length) < lengths[:, None]).long()
        # Padding is told by the mask; RoBERTa's and MPNet's positions tell it by the piece.
        pad = config.pad_token_id or 0
        ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
        batch = {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}
        if has_pairs:
            batch["token_type_ids"] = (torch.arange(length) >= lengths[:, None] // 2).long() * mask
        batches.append(batch)
    return batches


class _Named(nn.Module):
    """A model that is given tensors by place, as a tracer does, and answers with those that are kept."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = FirstToken(model) if reads_first_token(model) else model
        self.names, self.outputs = names, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = dict(zip(self.names, inputs, strict=True))
        if isinstance(self.model, FirstToken):
            return (self.model(batch),)
        answers = self.model(**batch)
        return tuple(answers[name] for name in self.outputs)


def export_graph(
    model: PreTrainedModel, example: Mapping[str, Tensor], outputs: tuple[str, ...], target: Path
) -> None:
    """Trace a model into an ONNX file, batch and sequence dynamic.

    torch's older exporter and eager attention: the newer one takes ten times as long, a minute for MPNet, and
    calls the axes s10 and s11; eager attention is what ONNX Runtime recognises and fuses.

    Args:
        model: On the CPU.
        example: A batch to trace with, under the inputs' names.
        outputs: What to keep of what the model returns.
        target: The file.

    Raises:
        InputError: The packages are not installed, or the model cannot be traced.
    """
    try:
        import onnx
    except ImportError as error:
        raise InputError(MISSING) from error
    names = list(example)
    per_token = not type(model).__name__.endswith(_ONE_ANSWER)
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    axes |= {name: {0: "batch", 1: "sequence"} if per_token else {0: "batch"} for name in outputs}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, on what is the same for all batches
            torch.onnx.export(
                _Named(model, names, outputs).eval(),
                tuple(example.values()),
                str(target),
                input_names=names,
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=_OPSET,
                dynamo=False,
            )
        graph = onnx.load(target)
        read_weights_themselves(graph)
        keep_layer_norms(graph)
        onnx.save(graph, target)
    except Exception as error:  # whatever a model does that cannot be traced
        raise InputError(f"cannot export {type(model).__name__} to ONNX: {one_line(error)}") from error
    finally:
        model.set_attn_implementation(before)


def read_weights_themselves(model: Any) -> None:
    """Let what reads a copy of a weight read the weight; changes the model.

    The exporter hands a weight that serves several times, as an ALBERT's layer does, on through Identity
    nodes. What comes out of one is no constant to the quantiser: all but the first use would stay as it is.

    Args:
        model: An ``onnx.ModelProto``.
    """
    answers = {output.name for output in model.graph.output}
    weights = {entry.name: entry.name for entry in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in weights and node.output[0] not in answers:
            weights[node.output[0]] = weights[node.input[0]]
            continue
        for place, name in enumerate(node.input):
            node.input[place] = weights.get(name, name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def keep_layer_norms(model: Any) -> None:
    """Write the sums before layer norms so that ONNX Runtime does not fuse the two; changes the model.

    Fused, they run seven times as slow as one after the other (SkipLayerNormalization on the CPU, 1.32).

    Args:
        model: An ``onnx.ModelProto``.
    """
    normed = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    for node in model.graph.node:
        if node.op_type == "Add" and node.output[0] in normed:
            node.op_type = "Sum"
