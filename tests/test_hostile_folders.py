"""Damaged model folders and hostile options: `export` and `benchmark` end in a result or in one line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import toy_rows, write_csv
from tinybert import benchmark
from tinybert.cli import main
from tinybert.export import ExportArguments, to_onnx
from tinybert.run_directory import Result

Generator = random.Random
Damage = Callable[[Path, Generator], None]


@pytest.fixture(scope="module")
def whole(taught: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both ONNX files, and rows beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(taught.output_dir, folder / "model")
    to_onnx(ExportArguments(str(folder / "model"), int8=True))
    write_csv(folder / "rows.csv", toy_rows(6))
    write_csv(folder / "strangers.csv", [("good", "lukewarm"), ("", "positive")])
    return folder


def cut(path: Path, generator: Generator) -> None:
    """Keep the first bytes of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


def flip(path: Path, generator: Generator) -> None:
    """Change some bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(generator.randint(1, 8)):
        content[generator.randrange(min(len(content), 4000))] = generator.randrange(256)
    path.write_bytes(content)


def any_file(folder: Path, generator: Generator) -> Path:
    return generator.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def wrong_value(folder: Path, generator: Generator) -> None:
    """Put a value of any type where config.json has another."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    values: list[Any] = [None, -1, 0, 3, 10**9, 1.5, "", "x", [], [1, "a"], {}, {"0": 1}, True, float("nan")]
    config[generator.choice(sorted(config))] = generator.choice(values)
    path.write_text(json.dumps(config))


def without_entry(folder: Path, generator: Generator) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config[generator.choice(sorted(config))]
    path.write_text(json.dumps(config))


def other_shape(folder: Path, generator: Generator) -> None:
    """Give a weight one row more or less, another name, or no number."""
    weights = load_file(folder / "model.safetensors")
    name = generator.choice(sorted(weights))
    weight = weights.pop(name)
    kind = generator.choice(["narrow", "rename", "drop", "nan", "flat"])
    if kind == "narrow":
        weights[name] = weight[:-1].clone()
    elif kind == "rename":
        weights[name + "x"] = weight
    elif kind == "nan":
        weights[name] = weight * float("nan")
    elif kind == "flat":
        weights[name] = weight.reshape(-1)[:, None].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def not_a_file(folder: Path, generator: Generator) -> None:
    """Remove a file, empty it, or put a folder in its place."""
    path = any_file(folder, generator)
    kind = generator.choice(["gone", "empty", "folder"])
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()


DAMAGES: list[Damage] = [
    lambda folder, generator: cut(any_file(folder, generator), generator),
    lambda folder, generator: flip(any_file(folder, generator), generator),
    lambda folder, generator: cut(folder / "model.safetensors", generator),
    lambda folder, generator: cut(folder / "config.json", generator),
    lambda folder, generator: None,
    not_a_file,
    other_shape,
    without_entry,
    wrong_value,
    wrong_value,
]
NUMBERS = ["0", "-1", "1", "2", "3", "1e3", "nan", "inf", "", "99999999999999999999", "x", "--", "0x10"]


def export_options(folder: Path, generator: Generator) -> list[str]:
    rows = [folder.parent / "rows.csv"] * 3 + [
        folder.parent / "strangers.csv",
        folder / "config.json",
        folder,
    ]
    words = ["--model", str(folder)]
    choices = {
        "--int8": generator.choice(["", "true", "false", "maybe"]),
        "--check": str(generator.choice(rows)),
        "--max_drop": generator.choice([*NUMBERS, "100"]),
        "--max_length": generator.choice(["16", "16", *NUMBERS]),
        "--reduce_range": generator.choice(["true", "false", "none"]),
        "--label_column": generator.choice(["label", "text", "absent"]),
        "--output_dir": str(folder.parent / generator.choice(["out", "rows.csv", "out/deep", "model"])),
        "--text_columns": generator.choice(["text", "label", "\x00", "é"]),
    }
    for name in generator.sample(sorted(choices), generator.randint(0, 4)):
        words += [name, *filter(None, [choices[name]])]
    return words


def benchmark_options(folder: Path, generator: Generator) -> list[str]:
    words = ["--models", str(folder), "--memory", "false", "--rounds", "1"]
    choices = {
        "--backend": generator.choice(["all", "torch", "onnx", "onnx_int8", "torch_bf16", "gpu", ""]),
        "--batch_size": generator.choice(["1", "2", *NUMBERS]),
        "--threads": generator.choice(["1", "2", "0", "-3", "x", "1e9"]),
        "--json": str(
            folder.parent / generator.choice(["out.json", "absent/out.json", "rows.csv/x", "model"])
        ),
        "--bf16": generator.choice(["", "true", "no"]),
    }
    for name in generator.sample(sorted(choices), generator.randint(0, 3)):
        words += [name, *filter(None, [choices[name]])]
    return [*words, "--length", generator.choice(["8", "8", "8", "64", *NUMBERS])]


def attack(
    command: str, seed: int, whole: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run one case; return its status, and the line it ends with."""
    generator = random.Random(f"{command} {seed}")
    folder = shutil.copytree(whole, place / f"{command}-{seed}") / "model"
    for _ in range(generator.choice([1, 1, 1, 2])):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            try:
                generator.choice(DAMAGES)(folder, generator)
            except (ValueError, SafetensorError):
                continue  # too damaged already for more of it
    options = (export_options if command == "export" else benchmark_options)(folder, generator)
    capsys.readouterr()
    status = main([command, *options])
    shown = capsys.readouterr()
    case = f"{command} {seed}: {options}\n{shown.err}"
    assert status in (0, 1, 2), case
    lines = shown.err.splitlines()
    if status:
        assert len(lines) == 1, case
        assert lines[0].startswith("tinybert: "), case
        assert len(lines[0]) < 1000, case
    assert not [path for path in folder.parent.rglob("*") if path.name.startswith(".writing")], case
    assert not list(folder.parent.rglob("*.part")), case
    if status == 2 and command == "export":
        assert not (folder.parent / "out").exists(), case
    shutil.rmtree(folder.parent)
    return status, lines[0] if status else ""


def attack_all(
    command: str, cases: int, whole: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> dict[int, int]:
    """Run cases; return how many ended with each status."""
    counts = dict.fromkeys((0, 1, 2), 0)
    for seed in range(cases):
        counts[attack(command, seed, whole, place, capsys)[0]] += 1
    return counts


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_VISIT_SECONDS", 0.0)


@pytest.mark.parametrize("command", ["export", "benchmark"])
def test_damage_ends_in_a_result_or_one_line(
    command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback from the depths of a library tells nobody which file to mend."""
    counts = attack_all(command, 10, whole, tmp_path, capsys)
    assert counts[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "benchmark"])
def test_much_damage_ends_in_a_result_or_one_line(
    command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above, 200 cases each: some succeed, so the cases are not all of one kind."""
    counts = attack_all(command, 200, whole, tmp_path, capsys)
    assert counts[2] > 40
    assert counts[0] > 10
