"""The command line: parse, one call, print."""

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from tinybert.errors import InputError, Rejected, Stopped, one_line

DESCRIPTION = """\
Distil a BERT-family encoder into one that is several times smaller and faster.

commands:
  quickstart  the whole job on real parts from PyPI, in minutes
  finetune    teach an encoder a task: a teacher, or a baseline
  distill     teach a small student what a fine-tuned teacher knows
  general     teach a small student on text without labels, for any task after it
  evaluate    score a model on labelled rows
  augment     write changed copies of rows, to train on
  report      write a run's page: figures, losses, attention, disagreements
  prune       make a model smaller without training: word pieces, feed-forward neurons
  export      write a model as ONNX, with 32-bit and 8-bit weights
  benchmark   measure models: size, memory, latency, throughput
"""


# Of the hundred options of transformers' TrainingArguments, those that --help shows.
USUAL = {"seed", "max_steps", "gradient_accumulation_steps", "weight_decay", "torch_compile", "report_to"}


# After Ctrl-C; SIGTERM keeps a checkpoint of the step under way.
_GOES_ON = dict.fromkeys(
    ("finetune", "distill", "general"),
    ": the same command with --resume_from_checkpoint true goes on from the last checkpoint, if there is one",
)


def _say(text: object, *, file: TextIO | None = None) -> None:
    """Print, in one of several processes (torchrun's, accelerate's) only: all come to the same."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)


class _Speaker(logging.Handler):
    """Prints what the library has to say while it works; results alone go to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message} ({self.prog} --help lists what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, or with one line on stderr 2 (bad input) or 1 (too bad)."""
    parser = _Parser(
        prog="tinybert",
        description=DESCRIPTION,
        epilog="tinybert COMMAND --help lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinybert {version('tinybert')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="the command's options")
    # A terminal shows progress and results; libraries' advice to developers is not for it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log is no place for progress bars
    library = logging.getLogger("tinybert")
    if not any(isinstance(handler, _Speaker) for handler in library.handlers):
        library.addHandler(_Speaker(logging.INFO))
        library.setLevel(logging.INFO)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if not words:
            raise InputError(f"no command: give one of {', '.join(COMMANDS)} (tinybert --help tells more)")
        arguments = parser.parse_args(words)
        # A stream of text is tokenised in a thread while models run; elsewhere processes may be forked.
        reads_corpora = arguments.command in ("general", "prune")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", str(reads_corpora).lower())
        COMMANDS[arguments.command](arguments.options)
    except InputError as error:
        print(f"tinybert: error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(
            f"tinybert: error: {error.filename} may not be read or written: {error.strerror}", file=sys.stderr
        )
        return 2
    except Rejected as verdict:
        print(f"tinybert: {verdict}", file=sys.stderr)
        return 1
    except Stopped as stop:
        _say(f"tinybert: {stop}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"tinybert: interrupted{_GOES_ON.get(words[0], '')}", file=sys.stderr)
        return 130
    return 0


def _parse(command: str, options: list[str], *kinds: type) -> tuple[Any, ...]:
    """Read options, and the file of ``--config`` below them, into one dataclass of each kind."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser, _Parser):
        """Both: options from dataclasses, errors as one line."""

    parser = Parser(kinds, prog=f"tinybert {command}", allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file with the same options; those given here win.")
    _shorten_help(parser, command, kinds)
    words = _words(command, options)
    known = parser._option_string_actions
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            parser.error(f"unknown option {name}{f' (did you mean {close[0]}?)' if close else ''}")
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except InputError:
        raise
    except ValueError as error:  # transformers checks its own options
        parser.error(one_line(error))
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    return tuple(parsed[: len(kinds)])


def _words(command: str, options: list[str]) -> list[str]:
    """Return the options, those of the file of ``--config`` before them."""
    before = _Parser(prog=f"tinybert {command}", add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    config, rest = before.parse_known_args(options)
    return rest if config.config is None else _options_of_file(Path(config.config)) + rest


def _shorten_help(parser: argparse.ArgumentParser, command: str, kinds: tuple[type, ...]) -> None:
    """Keep a command's own options in its help, and of those it inherits the usual ones."""
    from transformers import TrainingArguments

    own = {
        name
        for kind in kinds
        for parent in kind.__mro__
        for name in vars(parent).get("__annotations__", ())
        if parent is not TrainingArguments
    }
    usual = USUAL if command == "distill" else USUAL | {"num_train_epochs", "learning_rate"}
    for action in parser._actions:
        inherited = action.dest in TrainingArguments.__dataclass_fields__ and action.dest not in own
        if inherited and action.dest not in usual:
            action.help = argparse.SUPPRESS
    if any(issubclass(kind, TrainingArguments) for kind in kinds):
        parser.epilog = "All TrainingArguments of transformers apply beside these."


def _options_of_file(path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read --config {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path} must hold `option: value` lines, not {type(content).__name__}")
    options: list[str] = []
    for name, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            texts = (
                json.dumps(entry, default=str) if isinstance(entry, dict) else str(entry) for entry in values
            )
            options += [f"--{name}", *texts]
    return options


def _finetune(options: list[str]) -> None:
    from tinybert.preflight import DryRun
    from tinybert.stages import FinetuneArguments, finetune, preflight_finetune
    from tinybert.training import TrainingConfig

    arguments, config, wish = _parse("finetune", options, FinetuneArguments, TrainingConfig, DryRun)
    if wish.dry_run:
        _say(preflight_finetune(arguments, config).text())
        return
    with redirect_stdout(sys.stderr):  # where transformers prints its log
        result = finetune(arguments, config)
    _say(f"\n{result.table()}\n\nNext: tinybert distill --teacher {result.output_dir} ...")


def _distill(options: list[str]) -> None:
    from tinybert.preflight import DryRun
    from tinybert.stages import (
        OF_ONE_STAGE,
        DistillArguments,
        distill_task,
        preflight_distill,
        refuse_of_one_stage,
    )
    from tinybert.trainer import DistillationConfig

    words = _words("distill", options)
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}
    for name in OF_ONE_STAGE:
        if name in given:  # with their defaults as well
            refuse_of_one_stage(name)
    arguments, config, wish = _parse("distill", words, DistillArguments, DistillationConfig, DryRun)
    if wish.dry_run:
        _say(preflight_distill(arguments, config).text())
        return
    with redirect_stdout(sys.stderr):
        result = distill_task(arguments, config)
    tables = "\n\n".join(filter(None, [result.table(), result.files]))
    _say(f"\n{tables}\n\n{result.output_dir} holds the student, a plain transformers model folder.")
    if (result.output_dir / "report.html").is_file():
        _say(f"What it kept: {result.output_dir / 'report.html'}")


def _general(options: list[str]) -> None:
    from tinybert.general import (
        GeneralArguments,
        GeneralConfig,
        distill_general,
        layer_table,
        preflight_general,
    )
    from tinybert.preflight import DryRun

    arguments, config, wish = _parse("general", options, GeneralArguments, GeneralConfig, DryRun)
    if wish.dry_run:
        _say(preflight_general(arguments, config).text())
        return
    with redirect_stdout(sys.stderr):
        result = distill_general(arguments, config)
    layers = layer_table(result)  # nothing without held-out text
    _say(f"\n{result.table()}\n" + (f"\n{layers}\n" if layers else ""))
    _say(f"Next: tinybert distill --student {result.output_dir} ...")


def _evaluate(options: list[str]) -> None:
    from tinybert.stages import EvaluateArguments, evaluate

    (arguments,) = _parse("evaluate", options, EvaluateArguments)
    with redirect_stdout(sys.stderr):
        scores = evaluate(arguments)
    for name, value in scores.items():
        _say(f"{name:18}{value:9.4f}")


def _augment(options: list[str]) -> None:
    from tinybert.augment_files import AugmentArguments, augment_file

    (arguments,) = _parse("augment", options, AugmentArguments)
    made = augment_file(arguments)
    _say(f"{made.output}: {made.rows:,} rows and {made.copies:,} copies of them, {made.seconds:.0f} s")
    _say(f"Next: tinybert distill --augmented {made.output} ...")


def _report(options: list[str]) -> None:
    from tinybert.run_report import ReportArguments, report

    if options and not options[0].startswith("-"):
        options = ["--run", *options]
    (arguments,) = _parse("report", options, ReportArguments)
    _say(report(arguments))


def _prune(options: list[str]) -> None:
    from tinybert.prune import PruneArguments, prune

    (arguments,) = _parse("prune", options, PruneArguments)
    pruned = prune(arguments)
    _say(f"\n{pruned.table()}\n\n{pruned.result.output_dir} holds the model, a plain transformers folder.")
    _say(f"Next: tinybert {pruned.recovery} ...")


def _export(options: list[str]) -> None:
    from tinybert.export import ExportArguments, to_onnx

    (arguments,) = _parse("export", options, ExportArguments)
    exported = to_onnx(arguments)
    _say(f"{exported.table()}\n\nNext: tinybert benchmark --models {exported.folder.parent}")


def _benchmark(options: list[str]) -> None:
    from tinybert.benchmark import BenchmarkArguments, measure, table

    (arguments,) = _parse("benchmark", options, BenchmarkArguments)
    _say(table(measure(arguments)))


def _quickstart(options: list[str]) -> None:
    from tinybert.quickstart import QuickstartArguments, quickstart

    (arguments,) = _parse("quickstart", options, QuickstartArguments)
    _say(quickstart(arguments))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": _quickstart,
    "finetune": _finetune,
    "distill": _distill,
    "general": _general,
    "evaluate": _evaluate,
    "augment": _augment,
    "report": _report,
    "prune": _prune,
    "export": _export,
    "benchmark": _benchmark,
}
