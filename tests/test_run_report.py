"""A run's page: written at the end of a distillation, and again from whatever is left of the run."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import QUICK, toy_rows, write_csv
from test_report import ALERT, check
from tinybert import run_report
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.export import ExportArguments, to_onnx
from tinybert.model_card import is_unedited
from tinybert.run_directory import Result
from tinybert.run_report import ReportArguments, report, report_of_run
from tinybert.stages import DistillArguments, distill_task
from tinybert.trainer import DistillationConfig

RATES = {"intermediate_learning_rate": 5e-3, "prediction_learning_rate": 5e-3}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, taught: Result) -> Path:
    """A folder with a teacher, rows (one of them hostile), and a student distilled on them."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(taught.output_dir, folder / "teacher")
    train = write_csv(folder / "train.csv", toy_rows(64))
    held_out = write_csv(folder / "dev.csv", [(f"a good film {ALERT}", "positive"), *toy_rows(30, seed=1)])
    arguments = DistillArguments(
        str(train), str(held_out), teacher=str(folder / "teacher"), max_length=16, layers=2, hidden_size=16,
        intermediate_size=32, intermediate_epochs=1, prediction_epochs=1, **RATES,
    )  # fmt: skip
    distill_task(arguments, DistillationConfig(str(folder / "student"), logging_steps=2, **QUICK))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the student's run directory, to be damaged."""
    return Path(shutil.copytree(finished / "student", tmp_path / "student"))


def change(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((run / "run.json").read_text())
    edit(record)
    (run / "run.json").write_text(json.dumps(record))


def page_of(run: Path) -> str:
    page = (run / "report.html").read_text(encoding="utf-8")
    check(page)
    return page


def test_a_distillation_ends_with_its_page(finished: Path) -> None:
    """Nobody has to know that there is a command for it."""
    page, record = page_of(finished / "student"), json.loads((finished / "student/run.json").read_text())
    for model in record["models"]:
        assert f"{100 * model['metrics']['accuracy']:.2f}" in page
    assert "one standard error of the difference" in page
    for title in (
        "Closed form",
        "Intermediate stage",
        "Prediction stage",
        "attention scores, layer 2",
        "soft labels",
    ):
        assert title in page
    assert record["data"]["eval"]["fingerprint"] in page
    assert "No maps here" not in page
    assert "No rows here" not in page
    assert len(page) < 300_000


def test_the_page_made_later_shows_what_the_run_showed(run: Path) -> None:
    """The run's own logits and those computed again are the same, and so are both pages."""
    before = page_of(run)
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert page_of(run) == before


def test_a_hostile_row_is_shown_as_it_stands(run: Path) -> None:
    """It is in the eval rows, and among the sentences of the maps."""
    page = page_of(run)
    assert ALERT not in page
    shown = re.search('<script type="application/json" id="attention-data">(.*?)</script>', page)
    assert shown is not None
    assert any(ALERT in sentence["text"] for sentence in json.loads(shown[1])["sentences"])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda record: record["arguments"].update(teacher="/gone/teacher"), "no model folder"),
        (lambda record: record["arguments"].update(eval="/gone/dev.csv"), "no such file or folder"),
        (lambda record: record["arguments"].update(eval=5), "the arguments in run.json are damaged"),
        (lambda record: record["data"]["eval"].update(fingerprint="0"), "are not those of the run any more"),
    ],
)
def test_what_is_gone_is_left_out_and_said(run: Path, edit: Any, said: str) -> None:
    """The teacher moves, the rows are cleaned up: figures and curves are still worth a page."""
    change(run, edit)
    report(ReportArguments(str(run)))
    page = page_of(run)
    assert page.count("No maps here") == page.count("No rows here") == 1
    assert page.count(said) >= 2
    assert "one standard error of the difference" in page
    assert "attention scores, layer 2" in page


def test_of_many_rows_the_first_are_run_again_and_it_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page must not take an hour on MNLI; figures of a part must not pass for those of the whole."""
    before = re.findall("one standard error of the difference is [^.]+", page_of(run))
    monkeypatch.setattr(run_report, "MOST_EVAL_ROWS", 10)
    report(ReportArguments(str(run)))
    page = page_of(run)
    assert "These are the first 10 eval rows." in page
    assert re.findall("one standard error of the difference is [^.]+", page) == before != []


def test_models_that_hide_their_scores_get_all_but_the_maps(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTa's are refused; its rows and figures are as good as any."""

    def refuse(*arguments: object, **options: object) -> None:
        raise InputError("the scores cannot be captured")

    monkeypatch.setattr(run_report, "attention_maps", refuse)
    report(ReportArguments(str(run)))
    page = page_of(run)
    assert "No maps here: the scores cannot be captured" in page
    assert "No rows here" not in page


