"""What it does to candidates to mask several words of a text in one copy.

    python benchmarks/masked_share.py --data_dir GLUE --masked_lm FOLDER [--shares 0.1 0.15 0.2 0.3]

For words of a random sample of training rows: how many of the K candidates are those of one mask at a time,
how probable they are where that one word is masked (mean log probability, against that of the candidates of
one mask at a time), and how many copies it takes.
"""

import argparse
import statistics
from pathlib import Path

import torch
from augment import COLUMNS, read_rows
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tinybert.augment import AugmentSettings
from tinybert.masked_words import MaskedWords

SETS = COLUMNS | {"CoLA": ("sentence",)}


def measure(name: str, options: argparse.Namespace, model: torch.nn.Module, tokenizer: object) -> None:
    """Print a row for each share."""
    settings = AugmentSettings()
    never, count = settings.words_left_alone(), settings.candidates

    def made(share: float) -> MaskedWords:
        return MaskedWords(model, tokenizer, masked_share=share)

    alone = made(0.0)
    texts = alone.read([text for row in read_rows(options, name, SETS[name]) for text in row])
    asked = [(text, [word for word in text.words if alone.is_one_piece(text, word)]) for text in texts]
    asked = [
        (text, [word for word in words if text.text[word.start : word.end].casefold() not in never])
        for text, words in asked
    ]
    expected = [found for lists in alone.candidates(asked, count, never) for found in lists]
    probabilities = []
    for text, words in asked:
        for copy, masks in alone._masked_copies(text, words):
            ((_, mask),) = masks.items()
            probabilities.append(alone._logits([copy], [0], [mask.at])[0].log_softmax(-1))
    pieces = {word: tokenizer.convert_tokens_to_ids(word) for found in expected for word in found}

    def mean_log_probability(candidates: list[list[str]]) -> float:
        for found in candidates:
            pieces.update({word: tokenizer.convert_tokens_to_ids(word) for word in found})
        places = zip(probabilities, candidates, strict=True)
        return statistics.mean(float(row[[pieces[word] for word in found]].mean()) for row, found in places)

    for share in options.shares:
        shared = made(share)
        found = [found for lists in shared.candidates(asked, count, never) for found in lists]
        copies = sum(1 for text, words in asked for _ in shared._masked_copies(text, words))
        same = statistics.mean(len({*a} & {*b}) / count for a, b in zip(expected, found, strict=True))
        alone_log, shared_log = mean_log_probability(expected), mean_log_probability(found)
        cells = (name, share, len(expected), copies, f"{same:.0%}", f"{alone_log:.2f}", f"{shared_log:.2f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="GLUE folder: SST-2/train.tsv ...")
    parser.add_argument("--masked_lm", required=True, help="folder of a BERT-like model with its tokenizer")
    parser.add_argument("--count", type=int, default=100, help="rows of each set")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.masked_lm)
    model = AutoModelForMaskedLM.from_pretrained(options.masked_lm, dtype="float32")
    print("| data | share | words | copies | same candidates | log probability, one mask | shared |")
    print("|---|---|---|---|---|---|---|")
    for name in SETS:
        measure(name, options, model, tokenizer)


if __name__ == "__main__":
    main()
