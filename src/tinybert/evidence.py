"""Where teacher and student agree and where not: rows they answer differently, and where each one looks."""

import base64
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import expit, softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.capture import capture, evaluating
from tinybert.data import TaskData, encode_texts
from tinybert.errors import InputError
from tinybert.tasks import compute_metrics

MOST_ROWS = 50  # that differ, on a page
MOST_LETTERS = 600  # of a text, on a page
MOST_PIECES = 20  # of a sentence, in a map
MOST_SENTENCES = 8
_MAP_LETTERS = 800_000  # of all maps: no more sentences after so many
_DRAWN_ROWS = 200_000  # in all draws of the bootstrap: 20 to 100 draws


def answers(data: TaskData, logits: np.ndarray) -> tuple[list[str], list[str]]:
    """Return a model's answers to rows in words, and how sure it is of each.

    Args:
        data: What the rows are.
        logits: (rows, C).

    Returns:
        For classes the most probable one and its probability; for multi_label the labels that hold, and the
        probability of the least certain of all; for a regression the score, and nothing.
    """
    if data.kind == "regression":
        return [f"{value:.2f}" for value in logits.reshape(-1)], [""] * len(logits)
    if data.kind == "multi_label":
        found = expit(logits)
        said = [_labels(data, row > 0.5) for row in found]
        sure = np.maximum(found, 1 - found).min(1)
    else:
        found = softmax(logits, axis=1)
        said = [_class(data, place) for place in found.argmax(1)]
        sure = found.max(1)
    return said, [f"{value:.0%}" for value in sure]


def _class(data: TaskData, place: int) -> str:
    return data.label_names[place] if place < len(data.label_names) else str(place)


def _labels(data: TaskData, holds: np.ndarray) -> str:
    return ", ".join(_class(data, place) for place, flag in enumerate(holds) if flag) or "none"


def _gold(data: TaskData) -> list[str]:
    labels = data.rows["label"]
    if data.kind == "regression":
        return [f"{label:.2f}" for label in labels]
    if data.kind == "multi_label":
        return [_labels(data, np.asarray(row) > 0.5) for row in labels]
    return [_class(data, label) for label in labels]


def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"


