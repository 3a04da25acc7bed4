"""A smaller vocabulary changes nothing for text it still has the pieces of, and spells all other text."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AlbertTokenizer,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    BertTokenizerFast,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
    XLMRobertaTokenizer,
)

from conftest import PIECES, randomise
from tinybert.errors import InputError
from tinybert.vocabulary import (
    Cut,
    cut_embeddings,
    cut_vocabulary,
    vocabulary_difference,
    write_vocabulary,
)

ROOT = Path(__file__).parent.parent
PROSE = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", PROSE)
SIZE = 800
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 80,
}
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
KINDS = ("bert", "mpnet", "roberta", "xlm-roberta", "albert")


def word_pieces() -> dict[str, int]:
    raw = Tokenizer(WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    unused = [f"[unused{number}]" for number in range(20)]
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=BERT_SPECIAL + unused)
    raw.train_from_iterator([PROSE.lower()], trainer)
    return raw.get_vocab()


def unigram_pieces(special: list[str]) -> list[tuple[str, float]]:
    raw = Tokenizer(Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token="<unk>")
    raw.train_from_iterator(PROSE.lower().splitlines(), trainer)
    return [tuple(entry) for entry in json.loads(raw.to_str())["model"]["vocab"]]


def bpe_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=ROBERTA_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([PROSE], trainer)
    model = json.loads(raw.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@cache
def whole(kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random model of a family with a tokenizer trained on the README; MPNet and RoBERTa pad with 1."""
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    padding: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "bert":
        tokenizer = BertTokenizer(vocab=word_pieces())
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SHAPE))
    elif kind == "mpnet":
        pieces = ["[CLS]", "[PAD]", *(piece for piece in word_pieces() if piece not in ("[CLS]", "[PAD]"))]
        tokenizer = BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})
        tokenizer.add_tokens(["<url>"])
        rows = len(tokenizer) + 7  # embeddings are often longer than the vocabulary
        model = MPNetForSequenceClassification(MPNetConfig(vocab_size=rows, **SHAPE | padding))
    elif kind == "roberta":
        vocabulary, merges = bpe_pieces()
        tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges)
        model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **SHAPE | padding))
    elif kind == "xlm-roberta":
        tokenizer = XLMRobertaTokenizer(vocab=unigram_pieces(ROBERTA_SPECIAL))
        model = XLMRobertaForTokenClassification(
            XLMRobertaConfig(vocab_size=len(tokenizer), **SHAPE | padding)
        )
    else:
        tokenizer = AlbertTokenizer(vocab=unigram_pieces(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))
        shape = SHAPE | {"embedding_size": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        model = AlbertForSequenceClassification(AlbertConfig(vocab_size=len(tokenizer), **shape))
    tokenizer.model_max_length = 70
    return randomise(model), tokenizer


@cache
def cut(kind: str) -> Cut:
    """Three quarters of the pieces, those that the first half of the README uses most."""
    model, tokenizer = whole(kind)
    lines = PROSE[: len(PROSE) // 2].splitlines()
    return cut_vocabulary(model, tokenizer, [lines[:50], lines[50:]], 3 * len(tokenizer) // 4)


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of the README's words, some of them misspelt or run together."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(1, 9))
        if generator.random() < 0.3:
            at = generator.randrange(len(words))
            words[at] = "".join(generator.sample(words[at], len(words[at])))
        found.append(generator.choice([" ", " ", "", "  "]).join(words))
    return found


def spelt(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the pieces of a text, strung together."""
    pieces = tokenizer.tokenize(text)
    return "".join(piece.removeprefix("##") for piece in pieces)


def check_text(kind: str, text: str) -> bool:
    """Check one text; say whether all of its pieces were kept."""
    model, tokenizer = whole(kind)
    smaller = cut(kind)
    places = {old: new for new, old in enumerate(smaller.kept.tolist())}
    assert spelt(smaller.tokenizer, text) == spelt(tokenizer, text)
    old = tokenizer(text, truncation=True)["input_ids"]
    new = smaller.tokenizer(text, truncation=True)["input_ids"]
    if not all(place in places for place in old):
        return False
    assert new == [places[place] for place in old]
    with torch.no_grad():
        before = model(input_ids=torch.tensor([old]), output_hidden_states=True)
        after = smaller.model(input_ids=torch.tensor([new]), output_hidden_states=True)
    assert torch.equal(before.hidden_states[-1], after.hidden_states[-1])
    if before.logits.shape == after.logits.shape:
        assert torch.equal(before.logits, after.logits)
    else:  # of a masked LM: one a piece, from a smaller matrix, which may sum in another order
        assert torch.allclose(before.logits[..., smaller.kept], after.logits, rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_text_whose_pieces_are_all_kept_is_tokenised_as_before_and_answered_to_the_bit(kind: str) -> None:
    """A model that answers known text otherwise after pruning is another model, and nobody would know."""
    same = [check_text(kind, text) for text in texts(150)]
    assert 30 < sum(same) < 145  # both sorts of text were met


@settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    text=st.one_of(
        st.text(max_size=30),
        st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
        st.text(alphabet="aeinrst .,'", max_size=30),
    ),
)
def test_any_text_at_all_is_tokenised_as_before_or_into_more_pieces(kind: str, text: str) -> None:
    """Emoji, half words and control characters come from the outside world, and none may break a server."""
    check_text(kind, text)


def test_a_cut_folder_opens_with_stock_code_and_has_the_same_vocabulary_in_all_its_files(
    tmp_path: Path,
) -> None:
    """Old servers read vocab.txt and new ones tokenizer.json: other ids in either answer nonsense."""
    smaller = cut("bert")
    smaller.model.save_pretrained(tmp_path)
    smaller.tokenizer.save_pretrained(tmp_path)
    write_vocabulary(smaller.tokenizer, tmp_path)
    opened, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer.get_vocab() == smaller.tokenizer.get_vocab()
    assert opened.config.vocab_size == len(tokenizer) == opened.get_input_embeddings().num_embeddings
    assert opened.cls.predictions.bias.shape == (len(tokenizer),)
    assert opened.cls.predictions.decoder.weight is opened.get_input_embeddings().weight
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    slow = BertTokenizer.from_pretrained(tmp_path)
    for text in texts(20):
        assert slow(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert not any(piece.startswith("[unused") for piece in tokenizer.get_vocab())


def test_a_cut_bpe_tokenizer_opens_from_its_vocabulary_and_merges(tmp_path: Path) -> None:
    """A merge whose piece is gone stops some tokenizers from opening at all."""
    smaller = cut("roberta")
    write_vocabulary(smaller.tokenizer, tmp_path)
    raw = Tokenizer(BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts(20):
        assert raw.encode(text).ids == smaller.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_each_piece_that_is_kept_can_still_be_reached(kind: str) -> None:
    """A row of the embeddings that no text can reach is weight for nothing."""
    tokenizer = cut(kind).tokenizer
    model = tokenizer.backend_tokenizer.model
    plain = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    lost = [p for p in plain if [t.value for t in model.tokenize(p)] != [p] and not p.startswith("##")]
    if kind == "xlm-roberta":  # whose longer pieces may lose to two shorter ones, before as after
        before = whole(kind)[1].backend_tokenizer.model
        lost = [p for p in lost if [t.value for t in before.tokenize(p)] == [p]]
    assert not lost


def test_special_and_added_tokens_keep_their_part_and_padding_its_id() -> None:
    """MPNet and RoBERTa count positions from the padding's id, whatever the configuration says."""
    (_, tokenizer), smaller = whole("mpnet"), cut("mpnet")
    assert smaller.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert smaller.tokenizer.pad_token_id == smaller.model.config.pad_token_id == 1
    assert smaller.tokenizer.tokenize("see <url> there")[1] in ("<url>", "##e")
    assert "<url>" in smaller.tokenizer.tokenize("see <url> there")
    assert (
        smaller.tokenizer.decode(smaller.tokenizer("the", "model")["input_ids"])
        == "[CLS] the [SEP] model [SEP]"
    )


def test_the_most_used_pieces_stay_and_rare_ones_go() -> None:
    """Pieces kept by their number instead of their use make the cut model spell common words."""
    model, tokenizer = whole("bert")
    smaller = cut_vocabulary(model, tokenizer, [["distil the teacher"] * 3, ["distil"]], 250)
    assert {"teacher", "the"} <= set(smaller.tokenizer.get_vocab())
    assert smaller.tokenizer.tokenize("distil the teacher") == tokenizer.tokenize("distil the teacher")
    assert smaller.coverage == 1.0
    assert len(smaller.tokenizer) == len(smaller.kept) == 250  # the rest are filled from the old vocabulary
    with pytest.raises(InputError) as refused:
        cut_vocabulary(model, tokenizer, [["the"]], 5)
    least = int(str(refused.value).split(" are ")[1].split()[0])
    few = cut_vocabulary(model, tokenizer, [["the student"] * 3, ["teacher"]], least + 1)
    assert "the" in few.tokenizer.get_vocab()
    assert len(few.kept) == least + 1
    assert 0.1 < few.coverage < 1.0


def test_what_cannot_be_cut_is_refused_in_one_line() -> None:
    """A cut that is none, has no room or fits no model would make a folder that answers nonsense."""
    model, tokenizer = whole("bert")
    with pytest.raises(InputError, match=r"there are \d+ pieces, so give fewer"):
        cut_vocabulary(model, tokenizer, [["a"]], len(tokenizer))
    with pytest.raises(InputError, match=r"single characters, which spell all other words, are \d+ here"):
        cut_vocabulary(model, tokenizer, [["a"]], 20)
    with pytest.raises(InputError, match="the corpus has no text"):
        cut_vocabulary(model, tokenizer, [[], [""]], 400)
    small = randomise(BertForSequenceClassification(BertConfig(vocab_size=30, **SHAPE)))
    with pytest.raises(InputError, match="the model's embeddings 30 rows"):
        cut_vocabulary(small, tokenizer, [["a"]], 400)
    words = Tokenizer(WordLevel({piece: place for place, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(InputError, match="a WordLevel tokenizer cannot be cut"):
        cut_vocabulary(small, other, [["a"]], 20)
    suffix = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(end_of_word_suffix="</w>")))
    suffix.add_tokens(["a", "b"])
    with pytest.raises(InputError, match="BPE tokenizer with end_of_word_suffix cannot be cut"):
        cut_vocabulary(small, suffix, [["a"]], 2)


def test_a_cut_that_changes_what_the_model_computes_is_noticed() -> None:
    """RoBERTa's padding at another id would shift all positions, and no error would say so."""
    model, _ = whole("roberta")
    with pytest.raises(InputError, match="computes something else once its vocabulary is cut"):
        cut_embeddings(model, np.array([0, 2, 3, 1, 4, 5, 6]))


def test_vocabularies_are_compared_piece_by_piece(tokenizer: BertTokenizerFast) -> None:
    """States are compared token by token: as many pieces, but other ones, are other tokens."""
    vocabulary = tokenizer.get_vocab()
    assert vocabulary_difference(tokenizer, BertTokenizerFast(vocab=dict(vocabulary))) is None
    swapped = dict(vocabulary) | {"good": vocabulary["bad"], "bad": vocabulary["good"]}
    assert vocabulary_difference(BertTokenizerFast(vocab=swapped), tokenizer) == (
        "different vocabularies (25 and 25 pieces; 'bad' is 5 and 9)"
    )
    longer = BertTokenizerFast(vocab=dict(vocabulary) | {"zebra": len(vocabulary)})
    assert "'zebra' is 25 and None" in str(vocabulary_difference(longer, tokenizer))
