"""The stages that make a model: fine-tune a teacher, distil a student from it, evaluate either."""

import logging
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from tinybert import models
from tinybert.augment_files import AugmentArguments, AugmentJob
from tinybert.baselines import last_objective, settle_baseline
from tinybert.collation import PER_TOKEN
from tinybert.data import TaskData, load_data, tokenize
from tinybert.distill_arguments import DistillArguments as DistillArguments
from tinybert.distillation import Distillation
from tinybert.errors import InputError, check_least, refuse_given
from tinybert.evaluation import check_knowledge, predict_logits, score
from tinybert.export import ExportArguments, to_onnx
from tinybert.finetuning import FinetuneArguments, prepare_finetuning
from tinybert.json_files import check_writable, write_json
from tinybert.preflight import LabelRow, Preflight, check_ids, label_rows
from tinybert.rehearsal import few_eval_rows, few_train_rows, rehearsal
from tinybert.rows import (
    MAX_LENGTH_HELP,
    STRIDE_HELP,
    DataArguments,
    check_held_out,
    load_rows,
    provenance,
    row_length,
    rows_to_score,
)
from tinybert.run_directory import Figures, Result, Run, file_size
from tinybert.run_report import Comparison, publish
from tinybert.sessions import check_installed
from tinybert.student import begin_student, tokenizer_of_student
from tinybert.trainer import DistillationConfig
from tinybert.training import TrainingConfig

logger = logging.getLogger(__name__)