def _distances(data: TaskData, teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Return how far apart two models' answers to each row are: 0 where they say the same."""
    if data.kind == "regression":
        return np.abs(teacher - student).reshape(len(teacher), -1).sum(1)
    if data.kind == "multi_label":
        differ = ((teacher > 0) != (student > 0)).any(1)
        return np.abs(expit(teacher) - expit(student)).max(1) * differ
    differ = teacher.argmax(1) != student.argmax(1)
    return np.abs(softmax(teacher, 1) - softmax(student, 1)).sum(1) / 2 * differ


def disagreements(data: TaskData, teacher: np.ndarray, student: np.ndarray) -> dict[str, Any]:
    """Return the rows that two models answer differently, those furthest apart first.

    Args:
        data: Labelled rows.
        teacher: Its logits (rows, C).
        student: Likewise.

    Returns:
        ``sentences`` and ``rows`` as `tinybert.report.render` takes them, and ``places`` of all rows that
        differ, in that order.
    """
    distances = _distances(data, teacher, student)
    places = [int(place) for place in np.argsort(-distances, kind="stable") if distances[place] > 0]
    gold = _gold(data)
    (teacher_says, teacher_sure), (student_says, student_sure) = (
        answers(data, teacher),
        answers(data, student),
    )
    total, is_score = len(distances), data.kind == "regression"
    pairs = data.rows["text_pair"] if "text_pair" in data.rows.column_names else None
    rows = []
    for place in places[:MOST_ROWS]:
        row: dict[str, Any] = {
            "number": place + 1,
            "text": _shortened(data.rows[place]["text"]),
            "pair": None if pairs is None else _shortened(pairs[place]),
            "gold": gold[place],
        }
        for name, says, sure in (
            ("teacher", teacher_says, teacher_sure),
            ("student", student_says, student_sure),
        ):
            is_right = is_score or says[place] == gold[place]
            row[name] = {"answer": says[place], "confidence": sure[place], "is_right": is_right}
        rows.append(row)
    if is_score:
        sentences = [f"Their scores on {total:,} rows differ by {distances.mean():.3f} on average."]
    else:
        sentences = [f"They give the same answer to {total - len(places):,} of {total:,} rows."]
        right = [sum(says[place] == gold[place] for place in places) for says in (teacher_says, student_says)]
        if places:
            sentences.append(
                f"Of the {len(places):,} others the teacher has {right[0]:,} right, the student {right[1]:,}."
            )
    if len(places) > len(rows):
        sentences.append(f"Here are the {len(rows)} with the greatest difference.")
    return {"reason": None, "sentences": sentences, "rows": rows, "places": places}


def error_of_difference(data: TaskData, metric: str, teacher: np.ndarray, student: np.ndarray) -> float:
    """Return the standard error of the student's less the teacher's score, both on the same rows.

    For an accuracy that of a mean of paired differences; for other metrics the standard deviation over
    random draws of the rows with replacement (the bootstrap), the same draws for both models.
    """
    labels = np.asarray(data.rows["label"])
    total = len(labels)
    if data.kind == "classification" and metric == "accuracy":
        difference = (student.argmax(1) == labels).astype(float) - (teacher.argmax(1) == labels)
        return float(difference.std() / np.sqrt(total))
    generator = np.random.default_rng(0)
    found = []
    for _ in range(min(100, max(20, _DRAWN_ROWS // total))):
        drawn = generator.integers(total, size=total)
        scores = [
            compute_metrics(
                data.kind, logits[drawn], labels[drawn], label_count=len(data.label_names) or None
            )
            for logits in (teacher, student)
        ]
        found.append(scores[1][metric] - scores[0][metric])
    return float(np.std(found))


def _chosen(lengths: Sequence[int], places: Sequence[int]) -> list[int]:
    """Return rows to show: of those that differ and of the others in turn, first what fits into a map."""
    differ = set(places)
    wanted = [list(places), [place for place in range(len(lengths)) if place not in differ]]
    for group in wanted:
        group.sort(key=lambda place: (lengths[place] > MOST_PIECES, lengths[place] < 6))
    found: list[int] = []
    while len(found) < MOST_SENTENCES and any(wanted):
        found += [group.pop(0) for group in wanted if group]
    return found[:MOST_SENTENCES]


def attention_maps(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    layer_map: Sequence[int],
    places: Sequence[int] = (),
    *,
    is_compiled: bool = False,
) -> dict[str, Any]:
    """Return where both models look in a few of the rows: softmax of the captured scores, layer by layer.

    Args:
        teacher: A model whose scores can be captured.
        student: Likewise.
        tokenizer: Of both.
        rows: Columns ``text`` and maybe ``text_pair``; the first thousand are looked at.
        layer_map: The teacher's layer, from 1, of each student layer.
        places: Rows worth showing, the best first.
        is_compiled: Whether the models are, and are to run as they were before for these few rows.

    Returns:
        ``layers``: a dict for each student layer, of ``teacher`` and ``student``: ``layer``, ``heads``.
        ``sentences``: ``text``, ``pieces`` and, of ``teacher`` and ``student``, base64 of one byte (255 is
        all) for each (layer, head, query, key). ``notes``, and ``reason``: None.

    Raises:
        InputError: A model does not show its scores, or there are no rows.
    """
    if len(rows) == 0:
        raise InputError("there is no text to look at.")
    texts = rows.select(range(min(len(rows), 1000)))
    pairs = list(texts["text_pair"]) if "text_pair" in texts.column_names else None
    lengths = encode_texts(tokenizer, list(texts["text"]), pairs, 512)["length"]
    shown: list[dict[str, Any]] = []
    heads: dict[str, list[int]] = {}
    eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    with eager, evaluating(teacher), evaluating(student):
        for place in _chosen(lengths, [place for place in places if place < len(texts)]):
            sentence, encoded = _sentence(tokenizer, texts[place])
            for name, model, layers in (
                ("teacher", teacher, layer_map),
                ("student", student, range(1, len(layer_map) + 1)),
            ):
                maps = _maps(model, encoded, layers)
                heads[name] = [len(layer) for layer in maps]
                sentence[name] = base64.b64encode(b"".join(layer.tobytes() for layer in maps)).decode()
            shown.append(sentence)
            if sum(len(entry["teacher"]) + len(entry["student"]) for entry in shown) > _MAP_LETTERS:
                break
    layers_of_both = [
        {
            "teacher": {"layer": taught_by, "heads": heads["teacher"][place]},
            "student": {"layer": place + 1, "heads": heads["student"][place]},
        }
        for place, taught_by in enumerate(layer_map)
    ]
    notes = _notes(teacher, student, layers_of_both, bool(places))
    return {"reason": None, "layers": layers_of_both, "sentences": shown, "notes": notes}


def _sentence(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a page shows of a row, and the row as a model reads it."""
    texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
    encoded = encode_texts(tokenizer, texts[:1], texts[1:] or None, MOST_PIECES)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    return {"text": " / ".join(texts)[:160], "pieces": [str(piece)[:60] for piece in pieces]}, encoded


def _maps(model: PreTrainedModel, encoded: Mapping[str, Any], layers: Sequence[int]) -> list[np.ndarray]:
    """Return the attention (heads, T, T) of one row at each of the layers (from 1), as bytes."""
    inputs = {
        name: torch.tensor(encoded[name], device=model.device)
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in encoded
    }
    states = capture(model, inputs, states=False)
    maps = []
    for layer in layers:
        query, key = (found[layer - 1][0].float() for found in (states.queries, states.keys))
        weights = (query @ key.transpose(-1, -2) * states.scaling[layer - 1]).softmax(-1)
        maps.append((255 * weights).round().byte().cpu().numpy())
    return maps


def _notes(
    teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[Mapping[str, Any]], differ: bool
) -> list[str]:
    notes = [f"Texts are cut after {MOST_PIECES} word pieces."]
    if differ:
        notes = [f"Rows that they answer differently and others come in turn. {notes[0]}"]
    if any(pair["teacher"]["heads"] != pair["student"]["heads"] for pair in layers):
        notes.append("Their numbers of heads differ, so that only means over the heads can be compared.")
    if "mpnet" in (teacher.config.model_type, student.config.model_type):
        notes.append("MPNet's position bias is left out.")
    return notes
