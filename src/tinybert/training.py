"""Training encoders on text with the Hugging Face Trainer: batches by tokens, checkpoints that survive."""

import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from tinybert.checkpoints import aside, checkpoint_name, clear_aside, last_whole, publish
from tinybert.errors import InputError, check_least, one_line
from tinybert.sampling import SeededByEpoch, TokenBatchSampler

logger = logging.getLogger(__name__)


# The smallest values with which there is something to compute.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "tokens_per_batch": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "seed": 0,
}


def bf16_is_fast() -> bool:
    """Return whether the hardware multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass
class TrainingConfig(TrainingArguments):
    """``TrainingArguments`` with defaults for encoders on text, and bfloat16 where it is fast."""

    output_dir: str | None = field(
        default=None, metadata={"help": "The run directory; must not hold anything."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'true' goes on from the last checkpoint in the output folder."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16 autocast; where the hardware is fast at it unless given."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Training batch size a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Evaluation batch size a device."})
    logging_steps: float = field(default=50, metadata={"help": "Log the losses every so many steps."})
    save_strategy: str = field(default="epoch", metadata={"help": "Evaluate and save by epoch or by steps."})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept: the last ones, the best among them or beside them."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or their share if below 1."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length batches like with like: less padding."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Most tokens a training batch may have, padding counted, instead of a batch size."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier run in the output folder."}
    )

    def __post_init__(self) -> None:
        """Settle the precision: bfloat16 autocast where the hardware multiplies it fast.

        Raises:
            InputError: No output folder, where transformers would choose one; a number that cannot be;
                float16 without a GPU; an upload of checkpoints; a place to report to that is not installed.
        """
        if not self.output_dir:
            raise InputError("no output folder was given: add --output_dir")
        check_least(self, _LEAST)
        if self.push_to_hub:
            raise InputError(
                "--push_to_hub would upload each stage's checkpoints: upload the finished folder instead, "
                "hf upload NAME FOLDER"
            )
        if self.fp16 and not torch.cuda.is_available():
            raise InputError("--fp16 needs a GPU: leave it out, or try --bf16 true")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast()
        if self.bf16 and not torch.cuda.is_available():
            self.use_cpu = True  # transformers asks for it in so many words
        self.logging_nan_inf_filter = False  # training stops there instead
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns where there is no GPU
        super().__post_init__()
        absent = set(self.report_to or ()) - set(get_available_reporting_integrations())
        if absent:
            raise InputError(f"--report_to {min(absent)}: it is not installed, or not known to transformers")
        if self.n_gpu > 1:
            # transformers would split batches over threads, which see each other's captured states.
            logger.warning("using 1 of %d GPUs: accelerate launch -m tinybert ... uses all", self.n_gpu)
            self._n_gpu = 1


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take.

    Attributes:
        name: The stage.
        epochs: Passes over the training rows; None where nobody knows how long one is.
        steps: Optimiser steps.
        step_seconds: Seconds a step, as measured; None where nothing was.
        other_seconds: Seconds of all that comes between and before the steps.
    """

    name: str
    epochs: float | None
    steps: int
    step_seconds: float | None = None
    other_seconds: float = 0.0

    @property
    def seconds(self) -> float | None:
        """The estimated seconds of the whole stage."""
        return None if self.step_seconds is None else self.steps * self.step_seconds + self.other_seconds


