"""Tests of the experiments' runner and tables; the plans themselves are held to the commands' options."""

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tinybert.data import load_data
from tinybert.stages import DistillArguments, FinetuneArguments
from tinybert.trainer import DistillationConfig
from tinybert.training import TrainingConfig

FOLDER = Path(__file__).parent.parent / "experiments"
PLANS = sorted(FOLDER.glob("*.yaml"))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(FOLDER))
prepared, run, tables = script("prepared"), script("run"), script("tables")


def result(way: str, data: str, seed: int, score: float) -> dict[str, Any]:
    return {
        "way": way,
        "data": data,
        "seed": seed,
        "score": score,
        "metric": "accuracy",
        "chosen": {"accuracy": 0.9},
    }


def test_there_are_plans() -> None:
    """The test below would hold of none."""
    assert len(PLANS) >= 3


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_speaks_of_options_that_there_are(path: Path) -> None:
    """A misspelt option would end a night of experiments at its first run."""
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    finetune = {entry.name for kind in (FinetuneArguments, TrainingConfig) for entry in fields(kind)}
    distil = {entry.name for kind in (DistillArguments, DistillationConfig) for entry in fields(kind)}
    assert plan["seeds"]
    assert plan["data"]
    assert plan["ways"]
    for options in plan["teachers"].values():
        assert set(options) <= finetune
    for options in (plan["distil"], *(data.get("distil", {}) for data in plan["data"].values())):
        assert set(options) <= distil
    for options in plan["ways"].values():
        assert set(options) <= distil


def test_rows_that_choose_are_taken_out_of_those_that_train(tmp_path: Path) -> None:
    """A checkpoint chosen on training rows is the one that learnt them by heart."""
    rows = [f"sentence {number}\t{number % 2}" for number in range(50)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]), encoding="utf-8")
    spec = {"train": "train.tsv", "report": "dev.tsv", "held_out": 10, "rows": 30}
    folder = tmp_path / "prepared"
    folder.mkdir()
    prepared.prepare("made", spec, tmp_path, folder)
    parts = {
        part: (folder / f"{part}.tsv").read_text().splitlines() for part in ("train", "choose", "report")
    }
    assert {part: len(lines) for part, lines in parts.items()} == {"train": 31, "choose": 11, "report": 51}
    assert not set(parts["train"][1:]) & set(parts["choose"][1:])
    assert set(parts["train"][1:] + parts["choose"][1:]) <= set(rows)


SENTENCES = ["One\tB-NP\nran\tB-VP", "So\tB-ADVP\nit\tB-NP\nwent\tB-VP", "Up\tB-PRT\nit\tI-PRT"]


def test_sentences_of_a_conll_file_are_held_out_whole(tmp_path: Path) -> None:
    """A sentence cut in two would teach half of what it is scored on."""
    text = "\n\n".join(["token\tlabel\n" + SENTENCES[0], *SENTENCES[1:]]) + "\n\n"
    (tmp_path / "all.tsv").write_text(text, encoding="utf-8")
    spec = {"form": "conll", "train": "all.tsv", "report": "all.tsv", "held_out": 1}
    prepared.prepare("made", spec, tmp_path, tmp_path)
    read = {
        part: list(load_data(file).rows["words"]) for part, file in prepared.files_of(spec, tmp_path).items()
    }
    whole = [[line.split("\t")[0] for line in sentence.split("\n")] for sentence in SENTENCES]
    assert sorted(read["train"] + read["choose"]) == sorted(read["report"]) == sorted(whole)
    assert len(read["choose"]) == 1


def test_a_run_that_another_has_begun_is_left_to_it(tmp_path: Path) -> None:
    """Two processes would do the same work, and note it twice."""
    with (
        run.only_one(tmp_path / "lock", wait=False) as first,
        run.only_one(tmp_path / "lock", wait=False) as second,
    ):
        assert (first, second) == (True, False)
    with run.only_one(tmp_path / "lock", wait=False) as third:
        assert third


