"""Write the tables of all experiments into docs/results.md, from the results that run.py appended.

    python experiments/tables.py [--results experiments/results.jsonl] [--document docs/results.md] [--print]

Each table stands between ``<!-- experiment NAME -->`` and ``<!-- end NAME -->`` in the document, of some ways
if the mark lists them, in that order (``<!-- experiment NAME: WAY WAY -->``). With ``chosen`` after the name
it has the scores on the rows that chose the checkpoint, with ``distance`` the soft-label losses there: the
nearer to the teacher the less, and measured more finely than by counting right answers. A mark without
results is an error, and an experiment without a mark is printed only. A cell is the mean over seeds with the
lowest and highest, and its share of the teacher's; "kept" is the mean of these shares.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
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


def cell(scores: list[float], teacher: list[float], digits: int = 1) -> str:
    """Return a mean, its range over seeds, and how much of the teacher's it is."""
    if not scores:
        return "-"
    mean = f"{statistics.mean(scores):.{digits}f}"
    if len(scores) > 1:
        mean += f" ({min(scores):.{digits}f} to {max(scores):.{digits}f})"
    return f"{mean}; {100 * statistics.mean(scores) / teacher[0]:.1f} %" if teacher else mean


def value_of(result: Mapping[str, Any], what: str) -> float | None:
    """Return what a table shows of a run; None where it was not measured."""
    if what == "chosen":
        return 100 * result["chosen"][result["metric"]]
    return result.get("distance") if what == "distance" else result["score"]


def table(results: list[dict[str, Any]], shown: list[str] | None = None, what: str = "reported") -> str:
    """Return one experiment as a markdown table: a way a row, a data set of which a way was run a column.

    Args:
        results: Those of the experiment.
        shown: The ways to show below the teacher; all of them if not given.
        what: Of a run: its score as "reported", as "chosen", or its "distance" from the teacher.

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
    results = [result for result in results if value_of(result, what) is not None]
    data = list(dict.fromkeys(result["data"] for result in results if result["way"] != "teacher"))
    ways = sorted(dict.fromkeys(result["way"] for result in results), key=lambda way: way != "teacher")

    def values(way: str, name: str) -> list[float]:
        return [value_of(row, what) for row in results if (row["way"], row["data"]) == (way, name)]

    metrics = {result["data"]: result["metric"] for result in results}
    teachers = {name: values("teacher", name) for name in data}
    is_distance = what == "distance"
    names = data if is_distance else [f"{name} ({metrics[name]})" for name in data]
    heads = ["way", *names, *([] if is_distance else ["kept"]), "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for way in ways:
        found = {name: values(way, name) for name in data}
        kept = [
            statistics.mean(found[name]) / teachers[name][0]
            for name in data
            if found[name] and teachers[name]
        ]
        whole = 0 < len(kept) == len(data)
        counts = sorted({len(found[name]) for name in data if found[name]})
        digits = 3 if is_distance else 1
        share = f"{100 * statistics.mean(kept):.1f} %" if whole else "-"
        cells = [
            way,
            *(cell(found[name], [] if way == "teacher" else teachers[name], digits) for name in data),
            *([] if is_distance else [share]),
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
        name, what, ways = found.groups()
        if name not in results:
            sys.exit(f"the document has a place for the experiment {name!r}, and there are no results of it")
        lines = table(results[name], ways.split() if ways else None, what or "reported")
        return f"{found[0].splitlines()[0]}\n{lines}\n<!-- end {name} -->"

    return re.sub(
        r"<!-- experiment (\w+)(?: (chosen|distance))?(?:: (.*?))? -->\n.*?<!-- end \1 -->",
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
