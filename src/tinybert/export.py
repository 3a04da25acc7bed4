"""Model folder -> ONNX beside it, with 32-bit and 8-bit weights; each held to what PyTorch says.

The files lie where ONNX Runtime's users, Optimum and transformers.js look for them: ``onnx/model.onnx`` and
``onnx/model_quantized.onnx`` in the model folder, whose ``config.json`` keeps the names of the labels.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert import models
from tinybert.capture import evaluating
from tinybert.data import TaskData, tokenize
from tinybert.errors import InputError, Rejected
from tinybert.evaluation import score
from tinybert.onnx_graph import export_graph, made_batches, outputs_of
from tinybert.quantize import needs_reduced_range, quantize
from tinybert.rows import MAX_LENGTH_HELP, STRIDE_HELP, row_length, rows_to_score
from tinybert.sessions import FOLDER, FP32, INT8, Run, open_session, runner, session_logits
from tinybert.vocabulary import check_pieces

TOLERANCE = 1e-4  # between PyTorch and ONNX Runtime, of any output; of the largest where that is above 1
_CHECKED_ROWS = 64
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass
class ExportArguments:
    """What to export, and how good 8-bit weights must be."""

    model: str = field(metadata={"help": "Model to export, with any head: a folder or a hub name."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Model folder for the files; --model's own unless given, which must be a folder."},
    )
    int8: bool = field(default=False, metadata={"help": "Make a file with 8-bit weights as well."})
    check: str | None = field(
        default=None, metadata={"help": "Labelled rows that both files are scored on: as for evaluate."}
    )
    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "Points that 8-bit weights may cost on --check; more: exit status 1. 1 unless given."
        },
    )
    reduce_range: bool | None = field(
        default=None,
        metadata={"help": "7-bit weights, which x86 CPUs without VNNI need; by this CPU unless given."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns of --check."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    label_columns: list[str] | None = field(
        default=None, metadata={"help": "Its columns of 0 and 1, a label each."}
    )
    max_length: int | None = field(default=None, metadata={"help": f"Of --check. {MAX_LENGTH_HELP}"})
    stride: int | None = field(default=None, metadata={"help": f"Of --check. {STRIDE_HELP}"})

    def __post_init__(self) -> None:
        """Refuse what would silently do nothing."""
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise InputError(f"--max_drop is {self.max_drop}: expected points from 0 to 100")
        if self.max_drop is not None and not (self.int8 and self.check):
            raise InputError("--max_drop is for --int8 with --check: add them or leave it out")
        if self.reduce_range is not None and not self.int8:
            raise InputError("--reduce_range is for --int8: add it or leave both out")
        unread = ("text_columns", "label_column", "label_columns", "max_length", "stride")
        given = [name for name in unread if getattr(self, name) is not None]
        if self.check is None and given:
            raise InputError(f"--{given[0]} is about the rows of --check: add it or leave both out")


@dataclass(frozen=True)
class Exported:
    """What exporting made.

    Attributes:
        folder: The folder of the ONNX files.
        sizes: Bytes of each file, by its name.
        difference: The largest between any output of PyTorch and of ONNX Runtime.
        metric: What the scores are; None where nothing was scored.
        scores: Of ``fp32`` and ``int8`` on the check rows, between 0 and 1.
        reduced_range: Whether 8-bit weights keep to 7 bits.
    """

    folder: Path
    sizes: dict[str, int]
    difference: float
    metric: str | None
    scores: dict[str, float]
    reduced_range: bool

    def table(self) -> str:
        """Return files, sizes and scores as text."""
        lines = [f"{'':24}{self.metric or '':>18}{'file':>12}"]
        for name, kind in ((FP32, "fp32"), (INT8, "int8")):
            if name in self.sizes:
                shown = f"{100 * self.scores[kind]:.2f}" if kind in self.scores else ""
                lines.append(f"{name:24}{shown:>18}{self.sizes[name] / 1e6:9.1f} MB")
        lines.append(f"\nONNX Runtime and PyTorch differ by {self.difference:.1e} at most.")
        if INT8 in self.sizes:
            why = "for x86 CPUs without VNNI" if self.reduced_range else "for ARM, and x86 CPUs with VNNI"
            lines.append(f"Weights of {INT8}: {7 if self.reduced_range else 8} bits, {why}.")
            if not self.scores:
                lines.append(f"What 8-bit weights cost is not measured: {INT8} needs --check FILE.")
        return "\n".join(lines)


def to_onnx(arguments: ExportArguments) -> Exported:
    """Export a model to ONNX, and hold the files to what PyTorch answers.

    The 32-bit file must answer as PyTorch does, within ``TOLERANCE``, on batches of several lengths and
    paddings and on rows of ``check``. The 8-bit file must score within ``max_drop`` points of it on
    ``check``. Batch and sequence are dynamic axes. Earlier ONNX files in the folder are replaced or, if 8-bit
    and not asked for again, removed: they are of other weights.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
        Rejected: The 8-bit file lost too much, and only the 32-bit one was kept; or not even that one
            answered as PyTorch does, and nothing was written.
    """
    folder = _output_folder(arguments)
    model = models.open_whole(arguments.model)
    outputs = outputs_of(model)
    tokenizer = _fitting_tokenizer(arguments.model, model)
    rows = None if arguments.check is None else _check_rows(arguments, model, tokenizer)
    batches = made_batches(model, tokenizer)
    if rows is not None:
        batches += _real_batches(rows[1], tokenizer, list(batches[0]))
    with _scratch(folder) as written:
        export_graph(model, batches[1], outputs, written / FP32)
        run = runner(open_session(written / FP32))
        difference = largest_difference(model, run, batches)
        if not difference <= TOLERANCE:
            raise Rejected(
                f"ONNX Runtime and PyTorch differ by {difference:.1e} on {arguments.model}, more than "
                f"{TOLERANCE:.0e}: nothing was written"
            )
        scores = {} if rows is None else {"fp32": _score(run, rows, tokenizer)}
        reduced = needs_reduced_range() if arguments.reduce_range is None else arguments.reduce_range
        drop, most = 0.0, 1.0 if arguments.max_drop is None else arguments.max_drop
        if arguments.int8:
            quantize(written / FP32, written / INT8, reduce_range=reduced)
            run = runner(open_session(written / INT8))
            _check_finite(run, batches)
            if rows is not None:
                scores["int8"] = _score(run, rows, tokenizer)
                drop = 100 * (scores["fp32"] - scores["int8"])
        if drop > most:
            (written / INT8).unlink()
        if folder.resolve() != Path(arguments.model).resolve():
            model.config.save_pretrained(written)
            tokenizer.save_pretrained(written)
        sizes = _publish(written, folder)
    metric = None if rows is None else rows[0].metric
    if drop > most:
        raise Rejected(
            f"8-bit weights cost {drop:.2f} points of {metric} on {arguments.check} "
            f"({100 * scores['fp32']:.2f} to {100 * scores['int8']:.2f}), more than --max_drop "
            f"{most:g}: only {folder / FOLDER / FP32} was kept"
        )
    return Exported(folder / FOLDER, sizes, difference, metric, scores, reduced)


def _output_folder(arguments: ExportArguments) -> Path:
    if arguments.output_dir is None and not Path(arguments.model).is_dir():
        models.open_config(arguments.model)  # says what is wrong with a path that is none
        raise InputError(f"{arguments.model} is no folder to write into: give --output_dir")
    folder = Path(arguments.output_dir or arguments.model)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output {folder} is a file: give a folder")
    weights = next((path for ending in _WEIGHTS for path in folder.glob(ending)), None)
    if weights is not None and folder.resolve() != Path(arguments.model).resolve():
        raise InputError(
            f"the output folder {folder} holds the weights of another model ({weights.name}), whose "
            "config.json and tokenizer would be replaced: choose another folder"
        )
    onnx = folder / FOLDER
    if onnx.exists() and not onnx.is_dir():
        raise InputError(f"{onnx} is a file, where a folder for ONNX files is to be: remove it")
    taken = [onnx / name for name in (FP32, INT8) if (onnx / name).is_dir()]
    if taken:
        raise InputError(f"{taken[0]} is a folder, where a file is to be: remove it")
    nearest = next(path for path in (onnx, *onnx.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise InputError(f"the output folder {onnx} cannot be made: {nearest} is not writable")
    return folder


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside another, which is made for it and goes with it if it stays empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            yield Path(temporary)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _fitting_tokenizer(source: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer after checking that every piece it makes has an embedding."""
    tokenizer = models.open_tokenizer(
        source, kind=models.task_of(model)[0] if models.has_task(model) else None
    )
    check_pieces(source, tokenizer, model)
    return tokenizer


