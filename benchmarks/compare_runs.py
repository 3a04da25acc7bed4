"""Score by training steps of finished runs, from their run.json: a table, and a plot if asked for.

    python benchmarks/compare_runs.py RUN... [--plot FILE]

Step 0 is the student as it was solved (closed form) or chance (random start). The intermediate stage reads no
label, so it has no score; its steps count.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def points(record: dict[str, Any]) -> list[tuple[int, float]]:
    """Return (steps, score on the eval rows) of one run, the start first where it is known."""
    stages, metric = record["stages"], record["metric"]
    found = []
    if "closed_form" in stages:
        found.append((0, stages["closed_form"]["metrics"][metric]))
    before = stages.get("intermediate", {}).get("steps", 0)
    for entry in stages.get("prediction", {}).get("log", []):
        if f"eval_{metric}" in entry:
            found.append((before + entry["step"], entry[f"eval_{metric}"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    curves: dict[str, list[tuple[str, list[tuple[int, float]], float]]] = defaultdict(list)
    print("| data | start | teacher | score after steps | kept | closed form | stages |")
    print("|---|---|---|---|---|---|---|")
    for run in options.runs:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        teacher, student = (model["metrics"][record["metric"]] for model in record["models"])
        stages, init = record["stages"], record["arguments"]["init"]
        data = Path(record["arguments"]["train"]).stem
        curve = points(record)
        curves[f"{data} ({record['metric']})"].append((init, curve, teacher))
        solved = f"{stages['closed_form']['seconds']:.0f} s" if "closed_form" in stages else "-"
        trained = sum(stages[name]["seconds"] for name in ("intermediate", "prediction") if name in stages)
        shown = ", ".join(f"{step}: {100 * score:.1f}" for step, score in curve)
        print(
            f"| {data} | {init} (seed {record['training']['seed']}) | {100 * teacher:.1f} | {shown} | "
            f"{100 * student / teacher:.1f} % | {solved} | {trained:.0f} s |"
        )
    if options.plot:
        draw(curves, options.plot)


def draw(curves: dict[str, list[tuple[str, list[tuple[int, float]], float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3), squeeze=False)
    colours = {"closed_form": "#0b6e4f", "random": "#b5651d", "copy": "#555"}
    for axis, (title, runs) in zip(axes[0], curves.items(), strict=True):
        axis.axhline(100 * runs[0][2], color="#888", linestyle="--", linewidth=1, label="teacher")
        for init, curve, _ in runs:
            steps, scores = zip(*curve, strict=True)
            axis.plot(steps, [100 * score for score in scores], "o-", color=colours[init], label=init)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("steps, both stages")
        axis.grid(alpha=0.3)
    shown = [axis.get_legend_handles_labels() for axis in axes[0]]
    handles = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    axes[0][0].legend(handles.values(), handles.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
