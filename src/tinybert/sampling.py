"""Orders of rows that depend on nothing but the seed and the epoch: token budgets, groups of like length."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


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
        lengths: Sequence[int] | np.ndarray,
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


class SeededByEpoch(Sampler[int]):
    """Length groups drawn by a generator of their own; transformers draws them from the global one.

    The global one is not what it was where a run is resumed in the middle of an epoch, and on CPUs the
    processes' dropout takes it to different places.

    Args:
        sampler: Draws the groups.
        seed: With the epoch, decides the order.
        epoch: Tells the epoch when iteration starts.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        """Keep what draws."""
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        """Yield each row once, in groups of like length."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)
