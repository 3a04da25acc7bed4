"""A student in use against its teacher in use: BERT-base in PyTorch, TinyBERT-4 in PyTorch and ONNX.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --tokenizer FOLDER [--rounds 5] [--json OUT]

Random weights of both models' shapes, one thread, ``tinybert.benchmark``: everything in turn in each round.
Prints a markdown table of the speed of each way over BERT-base's in fp32 PyTorch, medians.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from tinybert.benchmark import BenchmarkArguments, measure, table
from tinybert.export import ExportArguments, to_onnx

TINYBERT_4 = {"hidden_size": 312, "num_hidden_layers": 4, "intermediate_size": 1200}


def write_models(tokenizer: Path, folder: Path) -> list[str]:
    torch.manual_seed(0)
    for name, shape in (("bert-base", {}), ("tinybert-4", TINYBERT_4)):
        BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)
    to_onnx(ExportArguments(str(folder / "tinybert-4"), int8=True))
    return [str(folder / "bert-base"), str(folder / "tinybert-4")]


def markdown(result: dict[str, Any]) -> str:
    loads = [(load["batch_size"], load["length"]) for load in result["rows"][0]["loads"]]
    lines = ["| model, backend | MB | " + " | ".join(f"{batch} x {length}" for batch, length in loads) + " |"]
    lines.append("|---" * (len(loads) + 2) + "|")
    for row in result["rows"]:
        cells = [
            f"{1e3 * load['p50']:.2f} ms, {load['speedup']:.1f}x ({load['cpu_speedup']:.1f}x)"
            for load in row["loads"]
        ]
        name = f"{Path(row['model']).name}, {row['backend']}"
        lines.append(f"| {name} | {row['file_bytes'] / 1e6:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory as well")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(arguments.tokenizer, Path(folder))
        result = measure(
            BenchmarkArguments(
                models,
                length=[16, 128],
                rounds=arguments.rounds,
                bf16=True,
                memory=arguments.memory,
                json=None if arguments.json is None else str(arguments.json),
            )
        )
    print(table(result), markdown(result), sep="\n\n")


if __name__ == "__main__":
    main()
