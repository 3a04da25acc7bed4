"""A run directory -> its report.html: what the record says, and what both models show where they are."""

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert import models
from tinybert.attention_maps import attention_maps
from tinybert.corpus import open_corpus
from tinybert.curves import made_of_page, stage_of_page
from tinybert.data import TaskData, load_data, tokenize
from tinybert.disagreements import disagreements, error_of_difference, shown_texts
from tinybert.errors import InputError, one_line
from tinybert.evaluation import predict_logits, score
from tinybert.mapping import layer_map
from tinybert.model_card import is_unedited, model_card
from tinybert.report import render
from tinybert.rows import row_length
from tinybert.run_directory import PAGE, Figures, Result, Run, file_size, write_whole
from tinybert.served import onnx_lines, onnx_logits, tradeoff, with_latencies
from tinybert.summary import (
    RECORD,
    Line,
    cells,
    misfit,
    model_lines,
    read_record,
    run_kind,
    verdict,
    with_retention,
)
from tinybert.vocabulary import vocabulary_difference

logger = logging.getLogger(__name__)

MOST_EVAL_ROWS = 1000  # that both models are run on again for the rows they answer differently

_ROWS = {
    "text_columns": ([str], None),
    "label_column": (str, None),
    "label_columns": ([str], None),
    "max_length": int,
    "stride": (int, None),
}
_CORPUS = {"teacher": str, "corpus": [str], "eval_corpus": ([str], None), "text_column": (str, None)}
_CHARACTERS = 20_000  # of a corpus: sentences for a few maps


@dataclass
class ReportArguments:
    """Which run, and what to set beside it."""

    run: str = field(metadata={"help": "Output folder of a finished run; also given without --run."})
    baseline: str | None = field(
        default=None, metadata={"help": "Run to set beside it, such as a small model without a teacher."}
    )
    benchmark: str | None = field(
        default=None, metadata={"help": "What tinybert benchmark --json wrote of the run, its teacher ..."}
    )


@dataclass(frozen=True)
class Comparison:
    """Both models of a distillation and what they said of its eval rows.

    Attributes:
        data: The rows, labelled.
        rows: The same, tokenised; where a token has logits of its own, both models have the same tokens.
        teacher: The teacher.
        student: The student.
        tokenizers: The teacher's and the student's, mostly the same.
        teacher_logits: Of ``predict_logits``.
        student_logits: Likewise.
        is_part: Whether the rows are only some of those the record's scores are from.
    """

    data: TaskData
    rows: Dataset
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    teacher_logits: np.ndarray
    student_logits: np.ndarray
    is_part: bool = False


def report(arguments: ReportArguments) -> Path:
    """Write the report of a finished run into its directory, and its model card unless that was edited.

    Where the teacher and the eval rows still are what they were, both models are run on the rows again.

    Returns:
        The page's path.

    Raises:
        InputError: It is no run, its record is damaged, or the baseline's is.
    """
    folder = Path(arguments.run)
    record = read_record(folder)
    lines, notes = _lines(folder, record, arguments)
    comparison: Comparison | str = "this run has no teacher to compare with."
    attention = None
    if run_kind(record) == "general":
        comparison = "a run on text without labels has no rows that both models answer."
        attention = _maps_of_corpus(folder, record)
    elif run_kind(record) == "distill":
        try:
            comparison = _compare(folder, record)
        except InputError as error:
            comparison = one_line(error)
    try:
        lines = _with_onnx_scores(folder, record, lines, comparison)
    except InputError as error:
        notes.append(f"The ONNX files were not scored: {one_line(error)}")
    _write(folder, record, lines, notes, comparison, attention)
    return folder / PAGE


def publish(
    run: Run,
    compared: Comparison,
    metric: str,
    data: dict[str, dict[str, str]],
    *,
    made_by: str,
    export: Callable[[Path], str] | None = None,
) -> Result:
    """Score both models of a distillation, fill its run directory with the student, and write the report.

    Args:
        run: The run, its stages done.
        compared: Both models and what they say of the eval rows.
        metric: The one that counts.
        data: Where the rows are from, for the record.
        made_by: What the student is called in tables.
        export: Makes other files of the student in its folder, which the report scores, and describes them.

    Raises:
        Rejected: Of ``export``; the student and the report are in their place.
    """
    figures = tuple(
        Figures(
            name,
            score(compared.data, compared.rows, logits),
            model.num_parameters(),
            file_size(model),
            seconds,
        )
        for name, model, logits, seconds in (
            ("teacher", compared.teacher, compared.teacher_logits, None),
            (made_by, compared.student, compared.student_logits, run.seconds()),
        )
    )
    result = run.finish(compared.student, compared.tokenizers[1], metric, figures, data)
    if not run.is_main:
        return result
    try:
        return result if export is None else replace(result, files=export(run.folder))
    finally:
        report_of_run(run.folder, compared)