def test_a_fine_tuned_model_has_a_page_too_and_serves_as_baseline(
    run: Path, taught: Result, tmp_path: Path
) -> None:
    """The question about a student is what as small a model learns without a teacher."""
    folder = Path(shutil.copytree(taught.output_dir, tmp_path / "alone"))
    report(ReportArguments(str(folder)))
    page = page_of(folder)
    assert "This model reaches accuracy" in page
    assert "this run has no teacher" in page
    with pytest.raises(InputError, match=r"was scored on other rows \(.*: give one with the"):
        report(ReportArguments(str(run), baseline=str(folder)))
    data = json.loads((run / "run.json").read_text())["data"]
    change(folder, lambda record: record.update(data=data))
    assert main(["report", "--run", str(run), "--baseline", str(folder)]) == 0
    rows = re.findall(r'<tr><th scope="row">([\w -]+)</th><td', page_of(run))
    assert rows == ["teacher", "fine-tuned only", "student"]
    change(folder, lambda record: record.update(metric="matthews"))
    with pytest.raises(InputError, match="was scored by matthews, the run by accuracy: give one of the same"):
        report(ReportArguments(str(run), baseline=str(folder)))


def test_onnx_files_are_scored_on_the_rows_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is served is the one whose score matters."""
    to_onnx(ExportArguments(str(run), int8=True))
    report(ReportArguments(str(run)))
    score = f"{100 * json.loads((run / 'run.json').read_text())['models'][1]['metrics']['accuracy']:.2f}"
    rows = dict(re.findall(r'<tr><th scope="row">([\w ]+)</th><td class="number">([^<]+)', page_of(run)))
    assert list(rows) == ["teacher", "student", "student ONNX", "student int8"]
    assert rows["student ONNX"] == rows["student"] == score
    assert 0 < float(rows["student int8"]) <= 100
    assert "| student int8 |" in (run / "README.md").read_text()
    monkeypatch.setattr(run_report, "MOST_EVAL_ROWS", 10)
    report(ReportArguments(str(run)))  # the files answer all rows, however many
    assert (
        dict(re.findall(r'<tr><th scope="row">([\w ]+)</th><td class="number">([^<]+)', page_of(run))) == rows
    )
    monkeypatch.undo()
    (run / "onnx" / "model.onnx").write_bytes(b"no graph")
    report(ReportArguments(str(run)))
    assert re.search("The ONNX files were not scored: cannot open .*model.onnx", page_of(run))


def test_general_distillation_has_its_own_page(run: Path, finished: Path, tmp_path: Path) -> None:
    """Errors are no percentages; there are no answers to compare, and maps on any text."""
    (tmp_path / "wiki.txt").write_text("a good film with a story\n\nthe plot was dull\n")
    corpus = {"corpus": [str(tmp_path / "wiki.txt")], "eval_corpus": None, "text_column": None}

    def edit(record: dict[str, Any]) -> None:
        student = record["models"][1] | {"metrics": {"hidden_error": 0.25}}
        record["models"] = [student | {"name": "start", "metrics": {"hidden_error": 0.5}}, student]
        record |= {"metric": "hidden_error", "arguments": {"teacher": str(finished / "teacher"), **corpus}}
        record["data"] = {"corpus": {"source": "wiki.txt", "fingerprint": "ab"}}
        record["stages"] = {"general": {"steps": 4, "log": [{"step": 4, "eval_hidden_error": 0.25}]}}

    change(run, edit)
    report(ReportArguments(str(run)))
    page = page_of(run)
    assert "0.2500, down from 0.5000 at the start" in page
    assert "General distillation" in page
    assert "no rows that both models answer" in page
    assert "No maps here" not in page
    assert "the plot was dull" in page
    (tmp_path / "wiki.txt").unlink()
    report(ReportArguments(str(run)))
    assert re.search("No maps here: .*wiki.txt", page_of(run))


def test_the_card_is_kept_up_to_date_until_somebody_edits_it(run: Path) -> None:
    """Whoever wrote a paragraph must find it again after the next report."""
    card = run / "README.md"
    assert is_unedited(card.read_text())
    change(run, lambda record: record["models"][1]["metrics"].update(accuracy=0.125))
    report(ReportArguments(str(run)))
    assert "12.50" in card.read_text()
    card.write_text(card.read_text() + "\nOur data: ...\n")
    edited = card.read_text()
    change(run, lambda record: record["models"][1]["metrics"].update(accuracy=0.25))
    report(ReportArguments(str(run)))
    assert card.read_text() == edited
    assert "25.00" in page_of(run)


@pytest.mark.parametrize(
    "failure", [RuntimeError("drawn\nwrong"), InputError("install jinja2"), OSError("full")]
)
def test_a_page_that_fails_is_a_warning_of_one_line(
    run: Path, failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By then the student is trained and in its place; a drawing is not worth losing it for."""

    def fail(*arguments: object) -> None:
        raise failure

    (run / "report.html").unlink()
    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr(run_report, "render", fail)
    report_of_run(run, run_report.Comparison(*[None] * 7))  # type: ignore[arg-type]
    (warning,) = caplog.records
    assert "no report was written" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert sorted(path.name for path in run.iterdir()) == before


