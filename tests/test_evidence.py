"""What two models answer and where they look, against plain ways to find it out."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertTokenizerFast, PreTrainedModel

from tinybert.attention_maps import MOST_PIECES, attention_maps
from tinybert.data import TaskData
from tinybert.disagreements import MOST_ROWS, disagreements, error_of_difference, shown_texts
from tinybert.entities import tag_metrics
from tinybert.errors import InputError
from tinybert.questions import cut_windows
from tinybert.token_rows import tokenize_words


def rows_of(labels: Any, kind: Any = "classification", metric: str = "accuracy", **columns: Any) -> TaskData:
    texts = columns.pop("texts", None) or [f"film {place}" for place in range(len(labels))]
    names = () if kind == "regression" else ("bad", "good", "dull")
    return TaskData(
        Dataset.from_dict({"text": texts, "label": labels, **columns}), kind, names, metric, "f", "0"
    )


def test_rows_with_other_answers_are_found_the_furthest_apart_first() -> None:
    """The reader sees the worst first, and none where both say the same."""
    data = rows_of([0, 1, 1, 0])
    teacher = np.array([[4.0, 0, 0], [0, 4, 0], [0, 1, 0], [3, 0, 0]], np.float32)
    student = np.array([[3.0, 0, 0], [9, 0, 0], [1, 0.5, 0], [0, 0, 1]], np.float32)
    found = disagreements(data, data.rows, teacher, student)
    assert found["places"] == [1, 3, 2]
    first = found["rows"][0]
    assert (first["number"], first["text"], first["pair"], first["gold"]) == (2, "film 1", None, "good")
    assert first["teacher"] == {"answer": "good", "confidence": "96%", "is_right": True}
    assert first["student"] == {"answer": "bad", "confidence": "100%", "is_right": False}
    assert found["sentences"] == [
        "They give the same answer to 1 of 4 rows.",
        "Of the 3 others the teacher has 3 right, the student 0.",
    ]


def test_scores_are_listed_by_their_distance() -> None:
    """A regression never gives quite the same answer twice."""
    data = rows_of([1.0, 2.0], "regression", "pearson", text_pair=["a", None])
    found = disagreements(data, data.rows, np.array([[1.0], [2.0]]), np.array([[1.25], [4.0]]))
    assert [row["student"]["answer"] for row in found["rows"]] == ["4.00", "1.25"]
    assert [row["pair"] for row in found["rows"]] == [None, "a"]
    assert found["sentences"] == ["Their scores on 2 rows differ by 1.125 on average."]


def test_sets_of_labels_differ_if_one_does() -> None:
    """Multi-label answers are compared whole, and named."""
    data = rows_of([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], "multi_label", "f1_micro")
    teacher = np.array([[-9.0, 9, 9], [-9, -9, -9]])
    found = disagreements(data, data.rows, teacher, np.array([[-9.0, 9, -1], [-9, -9, -9]]))
    (row,) = found["rows"]
    assert (row["gold"], row["teacher"]["answer"], row["student"]["answer"]) == (
        "good, dull",
        "good, dull",
        "good",
    )
    assert row["student"]["confidence"] == "73%", "sigmoid(1), of the least certain label"


def test_of_tags_the_words_are_shown_that_differ(tokenizer: BertTokenizerFast) -> None:
    """A sentence of forty words differs in one; the words cut off were tagged by nobody."""
    sentences = [["the", "good", "film"], ["a", "bad", "plot", "was"], ["fine"]]
    columns = {"words": sentences, "label": [[0, 1, 0], [0, 2, 0, 2], [1]]}
    data = TaskData(Dataset.from_dict(columns), "token_classification", ("O", "B-X", "B-Y"), "f1", "f", "0")
    rows = tokenize_words(data.rows, tokenizer, 5)
    assert [row.count(-100) for row in rows["labels"]] == [2, 2, 2]
    says = {"teacher": [[0, 1, 0], [0, 2, 1], [1]], "student": [[0, 1, 0], [1, 2, 0], [1]]}
    logits = {}
    for name, tags in says.items():
        of_rows = [4 * np.eye(3)[[0, *row, 0]] for row in tags]
        logits[name] = np.concatenate(of_rows)
    found = disagreements(data, rows, logits["teacher"], logits["student"])
    (row,) = found["rows"]
    assert (row["number"], row["text"], row["gold"]) == (2, "a bad plot was", "a O, plot O")
    assert row["teacher"] == {"answer": "a O, plot B-X", "confidence": "96%", "is_right": False}
    assert row["student"]["answer"] == "a B-X, plot O"
    assert found["sentences"][:2] == [
        "They give the same answer to 2 of 3 rows.",
        "Of the 1 others the teacher has 0 right, the student 0.",
    ]


def test_answers_differ_by_their_words(tokenizer: BertTokenizerFast) -> None:
    """Articles and capitals are no difference, and the one that says nothing is as far off as can be."""
    context = "the good film was a fine plot"
    columns = {
        "question": ["what", "which", "how"],
        "context": [context] * 3,
        "answers": [["good film"], ["plot", "fine plot"], []],
        "starts": [[4], [25, 20], []],
        "id": ["1", "2", "3"],
    }
    data = TaskData(Dataset.from_dict(columns), "question_answering", (), "f1", "f", "0")
    rows = cut_windows(data.rows, tokenizer, 32, 8)
    tokens = ["[CLS]", "what", "[SEP]", *context.split(), "[SEP]"]
    logits = {name: np.zeros((sum(rows["length"]), 2), np.float32) for name in ("teacher", "student")}
    spans = {"teacher": [(4, 5), (8, 9), None], "student": [(3, 5), (9, 9), (4, 4)]}
    for name, of_rows in spans.items():
        for place, span in enumerate(of_rows):
            first, last = span or (0, 0)
            logits[name][place * len(tokens) + first, 0] = 9
            logits[name][place * len(tokens) + last, 1] = 9
    found = disagreements(data, rows, logits["teacher"], logits["student"])
    assert [(row["teacher"]["answer"], row["student"]["answer"]) for row in found["rows"]] == [
        ("no answer", "good"),
        ("fine plot", "plot"),
    ]
    assert [row["gold"] for row in found["rows"]] == ["no answer", "plot / fine plot"]
    assert [row["student"]["is_right"] for row in found["rows"]] == [False, True]
    assert found["rows"][0]["text"] == "how"
    assert found["rows"][0]["pair"] == context
    assert shown_texts(data)["text_pair"][0] == context
    error = np.std([0, 0, -1]) / np.sqrt(3)  # the student is right but for the last
    assert error_of_difference(data, rows, "f1", logits["teacher"], logits["student"]) == pytest.approx(error)


@pytest.mark.parametrize(("before", "after"), [(0, 300), (120, 180), (300, 0), (5, 5)])
def test_of_a_long_context_the_part_with_the_answer_is_shown(
    tokenizer: BertTokenizerFast, before: int, after: int
) -> None:
    """Wherever in the context the gold answer is."""
    context = "a plot " * before + "good film" + " a plot" * after
    columns = {
        "question": ["what"],
        "context": [context],
        "answers": [["good film"]],
        "starts": [[7 * before]],
    }
    data = TaskData(Dataset.from_dict(columns | {"id": ["1"]}), "question_answering", (), "f1", "f", "0")
    rows = cut_windows(data.rows, tokenizer, 1024, 8)
    says = np.zeros((sum(rows["length"]), 2), np.float32)
    says[[4, 4], [0, 1]] = 9  # the second word
    (row,) = disagreements(data, rows, np.zeros_like(says), says)["rows"]
    shown = row["pair"].strip("…")
    assert "good film" in shown
    assert shown in context
    assert len(shown) == min(600, len(context))
    assert row["pair"].startswith("…") == (not context.startswith(shown))
    assert row["pair"].endswith("…") == (not context.endswith(shown))


def test_many_rows_and_long_texts_are_cut_and_it_is_said() -> None:
    """The page stays small on any data."""
    count = MOST_ROWS + 20
    data = rows_of([0] * count, texts=["word " * 2000] * count)
    found = disagreements(data, data.rows, np.eye(3)[[0] * count], np.eye(3)[[1] * count])
    assert len(found["rows"]) == MOST_ROWS
    assert max(len(row["text"]) for row in found["rows"]) <= 601  # and three dots in one
    assert found["sentences"][-1] == f"Here are the {MOST_ROWS} with the greatest difference."


def test_the_error_of_an_accuracy_is_that_of_the_paired_differences() -> None:
    """Two models that fail on the same rows are compared far more sharply than two shares."""
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=1500)
    teacher = np.eye(3)[np.where(generator.random(1500) < 0.9, labels, 0)]
    student = np.where(
        generator.random((1500, 1)) < 0.95, teacher, np.eye(3)[generator.integers(3, size=1500)]
    )
    data = rows_of(labels)
    paired = error_of_difference(data, data.rows, "accuracy", teacher, student)
    drawn = error_of_difference(data, data.rows, "accuracy_f1", teacher, student)
    right = (teacher.argmax(1) == labels, student.argmax(1) == labels)
    means = []
    for _ in range(300):
        places = generator.integers(1500, size=1500)
        means.append(right[1][places].mean() - right[0][places].mean())
    assert paired == pytest.approx(float(np.std(means)), rel=0.2)
    assert drawn == pytest.approx(paired, rel=0.5)
    assert error_of_difference(data, data.rows, "accuracy", teacher, teacher) == 0


def test_the_error_of_tags_is_that_of_drawn_sentences(tokenizer: BertTokenizerFast) -> None:
    """Against the metric itself, computed anew for each draw."""
    generator = np.random.default_rng(0)
    names = ("O", "B-X", "I-X", "B-Y")
    sentences = [["film"] * generator.integers(1, 9) for _ in range(120)]
    tags = [generator.integers(4, size=len(words)).tolist() for words in sentences]
    columns = {"words": sentences, "label": tags}
    data = TaskData(Dataset.from_dict(columns), "token_classification", names, "f1", "f", "0")
    rows = tokenize_words(data.rows, tokenizer, 16)
    says = []
    for share in (0.9, 0.7):
        says.append(
            [
                np.where(generator.random(len(row)) < share, row, generator.integers(4, size=len(row)))
                for row in tags
            ]
        )
    logits = [np.concatenate([np.eye(4)[[0, *row, 0]] for row in of_model]) for of_model in says]
    for metric in ("f1", "accuracy"):
        drawn = []
        for _ in range(150):
            places = generator.integers(120, size=120)
            gold, *own = (np.concatenate([each[place] for place in places]) for each in (tags, *says))
            lengths = [len(tags[place]) for place in places]
            scores = [tag_metrics(each, gold, lengths, names)[metric] for each in own]
            drawn.append(scores[1] - scores[0])
        found = error_of_difference(data, rows, metric, *logits)
        assert found == pytest.approx(float(np.std(drawn)), rel=0.25)
        assert error_of_difference(data, rows, metric, logits[0], logits[0]) == 0


@pytest.fixture
def pair(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher of three layers and a student of two, on eager attention where that is asked for."""
    found = []
    for depth in (3, 2):
        tiny_encoder("bert", num_hidden_layers=depth).save_pretrained(tmp_path / str(depth))
        found.append(
            BertForSequenceClassification.from_pretrained(tmp_path / str(depth), attn_implementation="eager")
        )
    return found[0].eval(), found[1].eval()


