"""The run directory: claimed only when empty, filled by renaming, resumed from its last checkpoint."""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from safetensors.torch import load_model
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from tinybert.checkpoints import last_whole
from tinybert.errors import InputError, Stopped
from tinybert.model_card import model_card, origins
from tinybert.summary import RECORD as RECORD
from tinybert.summary import model_lines, score_text, with_retention, without_secrets
from tinybert.training import EncoderTrainer

CHECKPOINTS = "checkpoints"
SETTINGS = "settings.json"
PAGE = "report.html"
_RECORDED_PACKAGES = ("tinybert", "torch", "transformers", "datasets", "accelerate")

# Of TrainingArguments, what a resumed run must have as it was begun. Batches may become smaller for want of
# memory; where, how often and to whom things are written is free.
_HELD = {
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
}

Config = TypeVar("Config", bound=TrainingArguments)


@dataclass(frozen=True)
class Figures:
    """One model's row in the closing table.

    Attributes:
        name: Its part: teacher, student, model; with how it was made, where there are several ways.
        metrics: On the eval rows.
        parameters: Their number.
        file_size: Bytes of its weights on disk.
        seconds: What making it took here; None for a model that came ready.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    file_size: int
    seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        output_dir: The run directory.
        metric: The metric that counts here; None where nothing was evaluated.
        figures: The models to compare; the one that was made is the last.
        files: What the ONNX files hold and score, as text; empty where none were asked for.
    """

    output_dir: Path
    metric: str | None
    figures: tuple[Figures, ...]
    files: str = ""

    def table(self) -> str:
        """Return the models side by side as text, their metric in percent unless it is an error."""
        width = max([10, *(len(row.name) for row in self.figures)])
        lines = [f"{'':{width}}{self.metric or '':>18}{'parameters':>14}{'file':>12}{'time':>9}"]
        for row in self.figures:
            score = "" if self.metric is None else score_text(row.metrics[self.metric], self.metric)
            seconds = "" if row.seconds is None else f"{row.seconds:.0f} s"
            lines.append(
                f"{row.name:{width}}{score:>18}{row.parameters / 1e6:12.2f} M"
                f"{row.file_size / 1e6:9.1f} MB{seconds:>9}"
            )
        return "\n".join(lines)


def check_claimable(
    folder: Path, *, overwrite: bool = False, resume: bool | None = False, inputs: Iterable[str] = ()
) -> None:
    """Check, without writing, that a run may use a folder.

    Args:
        folder: The output folder. One where a run was stopped before its first checkpoint counts as empty.
        overwrite: Whether an earlier run in it may be replaced.
        resume: Whether an earlier run in it is to go on; None where none can.
        inputs: Models and files the run reads, which must not lie in the folder.

    Raises:
        InputError: It is a file, is read from, cannot be written, is finished already, or holds
            something and neither overwriting nor resuming was asked for.
    """
    try:
        exists = folder.exists()
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be made: {error.strerror}") from error
    if exists and not folder.is_dir():
        raise InputError(f"the output {folder} is a file: give a folder")
    for name in inputs:
        source = Path(name).resolve()
        if source.exists() and folder.resolve() in (source, *source.parents):
            raise InputError(
                f"the output folder {folder} holds the input {name}: choose another output folder"
            )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        raise InputError(f"the output folder {folder} cannot be made: {nearest} is not writable")
    if resume and (folder / RECORD).exists():
        raise InputError(
            f"the run in {folder} is finished: nothing to resume (tinybert export and report go on from it); "
            "--overwrite_output_dir starts anew"
        )
    if not (resume or overwrite) and _holds_something(folder):
        ways = "--overwrite_output_dir true"
        if resume is not None:
            ways += " or --resume_from_checkpoint true"
        raise InputError(f"the output folder {folder} exists and is not empty: choose another, or add {ways}")


def _holds_something(folder: Path) -> bool:
    begun = folder / CHECKPOINTS / SETTINGS
    return any(not path.is_dir() and path != begun for path in folder.rglob("*"))


