"""Rows that teacher and student answer differently, and how sure the difference of their scores is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from scipy.special import expit, softmax

from tinybert.answers import best_answers, exact_match, normalised, score_answers, word_f1
from tinybert.data import TaskData
from tinybert.entities import entity_counts
from tinybert.tasks import compute_metrics
from tinybert.token_rows import UNREAD, read_tags

MOST_ROWS = 50  # that differ, on a page
MOST_LETTERS = 600  # of a text, on a page
MOST_TAGS = 12  # that differ, of a row on a page
_DRAWN_ROWS = 200_000  # in all draws of the bootstrap: 20 to 100 draws


@dataclass(frozen=True)
class _Model:
    """What a model says of each row: its answers in words, how sure it is of each, which are right."""

    says: list[str]
    sure: list[str]
    is_right: list[bool]


@dataclass(frozen=True)
class _Both:
    """What teacher and student say, the gold answers, and how far the two are apart (rows,)."""

    models: list[_Model]
    gold: list[str]
    distances: np.ndarray


def _class(data: TaskData, place: int) -> str:
    return data.label_names[place] if place < len(data.label_names) else str(place)


def _labels(data: TaskData, holds: np.ndarray) -> str:
    return ", ".join(_class(data, place) for place, flag in enumerate(holds) if flag) or "none"


def _classes(data: TaskData, teacher: np.ndarray, student: np.ndarray) -> _Both:
    """Compare classes: the most probable one and its probability."""
    gold = [_class(data, label) for label in data.rows["label"]]
    models, shares = [], [softmax(logits, axis=1) for logits in (teacher, student)]
    for found in shares:
        says = [_class(data, place) for place in found.argmax(1)]
        models.append(_Model(says, _percent(found.max(1)), _same(says, gold)))
    distances = np.abs(shares[0] - shares[1]).sum(1) / 2
    return _Both(models, gold, distances * (teacher.argmax(1) != student.argmax(1)))


def _label_sets(data: TaskData, teacher: np.ndarray, student: np.ndarray) -> _Both:
    """Compare sets of labels: those that hold, and the probability of the least certain of all."""
    gold = [_labels(data, np.asarray(row) > 0.5) for row in data.rows["label"]]
    models, shares = [], [expit(logits) for logits in (teacher, student)]
    for found in shares:
        says = [_labels(data, row > 0.5) for row in found]
        models.append(_Model(says, _percent(np.maximum(found, 1 - found).min(1)), _same(says, gold)))
    distances = np.abs(shares[0] - shares[1]).max(1)
    return _Both(models, gold, distances * ((teacher > 0) != (student > 0)).any(1))


def _scores(data: TaskData, teacher: np.ndarray, student: np.ndarray) -> _Both:
    """Compare scores, none of which is ever quite right."""
    models = [
        _Model([f"{value:.2f}" for value in logits.reshape(-1)], [""] * len(logits), [True] * len(logits))
        for logits in (teacher, student)
    ]
    distances = np.abs(teacher - student).reshape(len(teacher), -1).sum(1)
    return _Both(models, [f"{label:.2f}" for label in data.rows["label"]], distances)


def _tags(data: TaskData, rows: datasets.Dataset, teacher: np.ndarray, student: np.ndarray) -> _Both:
    """Compare the tags of words: of each row the words that the two tag differently, and the least sure."""
    ends = np.cumsum(np.asarray(rows["length"]))[:-1]
    parts = [np.split(softmax(logits, axis=1), ends) for logits in (teacher, student)]
    models = [_Model([], [], []), _Model([], [], [])]
    gold, distances = [], np.zeros(len(rows))
    for place, labels in enumerate(map(np.asarray, rows["labels"])):
        read = labels != UNREAD
        probabilities = [part[place][read] for part in parts]
        tags = [each.argmax(1) for each in probabilities]
        differ = tags[0] != tags[1]
        distances[place] = np.abs(probabilities[0] - probabilities[1]).sum(1)[differ].sum() / 2
        row, count = data.rows[place], len(differ)
        # The last words may be cut. Of those within, a tokenizer may leave nothing: then nobody knows which.
        is_whole = row["label"][:count] == labels[read].tolist()
        words = row["words"][:count] if is_whole else ["?"] * count
        shown = np.flatnonzero(differ)
        gold.append(_tagged(data, words, labels[read], shown))
        for model, found, own in zip(models, probabilities, tags, strict=True):
            model.says.append(_tagged(data, words, own, shown))
            model.sure.extend(_percent(found.max(1)[differ].min(keepdims=True)) if differ.any() else [""])
            model.is_right.append(bool((own == labels[read])[differ].all()))
    return _Both(models, gold, distances)


def _tagged(data: TaskData, words: Sequence[str], tags: np.ndarray, shown: np.ndarray) -> str:
    said = [f"{words[place]} {_class(data, tags[place])}" for place in shown[:MOST_TAGS]]
    return ", ".join([*said, "…"] if len(shown) > MOST_TAGS else said)


def _spans(data: TaskData, rows: datasets.Dataset, teacher: np.ndarray, student: np.ndarray) -> _Both:
    """Compare answers that are parts of a context, as far apart as their words are."""
    golds = [list(dict.fromkeys(some)) for some in data.rows["answers"]]
    says = [best_answers(data.rows, rows, logits) for logits in (teacher, student)]
    models = [
        _Model(
            [answer or "no answer" for answer in each],
            [""] * len(each),
            [
                max(exact_match(answer, gold) for gold in some or [""]) > 0
                for answer, some in zip(each, golds, strict=True)
            ],
        )
        for each in says
    ]
    # The same words in another order are another answer, if only just.
    distances = [
        float(normalised(mine) != normalised(its)) * (1.01 - word_f1(mine, its))
        for its, mine in zip(*says, strict=True)
    ]
    return _Both(models, [" / ".join(some) or "no answer" for some in golds], np.array(distances))


def _same(says: Sequence[str], gold: Sequence[str]) -> list[bool]:
    return [mine == right for mine, right in zip(says, gold, strict=True)]


def _percent(shares: np.ndarray) -> list[str]:
    return [f"{share:.0%}" for share in shares]


def _compare(data: TaskData, rows: datasets.Dataset, teacher: np.ndarray, student: np.ndarray) -> _Both:
    if data.kind == "token_classification":
        return _tags(data, rows, teacher, student)
    if data.kind == "question_answering":
        return _spans(data, rows, teacher, student)
    of_rows = {"classification": _classes, "multi_label": _label_sets, "regression": _scores}
    return of_rows[data.kind](data, teacher, student)


def shown_texts(data: TaskData) -> datasets.Dataset:
    """Return rows as texts to show: columns ``text`` and, of pairs and of questions, ``text_pair``."""
    if data.kind == "token_classification":
        return datasets.Dataset.from_dict({"text": [" ".join(words) for words in data.rows["words"]]})
    if data.kind == "question_answering":
        columns = {"text": "question", "text_pair": "context"}
        return datasets.Dataset.from_dict({name: data.rows[held] for name, held in columns.items()})
    return data.rows


def _shortened(text: str | None, around: Sequence[str] = ()) -> str | None:
    """Return what a page has room for of a text: its beginning, or where the first of some parts is."""
    if text is None or len(text) <= MOST_LETTERS:
        return text
    middle = next((text.index(part) for part in around if part and part in text), 0)
    start = min(max(0, middle - MOST_LETTERS // 2), len(text) - MOST_LETTERS)
    end = start + MOST_LETTERS
    return "…" * (start > 0) + text[start:end] + "…" * (end < len(text))


def _in_context(data: TaskData, both: _Both, place: int) -> list[str]:
    """Return what a question's context is shown for: gold answers, then the models'."""
    if data.kind != "question_answering":
        return []
    return [*data.rows[place]["answers"], *(model.says[place] for model in both.models)]


def disagreements(
    data: TaskData, rows: datasets.Dataset, teacher: np.ndarray, student: np.ndarray
) -> dict[str, Any]:
    """Return the rows that two models answer differently, those furthest apart first.

    Args:
        data: Labelled rows.
        rows: The same, tokenised.
        teacher: Its logits, of ``predict_logits`` for ``rows``.
        student: Likewise.

    Returns:
        ``sentences`` and ``rows`` as `tinybert.report.render` takes them, and ``places`` of all rows that
        differ, in that order. Of a row with tags, the words that the two tag differently are its answers.
    """
    both = _compare(data, rows, teacher, student)
    places = [int(place) for place in np.argsort(-both.distances, kind="stable") if both.distances[place] > 0]
    texts = shown_texts(data)
    models = dict(zip(("teacher", "student"), both.models, strict=True))
    shown = []
    for place in places[:MOST_ROWS]:
        text = texts[place]
        shown.append(
            {
                "number": place + 1,
                "text": _shortened(text["text"]),
                "pair": _shortened(text.get("text_pair"), _in_context(data, both, place)),
                "gold": both.gold[place],
            }
            | {
                name: {
                    "answer": model.says[place],
                    "confidence": model.sure[place],
                    "is_right": model.is_right[place],
                }
                for name, model in models.items()
            }
        )
    total = len(both.distances)
    if data.kind == "regression":
        sentences = [f"Their scores on {total:,} rows differ by {both.distances.mean():.3f} on average."]
    else:
        sentences = [f"They give the same answer to {total - len(places):,} of {total:,} rows."]
        right = [sum(model.is_right[place] for place in places) for model in models.values()]
        if places:
            sentences.append(
                f"Of the {len(places):,} others the teacher has {right[0]:,} right, the student {right[1]:,}."
            )
    if data.kind == "token_classification" and places:
        sentences.append("Of each, the words are shown that the two tag differently.")
    if len(places) > len(shown):
        sentences.append(f"Here are the {len(shown)} with the greatest difference.")
    return {"reason": None, "sentences": sentences, "rows": shown, "places": places}


def error_of_difference(
    data: TaskData, rows: datasets.Dataset, metric: str, teacher: np.ndarray, student: np.ndarray
) -> float:
    """Return the standard error of the student's less the teacher's score, both on the same rows.

    For an accuracy and for answers that of a mean of paired differences; for other metrics the standard
    deviation over random draws of the rows (of tags, the sentences) with replacement (the bootstrap), the
    same draws for both models. Arguments: `disagreements`, and the metric.
    """
    total = len(data.rows)
    if data.kind == "question_answering":
        shares = [_of_questions(data, rows, metric, logits) for logits in (teacher, student)]
        return float((shares[1] - shares[0]).std() / np.sqrt(total))
    generator = np.random.default_rng(0)
    draws = min(100, max(20, _DRAWN_ROWS // total))
    if data.kind == "token_classification":
        times = generator.multinomial(total, np.full(total, 1 / total), size=draws)
        sums = [times @ _of_sentences(data, rows, metric, logits) for logits in (teacher, student)]
        scores = [2 * found / np.maximum(known, 1) for found, known in (each.T for each in sums)]
        return float(np.std(scores[1] - scores[0]))
    labels = np.asarray(data.rows["label"])
    if data.kind == "classification" and metric == "accuracy":
        difference = (student.argmax(1) == labels).astype(float) - (teacher.argmax(1) == labels)
        return float(difference.std() / np.sqrt(total))
    found = []
    for _ in range(draws):
        drawn = generator.integers(total, size=total)
        scores = [
            compute_metrics(
                data.kind, logits[drawn], labels[drawn], label_count=len(data.label_names) or None
            )
            for logits in (teacher, student)
        ]
        found.append(scores[1][metric] - scores[0][metric])
    return float(np.std(found))


def _of_questions(data: TaskData, rows: datasets.Dataset, metric: str, logits: np.ndarray) -> np.ndarray:
    """Return the score of each question."""
    answers = best_answers(data.rows, rows, logits)
    pairs = zip(answers, data.rows["answers"], strict=True)
    return np.array([score_answers([answer], [golds])[metric] for answer, golds in pairs])


def _of_sentences(data: TaskData, rows: datasets.Dataset, metric: str, logits: np.ndarray) -> np.ndarray:
    """Return two numbers of each sentence (sentences, 2): twice one's sum over the other's is the score."""
    own, gold, lengths = read_tags(rows, logits)
    if metric == "accuracy":
        ends = np.cumsum(lengths)[:-1]
        right = [part.sum() for part in np.split(own == gold, ends)]
        return np.stack([right, 2 * np.array(lengths)], axis=1)
    found, predicted, known = entity_counts(own, gold, lengths, data.label_names).T
    return np.stack([found, predicted + known], axis=1)
