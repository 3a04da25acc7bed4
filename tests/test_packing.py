"""Blocks hold every piece of every document, and a stream that stopped goes on with the same batches."""

import gzip
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from conftest import BAD, FILLERS, GOOD, PIECES
from tinybert import corpus as corpus_room
from tinybert.corpus import Corpus, open_corpus
from tinybert.errors import InputError
from tinybert.packing import BlockStream, Packer, pass_length, sample_blocks

SOME = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = (*GOOD, *BAD, *FILLERS)
CLS, SEP = PIECES.index("[CLS]"), PIECES.index("[SEP]")

Document = list[str]


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Documents of so many words (a piece each), in paragraphs of up to five."""
    generator = random.Random(seed)
    found = []
    for length in lengths:
        words, paragraphs = generator.choices(WORDS, k=length), []
        while words:
            cut = generator.randint(1, 5)
            paragraphs.append(" ".join(words[:cut]))
            words = words[cut:]
        found.append(paragraphs)
    return found


def write(path: Path, documents: Sequence[Document]) -> str:
    path.write_text("\n\n".join("\n".join(paragraphs) for paragraphs in documents), encoding="utf-8")
    return str(path)


def corpus_of(folder: Path, files: Sequence[Sequence[Document]]) -> Corpus:
    for old in folder.glob("*.txt"):
        old.unlink()
    return open_corpus(
        [write(folder / f"{place:02}.txt", documents) for place, documents in enumerate(files)]
    )


def expected_blocks(documents: Sequence[Document], window: int) -> list[list[int]]:
    """The packing as it is told: whole documents, one window after the other, the last moved back."""
    blocks = []
    for document in documents:
        ids = [PIECES.index(word) for word in " ".join(document).split()]
        starts = list(range(0, len(ids), window))
        if starts and len(ids) > window:
            starts[-1] = len(ids) - window
        blocks += [[CLS, *ids[start : start + window], SEP] for start in starts]
    return blocks


def rows_of(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    ids, mask = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    return [row[: sum(ones)] for row, ones in zip(ids, mask, strict=True)]


def expected_batches(
    files: Sequence[Sequence[Document]], block_size: int, batch_size: int, buffer: int, seed: int
) -> Iterator[list[list[int]]]:
    """The whole stream, spelled out with lists."""

    def endless() -> Iterator[list[int]]:
        for turn in range(10**6):
            for file in np.random.Generator(np.random.PCG64([seed, turn])).permutation(len(files)):
                yield from expected_blocks(files[file], block_size - 2)

    blocks = endless()
    size = max(1, buffer // batch_size) * batch_size
    for group in range(10**6):
        generator = np.random.Generator(np.random.PCG64([seed, group, 1]))
        members = list(islice(blocks, size))
        mixed = sorted((members[place] for place in generator.permutation(size)), key=len)
        batches = [mixed[start : start + batch_size] for start in range(0, size, batch_size)]
        yield from (batches[place] for place in generator.permutation(len(batches)))


FILES = [
    make_documents(lengths, seed=n) for n, lengths in enumerate([[3, 40, 1, 8], [6, 7, 25], [50], [2] * 9])
]


@given(
    lengths=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=4),
    block_size=st.integers(3, 12),
    batch_size=st.integers(1, 5),
    buffer=st.integers(1, 23),
    seed=st.integers(0, 3),
    rows=st.integers(1, 9),
)
@SOME
def test_the_stream_is_the_one_told_and_goes_on_from_any_batch(
    tmp_path: Path, tokenizer: BertTokenizerFast, lengths: list[list[int]], rows: int, **sizes: int
) -> None:
    """A block too few, or a resumed run that sees other text, shows in no figure."""
    files = [make_documents(file, seed=place) for place, file in enumerate(lengths)]
    if not any(map(any, lengths)):
        files[0] = make_documents([1])
    corpus = corpus_of(tmp_path, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_room, "_ROWS", rows)
        stream = BlockStream(corpus, tokenizer, **sizes)
        count = 3 * max(1, sizes["buffer"] // sizes["batch_size"]) + 2
        states = [stream.state(0)]
        got = []
        running = stream.batches()
        for number, batch in enumerate(islice(running, count), start=1):
            got.append(rows_of(batch))
            states.append(stream.state(number))
        running.close()
        assert got == list(islice(expected_batches(files, **sizes), count))
        for number in {0, 1, count // 2, count - 1, count}:
            fresh = BlockStream(corpus, tokenizer, **sizes)
            state = json.loads(json.dumps(states[number]))
            again = fresh.batches(number, state)
            rest = [rows_of(batch) for batch in islice(again, max(2, count - number))]
            again.close()
            assert rest[: count - number] == got[number:]
            assert rest == list(islice(expected_batches(files, **sizes), number, number + len(rest)))


def test_every_batch_of_several_passes_can_be_gone_on_from(
    tmp_path: Path, tokenizer: BertTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place is kept in the middle of documents and of files; and without it the batches are the same."""
    monkeypatch.setattr(corpus_room, "_ROWS", 3)
    corpus = corpus_of(tmp_path, FILES)
    sizes = {"block_size": 8, "batch_size": 2, "buffer": 7, "seed": 5}
    stream, count = BlockStream(corpus, tokenizer, **sizes), 40
    got, states = [], []
    for number, batch in enumerate(islice(stream.batches(), count)):
        got.append(rows_of(batch))
        states.append(stream.state(number))
    assert got == list(islice(expected_batches(FILES, **sizes), count))
    assert max(state["turn"] for state in states) >= 2
    assert any(state["carried"] and state["row"] for state in states)
    assert all(state["blocks"] <= number * 2 for number, state in enumerate(states))
    assert len({json.dumps(state) for state in states}) >= 10
    for number in range(count):
        state = states[number] if number % 5 else None
        again = BlockStream(corpus, tokenizer, **sizes).batches(number, state)
        assert [rows_of(batch) for batch in islice(again, 3)][: count - number] == got[number : number + 3]
        again.close()


