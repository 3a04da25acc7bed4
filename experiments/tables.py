"""Write the tables of all experiments into docs/results.md, from the results that run.py appended.

    python experiments/tables.py [--results experiments/results.jsonl] [--document docs/results.md] [--print]

Each table stands between ``<!-- experiment NAME -->`` and ``<!-- end NAME -->`` in the document, of some ways
if the mark lists them, in that order (``<!-- experiment NAME: WAY WAY -->``), and of the scores on the rows
that chose the checkpoint if it says so (``<!-- experiment NAME chosen: WAY WAY -->``); a mark without
results is an error, and an experiment without a mark is printed only. A cell is the mean over
seeds with the lowest and highest, and its share of the teacher's; "kept" is the mean of these shares.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the results by experiment."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        found.setdefault(result["experiment"], []).append(result)
    return found


def cell(scores: list[float], teacher: list[float]) -> str:
    """Return a mean, its range over seeds, and how much of the teacher's it is."""
    if not scores:
        return "-"
    mean = f"{statistics.mean(scores):.1f}"
    if len(scores) > 1:
        mean += f" ({min(scores):.1f} to {max(scores):.1f})"
    return f"{mean}; {100 * statistics.mean(scores) / teacher[0]:.1f} %" if teacher else mean


def table(results: list[dict[str, Any]], shown: list[str] | None = None, *, chosen: bool = False) -> str:
    """Return one experiment as a markdown table: a way a row, a data set of which a way was run a column.

    Args:
        results: Those of the experiment.
        shown: The ways to show below the teacher; all of them if not given.
        chosen: Whether to show the scores on the rows that chose the checkpoint.

    Raises:
        SystemExit: There are no results of such a way.
    """
    if shown is not None:
        missing = set(shown) - {result["way"] for result in results}
        if missing:
            sys.exit(f"the document asks for ways without results: {', '.join(sorted(missing))}")
        order = ["teacher", *shown]
        results = sorted(
            (result for result in results if result["way"] in order), key=lambda row: order.index(row["way"])
        )
    data = list(dict.fromkeys(result["data"] for result in results if result["way"] != "teacher"))
    ways = sorted(dict.fromkeys(result["way"] for result in results), key=lambda way: way != "teacher")

    def scores(way: str, name: str) -> list[float]:
        found = [result for result in results if (result["way"], result["data"]) == (way, name)]
        if chosen:
            return [100 * result["chosen"][result["metric"]] for result in found]
        return [result["score"] for result in found]

    metrics = {result["data"]: result["metric"] for result in results}
    teachers = {name: scores("teacher", name) for name in data}
    heads = ["way", *(f"{name} ({metrics[name]})" for name in data), "kept", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for way in ways:
        found = {name: scores(way, name) for name in data}
        kept = [
            statistics.mean(found[name]) / teachers[name][0]
            for name in data
            if found[name] and teachers[name]
        ]
        whole = 0 < len(kept) == len(data)
        counts = sorted({len(found[name]) for name in data if found[name]})
        cells = [
            way,
            *(cell(found[name], [] if way == "teacher" else teachers[name]) for name in data),
            f"{100 * statistics.mean(kept):.1f} %" if whole else "-",
            " or ".join(map(str, counts)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(document: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """Return a document with its marked places filled.

    Raises:
        SystemExit: It marks a place for an experiment without results.
    """

    def fill(found: re.Match[str]) -> str:
        name, chosen, ways = found.groups()
        if name not in results:
            sys.exit(f"the document has a place for the experiment {name!r}, and there are no results of it")
        lines = table(results[name], ways.split() if ways else None, chosen=chosen is not None)
        return f"{found[0].splitlines()[0]}\n{lines}\n<!-- end {name} -->"

    return re.sub(
        r"<!-- experiment (\w+)( chosen)?(?:: (.*?))? -->\n.*?<!-- end \1 -->",
        fill,
        document,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results.jsonl")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    options = parser.parse_args()
    experiments = read(options.results)
    text = options.document.read_text(encoding="utf-8")
    for name, results in experiments.items():
        if options.print or f"<!-- experiment {name}" not in text:
            print(f"{name}\n\n{table(results)}\n")
    if not options.print:
        options.document.write_text(filled(text, experiments), encoding="utf-8")


if __name__ == "__main__":
    main()
