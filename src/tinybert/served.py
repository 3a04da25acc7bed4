"""What is known of a run's model in use: the ONNX files beside it, and what a benchmark measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinybert.errors import InputError, one_line
from tinybert.sessions import FILES, FOLDER, open_session, runner, session_logits
from tinybert.summary import Line, is_error, misfit

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from transformers import PreTrainedTokenizerBase

_WORDS = {"torch": "", "onnx": " ONNX", "onnx_int8": " int8"}
_LOAD = {"batch_size": int, "length": int, "p50": float}
_SHAPE = {
    "machine": dict,
    "rows": [{"model": str, "backend": str, "loads": [_LOAD]}],
}


def onnx_lines(folder: Path, made: Line) -> list[Line]:
    """Return the ONNX files of a model folder as models of their own, with their sizes.

    Args:
        folder: Of the model.
        made: The model itself.
    """
    return [
        Line(name, None, made.parameters, path.stat().st_size)
        for name, path in _onnx_files(folder, made).items()
    ]


def _onnx_files(folder: Path, made: Line) -> dict[str, Path]:
    files = {made.name + _WORDS[backend]: folder / FOLDER / name for backend, name in FILES.items()}
    return {name: path for name, path in files.items() if path.is_file()}


def onnx_logits(
    folder: Path, made: Line, rows: "datasets.Dataset", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, "np.ndarray"]:
    """Return the logits of each ONNX file of a model folder (``session_logits``), by the name of its line.

    Args:
        folder: Of the model.
        made: The model itself.
        rows: Tokenised rows.
        tokenizer: Pads.

    Raises:
        InputError: ONNX Runtime is not installed, or cannot read or run a file.
    """
    found = {}
    for name, path in _onnx_files(folder, made).items():
        run = runner(open_session(path))
        try:
            found[name] = session_logits(run, rows, tokenizer)
        except Exception as error:  # its exceptions have no base of their own
            raise InputError(f"cannot run {path}: {one_line(error)}") from error
    return found


def with_latencies(lines: Sequence[Line], path: Path, folders: Mapping[str, Path]) -> tuple[list[Line], str]:
    """Return the lines with what a benchmark measured, and a sentence on what that was.

    Args:
        lines: Models by name, ONNX files among them as ``onnx_lines`` names them.
        path: What ``tinybert benchmark --json`` wrote.
        folders: The model folder of each name.

    Raises:
        InputError: It is no such file, or measured none of these models.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read --benchmark {path}: {one_line(error)}") from error
    wrong = misfit(figures, _SHAPE, "it")
    if wrong:
        raise InputError(f"--benchmark {path} is not what tinybert benchmark --json writes: {wrong}")
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in figures["rows"]:
        for name, folder in folders.items():
            if row["backend"] in _WORDS and Path(row["model"]).resolve() == folder.resolve():
                loads = {(load["batch_size"], load["length"]): load["p50"] for load in row["loads"]}
                found[name + _WORDS[row["backend"]]] = loads
    found = {line.name: found[line.name] for line in lines if found.get(line.name)}
    shared = set.intersection(*(set(loads) for loads in found.values())) if found else set()
    if not shared:
        measured = ", ".join(sorted({row["model"] for row in figures["rows"]}))[:200] or "nothing"
        raise InputError(
            f"--benchmark {path} measured {measured}, and none of {', '.join(map(str, folders.values()))}: "
            "give a benchmark of the run's folder"
        )
    batch, length = min(shared, key=lambda load: (load[0], -load[1]))
    timed = [
        replace(line, latency=1000 * found[line.name][batch, length]) if line.name in found else line
        for line in lines
    ]
    return timed, _measured(batch, length, figures["machine"])


def _measured(batch: int, length: int, machine: Mapping[str, Any]) -> str:
    texts = "one text" if batch == 1 else f"a batch of {batch} texts"
    threads = machine.get("threads")
    count = "" if misfit(threads, int, "") else f", {threads} thread{'s' if threads != 1 else ''}"
    where = f" of {machine['cpu']}" if isinstance(machine.get("cpu"), str) else ""
    return f"An answer here is the one to {texts} of {length} word pieces: the median{count}{where}."


def tradeoff(lines: Sequence[Line], metric: str | None) -> dict[str, Any] | None:
    """Return the points of score against latency, where two models have both; for a page."""
    factor = 1 if is_error(metric) else 100
    points = [
        (line.name, line.latency, factor * line.score)
        for line in lines
        if line.latency is not None and line.score is not None
    ]
    if len(points) < 2:
        return None
    return {"points": points, "x_label": "milliseconds an answer", "y_label": metric or "score"}
