"""Files -> augmented files: in blocks of rows, over processes, resumed where they were interrupted."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from tinybert import models
from tinybert.augment import Augmenter, AugmentSettings
from tinybert.columns import class_ids, find_texts, read_texts
from tinybert.errors import InputError, check_least, one_line, refuse_given
from tinybert.evaluation import class_probabilities
from tinybert.masked_words import MaskedWords
from tinybert.rows import row_length
from tinybert.tables import OUTPUT_ENDINGS, Source, open_source, open_writer
from tinybert.tasks import Task, find_label_column
from tinybert.training import bf16_is_fast
from tinybert.word_vectors import WordVectors, read_word_vectors

# Rows of a block: what is lost when a run is killed, and what a process takes at a time.
BLOCK = 256
# Digests are sorted in so many shares, one after the other: the memory of a sort is that of one share.
_SHARES = 64
_IS_COPY = "tinybert: is a copy"
_NEVER_IN_THE_RESULT = ("data", "output", "tokens_per_batch", "overwrite_output")


@dataclass(kw_only=True)
class AugmentArguments(AugmentSettings):
    """What to augment, and with what."""

    data: str = field(
        metadata={"help": "Rows: CSV, TSV, JSON(L), Parquet, GLUE folder or hub name (their train split)."},
    )
    output: str = field(metadata={"help": f"File to write: {', '.join(OUTPUT_ENDINGS)}, by its ending."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns; found by the usual names unless given."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Label column, for --keep_if_teacher_agrees; found by the usual names."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Fine-tuned model for --keep_if_teacher_agrees: folder or hub name."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Word pieces a row that the teacher reads: 128, or all it can, unless given."},
    )
    seed: int = field(default=42, metadata={"help": "Another seed makes other copies."})
    tokens_per_batch: int = field(default=2048, metadata={"help": "Most tokens of a forward pass."})
    overwrite_output: bool = field(default=False, metadata={"help": "Replace the output file."})

    def __post_init__(self) -> None:
        """Check what goes together.

        Raises:
            InputError: Nothing to propose words, or a filter without a teacher.
        """
        super().__post_init__()
        if self.keep_if_teacher_agrees is not None and self.teacher is None:
            raise InputError("--keep_if_teacher_agrees needs a model to ask: give --teacher")
        check_least(self, {"tokens_per_batch": 1})


@dataclass(frozen=True)
class Augmented:
    """What was made: the file, its rows that were there before and its copies, and the time it took."""

    output: Path
    rows: int
    copies: int
    seconds: float


def augment_file(arguments: AugmentArguments) -> Augmented:
    """Write the rows of a file and changed copies of them, each row followed by its copies.

    Every row is there once, no copy is equal to a row or another copy, all columns are carried along. Memory
    does not grow with the file but for about 12 bytes a row and a copy, and 8 more a row. Blocks are kept
    beside the output until all are done: the same command goes on where it was interrupted. Under
    ``accelerate launch`` each process takes its share of the blocks. The result depends on neither.

    Raises:
        InputError: Bad input, see the message; no output has been written then.
    """
    started = time.monotonic()
    if arguments.keep_if_teacher_agrees is None:
        unread = ("teacher", "label_column", "max_length")
        refuse_given(arguments, unread, "without --keep_if_teacher_agrees")
    output = Path(arguments.output)
    _check_output(output, arguments.data, overwrite=arguments.overwrite_output)
    job = AugmentJob(arguments)
    rows, copies = job.write(output)
    return Augmented(output, rows, copies, time.monotonic() - started)


class AugmentJob:
    """One file to augment: opened, checked and read once when made; written by ``write``.

    Args:
        arguments: What and how; ``output`` tells the format alone, ``write`` is given the file.

    Raises:
        InputError: A source, model or file of vectors that cannot be read, or rows that are not fit, or that
            the format cannot hold.
    """

    def __init__(self, arguments: AugmentArguments) -> None:
        """Read the rows once, to count and check them before any time is spent."""
        self.arguments = arguments
        self.source = open_source(arguments.data, "train")
        _check_types(self.source)
        self.columns, task = find_texts(self.source, arguments.text_columns)
        self.filter = None if arguments.keep_if_teacher_agrees is None else _Agreement(arguments, self, task)
        self.rows, self._originals, content = self._survey()
        self.augmenter = self._make_augmenter()
        self.fingerprint = self._fingerprint(content)

    def _survey(self) -> tuple[int, np.ndarray, str]:
        """Return the number of rows, the digests of their texts, sorted, and one of all their cells."""
        count, collected, content = 0, bytearray(), hashlib.blake2b(digest_size=16)
        for table in self.source.tables(BLOCK):
            texts = self.texts(table, count)
            if self.filter is not None:
                self.filter.labels(table, count)
            # A format that holds the rows holds their copies: they bring neither tabs nor line breaks.
            with open_writer(Path(self.arguments.output), Path(os.devnull)) as nowhere:
                nowhere.write(table)
            count += table.num_rows
            collected += _digests(texts).tobytes()
            content.update(json.dumps(table.to_pydict(), default=str, sort_keys=True).encode())
        if not count:
            raise InputError(f"{self.source.origin} has no rows: expected a header and at least one row")
        digests = np.frombuffer(collected, np.uint64)
        digests.sort()
        return count, digests, content.hexdigest()

    def texts(self, table: pa.Table, first: int) -> list[tuple[str, ...]]:
        """Return the text, or the pair of texts, of each row; ``first`` is the number of the first."""
        columns = [
            read_texts(table, column, self.source.origin, first).to_pylist() for column in self.columns
        ]
        return list(zip(*columns, strict=True))

    def _make_augmenter(self) -> Augmenter:
        arguments, masked_words, vectors = self.arguments, None, None
        if arguments.word_vectors is not None:
            vectors = read_word_vectors(arguments.word_vectors)
        if arguments.masked_lm is not None:
            model = models.open_masked_lm(arguments.masked_lm)
            masked_words = MaskedWords(
                model.to(_processes().device),  # type: ignore[arg-type]
                models.open_tokenizer(arguments.masked_lm),
                masked_share=arguments.masked_share,
                tokens_per_batch=arguments.tokens_per_batch,
                positions=models.positions_of(model.config),
                bf16=bf16_is_fast(),
            )
        return Augmenter(masked_words, vectors, columns=self.columns, settings=arguments, seed=arguments.seed)

    def _fingerprint(self, content: str) -> str:
        """Return a digest of everything that the result depends on."""
        settings = {
            name: value for name, value in asdict(self.arguments).items() if name not in _NEVER_IN_THE_RESULT
        }
        digest = hashlib.blake2b(f"{content} {self.columns} {settings}".encode(), digest_size=8)
        digest.update(json.dumps(sorted(self.augmenter.left_alone)).encode())
        if self.augmenter.masked_words is not None:
            digest.update(models.weights_digest(self.augmenter.masked_words.model).encode())
        if self.filter is not None:
            digest.update(models.weights_digest(self.filter.model).encode())
        vectors: WordVectors | None = self.augmenter.word_vectors
        if vectors is not None:
            digest.update(json.dumps(vectors.words).encode())
            digest.update(vectors.vectors.numpy().tobytes())
        return digest.hexdigest()

    def write(self, output: Path) -> tuple[int, int]:
        """Write the output file, from the blocks that are there already and those that are not.

        Returns:
            The rows that were there before, and their copies.
        """
        state = _processes()
        parts = output.with_name(f".{output.name}.{self.fingerprint}.parts")
        parts.mkdir(parents=True, exist_ok=True)
        self.write_blocks(parts, state.process_index, state.num_processes)
        state.wait_for_everyone()
        copies = 0
        if state.is_main_process:
            copies = self._merge(parts, output)
            for left in output.parent.glob(f".{output.name}.*.parts"):  # also of other settings
                shutil.rmtree(left, ignore_errors=True)
        state.wait_for_everyone()
        return self.rows, copies

    def write_blocks(self, parts: Path, process: int, processes: int) -> None:
        """Make one process's share of the blocks, each written whole or not at all."""
        share = range(process, self._blocks, processes)
        todo = {block for block in share if not (parts / _name(block)).exists()}
        done = sum(self._rows_of(block) for block in share if block not in todo)
        total = sum(map(self._rows_of, share))
        with tqdm(total=total, initial=done, desc="Augmenting", unit="row", disable=None) as bar:
            for block, table in enumerate(self.source.tables(BLOCK)):
                if block in todo:
                    part = parts / f"{_name(block)}.{os.getpid()}"
                    pa.parquet.write_table(self._augment(table, block * BLOCK), part)
                    os.replace(part, parts / _name(block))
                    bar.update(table.num_rows)

    @property
    def _blocks(self) -> int:
        return -(-self.rows // BLOCK)

    def _rows_of(self, block: int) -> int:
        return min(BLOCK, self.rows - block * BLOCK)

    def _augment(self, table: pa.Table, first: int) -> pa.Table:
        """Return rows each followed by its copies, and a column that tells which is which."""
        rows = self.texts(table, first)
        copies = self.augmenter.copies_of(rows, range(first, first + len(rows)))
        if self.filter is not None:
            copies = self.filter.keep(copies, self.filter.labels(table, first))
        origin = np.repeat(np.arange(len(rows)), [1 + len(changed) for changed in copies])
        texts = [row for original, changed in zip(rows, copies, strict=True) for row in (original, *changed)]
        result = table.take(pa.array(origin))
        for place, name in enumerate(self.columns):
            column = table.schema.get_field_index(name)
            result = result.set_column(column, name, pa.array([row[place] for row in texts], pa.string()))
        is_copy = np.diff(origin, prepend=-1) == 0
        return result.append_column(_IS_COPY, pa.array(is_copy))

    def _merge(self, parts: Path, output: Path) -> int:
        """Join the blocks in the order of the rows, without repeated copies; return how many are left."""
        kept, copies = self._first_copies(parts)
        written = output.with_name(f".writing.{output.name}")
        try:
            with open_writer(output, written) as writer:
                for block in range(self._blocks):
                    table = pa.parquet.read_table(parts / _name(block))
                    mine, kept = kept[: len(table)], kept[len(table) :]
                    writer.write(table.drop_columns([_IS_COPY]).filter(pa.array(mine)))
            os.replace(written, output)
        finally:
            written.unlink(missing_ok=True)
        return copies

    def _first_copies(self, parts: Path) -> tuple[np.ndarray, int]:
        """Return which rows of all blocks stay, and how many of these are copies.

        Of equal copies the first stays, and none that is one of the rows. It takes 12 bytes of each.
        """
        collected, flags = bytearray(), bytearray()
        for block in range(self._blocks):
            table = pa.parquet.read_table(parts / _name(block), columns=[*self.columns, _IS_COPY])
            collected += _digests(self.texts(table, 0)).tobytes()
            flags += (~table[_IS_COPY].to_numpy()).tobytes()
        digests, kept = np.frombuffer(collected, np.uint64), np.frombuffer(flags, bool)
        shares, count = digests.view(np.uint8)[::8] % _SHARES, 0
        for share in range(_SHARES):
            places = np.flatnonzero(shares == share)
            copies = places[~kept[places]]
            texts, first = np.unique(digests[copies], return_index=True)
            nearest = self._originals.take(np.searchsorted(self._originals, texts), mode="clip")
            new = copies[first[nearest != texts]]
            kept[new] = True
            count += len(new)
        return kept, count


class _Agreement:
    """Keeps the copies that a teacher still gives the label of their row."""

    def __init__(self, arguments: AugmentArguments, job: AugmentJob, task: Task | None) -> None:
        self.model = models.open_classifier(str(arguments.teacher))
        self.names = models.label_names(self.model.config)
        several = self.model.config.problem_type == "multi_label_classification"
        if several or not self.names:
            does = "multi-label classification" if several else "regression"
            raise InputError(
                f"--keep_if_teacher_agrees asks for the probability of one class, and {arguments.teacher} "
                f"does {does}: leave it out"
            )
        self.tokenizer = models.open_tokenizer(str(arguments.teacher))
        self.model.to(_processes().device)  # type: ignore[arg-type]
        self.task, self.origin = task, job.source.origin
        self.least = arguments.keep_if_teacher_agrees
        self.max_length = row_length(arguments.max_length, "classification", self.model)
        self.column = find_label_column(
            job.source.schema.names, arguments.label_column, job.columns, True, self.origin
        )

    def labels(self, table: pa.Table, first: int) -> np.ndarray:
        """Return the class ids of rows."""
        return class_ids(table, str(self.column), self.names, self.task, self.origin, first)

    def keep(
        self, copies: Sequence[Sequence[tuple[str, ...]]], labels: np.ndarray
    ) -> list[list[tuple[str, ...]]]:
        """Return the copies whose label the teacher gives at least the probability that was asked for."""
        texts = [copy for changed in copies for copy in changed]
        if not texts:
            return [[] for _ in copies]
        wanted = np.repeat(labels, [len(changed) for changed in copies])
        probabilities = class_probabilities(self.model, self.tokenizer, texts, self.max_length)
        agrees = iter(probabilities[np.arange(len(texts)), wanted] >= self.least)
        return [[copy for copy in changed if next(agrees)] for changed in copies]


def _processes() -> PartialState:
    """Return which process this is among those that were launched, on CPUs too.

    accelerate joins processes on CPUs only if it is told that there is nothing else.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def _name(block: int) -> str:
    return f"{block:08}.parquet"


def _digests(rows: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Return 8 bytes a row that tell different texts apart."""

    def digests() -> Iterator[bytes]:
        for row in rows:
            yield hashlib.blake2b("\0".join(row).encode("utf-8", "surrogatepass"), digest_size=8).digest()

    return np.frombuffer(b"".join(digests()), dtype=np.uint64)


def _check_types(source: Source) -> None:
    """Check that blocks of rows, which are Parquet, can hold every column."""
    try:
        pa.parquet.ParquetWriter(pa.BufferOutputStream(), source.schema).close()
    except pa.ArrowException as error:
        raise InputError(f"{source.origin}: {one_line(error)} Leave that column out") from error


def _check_output(output: Path, data: str, *, overwrite: bool) -> None:
    if not output.name.lower().endswith(OUTPUT_ENDINGS):
        raise InputError(f"cannot write {output}: give it one of the endings {', '.join(OUTPUT_ENDINGS)}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise InputError(f"the output {output} exists: name another file, or add --overwrite_output true")
    if output.resolve() == Path(data).resolve():
        raise InputError(f"--output {output} is the file that is read: name another")
    nearest = next(path for path in output.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"cannot write {output}: {nearest} is no writable folder")
