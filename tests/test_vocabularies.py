"""A student with other word pieces than its teacher's: what it can be taught, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, pipeline, set_seed

from conftest import BAD, FILLERS, GOOD, QUICK, write_csv
from tinybert.cli import main
from tinybert.data import load_data
from tinybert.errors import InputError
from tinybert.evaluation import predict_logits
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, EvaluateArguments, distill_task, evaluate
from tinybert.student import StudentArguments, tokenizer_of_student
from tinybert.trainer import DistillationConfig

# The same words in other places, some of them in two pieces, and more pieces than the teacher has.
OTHER_PIECES = (
    *sorted({*GOOD, *BAD, *FILLERS} - {"superb", "awful"}, reverse=True),
    "[MASK]",
    "su",
    "##perb",
    "aw",
    "##ful",
    *(f"[unused{place}]" for place in range(9)),
    "[SEP]",
    "[CLS]",
    "[UNK]",
    "[PAD]",
)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained student folder with ``OTHER_PIECES``."""
    folder = tmp_path_factory.mktemp("stranger")
    set_seed(1)
    shape = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config = BertConfig(
        vocab_size=len(OTHER_PIECES),
        pad_token_id=OTHER_PIECES.index("[PAD]"),
        max_position_embeddings=32,
        initializer_range=0.1,
        **shape,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={piece: place for place, piece in enumerate(OTHER_PIECES)}).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="session")
def told(
    tmp_path_factory: pytest.TempPathFactory, toy: dict[str, str], taught: Result, stranger: Path
) -> Result:
    """The stranger after the prediction stage; the gold labels of its training rows are all the same."""
    folder = tmp_path_factory.mktemp("told")
    texts = load_data(toy["train"]).rows["text"]
    train = write_csv(folder / "train.csv", [(text, "positive") for text in texts])
    return distill_task(arguments(toy, taught, stranger, train=str(train)), config(folder / "student"))


def arguments(toy: dict[str, str], taught: Result, student: Path, **options: Any) -> DistillArguments:
    settings = {
        "teacher": str(taught.output_dir),
        "student": str(student),
        "max_length": 16,
        "intermediate_epochs": 0,
        "prediction_epochs": 15,
        "prediction_learning_rate": 5e-3,
    }
    return DistillArguments(**toy | settings | options)


def config(folder: Path, **settings: Any) -> DistillationConfig:
    return DistillationConfig(str(folder), **QUICK | settings)


def test_a_student_with_other_word_pieces_learns_from_its_teachers_logits(
    told: Result, toy: dict[str, str]
) -> None:
    """With the teacher's ids it would have read other words, or run out of embeddings."""
    teacher, student = told.figures
    assert teacher.metrics["accuracy"] >= 0.9
    assert student.metrics["accuracy"] >= 0.8
    found = evaluate(EvaluateArguments(str(told.output_dir), toy["eval"], max_length=16))
    assert found == pytest.approx(student.metrics)


def test_the_student_opens_with_its_own_tokenizer_and_answers_by_name(
    told: Result, toy: dict[str, str]
) -> None:
    """Saved beside the teacher's tokenizer it would answer at random wherever it is deployed."""
    folder = told.output_dir
    own = AutoTokenizer.from_pretrained(folder)
    assert own.get_vocab() == {piece: place for place, piece in enumerate(OTHER_PIECES)}
    assert own.tokenize("superb") == ["su", "##perb"]
    rows = load_data(toy["eval"])
    texts, labels = list(rows.rows["text"]), [rows.label_names[place] for place in rows.rows["label"]]
    answers = [answer["label"] for answer in pipeline("text-classification", str(folder))(texts)]
    right = np.mean([answer == label for answer, label in zip(answers, labels, strict=True)])
    assert right == pytest.approx(told.figures[-1].metrics["accuracy"])
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}


def test_the_teacher_reads_its_own_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy: dict[str, str], taught: Result, stranger: Path
) -> None:
    """Its logits on the student's ids are of other texts: every label a student learns would be noise."""
    cached: dict[str, Any] = {}

    def spied(model: Any, rows: Any, tokenizer: Any, folder: Path, **options: Any) -> np.ndarray:
        cached.update(ids=rows["input_ids"], logits=predict_logits(model, rows, tokenizer))
        return cached["logits"]

    monkeypatch.setattr("tinybert.distillation.cached_logits", spied)
    distill_task(arguments(toy, taught, stranger), config(tmp_path / "student", max_steps=1))
    teacher = AutoTokenizer.from_pretrained(taught.output_dir)
    texts = list(load_data(toy["train"]).rows["text"])
    assert cached["ids"][:] == teacher(texts)["input_ids"]
    classes = [("negative", "positive")[place] for place in cached["logits"].argmax(1)]
    expected = pipeline("text-classification", str(taught.output_dir))(texts)
    assert classes == [answer["label"] for answer in expected]


def test_states_of_other_tokens_are_refused_with_the_way_out(
    tmp_path: Path, toy: dict[str, str], taught: Result, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token 5 of one model is no token of the other: the losses would compare what is not comparable."""
    options = replace(arguments(toy, taught, stranger), intermediate_epochs=1.0)
    message = r"different vocabularies \(34 and 25 pieces; .* token by token: .* --intermediate_epochs 0"
    with pytest.raises(InputError, match=message):
        distill_task(options, config(tmp_path / "student"))
    words = [f"--{name}={value}" for name, value in toy.items()]
    words += ["--teacher", str(taught.output_dir), "--student", str(stranger)]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "student")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--intermediate_epochs 0" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "student").exists()


def test_general_distillation_refuses_other_word_pieces(
    tmp_path: Path, start_folder: Path, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no predictions to fall back on."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the film was good\n" * 50)
    words = ["--teacher", str(start_folder), "--student", str(stranger), "--corpus", str(corpus)]
    assert main(["general", *words, "--block_size", "16", "--output_dir", str(tmp_path / "out")]) == 2
    assert "different vocabularies" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_teachers_tokenizer_serves_both_where_the_pieces_are_the_same(
    taught: Result, start_folder: Path, stranger: Path
) -> None:
    """One tokenisation, one cache; and another tokenizer only where there is another vocabulary."""
    teacher = AutoTokenizer.from_pretrained(taught.output_dir)

    def chosen(student: Path | None, **options: Any) -> Callable[..., Any]:
        name = None if student is None else str(student)
        return tokenizer_of_student(StudentArguments(student=name), teacher, **options)

    assert chosen(None, compares_tokens=True) is teacher
    assert chosen(start_folder, compares_tokens=True) is teacher
    assert chosen(stranger, compares_tokens=False).get_vocab() != teacher.get_vocab()