def plan_stage(name: str, config: TrainingConfig, lengths: Sequence[int] | np.ndarray) -> StagePlan:
    """Count the steps of a stage as the Trainer will.

    Args:
        name: The stage.
        config: Its arguments.
        lengths: Tokens of each training row.
    """
    size = config.train_batch_size * config.world_size
    if config.tokens_per_batch is not None:
        sampler = TokenBatchSampler(lengths, config.tokens_per_batch, 0, processes=config.world_size)
        batches = len(sampler)
    elif config.dataloader_drop_last:
        batches = len(lengths) // size
    else:
        batches = -(-len(lengths) // size)
    updates = max(1, -(-batches // config.gradient_accumulation_steps))
    if config.max_steps > 0:
        return StagePlan(name, config.max_steps / updates, config.max_steps)
    return StagePlan(name, config.num_train_epochs, math.ceil(config.num_train_epochs * updates))


class EncoderTrainer(Trainer):
    """A Trainer that survives: whole checkpoints, a stop at SIGTERM or at a loss that is no number.

    Its batches depend on seed and epoch alone, and may keep to ``tokens_per_batch``.

    Attributes:
        stopped: Whether SIGTERM ended the training, with a checkpoint of the step it was at.
    """

    args: TrainingConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make a Trainer that listens to SIGTERM while it trains."""
        super().__init__(*args, **kwargs)
        # Else transformers takes a head's **kwargs for a promise to divide by the whole step's counts.
        self.model_accepts_loss_kwargs = False
        self.stopped = False
        self._is_saving = False
        self.add_callback(_StopCallback(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and give the model's ``forward`` back as it was.

        accelerate leaves its autocast around it: scores would be bfloat16's from there on. Its own way back
        takes off too much, transformers' collecting of hidden states as well.
        """
        own: dict[str, Any] = vars(self.model)
        before = own.get("forward")
        with _sigterm(self):
            result = super().train(*args, **kwargs)
        own.pop("_original_forward", None)
        own.pop("forward", None)
        if before is not None:
            own["forward"] = before
        return result

    def stop(self) -> None:
        """Ask for a checkpoint and the end of training after the step under way."""
        self.stopped = True

    def parts_of_step(self) -> Mapping[str, Tensor]:
        """Return the parts of the last batch's loss by name, where there are any."""
        return {}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take the gradient of one batch.

        Raises:
            InputError: The loss is no number; the weights are still those of the step before.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            parts = self.parts_of_step().items()
            wrong = [f"{name} is {part.item()}" for name, part in parts if not torch.isfinite(part)]
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} "
                f"({', '.join(wrong) or 'all of it'}): lower the learning rate; {self._way_back()}"
            )
        return loss

    def _way_back(self) -> str:
        last = last_whole(Path(str(self.args.output_dir)))
        if last is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {last}, and --resume_from_checkpoint true goes on from there"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, then move it to its place whole.

        Raises:
            InputError: It cannot be written, or a weight is no number; earlier checkpoints are untouched.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        model = self.accelerator.unwrap_model(model)
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise InputError(f"the weight {broken[0]} is no number at step {step}; {self._way_back()}")
        if self.args.should_save:
            clear_aside(folder)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(folder / checkpoint_name(step))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(aside(folder) / checkpoint_name(step) / TRAINER_STATE_NAME))
                publish(folder, step)
        except Exception as error:  # safetensors and torch have their own for a disk that is full
            clear_aside(folder)
            raise InputError(
                f"cannot write the checkpoint of step {step} in {folder} ({one_line(error)}): make room; "
                f"{self._way_back()}"
            ) from error
        finally:
            self._is_saving = False
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_callback_state(self) -> None:
        """Find the best checkpoint, which is known by its path, where the run lies now."""
        state = self.state
        if state.best_global_step:
            best = Path(str(self.args.output_dir), checkpoint_name(state.best_global_step))
            state.best_model_checkpoint = str(best)
            if not best.is_dir():
                logger.warning("%s, the best so far, is gone: the best of the rest counts", best)
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        super()._load_callback_state()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(aside(Path(folder))) if self._is_saving else folder

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Cover the whole of ``compute_loss``: accelerate covers the trained model alone, no teacher."""
        return self.accelerator.autocast()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return SeededByEpoch(sampler, self.args.seed, self._epoch)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Keep windows in order: several may belong to one question, which is scored as a whole."""
        if "start_positions" in (getattr(eval_dataset, "column_names", None) or ()):
            return None
        return super()._get_eval_sampler(eval_dataset)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader, or one whose batches keep to the token budget."""
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        sampler = TokenBatchSampler(
            rows["length"],
            self.args.tokens_per_batch,
            self.args.seed,
            epoch=self._epoch,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        loader = DataLoader(
            self._remove_unused_columns(rows, description="training"),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # The sampler shards by itself: accelerate's sharding takes batches of one size only.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )


class _StopCallback(TrainerCallback):
    """Turns a request to stop into a checkpoint and the end of training, in all processes at one step."""

    def __init__(self, trainer: EncoderTrainer) -> None:
        self.trainer = trainer
        self._is_ending = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.accelerator.num_processes > 1:
            asked = torch.tensor(float(trainer.stopped), device=trainer.args.device)
            trainer.stopped = bool(trainer.accelerator.reduce(asked, "sum") > 0)
        if trainer.stopped:
            control.should_save = control.should_training_stop = self._is_ending = True

    on_evaluate = on_step_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate nothing where an epoch was cut short: an uninterrupted run has no such checkpoint."""
        if self._is_ending and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False


@contextmanager
def _sigterm(trainer: EncoderTrainer) -> Iterator[None]:
    """Let SIGTERM stop a training; only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: trainer.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
