"""Every kind of task through every command, one after another, as a user would; and its other ways."""

import json
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import BAD, FILLERS, GOOD, sentence, toy_rows, write_csv
from test_kinds import asked, tagged
from test_report import check
from tinybert import benchmark
from tinybert.cli import main

Cli = Callable[..., str]
QUICK = (
    *("--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "8", "--logging_steps", "1"),
)
SMALL = ("--layers", "2", "--hidden_size", "16", "--intermediate_size", "24", "--force", "true")
ROWS = 24  # of either file
METRICS = {
    "single": "accuracy",
    "pair": "accuracy",
    "regression": "pearson_spearman",
    "multi_label": "f1_micro",
    "tokens": "f1",
    "questions": "f1",
}


def write_rows(kind: str, path: Path, seed: int) -> Path:
    """Rows of a kind, in the form that most people have them in."""
    draw = random.Random(seed)
    if kind == "tokens":
        pairs = tagged(ROWS, seed)
        text = "\n\n".join("\n".join(map(" ".join, zip(*pair, strict=True))) for pair in pairs)
        path = path.with_suffix(".conll")
        path.write_text(text + "\n")
        return path
    if kind == "questions":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(asked(ROWS, seed)))
        return path
    good = [place % 2 for place in range(ROWS)]
    texts = [sentence(draw, GOOD if label else BAD) for label in good]
    header, columns = {
        "single": (("text", "label"), [good]),
        "pair": (("sentence1", "sentence2", "label"), [[sentence(draw, FILLERS) for _ in good], good]),
        "regression": (("text", "label"), [[label + draw.random() / 2 for label in good]]),
        "multi_label": (("text", "good", "long"), [good, [int(len(text) > 30) for text in texts]]),
    }[kind]
    return write_csv(path.with_suffix(".csv"), list(zip(texts, *columns, strict=True)), header)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """``cli(word, ...)``: run a command that must succeed; return what it printed."""
    monkeypatch.setattr(benchmark, "_VISIT_SECONDS", 0.0)

    def run(*words: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        shown = capsys.readouterr()
        assert status == 0, (words, shown.err)
        return shown.out

    return run


@pytest.fixture
def rows(kind: str, tmp_path: Path) -> dict[str, Path]:
    """Two files of the kind that a test is about."""
    return {name: write_rows(kind, tmp_path / name, seed) for seed, name in enumerate(("train", "eval"))}


def reading(kind: str) -> list[str]:
    """The options that say how the rows of a kind are read."""
    how = ["--max_length", "20", *(["--stride", "4"] if kind == "questions" else [])]
    return how + (["--label_columns", "good", "long"] if kind == "multi_label" else [])


def table_of(folder: Path) -> dict[str, list[str]]:
    """The rows of a page's table, by the names of the models."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    check(page)
    assert "were not scored" not in page
    found = re.findall(r'<tr><th scope="row">([\w ]+)</th>(.*?)</tr>', page, re.DOTALL)
    return {name: re.findall("<td[^>]*>([^<]*)</td>", cells) for name, cells in found}


@pytest.mark.parametrize("kind", METRICS)
def test_a_kind_of_task_goes_from_teacher_to_benchmark(
    kind: str, rows: dict[str, Path], cli: Cli, start_folder: Path, tmp_path: Path
) -> None:
    """A command that knows all kinds but one is found out at the end of somebody's week."""
    how, metric = reading(kind), METRICS[kind]
    teacher, student, pruned = (tmp_path / name for name in ("teacher", "student", "pruned"))
    data = ["--train", rows["train"], "--eval", rows["eval"], *how]
    taught = ["finetune", "--model", start_folder, *data, "--output_dir", teacher, "--max_steps", 4]
    said = cli(*taught, *QUICK, "--learning_rate", "6e-3", "--dry_run", "true")
    assert f"{ROWS} rows to train on" in said
    assert not teacher.exists()
    cli(*taught, *QUICK, "--learning_rate", "6e-3")
    distilled = ["distill", "--teacher", teacher, *data, "--output_dir", student, *SMALL, *QUICK]
    said = cli(*distilled, "--max_steps", 2, "--dry_run", "true")
    assert re.search(rf"teacher +the teacher's {metric.partition('_sp')[0]} is", said)
    assert not student.exists()
    said = cli(*distilled, "--max_steps", 2, "--onnx", "true", "--max_drop", "100")
    assert re.search(r"model_quantized\.onnx +\d", said), "scored"
    assert list(table_of(student)) == ["teacher", "student", "student ONNX", "student int8"]
    record = json.loads((student / "run.json").read_text())
    figures = record["models"][-1]["metrics"]
    assert record["metric"] == metric
    said = cli("evaluate", "--model", student, "--data", rows["eval"], *how)
    assert {line.split()[0]: float(line.split()[1]) for line in said.splitlines()} == pytest.approx(
        figures, abs=1e-4
    )
    shown = f"{100 * figures[metric]:.2f}"
    check = ["--check", rows["eval"], *how]
    said = cli("export", "--model", student, "--int8", *check, "--max_drop", "100")
    assert re.search(rf"model\.onnx +{re.escape(shown)}", said)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text, _ in toy_rows(20)))
    fewer = ["--vocabulary", 22, "--neurons", 12, "--corpus", corpus, "--data", rows["eval"], *how]
    said = cli("prune", "--model", student, "--output_dir", pruned, *fewer)
    following = re.search(r"Next: tinybert (.*) \.\.\.", said)
    assert following is not None
    assert following[1].startswith("finetune") == (kind in ("tokens", "questions"))
    forced = [] if following[1].startswith("finetune") else ["--force", "true"]
    more = [*data, "--output_dir", tmp_path / "recovered", "--max_steps", 1, *QUICK]
    cli(*shlex.split(following[1]), *more, *forced)
    before, after = json.loads((pruned / "run.json").read_text())["models"]
    assert before["metrics"] == pytest.approx(figures)
    cli("export", "--model", pruned, *check)
    speed = tmp_path / "speed.json"
    measured = ["--batch_size", 1, "--length", 4, 8, "--rounds", 1, "--memory", "false", "--json", speed]
    said = cli("benchmark", "--models", teacher, student, pruned, *measured)
    assert "Pick:" in said
    for folder in (student, pruned):
        cli("report", folder, "--benchmark", speed)
    cells = table_of(student)
    assert list(cells) == ["teacher", "student", "student ONNX", "student int8"]
    assert cells["student"][0] == cells["student ONNX"][0] == shown
    assert cells.keys() == {name for name, row in cells.items() if any("ms" in cell for cell in row)}
    cells = table_of(pruned)
    assert list(cells) == ["before", "after", "after ONNX"]
    assert cells["before"][0] == shown
    assert cells["after ONNX"][0] == cells["after"][0] == f"{100 * after['metrics'][metric]:.2f}"
    assert all(any("ms" in cell for cell in row) for row in cells.values())


