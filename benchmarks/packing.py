"""Packing a corpus into blocks: speed, padding and memory, each corpus in a process of its own.

    python benchmarks/packing.py --corpus F... --tokenizer DIR [--block_size 128] [--batches N] [--parallel]

Each source (a file, a folder, a quoted glob or a hub name) is a corpus of its own, read for one pass, or for
N batches. Peak memory is the process's, libraries and tokenizer included (``base`` is what it was before the
first batch). pieces/s counts every piece handed out over the seconds after the first batch; ``real`` is their
share of the places in the padded batches, ``twice`` that of pieces that the block before had as well.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from transformers import AutoTokenizer

from tinybert.corpus import open_corpus
from tinybert.packing import BlockStream, pass_length


def peak() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(source: str, options: argparse.Namespace) -> dict[str, float]:
    """Read a corpus for one pass, in this process."""
    corpus = open_corpus([source])
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    began = time.perf_counter()
    length = pass_length(corpus, tokenizer, block_size=options.block_size)
    estimated = time.perf_counter()
    base = peak()
    stream = BlockStream(
        corpus,
        tokenizer,
        batch_size=options.batch_size,
        block_size=options.block_size,
        buffer=options.buffer,
    )
    start = time.perf_counter()
    for number, _ in enumerate(stream.batches()):
        if not number:
            first, before = time.perf_counter(), stream.counts.pieces
        if number + 1 == options.batches or (not options.batches and stream.state(number + 1)["turn"]):
            break
    seconds = time.perf_counter() - first
    counts = stream.counts
    return {
        "MB": sum(size or 0 for _, size in corpus.sizes()) / 1e6,
        "first": first - start,
        "rate": (counts.pieces - before) / seconds,
        "real": counts.pieces / (counts.pieces + counts.padding),
        "twice": counts.twice / counts.pieces,
        "base": base,
        "peak": peak(),
        "blocks": counts.blocks,
        "expected": length.blocks if length else 0,
        "estimate": estimated - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--buffer", type=int, default=8192)
    parser.add_argument("--batches", type=int, default=0, help="stop after so many; 0: after a pass")
    parser.add_argument("--parallel", action="store_true", help="also with TOKENIZERS_PARALLELISM=true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.corpus[0], options)))
        return
    print("| corpus | MB | threads | first batch s | pieces/s | real | twice | base MB | peak MB |", end="")
    print(" blocks | estimated | in s |\n|" + "---|" * 12)
    arguments = ["--tokenizer", options.tokenizer, "--alone"]
    for name in ("block_size", "batch_size", "buffer", "batches"):
        arguments += [f"--{name}", str(getattr(options, name))]
    for source in options.corpus:
        for parallel in ("false", "true")[: 1 + options.parallel]:
            command = [sys.executable, __file__, "--corpus", source, *arguments]
            environment = os.environ | {"TOKENIZERS_PARALLELISM": parallel}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout)
            print(
                f"| {source} | {row['MB']:.1f} | {'all' if parallel == 'true' else 1} | {row['first']:.1f} "
                f"| {row['rate']:,.0f} | {row['real']:.2%} | {row['twice']:.2%} | {row['base']:.0f} "
                f"| {row['peak']:.0f} | {row['blocks']} | {row['expected']} | {row['estimate']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
