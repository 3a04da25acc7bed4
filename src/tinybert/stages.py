"""The stages that make a model: fine-tune a teacher, distil a student from it, evaluate either."""

import logging
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tinybert import models
from tinybert.augment import AugmentSettings
from tinybert.augment_files import AugmentArguments, AugmentJob
from tinybert.baselines import BaselineArguments, last_objective, settle_baseline
from tinybert.closed_form import solve_student
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
from tinybert.rows import DataArguments, checked_length, classes, load_rows, provenance
from tinybert.run_directory import Figures, Result, Run, file_size
from tinybert.run_report import Comparison, publish
from tinybert.student import (
    StudentArguments,
    begin_student,
    calibration_rows,
    fit_projections,
    padded_batches,
    tokenizer_of_student,
)
from tinybert.trainer import DistillationConfig, DistillationTrainer
from tinybert.training import EncoderTrainer, TrainingConfig

logger = logging.getLogger(__name__)

STAGES = ("intermediate", "prediction")


@dataclass
class FinetuneArguments(DataArguments):
    """What to fine-tune."""

    model: str = field(kw_only=True, metadata={"help": "Encoder to fine-tune: a folder or a hub name."})


@dataclass
class DistillArguments(DataArguments, StudentArguments, AugmentSettings, BaselineArguments):
    """Who teaches whom, how long each stage lasts, and whether the rows are augmented."""

    teacher: str = field(kw_only=True, metadata={"help": "Fine-tuned teacher: a folder or a hub name."})
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
    augment: bool = field(
        default=False, metadata={"help": "Train on augmented rows: --masked_lm, --word_vectors, --copies ..."}
    )
    augmented: str | None = field(
        default=None, metadata={"help": "Train on these rows, made by tinybert augment, in place of --train."}
    )

    def __post_init__(self) -> None:
        """Settle how long the stages last; refuse what would silently do nothing."""
        super().__post_init__()
        if not self.augment and (self.masked_lm or self.word_vectors or self.keep_if_teacher_agrees):
            raise InputError(
                "--masked_lm, --word_vectors and --keep_if_teacher_agrees are for --augment true: add it"
            )
        if self.augment and self.augmented:
            raise InputError("--augment makes rows and --augmented names some ready made: give one of them")
        if self.intermediate_epochs is None:
            self.intermediate_epochs = 1.0 if self.is_solved else 5.0
        if self.prediction_epochs is None:
            self.prediction_epochs = 2.0 if self.is_solved else 3.0
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
    label_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of 0 and 1, a label each."}
    )
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
    train, held_out = load_rows(arguments)
    set_seed(config.seed)
    model = models.new_classifier(
        arguments.model, train.label_names, is_multi_label=train.kind == "multi_label"
    )
    max_length = checked_length(arguments.max_length, model)
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
    return run.finish(model, tokenizer, train.metric, (figures,), provenance(train=train, eval=held_out))


