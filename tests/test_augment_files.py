"""Augmented files: the same whatever interrupts, shares or batches the work; and what they keep."""

import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, PreTrainedModel

import tinybert.augment_files
from conftest import QUICK, make_masked_lm, toy_rows, write_csv
from tinybert.augment_files import AugmentArguments, AugmentJob, augment_file
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.run_directory import RECORD, Result
from tinybert.stages import DistillArguments, distill_task
from tinybert.tables import open_source
from tinybert.trainer import DistillationConfig

Save = Callable[[PreTrainedModel, Path], Path]


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory, save_model: Save) -> str:
    return str(save_model(make_masked_lm(), tmp_path_factory.mktemp("mlm")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirty rows with a column that nobody reads; two of them have the same text."""
    made = [(place, text, label) for place, (text, label) in enumerate(toy_rows(29))]
    return str(
        write_csv(
            tmp_path_factory.mktemp("rows") / "rows.csv", [*made, (29, *made[0][1:])], ("id", "text", "label")
        )
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinybert.augment_files, "BLOCK", 4)


def settings(rows: str, masked_lm: str, output: Path, **options: Any) -> AugmentArguments:
    return AugmentArguments(data=rows, masked_lm=masked_lm, output=str(output), **{"copies": 5, **options})


def read(path: Path) -> list[dict[str, Any]]:
    return pa.concat_tables(open_source(str(path)).tables()).to_pylist()


def test_rows_are_kept_once_in_order_each_before_its_copies(
    rows: str, masked_lm: str, tmp_path: Path
) -> None:
    """A copy that is a row of its own, or another copy, would count twice, maybe with another label."""
    made = augment_file(settings(rows, masked_lm, tmp_path / "out.parquet"))
    before, after = read(Path(rows)), read(made.output)
    assert (made.rows, made.rows + made.copies) == (30, len(after))
    assert made.copies > 60
    originals = [row for place, row in enumerate(after) if place == 0 or after[place - 1]["id"] != row["id"]]
    assert originals == before
    texts = [row["text"] for row in after]
    assert len(set(texts)) == len(texts) - 1  # the text that was there twice
    labels = {row["id"]: row["label"] for row in before}
    assert all(row["label"] == labels[row["id"]] for row in after)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv", "csv.gz"])
def test_every_format_holds_the_same_rows(ending: str, rows: str, masked_lm: str, tmp_path: Path) -> None:
    augment_file(settings(rows, masked_lm, tmp_path / f"out.{ending}"))
    augment_file(settings(rows, masked_lm, tmp_path / "whole.parquet"))
    assert read(tmp_path / f"out.{ending}") == read(tmp_path / "whole.parquet")


def test_types_of_other_columns_are_carried(masked_lm: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "sentence1": ["a good film", "a bad film"],
            "sentence2": ["a fine plot", "dull"],
            "label": pa.array([1, 0], pa.int8()),
            "tags": [["x"], []],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    augment_file(settings(str(tmp_path / "in.parquet"), masked_lm, tmp_path / "out.parquet"))
    made = pq.read_table(tmp_path / "out.parquet")
    assert made.schema.equals(table.schema)
    assert made["label"].to_pylist() == [1] * made["label"].to_pylist().count(1) + [0] * (
        made["label"].to_pylist().count(0)
    )
    for row in made.to_pylist()[1:6]:
        assert (row["sentence1"] != "a good film") != (row["sentence2"] != "a fine plot")
    assert load_dataset("parquet", data_files=str(tmp_path / "out.parquet"))["train"].num_rows > 2


def test_the_result_does_not_depend_on_the_batches_but_on_the_seed(
    rows: str, masked_lm: str, tmp_path: Path
) -> None:
    made = {}
    for name, options in {
        "one": {},
        "small": {"tokens_per_batch": 8},
        "large": {"tokens_per_batch": 100_000},
        "seed": {"seed": 1},
    }.items():
        augment_file(settings(rows, masked_lm, tmp_path / f"{name}.csv", **options))
        made[name] = (tmp_path / f"{name}.csv").read_bytes()
    assert made["one"] == made["small"] == made["large"]
    assert made["one"] != made["seed"]


def test_three_processes_share_the_blocks_and_make_the_file_of_one(
    rows: str, masked_lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(rows, masked_lm, tmp_path / "out.csv")
    augment_file(arguments)
    alone = (tmp_path / "out.csv").read_bytes()
    job = AugmentJob(arguments)
    parts = tmp_path / f".again.csv.{job.fingerprint}.parts"
    parts.mkdir()
    for process in (2, 0, 1):
        before = {path.name for path in parts.iterdir()}
        AugmentJob(arguments).write_blocks(parts, process, 3)
        new = {int(path.stem) for path in parts.iterdir() if path.name not in before}
        assert new == set(range(process, 8, 3))
    monkeypatch.setattr(job, "_augment", lambda *_: pytest.fail("a block was made twice"))
    job.write(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == alone


_KILLED = """
import os, signal, sys
import tinybert.augment_files as room
from tinybert.cli import main
room.BLOCK, after, before = 4, int(sys.argv[1]), sys.argv[2] == "before"
replace = os.replace
def dying(*names):
    global after
    after -= 1
    if after < 0 and before:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
    if after < 0:
        os.kill(os.getpid(), signal.SIGKILL)
room.os.replace = dying
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("after", "when"), [(0, "before"), (3, "before"), (3, "after"), (8, "before")])
def test_a_killed_run_goes_on_to_the_same_file(
    after: int, when: str, rows: str, masked_lm: str, tmp_path: Path
) -> None:
    """Hours of work must survive the machine, and leave no half file that a training run would read."""
    augment_file(settings(rows, masked_lm, tmp_path / "whole.csv"))
    output = tmp_path / "out.csv"
    options = ["augment", "--data", rows, "--masked_lm", masked_lm, "--output", str(output), "--copies", "5"]
    command = [sys.executable, "-c", _KILLED, str(after), when, *options]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    (parts,) = tmp_path.glob(".out.csv.*.parts")
    done = sorted(parts.glob("????????.parquet"))
    assert len(done) == min(8, after + (when == "after"))
    times = [path.stat().st_mtime_ns for path in done]

    class Watching(AugmentJob):
        def write(self, target: Path) -> tuple[int, int]:
            self.write_blocks(parts, 0, 1)
            assert [path.stat().st_mtime_ns for path in done] == times
            return super().write(target)

    Watching(settings(rows, masked_lm, output)).write(output)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_blocks_of_other_settings_or_rows_are_not_taken_up(rows: str, masked_lm: str, tmp_path: Path) -> None:
    """Stale copies under new settings would go unnoticed."""
    base = AugmentJob(settings(rows, masked_lm, tmp_path / "out.csv"))
    assert AugmentJob(settings(rows, masked_lm, tmp_path / "x.csv", tokens_per_batch=9)).fingerprint == (
        base.fingerprint
    )
    label = tmp_path / "label.csv"
    label.write_text(Path(rows).read_text().replace("positive", "pos"))
    stop = tmp_path / "stop.txt"
    stop.write_text("film")
    others = [
        AugmentJob(settings(str(label), masked_lm, tmp_path / "out.csv")),
        AugmentJob(settings(rows, masked_lm, tmp_path / "out.csv", candidates=3)),
        AugmentJob(settings(rows, masked_lm, tmp_path / "out.csv", stop_words=str(stop))),
    ]
    stop.write_text("plot")
    others.append(AugmentJob(settings(rows, masked_lm, tmp_path / "out.csv", stop_words=str(stop))))
    assert len({base.fingerprint, *(job.fingerprint for job in others)}) == 5


def test_the_teachers_filter_keeps_what_the_teacher_agrees_with(
    rows: str, masked_lm: str, taught: Result, tmp_path: Path
) -> None:
    """Against the teacher run by itself, text by text."""
    teacher = str(taught.output_dir)
    plain = augment_file(settings(rows, masked_lm, tmp_path / "plain.csv"))
    kept = augment_file(
        settings(rows, masked_lm, tmp_path / "kept.csv", teacher=teacher, keep_if_teacher_agrees=0.9)
    )
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = BertTokenizerFast.from_pretrained(teacher)

    @torch.no_grad()
    def probability(row: dict[str, str]) -> float:
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        return float(logits.softmax(-1)[model.config.label2id[row["label"]]])

    originals = [row["text"] for row in read(Path(rows))]
    expected = [row for row in read(plain.output) if row["text"] in originals or probability(row) >= 0.9]
    assert read(kept.output) == expected
    assert 0 < kept.copies < plain.copies


def test_distill_trains_on_rows_it_augments_and_on_rows_made_before(
    toy: dict[str, str], masked_lm: str, taught: Result, tmp_path: Path
) -> None:
    """Both ways are one: the same rows, the same student."""
    made = augment_file(settings(toy["train"], masked_lm, tmp_path / "more.csv", copies=2))
    shape = {"layers": 1, "hidden_size": 16, "intermediate_size": 24, "max_length": 16, "init": "random"}
    shape |= {"teacher": str(taught.output_dir), "intermediate_epochs": 0.0, "prediction_epochs": 1.0}
    records = {}
    for name, options in {
        "ready": {"augmented": str(made.output)},
        "made": {"augment": True, "masked_lm": masked_lm, "copies": 2},
        "plain": {},
    }.items():
        run = tmp_path / name
        distill_task(DistillArguments(**toy, **shape, **options), DistillationConfig(str(run), **QUICK))
        records[name] = json.loads((run / RECORD).read_text())
    steps = {name: record["stages"]["prediction"]["steps"] for name, record in records.items()}
    assert steps["ready"] == steps["made"] == -(-(made.rows + made.copies) // 16)
    assert steps["plain"] == 6
    assert (
        records["made"]["data"]["augmented"]["fingerprint"]
        == (records["ready"]["data"]["augmented"]["fingerprint"])
    )
    assert records["made"]["models"][-1]["metrics"] == records["ready"]["models"][-1]["metrics"]
    assert len(list((tmp_path / "made" / "augmented").glob("*.parquet"))) == 1


def test_a_teacher_reads_what_it_has_positions_for(masked_lm: str, taught: Result, tmp_path: Path) -> None:
    """The usual 128 word pieces are more than some teachers take; --max_length cuts further."""
    long = write_csv(tmp_path / "long.csv", [(" ".join(["the good film was dull"] * 20), "positive")])
    filtered = {"keep_if_teacher_agrees": 0.0, "teacher": str(taught.output_dir)}
    made = augment_file(settings(str(long), masked_lm, tmp_path / "out.csv", **filtered))
    assert made.copies == 5
    job = AugmentJob(settings(str(long), masked_lm, tmp_path / "cut.csv", **filtered, max_length=8))
    assert job.filter is not None
    assert job.filter.max_length == 8


def test_first_copies_stay_and_their_memory_is_that_of_digests(
    masked_lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With millions of rows, what each copy costs is what the machine must have."""
    monkeypatch.setattr(tinybert.augment_files, "BLOCK", 1)
    draw, count = random.Random(0), 1000
    originals = [f"good film {number}" for number in range(60)]
    data = write_csv(tmp_path / "in.csv", [(text, "") for text in originals])
    job = AugmentJob(settings(str(data), masked_lm, tmp_path / "out.csv"))
    seen, expected = set(originals), []
    for block, original in enumerate(originals):
        copies = [f"good film {draw.randrange(50_000)}" for _ in range(count)]
        expected.append(True)
        for copy in copies:
            expected.append(copy not in seen)
            seen.add(copy)
        made = {"text": [original, *copies], tinybert.augment_files._IS_COPY: [False] + [True] * count}
        pq.write_table(pa.table(made), tmp_path / tinybert.augment_files._name(block))
    tracemalloc.start()
    kept, copies_kept = job._first_copies(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.tolist() == expected
    assert copies_kept == sum(expected) - len(originals)
    assert peak < 25 * len(expected)


FILTERED = {"keep_if_teacher_agrees": 0.5, "teacher": "teacher"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masked_lm": None}, "give --masked_lm, --word_vectors or both"),
        ({"data": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"output": "out.txt"}, "give it one of the endings"),
        ({"output": "nowhere/../rows.csv"}, "is the file that is read|exists"),
        ({"text_columns": ["verdict"]}, "no column 'verdict'"),
        ({"keep_if_teacher_agrees": 0.5}, "--keep_if_teacher_agrees needs a model to ask: give --teacher"),
        ({"tokens_per_batch": 0}, "--tokens_per_batch must be 1 or more"),
        ({"masked_lm": "encoder"}, "has no masked-LM head .* or let word vectors serve all words"),
        ({"data": "hole.csv"}, "column 'text' is empty in row 9"),
        ({"data": "header.csv"}, "has no rows"),
        ({"teacher": "encoder"}, "--teacher has no meaning without --keep_if_teacher_agrees"),
        ({"max_length": -7}, "--max_length has no meaning without --keep_if_teacher_agrees"),
        ({**FILTERED, "max_length": 65}, "--max_length is 65: it must be from 3 to 64 here"),
        ({**FILTERED, "max_length": 1}, "--max_length is 1: it must be from 3 to 64 here"),
        ({"data": "twins.csv"}, "more than one column called 'text'"),
        ({"data": "lines.csv", "output": "out.tsv"}, "cannot write out.tsv: .* tab or line break: choose"),
        ({"data": "lines.csv", "output": "out.tsv.gz"}, "cannot write out.tsv.gz: .* tab or line break"),
        ({"data": "dates.parquet", "output": "out.jsonl"}, "cannot write out.jsonl .* choose .parquet"),
        ({"data": "dates.parquet"}, "cannot write out.csv: column 'day' holds .* choose .parquet or .jsonl"),
        ({"data": "empty.jsonl", "output": "out.jsonl"}, "empty.jsonl: .* struct type 'more'.* column out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: dict[str, Any],
    message: str,
    rows: str,
    masked_lm: str,
    start_folder: Path,
    taught: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And it is found before the hours that the masked language model takes, not after them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AugmentJob, "write", lambda *_: pytest.fail("work was done on it"))
    os.symlink(start_folder, "encoder")
    os.symlink(taught.output_dir, "teacher")
    Path("rows.csv").write_text(Path(rows).read_text())
    write_csv(Path("hole.csv"), [("good", "yes")] * 8 + [("", "no")])
    Path("header.csv").write_text("text,label\n")
    Path("twins.csv").write_text("text,text\na,b\n")
    write_csv(Path("lines.csv"), [("good", "yes")] * 8 + [("bad\nfilm", "no")])
    pq.write_table(pa.table({"text": ["good"], "day": [date(2020, 2, 2)]}), "dates.parquet")
    Path("empty.jsonl").write_text('{"text": "good", "more": {}}\n')
    before = sorted(os.listdir())
    given = {"data": "rows.csv", "masked_lm": masked_lm, "output": "out.csv"} | options
    command = ["augment"]
    for name, value in given.items():
        if value is not None:
            command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert sorted(os.listdir()) == before


def test_a_file_named_after_a_task_may_have_other_columns(rows: str, masked_lm: str, tmp_path: Path) -> None:
    (tmp_path / "sst2.csv").write_text(Path(rows).read_text())
    assert augment_file(settings(str(tmp_path / "sst2.csv"), masked_lm, tmp_path / "out.csv")).rows == 30


def test_the_command_says_what_it_made(
    rows: str, masked_lm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    command = ["augment", "--data", rows, "--masked_lm", masked_lm, "--output", str(output), "--copies", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{output}: 30 rows and {len(read(output)) - 30} copies of them" in said
    assert main(command) == 2
    assert main([*command, "--overwrite_output", "true"]) == 0


def test_distill_refuses_settings_that_would_do_nothing(toy: dict[str, str]) -> None:
    with pytest.raises(InputError, match="are for --augment true: add it"):
        DistillArguments(**toy, teacher="x", masked_lm="y")
    with pytest.raises(InputError, match="--copies has no meaning without --augment true"):
        DistillArguments(**toy, teacher="x", copies=5)
    with pytest.raises(InputError, match="give one of them"):
        DistillArguments(**toy, teacher="x", augment=True, augmented="y.csv")


@pytest.mark.slow
def test_two_launched_processes_make_the_file_of_one(rows: str, masked_lm: str, tmp_path: Path) -> None:
    augment_file(settings(rows, masked_lm, tmp_path / "one.csv"))
    options = [
        "--data",
        rows,
        "--masked_lm",
        masked_lm,
        "--output",
        str(tmp_path / "two.csv"),
        "--copies",
        "5",
    ]
    script = tmp_path / "augment.py"
    script.write_text(
        "import sys, tinybert.augment_files as room\nroom.BLOCK = 4\nfrom tinybert.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc_per_node=2", str(script), "augment", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert done.stdout.count("copies of them") == 1


def test_digests_tell_texts_and_pairs_apart() -> None:
    rows = [("a", "b"), ("ab",), ("a b",), ("b", "a"), ("a",)]
    assert len(np.unique(tinybert.augment_files._digests(rows))) == len(rows)
