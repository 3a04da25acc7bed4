"""Where teacher and student look: the attention of both in a few rows."""

import base64
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.capture import capture, evaluating
from tinybert.data import encode_texts
from tinybert.errors import InputError

MOST_PIECES = 20  # of a sentence, in a map
MOST_SENTENCES = 8
_MAP_LETTERS = 800_000  # of all maps: no more sentences after so many


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
