"""A model over labelled rows: its logits, its scores, and whether it knows anything at all."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from scipy.special import softmax
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from tinybert.capture import capture, evaluating
from tinybert.data import TaskData, encode_texts
from tinybert.models import weights_digest
from tinybert.tasks import compute_metrics

_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def predict_logits(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    description: str = "predict",
) -> np.ndarray:
    """Return a model's logits (rows, C) as float32, in the order of the rows.

    Args:
        model: With a head; evaluated and left in the mode it came in.
        rows: Tokenised rows (``tinybert.data.tokenize``); batched by length.
        tokenizer: Pads.
        batch_size: Rows a batch.
        bf16: Whether to run under bfloat16 autocast.
        description: Of the progress bar.
    """
    order = np.argsort(rows["length"], kind="stable")[::-1]
    inputs = rows.select(order).select_columns([name for name in _MODEL_INPUTS if name in rows.column_names])
    loader = DataLoader(inputs, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    found = []
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for batch in tqdm(loader, desc=description, leave=False, disable=None):
            states = capture(model, batch.to(model.device), states=False, scores=False)
            found.append(states.logits.float().cpu().numpy())  # type: ignore[union-attr]
    by_length = np.concatenate(found)
    logits = np.empty_like(by_length)
    logits[order] = by_length
    return logits


def class_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, ...]],
    max_length: int,
) -> np.ndarray:
    """Return a classifier's probabilities (rows, C) for texts, or for pairs of them."""
    texts, *pairs = (list(column) for column in zip(*rows, strict=True))
    encoded = encode_texts(tokenizer, texts, pairs[0] if pairs else None, max_length)
    logits = predict_logits(model, datasets.Dataset.from_dict(encoded), tokenizer, description="Teacher")
    return softmax(logits, axis=1)


def with_teacher_logits(rows: datasets.Dataset, logits: np.ndarray) -> datasets.Dataset:
    """Return the rows with the teacher's logits (rows, C) as a column ``teacher_logits``."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1])
    return rows.add_column("teacher_logits", column)  # type: ignore[arg-type]


def cached_logits(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    batch_size: int = 64,
    bf16: bool = False,
) -> np.ndarray:
    """Return ``predict_logits`` of a teacher, computed once and kept in a folder.

    The file is named after everything the logits depend on: the weights and the configuration, the
    tokens, the precision. A changed teacher never meets stale logits; an unchanged one is not run again.
    """
    path = folder / f"{_fingerprint(rows, model, bf16)}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    logits = predict_logits(
        model, rows, tokenizer, batch_size=batch_size, bf16=bf16, description="Teacher logits"
    )
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, logits)
    os.replace(part, path)
    return logits


def _fingerprint(rows: datasets.Dataset, model: PreTrainedModel, bf16: bool) -> str:
    digest = hashlib.blake2b(f"{weights_digest(model)} {bf16}".encode(), digest_size=16)
    for name in _MODEL_INPUTS:
        if name in rows.column_names:
            for chunk in rows.with_format("arrow")[:][name].chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    digest.update(np.asarray(rows["length"]).tobytes())
    return digest.hexdigest()


def _metrics(data: TaskData, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return compute_metrics(data.kind, logits, labels, label_count=len(data.label_names) or None)


def score(data: TaskData, logits: np.ndarray) -> dict[str, float]:
    """Return the task's metrics for logits (rows, C) on labelled rows."""
    return _metrics(data, logits, np.asarray(data.rows["label"]))


def chance_level(data: TaskData) -> tuple[str, float]:
    """Return the metric and the value that a model which knows nothing reaches on these rows.

    Classification: the accuracy of always answering the most frequent class. Regression: correlation 0.
    multi_label: the micro F1 of always answering with the most frequent labels, as many as serve it best.
    """
    if data.kind == "regression":
        return "pearson", 0.0
    if data.kind == "multi_label":
        shares = np.sort(np.asarray(data.rows["label"]).mean(0))[::-1]
        return "f1_micro", float((2 * shares.cumsum() / (np.arange(1, len(shares) + 1) + shares.sum())).max())
    _, counts = np.unique(np.asarray(data.rows["label"]), return_counts=True)
    return "accuracy", float(counts.max() / counts.sum())


def metrics_for_trainer(data: TaskData) -> Any:
    """Return the ``compute_metrics`` function that a ``transformers.Trainer`` calls on an evaluation."""
    return lambda prediction: _metrics(data, prediction.predictions, prediction.label_ids)
