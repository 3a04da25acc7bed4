"""Texts -> blocks of a fixed number of word pieces -> batches, without end, the same after a restart."""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from threading import Event
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tinybert.corpus import END, Corpus
from tinybert.errors import InputError

# numpy takes [seed, n] for [seed, n, 0]: passes are [seed, n], so that groups must end on something else.
_GROUP, _SAMPLE = 1, 2
_GROUPS_KEPT = 4  # for how many groups back `state` knows the nearest place
_SAMPLE_CHARACTERS, _SAMPLE_SHARDS = 1 << 20, 8

Block = tuple[np.ndarray, int]  # pieces without special ones; how many of them the block before has as well


class Packer:
    """Cuts documents into blocks, as their texts come in; holds no more of one than a block's worth.

    The pieces of a document's texts are strung together and cut into windows one after the other. The last
    window of a longer document is moved back until it is full; a shorter document is one shorter block.

    Attributes:
        before: Special pieces that the tokenizer puts before a text.
        after: Those it puts after.
        window: Pieces of text that a block takes.
        carried: The last pieces of the document so far, at most ``window``.
        fresh: How many of these are in no block yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        """Prepare.

        Raises:
            InputError: The blocks have no room for text.
        """
        # A tokenizer may not be set (to truncate, say) while another thread uses it; this copy is never set.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.model_max_length = int(1e30)  # or it warns that the texts are long
        plain, whole = (
            list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
        )
        place = next(place for place in range(len(whole)) if whole[place : place + len(plain)] == plain)
        self.before, self.after = whole[:place], whole[place + len(plain) :]
        self.window = block_size - len(self.before) - len(self.after)
        if self.window < 1:
            least = block_size - self.window + 1
            raise InputError(f"block_size is {block_size}: with special pieces it must be at least {least}")
        self.carried, self.fresh = np.empty(0, np.int32), 0
        self._encode: Callable[[list[str]], list[list[int]]]
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            # Without the offsets, and the dictionaries of `tokenizer()`, a tenth faster.
            self._encode = lambda texts: [
                encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
            ]
        else:
            self._encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]

    def add(self, texts: Sequence[str]) -> list[Block]:
        """Take the next texts, `END` after the last of each document, and return the blocks that are full."""
        rows = self._encode([text for text in texts if text != END])
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        pieces = np.fromiter(chain.from_iterable(rows), np.int32, lengths.sum())
        is_end = np.fromiter((text == END for text in texts), bool, len(texts))
        # Where each document ends: after the texts before its END, in pieces.
        ends = np.concatenate([[0], lengths.cumsum()])[(~is_end).cumsum()[is_end]].tolist()
        blocks: list[Block] = []
        for start, stop in pairwise([0, *ends]):
            self._extend(pieces[start:stop], blocks)
            self._finish(blocks)
        self._extend(pieces[ends[-1] if ends else 0 :], blocks)
        return blocks

    def _extend(self, pieces: np.ndarray, blocks: list[Block]) -> None:
        if not len(pieces):
            return
        waiting = self.carried[len(self.carried) - self.fresh :]
        text = np.concatenate([waiting, pieces]) if self.fresh else pieces
        starts = range(0, len(text) - self.window + 1, self.window)
        blocks += [(text[start : start + self.window], 0) for start in starts]
        self.fresh = len(text) - len(starts) * self.window
        self.carried = np.concatenate([self.carried, pieces[-self.window :]])[-self.window :]

    def _finish(self, blocks: list[Block]) -> None:
        if self.fresh:
            blocks.append((self.carried, len(self.carried) - self.fresh))
        self.carried, self.fresh = self.carried[:0], 0


@dataclass(frozen=True)
class _Mark:
    """A place in the endless reading, after some piece of it."""

    turn: int = 0  # which pass
    position: int = 0  # which of the shards in that pass's order
    row: int = 0
    blocks: int = 0  # blocks that came before
    carried: tuple[int, ...] = ()  # what `Packer` carries here
    fresh: int = 0


@dataclass
class Counts:
    """What a stream has handed out: blocks, pieces (special ones too), pieces seen twice, padded places."""

    blocks: int = 0
    pieces: int = 0
    twice: int = 0
    padding: int = 0


@dataclass(frozen=True)
class PassLength:
    """A pass over a corpus: pieces of text, without special ones and each once; blocks; or estimates."""

    pieces: int
    blocks: int
    exact: bool


def _random(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(entropy))


def _read_pass(corpus: Corpus, packer: Packer, seed: int, mark: _Mark) -> Iterator[tuple[list[Block], _Mark]]:
    """Read on in one pass until its end; yield blocks, and the mark after them."""
    order = _random(seed, mark.turn).permutation(corpus.shards).tolist()
    whole, blocks_before = not (mark.position or mark.row), mark.blocks
    packer.carried, packer.fresh = np.array(mark.carried, np.int32), mark.fresh
    count, row = mark.blocks, mark.row
    for position in range(mark.position, corpus.shards):
        for after, texts in corpus.read(order[position], row):
            blocks = packer.add(texts)
            count += len(blocks)
            carried = tuple(packer.carried.tolist())
            yield blocks, _Mark(mark.turn, position, after, count, carried, packer.fresh)
        row = 0
    if whole and count == blocks_before:
        raise InputError(f"the corpus has no text ({', '.join(corpus.names)[:200]}): name files with text")


class BlockStream:
    """An endless stream of batches of blocks, in an order that only the corpus and a few numbers decide.

    Each pass visits the shards in another order. Every ``buffer`` blocks, in the order they are read, are
    mixed and put into batches by their lengths, the batches again mixed: full blocks meet at random, short
    ones their like.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        block_size: int = 128,
        buffer: int = 8192,
        seed: int = 42,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            corpus: From `tinybert.corpus.open_corpus`.
            tokenizer: Whatever it does to one text is done to each block.
            batch_size: Blocks in a batch, on all devices together.
            block_size: The most pieces of a block, special ones included.
            buffer: Blocks that are mixed at a time: rounded down to whole batches, at least one.
            seed: Of the order of shards and of blocks.

        Raises:
            InputError: A size is too small, or the tokenizer has no piece for padding.
        """
        if batch_size < 1 or buffer < 1:
            raise InputError(f"batch_size is {batch_size} and buffer {buffer}: both must be at least 1")
        if tokenizer.pad_token_id is None:
            raise InputError("the tokenizer has no piece for padding: set its pad_token")
        self.corpus, self.tokenizer = corpus, tokenizer
        self.batch_size, self.block_size, self.buffer, self.seed = batch_size, block_size, buffer, seed
        self.counts = Counts()
        self._packer = Packer(tokenizer, block_size)
        self._batches_of_group = max(1, buffer // batch_size)
        self._marks: dict[int, _Mark] = {}  # group -> a place at or before its first block
        self._fingerprint: str | None = None

    def batches(
        self, first: int = 0, state: dict[str, Any] | None = None
    ) -> Generator[dict[str, torch.Tensor], None, None]:
        """Return the batches from number ``first`` on, without end.

        The next group of blocks is made in a thread of its own while this one is used; closing the generator
        ends the thread.

        Args:
            first: The number of the first batch.
            state: What `state` told of ``first`` or an earlier batch, here or in another process, to start
                near it. Without it everything before is read again: the batches are the same.

        Returns:
            Batches of ``input_ids`` and ``attention_mask``, both int64 of (batch, longest).

        Raises:
            InputError: The state is of another stream, or of a later batch. While the batches are taken: the
                corpus cannot be read, or has no text.
        """
        group, skipped = divmod(first, self._batches_of_group)
        mark = _Mark()
        if state is not None:
            mark = self._mark_of(state)
            if mark.blocks > group * self._batches_of_group * self.batch_size:
                raise InputError(f"the state is of a batch after {first}: give the state of that batch")
        self._marks[group] = mark
        return self._prefetch(group, skipped, mark)

    def state(self, batch: int) -> dict[str, Any]:
        """Return a place to read on from for batch number ``batch``, which JSON can hold.

        Of batches handed out lately, and of the next one, it is where their group begins; else an earlier
        one, from which it takes longer.
        """
        group = batch // self._batches_of_group
        near = max((known for known in self._marks if known <= group), default=None)
        mark = _Mark() if near is None else self._marks[near]
        return self._identity() | vars(mark) | {"carried": list(mark.carried)}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the batches to be the same."""
        self._fingerprint = self._fingerprint or self.corpus.fingerprint()
        numbers = {name: getattr(self, name) for name in ("block_size", "batch_size", "buffer", "seed")}
        return numbers | {"corpus": self._fingerprint}

    def _mark_of(self, state: dict[str, Any]) -> _Mark:
        for name, ours in self._identity().items():
            if (theirs := state.get(name)) != ours:
                raise InputError(
                    f"the text was last read with {name} {theirs}, and now with {ours}: "
                    f"give the same {name}, or start anew"
                )
        fields = {name: state[name] for name in vars(_Mark())}
        return _Mark(**fields | {"carried": tuple(state["carried"])})

    def _prefetch(
        self, group: int, skipped: int, mark: _Mark
    ) -> Generator[dict[str, torch.Tensor], None, None]:
        stop = Event()
        groups = self._groups(group, mark, stop)
        with ThreadPoolExecutor(1, thread_name_prefix="packing") as thread:
            try:
                coming = thread.submit(next, groups)
                while True:
                    batches, following = coming.result()
                    coming = thread.submit(next, groups)
                    for batch in batches[skipped:]:
                        if batch is batches[-1]:
                            self._keep(group + 1, following)
                        yield self._collate(batch)
                    group, skipped = group + 1, 0
            finally:
                stop.set()  # the thread looks after each piece of reading, and `with` waits for it

    def _keep(self, group: int, mark: _Mark) -> None:
        self._marks[group] = mark
        self._marks = {known: mark for known, mark in self._marks.items() if known > group - _GROUPS_KEPT}

    def _groups(self, group: int, mark: _Mark, stop: Event) -> Iterator[tuple[list[list[Block]], _Mark]]:
        """Yield of each group from one on its batches, and the place at or before the group after it."""
        size = self._batches_of_group * self.batch_size
        packer = copy.copy(self._packer)
        waiting: list[Block] = []
        while True:
            for blocks, after in _read_pass(self.corpus, packer, self.seed, mark):
                if stop.is_set():
                    return
                waiting += blocks[max(0, group * size - mark.blocks) :]
                while len(waiting) >= size:
                    batches = self._arrange(group, waiting[:size])
                    waiting = waiting[size:]
                    group += 1
                    yield batches, mark if group * size < after.blocks else after
                mark = after
            mark = _Mark(mark.turn + 1, blocks=mark.blocks)

    def _arrange(self, group: int, blocks: list[Block]) -> list[list[Block]]:
        random = _random(self.seed, group, _GROUP)
        lengths = np.fromiter((len(pieces) for pieces, _ in blocks), np.int64, len(blocks))
        order = random.permutation(len(blocks))
        order = order[np.argsort(lengths[order], kind="stable")].reshape(-1, self.batch_size)
        return [[blocks[place] for place in row] for row in random.permutation(order).tolist()]

    def _collate(self, batch: list[Block]) -> dict[str, torch.Tensor]:
        before, after = self._packer.before, self._packer.after
        longest = max(len(pieces) for pieces, _ in batch) + len(before) + len(after)
        ids = np.full((len(batch), longest), self.tokenizer.pad_token_id)
        mask = np.zeros_like(ids)
        for row, (pieces, twice) in enumerate(batch):
            stop = len(before) + len(pieces)
            ids[row, : len(before)] = before
            ids[row, len(before) : stop] = pieces
            ids[row, stop : stop + len(after)] = after
            mask[row, : stop + len(after)] = 1
            self.counts.twice += twice
        real = int(mask.sum())
        self.counts.blocks += len(batch)
        self.counts.pieces += real
        self.counts.padding += mask.size - real
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def sample_blocks(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int = 128,
    count: int,
    buffer: int = 8192,
    seed: int = 42,
) -> list[list[int]]:
    """Draw blocks from the first ``buffer`` blocks (or ``count``, if that is more) of one pass.

    Returns:
        Pieces of ``count`` blocks, special ones included; of all there are, where they are fewer.

    Raises:
        InputError: There is no text, or it cannot be read.
    """
    packer = Packer(tokenizer, block_size)
    most = max(buffer, count)
    blocks: list[Block] = []
    for more, _ in _read_pass(corpus, packer, seed, _Mark()):
        blocks += more
        if len(blocks) >= most:
            break
    chosen = _random(seed, 0, _SAMPLE).permutation(min(most, len(blocks)))[:count]
    return [packer.before + blocks[place][0].tolist() + packer.after for place in chosen.tolist()]


