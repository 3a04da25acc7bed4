"""A model folder -> a smaller one: fewer word pieces, fewer feed-forward neurons. Nothing is trained.

What comes out is a plain Hugging Face folder, which bounds what can be removed. Stock BERT, RoBERTa, ELECTRA
and DistilBERT have one feed-forward size for all layers, so each layer keeps the same number of neurons.
Each of their heads is ``hidden_size / heads`` wide, so the query, key, value and output matrices are as
large with fewer heads: heads cannot be removed, and ``--heads`` says so. Fewer layers or a smaller width are
a student's (``tinybert distill``, which solves its start in closed form).
"""

import gzip
import json
import random
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert import models
from tinybert.anatomy import feed_forward_name
from tinybert.collation import PER_TOKEN
from tinybert.columns import find_texts, is_list, read_texts
from tinybert.conll import is_conll, is_header, read_conll
from tinybert.corpus import END, find_files, open_corpus
from tinybert.data import TaskData, encode_texts
from tinybert.entities import are_entity_tags
from tinybert.errors import InputError, refuse_given
from tinybert.model_card import model_card
from tinybert.neurons import check_neurons, cut_neurons
from tinybert.questions import find_question_columns, is_squad, read_squad
from tinybert.rows import MAX_LENGTH_HELP, STRIDE_HELP, provenance, row_length, rows_to_score
from tinybert.run_directory import (
    PAGE,
    RECORD,
    Figures,
    Result,
    check_claimable,
    file_size,
    run_record,
    write_whole,
)
from tinybert.sessions import FOLDER
from tinybert.stages import EvaluateArguments, evaluate
from tinybert.student import CALIBRATION_TOKENS, padded_batches
from tinybert.summary import model_lines, with_retention
from tinybert.tables import ENDINGS, Source, open_source
from tinybert.tasks import Kind, listed
from tinybert.token_rows import find_word_columns
from tinybert.vocabulary import check_fits, cut_vocabulary, write_vocabulary

_SAMPLE = 8192  # rows of the corpus that neurons may be chosen on; about a quarter of it is used
_HEAD = 100  # lines that tell whether a file is of words and tags
_QUESTIONS = ("question", "context")

Rows = tuple[list[str], list[str] | None]