def _publish(written: Path, folder: Path) -> dict[str, int]:
    """Move files to their places by renaming, no 8-bit file ever beside a 32-bit one of other weights."""
    onnx = folder / FOLDER
    onnx.mkdir(exist_ok=True)
    (onnx / INT8).unlink(missing_ok=True)
    sizes = {name: (written / name).stat().st_size for name in (FP32, INT8) if (written / name).exists()}
    for path in sorted(written.iterdir(), key=lambda path: path.name == INT8):
        os.replace(path, (onnx if path.name in sizes else folder) / path.name)
    return sizes


def largest_difference(model: PreTrainedModel, run: Run, batches: list[dict[str, Tensor]]) -> float:
    """Return the largest difference between a model's outputs and an ONNX file's, at real tokens.

    Relative to the largest output of a batch where that is above 1: float32 holds seven digits.
    """
    largest = 0.0
    with evaluating(model):
        for batch in batches:
            expected = model(**batch)
            real = batch["attention_mask"].bool().numpy()
            for name, found in run(batch).items():
                right = expected[name].numpy()
                if name != "logits" or found.ndim != 2:
                    # (B, C) has an answer a row, also where C happens to be T; all else one a token.
                    right, found = right[real], found[real]
                off = np.abs(right - found).max() / max(1.0, np.abs(right).max())
                largest = float(np.maximum(largest, off))  # keeps NaN
    return largest


def _check_finite(run: Run, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        if not all(np.isfinite(found).all() for found in run(batch).values()):
            raise Rejected("the 8-bit file answers with NaN or infinity: nothing was written")


def _check_rows(
    arguments: ExportArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[TaskData, datasets.Dataset]:
    if not models.has_task(model):
        raise InputError(
            f"--check scores models with a head for a task, and {arguments.model} is a "
            f"{type(model).__name__}: leave it out"
        )
    kind, _ = models.task_of(model)
    length = row_length(arguments.max_length, kind, model)
    data = rows_to_score(model, str(arguments.check), arguments)
    return data, tokenize(data, tokenizer, length, arguments.stride)


def _real_batches(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, names: list[str]
) -> list[dict[str, Tensor]]:
    """Return the first check rows, eight a batch, padded."""
    batches = []
    for start in range(0, min(len(rows), _CHECKED_ROWS), 8):
        columns = rows[start : start + 8]
        batch: Any = tokenizer.pad({name: columns[name] for name in names}, return_tensors="pt")
        batches.append(dict(batch))
    return batches


def _score(run: Run, rows: tuple[TaskData, datasets.Dataset], tokenizer: PreTrainedTokenizerBase) -> float:
    data, tokens = rows
    return score(data, tokens, session_logits(run, tokens, tokenizer))[data.metric]
