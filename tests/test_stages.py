"""The stages end to end on toy tasks: what they learn, what they write, what they survive."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, pipeline

from conftest import BAD, FILLERS, GOOD, QUICK, sentence, toy_rows, write_csv
from tinybert.cli import main
from tinybert.data import load_data
from tinybert.errors import InputError, Rejected
from tinybert.export import ExportArguments
from tinybert.rows import DataArguments, load_rows, shared_rows
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
from tinybert.training import EncoderTrainer, TrainingConfig

SMALL: dict[str, Any] = {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_length": 16}
LONG: dict[str, Any] = {
    "intermediate_epochs": 6,
    "intermediate_learning_rate": 5e-3,
    "prediction_epochs": 6,
    "prediction_learning_rate": 5e-3,
}
SHORT = LONG | {"intermediate_epochs": 3, "prediction_epochs": 3}
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
Toy = dict[str, str]


def distill(
    toy: Toy, teacher: Path, folder: Path, settings: dict[str, Any] | None = None, **options: Any
) -> Result:
    shape = {"max_length": 16} if "student" in options else SMALL
    arguments = DistillArguments(**toy, teacher=str(teacher), **shape | LONG | options)
    return distill_task(arguments, DistillationConfig(str(folder), **QUICK | (settings or {})))


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory, toy: Toy, taught: Result) -> Result:
    return distill(toy, taught.output_dir, tmp_path_factory.mktemp("distilled") / "student")


def test_fine_tuning_learns_the_toy_task(taught: Result) -> None:
    """Everything below would be vacuous with a teacher that knows nothing."""
    assert taught.metric == "accuracy"
    assert taught.figures[-1].metrics["accuracy"] >= 0.9


@pytest.mark.parametrize("init", ["closed_form", "random"])
def test_a_student_learns_the_task_from_its_teacher_alone(
    init: str, tmp_path: Path, toy: Toy, taught: Result
) -> None:
    """The gold labels of the training rows are wrong here: what the student knows, its teacher told it."""
    rows = load_data(toy["train"]).rows
    shuffled = random.Random(0).choices(["negative", "positive"], k=len(rows))
    train = write_csv(tmp_path / "train.csv", list(zip(rows["text"], shuffled, strict=True)))
    rows_of_lies = toy | {"train": str(train)}
    settings = {"student_dropout": 0.0}  # of 16 units none are to spare in so few steps
    result = distill(rows_of_lies, taught.output_dir, tmp_path / "student", settings, init=init)
    teacher, student = result.figures
    assert (teacher.name, student.name) == ("teacher", "student")
    assert student.metrics["accuracy"] >= 0.8
    assert teacher.metrics == taught.figures[-1].metrics
    assert student.parameters < teacher.parameters / 2


def test_evaluate_agrees_with_what_the_stages_reported(toy: Toy, taught: Result, distilled: Result) -> None:
    """The closing table must be what anybody measures who evaluates the folder afterwards."""
    for result in (taught, distilled):
        found = evaluate(EvaluateArguments(str(result.output_dir), toy["eval"], max_length=16, batch_size=5))
        assert found == pytest.approx(result.figures[-1].metrics, abs=1e-6)


@pytest.mark.parametrize("which", ["taught", "distilled"])
def test_the_run_directory_is_a_plain_model_folder_with_a_record(
    which: str, request: pytest.FixtureRequest, toy: Toy
) -> None:
    """Projections or checkpoints left behind would be uploaded with the model."""
    result: Result = request.getfixturevalue(which)
    folder = result.output_dir
    names = {path.name for path in folder.iterdir()}
    assert names >= MODEL_FILES | {"README.md", "run.json"}
    known = MODEL_FILES | {"README.md", "run.json", "vocab.txt", "special_tokens_map.json", "teacher_logits"}
    assert names - known == ({"report.html"} if which == "distilled" else set())
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    weights = load_file(folder / "model.safetensors")
    expected = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert set(weights) == set(expected)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-classification"
    assert all(f"{100 * row.metrics['accuracy']:.2f}" in body for row in result.figures)
    record = json.loads((folder / "run.json").read_text())
    assert set(record) >= {
        "arguments",
        "training",
        "versions",
        "data",
        "models",
        "stages",
        "seconds",
        "command",
    }
    assert record["training"]["seed"] == 42
    assert record["data"]["train"]["rows"] == "96"
    assert record["data"]["eval"]["fingerprint"] == load_data(toy["eval"]).fingerprint
    assert record["models"][-1]["metrics"] == pytest.approx(result.figures[-1].metrics)
    stages = {"finetune"} if which == "taught" else {"intermediate", "prediction"}
    assert set(record["stages"]) >= stages
    assert all(record["stages"][stage]["log"] for stage in stages)
    assert str(folder.parent) not in (folder / "config.json").read_text()


_WITHOUT_US = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tinybert":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
try:
    import tinybert
except ImportError:
    pass
else:
    raise SystemExit("tinybert can be imported")
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.tolist()
answers = pipeline("text-classification", folder, device="cpu")(texts)
print(json.dumps({"logits": logits, "labels": [answer["label"] for answer in answers],
                  "missing": list(report["missing_keys"]), "unexpected": list(report["unexpected_keys"])}))
"""