@dataclass(kw_only=True)
class PruneArguments:
    """What to remove from which model, and by which text."""

    model: str = field(metadata={"help": "Model to prune, with any head: a folder or a hub name."})
    output_dir: str = field(metadata={"help": "Folder for the smaller model."})
    vocabulary: int | None = field(
        default=None,
        metadata={"help": "Word pieces to keep: special ones, single characters, the most used."},
    )
    neurons: int | None = field(
        default=None, metadata={"help": "Feed-forward neurons to keep in each layer."}
    )
    heads: int | None = field(
        default=None, metadata={"help": "Refused: stock models have no smaller matrices for fewer heads."}
    )
    corpus: list[str] = field(
        metadata={
            "help": "Text like that to come: what it uses stays. Rows as tinybert finetune takes them, whose "
            "labels are not read, or running text as tinybert general does."
        },
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns of --corpus and --data."}
    )
    data: str | None = field(default=None, metadata={"help": "Labelled rows to score on, before and after."})
    label_column: str | None = field(default=None, metadata={"help": "Their label column."})
    label_columns: list[str] | None = field(
        default=None, metadata={"help": "Their columns of 0 and 1, a label each."}
    )
    max_length: int | None = field(default=None, metadata={"help": MAX_LENGTH_HELP})
    stride: int | None = field(default=None, metadata={"help": f"Of --data. {STRIDE_HELP}"})
    seed: int = field(default=42, metadata={"help": "Of the rows that neurons are chosen on."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what the folder holds."})

    def __post_init__(self) -> None:
        """Refuse what would do nothing, and what cannot be a plain folder."""
        if self.heads is not None:
            raise InputError(
                "--heads: stock models share their width out among the heads they have, so fewer are no "
                "smaller; use --neurons, --vocabulary, or tinybert distill --hidden_size"
            )
        if self.vocabulary is None and self.neurons is None:
            raise InputError("nothing would be removed: give --vocabulary, --neurons or both")
        if self.data is None:
            refuse_given(self, ("label_column", "label_columns", "stride"), "without --data")
        if self.neurons is None:
            refuse_given(self, ("seed",), "without --neurons")
            if self.data is None:
                refuse_given(self, ("max_length",), "without --neurons or --data")


@dataclass(frozen=True)
class Pruned:
    """What pruning made.

    Attributes:
        result: The folder, and the figures before and after.
        removed: What was removed, as run.json has it: word ``pieces`` and ``neurons``, before and after each.
        recovery: The options of ``tinybert`` that bring back what was lost, but for the rows and the output.
    """

    result: Result
    removed: dict[str, dict[str, float]]
    recovery: str

    def table(self) -> str:
        """Return both models side by side, and what was removed, as text."""
        lines = [self.result.table(), ""]
        for name, entry in self.removed.items():
            line = f"{name:10}{entry['before']:>18,} -> {entry['after']:,}"
            if "coverage" in entry:
                line += f", which are {100 * entry['coverage']:.2f} % of those in the corpus"
            lines.append(line)
        return "\n".join(lines)


def prune(arguments: PruneArguments) -> Pruned:
    """Make a smaller model folder from one, without training.

    First the vocabulary (``vocabulary.cut_vocabulary``), then the neurons (``neurons.cut_neurons``) on text
    as the smaller vocabulary spells it. What is lost comes back by ``tinybert distill --teacher OLD --student
    NEW``; with other pieces by predictions alone, ``--intermediate_epochs 0``, where a label is one of a
    whole text, and by ``tinybert finetune`` where tokens have labels.

    Raises:
        InputError: Bad input, see the message; nothing has been written then.
    """
    folder, started = Path(arguments.output_dir), time.monotonic()
    inputs = [arguments.model, arguments.data or "", *arguments.corpus]
    check_claimable(
        folder, overwrite=arguments.overwrite_output_dir, resume=None, inputs=filter(None, inputs)
    )
    model = models.open_whole(arguments.model)
    kind = models.task_of(model)[0]
    tokenizer = models.open_tokenizer(arguments.model, kind=kind)
    check_fits(model, tokenizer)
    if arguments.neurons is not None or arguments.data is not None:
        arguments = replace(arguments, max_length=row_length(arguments.max_length, kind, model))
    if arguments.neurons is not None:
        check_neurons(model, arguments.neurons)
    data = None if arguments.data is None else _labelled(arguments, model)
    metrics = {} if data is None else _score(arguments, arguments.model)
    smaller, tokenizer, removed = _smaller(arguments, model, tokenizer)
    stored = models.open_config(arguments.model).dtype
    if stored in (torch.float16, torch.bfloat16):  # what was half as large stays so
        nets: list[Any] = [model, smaller]
        for net in nets:
            net.to(stored)
    before = Figures("before", metrics, model.num_parameters(), file_size(model))
    results: list[Pruned] = []

    def write(path: Path) -> None:
        smaller.save_pretrained(path)
        tokenizer.save_pretrained(path)
        write_vocabulary(tokenizer, path)
        scores = {} if data is None else _score(arguments, str(path))
        seconds = time.monotonic() - started
        after = Figures("after", scores, smaller.num_parameters(), file_size(smaller), seconds)
        result = Result(folder, None if data is None else data.metric, (before, after))
        pruned = Pruned(result, removed, _recovery(arguments, model))
        sources = {} if data is None else provenance(eval=data)
        record = run_record(arguments, result, seconds, sources, removed=removed)
        lines = with_retention(model_lines(record), record["metric"])
        card = model_card(record, lines, folder.resolve().name, type(smaller).__name__)
        (path / "README.md").write_text(card, encoding="utf-8")
        (path / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        results.append(pruned)
        if arguments.overwrite_output_dir:  # of other weights; not before all is ready to take their place
            for name in (RECORD, PAGE):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / FOLDER, ignore_errors=True)

    write_whole(folder, write)
    return results[0]


def _recovery(arguments: PruneArguments, model: PreTrainedModel) -> str:
    other_pieces = arguments.vocabulary is not None
    if not models.has_task(model) or (other_pieces and models.task_of(model)[0] in PER_TOKEN):
        return f"finetune --model {arguments.output_dir}"
    predictions = " --intermediate_epochs 0" if other_pieces else ""
    return f"distill --teacher {arguments.model} --student {arguments.output_dir}{predictions}"


def _smaller(
    arguments: PruneArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, dict[str, float]]]:
    removed: dict[str, dict[str, float]] = {}
    read = partial(_read, arguments, *models.task_of(model))
    if arguments.vocabulary is not None:
        pieces = (texts + (pairs or []) for texts, pairs in read())
        whole = len(tokenizer)
        cut = cut_vocabulary(model, tokenizer, pieces, arguments.vocabulary)
        model, tokenizer = cut.model, cut.tokenizer
        removed["pieces"] = {"before": whole, "after": len(cut.kept), "coverage": cut.coverage}
    if arguments.neurons is not None:
        rows, tokens, longest = [], 0, arguments.max_length
        assert longest is not None  # settled before anything is read
        for text, pair in _sample(read(), arguments.seed):
            encoded = encode_texts(tokenizer, [text], None if pair is None else [pair], longest)
            tokens += encoded.pop("length")[0]
            rows.append({name: cells[0] for name, cells in encoded.items()})
            if tokens >= CALIBRATION_TOKENS:
                break
        if tokens < arguments.neurons:
            raise InputError(
                f"--corpus has {tokens} word pieces of text, too few to choose --neurons {arguments.neurons} "
                f"on: expected one for each at the least, and better {CALIBRATION_TOKENS:,}; name more text"
            )
        whole = getattr(model.config, feed_forward_name(model.config))
        model = cut_neurons(model, padded_batches(rows, tokenizer), arguments.neurons)
        removed["neurons"] = {"before": whole, "after": arguments.neurons, "tokens": tokens}
    return model, tokenizer, removed


def _read(arguments: PruneArguments, kind: Kind, names: Sequence[str]) -> Iterator[Rows]:
    """Read the corpus in pieces: texts, and their pairs where the rows are pairs.

    Args:
        arguments: What to read, and by which columns.
        kind: What the model does.
        names: Of its classes.
    """
    tags = names if kind == "token_classification" else ()
    columns, running = arguments.text_columns, []
    for source in arguments.corpus:
        files = find_files(source)
        if files is None and columns and len(columns) > 1:
            yield from _rows(open_source(source, "train"), columns)
        elif files is None:
            running.append(source)
        for path in files or ():
            rows = _rows_of(path, columns, kind, tags)
            if rows is None:
                running.append(str(path))
            else:
                yield from rows
    if not running:
        return
    column = columns[0] if columns and len(columns) == 1 else None
    corpus = open_corpus(running, text_column=column, option="text_columns")
    for shard in range(corpus.shards):
        for _, texts in corpus.read(shard):
            yield [text for text in texts if text != END], None


def _rows_of(
    path: Path, columns: Sequence[str] | None, kind: Kind, tags: Sequence[str]
) -> Iterator[Rows] | None:
    """Return the rows of a file as other commands read them; None of running text, by the file's form."""
    name = path.name.lower()
    if is_squad(path):
        return _rows(_source(path, read_squad(path)), _QUESTIONS)
    if _is_tagged(path, tags):
        return _rows(_source(path, read_conll(path, columns[0] if columns else None)), ["words"])
    if not name.endswith(ENDINGS):
        if columns and len(columns) > 1 and {".json", ".jsonl"} & {*Path(name).suffixes}:
            raise InputError(
                f"{path} is read by one text column, got {listed(columns)}: save it as .jsonl.gz"
            )
        return None
    delimited = name.removesuffix(".gz").endswith((".csv", ".tsv"))
    if not (delimited or columns or kind in PER_TOKEN):
        return None
    table = open_source(path)
    if columns is None:
        words = find_word_columns(table.schema, None, None)
        questions = find_question_columns(table.schema.names, None, None)
        columns = words[:1] if words else questions[:2] if questions else None
    return _rows(table, columns) if delimited or columns else None


def _is_tagged(path: Path, tags: Sequence[str]) -> bool:
    """Return whether a file is of words and tags: by its ending; .txt and .tsv, by their first lines.

    These have as many columns a line, one of them of entity tags or of the tags that a model knows.
    """
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".txt", ".tsv")):
        return is_conll(path)
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            head = file.read(1 << 16).decode("utf-8-sig", "replace")
    except (OSError, EOFError, zlib.error):  # said by whoever reads the file
        return False
    lines = [line for line in head.split("\n")[:_HEAD] if line.strip() and line[0] != "#"]
    rows = [line.split("\t" if "\t" in line else None) for line in lines if "-DOCSTART-" not in line]
    rows = rows[is_header(rows[0]) :] if rows else []
    if len({len(cells) for cells in rows}) != 1:
        return False
    columns = [{cell.strip() for cell in column} for column in zip(*rows, strict=True)]
    return any(are_entity_tags(column) or column <= {*tags} for column in columns[1:])


