"""Batches of like length: whether they still mix the labels."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizerFast

from conftest import QUICK, write_csv
from tinybert.batch_mix import check_batches, label_share
from tinybert.cli import main
from tinybert.data import TaskData, load_data, tokenize
from tinybert.training import TrainingConfig


def adjusted_r_squared(labels: np.ndarray, lengths: np.ndarray, size: int) -> float:
    """By the textbook, of one-hot labels on dummies of the batches, rows of one length in the given order."""
    one_hot = (labels[:, None] == np.unique(labels)).astype(np.float64)[np.argsort(lengths, kind="stable")]
    batches = np.eye(-(-len(labels) // size)).repeat(size, axis=0)[: len(labels)]
    residual = one_hot - batches @ np.linalg.lstsq(batches, one_hot, rcond=None)[0]
    free = len(labels) - batches.shape[1], len(labels) - 1
    return 1 - (residual**2).sum() / free[0] / (((one_hot - one_hot.mean(0)) ** 2).sum() / free[1])


@pytest.mark.parametrize("size", [4, 7, 32])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_share_is_that_of_a_regression_on_batches(classes: int, size: int) -> None:
    """All lengths differ, so there is one order only."""
    random = np.random.default_rng(size)
    lengths = random.permutation(103)
    labels = np.where(random.random(103) < 0.6, lengths * classes // 103, random.integers(0, classes, 103))
    share = label_share(labels, lengths, size)
    assert share == pytest.approx(adjusted_r_squared(labels, lengths, size), abs=1e-12)
    assert 0.1 < share < 0.9
    order = random.permutation(103)
    assert label_share(labels[order], lengths[order], size) == pytest.approx(share, abs=1e-12)


def test_lengths_that_tell_all_or_nothing() -> None:
    """Nothing also where all rows are as long, however the file is sorted."""
    labels = np.repeat([0, 1], 320)
    assert label_share(labels, labels * 9 + 5, 32) == 1.0
    assert abs(label_share(labels, np.full(640, 7), 32)) < 0.05
    assert label_share(np.zeros(640, int), labels, 32) == 0.0
    assert label_share(labels, labels, 1) == 0.0, "a batch of one row mixes nothing, whatever its length"
    flags = np.stack([labels, np.tile([0, 1], 320)], axis=1)
    assert 0.3 < label_share(flags, labels * 9 + 5, 32) < 0.5
    scores = np.linspace(0, 5, 640)
    assert label_share(scores, np.arange(640), 32) > 0.9
    assert abs(label_share(scores, np.random.default_rng(0).permutation(640), 32)) < 0.1


@pytest.fixture
def told(tmp_path: Path) -> TaskData:
    """Long rows of one label, short ones of the other."""
    rows = [("good " * (10 if number % 2 else 3), "ab"[number % 2]) for number in range(200)]
    return load_data(write_csv(tmp_path / "rows.csv", rows))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "100 % of the labels.*: add --train_sampling_strategy random"),
        ({"tokens_per_batch": 200}, "leave --tokens_per_batch out and add --train_sampling_strategy random"),
        ({"train_sampling_strategy": "random"}, None),
    ],
    ids=str,
)
def test_what_is_said_of_it(
    told: TaskData, settings: dict[str, Any], advice: str | None, tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A line that says what to add, and none where rows are read in random order."""
    lengths = tokenize(told, tokenizer, 16)["length"]
    config = TrainingConfig(str(tmp_path / "out"), **QUICK | {"per_device_train_batch_size": 10} | settings)
    said = check_batches(told, lengths, config)
    assert re.search(advice, said) if advice else not said


def test_a_dry_run_says_it(
    told: TaskData, tmp_path: Path, start_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the hour is spent on training that falls apart."""
    paths = {"train": told.source, "eval": told.source, "output_dir": tmp_path / "out"}
    options = {"model": start_folder, "max_length": 16, "use_cpu": True, "max_steps": 2} | paths
    words = [f"--{name}={value}" for name, value in options.items()]
    assert main(["finetune", *words, "--dry_run", "true"]) == 0
    assert "batches     batches of like length explain 9" in capsys.readouterr().out
