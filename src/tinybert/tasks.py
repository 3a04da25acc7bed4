"""The tasks that are known by name (GLUE), what labels mean, and how predictions are scored."""

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tinybert.errors import InputError

logger = logging.getLogger(__name__)

Kind = Literal["classification", "regression", "multi_label", "token_classification", "question_answering"]


@dataclass(frozen=True)
class Task:
    """What is known of a task before its data is read.

    Attributes:
        name: The hub's name in lower case, such as ``"sst2"``.
        text_columns: One column, or the two of a sentence pair, as the hub names them.
        kind: Classification or regression.
        metric: The key of `compute_metrics` that chooses the best checkpoint.
        label_names: The class names in the order of their ids; empty for regression.
        archive_columns: The text columns as GLUE's own files name them, where that is another way.
    """

    name: str
    text_columns: tuple[str, ...]
    kind: Kind
    metric: str
    label_names: tuple[str, ...] = ()
    archive_columns: tuple[str, ...] = ()


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")

# Columns and class order: the hub's nyu-mll/glue. Metrics: Wang et al. 2018 (GLUE), section 3, where a task
# with two metrics (MRPC, QQP, STS-B) is scored by their mean.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), "classification", "matthews", ("unacceptable", "acceptable")),
        Task("sst2", ("sentence",), "classification", "accuracy", ("negative", "positive")),
        Task(
            "mrpc",
            _PAIR,
            "classification",
            "accuracy_f1",
            ("not_equivalent", "equivalent"),
            ("#1 String", "#2 String"),
        ),
        Task("stsb", _PAIR, "regression", "pearson_spearman"),
        Task(
            "qqp", ("question1", "question2"), "classification", "accuracy_f1", ("not_duplicate", "duplicate")
        ),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            "classification",
            "accuracy",
            ("entailment", "neutral", "contradiction"),
            _PAIR,
        ),
        Task("qnli", ("question", "sentence"), "classification", "accuracy", _ENTAILS),
        Task("rte", _PAIR, "classification", "accuracy", _ENTAILS),
        Task("wnli", _PAIR, "classification", "accuracy", ("not_entailment", "entailment")),
    )
}
# gold_label before label: where both are there (SNLI, MNLI's own files), the first is the agreed one.
_LABELS = ("gold_label", "label", "labels", "target", "class", "category", "score", "rating", "sentiment")
_ENDING = re.compile(r"\.(csv|tsv|jsonl?|parquet)(\.gz)?$", re.IGNORECASE)


def find_task(source: str) -> Task | None:
    """The GLUE task that a name, a hub name, a folder or a file path speaks of.

    Only the last part of the path (less a data ending) or the folder that holds it counts, and only as a
    whole: ``"SST-2"``, ``"glue/STS-B/train.tsv"``, ``"mrpc.csv"``, but not ``"cola_drinks.csv"``.

    Args:
        source: A name or path; case and punctuation do not matter.

    Returns:
        The task, or ``None``.
    """
    parts = [part for part in re.split(r"[/\\]", source) if part][-2:]
    for part in reversed(parts):
        plain = re.sub(r"[^a-z0-9]", "", _ENDING.sub("", part).lower())
        # The hub has MNLI's two halves as configurations of their own.
        name = "mnli" if plain in ("mnlimatched", "mnlimismatched") else plain
        if name in GLUE:
            return GLUE[name]
    return None


def find_label_column(
    names: Sequence[str], given: str | None, texts: tuple[str, ...], required: bool, origin: str
) -> str | None:
    """The column that holds the label, or ``None``.

    Args:
        names: All columns.
        given: The user's choice, which wins over the usual names.
        texts: The columns that hold the text.
        required: Whether it is an error that there is none.
        origin: What has these columns, for messages.

    Raises:
        InputError: The given column is missing, or a required one is.
    """
    rest = [name for name in names if name not in texts]
    if given is not None:
        if given not in rest:
            raise InputError(
                f"{origin} has no label column {given!r}; beside the text it has {listed(rest)}: "
                "mend --label_column"
            )
        return given
    lower = {name.lower().strip(): name for name in reversed(rest)}
    for usual in (*_LABELS, "is_duplicate", "quality"):  # of QQP and MRPC
        if usual in lower:
            return lower[usual]
    if required:
        raise InputError(f"{origin} has no usual label column; it has {listed(names)}: give --label_column C")
    return None


