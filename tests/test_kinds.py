"""Tags of words and answers to questions through every command, on toy tasks."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from conftest import BAD, FILLERS, GOOD, QUICK
from tinybert.errors import InputError
from tinybert.export import ExportArguments, to_onnx
from tinybert.run_directory import Result
from tinybert.stages import (
    DistillArguments,
    EvaluateArguments,
    FinetuneArguments,
    distill_task,
    evaluate,
    finetune,
    preflight_distill,
)
from tinybert.trainer import DistillationConfig
from tinybert.training import TrainingConfig

Rows = dict[str, str]
SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "intermediate_epochs": 2,
    "intermediate_learning_rate": 5e-3,
    "prediction_epochs": 3,
    "prediction_learning_rate": 5e-3,
}
NAMES = ("B-NEG", "B-POS", "I-NEG", "I-POS", "O")
SIZES = {"train": 400, "eval": 40}
ORDER = (4, 2, 0, 3, 1)


def teach(rows: Rows, start_folder: Path, folder: Path, epochs: int, **options: Any) -> Result:
    config = TrainingConfig(str(folder), num_train_epochs=epochs, learning_rate=6e-3, **QUICK)
    return finetune(FinetuneArguments(**rows, model=str(start_folder), **options), config)


def distill(rows: Rows, teacher: Path, folder: Path, **options: Any) -> Result:
    arguments = DistillArguments(**rows, teacher=str(teacher), **SMALL | options)
    return distill_task(arguments, DistillationConfig(str(folder), **QUICK))


def tagged(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Sentences with a telling word and ``films`` (two pieces), which belongs to it where it comes next."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        pairs = [(word, "O") for word in draw.choices((*FILLERS, "films"), k=draw.randint(2, 6))]
        kind, telling = draw.choice((("POS", GOOD), ("NEG", BAD)))
        entity = [(draw.choice(telling), f"B-{kind}"), ("films", f"I-{kind}")][: draw.randint(1, 2)]
        place = draw.randint(0, len(pairs))
        if len(entity) == 1 and pairs[place : place + 1] == [("films", "O")]:
            pairs[place] = ("cast", "O")
        pairs[place:place] = entity
        words, tags = zip(*pairs, strict=True)
        made.append((list(words), list(tags)))
    return made


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder, paths = tmp_path_factory.mktemp("words"), {}
    for seed, (name, count) in enumerate(SIZES.items()):
        path = folder / f"{name}.conll"
        sentences = ("\n".join(map(" ".join, zip(*pair, strict=True))) for pair in tagged(count, seed))
        path.write_text("\n\n".join(sentences) + "\n")
        paths[name] = str(path)
    return paths


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory, words: Rows, start_folder: Path) -> Result:
    return teach(words, start_folder, tmp_path_factory.mktemp("tagger") / "teacher", 12)


@pytest.fixture(scope="session")
def small_tagger(tmp_path_factory: pytest.TempPathFactory, words: Rows, tagger: Result) -> Result:
    return distill(words, tagger.output_dir, tmp_path_factory.mktemp("tagged") / "student")


def record(result: Result) -> dict[str, Any]:
    return json.loads((result.output_dir / "run.json").read_text())


def card(result: Result) -> dict[str, Any]:
    return yaml.safe_load((result.output_dir / "README.md").read_text().split("---\n")[1])


def test_tags_of_words_go_through_every_command(words: Rows, tagger: Result, small_tagger: Result) -> None:
    """The kind is told by the file, then by the teacher; F1 is that of whole entities."""
    assert tagger.metric == small_tagger.metric == "f1"
    assert tagger.figures[-1].metrics["f1"] > 0.9
    teacher, student = small_tagger.figures
    assert teacher.metrics == pytest.approx(tagger.figures[-1].metrics)
    assert student.metrics["f1"] > 0.8
    assert record(small_tagger)["stages"]["closed_form"]["metrics"]["f1"] > 0.3, (
        "it predicts before it is trained"
    )
    for result in (tagger, small_tagger):
        found = evaluate(EvaluateArguments(str(result.output_dir), words["eval"], batch_size=7))
        assert found == pytest.approx(result.figures[-1].metrics, abs=1e-6)
        assert json.loads((result.output_dir / "config.json").read_text())["label2id"] == {
            name: place for place, name in enumerate(NAMES)
        }
        assert card(result)["pipeline_tag"] == "token-classification"


def test_the_order_of_tags_in_teacher_and_data_changes_nothing(
    tmp_path: Path, words: Rows, tagger: Result
) -> None:
    """Tags matched by position and not by name are noise, and nobody is told."""
    model = AutoModelForTokenClassification.from_pretrained(tagger.output_dir)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[list(ORDER)].clone())
        model.classifier.bias.copy_(model.classifier.bias[list(ORDER)].clone())
    model.config.id2label = {place: NAMES[old] for place, old in enumerate(ORDER)}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    permuted = tmp_path / "permuted"
    model.save_pretrained(permuted)
    AutoTokenizer.from_pretrained(tagger.output_dir).save_pretrained(permuted)
    shuffled = (NAMES[3], NAMES[0], NAMES[4], NAMES[1], NAMES[2])
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=list(shuffled))),
        }
    )
    ids = {}
    for seed, (name, count) in enumerate(SIZES.items()):
        pairs = tagged(count, seed)
        columns = {
            "tokens": [some for some, _ in pairs],
            "ner_tags": [[shuffled.index(tag) for tag in tags] for _, tags in pairs],
        }
        ids[name] = str(tmp_path / f"{name}.parquet")
        datasets.Dataset.from_dict(columns, features).to_parquet(ids[name])
    for teacher in (tagger.output_dir, permuted):
        for rows in (words, ids):
            found = evaluate(EvaluateArguments(str(teacher), rows["eval"]))
            assert found == pytest.approx(tagger.figures[-1].metrics)
    # A copied head is permuted along with its teacher's; a random one would not be.
    options = {"init": "copy", "hidden_size": 32, "intermediate_size": 40, "intermediate_epochs": 0}
    plain = distill(words, tagger.output_dir, tmp_path / "a", **options)
    other = distill(ids, permuted, tmp_path / "b", **options)
    assert other.figures[1].metrics == pytest.approx(plain.figures[1].metrics)
    assert plain.figures[1].metrics["f1"] > 0.6
    assert json.loads((other.output_dir / "config.json").read_text())["id2label"]["0"] == "O"


def asked(count: int, seed: int, *, unanswerable: bool = True) -> dict[str, Any]:
    """SQuAD's form: of films, a telling word is the answer; where there is none, there is no answer."""
    draw, paragraphs = random.Random(seed), []
    for number in range(count):
        context = draw.choices(FILLERS, k=draw.randint(8, 24))
        answers = []
        if not unanswerable or draw.random() < 0.7:
            place = draw.randrange(len(context))
            context[place] = draw.choice(GOOD + BAD)
            start = len(" ".join(context[:place])) + (place > 0)
            answers = [{"text": context[place], "answer_start": start}]
        questions = [{"id": str(number), "question": "a story", "answers": answers}]
        paragraphs.append({"context": " ".join(context), "qas": questions})
    return {"version": "v2.0", "data": [{"title": "films", "paragraphs": paragraphs}]}


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder, paths = tmp_path_factory.mktemp("questions"), {}
    for seed, (name, count) in enumerate({"train": 160, "eval": 40}.items()):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asked(count, seed)))
        paths[name] = str(path)
    return paths


