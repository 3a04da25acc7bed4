"""A run's record -> the README.md of its model folder, as the Hugging Face Hub reads it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from tinybert.summary import (
    RECORD,
    Line,
    cells,
    command_line,
    eval_rows,
    has_chosen,
    is_error,
    misfit,
    run_kind,
    size_text,
    verdict,
)

_MARK = "<!-- Written by tinybert, which leaves an edited card alone. sha256 of the above: {digest} -->\n"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def origins(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the hub names that a run stands on, where it stands on any: ``base_model`` and ``dataset``.

    To be asked while the run's inputs are at hand: what is no path now is a hub name. A teacher that was
    fine-tuned here hands on the base model of its own record.
    """
    found = {}
    source = arguments.get("teacher") or arguments.get("model")
    if isinstance(source, str):
        base = source if _HUB_NAME.fullmatch(source) and not Path(source).exists() else _recorded_base(source)
        found["base_model"] = base or ""
    data = arguments.get("train")
    if isinstance(data, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", data) and not Path(data).exists():
        owner, *rest = data.split("/")
        found["dataset"] = "nyu-mll/glue" if owner == "glue" else "/".join((owner, *rest[:1]))
    return {name: value for name, value in found.items() if value}


def _recorded_base(folder: str) -> str | None:
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        base = record["origins"]["base_model"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return base if isinstance(base, str) and _HUB_NAME.fullmatch(base) else None


def pipeline_task(architecture: str) -> str:
    """Return the Hub's name for what a model class does."""
    for ending, task in (
        ("SequenceClassification", "text-classification"),
        ("TokenClassification", "token-classification"),
        ("QuestionAnswering", "question-answering"),
        ("MaskedLM", "fill-mask"),
    ):
        if architecture.endswith(ending):
            return task
    return "feature-extraction"


def model_card(record: Mapping[str, Any], lines: Sequence[Line], name: str, architecture: str) -> str:
    """Return the card of a run's model.

    Args:
        record: Of the run.
        lines: The models to compare, the one this card is of among them.
        name: What the model is called.
        architecture: Its class in transformers.
    """
    task, metric = pipeline_task(architecture), record["metric"]
    header, rows = cells(lines, metric)
    table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table_text = "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in table)
    limits = "\n".join(f"- {limit}" for limit in _limits(record, lines))
    text = f"""---
{_metadata(record, lines, name, task)}
---

# {_plain(name)}

{" ".join(_plain(sentence) for sentence in verdict(record, lines))}

{table_text}

## Use

```python
{_usage(task, json.dumps(name))}
```

## Limits

{limits}

## How it was made

{_made(record)}

```
{_fenced(command_line(record["command"]))}
```

Versions, seeds, all arguments, losses of every stage and fingerprints of the data: `run.json`.
"""
    return text + _MARK.format(digest=_digest(text))


def _usage(task: str, name: str) -> str:
    """Return code that opens a model; transformers 5 has no pipeline for questions on a text."""
    if task == "question-answering":
        return (
            "from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f"model = AutoModelForQuestionAnswering.from_pretrained({name})"
        )
    opened = f'model = pipeline("{task}", model={name})  # or wherever this folder is'
    return f"from transformers import pipeline\n\n{opened}"


def is_unedited(card: str) -> bool:
    """Return whether a card is as ``model_card`` wrote it."""
    text, start, _ = card.rpartition("<!-- Written by tinybert")
    return bool(start) and card == text + _MARK.format(digest=_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _plain(text: str) -> str:
    """Return a text on one line, with what Markdown or HTML would read as its own escaped."""
    return re.sub(r"([\\`*\[\]<>|#]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    return text.replace("```", "'''")


def _metadata(record: Mapping[str, Any], lines: Sequence[Line], name: str, task: str) -> str:
    made = next(line for line in lines if line.name == record["models"][-1]["name"])
    metric, known = record["metric"], record.get("origins", {})
    known = {} if misfit(known, {str: str}, "") else known
    results = None
    if made.score is not None and metric is not None:
        source = _file_name(record, "eval") or _file_name(record, "corpus") or "held-out text"
        data = known.get("dataset") or source
        value = round(made.score, 4)
        results = [
            EvalResult(
                task_type=task,
                dataset_type=data,
                dataset_name=source,
                metric_type=metric,
                metric_value=value,
            )
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        base_model=known.get("base_model"),
        datasets=[known["dataset"]] if "dataset" in known else None,
        metrics=[metric] if results else None,
        tags=["tinybert", *_way(record)],
        model_name=name,
        eval_results=results,
    ).to_yaml()


def _way(record: Mapping[str, Any]) -> list[str]:
    """Return what was done to the model as the Hub's users search for it; nothing of plain fine-tuning."""
    kind = run_kind(record)
    if kind == "finetune" or record["arguments"].get("baseline") == "finetune":
        return []
    return ["pruning" if kind == "prune" else "distillation"]


def _file_name(record: Mapping[str, Any], part: str) -> str:
    """Return the name of a set of rows without the folders it lies in."""
    source = str(record["data"].get(part, {}).get("source", ""))
    return Path(source).name if source.strip("/.") else ""


def _limits(record: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    arguments, limits = record["arguments"], []
    rows = str(record["data"].get("train", {}).get("rows", ""))
    train = _plain(_file_name(record, "train"))
    if train:
        count = f" ({rows} rows)" if rows.isdigit() else ""
        limits.append(
            f"It learned from {train}{count}: on text of another kind measure it before you trust it."
        )
    done = "scored" if run_kind(record) == "prune" else "trained and scored"
    if isinstance(arguments.get("max_length"), int) and record["metric"] is not None:
        limits.append(f"It was {done} on at most {arguments['max_length']} word pieces a row.")
    if run_kind(record) == "distill" and arguments.get("baseline") != "finetune":
        limits.append("It imitates its teacher, the teacher's mistakes and biases included.")
    if run_kind(record) == "general":
        limits.append("It has no head for a task yet: fine-tune it, or `tinybert distill --student` with it.")
    if run_kind(record) == "prune":
        limits.append(
            "Nothing was trained after it was made smaller: `tinybert distill` or `finetune` comes next."
        )
        if "pieces" in record["removed"]:
            limits.append(
                "Text unlike that its word pieces were chosen by takes more of them, and is answered worse."
            )
    elif eval_rows(record) and not is_error(record["metric"]) and has_chosen(record):
        limits.append("The rows it was scored on also chose the checkpoint.")
    if any("int8" in line.name for line in lines):
        limits.append("The int8 file answers some rows otherwise than the float32 weights; see the table.")
    return limits


def _made(record: Mapping[str, Any]) -> str:
    arguments, kind = record["arguments"], run_kind(record)
    if isinstance(arguments.get("baseline"), str):
        return f"Made with tinybert to measure distillation against ({_plain(arguments['baseline'])})."
    if kind == "prune":
        return f"Made smaller from `{_fenced(Path(str(arguments.get('model', ''))).name)}` with tinybert."
    if kind == "finetune":
        return "Fine-tuned on labelled rows with tinybert."
    taught = "on text without labels" if kind == "general" else "for one task"
    teacher = Path(str(arguments.get("teacher", ""))).name
    size = next(
        (size_text(model["file_size"]) for model in record["models"] if model["name"] == "teacher"), ""
    )
    about = f"`{_fenced(teacher)}`" + (f", {size}" if size else "")
    return f"Distilled {taught} from a teacher ({about}) with tinybert, after TinyBERT (Jiao et al. 2020)."
