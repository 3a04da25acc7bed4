"""Questions on a context: SQuAD files or columns -> rows -> windows of a context that is too long for one."""

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tinybert.columns import given_columns, refuse_mixed, shown
from tinybert.errors import InputError, one_line
from tinybert.tasks import listed

logger = logging.getLogger(__name__)

_CONTEXTS = ("context", "passage", "paragraph")
_ANSWERS = ("answers", "answer", "answer_text")
_STARTS = ("answer_start", "answer_starts", "start", "start_char")
_LABELS = ("start_positions", "end_positions")
_START = 1 << 16  # bytes by which a file is told
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "question": pa.string(),
        "context": pa.string(),
        "answers": pa.list_(pa.string()),
        "starts": pa.list_(pa.int64()),
    }
)


def is_squad(path: Path) -> bool:
    """Return whether a path is a JSON file in SQuAD's form, by how it begins."""
    if not path.name.lower().removesuffix(".gz").endswith(".json") or not path.is_file():
        return False
    start = b""
    try:
        with _opener(path)(path, "rb") as file:
            while len(start) < _START and (more := file.read1(_START)):
                start += more
    except (OSError, EOFError, zlib.error):  # said by whoever reads the file
        pass
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and b'"paragraphs"' in start


def _opener(path: Path) -> Any:
    return gzip.open if path.suffix.lower() == ".gz" else open


def read_squad(path: Path) -> pa.Table:
    """Read a file in the form of SQuAD 1.1 or 2.0 (Rajpurkar et al. 2016, 2018).

    Returns:
        As `read_questions`.

    Raises:
        InputError: The file is not JSON or not of that form, or see `read_questions`.
    """
    try:
        with _opener(path)(path, "rt", encoding="utf-8-sig") as file:
            articles = json.load(file)["data"]
        found = [
            (question.get("id"), question["question"], paragraph["context"], question.get("answers"), None)
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as JSON ({one_line(error)}): correct the file") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not of SQuAD's form ({one_line(error)} is missing or of another kind): expected "
            "data, paragraphs, context, qas, question, answers"
        ) from error
    return _checked(found, str(path))


def find_question_columns(
    names: Sequence[str], text_columns: Sequence[str] | None, label_column: str | None
) -> tuple[str, str, str] | None:
    """Return the columns of question, context and answers, given or usual, if all are there.

    Raises:
        InputError: Text columns were given, and they are not two.
    """
    lower = {name.lower().strip(): name for name in reversed(names)}
    expected = "two different ones, QUESTION CONTEXT, for question_answering (another task: give --kind)"
    given = list(given_columns(text_columns, (2,), expected))
    wanted = given or _first(lower, ("question",)) + _first(lower, _CONTEXTS)
    wanted = [*wanted, *([label_column] if label_column else _first(lower, _ANSWERS))]
    return (wanted[0], wanted[1], wanted[2]) if len(wanted) == 3 and set(wanted) <= set(names) else None


def _first(lower: Mapping[str, str], usual: Iterable[str]) -> list[str]:
    return [lower[name] for name in usual if name in lower][:1]


def read_questions(table: pa.Table, columns: tuple[str, str, str] | None, origin: str) -> pa.Table:
    """Read questions from flat columns.

    Answers are a text, a list of texts, or objects of ``text`` and ``answer_start``, as in the hub's SQuAD;
    none, or an empty text, means that the context has no answer. Where a column such as ``answer_start``
    says where an answer begins, the place nearest to that is meant; else the first.

    Args:
        table: The questions.
        columns: Those of question, context and answers.
        origin: What has these rows, for messages.

    Returns:
        Columns ``id``, ``question``, ``context``, ``answers`` and ``starts``: lists of texts and of the
        characters of the context they begin at, -1 for an answer in other words.

    Raises:
        InputError: A column is missing or holds something else, a question or context is empty, or none of
            a question's answers is in its context.
    """
    names = table.column_names
    if columns is None:
        raise InputError(
            f"{origin} has no columns of questions, contexts and answers; it has {listed(names)}: name them "
            "with --text_columns QUESTION CONTEXT and --label_column ANSWERS"
        )
    refuse_mixed(table, columns[2], origin)
    lower = {name.lower().strip(): name for name in reversed(names)}
    chosen = [*_first(lower, ("id",)), *columns, *_first(lower, _STARTS)]
    rows = table.select(list(dict.fromkeys(chosen))).to_pylist()
    key, start = (next(iter(_first(lower, usual)), "") for usual in (("id",), _STARTS))
    question, context, answers = columns
    return _checked(
        ((row.get(key), row[question], row[context], row[answers], row.get(start)) for row in rows), origin
    )


def _checked(found: Iterable[tuple[Any, ...]], origin: str) -> pa.Table:
    rows = []
    for number, (key, question, context, answers, starts) in enumerate(found, start=1):
        where = f"{origin}: question {number}"
        for name, text in (("question", question), ("context", context)):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where} has {shown(text)} for its {name}: expected text")
        texts, places = [], []
        for text, start in _answers(answers, starts, where):
            texts.append(text)
            places.append(_locate(context, text, start))
        if texts and max(places) < 0:
            raise InputError(
                f"{where} ({shown(question)}) has the answer {shown(texts[0])}, which is not in its context: "
                "answers must be parts of it, to the letter (for rows of another kind give --kind)"
            )
        rows.append(
            {
                "id": str(number if key is None else key),
                "question": question,
                "context": context,
                "answers": texts,
                "starts": places,
            }
        )
    if not rows:
        raise InputError(f"{origin} has no questions: expected at least one")
    return pa.Table.from_pylist(rows, _SCHEMA)