def unpacked(sentence: dict[str, Any], model: str, layers: int, heads: int) -> np.ndarray:
    size = len(sentence["pieces"])
    packed = np.frombuffer(base64.b64decode(sentence[model]), np.uint8)
    return packed.reshape(layers, heads, size, size) / 255


def test_maps_are_the_models_own_attention(
    pair: tuple[PreTrainedModel, PreTrainedModel], tokenizer: BertTokenizerFast
) -> None:
    """Against transformers' eager attention, which shows its probabilities."""
    teacher, student = pair
    data = rows_of([0, 1], texts=["the good film was very fine", "a bad plot"])
    found = attention_maps(teacher, student, tokenizer, data.rows, (1, 3), places=[1])
    assert [sentence["text"] for sentence in found["sentences"]] == [
        "a bad plot",
        "the good film was very fine",
    ]
    assert [(pair["teacher"]["layer"], pair["student"]["layer"]) for pair in found["layers"]] == [
        (1, 1),
        (3, 2),
    ]
    for sentence in found["sentences"]:
        encoded = tokenizer(sentence["text"], return_tensors="pt")
        for name, model, layers in (("teacher", teacher, (0, 2)), ("student", student, (0, 1))):
            with torch.no_grad():
                whole = model(**encoded, output_attentions=True).attentions
            expected = np.stack([whole[layer][0].numpy() for layer in layers])
            np.testing.assert_allclose(unpacked(sentence, name, 2, 4), expected, atol=0.003)