@pytest.mark.parametrize("kind", ["tokens", "questions"])
def test_a_kind_of_its_own_tokens_takes_a_general_student_and_baselines(
    kind: str,
    rows: dict[str, Path],
    cli: Cli,
    start_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A general student gets a head for each token; a baseline that cannot be is refused."""
    how, teacher, general = reading(kind), tmp_path / "teacher", tmp_path / "general"
    data = ["--train", rows["train"], "--eval", rows["eval"], *how]
    cli("finetune", "--model", start_folder, *data, "--output_dir", teacher, "--max_steps", 3, *QUICK)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text, _ in toy_rows(60)))
    shape = SMALL[:-2]
    block = ["--block_size", 16, "--max_steps", 2, "--eval_corpus", corpus]
    cli(
        "general",
        "--teacher",
        start_folder,
        "--corpus",
        corpus,
        "--output_dir",
        general,
        *shape,
        *block,
        *QUICK,
    )
    ways: dict[str, list[object]] = {
        "general": ["--student", general, "--intermediate_epochs", 1, "--prediction_epochs", 1],
        "student, finetune": [*shape, "--baseline", "finetune"],
        "student, soft_labels": [*shape, "--baseline", "soft_labels"],
    }
    for place, (name, options) in enumerate(ways.items()):
        folder = tmp_path / f"student{place}"
        given = ["--teacher", teacher, *data, "--output_dir", folder, "--force", "true", *QUICK]
        cli("distill", *given, *options, "--max_steps", 2)
        record = json.loads((folder / "run.json").read_text())
        assert record["models"][-1]["name"] == ("student" if name == "general" else name)
        assert any(entry.get("loss") for stage in record["stages"].values() for entry in stage.get("log", ()))
    refused = ["distill", "--teacher", teacher, *data, "--output_dir", tmp_path / "pkd", *SMALL, *QUICK]
    assert main([str(word) for word in (*refused, "--baseline", "pkd")]) == 2
    assert "take --baseline soft_labels" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "pkd").exists()
