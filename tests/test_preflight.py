"""Before any time is spent: what a run would do is found out, said, and true."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, PreTrainedModel

from conftest import QUICK, toy_rows, write_csv
from tinybert import evaluation
from tinybert.cli import main
from tinybert.data import TaskData, load_data, tokenize
from tinybert.errors import InputError
from tinybert.preflight import Preflight, check_ids, duration, label_rows, measure_lengths
from tinybert.rehearsal import few_eval_rows, few_train_rows
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, FinetuneArguments, preflight_distill, preflight_finetune
from tinybert.trainer import DistillationConfig
from tinybert.training import EncoderTrainer, StagePlan, TrainingConfig, plan_stage

SMALL: dict[str, Any] = {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_length": 16}
SPEED = {name: value for name, value in QUICK.items() if name != "disable_tqdm"}
Toy = dict[str, str]


def words_of(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def distill_options(toy: Toy, taught: Result, folder: Path, **more: Any) -> dict[str, Any]:
    return toy | SMALL | SPEED | {"teacher": taught.output_dir, "output_dir": folder} | more


@pytest.fixture(scope="module")
def foreseen(tmp_path_factory: pytest.TempPathFactory, toy: Toy, taught: Result) -> Preflight:
    """What distilling on the toy task would do."""
    arguments = DistillArguments(**toy, **SMALL, teacher=str(taught.output_dir))
    folder = tmp_path_factory.mktemp("foreseen") / "student"
    found = preflight_distill(arguments, DistillationConfig(str(folder), **QUICK))
    assert not folder.exists()
    return found


def test_a_dry_run_prints_what_would_be_done_and_writes_nothing(
    tmp_path: Path,
    toy: Toy,
    taught: Result,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever asks what a week of training will be has not asked for its first files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = {path: path.stat().st_mtime_ns for path in taught.output_dir.rglob("*")}
    options = distill_options(toy, taught, tmp_path / "student", dry_run=True)
    assert main(["distill", *words_of(options)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    accuracy = 100 * taught.figures[-1].metrics["accuracy"]
    assert f"the teacher's accuracy is {accuracy:.2f} on the eval rows, chance 51.52" in said.out
    assert re.search(r"0 +negative +'negative' +48 \(50\.0 %\) +17 \(51\.5 %\)", said.out)
    assert re.search(r"1 +positive +'positive' +48 \(50\.0 %\) +16 \(48\.5 %\)", said.out)
    assert "25 word pieces, the same in both models" in said.out
    assert "the student's layers 1 2 imitate the teacher's 2 3" in said.out
    assert "intermediate: 6 in 1 epoch\n" in said.out
    assert "prediction: 12 in 2 epochs" in said.out
    assert re.search(r"time +about \d+ s, without the closed-form start: an estimate from a few", said.out)
    assert list(tmp_path.iterdir()) == [scratch]
    assert list(scratch.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in taught.output_dir.rglob("*")} == before


def test_a_run_begins_with_the_short_form_and_does_what_the_dry_run_said(
    tmp_path: Path,
    toy: Toy,
    taught: Result,
    foreseen: Preflight,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps, score and sizes are those of the run; and its teacher is measured once."""
    measured: list[str] = []

    def counted(*args: Any, description: str = "predict", **options: Any) -> np.ndarray:
        measured.append(description)
        return predict(*args, description=description, **options)

    predict = evaluation.predict_logits
    for room in ("evaluation", "stages", "distillation"):
        monkeypatch.setattr(f"tinybert.{room}.predict_logits", counted)
    options = distill_options(toy, taught, tmp_path / "student")
    assert main(["distill", *words_of(options)]) == 0
    assert measured.count("Teacher") == 1
    said = capsys.readouterr().err
    assert said.startswith(foreseen.short())
    assert len(foreseen.short().splitlines()) == 4
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert foreseen.teacher == (
        "accuracy",
        record["models"][0]["metrics"]["accuracy"],
        pytest.approx(17 / 33),
    )
    assert foreseen.parameters == {row["name"]: row["parameters"] for row in record["models"]}
    steps = {stage.name: stage.steps for stage in foreseen.stages}
    assert steps == {name: record["stages"][name]["steps"] for name in ("intermediate", "prediction")}