def read_labels(
    values: Sequence[str],
    kind: Kind | None,
    given: Sequence[str] | None,
    known: Sequence[str],
    where: Callable[[str], str],
) -> tuple[Kind, tuple[str, ...], list[float]]:
    """Tell what the different labels of a data set mean.

    For classification the names are ``given``, else ``known``, else the labels themselves, sorted. Labels are
    matched by name, exactly or whatever their case; a number by its value, as 1.0 is the name 1. Where they
    are not all names but all integers, and the names are words, they are ids: of ``known`` if any of its
    names is in ``given`` (so a teacher with another order of classes is met by name), else of ``given`` as it
    stands. Where the names are numbers an integer is no id, unless ``known`` says so.

    Args:
        values: The labels as text, each once.
        kind: If ``None``, numbers that are not all integers mean regression, all else classification.
        given: The class names that ids must refer to, such as a teacher's, in the order of their ids.
        known: The class names of the data's own ids, if the source tells them; may be empty.
        where: From a label to the words that begin an error message about it.

    Returns:
        The kind, the class names (empty for regression), and for each value its id or its number.

    Raises:
        InputError: A label is not a number (regression, or most are fractions) or not a known class.
    """
    numbers = [_number(value) for value in values]
    integers = [int(number) for number in numbers if number is not None and number.is_integer()]
    all_integers = len(integers) == len(values)
    if kind is None:
        # One odd cell among scores makes no classes of them.
        fractions = sum(number is not None and not number.is_integer() for number in numbers)
        mostly_scores = fractions > len(values) / 2 and not (given or known)
        kind = "regression" if mostly_scores or (fractions and None not in numbers) else "classification"
    if kind == "regression":
        if None in numbers:
            odd = where(values[numbers.index(None)])
            raise InputError(
                f"{odd} is not a number, but the task is regression: correct it, "
                "or give --kind classification"
            )
        return kind, (), [number for number in numbers if number is not None]
    names = tuple(given or known)
    if not names:
        # As numbers, "10" comes after "9".
        names = tuple(map(str, sorted(set(integers)))) if all_integers else tuple(sorted(values))
        values = [str(number) for number in integers] if all_integers else values
        warn_of_case(names, where)
    ids = _ids_of_integers(integers, names, known) if all_integers else _places(values, names)
    if None in ids:
        advice = "correct it, or use a model whose id2label has it"
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            advice = f"write labels as 0 to {len(names) - 1}, or name the classes in the model's id2label"
        unknown = where(values[ids.index(None)])
        raise InputError(f"{unknown} is not one of the known labels {listed(names)}: {advice}")
    return kind, names, [float(place) for place in ids if place is not None]


def warn_of_case(names: Sequence[str], where: Callable[[str], str]) -> None:
    """Say so where names that are classes of their own differ by nothing but letter case."""
    folded = Counter(name.casefold() for name in names)
    alike = [name for name in names if folded[name.casefold()] > 1]
    if alike:
        logger.warning(
            "%s differs from another by letter case alone (%s): each is a class of its own; write those that "
            "mean the same alike",
            where(alike[0]),
            listed(alike),
        )


