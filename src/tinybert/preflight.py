"""What a run will do, found out before it does it: labels, word pieces, teacher, lengths, steps, time."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.data import TaskData, find_texts, tokenize
from tinybert.errors import InputError
from tinybert.tables import Source, open_source
from tinybert.tasks import find_label_column
from tinybert.training import StagePlan
from tinybert.vocabulary import vocabulary_difference

# Of rows that are cut, the whole lengths of so many are looked at.
_SAMPLED_ROWS = 5_000
_CUT_SHARE = 0.01
_SHOWN_CLASSES = 30
_UNLIMITED = 1_000_000


@dataclass
class DryRun:
    """Whether a command only says what it would do."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Check all input, measure teacher and speed, print what would be done, and stop."},
    )


@dataclass(frozen=True)
class LabelRow:
    """One class.

    Attributes:
        number: Its place among the logits.
        name: Its name in the model.
        spellings: How the rows write it.
        counts: Training rows and eval rows that have it.
    """

    number: int
    name: str
    spellings: tuple[str, ...]
    counts: tuple[int, int]


@dataclass(frozen=True)
class Lengths:
    """Word pieces of the training rows before they are cut, special pieces included.

    Attributes:
        median: Of all rows.
        most: What 95 % of the rows do not exceed.
        longest: Of all rows, or of those looked at.
        max_length: Where rows are cut.
        cut: Share of the rows that are longer.
        proposal: The least multiple of 8 that cuts no more than 1 % of the rows, if the models read as much.
        proposal_cut: Share of the rows that it cuts.
    """

    median: int
    most: int
    longest: int
    max_length: int
    cut: float
    proposal: int
    proposal_cut: float

    def line(self) -> str:
        """Return the figures on a line."""
        return (
            f"median {self.median}, 95 % up to {self.most}, longest {self.longest} word pieces; "
            f"--max_length {self.max_length} cuts {100 * self.cut:.1f} % of the training rows"
        )

    def advice(self) -> str:
        """Return what to set ``--max_length`` to, and why."""
        found = f"--max_length {self.proposal} (cuts {100 * self.proposal_cut:.1f} %)"
        if self.cut > _CUT_SHARE and self.proposal > self.max_length:
            return f"proposed: {found}"
        if self.proposal < self.max_length:
            return f"{found} would do as well"
        return "which is fine" if self.cut <= _CUT_SHARE else "the most that these models read"


