"""Checkpoints that are whole or not there: written aside, sealed with digests, then renamed."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

SEAL = "seal.json"
_ASIDE = ".writing"


def aside(folder: Path) -> Path:
    """Return where a checkpoint of ``folder`` is written before it is whole."""
    return folder / _ASIDE


def clear_aside(folder: Path) -> None:
    """Remove what an interrupted writing left."""
    shutil.rmtree(aside(folder), ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Return a checkpoint's folder name, as transformers names it."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def publish(folder: Path, step: int) -> Path:
    """Seal the checkpoint that lies aside and move it to its place; return where it is.

    The seal lists every file's size and digest. Files, seal and names are on the disk, not only in its
    cache, when this returns: pulling the plug loses nothing either.

    Raises:
        OSError: The disk is full, or cannot be written; earlier checkpoints are untouched.
    """
    source, target = aside(folder) / checkpoint_name(step), folder / checkpoint_name(step)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    sealed = {path.relative_to(source).as_posix(): [path.stat().st_size, _digest(path)] for path in files}
    (source / SEAL).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
    for path in (*files, source / SEAL, source):
        _sync(path)
    if target.exists():  # damaged: it would have been resumed from, and be behind us, if it were whole
        os.replace(target, aside(folder) / "damaged")
    os.replace(source, target)
    _sync(folder)
    clear_aside(folder)
    return target


def fault(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, in a few words; None where it is whole."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, (size, digest) in sealed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
            if _digest(path) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{SEAL} is missing or damaged"
    return None


def last_whole(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole, or None; damaged ones after it are reported."""
    found: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit():
            found[int(number)] = path
    for step in sorted(found, reverse=True):
        checkpoint = found[step]
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning("the checkpoint %s is damaged (%s) and is passed over", checkpoint, wrong)
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
