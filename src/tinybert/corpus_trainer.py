"""Distillation on an endless stream of blocks: dealt to processes, masked, resumed at the very block."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)

from tinybert.capture import capture, evaluating
from tinybert.collation import Collator
from tinybert.errors import InputError
from tinybert.objective import DistillationLoss
from tinybert.packing import BlockStream
from tinybert.trainer import DistillationConfig, DistillationTrainer, Objective

PLACE_NAME = "corpus.json"

Batch = dict[str, Tensor]


class MaskedPieces:
    """Masks pieces as masked language models learn: of those drawn, 80 % [MASK], 10 % random, 10 % kept.

    What is drawn depends on the seed and the number of the batch alone, so a resumed run and any number of
    processes see the same.

    Args:
        tokenizer: Knows the special pieces, which are never drawn.
        probability: Of a piece to be drawn.
        seed: See above.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int) -> None:
        """Check that there is a mask.

        Raises:
            InputError: The tokenizer has no mask token, or the probability is none.
        """
        if not 0 < probability < 1:
            raise InputError(f"--mask_probability must be above 0 and below 1, got {probability}")
        if tokenizer.mask_token is None:
            raise InputError("the teacher's tokenizer has no mask token: set --mask_probability to 0")
        self._collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self._special = torch.tensor(tokenizer.all_special_ids)
        self._seed = seed

    def __call__(self, batch: Batch, number: int) -> Batch:
        """Return a batch with pieces masked, and ``labels``: what stood there, -100 elsewhere."""
        ids = batch["input_ids"]
        self._collator.generator = torch.Generator().manual_seed(self._seed + (number << 20))
        untouched = torch.isin(ids, self._special) | (batch["attention_mask"] == 0)
        masked, labels = self._collator.torch_mask_tokens(ids.clone(), untouched)
        return {**batch, "input_ids": masked, "labels": labels}


class _MicroBatches(IterableDataset[Batch]):
    """The batches of a stream from the one training is at, each in so many equal parts."""

    def __init__(
        self,
        stream: BlockStream,
        parts: int,
        mask: MaskedPieces | None,
        place: Callable[[], tuple[int, dict[str, Any] | None]],
    ) -> None:
        self.stream, self.parts, self.mask, self.place = stream, parts, mask, place

    def __iter__(self) -> Iterator[Batch]:
        first, state = self.place()
        for number, batch in enumerate(self.stream.batches(first, state), first):
            whole = self.mask(batch, number) if self.mask is not None else batch
            pieces = {name: tensor.chunk(self.parts) for name, tensor in whole.items()}
            for part in range(self.parts):
                yield {name: chunks[part] for name, chunks in pieces.items()}