@dataclass(frozen=True)
class Preflight:
    """What was found out.

    Attributes:
        sources: What is read, a line each.
        parameters: Of each model by its part; the one that is trained is the last.
        stages: What each stage will take.
        data: Training and eval rows; None for text without labels.
        lengths: Of the training rows, in each model's word pieces by its part.
        labels: Classes as model and rows name them; empty for scores, or if nobody asked.
        vocabulary: How the word pieces of the two models compare; empty for one model.
        teacher: The metric that counts, the teacher's value and that of chance, on the eval rows.
        layers: g(1), ..., g(M), where states are compared.
        batches: What batches of like length would do to the labels; empty where nothing.
        beside: What the estimated time does not hold.
    """

    sources: tuple[str, ...]
    parameters: Mapping[str, int]
    stages: tuple[StagePlan, ...]
    data: tuple[TaskData, TaskData] | None = None
    lengths: Mapping[str, Lengths] = field(default_factory=dict)
    labels: tuple[LabelRow, ...] = ()
    vocabulary: str = ""
    teacher: tuple[str, float, float] | None = None
    layers: tuple[int, ...] = ()
    batches: str = ""
    beside: tuple[str, ...] = ()

    def text(self) -> str:
        """Return all of it, for a terminal."""
        parts = {
            "reads": list(self.sources),
            "labels": self._label_lines(*self.data) if self.data else [],
            "vocabulary": [self.vocabulary] if self.vocabulary else [],
            "teacher": [self._teacher_line()] if self.teacher else [],
            "lengths": [line for name in self.lengths for line in self._length_lines(name)],
            "batches": [self.batches] if self.batches else [],
            "layers": [self._layer_line()] if self.layers else [],
            "parameters": [self._parameter_line()],
            "steps": [f"{stage.name}: {_steps(stage)}" for stage in self.stages],
            "time": self._time_lines(),
        }
        return "\n".join(
            f"{'' if place else name:12}{line}"
            for name, lines in parts.items()
            for place, line in enumerate(lines)
        )

    def short(self) -> str:
        """Return the few lines that a run begins with."""
        lines = [self._teacher_line()] if self.teacher else []
        lines.append("; ".join(filter(None, [self._layer_line(), self._parameter_line(), self.vocabulary])))
        lines += [f"{self.lengths[name].line()}{_of(name, self.lengths)}" for name in self.lengths]
        lines += [self.batches] if self.batches else []
        steps = ", ".join(f"{stage.name} {stage.steps:,}" for stage in self.stages)
        lines.append(f"steps: {steps or 'none'}")
        return "\n".join(lines)

    def _label_lines(self, train: TaskData, held_out: TaskData) -> list[str]:
        if train.kind == "regression":
            scores = np.asarray(train.rows["label"])
            return [f"scores from {scores.min():g} to {scores.max():g}, mean {scores.mean():.2f}"]
        if train.kind == "question_answering":
            without = (sum(not golds for golds in some.rows["answers"]) for some in (train, held_out))
            return [" and ".join(f"{count:,}" for count in without) + " questions without an answer"]
        totals = [
            sum(map(len, some.rows["label"])) if train.kind == "token_classification" else len(some.rows)
            for some in (train, held_out)
        ]
        owner = "teacher's" if self.teacher else "model's"
        cells: list[tuple[str, ...]] = [
            (f"{owner} id", f"{owner} name", "in the rows", "to train on", "to choose by")
        ]
        for row in self.labels[:_SHOWN_CLASSES]:
            shares = (f"{n:,} ({100 * n / total:.1f} %)" for n, total in zip(row.counts, totals, strict=True))
            cells.append((str(row.number), row.name, " ".join(map(repr, row.spellings)) or "-", *shares))
        if not any(row.spellings for row in self.labels):  # of tags and flags nobody asked
            cells = [row[:2] + row[3:] for row in cells]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        rest = len(self.labels) - _SHOWN_CLASSES
        return [*lines, f"and {rest} more"] if rest > 0 else lines

    def _teacher_line(self) -> str:
        metric, value, chance = self.teacher or ("", 0.0, 0.0)
        return f"the teacher's {metric} is {100 * value:.2f} on the eval rows, chance {100 * chance:.2f}"

    def _length_lines(self, name: str) -> list[str]:
        lengths = self.lengths[name]
        return [f"{lengths.line()}{_of(name, self.lengths)}", lengths.advice()]

    def _layer_line(self) -> str:
        if not self.layers:
            return ""
        own = " ".join(map(str, range(1, len(self.layers) + 1)))
        return f"the student's layers {own} imitate the teacher's {' '.join(map(str, self.layers))}"

    def _parameter_line(self) -> str:
        shown = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in self.parameters.items())
        counts = list(self.parameters.values())
        fewer = f" ({counts[0] / counts[-1]:.1f} times fewer)" if len(counts) > 1 else ""
        return f"{shown}{fewer or ' parameters'}"

    def _time_lines(self) -> list[str]:
        known = [(stage, seconds) for stage in self.stages if (seconds := stage.seconds) is not None]
        if len(known) < len(self.stages):
            return []
        total = sum(seconds for _, seconds in known)
        without = f", without {' and '.join(self.beside)}" if self.beside else ""
        lines = [f"about {duration(total)}{without}: an estimate from a few real steps on this machine"]
        for stage, seconds in known:
            rest = f", {duration(stage.other_seconds)} beside the steps" if stage.other_seconds >= 1 else ""
            lines.append(f"{stage.name}: {duration(seconds)} ({stage.step_seconds:.3g} s a step{rest})")
        return lines


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _of(name: str, lengths: Mapping[str, Lengths]) -> str:
    return f" ({name}'s)" if len(lengths) > 1 else ""


def _steps(stage: StagePlan) -> str:
    if stage.epochs is None:
        return f"{stage.steps:,}"
    return f"{stage.steps:,} in {stage.epochs:g} epoch" + ("s" if stage.epochs != 1 else "")


