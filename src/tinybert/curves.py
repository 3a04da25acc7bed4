"""A run's record -> what a page tells of it: each part of the loss, a layer at a time; how it was made."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tinybert.summary import command_line, is_error, misfit, score_text

_MOST_PANELS = 80


def stage_of_page(name: str, stage: Mapping[str, Any], metric: str | None) -> dict[str, Any]:
    """Return a stage as `tinybert.report.render` takes it: ``title``, ``sentences``, ``panels``.

    Args:
        name: Of the stage, as the record has it.
        stage: What the record says of it; what is not as a run leaves it is left out.
        metric: The one that counts, which gets a panel too.
    """
    said = []
    seconds, steps = (
        value if not misfit(value := stage.get(key), float, "") else None for key in ("seconds", "steps")
    )
    errors = stage.get("hidden_errors")
    if name == "closed_form":
        said.append(f"The student was solved from its teacher{_within(seconds)}, before any training.")
        score = (stage.get("metrics") or {}).get(metric) if isinstance(stage.get("metrics"), dict) else None
        if not misfit(score, float, ""):
            said.append(f"As solved it scores {metric} {score_text(score, metric)}.")
        if isinstance(errors, list) and errors and not misfit(errors, [float], ""):
            listed = ", ".join(f"{error:.2f}" for error in errors)
            said.append(f"Relative error of its hidden states, layer by layer: {listed}.")
    elif steps is not None:
        said.append(f"{steps:,.0f} steps{_within(seconds)}.")
    titles = {
        "closed_form": "Closed form",
        "finetune": "Fine-tuning",
        "general": "General distillation",
        "pkd": "Patient knowledge distillation",
    }
    title = titles.get(name, f"{name.replace('_', ' ').capitalize()} stage")
    return {"title": title, "sentences": said, "panels": _panels(stage.get("log"), metric)}


def _within(seconds: float | None) -> str:
    return "" if seconds is None else f" in {seconds:,.0f} s"


def _panels(log: object, metric: str | None) -> list[dict[str, Any]]:
    """Return what a stage's log tells of each loss and of the metric, training and eval rows together."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in log if isinstance(log, list) else []:
        if not isinstance(entry, dict) or misfit(entry.get("step"), int, ""):
            continue
        for key, value in entry.items():
            name = key.removeprefix("eval_")
            is_shown = name.endswith("loss") or "error" in name or (key != name and name == metric)
            if not is_shown or key.startswith("train_") or misfit(value, float, ""):
                continue
            series = found.setdefault(name, {}).setdefault("training" if key == name else "eval", [])
            in_percent = name == metric and not is_error(metric)
            series.append((float(entry["step"]), float(value) * (100 if in_percent else 1)))
    if len([name for name in found if name.endswith("loss")]) == 2:
        found.pop("loss", None)  # there is one part, and this is it again
    names = sorted(found, key=_panel_order)[:_MOST_PANELS]
    return [{"title": _panel_title(name), "series": found[name]} for name in names]


def _panel_order(name: str) -> tuple[int, int, str]:
    kind, number = _part(name)
    order = ["loss", "embedding", "hidden", "attention"]
    return (order.index(kind) if kind in order else len(order), number, kind)


def _part(name: str) -> tuple[str, int]:
    """Split a part's name: ``hidden_2_loss`` is ("hidden", 2)."""
    match = re.fullmatch(r"(.*?)(?:_(\d{1,4}))?(?:_loss)?", name)
    return (match[1], int(match[2] or 0)) if match else (name, 0)


def _panel_title(name: str) -> str:
    kind, number = _part(name)
    titles = {
        "loss": "all parts",
        "embedding": "embeddings",
        "hidden": "hidden states",
        "attention": "attention scores",
        "prediction": "soft labels",
        "gold": "gold labels",
    }
    title = titles.get(kind, kind.replace("_", " "))
    return f"{title}, layer {number}" if number else title


def made_of_page(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's command, data, versions and arguments as `tinybert.report.render` takes them."""
    training = record["training"]
    data = [
        (
            f"{name} rows" if name != "corpus" else name,
            ", ".join(f"{key} {value}" for key, value in about.items()),
        )
        for name, about in record["data"].items()
    ]
    seeds = [(name, str(training[name])) for name in ("seed", "data_seed") if name in training]
    seeds = [(name, seed) for name, seed in seeds if seed != "None"]
    versions = list(record["versions"].items())
    when = [("finished", record["finished"]), ("took", f"{record['seconds']:,.0f} s")]
    groups = {
        "Data, seeds, versions": [*data, *seeds, *versions, *when],
        "Arguments of the command": _entries(record["arguments"]),
        "Training arguments": _entries(training),
    }
    return {
        "command": command_line(record["command"]),
        "groups": [{"title": title, "entries": entries} for title, entries in groups.items() if entries],
    }


def _entries(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in arguments.items()
        if value is not None and not name.endswith("token")
    }
    return [(name, value[:300]) for name, value in sorted(shown.items())]