def test_long_rows_are_cut_and_pairs_are_joined(
    pair: tuple[PreTrainedModel, PreTrainedModel], tokenizer: BertTokenizerFast
) -> None:
    """A map of five hundred words is no map, and both halves of a pair are looked at."""
    data = rows_of([0], texts=["film " * 300], text_pair=["good " * 300])
    (sentence,) = attention_maps(*pair, tokenizer, data.rows, (1, 3))["sentences"]
    assert len(sentence["pieces"]) == MOST_PIECES
    assert {"film", "good"} < set(sentence["pieces"])
    assert pair[0].training is False
    with pytest.raises(InputError, match="there is no text to look at"):
        attention_maps(*pair, tokenizer, data.rows.select([]), (1, 3))


def test_different_numbers_of_heads_are_said(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    tiny_encoder: Callable[..., PreTrainedModel],
    tokenizer: BertTokenizerFast,
) -> None:
    """Head 3 of one is not head 3 of the other."""
    student = tiny_encoder("bert", num_hidden_layers=2, num_attention_heads=2)
    found = attention_maps(pair[0], student, tokenizer, rows_of([0]).rows, (1, 3))
    assert "only means over the heads" in found["notes"][-1]
    assert [layer["student"]["heads"] for layer in found["layers"]] == [2, 2]