def report_of_run(folder: Path, comparison: Comparison) -> None:
    """Write the report of a run that has just been published; whatever goes wrong is a warning.

    The student is in its place by then: nothing that a page needs is worth losing a run for. How sure the
    difference of the two scores is goes into the record: a later report has not all rows' logits at hand.
    """
    try:
        record = read_record(folder)
        both = comparison.teacher_logits, comparison.student_logits
        error = error_of_difference(comparison.data, comparison.rows, str(record["metric"]), *both)
        if math.isfinite(error):
            record["error_of_difference"] = error
            text = json.dumps(record, indent=2) + "\n"
            write_whole(folder, lambda temporary: (temporary / RECORD).write_text(text, encoding="utf-8"))
        lines = model_lines(record)
        lines = _with_onnx_scores(folder, record, lines + onnx_lines(folder, lines[-1]), comparison)
        _write(folder, record, lines, [], comparison)
    except Exception as error:
        logger.warning("no report was written (%s); tinybert report %s writes one", one_line(error), folder)


def _lines(
    folder: Path, record: Mapping[str, Any], arguments: ReportArguments
) -> tuple[list[Line], list[str]]:
    """Return all models of the table, and what is to be said under it."""
    *before, made = model_lines(record)
    folders = {made.name: folder}
    for name, option in (("teacher", "teacher"), ("before", "model")):
        source = record["arguments"].get(option)
        if isinstance(source, str) and any(line.name == name for line in before):
            folders[name] = Path(source)
    lines, notes = before, []
    if arguments.baseline is not None:
        lines.append(_baseline(Path(arguments.baseline), record))
        folders[lines[-1].name] = Path(arguments.baseline)
    lines += [made, *onnx_lines(folder, made)]
    if arguments.benchmark is not None:
        lines, note = with_latencies(lines, Path(arguments.benchmark), folders)
        notes.append(note)
    return lines, notes


def _with_onnx_scores(
    folder: Path, record: Mapping[str, Any], lines: list[Line], comparison: Comparison | str
) -> list[Line]:
    """Return the lines with the scores of the ONNX files, where there are any, on the run's eval rows.

    Raises:
        InputError: They cannot be run, or the rows are not there any more.
    """
    made = model_lines(record)[-1]
    if record["metric"] is None or not onnx_lines(folder, made):
        return lines
    if isinstance(comparison, Comparison) and not comparison.is_part:
        data, rows, tokenizer = comparison.data, comparison.rows, comparison.tokenizers[1]
    elif run_kind(record) == "general":
        raise InputError(str(comparison))
    else:
        model = models.open_task_model(str(folder))
        data = _eval_rows(record, model)
        tokenizer = models.open_tokenizer(str(folder), kind=data.kind)
        rows = _tokens(record, data, tokenizer, model)
    found = onnx_logits(folder, made, rows, tokenizer)
    scores = {name: score(data, rows, logits)[record["metric"]] for name, logits in found.items()}
    return [replace(line, score=scores.get(line.name, line.score)) for line in lines]


def _baseline(folder: Path, run: Mapping[str, Any]) -> Line:
    """Return the line of a run to set beside another.

    Raises:
        InputError: It was not scored by the same metric on the same rows.
    """
    record = read_record(folder)
    if record["metric"] != run["metric"]:
        raise InputError(
            f"the baseline {folder} was scored by {record['metric']}, the run by {run['metric']}: give one "
            "of the same task"
        )
    own, other = (each["data"].get("eval", {}) for each in (run, record))
    if own.get("fingerprint") != other.get("fingerprint"):
        raise InputError(
            f"the baseline {folder} was scored on other rows ({other.get('source')}) than the run "
            f"({own.get('source')}): give one with the same --eval"
        )
    name = "fine-tuned only" if run_kind(record) == "finetune" else f"baseline {folder.resolve().name}"
    return replace(model_lines(record)[-1], name=name)


def _write(
    folder: Path,
    record: Mapping[str, Any],
    lines: Sequence[Line],
    notes: list[str],
    comparison: Comparison | str,
    attention: dict[str, Any] | None = None,
) -> None:
    metric, name = record["metric"], folder.resolve().name
    lines = with_retention(lines, metric)
    results: dict[str, Any] = {
        "name": name,
        "stages": [stage_of_page(name, stage, metric) for name, stage in record["stages"].items()],
        "made": made_of_page(record),
        "tradeoff": tradeoff(lines, metric),
        **_evidence(record, comparison),
    }
    results["attention"] = attention or results["attention"]
    header, rows = cells(lines, metric)
    results["table"] = {"header": header, "rows": rows, "notes": notes}
    results["verdict"] = verdict(record, lines)
    pages = {PAGE: render(results)}
    card = folder / "README.md"
    if card.is_file() and is_unedited(card.read_text(encoding="utf-8", errors="replace")):
        pages[card.name] = model_card(record, lines, name, _architecture(folder))

    def write(temporary: Path) -> None:
        for page, text in pages.items():
            (temporary / page).write_bytes(text.encode("utf-8", "replace"))

    write_whole(folder, write)