def test_a_table_has_means_ranges_and_what_was_kept() -> None:
    """The tables of the results are made here, and nobody reckons them again."""
    results = [
        result("teacher", "a", 42, 80.0),
        result("teacher", "b", 42, 50.0),
        *(result("distilled", "a", seed, score) for seed, score in ((1, 76.0), (2, 80.0))),
        *(result("distilled", "b", seed, score) for seed, score in ((1, 50.0), (2, 50.0))),
        result("other", "a", 1, 40.0),
    ]
    head, _, *rows = tables.table(results).splitlines()
    assert head.startswith("| way | a (accuracy) | b (accuracy) |")
    cells = {row.strip("| ").split(" | ")[0]: row.strip("| ").split(" | ")[1:] for row in rows}
    assert cells["distilled"][:4] == [
        "78.0 (76.0 to 80.0); 97.5 %",
        "50.0 (50.0 to 50.0); 100.0 %",
        "98.8 %",
        "2",
    ]
    assert cells["other"][:3] == ["40.0; 50.0 %", "-", "-"]
    assert next(iter(cells)) == "teacher"


def test_a_table_may_show_some_ways_in_an_order_of_its_own() -> None:
    """One experiment answers several questions."""
    ways = ("second", "teacher", "first", "other")
    results = [result(way, "a", 42, 80.0) for way in ways]
    rows = tables.table(results, ["first", "second"]).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["teacher", "first", "second"]
    with pytest.raises(SystemExit, match="without results: missing"):
        tables.table(results, ["first", "missing"])


def test_the_distance_is_that_of_the_checkpoint_that_was_chosen() -> None:
    """The last one's, or a mean over all, would be another model's."""
    log = [
        {"eval_accuracy": 0.8, "eval_prediction_loss": 0.5},
        {"eval_accuracy": 0.9, "eval_prediction_loss": 0.4},
    ]
    stages = {
        "closed_form": {"seconds": 1.0},
        "intermediate": {"best_metric": 0.2, "log": [{"eval_loss": 0.2, "eval_hidden_1_loss": 0.1}]},
        "prediction": {"best_metric": 0.9, "log": [{"loss": 0.9}, *log, {"eval_accuracy": 0.85}]},
    }
    assert run.distance({"metric": "accuracy", "stages": stages}) == 0.4
    of_labels = {"finetune": {"best_metric": 0.9, "log": [{"eval_accuracy": 0.9}]}}
    assert run.distance({"metric": "accuracy", "stages": of_labels}) is None


def test_marked_places_of_a_document_are_filled_and_the_rest_stays() -> None:
    """A table pasted by hand is out of date a day later."""
    results = {"x": [result(way, "a", 42, 80.0) for way in ("one", "two")]}
    whole, of_one = tables.table(results["x"]), tables.table(results["x"], ["two"])
    chosen = tables.table(results["x"], ["one"], "chosen")
    document = (
        "before\n<!-- experiment x -->\nold\n<!-- end x -->\nafter\n"
        "<!-- experiment x: two -->\nold\n<!-- end x -->\nend\n"
        "<!-- experiment x chosen: one -->\nold\n<!-- end x -->\n"
    )
    filled = tables.filled(document, results)
    assert filled == (
        f"before\n<!-- experiment x -->\n{whole}\n<!-- end x -->\nafter\n"
        f"<!-- experiment x: two -->\n{of_one}\n<!-- end x -->\nend\n"
        f"<!-- experiment x chosen: one -->\n{chosen}\n<!-- end x -->\n"
    )
    assert chosen.endswith("| one | 90.0 | - | 1 |")
    near = [result("one", "a", seed, 80.0) | {"distance": seed / 8} for seed in (1, 2)]
    far = tables.table([result("teacher", "a", 42, 82.0), *near, *results["x"]], what="distance")
    assert far.splitlines()[2:] == ["| one | 0.188 (0.125 to 0.250) | 2 |"], (
        "those that have none are left out"
    )
    assert tables.filled(filled, results) == filled
    with pytest.raises(SystemExit, match="no results"):
        tables.filled(document, {"y": results["x"]})
