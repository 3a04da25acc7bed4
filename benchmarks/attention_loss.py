"""Time, memory and accuracy of the two forms of the attention loss: with the T x T scores, and without.

    OMP_NUM_THREADS=1 python benchmarks/attention_loss.py [--ragged] [--json OUT]

Every row has the same number of tokens, cut into sequences of another length T. The two forms run in turn
in one process, so that a busy machine slows both. The scores agree to about 10 % and the loss is small,
as late in training: the harder case for the form without scores, which subtracts large sums. Errors are
relative to float64 (Frobenius norm). bf16 means bf16 inputs under autocast: gradients come back in bf16
too, whose rounding alone is 1.7e-3.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tinybert.losses import attention_loss

HEADS, STUDENT_SIZE, TEACHER_SIZE = 12, 26, 64
STUDENT_SCALING, TEACHER_SCALING = STUDENT_SIZE**-0.5, TEACHER_SIZE**-0.5
LENGTHS = (32, 64, 96, 128, 256, 512)
GRAM_ONLY_LENGTHS = (1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_states(tokens: int, length: int, ragged: bool) -> tuple[list[Tensor], Tensor]:
    """Return queries and keys of student and teacher, (B, h, T, d_k) in float32, and a mask (B, T)."""
    torch.manual_seed(0)
    batch = tokens // length
    noise, tensors = 0.1, []
    for _ in ("queries", "keys"):
        shared = torch.randn(batch, length, HEADS, STUDENT_SIZE)
        spread = torch.nn.init.orthogonal_(torch.empty(TEACHER_SIZE, STUDENT_SIZE))
        student = (shared + noise * torch.randn_like(shared)) * (TEACHER_SCALING / STUDENT_SCALING) ** 0.5
        teacher = shared @ spread.T + noise * torch.randn(batch, length, HEADS, TEACHER_SIZE)
        tensors.append((student.transpose(1, 2), teacher.transpose(1, 2)))
    lengths = torch.randint(length // 4, length + 1, (batch, 1)) if ragged else torch.full((batch, 1), length)
    student_and_teacher = [tensor for pair in zip(*tensors, strict=True) for tensor in pair]
    return student_and_teacher, (torch.arange(length) < lengths).long()


def loss_of(form: str, states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    return attention_loss(
        *states,
        attention_mask,
        student_scaling=STUDENT_SCALING,
        teacher_scaling=TEACHER_SCALING,
        form=form,
    )


def exact(states: Sequence[Tensor], attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients in float64, head by head, from the scores themselves."""
    student_queries, student_keys, teacher_queries, teacher_keys = (state.double() for state in states)
    lengths = attention_mask.sum(dim=-1)
    entries = HEADS * lengths.square().sum()
    grad_queries, grad_keys = torch.zeros_like(student_queries), torch.zeros_like(student_keys)
    loss = torch.zeros((), dtype=torch.float64)
    for example, length in enumerate(lengths.tolist()):
        for head in range(HEADS):
            at = (example, head, slice(length))
            difference = STUDENT_SCALING * student_queries[at] @ student_keys[at].T
            difference -= TEACHER_SCALING * teacher_queries[at] @ teacher_keys[at].T
            loss += difference.square().sum() / entries
            grad_queries[at] = 2 * STUDENT_SCALING / entries * difference @ student_keys[at]
            grad_keys[at] = 2 * STUDENT_SCALING / entries * difference.T @ student_queries[at]
    return loss, grad_queries, grad_keys


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most memory that ``step`` holds beyond what was held before, by the allocator's count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def measure(length: int, precision: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the figures of one row of the table."""
    states, attention_mask = make_states(options.tokens, length, options.ragged)
    states = [state.to(DTYPES[precision]) for state in states]
    learned = [state.requires_grad_() for state in states[:2]]
    truth = exact([state.detach() for state in states], attention_mask)
    forms = ("gram",) if length in GRAM_ONLY_LENGTHS else ("direct", "gram")
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    row: dict[str, object] = {"length": length, "precision": precision}

    def step(form: str) -> Tensor:
        for state in learned:
            state.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(form, states, attention_mask)
        loss.backward()
        return loss.detach()

    for repeat in range(options.repeats + 1):
        for form in forms:
            start = time.perf_counter()
            loss = step(form)
            if repeat:  # the first round warms up
                seconds[form].append(time.perf_counter() - start)
            else:
                row[f"{form}_value_error"] = relative_error(loss, truth[0])
                gradients = zip(learned, truth[1:], strict=True)
                row[f"{form}_gradient_error"] = max(relative_error(s.grad, true) for s, true in gradients)
    for form in forms:
        row[f"{form}_ms"] = 1000 * statistics.median(seconds[form])
        row[f"{form}_peak_mb"] = peak_bytes(lambda form=form: step(form)) / 1e6
    if "direct" in forms:
        row["speed_up"] = statistics.median(
            direct / gram for direct, gram in zip(seconds["direct"], seconds["gram"], strict=True)
        )
    return row


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a markdown table; a dash where a form was not run."""
    columns = {
        "T": ("length", "d"),
        "precision": ("precision", "s"),
        "direct ms": ("direct_ms", ".0f"),
        "Gram ms": ("gram_ms", ".0f"),
        "direct / Gram": ("speed_up", ".2f"),
        "direct MB": ("direct_peak_mb", ".0f"),
        "Gram MB": ("gram_peak_mb", ".0f"),
        "direct value err": ("direct_value_error", ".1e"),
        "Gram value err": ("gram_value_error", ".1e"),
        "direct grad err": ("direct_gradient_error", ".1e"),
        "Gram grad err": ("gram_gradient_error", ".1e"),
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [format(row[key], spec) if key in row else "-" for key, spec in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in every row, padding included")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--ragged", action="store_true", help="lengths between T / 4 and T, rest padding")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = [
        measure(length, precision, options) for precision in DTYPES for length in LENGTHS + GRAM_ONLY_LENGTHS
    ]
    facts = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": options.tokens,
        "ragged": options.ragged,
        "shape": f"{HEADS} heads, head size {STUDENT_SIZE} (student) and {TEACHER_SIZE} (teacher)",
    }
    print("; ".join(f"{name}: {fact}" for name, fact in facts.items()))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
