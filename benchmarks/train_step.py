"""A training step of the intermediate stage, four ways in turn in one process.

    python benchmarks/train_step.py [--data_dir GLUE --tokenizer FOLDER] [--json OUT] [--plot OUT.png]

A step is: teacher forward, student forward, loss (embeddings, hidden states, attention scores; uniform
map), backward, clipping, AdamW, gradients to nothing. Teacher: BERT-base's shape; student: TinyBERT-4's;
random weights, which cost what trained ones do. Batches are made before the clock starts.

The ways, a to d, are those of ``ways.py``: the reference's, a plain one, ours in fp32 and in bf16.

Rows with texts take them from the training files of a GLUE folder: ``--batches`` batches at evenly spaced
ranks of a pool of 1,600 random rows sorted by length, as length-grouped sampling makes them; a and b get
the same texts in random order. "SST-2 budget" has batches of up to 4,096 tokens cut from all its rows, c and
d only. Rows with a fixed length T have ``--tokens`` random tokens a step, unpadded.

One round runs every way over all texts of a row, in turn; figures are medians over rounds, of real tokens.
"of matrix rate": model FLOP/s (``floor.model_flops``) over that of torch.matmul at the teacher's shapes and
same precision in the same rounds. "floor", of the last way: a step's matrix products and attention alone
(``floor.Floor``), in bf16 where d is run and in fp32 else: leave d out where the CPU only emulates bf16.
Memory on Linux: resident high-water mark of a fresh process over two steps, and how much of it came on top
of the loaded models; on CUDA the allocator's peak beyond what was held.
"""

import argparse
import csv
import importlib.util
import json
import multiprocessing
import random
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention_loss import cpu_name
from floor import Floor, make_rate, model_flops, optimizer_seconds, seconds_of
from transformers import AutoTokenizer, BertModel
from ways import VARIANTS, Batch, Step, make_step, make_teacher

from tinybert.sampling import TokenBatchSampler
from tinybert.student import make_student

FILES = {"SST-2": ("sentence",), "MRPC": ("sentence1", "sentence2")}
LENGTHS = (64, 128, 256, 512)
ROWS = (*FILES, "SST-2 budget", *(f"T={length}" for length in LENGTHS))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH_SIZE, POOL, REFERENCE_LENGTH, TOKENS_PER_BATCH = 32, 1600, 128, 4096


@dataclass(frozen=True)
class Row:
    """Texts as word-piece ids, already cut into batches of like length, and who runs them."""

    name: str
    groups: list[list[list[int]]]
    padded_length: int
    variants: str = "abcd"
    floor: bool = False


