"""Checkpoints: whole or not there, whatever interrupts the writing; what is damaged is noticed."""

import errno
import logging
import os
from pathlib import Path

import pytest

from tinybert.checkpoints import SEAL, aside, checkpoint_name, fault, last_whole, publish

FILES = {"model.safetensors": b"weights" * 1000, "optimizer.pt": b"moments", "trainer_state.json": b"{}"}


def write(folder: Path, step: int) -> Path:
    source = aside(folder) / checkpoint_name(step)
    source.mkdir(parents=True)
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    return publish(folder, step)


def test_what_is_published_is_whole_and_nothing_is_left_aside(tmp_path: Path) -> None:
    """The files are those that were written, and transformers finds them where it looks."""
    checkpoint = write(tmp_path, 5)
    assert checkpoint == tmp_path / "checkpoint-5"
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != SEAL} == FILES
    assert fault(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_last_one_counts_by_its_number(tmp_path: Path) -> None:
    """As text, 9 comes after 10."""
    assert last_whole(tmp_path / "nothing") is None
    for step in (9, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "optimizer.pt").write_bytes(b"mom"), "optimizer.pt has 3 of 7 bytes"),
        (
            lambda path: (path / "optimizer.pt").write_bytes(b"momentz"),
            "optimizer.pt is not what was written",
        ),
        (lambda path: (path / SEAL).unlink(), f"{SEAL} is missing or damaged"),
        (lambda path: (path / SEAL).write_text('{"a": [1'), f"{SEAL} is missing or damaged"),
        (lambda path: (path / SEAL).write_text("[]"), f"{SEAL} is missing or damaged"),
    ],
    ids=["file gone", "cut short", "one byte other", "no seal", "half a seal", "another seal"],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    damage: object, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a checkpoint would crash the run, or worse, continue it with other weights."""
    for step in (1, 2):
        write(tmp_path, step)
    damage(tmp_path / "checkpoint-2")  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert last_whole(tmp_path) == tmp_path / "checkpoint-1"
    (record,) = caplog.records
    assert f"checkpoint-2 is damaged ({words})" in record.getMessage()


def test_a_damaged_checkpoint_gives_way_to_its_successor(tmp_path: Path) -> None:
    """The resumed run comes to the step of the damaged one again."""
    write(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    write(tmp_path, 1)
    assert fault(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(("call", "successes"), [("fsync", 0), ("fsync", 4), ("replace", 0)])
def test_a_disk_that_fails_while_publishing_leaves_what_was_there(
    call: str, successes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at the first file, at the seal or at the renaming: the checkpoint before is still the last."""
    write(tmp_path, 1)
    original, left = getattr(os, call), [successes]

    def fail_in_the_end(*args: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, call, fail_in_the_end)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-1"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