def label_rows(
    data: tuple[TaskData, TaskData],
    sources: tuple[str, str],
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> tuple[LabelRow, ...]:
    """Return each class with the labels of the rows that were matched to it; empty for scores.

    Args:
        data: Training and eval rows.
        sources: What they were read from.
        text_columns: As they were read.
        label_column: Likewise.
    """
    if not data[0].label_names:
        return ()
    spelled: dict[int, set[str]] = {}
    if data[0].kind == "classification":
        for rows, source, split in zip(data, sources, ("train", "validation"), strict=True):
            for number, text in _spellings(rows, open_source(source, split), text_columns, label_column):
                spelled.setdefault(number, set()).add(text)
    counts = np.stack([_counts(rows) for rows in data], axis=1)
    return tuple(
        LabelRow(number, name, tuple(sorted(spelled.get(number, ()))), (int(taught), int(choosing)))
        for number, (name, (taught, choosing)) in enumerate(zip(data[0].label_names, counts, strict=True))
    )


def _counts(data: TaskData) -> np.ndarray:
    if data.kind == "token_classification":
        return np.bincount(np.concatenate(data.rows["label"][:]), minlength=len(data.label_names))
    labels = np.asarray(data.rows["label"])
    if data.kind == "multi_label":
        return labels.sum(0).astype(int)
    return np.bincount(labels, minlength=len(data.label_names))


def _spellings(
    data: TaskData, opened: Source, text_columns: Sequence[str] | None, label_column: str | None
) -> set[tuple[int, str]]:
    """Return the classes (ids) of rows, each with the labels that stand in the file."""
    texts, _ = find_texts(opened, text_columns)
    column = find_label_column(opened.schema.names, label_column, texts, True, opened.origin)
    found, start = set(), 0
    for table in opened.tables(1 << 16):
        cells = pc.utf8_trim_whitespace(table.column(column).cast(pa.string()))
        encoded = cells.combine_chunks().dictionary_encode()
        ids = np.asarray(data.rows[start : start + len(cells)]["label"])
        pairs = np.unique(np.stack([ids, encoded.indices.to_numpy()]), axis=1)
        found |= {(int(number), encoded.dictionary[int(code)].as_py()) for number, code in pairs.T}
        start += len(cells)
    return found


def measure_lengths(
    data: TaskData,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    positions: int,
) -> Lengths:
    """Return how long rows are, and what ``--max_length`` would suit them.

    Args:
        data: The rows.
        rows: Their tokens, cut at ``max_length``.
        tokenizer: Who made them.
        max_length: Where they were cut.
        positions: The most that the models read.
    """
    lengths = np.asarray(rows["length"])
    full = np.flatnonzero(lengths >= max_length)
    if len(full) and data.kind != "question_answering":  # of which windows read all
        sampled = np.random.Generator(np.random.PCG64(0)).permutation(full)[:_SAMPLED_ROWS]
        # Another tokenizer object: how this one cuts is a part of it, and is saved with the student.
        whole = tokenize(replace(data, rows=data.rows.select(sampled)), copy.deepcopy(tokenizer), _UNLIMITED)
        lengths[full] = np.resize(np.asarray(whole["length"]), len(full))
    wanted = int(np.ceil(np.quantile(lengths, 1 - _CUT_SHARE, method="inverted_cdf") / 8) * 8)
    proposal = min(wanted, positions)
    return Lengths(
        int(np.median(lengths)),
        int(np.quantile(lengths, 0.95, method="inverted_cdf")),
        int(lengths.max()),
        max_length,
        float((lengths > max_length).mean()),
        proposal,
        float((lengths > proposal).mean()),
    )


def check_ids(name: str, model: PreTrainedModel, rows: datasets.Dataset) -> None:
    """Check that a model has an embedding for every piece of its rows.

    Raises:
        InputError: It has not: training would end in the middle, at the first such piece.
    """
    cells = rows.with_format("arrow")[:]["input_ids"]
    largest, size = max(pc.max(chunk.flatten()).as_py() for chunk in cells.chunks), model.config.vocab_size
    if largest >= size:
        raise InputError(
            f"the tokenizer of the {name} makes the id {largest}, and the model has {size} embeddings: they "
            "do not belong together; put the tokenizer into its folder that it was trained with"
        )


def row_lines(train: TaskData, held_out: TaskData) -> tuple[str, str]:
    """Say where rows come from and how many they are."""
    return (
        f"{len(train.rows):,} rows to train on: {train.source}",
        f"{len(held_out.rows):,} rows to choose the checkpoint by: {held_out.source}",
    )


def compare_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """Say in a line whether two models read the same word pieces."""
    difference = vocabulary_difference(student, teacher)
    if difference is None:
        return f"{len(teacher.get_vocab()):,} word pieces, the same in both models, piece by piece"
    return (
        f"student and teacher have {difference}: each reads its own tokens, and predictions alone are taught"
    )
