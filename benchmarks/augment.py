"""Augmentation, the reference implementation's way against ours, in turn in one process.

    python benchmarks/augment.py --data_dir GLUE --tokenizer FOLDER --word_vectors FILE [--json OUT]

Masked language model: BERT-base's shape, random weights, which cost what trained ones do. Rows: a random
sample of the training files of SST-2 and MRPC.

The reference's way, spelled out from its algorithm: each word of one piece is masked by itself, and the
model is shown the original sentence beside the masked one, unbatched, its head run over every piece, all of
the vocabulary sorted; for a word of several pieces all word vectors are sorted by their similarity. It takes
a pair as two sentences. Ours: ``tinybert.augment.Augmenter``, with several masks a copy as it does by
default, and with one (``masked_share`` 0). Everything is float32, but for ours with ``--bf16``.

Each round runs the reference over its next rows and ours over all rows, so that a busy machine slows both;
rows/s are medians over rounds.
"""

import argparse
import csv
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_loss import cpu_name
from floor import seconds_of
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from tinybert.augment import Augmenter, AugmentSettings
from tinybert.masked_words import MaskedWords
from tinybert.word_vectors import WordVectors, read_word_vectors

COLUMNS = {"SST-2": ("sentence",), "MRPC": ("sentence1", "sentence2")}
CPU = torch.device("cpu")
Row = tuple[str, ...]


class Reference:
    """Algorithm 1 as the reference implementation runs it."""

    def __init__(self, model: BertForMaskedLM, tokenizer: Any, vectors: WordVectors) -> None:
        """Lay the vectors out as a matrix."""
        self.model, self.tokenizer = model, tokenizer
        self.words = vectors.words
        self.places = {word: place for place, word in enumerate(vectors.words)}
        self.vectors = np.asarray(vectors.vectors)

    @torch.no_grad()
    def masked(self, pieces: list[str], place: int, count: int) -> list[str]:
        """Return candidates for one piece, from one forward pass."""
        original, masked = list(pieces), list(pieces)
        masked[place] = "[MASK]"
        shown = ["[CLS]", *masked, "[SEP]", *original, "[SEP]"]
        ids = torch.tensor([self.tokenizer.convert_tokens_to_ids(shown)])
        kinds = torch.tensor([[0] * (len(masked) + 2) + [1] * (len(original) + 1)])
        logits = self.model(ids, token_type_ids=kinds).logits
        best = torch.argsort(logits[0, place + 1], descending=True)[:count]
        return [word for word in self.tokenizer.convert_ids_to_tokens(best.tolist()) if "##" not in word]

    def near(self, word: str, count: int) -> list[str]:
        """Return the words with the most similar vectors."""
        if word not in self.places:
            return []
        similar = self.vectors @ self.vectors[self.places[word]]
        similar[self.places[word]] = -np.inf
        return [self.words[place] for place in np.argsort(-similar)[:count]]

    def copies(self, text: str, settings: AugmentSettings, draw: random.Random) -> list[str]:
        """Return changed copies of one text."""
        words = [
            word for word, _ in self.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text.lower())
        ]
        split = [self.tokenizer.tokenize(word) for word in words]
        pieces = [piece for word in split for piece in word]
        candidates: list[list[str]] = []
        place = 0
        for word, own in zip(words, split, strict=True):
            found: list[str] = []
            if word.isascii() and word.isalpha() and word not in ENGLISH_STOP_WORDS:
                alone = len(own) == 1
                found = (
                    self.masked(pieces, place, settings.candidates)
                    if alone
                    else self.near(word, settings.candidates)
                )
            candidates.append(found)
            place += len(own)
        return [
            " ".join(
                draw.choice(found) if found and draw.random() < settings.replace_probability else word
                for word, found in zip(words, candidates, strict=True)
            )
            for _ in range(settings.copies)
        ]


def read_rows(options: argparse.Namespace, name: str, columns: Row) -> list[Row]:
    with open(options.data_dir / name / "train.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    sample = random.Random(0).sample(rows, options.count)
    return [tuple(row[column] for column in columns) for row in sample]


def ours(
    model: BertForMaskedLM, tokenizer: Any, vectors: WordVectors, share: float, bf16: bool
) -> Callable[[Sequence[Row]], Any]:
    masked_words = MaskedWords(model, tokenizer, masked_share=share, bf16=bf16)

    def run(rows: Sequence[Row]) -> Any:
        vectors._near.clear()  # what an earlier round asked for
        columns = ("text", "text_pair")[: len(rows[0])]
        return Augmenter(masked_words, vectors, columns=columns).copies_of(rows, range(len(rows)))

    return run


def measure(
    name: str, options: argparse.Namespace, model: Any, tokenizer: Any, vectors: Any
) -> dict[str, Any]:
    """Return rows/s of each way and the ratios to the reference's."""
    rows = read_rows(options, name, COLUMNS[name])
    reference = Reference(model, tokenizer, vectors)
    draw, settings = random.Random(0), AugmentSettings()
    ways = {
        "ours": ours(model, tokenizer, vectors, settings.masked_share, options.bf16),
        "ours, one mask at a time": ours(model, tokenizer, vectors, 0.0, options.bf16),
    }
    reference.copies(rows[0][0], settings, draw)
    for run in ways.values():
        run(rows[:8])
    rates: dict[str, list[float]] = {"reference": [], **{way: [] for way in ways}}
    for turn in range(options.rounds):
        part = rows[turn :: options.rounds][: options.reference_rows]
        taken = seconds_of(
            lambda part=part: [reference.copies(text, settings, draw) for row in part for text in row], CPU
        )
        rates["reference"].append(len(part) / taken)
        for way, run in ways.items():
            rates[way].append(len(rows) / seconds_of(lambda run=run: run(rows), CPU))
    result: dict[str, Any] = {"data": name, "rows": len(rows), "reference_rows": len(part) * options.rounds}
    for way, values in rates.items():
        result[f"{way}: rows/s"] = statistics.median(values)
        if way != "reference":
            ratios = (mine / theirs for mine, theirs in zip(values, rates["reference"], strict=True))
            result[f"{way}: times the reference"] = statistics.median(ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="GLUE folder: SST-2/train.tsv, MRPC/train.tsv"
    )
    parser.add_argument("--tokenizer", required=True, help="folder of a BERT tokenizer")
    parser.add_argument("--word_vectors", default="glove", help="as of tinybert augment")
    parser.add_argument("--data", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--count", type=int, default=200, help="rows of each set")
    parser.add_argument(
        "--reference_rows", type=int, default=1000, help="most rows a round for the reference"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="ours under bfloat16 autocast")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer, vectors = (
        AutoTokenizer.from_pretrained(options.tokenizer),
        read_word_vectors(options.word_vectors),
    )
    model = BertForMaskedLM(BertConfig()).eval()
    facts = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "bf16": options.bf16}
    print("; ".join(f"{name}: {fact}" for name, fact in facts.items()), flush=True)
    results = []
    for name in options.data:
        results.append(measure(name, options, model, tokenizer, vectors))
        for key, value in results[-1].items():
            print(f"{key:45} {value:.3g}" if isinstance(value, float) else f"{key:45} {value}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