class CorpusTrainer(DistillationTrainer):
    """A ``DistillationTrainer`` over a ``BlockStream``.

    One process reads and deals each batch out, so that every block is seen by exactly one and a run on
    several is the run on one. The place in the stream is kept with the checkpoints. Where there are
    evaluation rows, the relative hidden error of each layer is reported beside the losses.

    Args:
        model: The student, with the head that the losses read.
        teacher: The teacher, likewise.
        args: With ``max_steps``; ``ignore_data_skip`` must be set, as the stream skips by itself.
        objective: The loss.
        stream: Batches of as many blocks as all processes take in one step, accumulation included.
        tokenizer: Pads evaluation rows.
        mask: Masks pieces, where that is wanted.
        eval_rows: Tokenised held-out rows.
        steps_per_pass: Steps that one pass over the corpus takes, for the record only.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: PreTrainedModel,
        args: DistillationConfig,
        objective: Objective,
        stream: BlockStream,
        *,
        tokenizer: PreTrainedTokenizerBase,
        mask: MaskedPieces | None = None,
        eval_rows: Dataset | None = None,
        steps_per_pass: float | None = None,
    ) -> None:
        """Put the stream in the place of a training set."""
        self.stream = stream
        self._place: dict[str, Any] | None = None
        # The teacher's layers whose states are imitated one by one.
        self.layers = (0, *objective.layer_map) if isinstance(objective, DistillationLoss) else ()
        self._spreads: dict[str, float] = {}
        self._clock = (time.monotonic(), 0)
        batches = _MicroBatches(stream, args.gradient_accumulation_steps, mask, self._start)
        super().__init__(
            model,
            teacher,
            args,
            objective,
            train_dataset=batches,
            eval_dataset=eval_rows,
            data_collator=Collator(tokenizer, "token_classification"),  # masked pieces are its labels
        )
        self.add_callback(_PassCallback(steps_per_pass))

    def _start(self) -> tuple[int, dict[str, Any] | None]:
        return self.state.global_step, self._place

    def get_train_dataloader(self) -> DataLoader:
        """Return the stream's batches, dealt out by the main process where there are several."""
        options: dict[str, Any] = {
            "batch_size": None,
            # Of its own: made anew on resuming, it would draw from the random state that was just restored.
            "generator": torch.Generator().manual_seed(self.args.seed),
            "pin_memory": self.args.dataloader_pin_memory,
        }
        rows: Any = self.train_dataset
        if self.accelerator.num_processes > 1:
            return DataLoaderDispatcher(rows, split_batches=True, **options)
        return DataLoader(rows, **options)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as ever; the clock of the reported speed starts here."""
        self._clock = (time.monotonic(), 0)
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the relative hidden errors, sum |h_S W - h_T|^2 / sum |h_T - mean h_T|^2, and their mean."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if not self._spreads and self.layers:
            self._spreads = self._teacher_spreads()
        errors = {
            m: output.metrics[f"{prefix}_{part}_loss"] / self._spreads[m]
            for m, part in ((m, f"hidden_{m}" if m != "0" else "embedding") for m in self._spreads)
            if f"{prefix}_{part}_loss" in output.metrics
        }
        if errors:
            output.metrics.update({f"{prefix}_hidden_error_{m}": error for m, error in errors.items()})
            output.metrics[f"{prefix}_hidden_error"] = sum(errors.values()) / len(errors)
        return output

    def _teacher_spreads(self) -> dict[str, float]:
        """Return the variance of the teacher's states at g(0) = 0, g(1), ..., g(M), a unit and token."""
        layers = self.layers
        sums: list[Tensor] = []
        count = torch.zeros((), dtype=torch.float64)
        with evaluating(self.teacher):
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    states = capture(self.teacher, inputs, scores=False, layers=layers[-1])
                mask = inputs["attention_mask"].bool()
                rows = [states.hidden[layer][mask].double() for layer in layers]
                moments = [torch.stack([row.sum(0), row.square().sum(0)]) for row in rows]
                sums = [a + b for a, b in zip(sums, moments, strict=True)] if sums else moments
                count = count.to(mask.device) + mask.sum()
        # Of all processes' rows: each has its share of them.
        reduced = [self.accelerator.reduce(moment, "sum") for moment in sums]
        count = self.accelerator.reduce(count, "sum")
        variances = [(square / count - (total / count).square()).mean() for total, square in reduced]
        return {str(m): variance.item() for m, variance in enumerate(variances)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed and the time that is left."""
        if "loss" in logs:
            now, step = time.monotonic(), self.state.global_step
            seconds, steps = now - self._clock[0], step - self._clock[1]
            dealt = self.stream.counts
            if self._clock[1] and steps and dealt.blocks:  # the first steps warm up; one process reads
                pieces = steps * self.stream.batch_size * dealt.pieces / dealt.blocks
                logs["tokens_per_second"] = round(pieces / seconds)
                logs["hours_left"] = round((self.state.max_steps - step) * seconds / steps / 3600, 2)
            self._clock = (now, step)
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            place = self.stream.state(self.state.global_step)
            Path(output_dir, PLACE_NAME).write_text(json.dumps(place), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._place = json.loads(Path(checkpoint, PLACE_NAME).read_text(encoding="utf-8"))


class _PassCallback(TrainerCallback):
    """Counts epochs as passes over the corpus, and has the last step evaluated.

    transformers takes an endless stream for one epoch, and evaluates every so many steps alone.
    """

    def __init__(self, steps_per_pass: float | None) -> None:
        self.steps_per_pass = steps_per_pass

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / (self.steps_per_pass or state.max_steps)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
