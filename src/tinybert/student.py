"""The student: the teacher's architecture with fewer layers and narrower ones, and where it starts."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from tinybert.errors import InputError
from tinybert.mapping import layer_map as map_layers

Start = Literal["copy", "random"]


@dataclass(frozen=True)
class StudentSize:
    """The shape of a student; the defaults are TinyBERT-4's.

    Attributes:
        layers: Transformer layers M.
        hidden_size: d'.
        intermediate_size: Feed-forward neurons a layer.
        heads: Attention heads; the teacher's number where None.
    """

    layers: int = 4
    hidden_size: int = 312
    intermediate_size: int = 1200
    heads: int | None = None


def _feed_forward_name(config: PreTrainedConfig) -> str:
    return "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"


def shrink_config(teacher_config: PreTrainedConfig, size: StudentSize) -> PreTrainedConfig:
    """Return the teacher's configuration at the student's size; vocabulary, labels and the rest stay.

    Raises:
        InputError: The student is deeper or wider than the teacher, or its heads do not divide its width.
    """
    feed_forward = _feed_forward_name(teacher_config)
    heads = size.heads or teacher_config.num_attention_heads
    asked = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden_size,
        feed_forward: size.intermediate_size,
        "num_attention_heads": heads,
    }
    for name, value in asked.items():
        most = getattr(teacher_config, name)
        if not 1 <= value <= most:
            option = "intermediate_size" if name == feed_forward else name
            raise InputError(f"the student's {option} is {value}: it must be from 1 to the teacher's {most}")
    if size.hidden_size % heads:
        raise InputError(
            f"hidden size {size.hidden_size} is not divisible by {heads} attention heads: "
            f"use {max(heads, size.hidden_size // heads * heads)}, or another number of heads"
        )
    config = copy.deepcopy(teacher_config)
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = size.hidden_size  # ELECTRA: no factorised embeddings in, none out
    for name, value in asked.items():
        setattr(config, name, value)
    return config


def make_student(
    teacher: PreTrainedModel,
    size: StudentSize | None = None,
    *,
    init: Start = "random",
    layer_map: str | Sequence[int] = "uniform",
    seed: int = 42,
) -> PreTrainedModel:
    """Build a student of the teacher's architecture, head and label names.

    Args:
        teacher: Any BERT-family model with or without a head; read only.
        size: The student's shape, TinyBERT-4's unless given.
        init: ``"random"``, or ``"copy"``: embeddings, head and the layers g(m), where widths agree.
        layer_map: g, see ``tinybert.mapping.layer_map``.
        seed: Of the random start.

    Raises:
        InputError: A shape that does not fit the teacher, or a copy between different widths.
    """
    size = size or StudentSize()
    config = shrink_config(teacher.config, size)
    teacher_layers = map_layers(layer_map, size.layers, teacher.config.num_hidden_layers)
    set_seed(seed)
    student = type(teacher)(config).float()
    if init == "copy":
        _copy_layers(teacher, student, teacher_layers)
    return student.eval()


def _copy_layers(teacher: PreTrainedModel, student: PreTrainedModel, teacher_layers: tuple[int, ...]) -> None:
    """Copy embeddings, head and the mapped layers by name: layer m - 1 takes the weights of g(m) - 1."""
    source = teacher.state_dict()
    copied = {}
    for name, tensor in student.state_dict().items():
        origin = re.sub(r"(?<=\blayer\.)(\d+)", lambda found: str(teacher_layers[int(found[0])] - 1), name)
        if source[origin].shape != tensor.shape:
            raise InputError(
                f"cannot copy {name}: {tuple(source[origin].shape)} in the teacher, {tuple(tensor.shape)} in "
                "the student: give the student the teacher's widths, or start at random"
            )
        copied[name] = source[origin]
    student.load_state_dict(copied)