def distill_task(arguments: DistillArguments, config: DistillationConfig) -> Result:
    """Distil a fine-tuned teacher into a small student: task-specific distillation, section 3.2 of the paper.

    First the intermediate stage (embeddings, hidden states and attention scores; no label is read), then
    the prediction stage (the teacher's soft labels), each with its own epochs and learning rate; the best
    prediction checkpoint on the eval rows fills the run directory ``config.output_dir``. A baseline
    (``tinybert.baselines``) has one stage, as long as both.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
    """
    inputs = [arguments.teacher, arguments.student or "", arguments.train, arguments.eval]
    run = Run(config, arguments, inputs=filter(None, inputs))
    arguments, config = settle_baseline(arguments, config)
    intermediate, prediction = _stage_configs(arguments, config)
    teacher = models.open_classifier(arguments.teacher)
    teacher_tokenizer = models.open_tokenizer(arguments.teacher)
    compares_tokens = bool(arguments.intermediate_epochs) or arguments.baseline == "pkd"
    tokenizer = tokenizer_of_student(arguments, teacher_tokenizer, compares_tokens=compares_tokens)
    train, held_out = load_rows(arguments, teacher)
    names = models.label_names(teacher.config)
    student = begin_student(
        arguments,
        teacher,
        lambda source: models.new_classifier(source, names, is_multi_label=train.kind == "multi_label"),
        layer_map=config.mapping_strategy(),
        seed=config.seed,
    )
    max_length = checked_length(arguments.max_length, teacher, student)
    rows = tuple(tokenize(data, tokenizer, max_length) for data in (train, held_out))
    teacher_rows = tokenize(held_out, teacher_tokenizer, max_length)  # mostly the same, from the cache
    teacher_logits = predict_logits(teacher, teacher_rows, teacher_tokenizer, description="Teacher")
    _check_teacher(arguments, held_out, score(held_out, teacher_logits))
    taught_on = _TaughtRows(arguments, config, train)
    objective = intermediate.objective(student, teacher) if arguments.intermediate_epochs else None
    last = last_objective(arguments, prediction, student, teacher, train.kind)
    first = last if objective is None else objective
    run.claim()
    taught = taught_on.rows(run.folder)
    taught_rows = rows[0] if taught is train else tokenize(taught, tokenizer, max_length)
    teacher_rows = tokenize(taught, teacher_tokenizer, max_length)
    work = _Distillation(
        run, teacher, student, teacher_tokenizer, tokenizer, teacher_rows, taught_rows, rows[1]
    )
    if not run.restore("intermediate", student):
        if arguments.is_solved:
            work.solve(config, rows[0], held_out, first)
        elif arguments.student is not None and first.reads_states:
            work.fit(config, rows[0], first)
        if objective is not None:
            work.intermediate(intermediate, objective)
    if arguments.prediction_epochs:
        work.prediction(arguments.baseline or "prediction", prediction, last, train, teacher_logits)
    data = provenance(train=train, eval=held_out) | ({} if taught is train else provenance(augmented=taught))
    logits = predict_logits(student, rows[1], tokenizer, description="Student")
    tokenizers = (teacher_tokenizer, tokenizer)
    compared = Comparison(held_out, teacher, student, tokenizers, teacher_logits, logits)
    return publish(run, compared, train.metric, data, made_by=arguments.made_by)


class _TaughtRows:
    """The rows a student is taught on: those given, or augmented ones; bad input is found when it is made."""

    def __init__(self, arguments: DistillArguments, config: DistillationConfig, train: TaskData) -> None:
        self._arguments, self._train = arguments, train
        self._ready = None if arguments.augmented is None else self._load(arguments.augmented)
        self._job = None
        if arguments.augment:
            names = {entry.name for entry in fields(AugmentArguments)} & {
                entry.name for entry in fields(arguments)
            }
            settings = {name: getattr(arguments, name) for name in names}
            self._job = AugmentJob(
                AugmentArguments(
                    **settings, data=arguments.train, output="augmented.parquet", seed=config.seed
                )
            )

    def _load(self, path: str) -> TaskData:
        return load_data(
            path,
            split="train",
            text_columns=self._arguments.text_columns,
            label_column=self._arguments.label_column,
            label_columns=self._arguments.label_columns,
            kind=self._train.kind,
            label_names=self._train.label_names or None,
            name=self._arguments.train,
        )

    def rows(self, folder: Path) -> TaskData:
        """Return the rows; make them in the run directory where none with the same settings are there."""
        if self._job is None:
            return self._ready or self._train
        path = folder / "augmented" / f"{self._job.fingerprint}.parquet"
        if not path.exists():
            self._job.write(path)
        self._job = None  # its models are not needed any more
        return self._load(str(path))