def pass_length(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, block_size: int = 128
) -> PassLength | None:
    """Count the pieces and blocks of a pass, or estimate them from the starts of some shards.

    A corpus of a million characters or less is counted, but not the one of more than eight shards whose
    files are larger on the disk.

    Returns:
        The length; None where the hub does not tell how many rows there are.

    Raises:
        InputError: What is read of the corpus cannot be read.
    """
    sizes = corpus.sizes()
    everything = range(corpus.shards)
    units = {unit: [shard for shard in everything if sizes[shard][0] == unit] for unit, _ in sizes}
    known = [size for _, size in sizes if size is not None]
    sample = list(everything)
    if len(known) < len(sizes) or sum(known) > _SAMPLE_CHARACTERS:
        picks = {unit: np.linspace(0, len(m) - 1, min(len(m), _SAMPLE_SHARDS)) for unit, m in units.items()}
        sample = [units[unit][int(place)] for unit, places in picks.items() for place in places]
    packer = Packer(tokenizer, block_size)
    found: dict[int, tuple[float, float]] = {}
    left, exact = _SAMPLE_CHARACTERS, len(sample) == corpus.shards
    # The smallest first: what they leave of the sample is for the others.
    for done, shard in enumerate(sorted(sample, key=lambda shard: sizes[shard][1] or 0)):
        texts, share = corpus.head(shard, left // (len(sample) - done))
        if share is None:
            return None
        left = max(0, left - sum(map(len, texts)))
        exact = exact and share == 1
        pieces, blocks = _measure(packer, texts)
        found[shard] = pieces / share, blocks / share
    pieces = blocks = 0.0
    for members in units.values():
        seen = [shard for shard in members if shard in found]
        weight = sum(sizes[shard][1] or 0 for shard in seen)
        factor = sum(sizes[shard][1] or 0 for shard in members) / weight if weight else 1
        pieces += factor * sum(found[shard][0] for shard in seen)
        blocks += factor * sum(found[shard][1] for shard in seen)
    return PassLength(round(pieces), round(blocks), exact)


def _measure(packer: Packer, texts: list[str]) -> tuple[float, float]:
    """Pieces and blocks of the texts; of a document that goes on only what it has so far."""
    packer.carried, packer.fresh = packer.carried[:0], 0
    blocks = packer.add(texts)
    pieces = sum(len(pieces) - twice for pieces, twice in blocks) + packer.fresh
    return pieces, len(blocks) + packer.fresh / packer.window
