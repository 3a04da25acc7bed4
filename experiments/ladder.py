"""Sizes of students: what they score against how long a text takes; static word vectors as the cheap rival.

    python experiments/ladder.py experiments/main.yaml --data_dir DATA --work_dir WORK --data D... [--plot F]

The rival is model2vec: an encoder's own vectors of its word pieces, cut to 256 by principal components and
averaged, under a logistic regression (of scores: a ridge regression) whose strength is chosen on the rows
that choose. Its result is appended as the way ``static`` if it is not there. For a plot, speed is measured on
models of random weights of the ways' sizes, in turn, one thread, ONNX Runtime with 8 bits; the rival's as it
is used.
It needs ``pip install "tinybert[experiments]"``.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from model2vec import StaticModel
from model2vec.distill import distill_from_model
from run import Experiments, add_options
from sklearn.linear_model import LogisticRegression, Ridge
from tables import read
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tinybert.benchmark import BenchmarkArguments, measure
from tinybert.data import TaskData, load_data
from tinybert.evaluation import score
from tinybert.export import ExportArguments, to_onnx
from tinybert.models import open_task_model, open_tokenizer
from tinybert.student_config import StudentSize, shrink_config

STRENGTHS = [10.0**power for power in range(-3, 4)]
TEXT_PIECES = 32


def static_vectors(encoder: str) -> StaticModel:
    """Return the vectors (pieces, 256) that model2vec makes of an encoder."""
    return distill_from_model(AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder))


def features(vectors: StaticModel, data: TaskData) -> np.ndarray:
    """Return a text's vector (rows, 256); of a pair the difference's size and the product (rows, 512)."""
    first = vectors.encode(list(data.rows["text"]))
    if "text_pair" not in data.rows.column_names:
        return first
    second = vectors.encode(list(data.rows["text_pair"]))
    return np.concatenate([np.abs(first - second), first * second], axis=1)


def answers(model: Any, vectors: np.ndarray) -> np.ndarray:
    """Return what ``score`` takes: log probabilities (rows, C) or scores (rows, 1)."""
    if isinstance(model, Ridge):
        return model.predict(vectors)[:, None]
    return model.predict_log_proba(vectors)


def rival(experiments: Experiments, name: str, vectors: StaticModel) -> dict[str, Any]:
    """Train and score the static vectors on one data set; return the result as run.py notes one."""
    files, reading = experiments.rows_of(name)
    columns = {option: value for option, value in reading.items() if option != "max_length"}
    train = load_data(files["train"], **columns)
    held_to = {"kind": train.kind, "label_names": train.label_names or None}
    choose, report = (load_data(files[part], **columns | held_to) for part in ("choose", "report"))
    started = time.monotonic()
    inputs, choosing = features(vectors, train), features(vectors, choose)
    labels = np.asarray(train.rows["label"])
    tried = []
    for strength in STRENGTHS:
        is_score = train.kind == "regression"
        model: Any = Ridge(alpha=strength) if is_score else LogisticRegression(C=strength, max_iter=2000)
        model.fit(inputs, labels)
        chosen = score(choose, choose.rows, answers(model, choosing))
        tried.append((chosen[train.metric], strength, model, chosen))
    _, strength, model, chosen = max(tried, key=lambda entry: entry[0])
    metrics = score(report, report.rows, answers(model, features(vectors, report)))
    return {
        "experiment": experiments.name,
        "data": name,
        "way": "static",
        "seed": 42,
        "metric": train.metric,
        "score": 100 * metrics[train.metric],
        "metrics": metrics,
        "chosen": chosen,
        "strength": strength,
        "seconds": round(time.monotonic() - started, 1),
        "parameters": int(vectors.embedding.size),
        "commit": experiments.commit,
        "command": ["python", "experiments/ladder.py", f"experiments/{experiments.name}.yaml"],
    }


def sized(experiments: Experiments) -> Iterator[tuple[str, StudentSize]]:
    """Yield the ways that have a size of their own, and the usual one."""
    yield "closed_form", StudentSize()
    names = set(StudentSize.__dataclass_fields__)
    for way, options in experiments.plan["ways"].items():
        if options and set(options) <= names:
            yield way, StudentSize(**options)


def latencies(experiments: Experiments, name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return megabytes, and milliseconds a text alone and of 32 at a time, of the teacher and each size."""
    teacher = experiments.teacher(name)
    config = open_task_model(str(teacher)).config
    ways = {"teacher": config} | {way: shrink_config(config, size) for way, size in sized(experiments)}
    with tempfile.TemporaryDirectory() as folder:
        for way, shape in ways.items():
            path = Path(folder, way)
            AutoModelForSequenceClassification.from_config(shape).save_pretrained(path)
            open_tokenizer(str(teacher)).save_pretrained(path)
            to_onnx(ExportArguments(str(path), int8=True))
        found = measure(
            BenchmarkArguments(
                [str(Path(folder, way)) for way in ways],
                backend=["onnx_int8"],
                length=[TEXT_PIECES],
                rounds=rounds,
                memory=False,
            )
        )
    return {
        Path(row["model"]).name: {"megabytes": row["file_bytes"] / 1e6}
        | {f"ms_{load['batch_size']}": 1e3 * load["p50"] / load["batch_size"] for load in row["loads"]}
        for row in found["rows"]
    }


