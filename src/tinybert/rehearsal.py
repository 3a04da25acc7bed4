"""A run that takes a few real steps of each stage, to tell how long it will last, and leaves nothing."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from tinybert.run_directory import Config, Run
from tinybert.sampling import TokenBatchSampler
from tinybert.training import EncoderTrainer, StagePlan, TrainingConfig

# Steps that are timed; one before them warms up.
STEPS = 5
_EVALUATED_BATCHES = 3
# transformers sorts this many batches at a time by length.
_GROUPED_BATCHES = 50


@dataclass(frozen=True)
class Pace:
    """How fast a stage is: seconds of a batch's step, and of evaluating a row."""

    step: float
    evaluated_row: float


class Rehearsal(Run):
    """A ``Run`` in a folder that will be gone, whose stages last a few steps.

    Attributes:
        paces: What was measured, a stage each.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        """Take the place of a run that was checked."""
        super().__init__(replace(run.config, output_dir=str(folder), resume_from_checkpoint=None), None, ())
        self.paces: dict[str, Pace] = {}

    def stage_config(self, stage: str, config: Config, *, best: str | None) -> Config:
        """Return arguments for a few steps in the order of the rows, with nothing kept or logged."""
        return replace(
            config,
            output_dir=str(self.stage_folder(stage)),
            max_steps=STEPS + 1,
            gradient_accumulation_steps=1,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

    def train(self, stage: str, trainer: EncoderTrainer) -> None:
        """Time a few steps, and the evaluation of what eval rows there are."""
        clock = _Clock()
        trainer.add_callback(clock)
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.train()
        row_seconds = 0.0
        rows: Any = trainer.eval_dataset
        if rows is not None:
            started = time.monotonic()
            trainer.evaluate()
            row_seconds = (time.monotonic() - started) / len(rows)
        self.paces[stage] = Pace(clock.seconds_of_a_step(), row_seconds)

    def timed(
        self,
        plan: StagePlan,
        config: TrainingConfig,
        eval_rows: int,
        *,
        evaluations: int | None = None,
        before: float = 0.0,
    ) -> StagePlan:
        """Return a stage's plan with its time.

        Args:
            plan: The stage's steps.
            config: Its arguments.
            eval_rows: Rows that are evaluated each time.
            evaluations: How often they are; after each epoch unless given.
            before: Seconds that the stage takes before its first step.
        """
        pace = self.paces[plan.name]
        if evaluations is None:
            evaluations = math.ceil(plan.epochs or 0)
        other = before + evaluations * eval_rows * pace.evaluated_row
        return replace(plan, step_seconds=pace.step * config.gradient_accumulation_steps, other_seconds=other)

    def keep(self, stage: str, model: PreTrainedModel) -> None:
        """Keep nothing."""


class _Clock(TrainerCallback):
    """Notes when steps end; what is read between them counts to the step after."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.monotonic())

    def seconds_of_a_step(self) -> float:
        return float(np.diff(self.ends).mean())


@contextmanager
def rehearsal(run: Run) -> Iterator[Rehearsal]:
    """Yield a rehearsal of a run; its folder is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="tinybert-rehearsal-") as folder:
        yield Rehearsal(run, Path(folder))


def few_train_rows(
    config: TrainingConfig, lengths: Sequence[int] | np.ndarray, count: int = STEPS
) -> np.ndarray:
    """Return the rows (int) of a few whole batches that stand for all of an epoch.

    First a batch of middling size, to warm up; then ``count`` others, from those with the fewest tokens to
    those with the most, padding counted, at even distances in rank: their mean is the mean of all.
    """
    lengths = np.asarray(lengths)
    order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(lengths))
    size = config.train_batch_size * config.world_size
    if config.tokens_per_batch is not None:
        batches = [np.array(rows) for rows in TokenBatchSampler(lengths, config.tokens_per_batch, 0)]
    else:
        if config.train_sampling_strategy == "group_by_length":
            group = _GROUPED_BATCHES * size
            parts = [order[start : start + group] for start in range(0, len(order), group)]
            order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
        whole = len(order) // size * size or len(order)  # a batch that is not full would shift those after it
        batches = np.split(order[:whole], range(size, whole, size))
    batches.sort(key=lambda rows: len(rows) * lengths[rows].max())
    places = ((np.arange(count) + 0.5) / count * len(batches)).astype(int)
    return np.concatenate([batches[place] for place in (len(batches) // 2, *places)])


def few_eval_rows(config: TrainingConfig, count: int) -> np.ndarray:
    """Return some of so many eval rows (int), at even distances: a few batches of them."""
    return np.linspace(0, count - 1, min(count, _EVALUATED_BATCHES * config.eval_batch_size)).astype(int)
