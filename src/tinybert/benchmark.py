"""Models and backends side by side on this machine: size, operations, memory, latency, throughput."""

import copy
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from tinybert import models
from tinybert.errors import InputError
from tinybert.flops import forward_flops
from tinybert.footprint import BACKENDS, peak_memory
from tinybert.json_files import check_writable, write_json
from tinybert.sessions import FILES, FOLDER, open_session, runner

_PACKAGES = ("tinybert", "torch", "transformers", "onnxruntime")
_VISIT_SECONDS = 0.25  # how long a model is measured before the next one's turn
_MOST_CALLS = 50  # in one visit
_BUSY = 0.1  # of the time waited, on one thread, above which wall-clock figures mislead


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(metadata={"help": "Model folders; the first is what the others are held to."})
    backend: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "torch, onnx, onnx_int8, or all: those that a folder has files for."},
    )
    batch_size: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Texts at once."})
    length: list[int] = field(
        default_factory=lambda: [16, 64, 128], metadata={"help": "Word pieces of each text."}
    )
    threads: int = field(default=1, metadata={"help": "Threads of the matrix products."})
    rounds: int = field(default=5, metadata={"help": "Times that everything is measured in turn."})
    bf16: bool = field(default=False, metadata={"help": "PyTorch with bfloat16 weights as well."})
    memory: bool = field(default=True, metadata={"help": "Peak memory, each in a process of its own."})
    json: str | None = field(default=None, metadata={"help": "File for all figures."})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not self.models:
            raise InputError("--models is empty: give at least one model folder")
        unknown = [name for name in self.backend if name not in (*BACKENDS, "all")]
        if unknown or not self.backend:
            raise InputError(f"--backend is {unknown or self.backend}: expected {', '.join(BACKENDS)} or all")
        for name in ("batch_size", "length"):
            values = getattr(self, name)
            if not values or not all(1 <= value <= 1 << 16 for value in values):
                raise InputError(f"--{name} is {values}: expected numbers from 1 to {1 << 16}")
        for name in ("threads", "rounds"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise InputError(f"--{name} is {getattr(self, name)}: expected a number from 1 to 10000")


@dataclass
class _Entry:
    """One model on one backend; its file is the ONNX file, or the model's folder."""

    name: str
    backend: str
    file: Path
    model: PreTrainedModel
    run: Callable[[np.ndarray], object]
    seconds: dict[tuple[int, int], list[float]]
    cpu_seconds: dict[tuple[int, int], list[float]]


def measure(arguments: BenchmarkArguments) -> dict[str, Any]:
    """Measure models on backends, in turn within each round, so that a busy machine slows all of them alike.

    Texts are random pieces without padding. The order within a round is drawn anew each time; each turn of a
    model that answers fast starts with a call that is not counted, as the turn before has filled the caches
    with another model.

    Returns:
        ``machine`` (cpu, cores, threads, versions), ``rows`` (a model on a backend each: ``model``,
        ``backend``, ``parameters``, ``file_bytes``, ``peak_bytes``, ``loads``), ``waited`` (on one thread,
        the share of the time that other programs had the core), and ``best``: for each model and load the
        fastest backend. A load has ``batch_size``, ``length``, ``flops``, ``p50`` and ``p90`` (seconds a
        call), ``texts_per_second`` and ``speedup``, times the first row's p50; ``cpu_p50`` and
        ``cpu_speedup`` are the same by the seconds that the processor spent on a call, which other programs
        do not stretch.

    Raises:
        InputError: A folder cannot be read, has no file for a backend, or too few positions; or ``json``
            cannot be written.
    """
    if arguments.json is not None:
        check_writable(Path(arguments.json))
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        entries = [entry for source in arguments.models for entry in _entries(arguments, source)]
        loads = sorted({(batch, length) for batch in arguments.batch_size for length in arguments.length})
        _measure_latency(entries, loads, arguments.rounds)
    finally:
        torch.set_num_threads(threads)
    rows = [_row(entry, loads, entries[0], arguments) for entry in entries]
    result = {"machine": machine(arguments.threads), "rounds": arguments.rounds, "rows": rows}
    result["waited"] = _waited(entries) if arguments.threads == 1 else None
    result["best"] = recommend(rows)
    if arguments.json is not None:
        write_json(Path(arguments.json), result)
    return result


def _entries(arguments: BenchmarkArguments, source: str) -> list[_Entry]:
    model = models.open_whole(source).eval()
    longest = models.positions_of(model.config)
    if max(arguments.length) > longest:
        raise InputError(f"--length is {max(arguments.length)}: {source} reads {longest} pieces at most")
    wanted = set(arguments.backend)
    folder = Path(source, FOLDER)
    if "all" in wanted:
        wanted |= {"torch"} | {name for name, file in FILES.items() if (folder / file).is_file()}
    if arguments.bf16:
        wanted.add("torch_bf16")
    entries = []
    for backend in (name for name in BACKENDS if name in wanted):
        file = folder / FILES[backend] if backend in FILES else Path(source)
        if backend in FILES and not file.is_file():
            option = " --int8" if backend == "onnx_int8" else ""
            raise InputError(
                f"{source} has no {FOLDER}/{file.name}: tinybert export --model {source}{option}"
            )
        run = _onnx_run(file, arguments.threads) if backend in FILES else _torch_run(model, backend)
        entries.append(_Entry(source, backend, file, model, run, {}, {}))
    return entries


def _bytes_of(entry: _Entry) -> int | None:
    """Return the size of a model's weights, in one file or several; None where they are not at hand."""
    files = [entry.file] if entry.backend in FILES else entry.file.glob("*.safetensors")
    return sum(file.stat().st_size for file in files) or None


def _torch_run(model: PreTrainedModel, backend: str) -> Callable[[np.ndarray], object]:
    if backend == "torch_bf16":
        model = copy.deepcopy(model).bfloat16()

    def run(ids: np.ndarray) -> object:
        with torch.inference_mode():
            tokens = torch.from_numpy(ids)
            return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))

    return run