WINDOWS = {"max_length": 20, "stride": 4}


@pytest.fixture(scope="session")
def answerer(tmp_path_factory: pytest.TempPathFactory, questions: Rows, start_folder: Path) -> Result:
    return teach(questions, start_folder, tmp_path_factory.mktemp("answerer") / "teacher", 5, **WINDOWS)


@pytest.fixture(scope="session")
def small_answerer(tmp_path_factory: pytest.TempPathFactory, questions: Rows, answerer: Result) -> Result:
    return distill(questions, answerer.output_dir, tmp_path_factory.mktemp("answered") / "student", **WINDOWS)


def test_answers_go_through_every_command(questions: Rows, answerer: Result, small_answerer: Result) -> None:
    """Contexts take several windows, and some of the questions have no answer."""
    assert answerer.metric == small_answerer.metric == "f1"
    assert answerer.figures[-1].metrics["exact_match"] > 0.9
    teacher, student = small_answerer.figures
    assert teacher.metrics == pytest.approx(answerer.figures[-1].metrics)
    assert student.metrics["f1"] > 0.85
    stages = record(small_answerer)["stages"]
    assert stages["closed_form"]["metrics"]["f1"] > 0.4, "it predicts before it is trained"
    # What the Trainer scores, window by window, is what is scored at the end.
    assert max(log.get("eval_f1", 0) for log in stages["prediction"]["log"]) == pytest.approx(
        student.metrics["f1"]
    )
    for result in (answerer, small_answerer):
        found = evaluate(
            EvaluateArguments(str(result.output_dir), questions["eval"], batch_size=7, **WINDOWS)
        )
        assert found == pytest.approx(result.figures[-1].metrics, abs=1e-6)
        assert card(result)["pipeline_tag"] == "question-answering"


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
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification
from transformers import AutoTokenizer, pipeline
folders = sys.argv[1:]
missing, models = [], []
for folder, auto in zip(folders, (AutoModelForTokenClassification, AutoModelForQuestionAnswering)):
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    models.append(model)
    missing += [*report["missing_keys"], *report["unexpected_keys"]]
entities = pipeline("token-classification", folders[0], aggregation_strategy="first", device="cpu")(
    "the plot was awful and the cast with good films"
)
tokenizer = AutoTokenizer.from_pretrained(folders[1])
inputs = tokenizer("a story", "the plot was awful and the cast", return_tensors="pt")
with torch.no_grad():
    outputs = models[1](**inputs)
place = outputs.start_logits.argmax().item()
print(json.dumps({"missing": missing, "entities": [(e["entity_group"], e["word"]) for e in entities],
                  "answer": tokenizer.decode(inputs["input_ids"][0, place])}))