def _damage(path: Path, generator: random.Random) -> str:
    """Break a file at random; say how."""
    how = generator.choice(["cut", "flip", "drop", "swap", "remove", "folder"])
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif how == "flip":
        place = generator.randrange(len(content))
        path.write_bytes(content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :])
    elif how in ("drop", "swap") and path.suffix == ".json":
        whole = json.loads(content)
        here, depth = whole, generator.randint(0, 3)
        while depth and isinstance(here, dict) and any(isinstance(inner, dict) for inner in here.values()):
            here = generator.choice([inner for inner in here.values() if isinstance(inner, dict)])
            depth -= 1
        if here:
            key = generator.choice(sorted(here, key=str))
            junk = [
                None,
                True,
                -1,
                1e308,
                float("nan"),
                "",
                ALERT,
                [],
                {},
                [[]],
                {"a": {}},
                "x" * 5000,
                10**30,
            ]
            here.pop(key) if how == "drop" else here.update({key: generator.choice(junk)})
        path.write_text(json.dumps(whole))
    elif how == "remove":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    return f"{how} {path.name}"


def _check_damaged(run: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(seed)
    names = ["run.json", generator.choice(["config.json", "tokenizer.json", "model.safetensors"])]
    broken = generator.choice([names[:1], names[:1], names[1:], names])
    how = [_damage(run / name, generator) for name in broken]
    (run / "report.html").unlink(missing_ok=True)
    status = main(["report", str(run)])
    said = capsys.readouterr().err
    if status == 0:
        page_of(run)
    else:
        assert (status, len(said.splitlines())) == (2, 1), (how, said)
        assert not (run / "report.html").exists()
    assert not list(run.glob(".writing-*"))


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_run_ends_in_a_page_or_in_one_line(
    run: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a copy, a full disk, an editor's accident."""
    _check_damaged(run, seed, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 250))
def test_many_damaged_runs_end_in_a_page_or_in_one_line(
    run: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same, often enough to find what nobody thought of."""
    _check_damaged(run, seed, capsys)


def _text(generator: random.Random) -> str:
    attacks = ["</script>", "<!--", "&lt;", '"', "'", "{{", "\\u003c", "]]>", "=1+1", ALERT]
    letters = ["\u202e", "\u2028", "\U0001f600", "\x07", "\u0000", "é" * 30, "x" * 900]
    pieces = ["good", "film", *attacks, *letters]
    return " ".join(generator.choices(pieces, k=generator.randint(1, 30)))


def _check_hostile(finished: Path, run: Path, seed: int) -> None:
    generator = random.Random(seed)
    record = json.loads((run / "run.json").read_text())
    rows = [(_text(generator), generator.choice(["positive", "negative"])) for _ in range(12)]
    names, count = ("negative", "positive"), len(rows)
    from datasets import Dataset

    from tinybert import models
    from tinybert.data import TaskData

    columns = {"text": [text for text, _ in rows], "label": [names.index(name) for _, name in rows]}
    data = TaskData(Dataset.from_dict(columns), "classification", names, "accuracy", "x", "0")
    logits = np.random.default_rng(seed).normal(size=(2, count, 2)).astype(np.float32)
    teacher, student = (models.open_classifier(str(path)) for path in (finished / "teacher", run))
    tokenizer = models.open_tokenizer(str(run))
    record["command"].append(_text(generator))
    record["arguments"][_text(generator)] = _text(generator)
    (run / "run.json").write_text(json.dumps(record))
    compared = run_report.Comparison(data, data.rows, teacher, student, (tokenizer,) * 2, *logits)
    (run / "report.html").unlink()
    report_of_run(run, compared)
    parsed = check((run / "report.html").read_text(encoding="utf-8"))
    plain = re.sub("[\x00-\x08\x0b-\x1f]", "\ufffd", "".join(parsed.text))
    differ = [place for place in range(count) if logits[0, place].argmax() != logits[1, place].argmax()]
    assert differ
    for place in differ:
        assert re.sub("[\x00-\x08\x0b-\x1f]", "\ufffd", rows[place][0])[:599] in plain


@pytest.mark.parametrize("seed", range(3))
def test_hostile_rows_are_shown_letter_by_letter(finished: Path, run: Path, seed: int) -> None:
    """Rows, labels and arguments from strangers, in every place of the page."""
    _check_hostile(finished, run, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 250))
def test_many_hostile_rows_are_shown_letter_by_letter(finished: Path, run: Path, seed: int) -> None:
    """The same, often enough to find what nobody thought of."""
    _check_hostile(finished, run, seed)