def read_texts(data_dir: Path, tokenizer_dir: Path, name: str, most: int) -> list[list[int]]:
    """Return a random sample of a GLUE training file as word-piece ids, sorted by length."""
    with open(data_dir / name / "train.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = random.Random(0).sample(rows, min(most, len(rows)))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    columns = [[row[column] for row in rows] for column in FILES[name]]
    encoded = tokenizer(*columns, truncation=True, max_length=REFERENCE_LENGTH)
    return sorted(encoded["input_ids"], key=len)


def make_row(name: str, options: argparse.Namespace) -> Row:
    if name.startswith("T="):
        length = int(name.removeprefix("T="))
        draw = random.Random(length)
        batch = [[draw.randrange(1, 30522) for _ in range(length)] for _ in range(options.tokens // length)]
        return Row(name, [batch], length, options.variants, floor=True)
    budget = name == "SST-2 budget"
    most = sys.maxsize if budget else POOL
    texts = read_texts(options.data_dir, options.tokenizer, name.split()[0], most)
    if budget:
        sampler = TokenBatchSampler([len(text) for text in texts], TOKENS_PER_BATCH, seed=0)
        groups = [[texts[row] for row in batch] for batch in sorted(sampler, key=max)]
    else:
        groups = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
    groups = [groups[int((i + 0.5) * len(groups) / options.batches)] for i in range(options.batches)]
    variants = "".join(way for way in options.variants if way in "cd" or not budget)
    return Row(name, groups, REFERENCE_LENGTH, variants)


def batches_of(row: Row, variant: str, device: torch.device | str = "cpu") -> list[Batch]:
    """Return the row's texts as one way batches and pads them."""
    groups = row.groups
    if variant in "ab":
        texts = [text for group in groups for text in group]
        random.Random(0).shuffle(texts)
        shuffled = iter(texts)
        groups = [[next(shuffled) for _ in group] for group in groups]
    batches = []
    for group in groups:
        length = row.padded_length if variant == "a" else max(map(len, group))
        ids = torch.tensor([text + [0] * (length - len(text)) for text in group], device=device)
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return batches


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def peak_in_new_process(variant: str, row: Row, threads: int) -> dict[str, float]:
    """Return a process's resident high-water mark over two steps, and that less what it had, in MiB."""
    torch.set_num_threads(threads)
    step = make_step(variant, make_teacher(torch.device("cpu")))
    batch = max(batches_of(row, variant), key=lambda batch: batch["input_ids"].numel())
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark so far
    before = _status("VmRSS")
    for _ in range(2):  # the second has the optimiser's moments beside the activations
        step(batch)
    return {"process_mib": _status("VmHWM"), "step_mib": _status("VmHWM") - before}


def peak_memory(variant: str, row: Row, step: Step, device: torch.device) -> dict[str, float]:
    """Return the peak memory of one way in MiB, as the top of this file says."""
    if device.type == "cuda":
        batch = max(batches_of(row, variant, device), key=lambda batch: batch["input_ids"].numel())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return {"step_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    if not Path("/proc/self/clear_refs").exists():
        return {}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_in_new_process, (variant, row, torch.get_num_threads()))


def time_rounds(row: Row, teacher: BertModel, steps: dict[str, Step], rounds: int) -> dict[str, list[Any]]:
    """Return what each round took: seconds a way, the matrix rates of their precisions, ``floor`` seconds."""
    device = teacher.device
    batches = {variant: batches_of(row, variant, device) for variant in steps}
    names = {"bf16" if variant == "d" else "fp32" for variant in steps}
    others: dict[str, Any] = {
        name: make_rate(teacher.config, 2048, _DTYPES[name], device) for name in sorted(names)
    }
    if row.floor:
        shapes = (teacher.config, make_student(teacher).config, len(row.groups[0]), row.padded_length)
        dtype = _DTYPES["bf16" if "d" in steps else "fp32"]
        others["floor"] = Floor(*shapes, dtype, device).measure
    taken: dict[str, list[Any]] = {name: [] for name in (*steps, *others)}
    for turn in range(rounds + 1):
        seconds = dict.fromkeys(steps, 0.0)
        for index in range(len(row.groups) if turn else 1):
            for variant, step in steps.items():
                seconds[variant] += seconds_of(partial(step, batches[variant][index]), device)
        now = seconds | {name: measure_other() for name, measure_other in others.items()}
        for name, figure in now.items() if turn else ():  # the first turn warms up
            taken[name].append(figure)
    return taken


def figures(row: Row, variant: str, taken: dict[str, list[Any]], teacher: BertModel) -> dict[str, Any]:
    """Return one way's figures: medians over rounds."""
    lengths = [len(text) for group in row.groups for text in group]
    flops = model_flops(teacher.config, make_student(teacher).config, lengths)
    times, rates = taken[variant], [rate["all"] for rate in taken["bf16" if variant == "d" else "fp32"]]
    median = statistics.median(times)
    result = {
        "row": row.name,
        "way": f"{variant}: {VARIANTS[variant]}",
        "steps": len(row.groups),
        "examples": len(lengths),
        "tokens": sum(lengths),
        "real_share": sum(lengths) / sum(b["input_ids"].numel() for b in batches_of(row, variant)),
        "step_ms": 1000 * median / len(row.groups),
        "examples_per_s": len(lengths) / median,
        "tokens_per_s": sum(lengths) / median,
        "matrix_gflops": statistics.median(rates) / 1e9,
        "of_matrix_rate": statistics.median(flops / t / rate for t, rate in zip(times, rates, strict=True)),
        "round_s": times,
    }
    for other in row.variants.partition(variant)[0]:
        ratios = (theirs / ours for theirs, ours in zip(taken[other], times, strict=True))
        result[f"over_{other}"] = statistics.median(ratios)
    if row.floor and variant == row.variants[-1] and variant in "cd":
        products, attention = zip(*taken["floor"], strict=True)
        result["floor_products_ms"] = 1000 * statistics.median(products)
        result["floor_attention_ms"] = 1000 * statistics.median(attention)
        ratios = (t / sum(floor) for t, floor in zip(times, taken["floor"], strict=True))
        result["over_floor"] = statistics.median(ratios)
    return result


def measure(row: Row, teacher: BertModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one row and return its figures, one dict a way."""
    steps = {variant: make_step(variant, teacher) for variant in row.variants}
    taken = time_rounds(row, teacher, steps, options.rounds)
    results = [figures(row, variant, taken, teacher) for variant in steps]
    for result, (variant, step) in zip(results, steps.items(), strict=True):
        if not options.no_memory:
            result |= peak_memory(variant, row, step, teacher.device)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as a markdown table; a dash where there is none."""
    columns = {
        "row": ("row", "s"),
        "way": ("way", "s"),
        "real tokens": ("real_share", ".0%"),
        "step ms": ("step_ms", ".0f"),
        "examples/s": ("examples_per_s", ".1f"),
        "tokens/s": ("tokens_per_s", ".0f"),
        "times a": ("over_a", ".1f"),
        "of matrix rate": ("of_matrix_rate", ".0%"),
        "floor ms: products": ("floor_products_ms", ".0f"),
        "attention": ("floor_attention_ms", ".0f"),
        "step / floor": ("over_floor", ".2f"),
        "peak MiB": ("process_mib", ".0f"),
        "of it the step": ("step_mib", ".0f"),
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        cells = [format(result[key], spec) if key in result else "-" for key, spec in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot tokens/s of each way over the rows, logarithmic."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(result["row"] for result in results))
    ways = sorted({result["way"] for result in results})
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for place, way in enumerate(ways):
        speeds = {result["row"]: result["tokens_per_s"] for result in results if result["way"] == way}
        width = 0.8 / len(ways)
        at = [rows.index(row) + (place - (len(ways) - 1) / 2) * width for row in speeds]
        axes.bar_label(axes.bar(at, speeds.values(), width, label=way), fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_yscale("log")
    axes.set_ylabel("real tokens / s")
    figure.legend(loc="outside upper center", ncols=len(ways), fontsize=8)  # tall bars stay in sight
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, help="GLUE folder: SST-2/train.tsv, MRPC/train.tsv")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer, for the rows with texts")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all that the data allow unless given")
    parser.add_argument("--variants", default="abcd", help="ways to run, such as 'ad'")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--batches", type=int, default=4, help="batches a round in the rows with texts")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step in the rows of fixed length")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice unless given")
    parser.add_argument("--no_memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them to this file (matplotlib)")
    options = parser.parse_args()
    has_texts = options.data_dir is not None and options.tokenizer is not None
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib: pip install "tinybert[report]"')
    options.rows = options.rows or [row for row in ROWS if has_texts or row.startswith("T=")]
    if not has_texts and not all(row.startswith("T=") for row in options.rows):
        parser.error("rows with texts need --data_dir and --tokenizer")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    teacher = make_teacher(torch.device(options.device))
    results = [
        result for name in options.rows for result in measure(make_row(name, options), teacher, options)
    ]
    measure_optimizer = optimizer_seconds(make_student(teacher).to(teacher.device), teacher.device)
    parts = [measure_optimizer() for _ in range(options.rounds + 1)][1:]
    milliseconds = {name: 1000 * statistics.median(part[name] for part in parts) for name in parts[0]}
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    facts = {"device": device, "threads": torch.get_num_threads(), "rounds": options.rounds}
    print("; ".join(f"{name}: {fact}" for name, fact in facts.items()))
    print(table(results))
    print("\nms a step: " + "; ".join(f"{name} {value:.1f}" for name, value in milliseconds.items()))
    if options.json:
        options.json.write_text(
            json.dumps({**facts, "optimizer_ms": milliseconds, "results": results}, indent=1) + "\n"
        )
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
