"""ONNX files in ONNX Runtime: opened on the CPU, fed with token ids, run over rows. Loads no torch."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinybert.errors import InputError, one_line

if TYPE_CHECKING:
    import datasets
    from onnxruntime import InferenceSession
    from transformers import PreTrainedTokenizerBase

# Beside a model: the folder, and the file of each backend as benchmarks call it.
FOLDER, FP32, INT8 = "onnx", "model.onnx", "model_quantized.onnx"
FILES = {"onnx": FP32, "onnx_int8": INT8}
MISSING = 'the packages for ONNX are not installed: pip install "tinybert[onnx]"'

_SPANS = ("start_logits", "end_logits")

Run = Callable[[Mapping[str, Any]], dict[str, np.ndarray]]


def check_installed() -> None:
    """Check that ONNX files can be made and run here.

    Raises:
        InputError: A package is missing.
    """
    if not all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")):
        raise InputError(MISSING)


def open_session(path: Path, threads: int | None = None) -> "InferenceSession":
    """Open an ONNX file on the CPU, with all of ONNX Runtime's own graph optimisations.

    Args:
        path: The file.
        threads: How many a matrix product is spread over; unless given, one for each core.

    Raises:
        InputError: ONNX Runtime is not installed, or cannot read the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(MISSING) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong comes as an exception too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise InputError(f"cannot open {path} in ONNX Runtime: {one_line(error)}") from error


def runner(session: "InferenceSession") -> Run:
    """Return a function: a batch of token ids, and what else a tokenizer makes -> the named outputs."""
    wanted = [entry.name for entry in session.get_inputs()]
    made = [entry.name for entry in session.get_outputs()]

    def run(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        zeros = np.zeros(np.shape(batch["input_ids"]), np.int64)  # no second text
        feed = {name: np.asarray(batch.get(name, zeros)) for name in wanted}
        return dict(zip(made, session.run(None, feed), strict=True))

    return run


def session_logits(
    run: Run, rows: "datasets.Dataset", tokenizer: "PreTrainedTokenizerBase", *, batch_size: int = 64
) -> np.ndarray:
    """Return logits as ``evaluation.predict_logits`` does, from an ONNX file: (rows, C) or (tokens, C).

    Args:
        run: Of ``runner``; gives ``logits``, or ``start_logits`` and ``end_logits``.
        rows: Tokenised rows (``tinybert.data.tokenize``); batched by length.
        tokenizer: Pads.
        batch_size: Rows a batch.
    """
    order = np.argsort(rows["length"], kind="stable")[::-1]
    names = [name for name in rows.column_names if name in tokenizer.model_input_names]
    found: list[Any] = [None] * len(order)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = tokenizer.pad(rows.select_columns(names)[places], return_tensors="np")
        made = run(batch)
        logits = made["logits"] if "logits" in made else np.stack([made[name] for name in _SPANS], axis=-1)
        for place, row, mask in zip(places, logits, batch["attention_mask"], strict=True):
            found[place] = row if row.ndim == 1 else row[mask.astype(bool)]
    return np.stack(found) if found[0].ndim == 1 else np.concatenate(found)
