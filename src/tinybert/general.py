"""General distillation: a pre-trained teacher and a corpus without labels -> a student for any task.

Section 3.2 of Jiao et al. (arXiv 1909.10351v5): Transformer distillation of layers 0..M on running text. With
``--objective distilbert``, the losses of the compared method on masked text instead.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert import models
from tinybert.closed_form import solve_student
from tinybert.corpus import Corpus, open_corpus
from tinybert.corpus_trainer import CorpusTrainer, MaskedPieces
from tinybert.distilbert import DistilBertLoss
from tinybert.errors import InputError, check_least, refuse_given
from tinybert.objective import DistillationLoss
from tinybert.packing import BlockStream, pass_length, sample_blocks
from tinybert.preflight import Preflight, compare_vocabularies
from tinybert.rehearsal import STEPS, few_eval_rows, rehearsal
from tinybert.rows import checked_length
from tinybert.run_directory import Figures, Result, Run, file_size
from tinybert.student import (
    CALIBRATION_TOKENS,
    StudentArguments,
    begin_student,
    fit_projections,
    padded_batches,
    tokenizer_of_student,
)
from tinybert.trainer import DistillationConfig
from tinybert.training import StagePlan
from tinybert.vocabulary import check_pieces

STAGE = "general"


@dataclass(kw_only=True)
class GeneralArguments(StudentArguments):
    """Who teaches whom, and from which text."""

    teacher: str = field(metadata={"help": "Pre-trained teacher: a folder or a hub name."})
    corpus: list[str] = field(
        metadata={
            "help": "Text (a paragraph a line, a blank line between documents), JSONL or Parquet: files, "
            "globs, folders, or a hub name; compressed or not."
        },
    )
    eval_corpus: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out text, in the same forms: chooses the best checkpoint."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column of JSONL, Parquet and hub rows; text unless given."},
    )
    block_size: int = field(default=128, metadata={"help": "Word pieces a block, special ones included."})
    shuffle_buffer: int = field(default=8192, metadata={"help": "Blocks that are shuffled together."})
    objective: Literal["tinybert", "distilbert"] = field(
        default="tinybert",
        metadata={
            "help": "Embeddings, hidden states and attention scores; or soft masked-LM targets, masked LM "
            "and cosine of last states."
        },
    )
    mask_probability: float | None = field(
        default=None, metadata={"help": "Share of pieces masked; 0, or 0.15 for distilbert."}
    )
    eval_blocks: int = field(default=500, metadata={"help": "Blocks drawn from --eval_corpus."})

    def __post_init__(self) -> None:
        """Settle the masking.

        Raises:
            InputError: An objective on masked pieces without any, or a number that cannot be.
        """
        about_masks = self.objective == "distilbert"
        if self.mask_probability is None:
            self.mask_probability = 0.15 if about_masks else 0.0
        if about_masks and not self.mask_probability:
            raise InputError("--objective distilbert is about masked pieces: give --mask_probability above 0")
        check_least(self, {"shuffle_buffer": 1, "eval_blocks": 1})


@dataclass
class GeneralConfig(DistillationConfig):
    """``DistillationConfig`` with defaults for a corpus."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    save_strategy: str = field(default="steps", metadata={"help": "By steps: text has no epochs."})
    save_steps: float = field(
        default=500, metadata={"help": "Evaluate and keep a checkpoint every so many steps."}
    )
    student_dropout: float | None = field(
        default=0.0, metadata={"help": "Dropout of the student's states: none, as text never runs out."}
    )


def distill_general(arguments: GeneralArguments, config: GeneralConfig) -> Result:
    """Distil a pre-trained teacher into a small student on unlabelled text, and fill the run directory.

    The result is a plain model folder that ``distill_task`` starts from: an encoder, or a masked LM with
    ``objective="distilbert"``.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
        Stopped: SIGTERM ended the training; all is kept.
    """
    return _prepare(arguments, config).result()


def preflight_general(arguments: GeneralArguments, config: GeneralConfig) -> Preflight:
    """Find out what ``distill_general`` would do, a few steps taken to measure its time; nothing is written.

    Raises:
        InputError: As ``distill_general`` does before it trains.
    """
    return _prepare(arguments, config).preflight()


def _prepare(arguments: GeneralArguments, config: GeneralConfig) -> "_GeneralDistillation":
    """Open and check everything, without writing."""
    _check_read(arguments, config)
    sources = [arguments.teacher, arguments.student or "", *arguments.corpus, *(arguments.eval_corpus or [])]
    run = Run(config, arguments, inputs=filter(None, sources))
    about_masks = arguments.objective == "distilbert"
    open_model = models.open_masked_lm if about_masks else models.open_encoder
    teacher, tokenizer = open_model(arguments.teacher), models.open_tokenizer(arguments.teacher)
    check_pieces(arguments.teacher, tokenizer, teacher)
    corpus = open_corpus(arguments.corpus, text_column=arguments.text_column)
    strategy = config.mapping_strategy()
    tokenizer_of_student(arguments, tokenizer, compares_tokens=True)
    student = begin_student(arguments, teacher, open_model, layer_map=strategy, seed=config.seed)
    checked_length(arguments.block_size, teacher, student, option="block_size")
    return _GeneralDistillation(run, arguments, config, teacher, student, tokenizer, corpus)