def _check_schedule(config: TrainingArguments) -> None:
    """Refuse what the stages would not do: they evaluate when they save, and the task's metric chooses.

    Raises:
        InputError: Something else was asked for.
    """
    saved = SaveStrategy(config.save_strategy).value
    evaluated, chosen = IntervalStrategy(config.eval_strategy).value, config.metric_for_best_model
    if saved not in ("epoch", "steps"):
        raise InputError(f"--save_strategy {saved} would leave no model to choose: give epoch or steps")
    if evaluated not in ("no", saved):
        raise InputError(
            f"--eval_strategy {evaluated}: models are evaluated when they are saved: give --save_strategy "
            f"{evaluated}"
        )
    if chosen not in (None, "loss"):
        raise InputError(
            f"--metric_for_best_model {chosen}: the task's own metric chooses the checkpoint: leave it out"
        )


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder inside ``target``, then move its files up by renaming.

    Whatever interrupts the writing, each file in ``target`` is the old one or the new one, never a part.
    """
    target.mkdir(parents=True, exist_ok=True)
    # Inside, as the parent may be another file system, or not writable.
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as temporary:
        write(Path(temporary))
        # The record goes last: where it is, the rest is.
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == RECORD):
            os.replace(path, target / path.name)


def run_record(
    arguments: Any, result: Result, seconds: float, data: dict[str, dict[str, str]], **more: Any
) -> dict[str, Any]:
    """Return what run.json says of a run: how, when and with what it was made, and its figures.

    ``training`` and ``stages`` are empty unless ``more`` has them.
    """
    record: dict[str, Any] = {
        "command": without_secrets(sys.argv),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in _RECORDED_PACKAGES},
        "arguments": asdict(arguments),
        "origins": origins(asdict(arguments)),
        "training": {},
        "data": data,
        "metric": result.metric,
        "models": [asdict(figures) for figures in result.figures],
        "stages": {},
    }
    return record | more


def file_size(model: PreTrainedModel) -> int:
    """Return the bytes of a model's tensors as they stand in memory: its file's size but for a header."""
    # A masked-LM head shares the embeddings, which are written once.
    sizes = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()
    }
    return sum(sizes.values())


class Run:
    """One run in its directory, from the check to the record.

    Stages keep their checkpoints under ``checkpoints/<stage>`` while the run lasts; a finished stage
    leaves its model there, so that a resumed run starts with the stage that was interrupted.

    Args:
        config: Where and how; ``resume_from_checkpoint`` set to anything but "false" resumes.
        arguments: The command's dataclass, for the record.
        inputs: What the run reads: models and files.

    Raises:
        InputError: See ``check_claimable``.
    """

    def __init__(self, config: TrainingArguments, arguments: Any, inputs: Iterable[str]) -> None:
        """Check the folder; nothing is written before ``claim``."""
        self.folder = Path(str(config.output_dir))
        self.config = config
        self.arguments = arguments
        self.resume = str(config.resume_from_checkpoint).lower() not in ("none", "false", "")
        self.overwrite = bool(getattr(config, "overwrite_output_dir", False))
        self.started = time.monotonic()
        self.stages: dict[str, Any] = {}
        self.is_main = PartialState().is_main_process
        _check_schedule(config)
        check_claimable(self.folder, overwrite=self.overwrite, resume=self.resume, inputs=inputs)

    def seconds(self) -> float:
        """Return the time since the run began."""
        return time.monotonic() - self.started

    def claim(self) -> None:
        """Make the folder; where it is to be overwritten, remove what an earlier run made, and only that.

        Raises:
            InputError: The run is to go on with other settings than it was begun with.
        """
        if self.resume:
            self._check_as_begun()
        PartialState().wait_for_everyone()  # no process may find the folder another has just made
        if not self.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the output folder {self.folder} cannot be made: {error.strerror}") from error
        if self.overwrite and not self.resume:
            for name in (RECORD, PAGE):
                (self.folder / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, "onnx"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if not (self.resume and (self.folder / CHECKPOINTS / SETTINGS).exists()):
            settings = json.dumps(self._settings())
            write_whole(self.folder / CHECKPOINTS, lambda folder: (folder / SETTINGS).write_text(settings))

    def _settings(self) -> dict[str, Any]:
        """Return what decides what a run makes, as JSON has it."""
        own = {entry.name for entry in fields(self.config)}
        own -= {"overwrite_output_dir", *(entry.name for entry in fields(TrainingArguments))}
        training = {name: getattr(self.config, name) for name in sorted(own | _HELD)}
        return json.loads(json.dumps(asdict(self.arguments) | training, default=str))

    def _check_as_begun(self) -> None:
        """Refuse to go on with other settings than the run was begun with.

        Raises:
            InputError: One differs; a model made half by the one and half by the other is neither. Or the
                file that says what they were is damaged.
        """
        kept = self.folder / CHECKPOINTS / SETTINGS
        if not kept.is_file():
            return
        try:
            begun = dict(json.loads(kept.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{kept}, which says what the run was begun with, is damaged ({error}): start anew with "
                "--overwrite_output_dir true, or delete the file if you know the options to be the same"
            ) from error
        now = self._settings()
        for name in begun:
            if name in now and begun[name] != now[name]:
                raise InputError(
                    f"the run in {self.folder} was begun with {name} {begun[name]}, and is to go on with "
                    f"{now[name]}: give what it was, or start anew with --overwrite_output_dir true"
                )

    def stage_folder(self, stage: str) -> Path:
        """Return where a stage keeps its checkpoints."""
        return self.folder / CHECKPOINTS / stage

    def stage_config(self, stage: str, config: Config, *, best: str | None) -> Config:
        """Return a stage's training arguments: evaluated whenever it is saved, as the config has it.

        The best by the metric ``best`` is kept; without one there is no evaluation.
        """
        return replace(
            config,
            output_dir=str(self.stage_folder(stage)),
            eval_strategy="no" if best is None else config.save_strategy,
            eval_steps=config.save_steps,
            load_best_model_at_end=best is not None,
            metric_for_best_model=best,
            greater_is_better=best != "loss",
        )

    def last_checkpoint(self, stage: str) -> Path | None:
        """Return the checkpoint that a resumed run goes on from: the stage's last one that is whole."""
        return last_whole(self.stage_folder(stage)) if self.resume else None

    def train(self, stage: str, trainer: EncoderTrainer) -> None:
        """Train a stage, from its last checkpoint where the run is resumed, and note how it went.

        Raises:
            Stopped: SIGTERM ended the training; it can go on from the checkpoint that was written.
        """
        started = time.monotonic()
        checkpoint = self.last_checkpoint(stage)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.stopped:
            raise Stopped(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stage}), all "
                f"kept in {self.folder}: the same command with --resume_from_checkpoint true goes on"
            )
        self.stages[stage] = {
            "seconds": round(time.monotonic() - started, 1),
            "steps": trainer.state.global_step,
            "best_metric": trainer.state.best_metric,
            "log": trainer.state.log_history,
        }

    def keep(self, stage: str, model: PreTrainedModel) -> None:
        """Keep a finished stage's model, for a resumed run to go on from."""

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            (folder / RECORD).write_text(json.dumps(self.stages), encoding="utf-8")

        if self.is_main:
            write_whole(self.stage_folder(stage) / "finished", write)

    def restore(self, stage: str, model: PreTrainedModel) -> bool:
        """Load what ``keep`` kept of a finished stage into a model; say whether there was any."""
        kept = self.stage_folder(stage) / "finished"
        if not self.resume or not (kept / RECORD).is_file():
            return False
        load_model(model, str(kept / "model.safetensors"))
        self.stages |= json.loads((kept / RECORD).read_text(encoding="utf-8"))
        return True

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metric: str | None,
        figures: tuple[Figures, ...],
        data: dict[str, dict[str, str]],
    ) -> Result:
        """Publish the model folder and run.json, drop the checkpoints, and return the result."""
        result = Result(self.folder, metric, figures)
        more = {"training": self.config.to_sanitized_dict(), "stages": self.stages}
        record = run_record(self.arguments, result, self.seconds(), data, **more)
        lines = with_retention(model_lines(record), metric)
        card = model_card(record, lines, self.folder.resolve().name, type(model).__name__)

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n")

        if self.is_main:
            write_whole(self.folder, write)
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        PartialState().wait_for_everyone()  # the folder is there for whoever goes on from it
        return result
