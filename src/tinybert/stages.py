"""The stages that make a model: fine-tune a teacher, distil a student from it, evaluate either."""

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tinybert import models
from tinybert.closed_form import check_solvable, solve_student
from tinybert.data import TaskData, load_data, tokenize
from tinybert.errors import InputError
from tinybert.evaluation import (
    cached_logits,
    chance_level,
    metrics_for_trainer,
    predict_logits,
    score,
    with_teacher_logits,
)
from tinybert.objective import DistillationLoss
from tinybert.run_directory import Figures, Result, Run, file_size
from tinybert.student import Start, StudentSize, calibration_rows, make_student, padded_batches
from tinybert.tasks import Kind
from tinybert.trainer import DistillationConfig, DistillationTrainer
from tinybert.training import EncoderTrainer, TrainingConfig

logger = logging.getLogger(__name__)

STAGES = ("intermediate", "prediction")


@dataclass
class DataArguments:
    """Which rows, and how they are read."""

    train: str = field(
        metadata={"help": "Training rows: CSV, TSV, JSON(L), Parquet, a GLUE folder or a hub name."}
    )
    eval: str = field(metadata={"help": "Rows that choose the checkpoint, in the same form."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns; found by the usual names unless given."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Label column; found by the usual names unless given."}
    )
    kind: Kind | None = field(
        default=None, metadata={"help": "classification or regression; told by the labels unless given."}
    )
    max_length: int = field(default=128, metadata={"help": "Word pieces a row, special ones included."})


@dataclass
class FinetuneArguments(DataArguments):
    """What to fine-tune."""

    model: str = field(kw_only=True, metadata={"help": "Encoder to fine-tune: a folder or a hub name."})


@dataclass
class DistillArguments(DataArguments):
    """Who teaches whom, and how long each stage lasts."""

    teacher: str = field(kw_only=True, metadata={"help": "Fine-tuned teacher: a folder or a hub name."})
    student: str | None = field(
        default=None, metadata={"help": "Student to start from: a folder or hub name; built unless given."}
    )
    layers: int = field(default=4, metadata={"help": "Layers of a student that is built."})
    hidden_size: int = field(default=312, metadata={"help": "Its hidden size."})
    intermediate_size: int = field(default=1200, metadata={"help": "Its feed-forward size."})
    heads: int | None = field(default=None, metadata={"help": "Its attention heads; the teacher's number."})
    init: Start = field(
        default="closed_form",
        metadata={"help": "Where a built student starts: solved from the teacher, copied layers, or random."},
    )
    intermediate_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs on hidden states and attention; 1 after a closed form, else 5; 0: none."},
    )
    intermediate_learning_rate: float = field(default=3e-4, metadata={"help": "Its peak learning rate."})
    prediction_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs on the teacher's soft labels; 2 after a closed form, else 3; 0: none."},
    )
    prediction_learning_rate: float = field(default=1e-4, metadata={"help": "Its peak learning rate."})
    force: bool = field(default=False, metadata={"help": "Distil from a teacher no better than chance."})

    def __post_init__(self) -> None:
        """Settle how long the stages last; refuse what would silently train nothing."""
        solved = self.student is None and self.init == "closed_form"
        if self.intermediate_epochs is None:
            self.intermediate_epochs = 1.0 if solved else 5.0
        if self.prediction_epochs is None:
            self.prediction_epochs = 2.0 if solved else 3.0
        epochs = (self.intermediate_epochs, self.prediction_epochs)
        if min(epochs) < 0 or max(epochs) == 0:
            raise InputError(
                f"got {epochs[0]} intermediate and {epochs[1]} prediction epochs: neither may be negative, "
                "and one must be above 0 for anything to be trained"
            )


