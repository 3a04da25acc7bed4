"""Opening model folders and hub names safely: configuration, weights and tokenizer, or one clear line."""

import hashlib
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tinybert.anatomy import first_position
from tinybert.errors import InputError, one_line
from tinybert.tasks import Kind

_PROBLEMS: dict[Kind, Any] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}
_SEQUENCE = "ForSequenceClassification"
_ENDINGS: dict[Kind, str] = {
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}
# How the class of a fine-tuned model ends, and what opens it.
_HEADS = {
    _SEQUENCE: AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
_BERT_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_PROJECTION = re.compile(r"fit_dense(s\.\d+)?\.weight")


def _check_source(source: str) -> None:
    folder = Path(source)
    if folder.is_file():
        raise InputError(f"{source} is a file: give the model folder it lies in")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{source} is no model folder: it has no config.json")
    elif folder.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise InputError(f"there is no model folder {source}: give an existing folder or a hub name")


def _find_file(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:  # not on the hub or, offline, not in the cache
        return None


def open_config(source: str) -> PreTrainedConfig:
    """Read a model's configuration; one that names no type is BERT's if it has what BERT needs.

    The TinyBERT checkpoints that the paper's authors published name none.

    Raises:
        InputError: No such folder or hub name, a damaged file, or a model that brings its own code.
    """
    _check_source(source)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
        lacking = [name for name in _BERT_FIELDS if name not in fields]
        if "model_type" in fields:
            # False, not the default None, which would ask on the terminal whether to run it.
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        elif lacking:
            # Not AutoConfig's to guess: some versions of it go by the folder's name.
            raise ValueError(
                f"config.json has no model_type and, to be BERT's, no {', '.join(lacking)}: add it"
            )
        else:
            config = BertConfig.from_pretrained(source)
    except Exception as error:  # of the network, of JSON, of the hub's and the configuration's own checks
        tried = "" if Path(source).exists() else "there is no such folder here, and as a hub name: "
        raise InputError(f"cannot open the model {source}: {tried}{one_line(error)}") from error
    if getattr(config, "auto_map", None):
        raise InputError(f"the model {source} needs code of its own, which is never run: use a stock model")
    return config


def open_tokenizer(source: str, *, kind: Kind | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer; where there is but a ``vocab.txt``, its pieces tell whether it has upper case.

    Args:
        source: A folder or a hub name.
        kind: What it is for. Where pieces hold the space before them (RoBERTa), one is put before each word
            of token_classification, which come in lists: otherwise they would run into one another.

    Raises:
        InputError: The folder has none, it cannot be read, or it has no piece for padding.
    """
    config = open_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, trust_remote_code=False, **_letter_case(source)
        )
    except Exception as error:  # tokenizers raises bare Exception on damaged files
        raise InputError(f"cannot load the tokenizer of {source}: {one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source} has no tokenizer: copy tokenizer.json or vocab.txt into the folder")
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {source} has no piece for padding: set its pad_token and save it")
    return _spaced(tokenizer, source, config) if kind == "token_classification" else tokenizer


def _spaced(
    tokenizer: PreTrainedTokenizerBase, source: str, config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    def runs_together(tokenizer: Any) -> bool:
        return "ByteLevel(add_prefix_space=False" in str(tokenizer.backend_tokenizer.pre_tokenizer)

    if runs_together(tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, trust_remote_code=False, add_prefix_space=True
        )
        if runs_together(tokenizer):
            raise InputError(
                f"the tokenizer of {source} puts no space before words: save it with add_prefix_space=True"
            )
    return tokenizer


def _letter_case(source: str) -> dict[str, bool]:
    """Say what the files of a tokenizer leave open; transformers would lower all texts."""
    if _find_file(source, "tokenizer_config.json") or _find_file(source, "tokenizer.json"):
        return {}
    vocabulary = _find_file(source, "vocab.txt")
    if vocabulary is None:
        return {}
    # Pieces such as [CLS] are upper case in every vocabulary.
    pieces = [piece for piece in vocabulary.read_text("utf-8").split() if not piece.startswith("[")]
    return {"do_lower_case": all(piece == piece.lower() for piece in pieces)}


def _load(
    auto_class: Any,
    source: str,
    config: PreTrainedConfig,
    *,
    new_head: bool = True,
    whole: bool = False,
    **kwargs: Any,
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
        raise InputError(f"cannot load the weights of {source}: {one_line(error)}") from error
    # A head may be new; an encoder with holes would train from noise without a word.
    prefix = "" if whole or model.base_model is model else model.base_model_prefix + "."
    part = "" if whole else "encoder "

    def of_encoder(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.startswith(prefix) and "pooler" not in name]

    missing = of_encoder(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of {source} lack {len(missing)} {part}tensors such as {missing[0]}")
    other = of_encoder(name for name, *_ in report["mismatched_keys"])
    if other:
        raise InputError(
            f"{len(other)} {part}tensors of {source} have other shapes than its config.json says, such as "
            f"{other[0]}: mend config.json"
        )
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
        InputError: The model has no such head.
    """
    return _open_head(source, (_SEQUENCE,))


def open_task_model(source: str) -> PreTrainedModel:
    """Load a fine-tuned model of any kind of task with its head, in float32.

    Raises:
        InputError: The model has no head of a kind that is known.
    """
    return _open_head(source, tuple(_HEADS))


def _open_head(source: str, allowed: tuple[str, ...]) -> PreTrainedModel:
    config = open_config(source)
    architectures = config.architectures or []
    for ending in allowed:
        if any(name.endswith(ending) for name in architectures):
            return _load(_HEADS[ending], source, config)
    found = ", ".join(architectures) or "no architecture"
    raise InputError(
        f"{source} has no classification head ({found}): fine-tune it first, "
        f"tinybert finetune --model {source} ..."
    )


def open_masked_lm(source: str) -> PreTrainedModel:
    """Load a model with its masked-LM head, in float32.

    Raises:
        InputError: It has no such head: the one that transformers makes up proposes noise.
    """
    return _load(AutoModelForMaskedLM, source, open_config(source), new_head=False)


def open_whole(source: str) -> PreTrainedModel:
    """Load a model with whatever head it has, in float32: as the class that its configuration names.

    Raises:
        InputError: transformers has no such class, or weights of its head are missing.
    """
    config = open_config(source)
    name = next(iter(config.architectures or ()), None)
    model_class = AutoModel if name is None else getattr(transformers, str(name), None)
    if name is not None and getattr(model_class, "config_class", None) is not type(config):
        raise InputError(
            f"{source} is to be a {name} with the configuration of {config.model_type}, and transformers has "
            "no such model: mend config.json"
        )
    return _load(model_class, source, config, whole=True)


def new_task_model(source: str, kind: Kind, label_names: tuple[str, ...]) -> PreTrainedModel:
    """Load an encoder under a head: its own where that is of these classes, else a new one.

    Args:
        source: A folder or a hub name.
        kind: What the head is for.
        label_names: A logit for each; one for a score where there are none, two for the start and the end of
            an answer.
    """
    config = open_config(source)
    has_other_classes = _has_other_classes(config, label_names)
    if kind == "question_answering":
        config.num_labels = 2
    else:
        config.id2label = dict(enumerate(label_names or ("score",)))
        config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = _PROBLEMS.get(kind)
    model = _load(_HEADS[_ENDINGS.get(kind, _SEQUENCE)], source, config, ignore_mismatched_sizes=True)
    if has_other_classes:
        for module in model.children():
            if module is not model.base_model:
                for parameter in module.parameters():
                    parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # else it is left
                module.apply(model._init_weights)
    return model


def _has_other_classes(config: PreTrainedConfig, wanted: tuple[str, ...]) -> bool:
    """Return whether a head is of other classes, or of these in another order: worse than a new one."""
    found = [name.casefold() for name in label_names(config)]
    has_names = not all(re.fullmatch(r"label_\d+", name) for name in found)
    return has_names and bool(wanted) and found != [name.casefold() for name in wanted]


def has_task(model: PreTrainedModel) -> bool:
    """Return whether a model has a head that labelled rows are for, see ``task_of``."""
    return type(model).__name__.endswith(tuple(_HEADS))


def task_of(model: PreTrainedModel) -> tuple[Kind, tuple[str, ...]]:
    """Return what a fine-tuned model does, and its class names."""
    names = label_names(model.config)
    for kind, ending in _ENDINGS.items():
        if type(model).__name__.endswith(ending):
            return kind, (names if kind == "token_classification" else ())
    if model.config.problem_type == "multi_label_classification":
        return "multi_label", names
    return ("classification" if names else "regression"), names


def read_projections(source: str, layers: int) -> list[Tensor] | None:
    """Read the projections that a checkpoint of the authors' code holds, as the published ones do.

    They lie beside the encoder: one ``fit_dense`` for all layers or, later, ``fit_denses.0`` to
    ``fit_denses.M``. Their biases are left out: equations 8 and 9 have none.

    Args:
        source: A folder or a hub name.
        layers: M, the layers of the student.

    Returns:
        W (d', d) of layers 0..M, 0 being the embeddings, in H_S W ~ H_T; None where there are none, or where
        the weights lie in several files.

    Raises:
        InputError: There are more or fewer than M + 1, or the weights cannot be read.
    """
    _check_source(source)
    try:
        weights = _read_weights(source, _PROJECTION)  # of linear layers: (d, d')
        found = {name: weight.T.float().clone() for name, weight in weights.items()}
    except Exception as error:  # as many kinds as in _load
        raise InputError(f"cannot read the projections of {source}: {one_line(error)}") from error
    shared = found.pop("fit_dense.weight", None)
    names = [f"fit_denses.{layer}.weight" for layer in range(layers + 1)]
    if not found:
        return None if shared is None else [shared] * len(names)
    if found.keys() != set(names):
        raise InputError(
            f"{source} has {len(found)} projections (fit_denses), where {layers} layers and the embeddings "
            f"need {len(names)}: it is damaged, or its config.json is of another model"
        )
    return [found[name] for name in names]


def _read_weights(source: str, wanted: re.Pattern[str]) -> dict[str, Tensor]:
    """Read some weights by their names, and as little else as the file's format allows."""
    path = _find_file(source, "model.safetensors")
    if path is not None:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in filter(wanted.fullmatch, file.keys())}
    path = _find_file(source, "pytorch_model.bin")
    if path is None:
        return {}
    # What PyTorch wrote before 1.6 (2020) is no zip file, and cannot be mapped into memory.
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {name: weights[name] for name in filter(wanted.fullmatch, weights)}


def label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return a model's class names in the order of its logits; empty for regression (one logit).

    Raises:
        InputError: They are not numbered from 0 on.
    """
    names: dict[int, str] = config.id2label  # type: ignore[assignment]
    if set(names) != set(range(len(names))):
        raise InputError(
            f"the id2label of config.json numbers {sorted(names)}, expected 0 to {len(names) - 1}"
        )
    return () if len(names) == 1 else tuple(str(names[index]) for index in range(len(names)))


def positions_of(config: PreTrainedConfig) -> int:
    """Return the longest input of a model, special pieces included.

    Raises:
        InputError: It counts positions in another way than BERT-like encoders: T5, XLNet.
    """
    longest = int(getattr(config, "max_position_embeddings", None) or 0) - first_position(config)
    if longest < 1:
        raise InputError(f"{config.model_type} has no table of positions: a BERT-like encoder is expected")
    return longest


def weights_digest(model: PreTrainedModel) -> str:
    """Return a fingerprint of a model's configuration and weights."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
