"""A masked language model -> the words it would put in a word's place.

Algorithm 1 of Jiao et al. (arXiv 1909.10351v5), for words of one piece. One forward pass serves many masked
positions of many texts, and the head runs at the masks alone.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinybert.anatomy import head_at
from tinybert.words import Word, folded, is_word, words_of

# No window over a longer text is wider: the cost of attention grows with its square.
_WIDEST_WINDOW = 512


class Text(NamedTuple):
    """A text, its word pieces without special ones, and its words."""

    text: str
    ids: tuple[int, ...]
    words: tuple[Word, ...]


# Pieces as the model is shown them, special ones and masks included.
_Copy = tuple[int, ...]


class _Mask(NamedTuple):
    """A masked place of a copy: where, and the piece and the word (whatever its case) that stood there."""

    at: int
    piece: int
    word: str


class MaskedWords:
    """Candidates for words of one piece, from a masked language model.

    Several positions of a text are masked in one copy as long as they are no more than ``masked_share`` of
    its pieces, and as far apart as that allows. At 0.1 nine in ten of fifteen candidates are those of one
    mask at a time, and the others are as probable (docs/log.md); 0 masks one at a time.

    Args:
        model: A transformers model with a masked-LM head.
        tokenizer: Its fast tokenizer.
        masked_share: See above, from 0 to 1.
        tokens_per_batch: Most tokens of a forward pass.
        positions: The longest input of the model, special pieces included.
        bf16: Whether to run under bfloat16 autocast.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        masked_share: float = 0.1,
        tokens_per_batch: int = 2048,
        positions: int = _WIDEST_WINDOW,
        bf16: bool = False,
    ) -> None:
        """Find out which pieces of the vocabulary are whole words."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.masked_share, self.tokens_per_batch, self.bf16 = masked_share, tokens_per_batch, bf16
        self._before, self._after = _special_pieces(tokenizer)
        self._window = min(positions, _WIDEST_WINDOW) - len(self._before) - len(self._after)
        # Of logits there may be more than pieces: vocabularies are padded to round numbers.
        self._surfaces = [""] * max(model.config.vocab_size, len(tokenizer))
        self._spaced = self._whole_words(" ")
        self._bare = self._whole_words("")
        self._same: dict[str, list[int]] = defaultdict(list)
        for piece in (self._spaced | self._bare).nonzero().flatten().tolist():
            self._same[folded(self._surfaces[piece])].append(piece)

    def _whole_words(self, before: str) -> Tensor:
        """Return which pieces (V,) stand for a word when it follows ``before``: what tokenises back is one.

        That leaves out continuing pieces, special ones and punctuation in every kind of vocabulary.
        """
        special = set(self.tokenizer.all_special_ids)
        known = [piece for piece in range(len(self.tokenizer)) if piece not in special]
        shown = [word.strip() for word in self.tokenizer.batch_decode([[piece] for piece in known])]
        candidates = [(piece, word) for piece, word in zip(known, shown, strict=True) if is_word(word)]
        found = torch.zeros(len(self._surfaces), dtype=torch.bool)
        if not candidates:
            return found
        texts = [before + word for _, word in candidates]
        back = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for (piece, word), ids in zip(candidates, back, strict=True):
            if ids == [piece]:
                found[piece] = True
                self._surfaces[piece] = word
        return found

    def read(self, texts: Sequence[str]) -> list[Text]:
        """Tokenise texts and find their words; nothing is cut off."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        read = []
        for row, text in enumerate(texts):
            words = words_of(text, encoded.word_ids(row), encoded["offset_mapping"][row])
            read.append(Text(text, tuple(encoded["input_ids"][row]), tuple(words)))
        return read

    def is_one_piece(self, text: Text, word: Word) -> bool:
        """Return whether a word is one piece of the vocabulary, so that a mask stands for all of it."""
        piece = text.ids[word.first]
        return word.last - word.first == 1 and bool(self._spaced[piece] or self._bare[piece])

    def candidates(
        self, asked: Sequence[tuple[Text, Sequence[Word]]], count: int, never: Collection[str] = ()
    ) -> list[list[list[str]]]:
        """Return the most probable other words for words of one piece.

        The text is shown with its masks and nothing else; one that is longer than the model's input is shown
        as windows around them.

        Args:
            asked: Texts, each with some of its words of one piece.
            count: K, how many candidates a word.
            never: Words that are not proposed, as ``words.folded`` has them.

        Returns:
            For each text, for each of its words, at most ``count`` words in alphabetical order: whole words
            of the vocabulary, never the word itself in whatever case.
        """
        answers: dict[_Copy, dict[_Mask, list[str]]] = defaultdict(dict)
        wanted: list[dict[Word, tuple[_Copy, _Mask]]] = []
        for text, words in asked:
            wanted.append({})
            for copy, masks in self._masked_copies(text, words):
                # Different texts may leave the same copy: it is run once, whatever stood under its masks.
                answers[copy] |= {mask: [] for mask in masks.values()}
                wanted[-1] |= {word: (copy, mask) for word, mask in masks.items()}
        proposed = torch.ones(len(self._surfaces), dtype=torch.bool)
        for word in never:
            proposed[self._same.get(word, [])] = False
        for copies in self._batches(answers):
            places = [(row, mask) for row, copy in enumerate(copies) for mask in answers[copy]]
            for (row, mask), found in zip(
                places, self._predict(copies, places, count, proposed), strict=True
            ):
                answers[copies[row]][mask] = found
        return [
            [answers[copy][mask] for copy, mask in (places[word] for word in words)]
            for (_, words), places in zip(asked, wanted, strict=True)
        ]

    def _masked_copies(self, text: Text, words: Sequence[Word]) -> Iterator[tuple[_Copy, dict[Word, _Mask]]]:
        """Yield masked copies of a text that cover its words, each with the words under its masks."""
        for start, inside in _windows(len(text.ids), words, self._window):
            shown = text.ids[start : start + self._window]
            most = max(1, int(self.masked_share * len(shown)))
            copies = math.ceil(len(inside) / most)
            for turn in range(copies):
                ids = [*self._before, *shown, *self._after]
                masks = {}
                for word in inside[turn::copies]:
                    at = word.first - start + len(self._before)
                    masks[word] = _Mask(at, ids[at], folded(text.text[word.start : word.end]))
                    ids[at] = self.tokenizer.mask_token_id  # type: ignore[call-overload]
                yield tuple(ids), masks

    def _batches(self, copies: Iterable[_Copy]) -> Iterator[list[_Copy]]:
        """Cut masked copies, sorted by length, into batches under the token budget."""
        batch: list[_Copy] = []
        for copy in sorted(copies, key=lambda copy: (len(copy), copy)):
            if batch and (len(batch) + 1) * len(copy) > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(copy)
        if batch:
            yield batch

    def _predict(
        self, copies: Sequence[_Copy], places: Sequence[tuple[int, _Mask]], count: int, proposed: Tensor
    ) -> list[list[str]]:
        rows, columns = [row for row, _ in places], [mask.at for _, mask in places]
        logits = self._logits(copies, rows, columns)
        pieces = torch.tensor([mask.piece for _, mask in places])
        allowed = torch.where(self._spaced[pieces][:, None], self._spaced, self._bare) & proposed
        logits.masked_fill_(~allowed[:, : logits.shape[1]].to(logits.device), -torch.inf)
        for row, (_, mask) in zip(logits, places, strict=True):
            row[[mask.piece, *self._same.get(mask.word, ())]] = -torch.inf
        best = logits.topk(min(count, logits.shape[1]), dim=1)
        return [
            sorted({self._surfaces[piece] for piece, score in zip(*found, strict=True) if score > -math.inf})
            for found in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _logits(self, copies: Sequence[_Copy], rows: list[int], columns: list[int]) -> Tensor:
        """Return the head's logits (N, V) in float32 at N places, and nowhere else."""
        device, longest = self.model.device, max(map(len, copies))
        pad: Any = self.tokenizer.pad_token_id
        ids = torch.tensor([[*copy, *[pad] * (longest - len(copy))] for copy in copies], device=device)
        lengths = torch.tensor([len(copy) for copy in copies], device=device)
        real = torch.arange(longest, device=device) < lengths[:, None]

        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=self.bf16),
            head_at(self.model, (rows, columns)),
        ):
            logits: Tensor = self.model(input_ids=ids, attention_mask=real.long()).logits
        return logits[0].float()


def _special_pieces(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special pieces before and after a single text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first = special.index(0)
    last = len(special) - special[::-1].index(0)
    return tuple(ids[:first]), tuple(ids[last:])


def _windows(length: int, words: Sequence[Word], window: int) -> Iterator[tuple[int, list[Word]]]:
    """Yield where windows over a text start, each with the words that are nearest to its middle."""
    step = max(1, window // 2)
    starts = [*range(0, max(1, length - window + 1), step)]
    if starts[-1] + window < length:
        starts.append(length - window)
    inside: dict[int, list[Word]] = defaultdict(list)
    for word in words:
        inside[min(starts, key=lambda start: abs(start + window / 2 - word.first))].append(word)
    yield from inside.items()