def test_stock_transformers_opens_a_student_where_tinybert_is_not_installed(
    distilled: Result, toy: Toy
) -> None:
    """The student is deployed where nobody has heard of this library."""
    texts = list(load_data(toy["eval"]).rows["text"])[:12]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, str(distilled.output_dir), json.dumps(texts)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["missing"] == answer["unexpected"] == []
    expected = logits_of(distilled.output_dir, texts)
    assert expected.std() > 0.1
    np.testing.assert_allclose(answer["logits"], expected, atol=1e-6)
    assert answer["labels"] == [("negative", "positive")[place] for place in expected.argmax(1)]
    assert set(answer["labels"]) == {"negative", "positive"}


def logits_of(folder: Path, texts: list[str]) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.numpy()


def weights(result: Result) -> dict[str, list[Any]]:
    return {name: t.tolist() for name, t in load_file(result.output_dir / "model.safetensors").items()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Let the training step with this number, counted over all stages, be interrupted; list the steps."""
    original = EncoderTrainer.training_step
    taken: list[int] = []

    def training_step(self: EncoderTrainer, *args: Any, **kwargs: Any) -> Any:
        taken.append(len(taken) + 1)
        if len(taken) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EncoderTrainer, "training_step", training_step)
    return taken


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, toy: Toy, taught: Result) -> dict[str, Any]:
    return weights(distill(toy, taught.output_dir, tmp_path_factory.mktemp("whole") / "s", **SHORT))


# 96 rows in batches of 16 and 3 epochs a stage: 18 steps each.
@pytest.mark.parametrize(
    "step",
    [3, 10, 19, 28],
    ids=["before any checkpoint", "intermediate", "between the stages", "prediction"],
)
def test_resuming_after_an_interruption_gives_the_uninterrupted_student(
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toy: Toy,
    taught: Result,
    uninterrupted: dict[str, Any],
) -> None:
    """A day's training on a machine that may be taken away must come to the same end."""
    folder = tmp_path / "student"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            distill(toy, taught.output_dir, folder, **SHORT)
    assert not (folder / "model.safetensors").exists(), "an interrupted run must not look finished"
    assert not (folder / "run.json").exists()
    if step > 6:  # there is something to lose
        with pytest.raises(InputError, match="not empty: choose another"):
            distill(toy, taught.output_dir, folder, **SHORT)
    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, -1)
        resumed = distill(toy, taught.output_dir, folder, {"resume_from_checkpoint": "true"}, **SHORT)
    assert weights(resumed) == uninterrupted
    # Whole epochs of six steps are kept, and a stage that ended is not run again.
    assert len(steps) == 36 - (step - 1) // 6 * 6
    with pytest.raises(InputError, match="is finished: nothing to resume"):
        distill(toy, taught.output_dir, folder, {"resume_from_checkpoint": "true"}, **SHORT)


