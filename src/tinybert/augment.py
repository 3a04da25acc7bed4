"""Data augmentation: sentence -> sentences in which words are exchanged for likely ones.

Algorithm 1 of Jiao et al., arXiv 1909.10351v5: a masked language model proposes other words for words of one
piece, word vectors for the rest; each copy exchanges each word with probability p_t.
"""

import random
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from tokenizers.pre_tokenizers import BertPreTokenizer

from tinybert.errors import InputError, check_least
from tinybert.masked_words import MaskedWords
from tinybert.word_vectors import WordVectors
from tinybert.words import Word, folded, in_case_of, words_of

# Words, and texts, that are remembered from one batch to the next: 0.3 KB each, or 1.1 KB with capitals.
_REMEMBERED = 100_000


@dataclass(frozen=True, slots=True)
class Exchange:
    """A word of a text and what may stand in its place: ``text[start:end]``, in its own letter case."""

    start: int
    end: int
    candidates: tuple[str, ...]


@dataclass(kw_only=True)
class AugmentSettings:
    """How copies are made (Algorithm 1)."""

    masked_lm: str | None = field(
        default=None,
        metadata={"help": "Masked language model, for words of one piece: a folder or hub name."},
    )
    word_vectors: str | None = field(
        default=None,
        metadata={
            "help": "Word vectors, for other words, or all without --masked_lm: a GloVe, word2vec or gensim "
            "file, a .npy with its index, or 'glove' (of the quickstart extra)."
        },
    )
    copies: int = field(default=20, metadata={"help": "Copies a row, N_a."})
    candidates: int = field(default=15, metadata={"help": "Candidates a word, K."})
    replace_probability: float = field(
        default=0.4, metadata={"help": "Probability that a copy exchanges a word, p_t."}
    )
    stop_words: str = field(
        default="english",
        metadata={
            "help": "Words neither exchanged nor put in: 'english' (scikit-learn's list), 'none', a file."
        },
    )
    masked_share: float = field(
        default=0.1,
        metadata={"help": "Share of a text's word pieces that may be masked at a time; 0: one at a time."},
    )

    keep_if_teacher_agrees: float | None = field(
        default=None,
        metadata={
            "help": "Drop copies whose label the teacher gives a probability below this; none unless given."
        },
    )

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: One that is out of its range, or a list of stop words that is not there.
        """
        check_least(self, {"copies": 1, "candidates": 1})
        if not 0 < self.replace_probability <= 1:
            raise InputError(
                f"--replace_probability must be above 0 and at most 1, got {self.replace_probability}"
            )
        if not 0 <= self.masked_share <= 1:
            raise InputError(f"--masked_share must be from 0 to 1, got {self.masked_share}")
        if not 0 <= (self.keep_if_teacher_agrees or 0) <= 1:
            raise InputError(
                f"--keep_if_teacher_agrees must be from 0 to 1, got {self.keep_if_teacher_agrees}"
            )
        self.words_left_alone()

    def words_left_alone(self) -> frozenset[str]:
        """Return the stop words, as ``words.folded`` has them.

        Raises:
            InputError: The file cannot be read.
        """
        if self.stop_words == "none":
            return frozenset()
        if self.stop_words == "english":
            return frozenset(ENGLISH_STOP_WORDS)
        try:
            lines = Path(self.stop_words).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--stop_words {self.stop_words} cannot be read ({error}): give 'english', 'none' or a file "
                "with a word a line"
            ) from error
        return frozenset(folded(line.strip()) for line in lines if line.strip())


class Augmenter:
    """Rows in, the same rows and changed copies of them out.

    Words are found by the tokenizer's offsets and exchanged in place, so all the rest of a text stays as it
    is to the last character. A copy of a pair changes one side and keeps the other. What comes out depends on
    seed, row number and text alone, not on how rows are batched (but for candidates whose scores are equal
    to the last digits).

    It is called as ``datasets`` calls a function: ``rows.map(augmenter, batched=True, with_indices=True)``.

    Args:
        masked_words: The masked language model; without one, word vectors serve all words.
        word_vectors: Word vectors, for the words of several pieces; without them those are left alone.
        columns: The text column, or the two of a pair.
        settings: How copies are made.
        seed: Another seed makes other copies.

    Raises:
        InputError: Neither a masked language model nor word vectors.
    """

    def __init__(
        self,
        masked_words: MaskedWords | None = None,
        word_vectors: WordVectors | None = None,
        *,
        columns: Sequence[str] = ("text",),
        settings: AugmentSettings | None = None,
        seed: int = 0,
    ) -> None:
        """Check that there is a source of words."""
        if masked_words is None and word_vectors is None:
            raise InputError("nothing can propose words: give --masked_lm, --word_vectors or both")
        self.masked_words, self.word_vectors = masked_words, word_vectors
        self.columns = tuple(columns)
        self.settings = settings or AugmentSettings()
        self.seed = seed
        self.left_alone = self.settings.words_left_alone()
        self._known: OrderedDict[str, tuple[Exchange, ...]] = OrderedDict()
        self._remembered = 0

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return a batch of columns with the copies of each row after it, other columns repeated.

        Args:
            batch: Columns of equal length.
            indices: The rows' numbers in the whole data set.
        """
        copies = self.copies_of(list(zip(*(batch[name] for name in self.columns), strict=True)), indices)
        result: dict[str, list[Any]] = {name: [] for name in batch}
        for row, changed in enumerate(copies):
            for name, values in batch.items():
                result[name] += [values[row]] * (1 + len(changed))
            for place, name in enumerate(self.columns):
                result[name][len(result[name]) - len(changed) :] = [texts[place] for texts in changed]
        return result

    def copies_of(
        self, rows: Sequence[tuple[str, ...]], indices: Sequence[int]
    ) -> list[list[tuple[str, ...]]]:
        """Return changed copies of rows, for each at most ``copies``: all different, none the row itself.

        Args:
            rows: The text, or the two texts, of each row.
            indices: The rows' numbers in the whole data set, which with the seed decide the draws.
        """
        exchanges = self.exchanges([text for row in rows for text in row])
        return [
            list(self._draw(row, [exchanges[text] for text in row], random.Random(f"{self.seed} {index}")))
            for row, index in zip(rows, indices, strict=True)
        ]

    def _draw(
        self, row: tuple[str, ...], exchanges: Sequence[Sequence[Exchange]], generator: random.Random
    ) -> Iterator[tuple[str, ...]]:
        sides = [side for side, found in enumerate(exchanges) if found]
        seen = {row}
        # Short texts have fewer copies than are asked for: the draws come to an end all the same.
        for draw in range(4 * self.settings.copies if sides else 0):
            side = sides[draw % len(sides)]
            copy = list(row)
            for exchange in reversed(exchanges[side]):
                if generator.random() < self.settings.replace_probability:
                    word = generator.choice(exchange.candidates)
                    copy[side] = copy[side][: exchange.start] + word + copy[side][exchange.end :]
            if tuple(copy) not in seen:
                seen.add(tuple(copy))
                yield tuple(copy)
            if len(seen) > self.settings.copies:
                return

    def exchanges(self, texts: Sequence[str]) -> dict[str, tuple[Exchange, ...]]:
        """Return the words of texts that may be exchanged, with their candidates, in the texts' order."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = {text: self._known[text] for text in texts if text in self._known} | self._find(new)
        for text in new:
            self._known[text] = found[text]
            self._remembered += 1 + len(found[text])
        while self._remembered > _REMEMBERED:
            _, oldest = self._known.popitem(last=False)
            self._remembered -= 1 + len(oldest)
        return found

    def _find(self, texts: Sequence[str]) -> dict[str, tuple[Exchange, ...]]:
        """Ask the masked language model for words of one piece and the word vectors for the others."""
        candidates: dict[str, dict[Word, list[str]]] = {text: {} for text in texts}
        others: list[tuple[str, Word]] = []
        if self.masked_words is None:
            others = [(text, word) for text in texts for word in self._exchangeable(text, _split(text))]
        else:
            asked = []
            for read in self.masked_words.read(texts):
                words = self._exchangeable(read.text, read.words)
                is_one = [self.masked_words.is_one_piece(read, word) for word in words]
                asked.append((read, [word for word, one in zip(words, is_one, strict=True) if one]))
                others += [(read.text, word) for word, one in zip(words, is_one, strict=True) if not one]
            answers = self.masked_words.candidates(asked, self.settings.candidates, self.left_alone)
            for (read, words), lists in zip(asked, answers, strict=True):
                candidates[read.text] |= dict(zip(words, lists, strict=True))
        if self.word_vectors is not None:
            spelled = [unicodedata.normalize("NFC", text[word.start : word.end]) for text, word in others]
            nearest = self.word_vectors.nearest(spelled, self.settings.candidates)
            for (text, word), spelling in zip(others, spelled, strict=True):
                fitting = (near for near in nearest[spelling] if folded(near) not in self.left_alone)
                candidates[text][word] = sorted(fitting)
        return {text: tuple(_exchanges(text, found)) for text, found in candidates.items()}

    def _exchangeable(self, text: str, words: Sequence[Word]) -> list[Word]:
        return [word for word in words if folded(text[word.start : word.end]) not in self.left_alone]


def _exchanges(text: str, candidates: Mapping[Word, Sequence[str]]) -> Iterator[Exchange]:
    for word in sorted(candidates):
        original = text[word.start : word.end]
        fitting = dict.fromkeys(in_case_of(original, candidate) for candidate in candidates[word])
        if fitting:
            yield Exchange(word.start, word.end, tuple(fitting))


def _split(text: str) -> Sequence[Word]:
    """Return the words of a text where no tokenizer is at hand: cut at spaces and punctuation."""
    offsets = [offset for _, offset in BertPreTokenizer().pre_tokenize_str(text)]
    return words_of(text, list(range(len(offsets))), offsets)
