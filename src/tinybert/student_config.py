"""The shape of a student: its teacher's configuration, or BERT's, at the student's size."""

import copy
from dataclasses import dataclass

from transformers import BertConfig, PreTrainedConfig

from tinybert import models
from tinybert.anatomy import feed_forward_name
from tinybert.errors import InputError


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


def _asked_sizes(teacher_config: PreTrainedConfig, size: StudentSize) -> dict[str, int]:
    """Return the student's sizes by the names in its teacher's configuration.

    Raises:
        InputError: See ``shrink_config``.
    """
    heads = size.heads or teacher_config.num_attention_heads
    asked = {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden_size,
        feed_forward_name(teacher_config): size.intermediate_size,
        "num_attention_heads": heads,
    }
    options = ("layers", "hidden_size", "intermediate_size", "heads")
    for option, (name, value) in zip(options, asked.items(), strict=True):
        most = getattr(teacher_config, name)
        if not 1 <= value <= most:
            raise InputError(f"--{option} is {value}: it must be from 1 to the teacher's {most}")
    if size.hidden_size % heads:
        raise InputError(
            f"hidden size {size.hidden_size} is not divisible by {heads} attention heads: "
            f"use {max(heads, size.hidden_size // heads * heads)}, or another number of heads"
        )
    return asked


def shrink_config(teacher_config: PreTrainedConfig, size: StudentSize) -> PreTrainedConfig:
    """Return the teacher's configuration at the student's size; vocabulary, labels and the rest stay.

    Raises:
        InputError: The student is deeper or wider than the teacher, its heads do not divide its width, or
            leave an odd head size where positions are rotary.
    """
    asked = _asked_sizes(teacher_config, size)
    heads = asked["num_attention_heads"]
    head_size = size.hidden_size // heads
    if head_size % 2 and hasattr(teacher_config, "rope_parameters"):
        raise InputError(
            f"hidden size {size.hidden_size} is {head_size} for each of {heads} attention heads, and rotary "
            f"positions need an even number: use {heads * (head_size + 1)}, or another number of heads"
        )
    config = copy.deepcopy(teacher_config)
    # ELECTRA, ALBERT: no factorised embeddings in, none out. DeBERTa's pooler is as wide as what it reads.
    for name in ("embedding_size", "pooler_hidden_size"):
        if getattr(config, name, None) == config.hidden_size:
            setattr(config, name, size.hidden_size)
    if getattr(config, "attention_head_size", None) is not None:  # DeBERTa
        config.attention_head_size = head_size
    if (
        getattr(config, "num_hidden_groups", None) is not None
    ):  # ALBERT: a group without a layer learns nothing
        config.num_hidden_groups = min(config.num_hidden_groups, size.layers)
    if getattr(config, "layer_types", None) is not None:  # ModernBERT
        config.layer_types = config.layer_types[: size.layers]
    for name, value in asked.items():
        setattr(config, name, value)
    return config


def bert_config(teacher_config: PreTrainedConfig, size: StudentSize) -> PreTrainedConfig:
    """Return BERT's configuration at the student's size for a teacher of any family.

    Its vocabulary, special pieces, positions, activation and labels are the teacher's.

    Raises:
        InputError: See ``shrink_config``.
    """
    asked = _asked_sizes(teacher_config, size)
    kept = ["vocab_size", "initializer_range", "layer_norm_eps", "id2label", "label2id", "problem_type"]
    kept += [f"{piece}_token_id" for piece in ("pad", "bos", "eos", "cls", "sep")]
    names = ("hidden_act", "activation", "hidden_activation")
    return BertConfig(
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=asked["num_attention_heads"],
        intermediate_size=size.intermediate_size,
        hidden_act=next(getattr(teacher_config, name) for name in names if hasattr(teacher_config, name)),
        max_position_embeddings=models.positions_of(teacher_config),
        # Some have no token types, and their tokenizers may write them all the same.
        type_vocab_size=getattr(teacher_config, "type_vocab_size", None) or 2,
        **{name: getattr(teacher_config, name) for name in kept if hasattr(teacher_config, name)},
    )