def _check_read(arguments: GeneralArguments, config: GeneralConfig) -> None:
    """Refuse options that nobody would read."""
    unread = ["save_strategy", "tokens_per_batch", "prediction_weight", "gold_weight", "temperature"]
    if arguments.objective == "distilbert":
        unread += ["embedding_weight", "hidden_weight", "attention_weight", "layer_weights", "padding"]
        unread += ["relation_heads", "attention_compares"]
    refuse_given(config, unread, f"in general distillation with --objective {arguments.objective}")
    if arguments.eval_corpus is None:
        refuse_given(arguments, ["eval_blocks"], "without --eval_corpus")


@dataclass(frozen=True)
class _GeneralDistillation:
    """One run, its models opened and checked."""

    run: Run
    arguments: GeneralArguments
    config: GeneralConfig
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus

    def result(self) -> Result:
        """Start the student, train it, publish it; what can be wrong with the input is found first."""
        mask = self._mask()
        objective = self._objective()
        eval_rows = self._eval_rows(mask)
        is_fresh = self.run.last_checkpoint(STAGE) is None
        stage, stream, steps_per_pass = self._plan(is_evaluated=eval_rows is not None, is_fresh=is_fresh)
        size = self.arguments.block_size
        enough = -(-CALIBRATION_TOKENS // size) if is_fresh else 1
        calibration = sample_blocks(
            self.corpus, self.tokenizer, block_size=size, count=enough, buffer=2048, seed=stage.seed
        )
        self.run.claim()
        if is_fresh:
            self._start(objective, [{"input_ids": block} for block in calibration])
        trainer = self._trainer(objective, stage, stream, mask, eval_rows, steps_per_pass)
        self.run.train(STAGE, trainer)
        return self._finish(trainer.state.log_history)

    def preflight(self) -> Preflight:
        """Return what a run would do, its time measured on a few steps; nothing is left of them."""
        mask, objective = self._mask(), self._objective()
        eval_rows = self._eval_rows(mask)
        stage, _, steps_per_pass = self._plan(is_evaluated=eval_rows is not None, is_fresh=True)
        passes = stage.max_steps / steps_per_pass if steps_per_pass else None
        with rehearsal(self.run) as run:
            config = replace(self.config, max_steps=STEPS + 1, gradient_accumulation_steps=1)
            few = replace(self, run=run, config=config)
            short, stream, _ = few._plan(is_evaluated=False, is_fresh=False)
            count = 0 if eval_rows is None else len(eval_rows)
            some = None if eval_rows is None else eval_rows.select(few_eval_rows(config, count))
            run.train(STAGE, few._trainer(objective, short, stream, mask, some, None))
        every = stage.save_steps if stage.save_steps >= 1 else stage.save_steps * stage.max_steps
        plan = StagePlan(STAGE, passes, stage.max_steps)
        evaluations = math.ceil(stage.max_steps / every) + 1
        about_layers = isinstance(objective, DistillationLoss)
        return Preflight(
            (f"text in {self.corpus.shards} parts: {' '.join(self.arguments.corpus)}",),
            {"teacher": self.teacher.num_parameters(), "student": self.student.num_parameters()},
            (run.timed(plan, stage, count, evaluations=evaluations),),
            vocabulary=compare_vocabularies(self.tokenizer, self.tokenizer),
            layers=self.config.layers_of_teacher(self.student, self.teacher) if about_layers else (),
            beside=("the closed-form start",) * self.arguments.is_solved,
        )

    def _mask(self) -> MaskedPieces | None:
        if not self.arguments.mask_probability:
            return None
        return MaskedPieces(self.tokenizer, self.arguments.mask_probability, self.config.seed)

    def _trainer(
        self,
        objective: DistillationLoss | DistilBertLoss,
        stage: GeneralConfig,
        stream: BlockStream,
        mask: MaskedPieces | None,
        eval_rows: Dataset | None,
        steps_per_pass: float | None,
    ) -> CorpusTrainer:
        return CorpusTrainer(
            self.student if objective.reads_logits else self.student.base_model,
            self.teacher,
            stage,
            objective,
            stream,
            tokenizer=self.tokenizer,
            mask=mask,
            eval_rows=eval_rows,
            steps_per_pass=steps_per_pass,
        )

    def _objective(self) -> DistillationLoss | DistilBertLoss:
        if self.arguments.objective == "distilbert":
            return DistilBertLoss(self.student.config.hidden_size, self.teacher.config.hidden_size)
        without_logits = replace(self.config, prediction_weight=0.0, gold_weight=0.0)
        return without_logits.objective(self.student, self.teacher)

    def _eval_rows(self, mask: MaskedPieces | None) -> Dataset | None:
        arguments = self.arguments
        if arguments.eval_corpus is None:
            return None
        blocks = sample_blocks(
            open_corpus(arguments.eval_corpus, text_column=arguments.text_column),
            self.tokenizer,
            block_size=arguments.block_size,
            count=arguments.eval_blocks,
            seed=self.config.seed,
        )
        rows: list[dict[str, Any]] = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in blocks]
        if mask is not None:
            masked = (
                mask({name: torch.tensor([cells]) for name, cells in row.items()}, number)
                for number, row in enumerate(rows)
            )
            rows = [{name: cells[0].tolist() for name, cells in row.items()} for row in masked]
        return Dataset.from_list(rows)

    def _plan(self, *, is_evaluated: bool, is_fresh: bool) -> tuple[GeneralConfig, BlockStream, float | None]:
        """Return the stage's settings with its number of steps, the stream, and the steps of a pass.

        Raises:
            InputError: No ``max_steps``, and a corpus whose length nobody knows.
        """
        config, arguments = self.config, self.arguments
        stage = self.run.stage_config(STAGE, config, best="loss" if is_evaluated else None)
        batch_size = stage.train_batch_size * stage.world_size * stage.gradient_accumulation_steps
        length = pass_length(self.corpus, self.tokenizer, block_size=arguments.block_size)
        steps_per_pass = None if length is None else length.blocks / batch_size
        if config.max_steps <= 0 and steps_per_pass is None:
            raise InputError(
                "the length of the corpus is not known, so epochs cannot be counted: add --max_steps"
            )
        buffer = arguments.shuffle_buffer
        if length is not None:
            # A smaller corpus would be read many times over before the first step.
            buffer = min(buffer, max(1, length.blocks))
        stream = BlockStream(
            self.corpus,
            self.tokenizer,
            batch_size=batch_size,
            block_size=arguments.block_size,
            buffer=buffer,
            seed=config.seed,
        )
        stage = replace(
            stage,
            max_steps=config.max_steps
            if config.max_steps > 0
            else math.ceil(config.num_train_epochs * (steps_per_pass or 0)),
            ignore_data_skip=True,  # the stream skips by itself
            eval_on_start=is_evaluated and is_fresh,
        )
        return stage, stream, steps_per_pass

    def _start(self, objective: DistillationLoss | DistilBertLoss, rows: list[dict[str, Any]]) -> None:
        """Solve the student, or give one that comes ready the projections that suit it."""
        arguments, started = self.arguments, time.monotonic()
        batches = padded_batches(rows, self.tokenizer)
        layer_map = self.config.layers_of_teacher(self.student, self.teacher)
        if arguments.is_solved:
            solved = solve_student(self.teacher, self.student, batches, layer_map, seed=self.config.seed)
            objective.start_projections(solved.projections)
            self.run.stages["closed_form"] = {
                "seconds": round(time.monotonic() - started, 1),
                "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
                "hidden_errors": solved.hidden_errors,
            }
        elif arguments.student is not None:
            widths = (self.student.config.hidden_size, self.teacher.config.hidden_size)
            start = models.read_projections(arguments.student, len(layer_map))
            if start is None or start[0].shape != widths:
                start = fit_projections(self.student, self.teacher, batches, layer_map)
            objective.start_projections(start)

    def _finish(self, log: list[dict[str, Any]]) -> Result:
        """Publish the best student, or the last where there was no held-out text."""
        metric = "cosine_loss" if self.arguments.objective == "distilbert" else "hidden_error"
        start, *evals = [
            {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            for entry in log
            if f"eval_{metric}" in entry
        ] or [{}]
        best = min(evals, key=lambda metrics: metrics["loss"], default={})
        parameters, size = self.student.num_parameters(), file_size(self.student)
        figures = [Figures("student", best, parameters, size, self.run.seconds())]
        if start:
            figures.insert(0, Figures("start", start, parameters, size))
        text = {"source": " ".join(self.arguments.corpus), "fingerprint": self.corpus.fingerprint()}
        return self.run.finish(
            self.student, self.tokenizer, metric if start else None, tuple(figures), {"corpus": text}
        )


def layer_table(result: Result) -> str:
    """Return the loss parts and relative hidden errors of a result, one line each, before and after."""
    names = [name for name in result.figures[-1].metrics if name.endswith("_loss") or "error" in name]
    lines = [f"{'':20}" + "".join(f"{figures.name:>12}" for figures in result.figures)]
    for name in sorted(names):
        lines.append(f"{name:20}" + "".join(f"{figures.metrics[name]:12.4f}" for figures in result.figures))
    return "\n".join(lines) if names else ""