def _source(path: Path, table: pa.Table) -> Source:
    return Source(str(path), str(path), table.schema, lambda rows: [table])


def _rows(source: Source, given: Sequence[str] | None) -> Iterator[Rows]:
    """Read the text columns of a table in pieces; lists of words are joined by spaces."""
    columns, _ = find_texts(source, given)
    first = 0
    for part in source.tables():
        cells = [_texts(part, column, source.origin, first) for column in columns]
        first += part.num_rows
        yield cells[0], cells[1] if len(cells) > 1 else None


def _texts(table: pa.Table, column: str, origin: str, first: int) -> list[str]:
    if is_list(table.schema.field(column).type):
        return [" ".join(str(word) for word in words or () if word) for words in table[column].to_pylist()]
    return read_texts(table, column, origin, first).to_pylist()


def _sample(rows: Iterable[Rows], seed: int) -> list[tuple[str, str | None]]:
    """Draw rows at random, all alike, in random order (a reservoir)."""
    drawn: list[tuple[str, str | None]] = []
    generator, seen = random.Random(seed), 0
    for texts, pairs in rows:
        for row in zip(texts, pairs or repeat(None), strict=False):
            seen += 1
            if len(drawn) < _SAMPLE:
                drawn.append(row)
            elif (place := generator.randrange(seen)) < _SAMPLE:
                drawn[place] = row
    generator.shuffle(drawn)
    return drawn


def _labelled(arguments: PruneArguments, model: PreTrainedModel) -> TaskData:
    """Read the labelled rows; ``evaluate`` reads them again, as it would for anyone."""
    return rows_to_score(model, str(arguments.data), arguments)


def _score(arguments: PruneArguments, folder: str) -> dict[str, float]:
    return evaluate(
        EvaluateArguments(
            model=folder,
            data=str(arguments.data),
            text_columns=arguments.text_columns,
            label_column=arguments.label_column,
            label_columns=arguments.label_columns,
            max_length=arguments.max_length,
            stride=arguments.stride,
        )
    )