def _architecture(folder: Path) -> str:
    architectures = models.open_config(str(folder)).architectures or [""]
    return str(architectures[0])


def _compare(folder: Path, record: Mapping[str, Any]) -> Comparison:
    """Open both models of a distillation and run them on its eval rows.

    Raises:
        InputError: Something it takes is not there any more, or not what it was.
    """
    source = record["arguments"]["teacher"]
    if not isinstance(source, str):
        raise InputError("the arguments in run.json are damaged ('teacher' is no text).")
    teacher, student = (models.open_task_model(each) for each in (source, str(folder)))
    data = _eval_rows(record, student)
    is_part = len(data.rows) > MOST_EVAL_ROWS
    if is_part:
        data = replace(data, rows=data.rows.select(range(MOST_EVAL_ROWS)))
    teacher_tokenizer, tokenizer = (
        models.open_tokenizer(each, kind=data.kind) for each in (source, str(folder))
    )
    tokenizers = teacher_tokenizer, tokenizer
    teacher_rows, rows = (_tokens(record, data, each, teacher, student) for each in tokenizers)
    teacher_logits = predict_logits(teacher, teacher_rows, teacher_tokenizer, description="Teacher")
    logits = predict_logits(student, rows, tokenizer, description="Student")
    return Comparison(data, rows, teacher, student, tokenizers, teacher_logits, logits, is_part)


def _eval_rows(record: Mapping[str, Any], model: PreTrainedModel) -> TaskData:
    """Read a run's eval rows again, as its model names labels.

    Raises:
        InputError: They are not there any more, or not what they were.
    """
    arguments = record["arguments"]
    source = arguments.get("data" if run_kind(record) == "prune" else "eval")
    wrong = misfit(arguments, _ROWS, "it") or misfit(source, str, "its name for the eval rows")
    if wrong:
        raise InputError(f"the arguments in run.json are damaged ({wrong}).")
    kind, names = models.task_of(model)
    columns = {name: arguments[name] for name in ("text_columns", "label_column", "label_columns")}
    data = load_data(source, split="validation", kind=kind, label_names=names or None, **columns)
    if data.fingerprint != record["data"].get("eval", {}).get("fingerprint"):
        raise InputError(f"the rows of {source} are not those of the run any more.")
    return data


def _tokens(
    record: Mapping[str, Any], data: TaskData, tokenizer: PreTrainedTokenizerBase, *readers: PreTrainedModel
) -> Dataset:
    arguments = record["arguments"]
    max_length = row_length(arguments["max_length"], data.kind, *readers)
    return tokenize(data, tokenizer, max_length, arguments["stride"])


def _evidence(record: Mapping[str, Any], comparison: Comparison | str) -> dict[str, Any]:
    """Return the sections ``disagreements`` and ``attention``, or why there are none."""
    if isinstance(comparison, str):
        return {name: {"reason": comparison} for name in ("disagreements", "attention")}
    data = comparison.data
    found = disagreements(data, comparison.rows, comparison.teacher_logits, comparison.student_logits)
    if comparison.is_part:
        found["sentences"].append(f"These are the first {len(data.rows):,} eval rows.")
    difference = vocabulary_difference(comparison.tokenizers[1], comparison.tokenizers[0])
    if difference is None:
        pair = comparison.teacher, comparison.student
        maps = _maps(record, pair, comparison.tokenizers[1], shown_texts(data), found["places"])
    else:
        maps = {"reason": f"they have {difference}."}
    return {"disagreements": found, "attention": maps}


def _maps(
    record: Mapping[str, Any],
    pair: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    places: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the maps of teacher and student on a few rows, or why there are none."""
    words = re.findall(r"\w+", str(record["training"].get("layer_map", "uniform")))
    strategy = [int(word) for word in words] if all(map(str.isdecimal, words)) else " ".join(words)
    depths = [model.config.num_hidden_layers for model in reversed(pair)]
    is_compiled = bool(record["training"].get("torch_compile"))
    try:
        mapped = layer_map(strategy, *depths)
        return attention_maps(*pair, tokenizer, rows, mapped, places, is_compiled=is_compiled)
    except InputError as error:
        return {"reason": one_line(error)}


def _maps_of_corpus(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the maps of a general distillation, on the head of its text, or why there are none."""
    arguments = record["arguments"]
    try:
        wrong = misfit(arguments, _CORPUS, "it")
        if wrong:
            raise InputError(f"the arguments in run.json are damaged ({wrong}).")
        pair = models.open_encoder(arguments["teacher"]), models.open_encoder(str(folder))
        sources = arguments["eval_corpus"] or arguments["corpus"]
        texts, _ = open_corpus(sources, text_column=arguments["text_column"]).head(0, _CHARACTERS)
        rows = Dataset.from_dict({"text": [text for text in texts if text]})
        return _maps(record, pair, models.open_tokenizer(str(folder)), rows)
    except InputError as error:
        return {"reason": one_line(error)}
