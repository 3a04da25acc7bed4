"""Opening model folders and hub names safely: configuration, weights and tokenizer, or one clear line."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tinybert.errors import InputError

_CLASSIFIER = "ForSequenceClassification"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _check_source(source: str) -> None:
    folder = Path(source)
    if folder.is_file():
        raise InputError(f"{source} is a file: give the model folder it lies in")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{source} is no model folder: it has no config.json")
    elif folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise InputError(f"there is no model folder {source}: give an existing folder or a hub name")


def open_config(source: str) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        InputError: No such folder or hub name, a damaged file, or a model that brings its own code.
    """
    _check_source(source)
    try:
        # False, not the default None, which would ask on the terminal whether to run it.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of the network, of JSON, of the hub's and the configuration's own checks
        raise InputError(f"cannot open the model {source}: {_one_line(error)}") from error
    if getattr(config, "auto_map", None):
        raise InputError(f"the model {source} needs code of its own, which is never run: use a stock model")
    return config


def open_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer.

    Raises:
        InputError: The folder has none, or it cannot be read.
    """
    _check_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception on damaged files
        raise InputError(f"cannot load the tokenizer of {source}: {_one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source} has no tokenizer: copy tokenizer.json or vocab.txt into the folder")
    return tokenizer


def _load(
    auto_class: Any, source: str, config: PreTrainedConfig, *, new_head: bool = True, **kwargs: Any
) -> PreTrainedModel:
    try:
        # Training runs in float32 with autocast; a checkpoint stored in half precision would train in it.
        model, report = auto_class.from_pretrained(
            source,
            config=config,
            dtype="float32",
            output_loading_info=True,
            trust_remote_code=False,
            **kwargs,
        )
    except Exception as error:  # safetensors, pickle and torch each have their own errors for damaged files
        raise InputError(f"cannot load the weights of {source}: {_one_line(error)}") from error
    # A head may be new; an encoder with holes would train from noise without a word.
    prefix = model.base_model_prefix + "."
    missing = [name for name in report["missing_keys"] if name.startswith(prefix) and "pooler" not in name]
    if missing:
        raise InputError(f"the weights of {source} lack {len(missing)} encoder tensors such as {missing[0]}")
    if report["missing_keys"] and not new_head:
        raise InputError(
            f"the model {source} has no masked-LM head (no {min(report['missing_keys'])} among its weights): "
            "give one that has, such as bert-base-uncased, or let word vectors serve all words"
        )
    return model


def open_encoder(source: str) -> PreTrainedModel:
    """Load an encoder without any head (``AutoModel``), in float32."""
    return _load(AutoModel, source, open_config(source))


def open_classifier(source: str) -> PreTrainedModel:
    """Load a fine-tuned model with its sequence classification or regression head, in float32.

    Raises:
        InputError: The model has no such head, or one whose classes do not exclude each other.
    """
    config = open_config(source)
    architectures = config.architectures or []
    if not any(name.endswith(_CLASSIFIER) for name in architectures):
        found = ", ".join(architectures) or "no architecture"
        raise InputError(
            f"{source} has no classification head ({found}): fine-tune it first, "
            f"tinybert finetune --model {source} ..."
        )
    if config.problem_type == "multi_label_classification":
        raise InputError(
            f"{source} is a multi-label classifier, which cannot be distilled: use one whose classes exclude "
            "each other"
        )
    return _load(AutoModelForSequenceClassification, source, config)


def open_masked_lm(source: str) -> PreTrainedModel:
    """Load a model with its masked-LM head, in float32.

    Raises:
        InputError: It has no such head: the one that transformers makes up proposes noise.
    """
    return _load(AutoModelForMaskedLM, source, open_config(source), new_head=False)


def new_classifier(source: str, label_names: tuple[str, ...]) -> PreTrainedModel:
    """Load an encoder under a new head: one score without label names, else a logit for each name."""
    config = open_config(source)
    config.id2label = dict(enumerate(label_names or ("score",)))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if label_names else "regression"
    return _load(AutoModelForSequenceClassification, source, config, ignore_mismatched_sizes=True)


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return a model's class names in the order of its logits; empty for regression (one logit)."""
    names: dict[int, str] = config.id2label  # type: ignore[assignment]
    return () if len(names) == 1 else tuple(str(names[index]) for index in range(len(names)))


def positions_of(config: PreTrainedConfig) -> int:
    """Return the longest input of a model, special pieces included."""
    positions: int = config.max_position_embeddings
    # RoBERTa counts positions from the one after its padding's.
    return positions - (config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0)


def weights_digest(model: PreTrainedModel) -> str:
    """Return a fingerprint of a model's configuration and weights."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers give every piece the same id, so that states compare token by token.

    Raises:
        InputError: They differ; the message names a piece that does.
    """
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if student_ids == teacher_ids:
        return
    piece = min(
        (piece for piece in student_ids | teacher_ids if student_ids.get(piece) != teacher_ids.get(piece)),
        key=str,
    )
    raise InputError(
        f"student and teacher have different vocabularies ({len(student_ids)} and {len(teacher_ids)} pieces; "
        f"{piece!r} is {student_ids.get(piece)} and {teacher_ids.get(piece)}): "
        "take a student with the teacher's tokenizer, or let tinybert build one"
    )
