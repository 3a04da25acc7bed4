"""One distillation whose input has been opened and checked: how its student starts, and its two stages."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.batch_mix import check_batches
from tinybert.closed_form import solve_student
from tinybert.collation import Collator
from tinybert.data import TaskData, tokenize
from tinybert.evaluation import (
    cached_logits,
    chance_level,
    logits_of_rows,
    metrics_for_trainer,
    predict_logits,
    score,
    with_teacher_logits,
)
from tinybert.models import positions_of
from tinybert.objective import DistillationLoss
from tinybert.preflight import Preflight, compare_vocabularies, measure_lengths, row_lines
from tinybert.run_directory import Run
from tinybert.student import StudentArguments, calibration_rows, fit_projections, padded_batches
from tinybert.trainer import DistillationConfig, DistillationTrainer
from tinybert.training import plan_stage


@dataclass(frozen=True)
class Distillation:
    """Two models over the same rows, in the tokens of each.

    Attributes:
        run: Where it happens.
        teacher: Fine-tuned.
        student: Whose start is still to be made, unless it came ready.
        teacher_tokenizer: The teacher's.
        tokenizer: The student's; mostly the same.
        max_length: Where rows are cut.
        stride: By how much windows of a context overlap.
        data: Training and eval rows as they were given.
        calibration: The training rows in the student's tokens, before augmentation.
        teacher_rows: The rows that are taught on, in the teacher's tokens.
        train_rows: The same rows in the student's.
        eval_rows: Eval rows in the student's.
        teacher_logits: The teacher's answers on the eval rows.
        config: The arguments of the run, and of either stage.
        objective: The loss of the intermediate stage; None where there is no such stage.
        prediction_objective: The loss of the prediction stage, or of the baseline in its place.
        last_stage: What that stage is called.
    """

    run: Run
    teacher: PreTrainedModel
    student: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stride: int | None
    data: tuple[TaskData, TaskData]
    calibration: Dataset
    teacher_rows: Dataset
    train_rows: Dataset
    eval_rows: Dataset
    teacher_logits: np.ndarray
    config: DistillationConfig
    intermediate_config: DistillationConfig
    prediction_config: DistillationConfig
    objective: DistillationLoss | None
    prediction_objective: DistillationLoss
    last_stage: str = "prediction"

    @property
    def reads_one_vocabulary(self) -> bool:
        """Whether both models read the same tokens."""
        return self.tokenizer is self.teacher_tokenizer

    @property
    def reads_logits_alone(self) -> bool:
        """Whether the last stage reads of the teacher its logits and no more: they are computed once."""
        objective, epochs = self.prediction_objective, self.prediction_config.num_train_epochs
        return bool(epochs) and objective.reads_teacher and not objective.reads_states

    def taught_on(self, rows: TaskData) -> "Distillation":
        """Return the same distillation on other training rows."""
        own = tokenize(rows, self.tokenizer, self.max_length, self.stride)
        if self.reads_one_vocabulary:
            return replace(self, train_rows=own, teacher_rows=own)
        teacher_rows = tokenize(rows, self.teacher_tokenizer, self.max_length, self.stride)
        return replace(self, train_rows=own, teacher_rows=teacher_rows)

    def on_few(self, run: Run, rows: np.ndarray, eval_rows: np.ndarray) -> "Distillation":
        """Return the same distillation in another run, on some of its rows (int)."""
        return replace(
            self,
            run=run,
            teacher_rows=self.teacher_rows.select(rows),
            train_rows=self.train_rows.select(rows),
            eval_rows=self.eval_rows.select(eval_rows),
            teacher_logits=logits_of_rows(self.teacher_logits, self.eval_rows, eval_rows),
        )

    def start(self, arguments: StudentArguments) -> None:
        """Give the student, and the projections where states are compared, what they start with."""
        first = self.prediction_objective if self.objective is None else self.objective
        if arguments.is_solved:
            self._solve(first)
        elif arguments.student is not None and first.reads_states:
            layers = self.config.layers_of_teacher(self.student, self.teacher)
            projections = fit_projections(self.student, self.teacher, self._calibration_batches(), layers)
            first.start_projections(projections)

    def _calibration_batches(self) -> list[Any]:
        return padded_batches(calibration_rows(self.calibration, seed=self.config.seed), self.tokenizer)

    def _solve(self, objective: DistillationLoss) -> None:
        """Start the student in closed form, on a sample of rows as they were before augmentation."""
        started = time.monotonic()
        batches = self._calibration_batches()
        layers = self.config.layers_of_teacher(self.student, self.teacher)
        solved = solve_student(self.teacher, self.student, batches, layers, seed=self.config.seed)
        objective.start_projections(solved.projections)
        logits = predict_logits(self.student, self.eval_rows, self.tokenizer, description="Solved student")
        self.run.stages["closed_form"] = {
            "seconds": round(time.monotonic() - started, 1),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "hidden_errors": solved.hidden_errors,
            "metrics": score(self.data[1], self.eval_rows, logits),
        }

    def intermediate(self) -> None:
        """Train embeddings, hidden states and attention scores, if any is asked for; no label is read."""
        if self.objective is None:
            return
        trainer = DistillationTrainer(
            self.student.base_model,
            self.teacher,
            self.run.stage_config("intermediate", self.intermediate_config, best="loss"),
            self.objective,
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            data_collator=Collator(self.tokenizer, self.data[0].kind),
        )
        self.run.train("intermediate", trainer)
        self.run.keep("intermediate", self.student)

    def prediction(self) -> None:
        """Train on labels, soft ones or gold, if that is asked for; keep the best checkpoint by the metric.

        The teacher's logits are computed once, unless its states are read, too, or nothing of it is.
        """
        config, train = self.prediction_config, self.data[0]
        if not config.num_train_epochs:
            return
        rows, eval_rows = self.train_rows, self.eval_rows
        if self.reads_logits_alone:
            rows = with_teacher_logits(rows, self.taught_logits())
            eval_rows = with_teacher_logits(eval_rows, self.teacher_logits)
        trainer = DistillationTrainer(
            self.student,
            self.teacher if self.prediction_objective.reads_states else None,
            self.run.stage_config(self.last_stage, config, best=train.metric),
            self.prediction_objective,
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=Collator(self.tokenizer, self.data[0].kind),
            compute_metrics=metrics_for_trainer(self.data[1], eval_rows),
        )
        self.run.train(self.last_stage, trainer)

    def taught_logits(self) -> np.ndarray:
        """Return the teacher's answers (rows, C) on the rows that are taught on, computed once."""
        config = self.prediction_config
        return cached_logits(
            self.teacher,
            self.teacher_rows,
            self.teacher_tokenizer,
            self.run.folder / "teacher_logits",
            batch_size=config.per_device_eval_batch_size,
            bf16=bool(config.bf16),
        )

    def preflight(self, *, copies: int = 0) -> Preflight:
        """Return what has been found out so far, steps counted and nothing timed.

        Args:
            copies: Of each row that augmentation is going to make, at the most.
        """
        metric, chance = chance_level(self.data[1])
        cut = self.max_length, min(positions_of(model.config) for model in (self.teacher, self.student))
        lengths = {"student": measure_lengths(self.data[0], self.calibration, self.tokenizer, *cut)}
        if not self.reads_one_vocabulary:
            own = tokenize(self.data[0], self.teacher_tokenizer, self.max_length, self.stride)
            lengths["teacher"] = measure_lengths(self.data[0], own, self.teacher_tokenizer, *cut)
        taught = np.tile(self.train_rows["length"], 1 + copies)
        stages = {"intermediate": self.intermediate_config, self.last_stage: self.prediction_config}
        return Preflight(
            row_lines(*self.data),
            {"teacher": self.teacher.num_parameters(), "student": self.student.num_parameters()},
            tuple(
                plan_stage(name, config, taught) for name, config in stages.items() if config.num_train_epochs
            ),
            data=self.data,
            lengths=lengths,
            vocabulary=compare_vocabularies(self.tokenizer, self.teacher_tokenizer),
            teacher=(metric, score(self.data[1], self.eval_rows, self.teacher_logits)[metric], chance),
            layers=self.objective.layer_map if self.objective is not None else (),
            batches=check_batches(self.data[0], self.calibration["length"], self.prediction_config),
        )
