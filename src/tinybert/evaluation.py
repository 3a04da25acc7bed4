"""A model over labelled rows: its logits, its scores, and whether it knows anything at all."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.answers import best_answers, score_answers
from tinybert.capture import capture, evaluating
from tinybert.collation import MODEL_INPUTS, Collator
from tinybert.data import TaskData, encode_texts
from tinybert.entities import tag_metrics
from tinybert.errors import InputError
from tinybert.models import weights_digest
from tinybert.tasks import compute_metrics
from tinybert.token_rows import UNREAD, read_tags

logger = logging.getLogger(__name__)

_FEW_ROWS = 30  # in which another order of the labels may look better by luck


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

    Those of a head that reads each token are (tokens, C), the tokens of all rows one after another.

    Args:
        model: With a head; evaluated, on an accelerator where there is one, and left in the mode and the
            place it came in.
        rows: Tokenised rows (``tinybert.data.tokenize``); batched by length.
        tokenizer: Pads.
        batch_size: Rows a batch.
        bf16: Whether to run under bfloat16 autocast.
        description: Of the progress bar.
    """
    order = np.argsort(rows["length"], kind="stable")[::-1]
    inputs = rows.select(order).select_columns([name for name in MODEL_INPUTS if name in rows.column_names])
    loader = DataLoader(inputs, batch_size=batch_size, collate_fn=Collator(tokenizer))  # type: ignore[arg-type]
    found: list[np.ndarray] = []
    with (
        _accelerated(model),
        evaluating(model),
        torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
    ):
        for batch in tqdm(loader, desc=description, leave=False, disable=None):
            states = capture(model, batch.to(model.device), states=False, scores=False)
            logits: Any = states.logits
            if logits.ndim == 2:
                found.extend(logits.float().cpu().numpy())
            else:
                real = batch["attention_mask"].bool().cpu().numpy()
                pairs = zip(logits.float().cpu().numpy(), real, strict=True)
                found.extend(each[tokens] for each, tokens in pairs)
    rows_found = [found[place] for place in np.argsort(order)]
    return np.stack(rows_found) if rows_found[0].ndim == 1 else np.concatenate(rows_found)


