"""The rows of an experiment's data set: read in whatever form they have, split, and written as they are read.

A form is a way to cut a file into units that stay whole when rows are held out: lines of a table, sentences
of a CoNLL file, articles of SQuAD. ``flags`` makes a table out of a CoNLL file: each sentence a text, and for
each of the named kinds of chunk a column that says whether the sentence has one.
"""

import csv
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPLIT_SEED = 0
PARTS = ("train", "choose", "report")


def files_of(spec: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return where the rows of each part are, or will be."""
    suffix = {"squad": "json", "conll": "conll"}.get(spec.get("form", "rows"), "tsv")
    return {part: folder / f"{part}.{suffix}" for part in PARTS}


def prepare(name: str, spec: Mapping[str, Any], data_dir: Path, folder: Path) -> None:
    """Write the training, choosing and reported rows of one data set into a folder, as ``spec`` has it."""
    units = {part: _read(data_dir / spec[part], spec) for part in PARTS if part in spec}
    if name == "rotten_tomatoes":
        units = _rotten_tomatoes(folder)
    if "held_out" in spec:
        drawn = units["train"]
        random.Random(SPLIT_SEED).shuffle(drawn)
        units["choose"] = drawn[: spec["held_out"]]
        units["train"] = drawn[spec["held_out"] :][: spec.get("rows")]
    for part, file in files_of(spec, folder).items():
        file.write_text(_written(units[part], spec, data_dir), encoding="utf-8")


def _read(path: Path, spec: Mapping[str, Any]) -> list[Any]:
    form, text = spec.get("form", "rows"), path.read_text(encoding="utf-8")
    if form == "squad":
        return json.loads(text)["data"]
    _, _, rest = text.rstrip("\n").partition("\n")
    if form == "rows":
        return rest.split("\n")
    sentences = rest.split("\n\n")
    return [_flags(sentence, spec["kinds"]) for sentence in sentences] if form == "flags" else sentences


def _flags(sentence: str, kinds: list[str]) -> str:
    """Return a sentence of words and tags as a row: its text, and 1 for each kind of chunk it has."""
    words, tags = zip(*(line.split("\t") for line in sentence.split("\n")), strict=True)
    return "\t".join([" ".join(words), *(str(int(f"B-{kind}" in tags)) for kind in kinds)])


def _written(units: list[Any], spec: Mapping[str, Any], data_dir: Path) -> str:
    form = spec.get("form", "rows")
    if form == "squad":
        return json.dumps({"version": "1.1", "data": units})
    if form == "conll":
        return "\n\n".join([*units, ""])
    head = "text\tlabel"
    if form == "flags":
        head = "\t".join(["text", *spec["kinds"]])
    elif "train" in spec:
        with (data_dir / spec["train"]).open(encoding="utf-8") as file:
            head = file.readline().rstrip("\n")
    return "\n".join([head, *units, ""])


def _rotten_tomatoes(folder: Path) -> dict[str, list[str]]:
    """Return the parts of the set that a package ships, with text and label in this order."""
    from tinybert.quickstart import write_rotten_tomatoes

    found = {}
    written = write_rotten_tomatoes(folder / "csv")
    for part, source in zip(PARTS, ("train", "dev", "test"), strict=True):
        with open(written[source], encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        found[part] = ["\t".join(cell.replace("\t", " ") for cell in row) for row in rows]
    return found
