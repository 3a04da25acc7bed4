"""The states of calibration text, waiting on disk: memory does not grow with the text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class Spooled:
    """One batch after what has been solved so far.

    Attributes:
        mask: Real tokens (B, T), bool.
        weights: What each counts in a fit (B, T), 0 for padding.
        teacher: The teacher's states after layer g(m) (B, T, d).
        student: The student's states after the last norm solved (B, T, d').
        goal: What the teacher's second norm of layer g(m) reads, the kept units (B, T, d').
        number: Its place in the spool; -1 for a new one.
    """

    mask: Tensor
    weights: Tensor
    teacher: Tensor
    student: Tensor
    goal: Tensor | None = None
    number: int = -1


class Spool:
    """Batches in files, read one at a time and put back changed.

    Attributes:
        affine: A norm whose gain and bias were not yet known when the student's states were put; applied
            when they are read.
    """

    def __init__(self, folder: Path) -> None:
        """Start empty, in a folder that is the caller's to remove."""
        self.folder = folder
        self.affine: nn.LayerNorm | None = None
        self._count = 0

    def put(self, batch: Spooled) -> None:
        """Write a new batch, or one that was read and changed."""
        if batch.number < 0:
            batch.number = self._count
            self._count += 1
        torch.save(vars(batch), self.folder / f"{batch.number}.pt")

    def __iter__(self) -> Iterator[Spooled]:
        """Read the batches in the order they were first put."""
        for number in range(self._count):
            batch = Spooled(**torch.load(self.folder / f"{number}.pt", weights_only=True))
            if self.affine is not None:
                batch.student = batch.student * self.affine.weight + self.affine.bias
            yield batch