@contextmanager
def _accelerated(model: PreTrainedModel) -> Iterator[None]:
    """Have a model where training would, and then again where it was."""
    home = model.device
    model.to(PartialState().device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(home)  # type: ignore[arg-type]


def logits_of_rows(logits: np.ndarray, rows: datasets.Dataset, chosen: np.ndarray) -> np.ndarray:
    """Return what ``predict_logits`` would for some of the rows, by their places (int)."""
    if len(logits) == len(rows):
        return logits[chosen]
    parts = np.split(logits, np.cumsum(np.asarray(rows["length"]))[:-1])
    return np.concatenate([parts[place] for place in chosen])


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
    """Return the rows with the teacher's logits as a column ``teacher_logits``, C or T * C numbers a row.

    Args:
        rows: Tokenised rows.
        logits: (rows, C), or (tokens, C), of ``predict_logits``.
    """
    lengths = np.ones(len(rows), np.int64) if len(logits) == len(rows) else np.asarray(rows["length"])
    ends = np.concatenate([[0], np.cumsum(lengths)]) * logits.shape[1]
    column = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(logits.ravel()))
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
    Each of several processes answers its share of the rows, and gets the answers of all.
    """
    path = folder / f"{_fingerprint(rows, model, bf16)}.npy"
    if all(gather_object([path.is_file()])):  # nodes need not share a disk
        return np.load(path, allow_pickle=False)
    processes, rank = PartialState().num_processes, PartialState().process_index
    bounds = [len(rows) * place // processes for place in range(processes + 1)]
    share = rows.select(range(bounds[rank], bounds[rank + 1]))
    found = []
    if len(share):
        name = "Teacher logits"
        found = [predict_logits(model, share, tokenizer, batch_size=batch_size, bf16=bf16, description=name)]
    logits = np.concatenate(gather_object(found))
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, logits)
    os.replace(part, path)
    return logits


def _fingerprint(rows: datasets.Dataset, model: PreTrainedModel, bf16: bool) -> str:
    digest = hashlib.blake2b(f"{weights_digest(model)} {bf16}".encode(), digest_size=16)
    for name in MODEL_INPUTS:
        if name in rows.column_names:
            for chunk in rows.with_format("arrow")[:][name].chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    digest.update(np.asarray(rows["length"]).tobytes())
    return digest.hexdigest()


def score(data: TaskData, rows: datasets.Dataset, logits: np.ndarray) -> dict[str, float]:
    """Return the task's metrics on labelled rows.

    Args:
        data: The rows.
        rows: The same, tokenised.
        logits: Of ``predict_logits``, for ``rows``.
    """
    if data.kind == "token_classification":
        return tag_metrics(*read_tags(rows, logits), data.label_names)
    if data.kind == "question_answering":
        return score_answers(best_answers(data.rows, rows, logits), data.rows["answers"])
    labels = np.asarray(data.rows["label"])
    return compute_metrics(data.kind, logits, labels, label_count=len(data.label_names) or None)


def chance_level(data: TaskData) -> tuple[str, float]:
    """Return the metric and the value that a model which knows nothing reaches on these rows.

    Classification: the accuracy of always answering the most frequent class. Regression: correlation 0.
    multi_label: the micro F1 of always answering with the most frequent labels, as many as serve it best.
    token_classification: the score of giving every word the most frequent tag, or the most frequent that
    begins an entity, whichever is better; question_answering: the F1 of answering with the whole context, or
    never, likewise.
    """
    if data.kind == "regression":
        return "pearson", 0.0
    if data.kind == "multi_label":
        shares = np.sort(np.asarray(data.rows["label"]).mean(0))[::-1]
        return "f1_micro", float((2 * shares.cumsum() / (np.arange(1, len(shares) + 1) + shares.sum())).max())
    if data.kind == "token_classification":
        gold = np.concatenate([np.asarray(row) for row in data.rows["label"]])
        counts = np.bincount(gold, minlength=len(data.label_names))
        begins = np.array([name[0] in "BSU" for name in data.label_names])  # each word an entity of its own
        lengths = [len(row) for row in data.rows["label"]]
        scores = [
            tag_metrics(np.full_like(gold, tag), gold, lengths, data.label_names)[data.metric]
            for tag in {int(counts.argmax()), int((counts * begins).argmax())}
        ]
        return data.metric, max(scores)
    if data.kind == "question_answering":
        golds = data.rows["answers"]
        constants = data.rows["context"], [""] * len(data.rows)
        return "f1", max(score_answers(constant, golds)["f1"] for constant in constants)
    _, counts = np.unique(np.asarray(data.rows["label"]), return_counts=True)
    return "accuracy", float(counts.max() / counts.sum())


def check_knowledge(
    model: str, data: TaskData, logits: np.ndarray, metrics: dict[str, float], *, force: bool
) -> None:
    """Check that a model, of which a student would learn, does better than chance, and with its own names.

    Args:
        model: What it is called.
        data: The rows it was scored on.
        logits: Its answers to them.
        metrics: Its scores.
        force: Warn where it knows nothing, instead of raising.

    Raises:
        InputError: It does not, or its classes fit the rows far better in another order.
    """
    metric, chance = chance_level(data)
    order = other_order(data, logits)
    if metrics[metric] > chance and not order:
        return
    found = f"on {data.source}: {metric} {metrics[metric]:.3f}, chance {chance:.3f}"
    if order:
        fault = f"has its labels in another order than the rows {found}; {order}: "
        fault += "mend id2label in its config.json"
    elif chance >= 1.0:
        fault = f"cannot be told from chance {found}: all rows have the same label"
    else:
        fault = f"is no better than chance {found}; check its label order and its fine-tuning"
    complaint = f"the teacher {model} {fault}"
    if not force:
        raise InputError(f"{complaint}, or add --force to go on")
    logger.warning("%s (going on, as --force says)", complaint)


def other_order(data: TaskData, logits: np.ndarray) -> str:
    """Say which of a classifier's names to exchange, where that makes it right a fifth more often."""
    names = data.label_names
    if data.kind != "classification" or logits.shape[-1] != len(names) or len(logits) < _FEW_ROWS:
        return ""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (np.asarray(data.rows["label"]), logits.argmax(1)), 1)
    gold, said = linear_sum_assignment(-counts)
    if counts[gold, said].sum() - max(counts.trace(), counts.sum(1).max()) < len(logits) / 5:
        return ""
    pairs = (
        f"{names[here]!r} is its {names[its]!r}" for here, its in zip(gold, said, strict=True) if here != its
    )
    return ", ".join(pairs)


def metrics_for_trainer(data: TaskData, rows: datasets.Dataset) -> Any:
    """Return the ``compute_metrics`` function that a ``transformers.Trainer`` calls on an evaluation.

    Args:
        data: The eval rows.
        rows: The same, tokenised.
    """

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if data.kind == "token_classification":
            read = labels != UNREAD
            return tag_metrics(logits[read].argmax(1), labels[read], read.sum(1), data.label_names)
        if data.kind == "question_answering":
            # (windows, T, 2), from transformers' own heads as two times (windows, T); padded at the end.
            both = np.stack(logits[:2], axis=-1) if isinstance(logits, tuple) else logits
            flat = np.concatenate([each[:length] for each, length in zip(both, rows["length"], strict=True)])
            return score(data, rows, flat)
        return compute_metrics(data.kind, logits, labels, label_count=len(data.label_names) or None)

    return metrics