def _answers(cell: Any, starts: Any, where: str) -> Iterator[tuple[str, int]]:
    """Yield each answer that is not empty and where it is said to begin (0 where nothing is said)."""
    if isinstance(cell, dict):
        cell, starts = cell.get("text"), cell.get("answer_start")
    texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
    places = starts if isinstance(starts, list) else [starts] * len(texts)
    if len(places) != len(texts):
        raise InputError(f"{where} has {len(texts)} answers and {len(places)} starts: give each one start")
    for text, place in zip(texts, places, strict=True):
        if isinstance(text, dict):
            place = text.get("answer_start")
            text = text.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where} has the answer {shown(text)}: expected text")
        if text.strip():
            yield text.strip(), _start(place, where)


def _start(place: Any, where: str) -> int:
    """Return where an answer is said to begin: a whole number, which tables with gaps write as 12.0."""
    try:
        number = float(place or 0)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isnan(number):  # an empty cell
        return 0
    if not number.is_integer():
        raise InputError(f"{where}: an answer starts at {shown(place)}: expected a whole number")
    return int(number)


def _locate(context: str, text: str, start: int) -> int:
    """Return where a text begins in its context, the nearest place to the one that is said; -1 if nowhere."""
    after = context.find(text, max(start, 0))
    before = context.rfind(text, 0, max(start, 0) + len(text))
    places = [place for place in (after, before) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=-1)


def cut_windows(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None
) -> datasets.Dataset:
    """Turn questions into token ids, each with as many windows of its context as that takes, unpadded.

    A question of more than a quarter of ``max_length`` is cut there: a warning says how many.

    Args:
        rows: Of `read_questions`.
        tokenizer: The teacher's (and so the student's).
        max_length: Tokens of a window, those of the question and special ones included.
        stride: Tokens by which windows of a context overlap; a third of ``max_length`` unless given.

    Returns:
        As ``tinybert.data.tokenize``, a row for each window, with ``start_positions`` and ``end_positions``,
        the first and the last token of the first answer (0, the first special token, where a window has
        none); ``row``, the question's number; ``first_chars`` and ``last_chars``, where in the context each
        token begins and ends, -1 outside it.

    Raises:
        InputError: The stride leaves no room for anything new.
    """
    longest = max(max_length // 4, 1)
    room = max_length - longest - 4
    stride = max_length // 3 if stride is None else stride
    if not 0 <= stride < room:
        raise InputError(
            f"--stride is {stride}: windows of --max_length {max_length} must overlap by 0 to {room - 1}"
        )

    settings = {"tokenizer": tokenizer, "max_length": max_length, "stride": stride, "longest": longest}
    # As for texts: the first call settles the state that the cache's key is made of.
    _windows(rows[:1], [0], **settings)  # type: ignore[arg-type]
    windows = rows.map(
        _windows,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs=settings,
        desc="Tokenizing",
    )
    cut = len(np.unique(np.asarray(windows["row"])[np.asarray(windows["cut"])]))
    if cut:
        logger.warning("%d questions are longer than %d tokens and were cut there", cut, longest)
    return windows.remove_columns("cut")


def _windows(
    batch: Mapping[str, list[Any]],
    numbers: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    longest: int,
) -> dict[str, list[Any]]:
    """Return the windows of a batch of questions with these numbers; see `cut_windows`."""
    questions, cut = _shortened(batch["question"], tokenizer, longest)
    encoded = tokenizer(
        questions,
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    origins = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    made: dict[str, list[Any]] = {name: list(values) for name, values in encoded.items()}
    made |= {name: [] for name in (*_LABELS, "first_chars", "last_chars")}
    for window, origin in enumerate(origins):
        inside = np.array([part == 1 for part in encoded.sequence_ids(window)])
        chars = np.where(inside[:, None], np.array(offsets[window]), -1)
        pairs = zip(batch["answers"][origin], batch["starts"][origin], strict=True)
        answer = next(((text, start) for text, start in pairs if start >= 0), None)
        for name, place in zip(_LABELS, _span(chars, inside, answer), strict=True):
            made[name].append(place)
        made["first_chars"].append(chars[:, 0])
        made["last_chars"].append(chars[:, 1])
    made["length"] = [len(ids) for ids in made["input_ids"]]
    return made | {name: [each[o] for o in origins] for name, each in (("row", numbers), ("cut", cut))}


def _shortened(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[str], list[bool]]:
    """Return questions cut after so many tokens, and which of them were."""
    texts = [text.strip() for text in questions]
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = [len(each) > longest for each in offsets]  # type: ignore[arg-type]
    return [
        text[: each[longest - 1][1]] if long else text  # type: ignore[index]
        for text, each, long in zip(texts, offsets, cut, strict=True)  # type: ignore[arg-type]
    ], cut


def _span(chars: np.ndarray, inside: np.ndarray, answer: tuple[str, int] | None) -> tuple[int, int]:
    """Return the first and the last token (T, 2 characters each) of an answer; 0 and 0 where it is not."""
    if answer is None or not inside.any():
        return 0, 0
    text, start = answer
    begun = np.flatnonzero(inside & (chars[:, 0] <= start))
    ended = np.flatnonzero(inside & (chars[:, 1] >= start + len(text)))
    if not len(begun) or not len(ended) or ended[0] < begun[-1]:
        return 0, 0
    return int(begun[-1]), int(ended[0])
