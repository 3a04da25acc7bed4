"""What a student's score survives: 8-bit weights, fewer word pieces, both; with the size of each file.

    python benchmarks/shrunk.py --student D --teacher D --train F --eval F --report F --output_dir D

- ``fp32`` and ``int8``: the student's two ONNX files.
- ``pruned``: the student with ``--pieces`` word pieces, those that the training rows use most.
- ``recovered``: that one after ``--epochs`` on its teacher's soft labels, each model reading its own tokens.

The checkpoint of ``recovered`` is chosen on ``--eval``; every score is on ``--report``, which no model saw.
Everything is made by the commands of tinybert, and what is there already is not made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tinybert.export import ExportArguments, to_onnx
from tinybert.prune import PruneArguments, prune
from tinybert.stages import DistillArguments, distill_task
from tinybert.trainer import DistillationConfig


def exported(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export a model; return scores and sizes of its two files.

    The gate is open: this is about what 8-bit weights cost, and not whether that is too much.
    """
    made = to_onnx(
        ExportArguments(
            str(model), int8=True, check=options.report, max_drop=100.0, max_length=options.max_length
        )
    )
    names = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}
    return {
        **{f"{short}_score": 100 * made.scores[short] for short in names},
        **{f"{short}_mb": made.sizes[name] / 1e6 for short, name in names.items()},
        "metric": made.metric,
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Make the variants and return their figures."""
    folder = options.output_dir
    student = folder / "student"
    if not student.exists():
        student.parent.mkdir(parents=True, exist_ok=True)
        student.symlink_to(options.student.resolve())
    figures = {"student": exported(student, options)}
    pruned, recovered = folder / "pruned", folder / "recovered"
    if not pruned.exists():
        prune(
            PruneArguments(
                model=str(student),
                output_dir=str(pruned),
                vocabulary=options.pieces,
                corpus=[options.train],
            )
        )
    figures["pruned"] = exported(pruned, options)
    if not recovered.exists():
        arguments = DistillArguments(
            options.train,
            options.eval,
            teacher=str(options.teacher),
            student=str(pruned),
            intermediate_epochs=0.0,
            prediction_epochs=options.epochs,
            max_length=options.max_length,
        )
        distill_task(arguments, DistillationConfig(str(recovered), report_to="none", disable_tqdm=True))
    figures["recovered"] = exported(recovered, options)
    return figures


def table(figures: dict[str, dict[str, Any]], name: str) -> str:
    """Return the figures as a markdown table."""
    metric = figures["student"]["metric"]
    lines = [
        f"| {name} ({metric}) | fp32 | int8 | fp32 MB | int8 MB |",
        "|---|---|---|---|---|",
    ]
    for way, row in figures.items():
        lines.append(
            f"| {way} | {row['fp32_score']:.1f} | {row['int8_score']:.1f} | {row['fp32_mb']:.1f} | "
            f"{row['int8_mb']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True, help="distilled model folder")
    parser.add_argument("--teacher", type=Path, required=True, help="its teacher's folder")
    for name in ("train", "eval", "report"):
        parser.add_argument(f"--{name}", required=True, help="labelled rows")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets what is made")
    parser.add_argument("--pieces", type=int, default=8000, help="word pieces to keep")
    parser.add_argument("--epochs", type=float, default=2.0, help="epochs of recovery")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options)
    print(table(figures, options.report))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