@dataclass
class EvaluateArguments:
    """What to score, and on what."""

    model: str = field(metadata={"help": "Fine-tuned or distilled model: a folder or a hub name."})
    data: str = field(metadata={"help": "Labelled rows: CSV, TSV, JSON(L), Parquet, GLUE folder, hub name."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two text columns."})
    label_column: str | None = field(default=None, metadata={"help": "Label column."})
    max_length: int = field(default=128, metadata={"help": "Word pieces a row, special ones included."})
    batch_size: int = field(default=64, metadata={"help": "Rows a forward pass."})


def finetune(arguments: FinetuneArguments, config: TrainingConfig) -> Result:
    """Fine-tune an encoder on labelled rows: a teacher, or a baseline that has none.

    Trains on the gold labels, keeps the checkpoint that is best on the eval rows, and fills the run
    directory ``config.output_dir``.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
    """
    if config.num_train_epochs <= 0 and config.max_steps <= 0:
        raise InputError(
            f"--num_train_epochs is {config.num_train_epochs}, so nothing would be trained: give more than 0"
        )
    run = Run(config, arguments, inputs=[arguments.model, arguments.train, arguments.eval])
    tokenizer = models.open_tokenizer(arguments.model)
    train, held_out = _load_rows(arguments)
    set_seed(config.seed)
    model = models.new_classifier(arguments.model, train.label_names)
    max_length = _checked_length(arguments.max_length, model)
    train_rows, eval_rows = (tokenize(data, tokenizer, max_length) for data in (train, held_out))
    run.claim()
    trainer = EncoderTrainer(
        model=model,
        args=run.stage_config("finetune", config, best=train.metric),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_for_trainer(train),
    )
    run.train("finetune", trainer)
    metrics = score(held_out, predict_logits(model, eval_rows, tokenizer, description="Evaluating"))
    figures = Figures("model", metrics, model.num_parameters(), file_size(model), run.seconds())
    return run.finish(model, tokenizer, train.metric, (figures,), _provenance(train, held_out))


def distill_task(arguments: DistillArguments, config: DistillationConfig) -> Result:
    """Distil a fine-tuned teacher into a small student: task-specific distillation, section 3.2 of the paper.

    First the intermediate stage (embeddings, hidden states and attention scores; no label is read), then
    the prediction stage (the teacher's soft labels), each with its own epochs and learning rate; the best
    prediction checkpoint on the eval rows fills the run directory ``config.output_dir``.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
    """
    inputs = [arguments.teacher, arguments.student or "", arguments.train, arguments.eval]
    run = Run(config, arguments, inputs=filter(None, inputs))
    intermediate, prediction = _stage_configs(arguments, config)
    teacher = models.open_classifier(arguments.teacher)
    tokenizer = models.open_tokenizer(arguments.teacher)
    train, held_out = _load_rows(arguments, teacher)
    student = _open_student(arguments, config, teacher, tokenizer)
    max_length = _checked_length(arguments.max_length, teacher, student)
    rows = tuple(tokenize(data, tokenizer, max_length) for data in (train, held_out))
    teacher_logits = predict_logits(teacher, rows[1], tokenizer, description="Teacher")
    teacher_metrics = _check_teacher(arguments, held_out, score(held_out, teacher_logits))
    work = _Distillation(run, teacher, student, tokenizer, *rows)
    objective = intermediate.objective(student, teacher) if arguments.intermediate_epochs else None
    prediction_objective = prediction.objective(student, teacher, kind=train.kind)
    run.claim()
    if not run.restore("intermediate", student):
        if arguments.student is None and arguments.init == "closed_form":
            work.solve(config, held_out, objective)
        if objective is not None:
            work.intermediate(intermediate, objective)
    if arguments.prediction_epochs:
        work.prediction(prediction, prediction_objective, train, teacher_logits)
    metrics = score(held_out, predict_logits(student, rows[1], tokenizer, description="Student"))
    figures = (
        Figures("teacher", teacher_metrics, teacher.num_parameters(), file_size(teacher)),
        Figures("student", metrics, student.num_parameters(), file_size(student), run.seconds()),
    )
    return run.finish(student, tokenizer, train.metric, figures, _provenance(train, held_out))


@dataclass(frozen=True)
class _Distillation:
    """The three steps of one run, over the same models and rows."""

    run: Run
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    eval_rows: Dataset

    def solve(
        self, config: DistillationConfig, held_out: TaskData, objective: DistillationLoss | None
    ) -> None:
        """Start the student in closed form, on a sample of the training texts."""
        started = time.monotonic()
        batches = padded_batches(calibration_rows(self.train_rows, seed=config.seed), self.tokenizer)
        layer_map = config.layers_of_teacher(self.student, self.teacher)
        solved = solve_student(self.teacher, self.student, batches, layer_map, seed=config.seed)
        if objective is not None:
            objective.start_projections(solved.projections)
        logits = predict_logits(self.student, self.eval_rows, self.tokenizer, description="Solved student")
        self.run.stages["closed_form"] = {
            "seconds": round(time.monotonic() - started, 1),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "hidden_errors": solved.hidden_errors,
            "metrics": score(held_out, logits),
        }

    def intermediate(self, config: DistillationConfig, objective: DistillationLoss) -> None:
        """Train embeddings, hidden states and attention scores; no label is read."""
        trainer = DistillationTrainer(
            self.student.base_model,
            self.teacher,
            self.run.stage_config("intermediate", config, best="loss"),
            objective,
            train_dataset=self.train_rows,
            eval_dataset=self.eval_rows,
            data_collator=DataCollatorWithPadding(self.tokenizer),
        )
        self.run.train("intermediate", trainer)
        self.run.keep("intermediate", self.student)

    def prediction(
        self,
        config: DistillationConfig,
        objective: DistillationLoss,
        train: TaskData,
        teacher_logits: np.ndarray,
    ) -> None:
        """Train on the teacher's logits, which are computed once; keep the best checkpoint by the metric."""
        train_logits = cached_logits(
            self.teacher,
            self.train_rows,
            self.tokenizer,
            self.run.folder / "teacher_logits",
            batch_size=config.per_device_eval_batch_size,
            bf16=bool(config.bf16),
        )
        trainer = DistillationTrainer(
            self.student,
            None,
            self.run.stage_config("prediction", config, best=train.metric),
            objective,
            train_dataset=with_teacher_logits(self.train_rows, train_logits),
            eval_dataset=with_teacher_logits(self.eval_rows, teacher_logits),
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=metrics_for_trainer(train),
        )
        self.run.train("prediction", trainer)


def evaluate(arguments: EvaluateArguments) -> dict[str, float]:
    """Score a fine-tuned or distilled model on labelled rows, in float32; labels are matched by name.

    Raises:
        InputError: The model or the rows cannot be read, or their labels do not fit.
    """
    model = models.open_classifier(arguments.model)
    tokenizer = models.open_tokenizer(arguments.model)
    kind, names = _classes(model)
    rows = load_data(
        arguments.data,
        split="validation",
        text_columns=arguments.text_columns,
        label_column=arguments.label_column,
        kind=kind,
        label_names=names or None,
    )
    tokens = tokenize(rows, tokenizer, _checked_length(arguments.max_length, model))
    return score(rows, predict_logits(model, tokens, tokenizer, batch_size=arguments.batch_size))


def _load_rows(arguments: DataArguments, teacher: PreTrainedModel | None = None) -> tuple[TaskData, TaskData]:
    """Read the training and the eval rows; the teacher's classes are the classes where there is one."""
    kind, names = _classes(teacher) if teacher is not None else (arguments.kind, ())
    if arguments.kind not in (None, kind):
        raise InputError(f"the teacher does {kind}, but --kind {arguments.kind} was given: leave it out")
    columns: dict[str, Any] = {
        "text_columns": arguments.text_columns,
        "label_column": arguments.label_column,
    }
    train = load_data(arguments.train, split="train", kind=kind, label_names=names or None, **columns)
    names = train.label_names
    if train.kind == "classification" and len(names) < 2:
        raise InputError(f"{arguments.train} has one class only, {names[0]!r}: there is nothing to learn")
    held_out = load_data(
        arguments.eval, split="validation", kind=train.kind, label_names=names or None, **columns
    )
    return train, held_out


def _classes(model: PreTrainedModel) -> tuple[Kind, tuple[str, ...]]:
    names = models.label_names(model.config)
    return ("classification" if names else "regression"), names


def _open_student(
    arguments: DistillArguments,
    config: DistillationConfig,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    if arguments.student is None:
        size = StudentSize(
            arguments.layers, arguments.hidden_size, arguments.intermediate_size, arguments.heads
        )
        # A closed form overwrites a random student once the output folder is claimed.
        init: Start = "copy" if arguments.init == "copy" else "random"
        student = make_student(
            teacher, size, init=init, layer_map=config.mapping_strategy(), seed=config.seed
        )
        if arguments.init == "closed_form":
            check_solvable(teacher, student, config.layers_of_teacher(student, teacher))
        return student
    models.check_vocabularies(models.open_tokenizer(arguments.student), tokenizer)
    set_seed(config.seed)
    student = models.new_classifier(arguments.student, models.label_names(teacher.config))
    if student.config.hidden_size > teacher.config.hidden_size:
        raise InputError(
            f"the student {arguments.student} is {student.config.hidden_size} wide, more than the teacher's "
            f"{teacher.config.hidden_size}: take a narrower student"
        )
    return student


def _stage_configs(
    arguments: DistillArguments, config: DistillationConfig
) -> tuple[DistillationConfig, DistillationConfig]:
    """Return the arguments of both stages: their own epochs and rate, and the losses they are about."""
    for name in ("num_train_epochs", "learning_rate"):
        if getattr(config, name) != TrainingConfig.__dataclass_fields__[name].default:
            both = " and ".join(f"--{stage}_{name.removeprefix('num_train_')}" for stage in STAGES)
            raise InputError(f"--{name} has no meaning with two stages: use {both}")
    intermediate = replace(
        config,
        num_train_epochs=arguments.intermediate_epochs or 0.0,
        learning_rate=arguments.intermediate_learning_rate,
        prediction_weight=0.0,
        gold_weight=0.0,
    )
    prediction = replace(
        config,
        num_train_epochs=arguments.prediction_epochs or 0.0,
        learning_rate=arguments.prediction_learning_rate,
        embedding_weight=0.0,
        hidden_weight=0.0,
        attention_weight=0.0,
    )
    return intermediate, prediction


def _checked_length(max_length: int, *readers: PreTrainedModel) -> int:
    """Return ``max_length`` after checking that every model has that many positions."""
    for reader in readers:
        positions = reader.config.max_position_embeddings
        padding = (
            reader.config.pad_token_id if reader.config.model_type in ("roberta", "xlm-roberta") else None
        )
        positions -= 0 if padding is None else padding + 1  # RoBERTa counts positions from there
        if not 3 <= max_length <= positions:
            raise InputError(f"--max_length is {max_length}: it must be from 3 to {positions} here")
    return max_length


def _check_teacher(
    arguments: DistillArguments, data: TaskData, metrics: dict[str, float]
) -> dict[str, float]:
    metric, chance = chance_level(data)
    if metrics[metric] > chance:
        return metrics
    complaint = (
        f"the teacher {arguments.teacher} is no better than chance on {arguments.eval}: {metric} "
        f"{metrics[metric]:.3f}, chance {chance:.3f}; check its label order and its fine-tuning"
    )
    if not arguments.force:
        raise InputError(f"{complaint}, or add --force to go on")
    logger.warning("%s (going on, as --force says)", complaint)
    return metrics


def _provenance(train: TaskData, held_out: TaskData) -> dict[str, dict[str, str]]:
    return {
        name: {"source": data.source, "rows": str(data.rows.num_rows), "fingerprint": data.fingerprint}
        for name, data in (("train", train), ("eval", held_out))
    }