def test_the_estimate_is_measured_on_real_steps(
    tmp_path: Path, toy: Toy, start_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess by size would not know the machine: steps that take longer here must show."""
    original, taken = EncoderTrainer.training_step, []

    def slow(self: EncoderTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        taken.append(len(inputs["labels"]))
        time.sleep(0.2)
        return original(self, model, inputs, *args)

    arguments = FinetuneArguments(**toy, model=str(start_folder), max_length=16)
    config = TrainingConfig(str(tmp_path / "out"), num_train_epochs=50, **QUICK)
    quick = preflight_finetune(arguments, config).stages[0]
    monkeypatch.setattr(EncoderTrainer, "training_step", slow)
    stage = preflight_finetune(arguments, replace(config, gradient_accumulation_steps=2)).stages[0]
    assert taken == [16] * 6, "one to warm up and five timed, on whole batches"
    assert (quick.steps, stage.steps) == (300, 150)
    assert stage.step_seconds is not None
    assert stage.step_seconds >= 0.4, "two batches a step"
    assert stage.seconds == pytest.approx(150 * stage.step_seconds + stage.other_seconds)
    assert stage.other_seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_has_a_dry_run_too(
    tmp_path: Path, toy: Toy, start_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no teacher and no second vocabulary: what is not there is not spoken of."""
    options = toy | SPEED | {"model": start_folder, "output_dir": tmp_path / "out", "max_length": 16}
    assert main(["finetune", *words_of(options), "--dry_run", "true"]) == 0
    said = capsys.readouterr()
    assert "finetune: 18 in 3 epochs" in said.out
    assert "teacher" not in said.out
    assert said.err == ""
    assert list(tmp_path.iterdir()) == []


def test_general_distillation_has_a_dry_run_too(
    tmp_path: Path, start_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lasts the longest of all; its steps are those of the run, and a pass over the text is known."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(text for text, _ in toy_rows(200)))
    options = SPEED | {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "block_size": 16}
    options |= {"teacher": start_folder, "corpus": corpus, "num_train_epochs": 2, "eval_corpus": corpus}
    options |= {"eval_blocks": 8, "output_dir": tmp_path / "out"}
    assert main(["general", *words_of(options), "--dry_run", "true"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert list(tmp_path.iterdir()) == [corpus]
    steps = re.search(r"steps +general: (\d+) in 2 epochs", said.out)
    assert steps, said.out
    assert "the student's layers 1 2 imitate the teacher's 2 3" in said.out
    assert re.search(r"general: \d+ s \(\S+ s a step", said.out)
    assert main(["general", *words_of(options)]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["stages"]["general"]["steps"] == int(steps[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 9}, "layers is 9"),
        ({"max_length": 99}, "--max_length is 99"),
        ({"eval": "stranger.csv"}, "'lukewarm' in row 2 is not one of the known labels"),
        ({"student": "other"}, "different vocabularies .* --intermediate_epochs 0"),
    ],
)
def test_a_dry_run_finds_the_errors_of_the_run(
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    toy: Toy,
    taught: Result,
    tiny_encoder: Callable[..., PreTrainedModel],
    tokenizer: BertTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """This is what it is for."""
    write_csv(tmp_path / "stranger.csv", [("good", "positive"), ("bad", "lukewarm")])
    tiny_encoder("bert").save_pretrained(tmp_path / "other")
    pieces = sorted(tokenizer.get_vocab())
    BertTokenizerFast(vocab={piece: place for place, piece in enumerate(pieces)}).save_pretrained(
        tmp_path / "other"
    )
    there = {name: tmp_path / v if (tmp_path / str(v)).exists() else v for name, v in options.items()}
    folder = tmp_path / "student"
    assert main(["distill", *words_of(distill_options(toy, taught, folder, dry_run=True, **there))]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert re.search(message, said.err)
    assert not folder.exists()


def labelled(path: Path, labels: list[str], names: tuple[str, ...] | None = None) -> TaskData:
    return load_data(write_csv(path, [("good", label) for label in labels]), label_names=names)


def test_labels_are_shown_as_the_model_and_as_the_rows_name_them(tmp_path: Path) -> None:
    """A teacher whose classes are in another order is what turns 83 % into 10 %: it must be seen."""
    names = ("positive", "neutral", "negative")
    spelled = ["negative", "Positive", "positive", "NEGATIVE", "negative"]
    train = labelled(tmp_path / "train.csv", spelled, names)
    held_out = labelled(tmp_path / "dev.csv", ["2", "0", "2"], names)
    paths = str(tmp_path / "train.csv"), str(tmp_path / "dev.csv")
    first, second, third = label_rows((train, held_out), paths, None, None)
    assert (first.number, first.name, first.spellings) == (0, "positive", ("0", "Positive", "positive"))
    assert (second.name, second.spellings, second.counts) == ("neutral", (), (0, 0))
    assert (third.number, third.name) == (2, "negative")
    assert third.spellings == ("2", "NEGATIVE", "negative")
    assert [row.counts for row in (first, third)] == [(2, 1), (3, 2)]


def test_labels_of_which_several_hold_are_counted_each(tmp_path: Path) -> None:
    """Their shares add up to more than the rows, or to less."""
    path = write_csv(tmp_path / "a.csv", [("x", 1, 0), ("y", 1, 1), ("z", 0, 0)], ("text", "hot", "loud"))
    data = load_data(path, label_columns=["hot", "loud"])
    found = label_rows((data, data), (str(path), str(path)), None, None)
    assert [(row.name, row.counts) for row in found] == [("hot", (2, 2)), ("loud", (1, 1))]


def test_lengths_are_those_before_the_cut(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """Measured after it, every text would seem to fit."""
    words = [*range(1, 51), *[30] * 50]
    path = write_csv(tmp_path / "rows.csv", [(" ".join(["good"] * count), "a") for count in words])
    data = load_data(path)
    before = tokenizer.backend_tokenizer.to_str()
    rows = tokenize(data, tokenizer, 16)
    cut = tokenizer.backend_tokenizer.to_str()
    pieces = np.array(words) + 2
    found = measure_lengths(data, rows, tokenizer, 16, 64)
    assert (found.median, found.most, found.longest) == (32, int(np.sort(pieces)[94]), 52)
    assert found.cut == pytest.approx((pieces > 16).mean())
    assert (found.proposal, found.proposal_cut) == (56, 0.0)
    assert found.advice() == "proposed: --max_length 56 (cuts 0.0 %)"
    assert before != cut == tokenizer.backend_tokenizer.to_str(), "how it cuts is saved with the student"
    few_positions = measure_lengths(data, rows, tokenizer, 16, 40)
    assert few_positions.proposal == 40
    assert few_positions.proposal_cut == pytest.approx((pieces > 40).mean())
    roomy = measure_lengths(data, tokenize(data, tokenizer, 64), tokenizer, 64, 64)
    assert (roomy.longest, roomy.cut) == (52, 0.0)
    assert "--max_length 56 (cuts 0.0 %) would do as well" in roomy.advice()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 3},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 2, "dataloader_drop_last": True},
        {"num_train_epochs": 2, "tokens_per_batch": 100},
        {"max_steps": 7},
    ],
    ids=str,
)
def test_steps_are_counted_as_the_trainer_counts_them(
    settings: dict[str, Any], tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """Against the Trainer itself."""
    rows = tokenize(load_data(write_csv(tmp_path / "a.csv", toy_rows(101))), tokenizer, 16)
    config = TrainingConfig(str(tmp_path / "out"), **QUICK | settings)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=25, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    trainer = EncoderTrainer(model=model, args=config, train_dataset=rows)
    expected = trainer.set_initial_training_values(config, trainer.get_train_dataloader())[-1]
    assert plan_stage("x", config, rows["length"]).steps == expected


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "random"}, {"tokens_per_batch": 500}])
def test_the_few_batches_stand_for_all(settings: dict[str, Any], tmp_path: Path) -> None:
    """Timed on the longest alone, which sorted batches begin with, an hour would be said to be three."""
    lengths = np.random.default_rng(0).geometric(0.05, 5000).clip(3, 128)
    config = TrainingConfig(str(tmp_path / "out"), **QUICK | settings)
    rows = few_train_rows(config, lengths)
    assert len(set(rows)) > 5
    if "tokens_per_batch" in settings:
        assert lengths[rows].sum() == pytest.approx(6 * 500, rel=0.1)
        return
    assert len(rows) == 6 * 16
    timed = lengths[rows[16:]].reshape(5, 16)
    if "train_sampling_strategy" in settings:
        lengths = np.random.default_rng(1).permutation(lengths)
    else:
        lengths = np.sort(lengths)
    longest = lengths[: 5000 // 16 * 16].reshape(-1, 16).max(1)
    assert timed.max(1).mean() == pytest.approx(longest.mean(), rel=0.2)


def test_a_few_eval_rows_are_spread_over_all(tmp_path: Path) -> None:
    """The first rows of a file are often alike."""
    config = TrainingConfig(str(tmp_path / "out"), per_device_eval_batch_size=4, **QUICK)
    assert few_eval_rows(config, 5).tolist() == [0, 1, 2, 3, 4]
    some = few_eval_rows(config, 1000)
    assert (len(some), some[0], some[-1]) == (12, 0, 999)


def test_a_piece_without_an_embedding_is_found_before_it_is_looked_up(
    tmp_path: Path, tokenizer: BertTokenizerFast, tiny_encoder: Callable[..., PreTrainedModel]
) -> None:
    """An index out of range after three hours names neither the tokenizer nor the word."""
    rows = tokenize(load_data(write_csv(tmp_path / "a.csv", [("good .", "x"), ("bad", "y")])), tokenizer, 16)
    check_ids("teacher", tiny_encoder("bert"), rows)
    with pytest.raises(InputError, match=r"tokenizer of the teacher makes the id 24, and .* 24 embeddings"):
        check_ids("teacher", tiny_encoder("bert", vocab_size=24), rows)


def test_times_are_said_as_people_say_them() -> None:
    """12345.6 s is no answer."""
    assert [duration(seconds) for seconds in (7.4, 99, 600, 5990, 36_000)] == [
        "7 s",
        "99 s",
        "10 min",
        "100 min",
        "10.0 h",
    ]
    assert StagePlan("x", 1.0, 10).seconds is None