def test_a_state_is_near(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """A run resumed after a week would read a week's text again before its first step."""
    corpus = corpus_of(tmp_path, [make_documents([6])] * 30)
    sizes = {"block_size": 8, "batch_size": 2, "buffer": 4}
    stream = BlockStream(corpus, tokenizer, **sizes)
    for number, _ in enumerate(islice(stream.batches(), 60)):
        assert number * 2 - 4 < stream.state(number)["blocks"] <= number * 2
        assert stream.state(number + 1)["blocks"] > number * 2 - 2
    assert stream.state(0)["blocks"] == 0
    state, read = stream.state(59), []
    watched = Corpus(corpus._shards)
    object.__setattr__(watched, "read", lambda *place: read.append(place) or corpus.read(*place))
    again = BlockStream(watched, tokenizer, **sizes).batches(59, state)
    next(again)
    again.close()
    assert len(read) < 14  # two groups of four, and what the thread was at; not 118


def test_no_text_is_lost_and_no_block_has_two_documents(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """Attention would run from one article into the next."""
    documents = [[" ".join([word] * (2 + 5 * place))] for place, word in enumerate(WORDS)]
    corpus = corpus_of(tmp_path, [documents])
    blocks = sample_blocks(corpus, tokenizer, block_size=10, count=10**6)
    assert all(block[0] == CLS and block[-1] == SEP and len(set(block[1:-1])) == 1 for block in blocks)
    count = Counter(block[1] for block in blocks)
    assert count == {PIECES.index(word): -(-(2 + 5 * place) // 8) for place, word in enumerate(WORDS)}
    assert sorted(blocks) == sorted(expected_blocks(documents, 8))


def test_groups_are_mixed_and_short_blocks_meet_their_like(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """Blocks in reading order are all of one article; mixed without regard to length, half is padding."""
    files = [make_documents([1 + place % 30 for place in range(300)])]
    stream = BlockStream(corpus_of(tmp_path, files), tokenizer, block_size=32, batch_size=10, buffer=300)
    batches = list(islice(stream.batches(), 30))
    lengths = [[len(row) for row in rows_of(batch)] for batch in batches]
    assert all(len(set(batch)) == 1 for batch in lengths)
    order = [batch[0] for batch in lengths]
    assert sorted(order) == list(range(3, 33))
    assert order != sorted(order)
    counts = stream.counts
    assert (counts.blocks, counts.pieces, counts.padding, counts.twice) == (300, sum(map(sum, lengths)), 0, 0)


def test_batches_are_padded_and_counted(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """The shares that are reported are how a bad corpus is noticed."""
    files = [make_documents([5, 17, 2])]
    stream = BlockStream(corpus_of(tmp_path, files), tokenizer, block_size=10, batch_size=5, buffer=5)
    batch = next(stream.batches())
    # 5 + 2, 8 + 2 three times (the last has seven of the pieces before), 2 + 2
    assert batch["input_ids"].shape == (5, 10)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [4, 7, 10, 10, 10]
    assert ((batch["input_ids"] == tokenizer.pad_token_id) == (batch["attention_mask"] == 0)).all()
    assert vars(stream.counts) == {"blocks": 5, "pieces": 41, "twice": 7, "padding": 9}


def test_passes_differ_in_the_order_of_shards_and_the_seed_in_both(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """The same batches each pass are learnt by heart."""
    corpus = corpus_of(tmp_path, [[[word] * 3] for word in WORDS])

    def words(seed: int) -> list[list[int]]:
        stream = BlockStream(corpus, tokenizer, block_size=8, batch_size=1, buffer=1, seed=seed)
        ids = [rows_of(batch)[0][1] for batch in islice(stream.batches(), 3 * len(WORDS))]
        return [ids[start : start + len(WORDS)] for start in range(0, len(ids), len(WORDS))]

    passes = words(1) + words(2)
    assert all(sorted(one) == sorted(map(PIECES.index, WORDS)) for one in passes)
    assert len(set(map(tuple, passes))) == 6


def test_all_formats_give_the_same_batches(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """What a corpus is stored in must not change what is learnt from it."""
    documents = [[" ".join(document)] for document in make_documents([3, 20, 9, 41])]
    path = Path(write(tmp_path / "t.txt", documents))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.txt").write_bytes(path.read_bytes())
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    rows = [{"text": document[0]} for document in documents]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = []
    for source in ("t.txt", "t.txt.gz", "t.jsonl", "t.parquet", "folder", "t.t*t"):
        stream = BlockStream(
            open_corpus([str(tmp_path / source)]), tokenizer, batch_size=4, block_size=9, buffer=8
        )
        found.append([rows_of(batch) for batch in islice(stream.batches(), 5)])
    assert all(batches == found[0] for batches in found)


@pytest.mark.parametrize(
    ("template", "before", "after"), [("<s> $A </s>", 1, 1), ("$A </s> <s>", 0, 2), ("$A", 0, 0)]
)
def test_special_pieces_stand_where_the_tokenizer_puts_them(
    tmp_path: Path, template: str, before: int, after: int
) -> None:
    """The teacher has never seen a text without its <s>."""
    vocabulary = {piece: place for place, piece in enumerate(["<pad>", "<s>", "</s>", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(piece, vocabulary[piece]) for piece in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    backend.enable_truncation(4)
    packer = Packer(tokenizer, 9)
    assert (len(packer.before), len(packer.after)) == (before, after)
    corpus = open_corpus([write(tmp_path / "t.txt", [["a b b a"], ["a b a b a b a b a b a b"]])])
    for block in sample_blocks(corpus, tokenizer, block_size=9, count=9):
        text = tokenizer.decode(block[before : len(block) - after])
        assert block == tokenizer(text, truncation=False)["input_ids"]
    blocks = sample_blocks(corpus, tokenizer, block_size=9, count=9)
    assert sorted(map(len, blocks)) == [4 + before + after, 9, 9]


def test_a_tokenizer_that_is_set_meanwhile_does_not_matter(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """The rows of an evaluation are tokenised, and truncated, between two batches."""
    corpus = corpus_of(tmp_path, FILES)
    sizes = {"block_size": 8, "batch_size": 2, "buffer": 4, "seed": 1}
    expected = expected_batches(FILES, **sizes)
    for batch in islice(BlockStream(corpus, tokenizer, **sizes).batches(), 30):
        tokenizer(["good bad fine"], truncation=True, max_length=4, padding="max_length")
        assert rows_of(batch) == next(expected)


def test_a_state_of_another_stream_is_refused(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """It would go on with other text, as if nothing had happened."""
    corpus = corpus_of(tmp_path, FILES)
    sizes = {"block_size": 8, "batch_size": 2, "buffer": 4, "seed": 1}
    state = BlockStream(corpus, tokenizer, **sizes).state(0)
    for name in sizes:
        other = BlockStream(corpus, tokenizer, **sizes | {name: 9})
        with pytest.raises(
            InputError, match=f"with {name} {sizes[name]}, and now with 9: give the same {name}"
        ):
            other.batches(0, state)
    (tmp_path / "other").mkdir()
    other = BlockStream(corpus_of(tmp_path / "other", FILES[1:]), tokenizer, **sizes)
    with pytest.raises(InputError, match=r"with corpus .* give the same corpus, or start anew"):
        other.batches(0, state)
    stream = BlockStream(corpus, tokenizer, **sizes)
    list(islice(stream.batches(), 20))
    with pytest.raises(InputError, match="the state is of a batch after 2"):
        stream.batches(2, stream.state(19))


def test_sizes_that_hold_nothing_are_refused(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """A window of no pieces never ends."""
    corpus = corpus_of(tmp_path, FILES)
    with pytest.raises(InputError, match="block_size is 2: with special pieces it must be at least 3"):
        BlockStream(corpus, tokenizer, batch_size=2, block_size=2)
    with pytest.raises(InputError, match="batch_size is 0 and buffer 8192"):
        BlockStream(corpus, tokenizer, batch_size=0)
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(InputError, match="no piece for padding"):
        BlockStream(corpus, PreTrainedTokenizerFast(tokenizer_object=backend), batch_size=2)


def test_a_corpus_of_white_space_is_an_error(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """It would be read for ever."""
    corpus = open_corpus([write(tmp_path / "t.txt", [[" "], ["\t", ""]])])
    with pytest.raises(InputError, match=r"the corpus has no text \(.*t.txt\)"):
        next(BlockStream(corpus, tokenizer, batch_size=2).batches())
    with pytest.raises(InputError, match="the corpus has no text"):
        sample_blocks(corpus, tokenizer, count=2)


def test_an_error_in_the_thread_is_an_error_here_and_closing_ends_it(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A run would wait for ever for a batch that never comes; or end, and its thread read on."""

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("packing")]

    path = Path(write(tmp_path / "t.txt", make_documents([40] * 50)))
    path.write_bytes(path.read_bytes() + b"\n\xff")
    stream = BlockStream(open_corpus([str(path)]), tokenizer, batch_size=2, block_size=8, buffer=4)
    with pytest.raises(InputError, match=r"t\.txt is not UTF-8"):
        list(islice(stream.batches(), 300))
    assert threads() == []
    batches = BlockStream(corpus_of(tmp_path, FILES), tokenizer, batch_size=2, buffer=2).batches()
    next(batches)
    assert threads()
    batches.close()
    assert threads() == []


def test_closing_does_not_wait_for_the_next_group(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """A run that was told to stop would first read ten megabytes more."""
    pieces = []

    def read(shard: int, start_row: int = 0) -> Iterator[tuple[int, list[str]]]:
        for row in range(start_row + 1, 10**6):
            time.sleep(0.002)
            pieces.append(row)
            yield row, ["good", ""]

    corpus = corpus_of(tmp_path, FILES)
    object.__setattr__(corpus, "read", read)
    batches = BlockStream(corpus, tokenizer, batch_size=2, buffer=300).batches()
    next(batches)
    batches.close()
    assert 300 <= len(pieces) < 500


def test_a_sample_is_finite_seeded_and_from_all_of_the_buffer(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """Calibration text from a single article is no sample."""
    files = [make_documents([6], seed=place) for place in range(40)]
    corpus = corpus_of(tmp_path, files)
    everything = [block for file in files for block in expected_blocks(file, 6)]
    options: dict[str, Any] = {"block_size": 8, "buffer": 30}
    drawn = sample_blocks(corpus, tokenizer, count=10, seed=1, **options)
    assert len(drawn) == 10
    assert all(block in everything for block in drawn)
    assert drawn == sample_blocks(corpus, tokenizer, count=10, seed=1, **options)
    assert drawn != sample_blocks(corpus, tokenizer, count=10, seed=2, **options)
    order = np.random.Generator(np.random.PCG64([1, 0])).permutation(40)
    assert any(block not in [everything[place] for place in order[:10]] for block in drawn)
    assert sorted(sample_blocks(corpus, tokenizer, count=99, **options)) == sorted(everything)


def test_a_small_corpus_is_counted(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """An estimate of a pass that is whole in the sample would be off for nothing."""
    files = FILES * 5  # more files than are sampled of a larger corpus
    length = pass_length(corpus_of(tmp_path, files), tokenizer, block_size=8)
    blocks = [block for file in files for block in expected_blocks(file, 6)]
    pieces = sum(len(" ".join(document).split()) for file in files for document in file)
    assert length is not None
    assert (length.pieces, length.blocks, length.exact) == (pieces, len(blocks), True)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz"])
def test_a_large_corpus_is_estimated(
    tmp_path: Path, tokenizer: BertTokenizerFast, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The length of the schedule is reckoned from it."""
    monkeypatch.setattr("tinybert.packing._SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr(corpus_room, "_ROWS", 20)
    generator = random.Random(0)
    paths, pieces, blocks = [], 0, 0
    for place in range(12):
        documents = make_documents([generator.randint(1, 200) for _ in range(40 + 10 * place)], seed=place)
        documents = [[" ".join(document)] for document in documents]
        rows = "\n".join(json.dumps({"id": "x" * 50, "text": document[0]}) for document in documents)
        text = rows if kind == "jsonl" else "\n\n".join(document[0] for document in documents)
        path = tmp_path / f"{place}.{kind}"
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
        paths.append(str(path))
        pieces += sum(len(document[0].split()) for document in documents)
        blocks += len(expected_blocks(documents, 30))
    length = pass_length(open_corpus(paths), tokenizer, block_size=32)
    assert length is not None
    assert not length.exact
    assert length.pieces == pytest.approx(pieces, rel=0.06)
    assert length.blocks == pytest.approx(blocks, rel=0.06)


def test_a_document_without_end_takes_no_more_than_a_block(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A corpus without blank lines is one document, as large as the disk."""
    documents = make_documents([30_000])
    stream = BlockStream(corpus_of(tmp_path, [documents]), tokenizer, batch_size=8, block_size=16, buffer=64)
    got = []
    for number, batch in enumerate(islice(stream.batches(), 268)):
        got += rows_of(batch)
        assert len(stream.state(number)["carried"]) <= 14
    everything = expected_blocks(documents, 14)
    assert len(everything) == 2143
    assert sorted(got[:2112]) == sorted(everything[:2112])
