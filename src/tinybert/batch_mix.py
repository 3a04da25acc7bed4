"""Whether batches of like length still mix the labels: where they do not, training can fall apart."""

from collections.abc import Sequence

import numpy as np

from tinybert.collation import PER_TOKEN
from tinybert.data import TaskData
from tinybert.training import TrainingConfig

# Of real sets of sentences and pairs, batches of like length explain 6 % of the labels at the most.
_TOLD_SHARE = 0.25


def check_batches(data: TaskData, lengths: Sequence[int] | np.ndarray, config: TrainingConfig) -> str:
    """Say so where a label goes with the length, so that batches of like length have like labels.

    Each step would then pull towards the one label and the next away from it; such training falls apart.

    Args:
        data: Training rows.
        lengths: Their tokens; those of windows of rows tell nothing here.
        config: How batches are made.
    """
    budget = config.tokens_per_batch
    sorts = budget is not None or config.train_sampling_strategy == "group_by_length"
    if not sorts or data.kind in PER_TOKEN or len(lengths) != len(data.rows):
        return ""
    size = config.train_batch_size if budget is None else max(1, budget // int(np.median(lengths)))
    share = label_share(np.asarray(data.rows["label"]), lengths, size)
    if share < _TOLD_SHARE:
        return ""
    without = "" if budget is None else "leave --tokens_per_batch out and "
    return (
        f"batches of like length explain {100 * share:.0f} % of the labels, so each has mostly one label, "
        f"which can break training: {without}add --train_sampling_strategy random"
    )


def label_share(labels: np.ndarray, lengths: Sequence[int] | np.ndarray, size: int) -> float:
    """Return the share of the labels' variance that is between batches of like length, beyond chance.

    That is the adjusted R^2 of the labels (as 0 and 1, one number a class) by batch: 1 where every batch
    has a single label, near 0 where lengths tell nothing.

    Args:
        labels: Class ids (rows,), flags (rows, C), taken as one class a combination, or scores (rows,), taken
            as ten classes.
        lengths: Tokens of each row.
        size: Rows of a batch.
    """
    if labels.dtype.kind == "f" and labels.ndim == 1:
        labels = np.searchsorted(np.quantile(labels, np.linspace(0.1, 0.9, 9)), labels)
    _, classes = np.unique(labels, axis=0, return_inverse=True)
    rows = len(classes)
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(rows)  # as are rows of one length
    by_length = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
    batches = np.arange(rows) // size
    pairs, counts = np.unique(np.stack([batches, classes[by_length]]), axis=1, return_counts=True)
    at_random = (np.bincount(classes) ** 2).sum() / rows
    within = rows - (counts**2 / np.bincount(batches)[pairs[0]]).sum()
    free = rows - batches[-1] - 1
    if free == 0 or at_random == rows:
        return 0.0
    return float(1 - within / (rows - at_random) * (rows - 1) / free)