def _onnx_run(file: Path, threads: int) -> Callable[[np.ndarray], object]:
    run = runner(open_session(file, threads))
    return lambda ids: run({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _measure_latency(entries: Sequence[_Entry], loads: Sequence[tuple[int, int]], rounds: int) -> None:
    order = random.Random(0)
    pieces = np.random.default_rng(0)
    most = min(entry.model.config.vocab_size for entry in entries)
    for _ in range(rounds):
        for load in order.sample(list(loads), len(loads)):
            ids = pieces.integers(0, most, load)
            for entry in order.sample(list(entries), len(entries)):
                taken, worked = entry.seconds.setdefault(load, []), entry.cpu_seconds.setdefault(load, [])
                if not taken or taken[-1] < _VISIT_SECONDS:  # nor would it matter to a longer call
                    entry.run(ids)
                end = time.perf_counter() + _VISIT_SECONDS
                for _ in range(_MOST_CALLS):
                    start, start_cpu = time.perf_counter(), time.process_time()
                    entry.run(ids)
                    taken.append(time.perf_counter() - start)
                    worked.append(time.process_time() - start_cpu)
                    if time.perf_counter() > end:
                        break


def _row(
    entry: _Entry, loads: Sequence[tuple[int, int]], first: _Entry, arguments: BenchmarkArguments
) -> dict[str, Any]:
    """Return all figures of a model on a backend."""
    measured = []
    for batch, length in loads:
        taken = entry.seconds[batch, length]
        middle = statistics.median(taken)
        measured.append(
            {
                "batch_size": batch,
                "length": length,
                "flops": forward_flops(entry.model, batch, length),
                "p50": middle,
                "p90": float(np.quantile(taken, 0.9)),
                "cpu_p50": statistics.median(entry.cpu_seconds[batch, length]),
                "calls": len(taken),
                "texts_per_second": batch / middle,
                "speedup": statistics.median(first.seconds[batch, length]) / middle,
                "cpu_speedup": _ratio(first.cpu_seconds[batch, length], entry.cpu_seconds[batch, length]),
            }
        )
    peak = None
    if arguments.memory:
        peak = peak_memory(entry.backend, entry.file, *max(loads), arguments.threads)
    return {
        "model": entry.name,
        "backend": entry.backend,
        "parameters": entry.model.num_parameters(),
        "file_bytes": _bytes_of(entry),
        "peak_bytes": peak,
        "loads": measured,
    }


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(slow) / max(statistics.median(fast), 1e-9)


def _waited(entries: Sequence[_Entry]) -> float:
    """Return the share of the time in which other programs had the core."""
    taken = sum(sum(values) for entry in entries for values in entry.seconds.values())
    worked = sum(sum(values) for entry in entries for values in entry.cpu_seconds.values())
    return max(0.0, 1 - worked / taken)


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on beside the models: CPU, cores, threads, versions."""
    capabilities = torch.cpu.get_capabilities()
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": capabilities.get("num_physical_cores"),
        "vnni": bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni")),
        "bf16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "threads": threads,
        "versions": versions,
    }


def recommend(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each model and load the fastest backend, and how many times as fast as the slowest it is."""
    best = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        for place, load in enumerate(own[0]["loads"]):
            seconds = {row["backend"]: row["loads"][place]["p50"] for row in own}
            fastest = min(seconds, key=seconds.__getitem__)
            best.append(
                {
                    "model": name,
                    "batch_size": load["batch_size"],
                    "length": load["length"],
                    "backend": fastest,
                    "p50": seconds[fastest],
                    "times_slowest": max(seconds.values()) / seconds[fastest],
                }
            )
    return best


def table(result: dict[str, Any]) -> str:
    """Return what ``measure`` found as text: a line a model and backend, the loads, and what to pick."""
    where = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [f"{where['cpu']}, {where['threads']} thread(s); {versions}", ""]
    names = _short_names(row["model"] for row in result["rows"])

    def label(row: dict[str, Any]) -> str:
        return f"{names[row['model']]} {row['backend']}"

    width = max([30, *(len(label(row)) + 1 for row in result["rows"])])
    lines.append(f"{'':{width}}{'parameters':>12}{'file':>11}{'memory':>11}")
    for row in result["rows"]:
        file = "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f} MB"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
        lines.append(f"{label(row):{width}}{row['parameters'] / 1e6:10.2f} M{file:>11}{peak:>11}")
    for place, load in enumerate(result["rows"][0]["loads"]):
        lines += ["", f"batch {load['batch_size']}, length {load['length']}:"]
        heads = f"{'GFLOP':>9}{'p50 ms':>10}{'p90 ms':>10}{'texts/s':>11}{'speed':>9}{'cpu':>9}"
        lines.append(f"{'':{width}}{heads}")
        for row in result["rows"]:
            load = row["loads"][place]
            work = "" if load["flops"] is None else f"{load['flops'] / 1e9:.3f}"
            lines.append(
                f"{label(row):{width}}{work:>9}{1e3 * load['p50']:10.2f}{1e3 * load['p90']:10.2f}"
                f"{load['texts_per_second']:11.1f}{load['speedup']:8.1f}x{load['cpu_speedup']:8.1f}x"
            )
    if (result["waited"] or 0) > _BUSY:
        lines += [
            "",
            f"Other programs had the core for {100 * result['waited']:.0f} % of the time: a call that",
        ]
        lines.append(
            "is long is held up more often than a short one; `cpu` counts a call's own seconds alone."
        )
    lines += ["", "Pick:"]
    for pick in result["best"]:
        lines.append(
            f"  {names[pick['model']]}, batch {pick['batch_size']}, length {pick['length']}: "
            f"{pick['backend']} "
            f"({1e3 * pick['p50']:.2f} ms, {pick['times_slowest']:.1f} times as fast as the slowest)"
        )
    return "\n".join(lines)


def _short_names(sources: Iterable[str]) -> dict[str, str]:
    """Return for each model as much of the end of its path as tells it from the others."""
    parts = {source: Path(source).parts or (source,) for source in sources}
    names = {}
    for source, own in parts.items():
        others = [other for name, other in parts.items() if name != source]
        counts = (n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others))
        names[source] = "/".join(own[-next(counts, len(own)) :])
    return names