"""


def test_stock_transformers_opens_students_where_tinybert_is_not_installed(
    small_tagger: Result, small_answerer: Result
) -> None:
    """The student is deployed where nobody has heard of this library."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US, str(small_tagger.output_dir), str(small_answerer.output_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["missing"] == []
    assert [(kind, word.split()[0]) for kind, word in answer["entities"]] == [
        ("NEG", "awful"),
        ("POS", "good"),
    ]
    assert answer["answer"] == "awful"


def test_onnx_files_are_scored_as_the_folder_is(
    tmp_path: Path, words: Rows, questions: Rows, small_tagger: Result, small_answerer: Result
) -> None:
    """A gate that pairs tokens with other tokens' logits refuses every file, or none."""
    for result, rows, options in (
        (small_tagger, words, {}),
        (small_answerer, questions, WINDOWS),
    ):
        given = {"output_dir": str(tmp_path / "served"), "check": rows["eval"], "int8": True}
        exported = to_onnx(ExportArguments(str(result.output_dir), **given, max_drop=20, **options))
        assert exported.metric == "f1"
        assert exported.scores["fp32"] == pytest.approx(result.figures[-1].metrics["f1"], abs=1e-3)
        assert exported.scores["fp32"] > 0.8
        assert exported.scores["int8"] == pytest.approx(exported.scores["fp32"], abs=0.2)


def test_a_dry_run_says_what_would_be_done(
    tmp_path: Path, words: Rows, questions: Rows, tagger: Result, answerer: Result
) -> None:
    """Steps, lengths and labels of rows that are no texts, and nothing written."""
    config = DistillationConfig(str(tmp_path / "student"), **QUICK)
    tags = preflight_distill(DistillArguments(**words, teacher=str(tagger.output_dir), **SMALL), config)
    assert tags.teacher == ("f1", pytest.approx(tagger.figures[-1].metrics["f1"]), pytest.approx(0, abs=0.3))
    assert [row.name for row in tags.labels] == list(NAMES)
    assert sum(row.counts[1] for row in tags.labels) == sum(len(some) for some, _ in tagged(40, 1))
    assert "B-POS" in tags.text()
    answers = preflight_distill(
        DistillArguments(**questions, teacher=str(answerer.output_dir), **SMALL | WINDOWS), config
    )
    assert answers.teacher == (
        "f1",
        pytest.approx(answerer.figures[-1].metrics["f1"]),
        pytest.approx(0.3, abs=0.2),
    )
    assert "questions without an answer" in answers.text()
    assert answers.lengths["student"].cut == 0, "windows read all"
    for found in (tags, answers):
        assert all(stage.seconds for stage in found.stages)
    assert not (tmp_path / "student").exists()


def test_closed_form_gives_token_heads_back_where_nothing_is_lost(
    tmp_path: Path, words: Rows, tagger: Result
) -> None:
    """A student as large as its teacher is its teacher, head and all."""
    whole = {"layers": 3, "hidden_size": 32, "intermediate_size": 40}
    result = distill(words, tagger.output_dir, tmp_path / "s", **whole | {"intermediate_epochs": 0.1})
    assert record(result)["stages"]["closed_form"]["metrics"] == pytest.approx(
        result.figures[0].metrics, abs=0.02
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"augmented": "more.csv"}, "the task is token_classification: leave --augment and --augmented out"),
        ({"kind": "regression"}, "the teacher does token_classification, but --kind regression was given"),
        ({"max_length": 100}, "--max_length is 100: it must be from 3 to 64 here"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    option: dict[str, Any], message: str, tmp_path: Path, words: Rows, tagger: Result
) -> None:
    """Rows made of exchanged words have no tags; nothing would have said so."""
    with pytest.raises(InputError, match=message):
        distill(words, tagger.output_dir, tmp_path / "student", **option)
    assert not (tmp_path / "student").exists()


def test_a_teacher_that_tags_at_random_is_refused(
    tmp_path: Path,
    words: Rows,
    questions: Rows,
    tagger: Result,
    answerer: Result,
    save_model: Callable[[PreTrainedModel, Path], Path],
) -> None:
    """Hours of distilling from nothing: found out in seconds instead."""
    heads = (
        (AutoModelForTokenClassification, tagger, words),
        (AutoModelForQuestionAnswering, answerer, questions),
    )
    for auto, taught, rows in heads:
        model = auto.from_pretrained(taught.output_dir)
        with torch.no_grad():
            head = model.classifier if taught is tagger else model.qa_outputs
            head.weight.zero_()
            head.bias.copy_(-torch.arange(len(head.bias)))
        folder = save_model(model, tmp_path / auto.__name__)
        with pytest.raises(InputError, match=r"no better than chance on .*: f1 0\.\d+, chance 0\.\d+"):
            distill(rows, folder, tmp_path / "student")


def test_cut_words_are_not_scored(words: Rows, tagger: Result, caplog: pytest.LogCaptureFixture) -> None:
    """Left out of the score, they must not be left out of the report."""
    found = evaluate(EvaluateArguments(str(tagger.output_dir), words["eval"], max_length=5))
    assert "are neither trained on nor scored" in caplog.text
    assert np.isfinite(found["f1"])
