"""How near a closed-form student is to its teacher on text it was not solved on, and what solving costs.

    python benchmarks/closed_form.py --teacher FOLDER --calibration FILE --held_out FILE [--tokens 32768]

Relative error of layer m: sum |h_S W - h_T|^2 / sum |h_T - mean h_T|^2 over the held-out tokens (1 = no
better than the mean), through the basis (W puts each student unit where it came from, 0 elsewhere) and
through the best linear map (least squares with a bias, on the held-out states themselves).
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tinybert.capture import capture
from tinybert.closed_form import solve_student
from tinybert.mapping import layer_map
from tinybert.models import open_encoder, open_tokenizer
from tinybert.student import StudentSize, make_student


def blocks(
    path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int
) -> list[dict[str, Tensor]]:
    """Cut a text file into batches of 16 full blocks, paragraphs joined, until there are enough tokens."""
    ids: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= tokens:
                break
    body = length - 2
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = [[first, *ids[i : i + body], last] for i in range(0, len(ids) - body + 1, body)]
    stacked = torch.tensor(rows)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in stacked.split(16)]


def errors(teacher, student, batches, mapping, basis) -> Iterator[tuple[float, float]]:
    """Yield the relative error of each layer 0..M, through the basis and through the best linear map."""
    states: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(mapping) + 1)]
    with torch.no_grad():
        for batch in batches:
            its, mine = capture(teacher, batch, scores=False), capture(student, batch, scores=False)
            for m, g in enumerate((0, *mapping)):
                states[m].append((mine.hidden[m].flatten(0, 1), its.hidden[g].flatten(0, 1)))
    for layer in states:
        own, goal = (torch.cat(part).double() for part in zip(*layer, strict=True))
        spread = (goal - goal.mean(0)).square().sum()
        placed = torch.zeros_like(goal)
        placed[:, basis] = own
        own = torch.nn.functional.pad(own, (0, 1), value=1.0)
        gram = own.T @ own
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        fitted = own @ torch.linalg.solve(gram, own.T @ goal)
        yield (
            ((placed - goal).square().sum() / spread).item(),
            ((fitted - goal).square().sum() / spread).item(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--held_out_tokens", type=int, default=20000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=312)
    parser.add_argument("--intermediate_size", type=int, default=1200)
    parser.add_argument("--layer_map", nargs="+", default=["uniform"])
    parser.add_argument("--ridge", type=float, default=1e-2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    teacher, tokenizer = open_encoder(options.teacher).eval(), open_tokenizer(options.teacher)
    strategy = options.layer_map
    explicit = [int(entry) for entry in strategy] if strategy[0].isdigit() else strategy[0]
    mapping = layer_map(explicit, options.layers, teacher.config.num_hidden_layers)
    size = StudentSize(options.layers, options.hidden_size, options.intermediate_size)
    held_out = blocks(options.held_out, tokenizer, options.held_out_tokens, options.length)
    print(f"{options.teacher}: layers {mapping}, {size}, {torch.get_num_threads()} threads")
    print("| tokens | seconds | peak MB | through the basis, layers 0.. | best linear map |")
    print("|---|---|---|---|---|")
    results = []
    for tokens in options.tokens:
        batches = blocks(options.calibration, tokenizer, tokens, options.length)
        student = make_student(teacher, size)
        started = time.monotonic()
        solved = solve_student(teacher, student, batches, mapping, ridge=options.ridge)
        seconds = time.monotonic() - started
        through, best = zip(*errors(teacher, student, held_out, mapping, solved.basis), strict=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results.append(
            {"tokens": tokens, "seconds": seconds, "basis": through, "best": best, "peak_mb": peak}
        )
        shown = [" ".join(f"{error:.3f}" for error in kind) for kind in (through, best)]
        print(f"| {tokens} | {seconds:.1f} | {peak:.0f} | {shown[0]} | {shown[1]} |", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"options": vars(options), "results": results}, default=str, indent=2)
        )


if __name__ == "__main__":
    main()