def test_fine_tuning_resumes_to_the_same_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Toy, start_folder: Path
) -> None:
    """The same for the other stage."""
    arguments = FinetuneArguments(**toy, model=str(start_folder), max_length=16)

    def config(name: str, **more: Any) -> TrainingConfig:
        return TrainingConfig(str(tmp_path / name), num_train_epochs=3, learning_rate=5e-3, **QUICK | more)

    whole = finetune(arguments, config("whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            finetune(arguments, config("halves"))
    resumed = finetune(arguments, config("halves", resume_from_checkpoint="true"))
    assert weights(resumed) == weights(whole)
    assert weights(whole) != weights(replace(whole, output_dir=start_folder))


def test_overwriting_replaces_the_run_by_what_the_seed_says_and_keeps_foreign_files(
    tmp_path: Path, toy: Toy, taught: Result, uninterrupted: dict[str, Any]
) -> None:
    """Notes beside a model are not the run's to remove; and without one result a seed no figure repeats."""
    folder = tmp_path / "student"
    first = distill(toy, taught.output_dir, folder, {"seed": 7}, **SHORT)
    (folder / "notes.txt").write_text("mine")
    assert weights(first) != uninterrupted
    again = distill(toy, taught.output_dir, folder, {"overwrite_output_dir": True}, **SHORT)
    assert weights(again) == uninterrupted
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left_out", ["intermediate", "prediction"])
def test_either_stage_can_be_left_out(left_out: str, tmp_path: Path, toy: Toy, taught: Result) -> None:
    """Comparing with and without a stage tells whether it pays."""
    result = distill(toy, taught.output_dir, tmp_path / "student", **SHORT | {f"{left_out}_epochs": 0})
    record = json.loads((result.output_dir / "run.json").read_text())
    ran = {stage for stage in ("intermediate", "prediction") if stage in record["stages"]}
    assert ran == {"intermediate", "prediction"} - {left_out}


def test_a_student_can_stay_as_it_was_solved(tmp_path: Path, toy: Toy, taught: Result) -> None:
    """A minute instead of training: the page, the card and the next run take it like any other."""
    words = toy | SMALL | {"teacher": taught.output_dir, "intermediate_epochs": 0, "prediction_epochs": 0}
    command = ["distill", "--use_cpu", *(f"--{name}={value}" for name, value in words.items())]
    assert main([*command, f"--output_dir={tmp_path / 'dry'}", "--dry_run"]) == 0
    assert main([*command, f"--output_dir={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(record["stages"]) == {"closed_form"}
    solved = record["stages"]["closed_form"]["metrics"]
    assert record["models"][-1]["metrics"] == pytest.approx(solved, abs=1e-6)
    assert (tmp_path / "out" / "report.html").exists()
    again = distill(toy, taught.output_dir, tmp_path / "again", student=str(tmp_path / "out"), **SHORT)
    assert again.figures[-1].parameters == record["models"][-1]["parameters"]


def test_files_that_are_refused_cost_nobody_the_student(
    tmp_path: Path,
    toy: Toy,
    taught: Result,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The 8-bit file that lost too much comes after the training, whose result stays."""

    def refuse(arguments: ExportArguments) -> None:
        assert (arguments.int8, arguments.check, arguments.max_drop) == (True, toy["eval"], 0.5)
        assert (Path(arguments.model) / "run.json").exists()
        raise Rejected("8-bit weights cost 9 points")

    monkeypatch.setattr("tinybert.stages.to_onnx", refuse)
    words = toy | SMALL | {"teacher": taught.output_dir, "output_dir": tmp_path / "out"}
    words |= {"intermediate_epochs": 0, "prediction_epochs": 0, "onnx": True, "max_drop": 0.5}
    assert main(["distill", "--use_cpu", *(f"--{name}={value}" for name, value in words.items())]) == 1
    assert "8-bit weights cost 9 points" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("more", [{"init": "random"}, {"baseline": "finetune"}, {"augmented": "rows.csv"}])
def test_nothing_else_is_left_untrained(more: dict[str, Any], toy: Toy, tmp_path: Path) -> None:
    """A random student of no epochs is a mistake."""
    with pytest.raises(InputError, match="one must be above 0 unless the student is to stay as"):
        DistillArguments(**toy, teacher="t", intermediate_epochs=0, prediction_epochs=0, **more)


@pytest.mark.parametrize("option", [{"layers": 1}, {"hidden_size": 16}, {"init": "copy"}, {"heads": 1}])
def test_a_given_student_has_a_shape_and_a_start_already(
    option: dict[str, Any], toy: Toy, taught: Result, tmp_path: Path
) -> None:
    """--layers 6 beside --student would train a student of four layers without a word."""
    arguments = DistillArguments(
        **toy, teacher=str(taught.output_dir), student=str(taught.output_dir), **option
    )
    with pytest.raises(InputError, match=f"--{next(iter(option))} has no meaning with --student"):
        distill_task(arguments, DistillationConfig(str(tmp_path / "student")))
    assert not (tmp_path / "student").exists()


def test_a_given_student_is_trained_in_its_own_shape(
    tmp_path: Path,
    toy: Toy,
    taught: Result,
    tiny_encoder: Callable[..., PreTrainedModel],
    save_model: Callable[[PreTrainedModel, Path], Path],
) -> None:
    """A generally distilled student is where the paper's task stage starts."""
    start = save_model(tiny_encoder("bert", num_hidden_layers=1, hidden_size=24), tmp_path / "start")
    result = distill(toy, taught.output_dir, tmp_path / "student", student=str(start), **SHORT)
    config = json.loads((result.output_dir / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 24)
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    before = load_file(start / "model.safetensors")["embeddings.word_embeddings.weight"]
    after = load_file(result.output_dir / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert before.shape == after.shape
    assert not torch.equal(before, after)


THREE = ("bad", "good", "neither")


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Three classes by string labels: the third has no telling word."""
    folder, paths = tmp_path_factory.mktemp("three"), {}
    for seed, (name, count) in enumerate({"train": 150, "eval": 45}.items()):
        generator = random.Random(seed)
        tellings = dict(zip(THREE, (BAD, GOOD, FILLERS), strict=True))
        rows = [(sentence(generator, tellings[THREE[row % 3]]), THREE[row % 3]) for row in range(count)]
        generator.shuffle(rows)
        paths[name] = str(write_csv(folder / f"{name}.csv", rows))
    return paths


@pytest.fixture(scope="session")
def three_taught(tmp_path_factory: pytest.TempPathFactory, three: Toy, start_folder: Path) -> Result:
    folder = tmp_path_factory.mktemp("three-taught") / "teacher"
    config = TrainingConfig(str(folder), num_train_epochs=9, learning_rate=6e-3, **QUICK)
    return finetune(FinetuneArguments(**three, model=str(start_folder), max_length=16), config)


def test_the_teachers_order_of_classes_changes_nothing(
    tmp_path: Path, three: Toy, three_taught: Result
) -> None:
    """Labels matched by position and not by name turn 83 % into 10 %, and nobody is told."""
    assert three_taught.figures[-1].metrics["accuracy"] > 0.7
    order = [2, 0, 1]
    model = AutoModelForSequenceClassification.from_pretrained(three_taught.output_dir)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {place: THREE[old] for place, old in enumerate(order)}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "permuted")
    AutoTokenizer.from_pretrained(three_taught.output_dir).save_pretrained(tmp_path / "permuted")
    # A copied head is permuted along with its teacher's; a random one would not be.
    options = SHORT | {"init": "copy", "hidden_size": 32, "intermediate_size": 40}
    plain = distill(three, three_taught.output_dir, tmp_path / "a", **options)
    other = distill(three, tmp_path / "permuted", tmp_path / "b", **options)
    assert other.figures[0].metrics == pytest.approx(three_taught.figures[-1].metrics)
    assert other.figures[1].metrics == pytest.approx(plain.figures[1].metrics)
    assert plain.figures[1].metrics["accuracy"] > 0.6
    texts = list(load_data(three["eval"]).rows["text"])
    logits = logits_of(plain.output_dir, texts)
    assert logits.std() > 0.1
    np.testing.assert_allclose(logits_of(other.output_dir, texts), logits[:, order], atol=2e-3)
    found = evaluate(EvaluateArguments(str(other.output_dir), three["eval"], max_length=16))
    assert found["accuracy"] == pytest.approx(plain.figures[1].metrics["accuracy"])


def test_regression_goes_end_to_end(tmp_path: Path, start_folder: Path) -> None:
    """The reference distils scores from the gold label alone: here they come from the teacher."""
    paths = {}
    for seed, (name, count) in enumerate({"train": 96, "eval": 33}.items()):
        rows = [
            (text, (4.5 if label == "positive" else 0.5) + 0.01 * len(text))
            for text, label in toy_rows(count, seed)
        ]
        paths[name] = str(write_csv(tmp_path / f"{name}.csv", rows, ("text", "score")))
    config = TrainingConfig(str(tmp_path / "teacher"), num_train_epochs=9, learning_rate=6e-3, **QUICK)
    taught = finetune(FinetuneArguments(**paths, model=str(start_folder), max_length=16), config)
    assert taught.metric == "pearson_spearman"
    assert taught.figures[-1].metrics["pearson"] > 0.8
    result = distill(paths, taught.output_dir, tmp_path / "student", **SHORT)
    assert result.figures[-1].metrics["pearson"] > 0.6
    config_written = json.loads((result.output_dir / "config.json").read_text())
    assert config_written["problem_type"] == "regression"
    found = evaluate(EvaluateArguments(str(result.output_dir), paths["eval"], max_length=16))
    assert found == pytest.approx(result.figures[-1].metrics, abs=1e-5)


def test_pairs_go_end_to_end(tmp_path: Path, start_folder: Path) -> None:
    """The second text alone tells the class: dropped, nothing could be learnt."""
    paths = {}
    for seed, (name, count) in enumerate({"train": 96, "eval": 33}.items()):
        rows = [("the plot", text, label) for text, label in toy_rows(count, seed)]
        paths[name] = str(write_csv(tmp_path / f"{name}.csv", rows, ("sentence1", "sentence2", "label")))
    config = TrainingConfig(str(tmp_path / "teacher"), num_train_epochs=10, learning_rate=6e-3, **QUICK)
    taught = finetune(FinetuneArguments(**paths, model=str(start_folder), max_length=20), config)
    assert taught.figures[-1].metrics["accuracy"] > 0.75
    result = distill(paths, taught.output_dir, tmp_path / "student", **SHORT | {"max_length": 20})
    assert result.figures[-1].metrics["accuracy"] > 0.6


def test_a_glue_folder_is_read_by_its_splits(tmp_path: Path, start_folder: Path) -> None:
    """GLUE's own layout: TSV without quoting, ids whose names only the task knows."""
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for seed, (name, count) in enumerate({"train": 40, "dev": 20}.items()):
        lines = [f'"{text}\t{int(label == "positive")}' for text, label in toy_rows(count, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    arguments = FinetuneArguments(str(folder), str(folder), model=str(start_folder), max_length=16)
    result = finetune(arguments, TrainingConfig(str(tmp_path / "out"), max_steps=2, **QUICK))
    record = json.loads((result.output_dir / "run.json").read_text())
    assert (record["data"]["train"]["rows"], record["data"]["eval"]["rows"]) == ("40", "20")
    config = json.loads((result.output_dir / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert set(evaluate(EvaluateArguments(str(result.output_dir), str(folder), max_length=16))) >= {
        "accuracy"
    }


def test_distilberts_missing_token_types_are_no_obstacle(
    tmp_path: Path,
    toy: Toy,
    tiny_encoder: Callable[..., PreTrainedModel],
    save_model: Callable[[PreTrainedModel, Path], Path],
) -> None:
    """Its forward takes no token types, which BERT's tokenizer makes all the same."""
    start = save_model(tiny_encoder("distilbert"), tmp_path / "start")
    config = TrainingConfig(str(tmp_path / "teacher"), max_steps=2, **QUICK)
    taught = finetune(FinetuneArguments(**toy, model=str(start), max_length=16), config)
    result = distill(toy, taught.output_dir, tmp_path / "student", **SHORT, force=True)
    assert json.loads((result.output_dir / "config.json").read_text())["model_type"] == "distilbert"


def test_rows_that_teach_and_choose_are_said_to_be_the_same(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A score on rows that were learnt by heart looks like a success until the model is used."""
    copied = shutil.copy(toy["train"], tmp_path / "other_name.csv")
    with caplog.at_level("WARNING", logger="tinybert"):
        load_rows(DataArguments(toy["train"], toy["eval"]))
    assert not caplog.records
    load_rows(DataArguments(toy["train"], str(copied)))
    assert "the 96 rows of" in caplog.text
    assert "learnt by heart" in caplog.text


@pytest.mark.parametrize(
    ("train", "held_out", "shared"),
    [
        ({"text": ["a", "b", "b"]}, {"text": ["b", "c", "b"]}, 2),
        ({"text": ["a"], "text_pair": ["b"]}, {"text": ["b", "a"], "text_pair": ["a", "b"]}, 1),
        ({"words": [["a", "b"], ["c"]]}, {"words": [["a"], ["c"], ["a", "b"]]}, 2),
        ({"question": ["q"], "context": ["x"]}, {"question": ["q", "q"], "context": ["x", "y"]}, 1),
        ({"text": ["a"]}, {"text": ["b"]}, 0),
    ],
    ids=["texts", "pairs", "words", "questions", "none"],
)
def test_rows_that_are_in_both_are_counted_by_all_of_their_texts(
    train: dict[str, list[Any]], held_out: dict[str, list[Any]], shared: int
) -> None:
    """A question asked of another context is another row, and so is a pair the other way round."""
    assert shared_rows(Dataset.from_dict(train), Dataset.from_dict(held_out)) == shared


def test_eval_rows_are_pairs_where_the_training_rows_are(tmp_path: Path) -> None:
    """A column too many in one of the files: the checkpoint would be chosen by other questions."""
    (tmp_path / "single.csv").write_text("text,label\ngood,a\nbad,b\n")
    (tmp_path / "pairs.csv").write_text("text,text_pair,label\ngood,bad,a\nbad,good,b\n")
    for train, held_out, said in (("single", "pairs", "single texts"), ("pairs", "single", "pairs of texts")):
        with pytest.raises(InputError, match=rf"{train}.csv has {said} and .*{held_out}.csv"):
            load_rows(DataArguments(str(tmp_path / f"{train}.csv"), str(tmp_path / f"{held_out}.csv")))


def test_a_model_is_not_scored_with_another_models_tokenizer(
    tmp_path: Path, toy: Toy, taught: Result
) -> None:
    """An index out of range names neither the tokenizer nor the word."""
    folder = Path(shutil.copytree(taught.output_dir, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "rows.csv").write_text("text,label\nzebra,positive\n")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"makes the id \d+, and the model has \d+ embeddings"):
        evaluate(EvaluateArguments(str(folder), str(tmp_path / "rows.csv"), max_length=16))


def test_a_stride_is_for_windows_and_questions_alone_have_them(toy: Toy, taught: Result) -> None:
    """Long texts of other tasks are cut: whoever asks for windows must not think he has them."""
    said = "--stride has no meaning where the task is classification"
    with pytest.raises(InputError, match=said):
        load_rows(DataArguments(toy["train"], toy["eval"], stride=64))
    with pytest.raises(InputError, match=said):
        evaluate(EvaluateArguments(str(taught.output_dir), toy["eval"], stride=64))


def test_rows_of_one_class_tell_nothing_of_a_teacher(tmp_path: Path, toy: Toy, taught: Result) -> None:
    """The order of its labels is not to blame."""
    rows = Path(toy["eval"]).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "eval.csv").write_text("".join([rows[0], *(row for row in rows if "positive" in row)]))
    with pytest.raises(
        InputError, match=r"cannot be told from chance .*: all rows have the same label, or add"
    ):
        distill(toy | {"eval": str(tmp_path / "eval.csv")}, taught.output_dir, tmp_path / "student", **SHORT)


def test_a_teacher_no_better_than_chance_needs_force_and_then_there_is_a_warning(
    tmp_path: Path, toy: Toy, taught: Result, caplog: pytest.LogCaptureFixture
) -> None:
    """Hours of distilling from a teacher whose labels are mixed up: found out in seconds instead."""
    model = AutoModelForSequenceClassification.from_pretrained(taught.output_dir)
    with torch.no_grad():
        model.classifier.weight.zero_()
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(taught.output_dir).save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        InputError, match=r"no better than chance .* accuracy 0\.\d+, chance 0\.515; .*-force"
    ):
        distill(toy, tmp_path / "teacher", tmp_path / "student", **SHORT)
    assert not (tmp_path / "student").exists()
    result = distill(toy, tmp_path / "teacher", tmp_path / "student", **SHORT, force=True)
    assert "no better than chance" in caplog.text
    assert (result.output_dir / "model.safetensors").exists()


def test_a_teacher_with_its_labels_exchanged_is_told_which(tmp_path: Path, toy: Toy, taught: Result) -> None:
    """83 % becomes 10 %: names in another order are the commonest reason, and easily mended."""
    model = AutoModelForSequenceClassification.from_pretrained(taught.output_dir)
    names = dict(model.config.id2label)
    model.config.id2label = {0: names[1], 1: names[0]}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(taught.output_dir).save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        InputError,
        match=r"labels in another order than the rows on .*: accuracy 0\.\d+, chance 0\.515; "
        r"'\w+' is its '\w+', '\w+' is its '\w+': mend id2label in its config.json",
    ):
        distill(toy, tmp_path / "teacher", tmp_path / "student", **SHORT)
    assert not (tmp_path / "student").exists()


def multi_label_rows(count: int, seed: int) -> list[list[object]]:
    """Texts, and whether a good word, a bad one, and the word film are in them."""
    draw = random.Random(seed)
    rows: list[list[object]] = []
    for _ in range(count):
        words = draw.choices(FILLERS, k=draw.randint(2, 6))
        words += draw.sample(GOOD, draw.randint(0, 1)) + draw.sample(BAD, draw.randint(0, 1))
        draw.shuffle(words)
        rows.append([" ".join(words), *(int(bool(set(words) & set(some))) for some in (GOOD, BAD, ["film"]))])
    return rows


def test_labels_of_any_number_go_through_every_command(tmp_path: Path, start_folder: Path) -> None:
    """Several may hold at once, or none: softmax and argmax would have lost most of them."""
    header = ("text", "good", "bad", "film")
    rows = {
        "train": str(write_csv(tmp_path / "train.csv", multi_label_rows(400, 0), header)),
        "eval": str(write_csv(tmp_path / "dev.csv", multi_label_rows(40, 1), header)),
    }
    labels = {"label_columns": ["good", "bad", "film"]}
    config = TrainingConfig(str(tmp_path / "teacher"), num_train_epochs=10, learning_rate=6e-3, **QUICK)
    teacher = finetune(FinetuneArguments(**rows, **labels, model=str(start_folder), max_length=16), config)
    assert teacher.metric == "f1_micro"
    assert teacher.figures[-1].metrics["f1_micro"] > 0.9
    student = distill(rows, teacher.output_dir, tmp_path / "student", {"gold_weight": 0.5}, **labels)
    assert student.figures[-1].metrics["f1_micro"] > 0.85
    folder = str(student.output_dir)
    held_out = [
        (str(text), [name for name, flag in zip(header[1:], flags, strict=True) if flag])
        for text, *flags in multi_label_rows(40, 1)
    ]
    listed = tmp_path / "dev.jsonl"
    listed.write_text("\n".join(json.dumps({"text": text, "labels": names}) for text, names in held_out))
    metrics = evaluate(EvaluateArguments(model=folder, data=str(listed), max_length=16))
    assert metrics == pytest.approx(student.figures[-1].metrics)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.problem_type == "multi_label_classification"
    assert [model.config.id2label[place] for place in range(3)] == ["good", "bad", "film"]
    classify = pipeline("text-classification", folder, top_k=None)
    right = [
        (entry["score"] > 0.5) == (entry["label"] in names)
        for text, names in held_out
        for entry in classify([text])[0]
    ]
    assert sum(right) / len(right) > 0.9, "each label has a sigmoid of its own"
