"""Orders of rows: every row once, within the budget, the same again after an interruption."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinybert.sampling import TokenBatchSampler

lengths_of_rows = st.lists(st.integers(1, 80), min_size=1, max_size=200)


@given(lengths_of_rows, st.integers(16, 400), st.integers(0, 5), st.integers(0, 3))
def test_every_row_comes_once_an_epoch(lengths: list[int], budget: int, seed: int, epoch: int) -> None:
    """No row is lost or seen twice, and the announced number of batches is the real one."""
    sampler = TokenBatchSampler(lengths, budget, seed, epoch=lambda: epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)


@given(lengths_of_rows, st.integers(16, 400))
def test_no_batch_exceeds_the_budget_but_a_single_long_row(lengths: list[int], budget: int) -> None:
    """A batch that exceeds the budget is an out-of-memory error on the user's card."""
    for batch in TokenBatchSampler(lengths, budget, 0):
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


@given(lengths_of_rows, st.integers(16, 400), st.integers(2, 4))
def test_processes_share_the_batches_evenly(lengths: list[int], budget: int, processes: int) -> None:
    """Ranks with unequal numbers of steps would wait for each other for ever."""
    dealt = [
        list(TokenBatchSampler(lengths, budget, 0, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    assert len({len(batches) for batches in dealt}) == 1
    assert {row for batches in dealt for batch in batches for row in batch} == set(range(len(lengths)))


def test_order_depends_on_seed_and_epoch_only() -> None:
    """A resumed run must meet the rows in the order of the uninterrupted one."""
    lengths = np.random.default_rng(0).integers(3, 60, 300)
    first, again, other = (TokenBatchSampler(lengths, 256, seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert list(first) != list(TokenBatchSampler(lengths, 256, 1, epoch=lambda: 1))


def test_batches_carry_almost_no_padding() -> None:
    """Padding is paid for like text."""
    lengths = np.random.default_rng(0).integers(3, 60, 2000)
    padded = sum(len(batch) * lengths[batch].max() for batch in TokenBatchSampler(lengths, 1024, 0))
    assert lengths.sum() / padded > 0.97