def _places(values: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return the place of each value among names: exact, else whatever its case."""
    exact = {name: place for place, name in reversed(list(enumerate(names)))}
    folded = {name.casefold(): place for place, name in reversed(list(enumerate(names)))}
    return [exact.get(value, folded.get(value.casefold())) for value in values]


def _ids_of_integers(integers: Sequence[int], names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Return which classes integers mean: those that have them for names, or whose ids they are."""
    if any(map(_is_number, names)) and not any(map(_is_number, known)):
        return _places(list(map(str, integers)), names)
    found = _places(known, names)
    meant = list(range(len(names))) if found.count(None) == len(found) else found
    return [meant[number] if 0 <= number < len(meant) else None for number in integers]


def _is_number(text: str) -> bool:
    return _number(text) is not None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


_MAIN_METRICS = {
    "classification": "accuracy",
    "regression": "pearson_spearman",
    "multi_label": "f1_micro",
    "token_classification": "f1",
    "question_answering": "f1",
}


def main_metric(kind: Kind, task: Task | None) -> str:
    """The key of `evaluation.score` that chooses the best checkpoint.

    Args:
        kind: What the labels are.
        task: The known task, or ``None``; ignored where its kind is another one.

    Returns:
        The task's own metric; else ``"accuracy"``, ``"pearson_spearman"``, ``"f1_micro"`` or ``"f1"``.
    """
    return task.metric if task is not None and task.kind == kind else _MAIN_METRICS[kind]


def compute_metrics(
    kind: Kind, predictions: np.ndarray, labels: np.ndarray, *, label_count: int | None = None
) -> dict[str, float]:
    """Score predictions against labels, one of each a row.

    - classification: ``accuracy``; ``f1`` (two classes: of class 1; more: macro, the plain mean over the
      classes that occur); ``accuracy_f1``, their mean; ``matthews``, the correlation coefficient.
    - regression: ``pearson``, ``spearman``, ``pearson_spearman`` (their mean), ``mse``.
    - multi_label, a logit above 0 counting as yes: ``f1_micro`` over all answers, ``f1_macro``, the mean over
      the labels, ``accuracy``, the share of rows with every answer right.

    A correlation that is undefined (all predictions equal, one example) counts 0.0, as GLUE's scorers do.

    Args:
        kind: What the labels are.
        predictions: Logits (N, C), or scores (N,) or (N, 1) for regression.
        labels: Class ids (N,), scores (N,), or zeros and ones (N, C) for multi_label.
        label_count: The number of classes where it is not C; decides only what ``f1`` means.

    Returns:
        Name to value, plain finite floats.

    Raises:
        InputError: Nothing to score, lengths or shapes that do not fit, or numbers that are not finite.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if kind == "regression":
        predictions = predictions.reshape(-1) if predictions.shape[1:] == (1,) else predictions
        labels = labels.reshape(-1) if labels.shape[1:] == (1,) else labels
    dimensions, shapes = {
        "classification": ((2, 1), "(N, classes) and (N,)"),
        "regression": ((1, 1), "(N,) and (N,)"),
        "multi_label": ((2, 2), "(N, labels) twice"),
    }[kind]
    fits = (predictions.ndim, labels.ndim) == dimensions and len(predictions) == len(labels)
    if not fits or predictions.size == 0 or (kind == "multi_label" and predictions.shape != labels.shape):
        raise InputError(
            f"cannot score predictions of shape {predictions.shape} against labels of shape {labels.shape}: "
            f"expected {shapes} with N at least 1"
        )
    # An infinite logit still has a place in the order; an infinite score has no error that can be averaged.
    broken = ~np.isfinite(predictions) if kind == "regression" else np.isnan(predictions)
    if broken.any() or not np.isfinite(labels).all():
        raise InputError(
            "cannot score NaN or infinity: the model's outputs or the labels are not finite numbers; if "
            "training diverged, lower the learning rate"
        )
    with warnings.catch_warnings():  # scipy and sklearn warn of constant inputs, which are answered here
        warnings.simplefilter("ignore")
        if kind == "classification":
            return _classification(predictions.argmax(1), labels, label_count or predictions.shape[1])
        if kind == "multi_label":
            return _multi_label(predictions > 0, labels > 0.5)
        return _regression(predictions.astype(np.float64), labels.astype(np.float64))


def _classification(predicted: np.ndarray, labels: np.ndarray, label_count: int) -> dict[str, float]:
    accuracy = float(accuracy_score(labels, predicted))
    if label_count == 2:
        f1 = float(f1_score(labels == 1, predicted == 1, zero_division=0))
    else:
        f1 = float(f1_score(labels, predicted, average="macro", zero_division=0))
    return {
        "accuracy": accuracy,
        "f1": f1,
        "accuracy_f1": (accuracy + f1) / 2,
        "matthews": float(np.nan_to_num(matthews_corrcoef(labels, predicted))),
    }


def _multi_label(answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "accuracy": float((answers == labels).all(1).mean()),
        "f1_micro": float(f1_score(labels, answers, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(labels, answers, average="macro", zero_division=0)),
    }


def _regression(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    # scipy's answer for a constant is NaN, or noise where the mean is not exact: decide before asking it.
    constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
    pearson = 0.0 if constant else float(np.nan_to_num(pearsonr(predicted, labels).statistic))
    spearman = 0.0 if constant else float(np.nan_to_num(spearmanr(predicted, labels).statistic))
    return {
        "pearson": pearson,
        "spearman": spearman,
        "pearson_spearman": (pearson + spearman) / 2,
        "mse": float(np.mean((predicted - labels) ** 2)),
    }


def listed(names: Sequence[str]) -> str:
    """Names for a one-line message: quoted, and no more than twenty of them."""
    shown = ", ".join(repr(name[:60]) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