def static_latency(vectors: StaticModel, rounds: int) -> dict[str, float]:
    """Return the same of the static vectors alone, for texts of as many words."""
    text = " ".join(["film"] * (TEXT_PIECES - 2))
    result = {"megabytes": vectors.embedding.nbytes / 1e6}
    for batch in (1, 32):
        times = []
        for _ in range(20 * rounds):
            started = time.perf_counter()
            vectors.encode([text] * batch)
            times.append(time.perf_counter() - started)
        result[f"ms_{batch}"] = 1e3 * statistics.median(times) / batch
    return result


def draw(scores: dict[str, float], speeds: dict[str, dict[str, float]], label: str, path: Path) -> None:
    """Draw scores against the milliseconds of a text; what nothing faster beats has its name to the left."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for way in scores:
        x, y = speeds[way]["ms_1"], scores[way]
        axes.plot(x, y, "o", color="tab:orange" if way in ("teacher", "static") else "tab:blue")
        name = "4x312" if way == "closed_form" else way
        is_best = all(scores[other] < y for other in scores if speeds[other]["ms_1"] < x)
        place: dict[str, Any] = {"xytext": (-5, 5), "ha": "right"} if is_best else {"xytext": (5, -12)}
        axes.annotate(name, (x, y), textcoords="offset points", **place)
    loads = f"milliseconds a text of {TEXT_PIECES} pieces, one at a time, 8 bits, one thread"
    axes.set(xscale="log", xlabel=loads, ylabel=label)
    axes.margins(x=0.12, y=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="PNG of the first data set's scores against milliseconds")
    options = parser.parse_args()
    experiments = Experiments(options)
    vectors = static_vectors(experiments.places["encoder"])
    for name in experiments.data:
        if (experiments.name, name, "static", "42") not in experiments.finished():
            experiments.append(rival(experiments, name, vectors))
    if options.plot is None:
        return
    first = experiments.data[0]
    speeds = latencies(experiments, first, options.rounds)
    speeds["static"] = static_latency(vectors, options.rounds)
    scores: dict[str, list[float]] = {}
    for result in read(experiments.results)[experiments.name]:
        if result["data"] == first and result["way"] in speeds:
            scores.setdefault(result["way"], []).append(result["score"])
    means = {way: statistics.mean(values) for way, values in scores.items()}
    json.dump({"scores": means, "speeds": speeds}, sys.stdout, indent=1)
    draw(means, speeds, f"{first}, mean of the seeds", options.plot)


if __name__ == "__main__":
    main()
