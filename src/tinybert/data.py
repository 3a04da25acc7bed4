"""Files, GLUE folders and hub names -> rows of text and label -> tokens."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tinybert.collation import PER_TOKEN
from tinybert.columns import check_names, find_texts, read_label_column, read_label_flags, read_texts
from tinybert.conll import is_conll, is_tsv, names_words, read_conll
from tinybert.entities import are_entity_tags
from tinybert.errors import InputError
from tinybert.questions import cut_windows, find_question_columns, is_squad, read_questions, read_squad
from tinybert.row_store import row_fingerprint, store_rows
from tinybert.tables import ENDINGS as ENDINGS
from tinybert.tables import Source, find_file, open_source
from tinybert.tasks import Kind, Task, find_label_column, main_metric
from tinybert.token_rows import (
    check_word_columns,
    find_word_columns,
    given_words,
    read_token_rows,
    tokenize_words,
)

_PIECE_ROWS = 1 << 16  # large, as all pieces are kept


@dataclass(frozen=True)
class TaskData:
    """Rows in one form, whatever they came from.

    Attributes:
        rows: Columns ``text``, ``text_pair`` (for pairs) and, if labelled, ``label``: a class id (int64) or a
            score (float64), or for multi_label a list of zeros and ones (float32), one for each name. For
            token_classification ``words`` and ``label``, lists of as many texts and class ids. For
            question_answering those of `questions.read_questions`.
        kind: What the labels are.
        label_names: Class names in the order of their ids; empty for regression, or if nothing told them.
        metric: The key of `evaluation.score` that chooses the best checkpoint.
        source: What the rows were read from, for reports and error messages.
        fingerprint: SHA-256 of the values in ``rows``: the same on every machine, other if a row differs.
    """

    rows: datasets.Dataset
    kind: Kind
    label_names: tuple[str, ...]
    metric: str
    source: str
    fingerprint: str


def load_data(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    kind: Kind | None = None,
    label_names: Sequence[str] | None = None,
    require_labels: bool = True,
    name: str | None = None,
) -> TaskData:
    """Read rows of text, or of text pairs, with their labels.

    CSV has the usual quoting; TSV has none (GLUE's way: ``"`` is an ordinary character). Cells are text as
    they stand: "NA" and "null" stay. Rows are counted from 1 in messages, without the header. What labels
    mean: `tasks.read_labels`. Labels that are all -1 (GLUE's test sets) count as none. A column of lists, or
    several columns of zeros and ones, is multi_label: any number of the classes may hold. CoNLL files, and a
    list of words beside a list of tags, are token_classification. SQuAD's JSON, and columns of questions,
    contexts and answers, are question_answering.

    Args:
        source: A file with one of `ENDINGS` or of `conll.CONLL_ENDINGS`; a folder with ``train``, ``dev`` and
            ``test`` files; or, if there is no such path, a hub name: ``"glue/sst2"``, ``"owner/name"`` or
            ``"owner/name/config"``.
        split: ``"train"``, ``"validation"`` (or ``"dev"``) or ``"test"`` of a folder or hub name.
        text_columns: One or two columns; found by their usual names if not given.
        label_column: Likewise.
        label_columns: Columns of zeros and ones, one for each class, in place of ``label_column``.
        kind: If not given, GLUE's table or the labels decide: a number that is no integer means regression.
        label_names: The classes in the order of their ids, such as a teacher's ``id2label``.
        require_labels: Whether rows without labels are an error.
        name: What tells the task, for rows that were copied from a source of that name.

    Raises:
        InputError: The source cannot be read, a column, text or label is missing or cannot be understood, or
            an option was given that these rows have no use for.
    """
    given = tuple(label_names) if label_names is not None else None
    if label_column is not None and label_columns is not None:
        raise InputError("--label_column has no meaning beside --label_columns: leave one of them out")
    path = find_file(source, split)
    form = _form(path, kind)
    if form is not None and kind not in (None, form):
        raise InputError(f"{path} is for {form} by its form, and {kind} is expected: give other rows")
    rows = path if form is not None else open_source(source, split)
    told = kind or form or (_told(rows) if isinstance(rows, Source) else None)
    if label_columns is not None and told in PER_TOKEN:
        raise InputError(f"--label_columns is for multi_label, and {path} is for {told}: leave it out")
    if told == "token_classification":
        return _load_words(rows, text_columns, label_column, given)
    if told == "question_answering":
        return _load_questions(rows, text_columns, label_column)
    assert isinstance(rows, Source)  # a form that is no table's is of one of these two
    texts = find_texts(rows, text_columns, name)
    return _load_texts(rows, texts, label_column, label_columns, kind, given, require_labels)


def _load_texts(
    opened: Source,
    found_texts: tuple[tuple[str, ...], Task | None],
    label_column: str | None,
    label_columns: Sequence[str] | None,
    kind: Kind | None,
    given: tuple[str, ...] | None,
    require_labels: bool,
) -> TaskData:
    """Read texts or pairs, with one label or any number of them."""
    origin, table = opened.origin, _whole(opened)
    texts, task = found_texts
    keys = zip(("text", "text_pair"), texts, strict=False)
    columns = {key: read_texts(table, column, origin) for key, column in keys}
    found = None
    if label_columns is not None:
        found = read_label_flags(table, label_columns, given, origin)
    elif label := find_label_column(table.column_names, label_column, texts, require_labels, origin):
        found = read_label_column(table, label, kind, given, task, origin)
    if found is not None and kind not in (None, found[1]):
        raise InputError(f"the labels of {origin} are {found[1]}, and {kind} is expected: give other rows")
    if found is None and require_labels:
        raise InputError(f"{origin} has no labels (all are empty or -1): give a labelled file")
    if found is None:
        kind = kind or (task.kind if task else "classification")
        classes = () if kind == "regression" else given or (task.label_names if task else ())
    else:
        columns["label"], kind, classes = found
    rows, fingerprint = store_rows(pa.table(columns))
    return TaskData(rows, kind, classes, main_metric(kind, task), origin, fingerprint)


def _whole(source: Source) -> pa.Table:
    table = pa.concat_tables([source.schema.empty_table(), *source.tables(_PIECE_ROWS)])
    if table.num_rows == 0:
        raise InputError(f"{source.origin} has no rows: expected a header and at least one row")
    return table


def _form(path: Path, kind: Kind | None) -> Kind | None:
    """Return the kind of task of a file that is to be read as no table: CoNLL or SQuAD; None for a table."""
    if is_squad(path):
        return "question_answering"
    tells = kind == "token_classification" or (kind is None and is_tsv(path) and names_words(path))
    return "token_classification" if is_conll(path) or (is_tsv(path) and tells) else None


def _told(opened: Source) -> Kind | None:
    """Return the kind of task that columns tell which only one kind has; None for those of other rows."""
    if find_word_columns(opened.schema, None, None):
        return "token_classification"
    return "question_answering" if find_question_columns(opened.schema.names, None, None) else None


def _load_questions(
    source: Source | Path, text_columns: Sequence[str] | None, label_column: str | None
) -> TaskData:
    """Read questions on contexts, in SQuAD's form or in columns."""
    if isinstance(source, Path):
        origin = str(source)
        for option, given in (("text_columns", text_columns), ("label_column", label_column)):
            if given is not None:
                raise InputError(f"--{option} has no meaning with {origin}, which is SQuAD's: leave it out")
        rows = read_squad(source)
    else:
        check_names(source)
        origin = source.origin
        columns = find_question_columns(source.schema.names, text_columns, label_column)
        rows = read_questions(_whole(source), columns, origin)
    stored, fingerprint = store_rows(rows)
    metric = main_metric("question_answering", None)
    return TaskData(stored, "question_answering", (), metric, origin, fingerprint)


def _load_words(
    source: Source | Path,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    given: tuple[str, ...] | None,
) -> TaskData:
    """Read sentences of words and tags: CoNLL lines, or lists in columns."""
    if isinstance(source, Source):
        check_names(source)
        origin, names = source.origin, source.schema.names
        columns = check_word_columns(
            find_word_columns(source.schema, text_columns, label_column), names, origin
        )
        table = _whole(source)
    else:
        origin, columns = str(source), ("words", "tags")
        table = read_conll(source, next(iter(given_words(text_columns)), None), label_column)
        if table.num_rows == 0:
            raise InputError(f"{origin} has no rows: expected a word and its tag a line")
    rows, tags = read_token_rows(table, columns, given, origin)
    stored, fingerprint = store_rows(rows)
    metric = main_metric("token_classification", None) if are_entity_tags(tags) else "accuracy"
    return TaskData(stored, "token_classification", tags, metric, origin, fingerprint)


def tokenize(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int | None = None
) -> datasets.Dataset:
    """Turn text into token ids, unpadded; the result is cached on disk.

    Args:
        data: The rows; a pair is joined by the tokenizer and cut at its longer side first.
        tokenizer: The teacher's (and so the student's) tokenizer.
        max_length: The most tokens a row may have, special ones included.
        stride: Tokens by which windows of a question's context overlap; see ``questions.cut_windows``.

    Returns:
        Columns ``input_ids``, ``attention_mask``, ``token_type_ids`` if the tokenizer makes them, ``length``
        (tokens) and, if labelled, ``labels``; rows in the order of ``data.rows``. Of words see
        ``token_rows.tokenize_words``, of questions, which become one row or several, ``cut_windows``.
    """
    if data.kind == "token_classification":
        return tokenize_words(data.rows, tokenizer, max_length)
    if data.kind == "question_answering":
        return cut_windows(data.rows, tokenizer, max_length, stride)

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = encode_texts(tokenizer, batch["text"], batch.get("text_pair"), max_length)
        if "label" in batch:
            encoded["labels"] = batch["label"]
        return encoded

    # The first call writes the truncation into a fast tokenizer, and the cache's key is made of its state.
    encode(data.rows[:1])
    return data.rows.map(encode, batched=True, remove_columns=data.rows.column_names, desc="Tokenizing")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int
) -> dict[str, list[Any]]:
    """Return the token ids of texts, or of pairs, and their ``length``; as `tokenize` does, in memory."""
    encoded = dict(tokenizer(texts, pairs, truncation="longest_first", max_length=max_length, padding=False))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    return encoded


def split_rows(data: TaskData, sizes: Mapping[str, int | None], seed: int) -> dict[str, TaskData]:
    """Deal the rows into parts, at random but always the same.

    Rows are ordered by SHA-256 of (seed, row) and dealt to the parts in the order of ``sizes``. A hash and
    not a random generator, because numpy may change its streams between versions, and because a row's place
    then depends neither on the file's order nor on the machine.

    Args:
        data: What to split.
        sizes: Rows a part; one may be ``None``: the rest.
        seed: Another seed gives another split.

    Raises:
        InputError: A size below 1, two rests, or fewer rows than asked for.
    """
    total = len(data.rows)
    wanted = sum(size for size in sizes.values() if size is not None)
    rests = sum(size is None for size in sizes.values())
    if rests > 1 or any(size is not None and size < 1 for size in sizes.values()):
        raise InputError(f"sizes are {dict(sizes)}: expected numbers of 1 or more, and at most one None")
    if wanted + rests > total:
        raise InputError(f"{data.source} has {total} rows, too few for {dict(sizes)}: ask for smaller parts")
    keys = [
        hashlib.sha256(json.dumps([seed, *row]).encode()).digest()
        for batch in data.rows.iter(1000)
        for row in zip(*(batch[name] for name in data.rows.column_names), strict=True)
    ]
    order = sorted(range(total), key=keys.__getitem__)
    parts, start = {}, 0
    for name, size in sizes.items():
        end = start + (total - wanted if size is None else size)
        rows = data.rows.select(order[start:end])
        parts[name] = replace(data, rows=rows, fingerprint=row_fingerprint(rows))
        start = end
    return parts
