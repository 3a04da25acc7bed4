"""The command line: what it runs, and that bad input is one line, status 2 and no output folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertForMaskedLM, BertModel, BertTokenizerFast, PreTrainedModel

from conftest import PIECES, QUICK, write_csv
from tinybert import cli
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.run_directory import Result
from tinybert.stages import (
    DistillArguments,
    EvaluateArguments,
    FinetuneArguments,
    distill_task,
    evaluate,
    finetune,
)
from tinybert.trainer import DistillationConfig
from tinybert.training import TrainingConfig

SMALL = {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_length": 16}
BUILT_BY_DEFAULT = {"layers": 4, "hidden_size": 312, "intermediate_size": 1200}
TRAINING = {name: value for name, value in QUICK.items() if name != "disable_tqdm"}
Options = dict[str, Any]


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="session")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    toy: dict[str, str],
    taught: Result,
    start_folder: Path,
    save_model: Callable[[PreTrainedModel, Path], Path],
) -> Path:
    """A folder of good and broken inputs."""
    folder = tmp_path_factory.mktemp("workshop")
    good, start = taught.output_dir, BertModel.from_pretrained(start_folder)
    shutil.copy(toy["train"], folder / "train.csv")
    shutil.copy(toy["eval"], folder / "eval.csv")
    shutil.copytree(good, folder / "teacher")
    shutil.copytree(start_folder, folder / "encoder")
    write_csv(folder / "columns.csv", [("good", "positive")], ("words", "verdict"))
    write_csv(folder / "unlabelled.csv", [("good",), ("bad",)], ("text",))
    write_csv(folder / "hole.csv", [("good", "positive"), ("bad", "")])
    write_csv(folder / "mixed.csv", [("good", "4.5"), ("bad", "awful")])
    write_csv(folder / "stranger.csv", [("good", "positive"), ("bad", "lukewarm")])
    write_csv(folder / "single.csv", [("good", "positive"), ("great", "positive")])
    (folder / "empty.csv").write_text("")
    (folder / "semicolons.csv").write_text("text;label\ngood;positive\n")
    (folder / "header.csv").write_text("text,label\n")
    save_model(BertForMaskedLM(start.config), folder / "headless")
    save_model(BertModel(type(start.config)(**start.config.to_dict() | {"hidden_size": 64})), folder / "wide")
    save_model(start, folder / "foreign")
    swapped = {piece: place for place, piece in enumerate((*PIECES[:-2], *reversed(PIECES[-2:])))}
    BertTokenizerFast(vocab=swapped).save_pretrained(folder / "foreign")
    for name in ("ignorant", "own_code", "damaged", "pickled"):
        shutil.copytree(good, folder / name)
    weights = BertModel.from_pretrained(good).state_dict()
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save(weights | {"x": _Payload(folder / "ran")}, folder / "pickled" / "pytorch_model.bin")
    whole = (folder / "damaged" / "model.safetensors").read_bytes()
    (folder / "damaged" / "model.safetensors").write_bytes(whole[:-100])
    config = json.loads((good / "config.json").read_text())
    (folder / "own_code" / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForSequenceClassification": "own.Own"}})
    )
    (folder / "own_code" / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")
    names = {"0": "positive", "1": "negative"}  # the classes changed places, their weights did not
    (folder / "ignorant" / "config.json").write_text(json.dumps(config | {"id2label": names}))
    return folder


@dataclass(frozen=True)
class Bad:
    """A command, what is wrong with its options, and the message."""

    command: str
    options: Options
    message: str


_ZERO_WEIGHTS = {f"{kind}_weight": 0.0 for kind in ("embedding", "hidden", "attention", "prediction", "gold")}
BAD_INPUTS = {
    "missing file": Bad("distill", {"train": "{w}/absent.csv"}, "absent.csv: no such file or folder; give a"),
    "missing eval file": Bad("finetune", {"eval": "{w}/absent.csv"}, "absent.csv: no such file or folder"),
    "empty file": Bad("distill", {"train": "{w}/empty.csv"}, "empty.csv: the file is empty: expected"),
    "header only": Bad("finetune", {"train": "{w}/header.csv"}, "header.csv has no rows: expected a header"),
    "unknown columns": Bad("distill", {"train": "{w}/columns.csv"}, "no usual text column; it has 'words'"),
    "another separator": Bad(
        "finetune",
        {"train": "{w}/semicolons.csv"},
        "one column, 'text;label', as if its separator were ';': save",
    ),
    "named column": Bad("finetune", {"text_columns": ["body"]}, "no column 'body'; it has 'text', 'label'"),
    "no label column": Bad("distill", {"eval": "{w}/unlabelled.csv"}, "no usual label column; it has 'text'"),
    "a missing label": Bad("finetune", {"train": "{w}/hole.csv"}, "label '' in row 2 is empty: fill it or"),
    "label no number": Bad(
        "finetune", {"train": "{w}/mixed.csv", "kind": "regression"}, "label 'awful' in row 2 is not a number"
    ),
    "unknown label": Bad(
        "distill",
        {"eval": "{w}/stranger.csv"},
        "'lukewarm' in row 2 is not one of the known labels",
    ),
    "unknown label, evaluate": Bad("evaluate", {"data": "{w}/stranger.csv"}, "'lukewarm' in row 2 is not"),
    "one class": Bad("finetune", {"train": "{w}/single.csv"}, "one class only, 'positive': there is"),
    "other kind": Bad("distill", {"kind": "regression"}, "the teacher does classification, but --kind regr"),
    "no model": Bad("distill", {"teacher": "{w}/nobody"}, "no model folder .*nobody: give an"),
    "no model, finetune": Bad("finetune", {"model": "{w}/nobody"}, "no model folder .*nobody: give an"),
    "no head": Bad("distill", {"teacher": "{w}/headless"}, "headless has no classification head .Bert"),
    "no head, evaluate": Bad("evaluate", {"model": "{w}/headless"}, "headless has no classification head"),
    "labels in another order": Bad(
        "distill",
        {"teacher": "{w}/ignorant"},
        "ignorant has its labels in another order than the rows on .* add --force to go",
    ),
    "deeper": Bad("distill", {"layers": 9}, "layers is 9: it must be from 1 to the teacher's 3"),
    "wider": Bad("distill", {"hidden_size": 64}, "hidden_size is 64: it must be from 1 to the teacher's 32"),
    "given and wider": Bad(
        "distill", {"student": "{w}/wide", **BUILT_BY_DEFAULT}, "is 64 wide, more than the teacher's 32"
    ),
    "not divisible": Bad("distill", {"hidden_size": 18}, "hidden size 18 is not divisible by 4 att"),
    "relation heads": Bad(
        "distill",
        {"relation_heads": 5},
        "relation_heads is 5, .* both .* 16 .* 32: give 4",
    ),
    "copy across widths": Bad("distill", {"init": "copy"}, "cannot copy .* in the teacher"),
    "vocabularies": Bad("distill", {"student": "{w}/foreign"}, "different vocabularies .25 and 25 .* '##s'"),
    "taken folder": Bad("distill", {"output_dir": "{w}/encoder"}, "encoder exists and is not empty"),
    "taken folder, finetune": Bad("finetune", {"output_dir": "{w}/teacher"}, "teacher exists and is"),
    "output holds input": Bad(
        "distill",
        {"output_dir": "{w}/teacher", "overwrite_output_dir": True},
        "teacher holds the input .*teacher: choose another output folder",
    ),
    "output holds data": Bad("finetune", {"output_dir": "{w}", "overwrite_output_dir": True}, "holds the in"),
    "output is a file": Bad("distill", {"output_dir": "{w}/empty.csv"}, "empty.csv is a file: give a folder"),
    "pickled code": Bad("distill", {"teacher": "{w}/pickled"}, "cannot load the weights of .*pickled: "),
    "own code": Bad("distill", {"teacher": "{w}/own_code"}, "own_code needs code of its own, which is nev"),
    "damaged weights": Bad("distill", {"teacher": "{w}/damaged"}, "cannot load the weights of .*damaged: "),
    "damaged weights, evaluate": Bad("evaluate", {"model": "{w}/damaged"}, "cannot load the weights of"),
    "one learning rate": Bad(
        "distill",
        {"learning_rate": 1e-3},
        "--learning_rate has no meaning with two stages: use --intermediate_learning_rate and --prediction_l",
    ),
    "one number of epochs": Bad(
        "distill", {"num_train_epochs": 4}, "use --intermediate_epochs and --prediction_epochs"
    ),
    "no epochs": Bad(
        "distill",
        {"intermediate_epochs": 0, "prediction_epochs": 0, "init": "random"},
        "got 0.* intermediate and 0.* one must",
    ),
    "a negative rate": Bad(
        "distill", {"prediction_learning_rate": -1}, "--prediction_learning_rate must be 0 or"
    ),
    "batches of nothing": Bad(
        "distill", {"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size must be 1"
    ),
    "steps of nothing": Bad(
        "finetune", {"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must"
    ),
    "no tokens": Bad("distill", {"tokens_per_batch": 0}, "--tokens_per_batch must be 1 or more, got 0"),
    "a seed below 0": Bad("finetune", {"seed": -5}, "--seed must be 0 or more, got -5"),
    "no rows a pass": Bad("evaluate", {"batch_size": 0}, "--batch_size must be 1 or more, got 0"),
    "nobody to report to": Bad(
        "distill", {"report_to": "swanlab"}, "--report_to swanlab: it is not installed"
    ),
    "to the Hub": Bad(
        "finetune", {"push_to_hub": True}, "--push_to_hub would upload each stage's checkpoints"
    ),
    "no such file system": Bad(
        "distill", {"output_dir": "{w}/" + "x" * 300}, "cannot be made: File name too long"
    ),
    "scores nowhere": Bad(
        "evaluate", {"json": "{w}/absent/x.json"}, "cannot write --json .*absent is no folder"
    ),
    "a gate without files": Bad("distill", {"max_drop": 2}, "--max_drop .* without --onnx"),
    "a gate of 200 points": Bad("distill", {"onnx": True, "max_drop": 200}, "expected points from 0 to 100"),
    "negative epochs": Bad("distill", {"prediction_epochs": -1}, "neither may be negative"),
    "no epochs, finetune": Bad("finetune", {"num_train_epochs": 0}, "--num_train_epochs .* nothing"),
    "no weights": Bad("distill", _ZERO_WEIGHTS, "every loss weight is 0, so nothing would be trained"),
    "no prediction weight": Bad("distill", {"prediction_weight": 0.0}, "every loss weight is 0"),
    "negative weight": Bad("distill", {"hidden_weight": -1.0}, "loss weights must not be negative"),
    "layer weights": Bad("distill", {"layer_weights": [1.0, 1.0]}, "got 2 layer weights for 2"),
    "layer map": Bad("distill", {"layer_map": ["middle"]}, "unknown layer mapping 'middle': use"),
    "layer map range": Bad("distill", {"layer_map": ["1", "7"]}, "leaves the range 1 to 3"),
    "temperature": Bad("distill", {"temperature": -1.0}, "--temperature must be above 0, got -1.0"),
    "too long": Bad("distill", {"max_length": 65}, "--max_length is 65: it must be from 3 to 64 here"),
    "too long, evaluate": Bad("evaluate", {"max_length": 2}, "--max_length is 2: it must be from 3 to 64"),
}


def good_options(command: str, workshop: Path, output: Path) -> Options:
    rows = {"train": "{w}/train.csv", "eval": "{w}/eval.csv", "output_dir": str(output)}
    options = {
        "finetune": {"model": "{w}/encoder", "max_length": 16, "num_train_epochs": 1, **rows, **TRAINING},
        "distill": {"teacher": "{w}/teacher", **SMALL, **rows, **TRAINING},
        "evaluate": {"model": "{w}/teacher", "data": "{w}/eval.csv", "max_length": 16},
    }[command]
    return filled(options, workshop)


def filled(options: Options, workshop: Path) -> Options:
    return {
        name: value.replace("{w}", str(workshop)) if isinstance(value, str) else value
        for name, value in options.items()
    }


def words_of(options: Options) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(str(entry) for entry in (value if isinstance(value, list) else [value]))]
    return words


def call(command: str, options: Options) -> None:
    """The same command as the library's function."""

    def build(kind: type) -> Any:
        return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})

    if command == "finetune":
        finetune(build(FinetuneArguments), build(TrainingConfig))
    elif command == "distill":
        distill_task(build(DistillArguments), build(DistillationConfig))
    else:
        evaluate(build(EvaluateArguments))


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def untouched(workshop: Path, tmp_path: Path) -> Iterator[Path]:
    """The output folder of a command that must write nothing, there or among its inputs."""
    before = contents(workshop)
    yield tmp_path / "output"
    assert not (tmp_path / "output").exists()
    assert contents(workshop) == before


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_an_input_error_of_the_function(name: str, workshop: Path, untouched: Path) -> None:
    """What the command refuses the library refuses too, with a message of one line."""
    bad = BAD_INPUTS[name]
    options = good_options(bad.command, workshop, untouched) | filled(bad.options, workshop)
    with pytest.raises(InputError, match=bad.message) as caught:
        call(bad.command, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_line_on_stderr_and_status_2(
    name: str, workshop: Path, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user sees what came, what was expected and what to do, and no traceback."""
    bad = BAD_INPUTS[name]
    options = good_options(bad.command, workshop, untouched) | filled(bad.options, workshop)
    assert main([bad.command, *words_of(options)]) == 2
    check_one_line(capsys, bad.message)


def check_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tinybert: error: ")
    assert captured.out == ""
    with pytest.raises(InputError, match=message):
        raise InputError(lines[0])


def test_foreign_code_was_not_run_by_any_of_it(workshop: Path) -> None:
    """Two of the inputs above try: the pickle, and the folder with Python in it."""
    for name in ("pickled", "own_code"):
        with pytest.raises(InputError):
            call("evaluate", good_options("evaluate", workshop, workshop) | {"model": str(workshop / name)})
    assert not (workshop / "ran").exists()


@pytest.mark.parametrize("command", ["finetune", "distill", "evaluate"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown option --lerning_rate .*tinybert {command} --help lists"),
        (["--max_len", "16"], r"unknown option --max_len .did you mean --max_length\?"),
        (["stray"], "unknown option stray|unrecognized arguments: stray"),
        (["--max_length", "long"], "--max_length.*: invalid int value: 'long'"),
        (["--max_length"], "--max_length.*: expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--config", "{w}/absent.yaml"], "cannot read --config .*absent.yaml: "),
    ],
)
def test_mistyped_options_are_one_line_and_status_2(
    command: str,
    words: list[str],
    message: str,
    workshop: Path,
    untouched: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An option that is read as another, or dropped, trains something else than was asked for."""
    good = words_of(good_options(command, workshop, untouched))
    assert main([command, *good, *(word.replace("{w}", str(workshop)) for word in words)]) == 2
    check_one_line(capsys, message.replace("{command}", command))


@pytest.mark.parametrize(
    "words", [["--learning_rate", "5e-5"], ["--learning-rate=5e-5"], ["--config", "{w}"]]
)
def test_one_rate_for_two_stages_is_refused_whatever_it_is(
    words: list[str], workshop: Path, untouched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's own is the default of transformers, and would be taken for none."""
    path = tmp_path / "rate.yaml"
    path.write_text("learning_rate: 5.0e-5\n")
    good = words_of(good_options("distill", workshop, untouched))
    assert main(["distill", *good, *(word.replace("{w}", str(path)) for word in words)]) == 2
    check_one_line(capsys, "--learning_rate has no meaning with two stages")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--optim", "hope"], "hope"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--bf16", "perhaps"], "--bf16"),
        (["--init", "telepathy"], "--init: invalid choice: 'telepathy'"),
        (["--padding", "bubble"], "--padding: invalid choice: 'bubble'"),
    ],
)
def test_values_that_transformers_refuses_are_one_line_too(
    words: list[str], message: str, workshop: Path, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ValueErrors are about the user's options like ours."""
    assert main(["distill", *words_of(good_options("distill", workshop, untouched)), *words]) == 2
    check_one_line(capsys, message)


@pytest.mark.parametrize("command", ["finetune", "distill", "evaluate"])
def test_required_options_are_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing anybody types."""
    assert main([command]) == 2
    check_one_line(capsys, f"the following arguments are required: --.*tinybert {command} --help")


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_a_missing_output_folder_is_said_so(
    command: str, workshop: Path, untouched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would write into a folder of its own choice."""
    options = good_options(command, workshop, untouched)
    del options["output_dir"]
    assert main([command, *words_of(options)]) == 2
    check_one_line(capsys, "no output folder was given: add --output_dir")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers: [2", "cannot read --config .*run.yaml: while parsing"),
        ("- layers\n- 2\n", "must hold `option: value` lines, not list"),
        ("just words", "must hold `option: value` lines, not str"),
        ("", "must hold `option: value` lines, not NoneType"),
        ("\udcff", "cannot read --config"),
        ("lerning_rate: 1", "unknown option --lerning_rate"),
        ("layers: many", "--layers: invalid int value: 'many'"),
        ("layers: 9", "layers is 9"),
    ],
)
def test_bad_config_files_are_one_line_and_status_2(
    content: str,
    message: str,
    workshop: Path,
    untouched: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mistyped name in a file must not silently leave the default."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    options = good_options("distill", workshop, untouched)
    del options["layers"]
    assert main(["distill", *words_of(options), "--config", str(path)]) == 2
    check_one_line(capsys, message)


def test_a_mapping_in_a_config_file_is_read_as_one(tmp_path: Path) -> None:
    """It came as Python writes it, which is no JSON."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\nlr_scheduler_kwargs:\n  num_cycles: 2\n  name: it's\n")
    (config,) = cli._parse("finetune", ["--config", str(path)], TrainingConfig)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2, "name": "it's"}


def test_commands_run_from_a_config_file_and_options_win(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file repeats a run; an option given beside it is meant."""
    options = good_options("distill", workshop, tmp_path / "student")
    options |= {"intermediate_epochs": 1, "prediction_epochs": 2, "layer_map": ["1", "3"], "seed": 7}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(options | {"heads": None, "layers": 1}))
    assert main(["distill", "--config", str(path), "--layers", "2", "--overwrite_output_dir"]) == 0
    out = capsys.readouterr().out
    assert "teacher" in out
    assert "student" in out
    assert "eval_loss" not in out, "transformers' log is for stderr"
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert record["arguments"]["layers"] == 2
    assert record["arguments"]["prediction_epochs"] == 2.0
    assert record["training"]["seed"] == 7
    words = ["--model", str(tmp_path / "student"), "--data", str(workshop / "eval.csv"), "--max_length", "16"]
    assert main(["evaluate", *words]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert main(["evaluate", *words, "--json", str(tmp_path / "scores.json")]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    assert {name: f"{value:.4f}" for name, value in written.items()} == shown
    assert float(shown["accuracy"]) == pytest.approx(record["models"][-1]["metrics"]["accuracy"], abs=1e-4)


def test_finetune_prints_its_table_and_the_next_command(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has a teacher wants to know how to go on."""
    assert main(["finetune", *words_of(good_options("finetune", workshop, tmp_path / "teacher"))]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert f"Next: tinybert distill --teacher {tmp_path / 'teacher'}" in out


def test_an_interruption_is_said_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C is no crash."""

    def interrupted(options: list[str]) -> None:
        raise KeyboardInterrupt

    for command, way_back in (
        ("evaluate", "interrupted\n"),
        ("distill", "--resume_from_checkpoint true goes on"),
    ):
        monkeypatch.setitem(sys.modules["tinybert.cli"].COMMANDS, command, interrupted)
        assert main([command]) == 130
        assert way_back in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        ("finetune", ["--learning_rate", "--model", "--seed"], ["--lr_scheduler_kwargs", "--push_to_hub"]),
        ("distill", ["--teacher", "--tokens_per_batch", "--config"], ["--learning_rate ", "--fsdp"]),
        ("general", ["--corpus", "--max_steps", "--num_train_epochs"], ["--deepspeed", "--hub_token"]),
        ("evaluate", ["--model", "--data"], ["--seed"]),
    ],
)
def test_help_shows_a_commands_own_options_and_the_usual_ones(
    command: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of transformers' hundred options most are noise to whoever looks for the ten that matter."""
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in shown)
    assert not any(option in said for option in hidden)


def test_a_real_process_prints_one_line_and_nothing_else(workshop: Path, tmp_path: Path) -> None:
    """Progress bars and the advice of libraries would bury the message in a log."""
    options = good_options("distill", workshop, tmp_path / "out") | {"teacher": str(workshop / "ignorant")}
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-m", "tinybert", "distill", *words_of(options)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line[:16] for line in done.stderr.splitlines()] == ["tinybert: error:"], done.stderr
    assert "its labels in another order" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["distil"], []])
def test_a_mistyped_or_missing_command_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A newcomer's first slip must not answer with a page."""
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_of_several_processes_speaks(
    taught: Result, toy: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight GPUs would print eight tables."""
    words = ["evaluate", "--model", str(taught.output_dir), "--data", toy["eval"], "--max_length", "16"]
    monkeypatch.setenv("RANK", "1")
    assert (main(words), capsys.readouterr().out) == (0, "")
    monkeypatch.setenv("RANK", "0")
    assert main(words) == 0
    assert "accuracy" in capsys.readouterr().out


def test_a_file_that_may_not_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A colleague's run, opened for a report: no traceback says so."""

    def refuse(options: list[str]) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/theirs/report.html")

    monkeypatch.setitem(cli.COMMANDS, "report", refuse)
    assert main(["report"]) == 2
    said = capsys.readouterr().err
    assert said == "tinybert: error: /theirs/report.html may not be read or written: Permission denied\n"
