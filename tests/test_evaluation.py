"""Predicting and scoring: in the order of the rows, without a trace in the model."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizerFast, PreTrainedModel

from conftest import run_processes
from tinybert.data import TaskData, load_data, tokenize
from tinybert.evaluation import chance_level, metrics_for_trainer, predict_logits, score

ROWS = ["good", "the film was very bad and the plot dull", "a fine cast", "awful", "the story was great"]


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{place % 2}\n" for place, text in enumerate(ROWS)))
    return load_data(path)


@pytest.fixture
def model(tiny_encoder: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    encoder = tiny_encoder("bert", num_labels=2)
    classifier = BertForSequenceClassification(encoder.config)
    classifier.bert.load_state_dict(encoder.state_dict())
    return classifier.train()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_logits_come_in_the_order_of_the_rows_whatever_the_batches(
    model: PreTrainedModel, data: TaskData, tokenizer: BertTokenizerFast, batch_size: int
) -> None:
    """Rows are sorted by length on the way: answers given back in that order would be scored at random."""
    rows = tokenize(data, tokenizer, 16)
    found = predict_logits(model, rows, tokenizer, batch_size=batch_size)
    assert (found.shape, found.dtype) == ((len(ROWS), 2), np.float32)
    assert model.training
    with torch.no_grad():
        expected = np.stack(
            [model.eval()(**tokenizer(t, return_tensors="pt")).logits[0].numpy() for t in ROWS]
        )
    assert len(np.unique(expected[:, 0])) == len(ROWS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_predictions_are_close_and_are_float32(
    model: PreTrainedModel, data: TaskData, tokenizer: BertTokenizerFast
) -> None:
    """A teacher's logits are cached in this form: NumPy has no bfloat16."""
    rows = tokenize(data, tokenizer, 16)
    full, half = (predict_logits(model, rows, tokenizer, bf16=bf16) for bf16 in (False, True))
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())


def test_scores_are_those_of_the_rows_labels(data: TaskData, tokenizer: BertTokenizerFast) -> None:
    """Labels here are 0, 1, 0, 1, 0."""
    logits = np.eye(2)[[0, 1, 0, 1, 1]]
    rows = tokenize(data, tokenizer, 16)
    assert score(data, rows, logits)["accuracy"] == pytest.approx(0.8)
    prediction = type("Prediction", (), {"predictions": logits, "label_ids": np.array([0, 1, 0, 1, 0])})
    assert metrics_for_trainer(data, rows)(prediction) == score(data, rows, logits)


def test_the_chance_level_is_the_share_of_the_most_frequent_class(data: TaskData) -> None:
    """Three of five rows are of class 0: a teacher at 60 % knows nothing."""
    assert chance_level(data) == ("accuracy", pytest.approx(0.6))
    assert chance_level(replace(data, kind="regression")) == ("pearson", 0.0)


def test_the_chance_level_of_several_labels_is_the_best_constant_answer(data: TaskData) -> None:
    """Tried against every set of labels; all of them, where each is in half of the rows or more."""
    flags = np.random.default_rng(0).random((60, 4)) < np.array([0.7, 0.5, 0.2, 0.05])
    rows = datasets.Dataset.from_dict({"label": flags.astype(np.float32)})
    several = replace(data, kind="multi_label", rows=rows)
    best = max(
        score(several, rows, np.tile(np.where(answer, 1.0, -1.0), (60, 1)))["f1_micro"]
        for answer in itertools.product([False, True], repeat=4)
    )
    assert chance_level(several) == ("f1_micro", pytest.approx(best))


_SHARED_OUT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
import datasets
import numpy as np
from accelerate import PartialState
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
from tinybert import evaluation

folder, state = Path(sys.argv[2]), PartialState(cpu=True)
tokenizer = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(conftest.PIECES)})
model = conftest.randomise(BertForSequenceClassification(BertConfig(**conftest._SHARED, hidden_size=32,
    num_hidden_layers=1, intermediate_size=40)))
encoded = dict(tokenizer([" ".join(conftest.FILLERS[:count]) for count in (3, 1, 7, 2, 9)]))
encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
rows, answered = datasets.Dataset.from_dict(encoded), []
alone = evaluation.predict_logits(model, rows, tokenizer)
predict = evaluation.predict_logits

def watched(model, rows, *others, **options):
    answered.append(len(rows))
    return predict(model, rows, *others, **options)

evaluation.predict_logits = watched
for _ in range(2):  # the second time from the file
    found = evaluation.cached_logits(model, rows, tokenizer, folder / "kept")
    assert np.abs(found - alone).max() < 1e-5
assert answered == [[2, 3][state.process_index]], answered
"""


@pytest.mark.slow
def test_processes_share_the_teachers_work(tmp_path: Path) -> None:
    """On eight GPUs the teacher would else answer every row eight times."""
    script = tmp_path / "share.py"
    script.write_text(_SHARED_OUT)
    run_processes(2, script, tmp_path)