@dataclass(frozen=True)
class _Distillation:
    """The three steps of one run, over the same models and rows, in the tokens of each model."""

    run: Run
    teacher: PreTrainedModel
    student: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    tokenizer: PreTrainedTokenizerBase
    teacher_rows: Dataset
    train_rows: Dataset
    eval_rows: Dataset

    def solve(
        self, config: DistillationConfig, rows: Dataset, held_out: TaskData, objective: DistillationLoss
    ) -> None:
        """Start the student in closed form, on a sample of rows as they were before augmentation."""
        started = time.monotonic()
        batches = padded_batches(calibration_rows(rows, seed=config.seed), self.tokenizer)
        layer_map = config.layers_of_teacher(self.student, self.teacher)
        solved = solve_student(self.teacher, self.student, batches, layer_map, seed=config.seed)
        objective.start_projections(solved.projections)
        logits = predict_logits(self.student, self.eval_rows, self.tokenizer, description="Solved student")
        self.run.stages["closed_form"] = {
            "seconds": round(time.monotonic() - started, 1),
            "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
            "hidden_errors": solved.hidden_errors,
            "metrics": score(held_out, logits),
        }

    def fit(self, config: DistillationConfig, rows: Dataset, objective: DistillationLoss) -> None:
        """Fit the projections of a student that was given, on a like sample."""
        batches = padded_batches(calibration_rows(rows, seed=config.seed), self.tokenizer)
        layer_map = config.layers_of_teacher(self.student, self.teacher)
        objective.start_projections(fit_projections(self.student, self.teacher, batches, layer_map))

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
        stage: str,
        config: DistillationConfig,
        objective: DistillationLoss,
        train: TaskData,
        teacher_logits: np.ndarray,
    ) -> None:
        """Train on labels, soft ones or gold; keep the best checkpoint by the metric.

        The teacher's logits are computed once, unless its states are read, too, or nothing of it is.
        """
        rows, eval_rows = self.train_rows, self.eval_rows
        if objective.reads_teacher and not objective.reads_states:
            train_logits = cached_logits(
                self.teacher,
                self.teacher_rows,
                self.teacher_tokenizer,
                self.run.folder / "teacher_logits",
                batch_size=config.per_device_eval_batch_size,
                bf16=bool(config.bf16),
            )
            rows = with_teacher_logits(rows, train_logits)
            eval_rows = with_teacher_logits(eval_rows, teacher_logits)
        trainer = DistillationTrainer(
            self.student,
            self.teacher if objective.reads_states else None,
            self.run.stage_config(stage, config, best=train.metric),
            objective,
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=metrics_for_trainer(train),
        )
        self.run.train(stage, trainer)


def evaluate(arguments: EvaluateArguments) -> dict[str, float]:
    """Score a fine-tuned or distilled model on labelled rows, in float32; labels are matched by name.

    Raises:
        InputError: The model or the rows cannot be read, or their labels do not fit.
    """
    model = models.open_classifier(arguments.model)
    tokenizer = models.open_tokenizer(arguments.model)
    kind, names = classes(model)
    rows = load_data(
        arguments.data,
        split="validation",
        text_columns=arguments.text_columns,
        label_column=arguments.label_column,
        label_columns=arguments.label_columns,
        kind=kind,
        label_names=names or None,
    )
    tokens = tokenize(rows, tokenizer, checked_length(arguments.max_length, model))
    return score(rows, predict_logits(model, tokens, tokenizer, batch_size=arguments.batch_size))


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


def _check_teacher(arguments: DistillArguments, data: TaskData, metrics: dict[str, float]) -> None:
    metric, chance = chance_level(data)
    if metrics[metric] > chance:
        return
    complaint = (
        f"the teacher {arguments.teacher} is no better than chance on {arguments.eval}: {metric} "
        f"{metrics[metric]:.3f}, chance {chance:.3f}; check its label order and its fine-tuning"
    )
    if not arguments.force:
        raise InputError(f"{complaint}, or add --force to go on")
    logger.warning("%s (going on, as --force says)", complaint)