STAGES = ("intermediate", "prediction")
OF_ONE_STAGE = ("num_train_epochs", "learning_rate")


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
    max_length: int | None = field(default=None, metadata={"help": MAX_LENGTH_HELP})
    stride: int | None = field(default=None, metadata={"help": STRIDE_HELP})
    batch_size: int = field(default=64, metadata={"help": "Rows a forward pass."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to as well."})

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: There would be no batch.
        """
        check_least(self, {"batch_size": 1})


def finetune(arguments: FinetuneArguments, config: TrainingConfig) -> Result:
    """Fine-tune an encoder on labelled rows: a teacher, or a baseline that has none.

    Trains on the gold labels, keeps the checkpoint that is best on the eval rows, and fills the run
    directory ``config.output_dir``.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
    """
    job = prepare_finetuning(arguments, config)
    _announce(job.run, job.preflight())
    job.run.claim()
    job.train()
    train, held_out = job.data
    logits = predict_logits(job.model, job.eval_rows, job.tokenizer, description="Evaluating")
    metrics = score(held_out, job.eval_rows, logits)
    figures = Figures("model", metrics, job.model.num_parameters(), file_size(job.model), job.run.seconds())
    data = provenance(train=train, eval=held_out)
    return job.run.finish(job.model, job.tokenizer, train.metric, (figures,), data)


def preflight_finetune(arguments: FinetuneArguments, config: TrainingConfig) -> Preflight:
    """Find out what ``finetune`` would do, a few steps taken to measure its time; nothing is written.

    Raises:
        InputError: As ``finetune`` does before it trains.
    """
    job = prepare_finetuning(arguments, config)
    found = job.preflight()
    with rehearsal(job.run) as run:
        rows = few_train_rows(config, job.train_rows["length"])
        eval_rows = few_eval_rows(config, len(job.eval_rows))
        few = replace(job, train_rows=job.train_rows.select(rows), eval_rows=job.eval_rows.select(eval_rows))
        replace(few, run=run).train()
    stages = tuple(run.timed(plan, config, len(job.eval_rows)) for plan in found.stages)
    return replace(found, stages=stages, labels=_labels(arguments, job.data))


def distill_task(arguments: DistillArguments, config: DistillationConfig) -> Result:
    """Distil a fine-tuned teacher into a small student: task-specific distillation, section 3.2 of the paper.

    First the intermediate stage (embeddings, hidden states and attention scores; no label is read), then
    the prediction stage (the teacher's soft labels), each with its own epochs and learning rate; the best
    prediction checkpoint on the eval rows fills the run directory ``config.output_dir``. A student with
    other word pieces than its teacher's has the prediction stage alone, and each model reads its own. A
    baseline (``tinybert.baselines``) has one stage, as long as both.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
        Rejected: The 8-bit file of ``onnx`` lost too much, or the 32-bit one does not answer as PyTorch does;
            the student is in its place.
    """
    job = _prepare_distillation(arguments, config)
    train, held_out = job.data
    taught_on = _TaughtRows(arguments, config, job.data, job.max_length)
    _announce(job.run, job.taught_on(taught_on.known()).preflight(copies=taught_on.copies))
    job.run.claim()
    taught = taught_on.rows(job.run.folder)
    job = job.taught_on(taught)
    if not job.run.restore("intermediate", job.student):
        job.start(arguments)
        job.intermediate()
    job.prediction()
    data = provenance(train=train, eval=held_out) | ({} if taught is train else provenance(augmented=taught))
    logits = predict_logits(job.student, job.eval_rows, job.tokenizer, description="Student")
    tokenizers = (job.teacher_tokenizer, job.tokenizer)
    compared = Comparison(
        held_out, job.eval_rows, job.teacher, job.student, tokenizers, job.teacher_logits, logits
    )
    files = _export_arguments(arguments, job.max_length)
    export = partial(_export, files) if arguments.onnx else None
    return publish(job.run, compared, train.metric, data, made_by=arguments.made_by, export=export)


def _export_arguments(arguments: DistillArguments, max_length: int | None) -> ExportArguments:
    """Return how a student is exported: both files scored on the eval rows, cut at ``max_length``."""
    read = ("text_columns", "label_column", "label_columns", "stride")
    columns = {name: getattr(arguments, name) for name in read} | {"max_length": max_length}
    return ExportArguments("", int8=True, check=arguments.eval, max_drop=arguments.max_drop, **columns)


def _export(arguments: ExportArguments, student: Path) -> str:
    """Write a student's ONNX files; return what they are.

    Raises:
        Rejected: See ``to_onnx``.
    """
    return to_onnx(replace(arguments, model=str(student))).table()


def preflight_distill(arguments: DistillArguments, config: DistillationConfig) -> Preflight:
    """Find out what ``distill_task`` would do, a few steps taken to measure its time; nothing is written.

    Raises:
        InputError: As ``distill_task`` does before it trains.
    """
    job = _prepare_distillation(arguments, config)
    taught_on = _TaughtRows(arguments, config, job.data, job.max_length)
    job = job.taught_on(taught_on.known())
    found = job.preflight(copies=taught_on.copies)
    rows = few_train_rows(config, job.train_rows["length"])
    with rehearsal(job.run) as run:
        few = job.on_few(run, rows, few_eval_rows(config, len(job.eval_rows)))
        few.intermediate()
        started = time.monotonic()
        if few.reads_logits_alone:
            few.taught_logits()
        share = sum(few.teacher_rows["length"]) / sum(job.teacher_rows["length"]) / (1 + taught_on.copies)
        before = {job.last_stage: (time.monotonic() - started) / share}
        few.prediction()
    count = len(job.eval_rows)
    parts = {"the closed-form start": arguments.is_solved, "augmentation": arguments.augment}
    beside = [name for name, comes in (parts | {"ONNX": arguments.onnx}).items() if comes]
    stages = (run.timed(plan, config, count, before=before.get(plan.name, 0.0)) for plan in found.stages)
    return replace(
        found,
        stages=tuple(stages),
        labels=_labels(arguments, job.data),
        beside=tuple(beside),
    )


def _announce(run: Run, preflight: Preflight) -> None:
    if run.is_main:
        logger.info("%s", preflight.short())


def _labels(arguments: DataArguments, data: tuple[TaskData, TaskData]) -> tuple[LabelRow, ...]:
    sources = arguments.train, arguments.eval
    return label_rows(data, sources, arguments.text_columns, arguments.label_column)


def _prepare_distillation(arguments: DistillArguments, config: DistillationConfig) -> Distillation:
    """Open and check everything, and let the teacher answer the eval rows; nothing is written."""
    if arguments.onnx:
        check_installed()
        _export_arguments(arguments, None)  # what it refuses is refused before the training
    inputs = [arguments.teacher, arguments.student or "", arguments.train, arguments.eval]
    run = Run(config, arguments, inputs=filter(None, inputs))
    arguments, config = settle_baseline(arguments, config)
    intermediate, prediction = _stage_configs(arguments, config)
    teacher = models.open_task_model(arguments.teacher)
    kind, names = models.task_of(teacher)
    if kind == "regression":
        refuse_given(config, ["temperature"], "where the teacher's answer is a score")
    teacher_tokenizer = models.open_tokenizer(arguments.teacher, kind=kind)
    compares_tokens = bool(arguments.intermediate_epochs) or arguments.baseline == "pkd" or kind in PER_TOKEN
    tokenizer = tokenizer_of_student(arguments, teacher_tokenizer, compares_tokens=compares_tokens)
    train, held_out = load_rows(arguments, teacher)
    student = begin_student(
        arguments,
        teacher,
        lambda source: models.new_task_model(source, kind, names),
        layer_map=config.mapping_strategy(),
        seed=config.seed,
    )
    max_length = row_length(arguments.max_length, kind, teacher, student)
    run.arguments = replace(run.arguments, max_length=max_length)
    cut = max_length, arguments.stride
    rows, eval_rows = (tokenize(data, tokenizer, *cut) for data in (train, held_out))
    teacher_rows = tokenize(held_out, teacher_tokenizer, *cut)  # mostly the same, from the cache
    for name, model, checked in (("student", student, rows), ("teacher", teacher, teacher_rows)):
        check_ids(name, model, checked)
    logits = predict_logits(teacher, teacher_rows, teacher_tokenizer, description="Teacher")
    metrics = score(held_out, teacher_rows, logits)
    check_knowledge(arguments.teacher, held_out, logits, metrics, force=arguments.force)
    return Distillation(
        run=run,
        teacher=teacher,
        student=student,
        teacher_tokenizer=teacher_tokenizer,
        tokenizer=tokenizer,
        max_length=max_length,
        stride=arguments.stride,
        data=(train, held_out),
        calibration=rows,
        teacher_rows=rows,
        train_rows=rows,
        eval_rows=eval_rows,
        teacher_logits=logits,
        config=config,
        intermediate_config=intermediate,
        prediction_config=prediction,
        objective=intermediate.objective(student, teacher) if arguments.intermediate_epochs else None,
        prediction_objective=last_objective(arguments, prediction, student, teacher, kind),
        last_stage=arguments.baseline or "prediction",
    )


class _TaughtRows:
    """The rows a student is taught on: those given, or augmented ones; bad input is found when it is made."""

    def __init__(
        self,
        arguments: DistillArguments,
        config: DistillationConfig,
        data: tuple[TaskData, TaskData],
        max_length: int,
    ) -> None:
        train, held_out = data
        self._arguments, self._train = arguments, train
        if (arguments.augment or arguments.augmented) and train.kind in PER_TOKEN:
            raise InputError(
                f"augmentation exchanges words of texts and of pairs, and the task is {train.kind}: leave "
                "--augment and --augmented out"
            )
        self._ready = None if arguments.augmented is None else self._load(arguments.augmented)
        if self._ready is not None:
            check_held_out(self._ready, held_out)
        self._job = None
        if arguments.augment:
            names = {entry.name for entry in fields(AugmentArguments)} & {
                entry.name for entry in fields(arguments)
            }
            settings = {name: getattr(arguments, name) for name in names} | {"max_length": max_length}
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

    @property
    def copies(self) -> int:
        """How many copies of each row will be made, at the most."""
        return 0 if self._job is None else self._arguments.copies

    def known(self) -> TaskData:
        """Return the rows as far as they are there; without the copies that are still to be made."""
        return self._ready or self._train

    def rows(self, folder: Path) -> TaskData:
        """Return the rows; make them in the run directory where none with the same settings are there."""
        if self._job is None:
            return self._ready or self._train
        path = folder / "augmented" / f"{self._job.fingerprint}.parquet"
        if not path.exists():
            self._job.write(path)
        self._job = None  # its models are not needed any more
        return self._load(str(path))


def evaluate(arguments: EvaluateArguments) -> dict[str, float]:
    """Score a fine-tuned or distilled model on labelled rows, in float32; labels are matched by name.

    Raises:
        InputError: The model or the rows cannot be read, or their labels do not fit.
    """
    if arguments.json is not None:
        check_writable(Path(arguments.json))
    model = models.open_task_model(arguments.model)
    kind, _ = models.task_of(model)
    tokenizer = models.open_tokenizer(arguments.model, kind=kind)
    rows = rows_to_score(model, arguments.data, arguments)
    max_length = row_length(arguments.max_length, kind, model)
    tokens = tokenize(rows, tokenizer, max_length, arguments.stride)
    check_ids(arguments.model, model, tokens)
    logits = predict_logits(model, tokens, tokenizer, batch_size=arguments.batch_size)
    scores = score(rows, tokens, logits)
    if arguments.json is not None:
        write_json(Path(arguments.json), scores)
    return scores


def refuse_of_one_stage(name: str) -> NoReturn:
    """Refuse an option, of ``OF_ONE_STAGE``, that each stage has one of its own for."""
    both = " and ".join(f"--{stage}_{name.removeprefix('num_train_')}" for stage in STAGES)
    raise InputError(f"--{name} has no meaning with two stages: use {both}")


def _stage_configs(
    arguments: DistillArguments, config: DistillationConfig
) -> tuple[DistillationConfig, DistillationConfig]:
    """Return the arguments of both stages: their own epochs and rate, and the losses they are about."""
    for name in OF_ONE_STAGE:
        if getattr(config, name) != TrainingConfig.__dataclass_fields__[name].default:
            refuse_of_one_stage(name)
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
