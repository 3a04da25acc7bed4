"""Training encoders on text with the Hugging Face Trainer: settings that suit, batches by tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tinybert.errors import InputError


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
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the best."})
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
            InputError: No output folder; transformers would choose one.
        """
        if not self.output_dir:
            raise InputError("no output folder was given: add --output_dir")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast()
        if self.bf16 and not torch.cuda.is_available():
            self.use_cpu = True  # transformers asks for it in so many words
        super().__post_init__()


class TokenBatchSampler(Sampler[list[int]]):
    """Batches with at most so many tokens, padding counted, and almost no padding.

    Rows are sorted by length, equal lengths in random order, cut into batches, and the batches shuffled. A
    row longer than the budget is a batch of its own. Every epoch has the same number of batches.

    Args:
        lengths: Tokens of each row.
        tokens_per_batch: Most tokens of a batch: its rows times the longest of them.
        seed: With the epoch, decides the order.
        epoch: Tells the epoch when iteration starts. (A loader that skips batches on resuming does not pass
            ``set_epoch`` on; the Trainer's state always knows.)
        rank: Which process this is.
        processes: Among how many the batches are dealt; some are dealt twice where they do not divide.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        seed: int,
        *,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Cut the sorted lengths into batches once: their sizes are the same in every epoch."""
        self.lengths = np.asarray(lengths)
        self.seed, self.epoch = seed, epoch
        self.rank, self.processes = rank, processes
        self._starts = [0]
        for row, length in enumerate(np.sort(self.lengths)):
            if row > self._starts[-1] and (row + 1 - self._starts[-1]) * length > tokens_per_batch:
                self._starts.append(row)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield each row of the data set exactly once, over all processes."""
        random = np.random.Generator(np.random.PCG64([self.seed, self.epoch()]))
        shuffled = random.permutation(len(self.lengths))
        by_length = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        batches = np.split(by_length, self._starts[1:])
        order = random.permutation(len(batches))
        dealt = np.resize(order, len(self) * self.processes)  # repeats from the start to even the ranks out
        for index in dealt[self.rank :: self.processes]:
            yield batches[index].tolist()

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same for every process."""
        return -(-len(self._starts) // self.processes)


class _SeededByEpoch(Sampler[int]):
    """Length groups drawn by a generator of their own; transformers draws them from the global one.

    The global one is not what it was where a run is resumed in the middle of an epoch, and on CPUs the
    processes' dropout takes it to different places.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)


class EncoderTrainer(Trainer):
    """A Trainer whose batches depend on seed and epoch alone, and may keep to ``tokens_per_batch``."""

    args: TrainingConfig

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, and give the model's ``forward`` back as it was.

        accelerate leaves its autocast around it: scores would be bfloat16's from there on.
        """
        result = super().train(*args, **kwargs)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return result

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Cover the whole of ``compute_loss``: accelerate covers the trained model alone, no teacher."""
        return self.accelerator.autocast()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return _SeededByEpoch(sampler, self.args.seed, self._epoch)

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
