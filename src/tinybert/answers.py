"""Answers that are parts of a context: logits over windows -> texts, and how near these are to the gold."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np

LONGEST_ANSWER = 30  # tokens, as in BERT's own evaluation of SQuAD
_AT_ONCE = 512  # windows

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation, articles and spare spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """Return 1.0 if two answers are the same once `normalised`, else 0.0."""
    return float(normalised(answer) == normalised(gold))


def word_f1(answer: str, gold: str) -> float:
    """Return the F1 of the words of two `normalised` answers; with an empty one, whether both are."""
    words, gold_words = normalised(answer).split(), normalised(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * shared / (len(words) + len(gold_words))


def score_answers(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers as SQuAD does: each against the gold answer it is nearest to, mean over questions.

    Args:
        answers: One for each question; empty for "there is none".
        golds: The gold answers of each question; none where it cannot be answered.

    Returns:
        ``exact_match`` and ``f1``.
    """
    known = [[gold for gold in some if normalised(gold)] or [""] for some in golds]
    pairs = list(zip(answers, known, strict=True))
    return {
        "exact_match": float(
            np.mean([max(exact_match(text, gold) for gold in some) for text, some in pairs])
        ),
        "f1": float(np.mean([max(word_f1(text, gold) for gold in some) for text, some in pairs])),
    }


def best_answers(rows: datasets.Dataset, windows: datasets.Dataset, logits: np.ndarray) -> list[str]:
    """Return each question's best answer: the span of at most `LONGEST_ANSWER` tokens with the most logits.

    A span's score is the sum of the start logit of its first and the end logit of its last token; the best
    over all windows of a context counts. If some of the questions have no gold answer, "" is the answer where
    the first special token scores higher, in the window where it scores lowest, than the best span.

    Args:
        rows: The questions.
        windows: Theirs, of ``questions.cut_windows``.
        logits: Start and end logits (tokens, 2) of all windows, one after another.
    """
    lengths, owners = np.asarray(windows["length"]), np.asarray(windows["row"])
    first, last = (_flat(windows, name) for name in ("first_chars", "last_chars"))
    starts = np.cumsum(lengths) - lengths
    scores = np.where((first >= 0)[:, None], logits.astype(np.float32), -np.inf)
    null = logits[starts].sum(1)
    best = np.empty(len(lengths), np.float32)
    spans = np.empty((len(lengths), 2), np.int64)
    for begin in range(0, len(lengths), _AT_ONCE):
        some = slice(begin, begin + _AT_ONCE)
        best[some], spans[some] = _best_spans(scores, starts[some], lengths[some])
    may_be_none = any(not golds for golds in rows["answers"])
    answers = [""] * len(rows)
    contexts = rows["context"]
    order = np.lexsort((best, owners))  # the last of each question's windows is its best
    lowest = np.full(len(rows), np.inf)
    np.minimum.at(lowest, owners, null)
    for window in order[np.append(np.diff(owners[order]) > 0, True)]:
        row, (begin, end) = owners[window], starts[window] + spans[window]
        if np.isfinite(best[window]) and not (may_be_none and lowest[row] > best[window]):
            answers[row] = contexts[int(row)][first[begin] : last[end]]
    return answers


def _flat(windows: datasets.Dataset, column: str) -> np.ndarray:
    return windows.with_format("arrow")[:][column].combine_chunks().flatten().to_numpy()


def _best_spans(scores: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each window's best score (N,) and its span (N, 2), from scores (tokens, 2) of all windows."""
    width = int(lengths.max())
    places = np.arange(width)
    real = places < lengths[:, None]
    padded = np.full((len(lengths), width, 2), -np.inf, np.float32)
    padded[real] = scores[(starts[:, None] + places)[real]]
    best = np.full(len(lengths), -np.inf, np.float32)
    spans = np.zeros((len(lengths), 2), np.int64)
    each = np.arange(len(lengths))
    for more in range(min(LONGEST_ANSWER, width)):
        sums = padded[:, : width - more, 0] + padded[:, more:, 1]
        begin = sums.argmax(1)
        better = sums[each, begin] > best
        best[better] = sums[each, begin][better]
        spans[better] = np.stack([begin, begin + more], 1)[better]
    return best, spans
