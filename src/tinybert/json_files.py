"""Results -> a JSON file, whole or not at all."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinybert.errors import InputError


def check_writable(path: Path) -> None:
    """Find out before minutes of work whether the file of ``--json`` can be written.

    Raises:
        InputError: It cannot.
    """
    if path.is_dir():
        raise InputError(f"cannot write --json {path}: it is a folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write --json {path}: {path.parent} is no folder that can be written")


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result aside, then move it to its place.

    Raises:
        InputError: It cannot be written; nothing is left of it.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"cannot write --json {path}: {error.strerror}") from error
