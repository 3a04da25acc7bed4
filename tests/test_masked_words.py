"""Candidates of a masked language model against one plain forward pass a mask, head and all."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from conftest import BAD, FILLERS, GOOD, PIECES, make_masked_lm, randomise
from tinybert.masked_words import MaskedWords

_SHAPE: dict[str, Any] = {
    "vocab_size": len(PIECES),
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "bert": lambda: BertForMaskedLM(
        BertConfig(**_SHAPE, num_hidden_layers=2, hidden_size=32, intermediate_size=40)
    ),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**_SHAPE, num_hidden_layers=2, hidden_size=32, intermediate_size=40)
    ),
    "electra": lambda: ElectraForMaskedLM(
        ElectraConfig(**_SHAPE, num_hidden_layers=2, hidden_size=32, embedding_size=16, intermediate_size=40)
    ),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(**_SHAPE, n_layers=2, dim=32, n_heads=4, hidden_dim=40)
    ),
}
WORDS = tuple(word for word in (*GOOD, *BAD, *FILLERS) if word != "a")  # a letter is no word
TEXTS = ["the film was very good", "A dull plot, a poor cast.", "great", "films and a story with a plot " * 4]


@pytest.fixture(scope="module")
def masked_lm() -> PreTrainedModel:
    return make_masked_lm()


def words_of(masked_words: MaskedWords, texts: Sequence[str]) -> list[Any]:
    read = masked_words.read(texts)
    return [(text, [word for word in text.words if masked_words.is_one_piece(text, word)]) for text in read]


@torch.no_grad()
def by_formula(model: PreTrainedModel, tokenizer: Any, ids: list[int], place: int, word: str) -> list[str]:
    """Rank the whole vocabulary at one mask; keep words other than the one that stood there."""
    shown = list(ids)
    shown[place] = tokenizer.mask_token_id
    logits = model(input_ids=torch.tensor([shown])).logits[0, place]
    ranked = [PIECES[piece] for piece in logits.argsort(descending=True)]
    return [found for found in ranked if found in WORDS and found != word.lower()]


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_the_most_probable_other_words(family: str, tokenizer: Any) -> None:
    """A head run at the masks alone, in batches with padding, must not change what is proposed."""
    model = randomise(FAMILIES[family]())
    masked_words = MaskedWords(model, tokenizer, masked_share=0.0, tokens_per_batch=48)
    asked = words_of(masked_words, TEXTS)
    answers = masked_words.candidates(asked, 4)
    seen = 0
    for (text, words), lists in zip(asked, answers, strict=True):
        ids = tokenizer(text.text)["input_ids"]
        for word, found in zip(words, lists, strict=True):
            spelled = text.text[word.start : word.end]
            expected = by_formula(model, tokenizer, ids, word.first + 1, spelled)[:4]
            assert found == sorted(expected)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_candidates_do_not_depend_on_the_batches(
    masked_lm: PreTrainedModel, tokenizer: Any, share: float, budget: int
) -> None:
    one, other = (
        MaskedWords(masked_lm, tokenizer, masked_share=share, tokens_per_batch=size) for size in (budget, 256)
    )
    asked = words_of(one, TEXTS)
    assert one.candidates(asked, 3) == other.candidates(asked, 3)
    alone = [one.candidates([single], 3)[0] for single in asked]
    assert alone == one.candidates(asked, 3)


def test_words_that_are_not_to_be_proposed_make_room_for_the_next(
    masked_lm: PreTrainedModel, tokenizer: Any
) -> None:
    masked_words = MaskedWords(masked_lm, tokenizer, masked_share=0.0)
    asked = words_of(masked_words, ["a good film"])
    (all_of_them,), (some,) = (
        masked_words.candidates(asked, 99, never) for never in ((), ("bad", "the", "x"))
    )
    assert [sorted({*found} - {"bad", "the"}) for found in all_of_them] == some
    assert [len(found) for found in masked_words.candidates(asked, 5, ("bad", "the"))[0]] == [5, 5]


def test_no_copy_has_more_masks_than_its_share(
    masked_lm: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidates of two masks that are neighbours are those of neither word."""
    masked_words = MaskedWords(masked_lm, tokenizer, masked_share=0.2)
    copies: list[tuple[int, ...]] = []
    predict = masked_words._predict

    def watch(batch: Any, *rest: Any) -> Any:
        copies.extend(batch)
        return predict(batch, *rest)

    monkeypatch.setattr(masked_words, "_predict", watch)
    asked = words_of(masked_words, TEXTS)
    masked_words.candidates(asked, 3)
    masks = [sum(piece == tokenizer.mask_token_id for piece in copy) for copy in copies]
    assert max(masks) > 1
    assert all(count <= max(1, 0.2 * (len(copy) - 2)) for count, copy in zip(masks, copies, strict=True))
    assert sum(masks) == sum(len(words) for _, words in asked)


def test_equal_masked_texts_run_once_and_exclude_each_their_own_word(
    masked_lm: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts that differ at the mask alone are one copy, but not one question."""
    masked_words = MaskedWords(masked_lm, tokenizer, masked_share=0.0)
    seen = []
    logits = masked_words._logits
    monkeypatch.setattr(
        masked_words, "_logits", lambda copies, *places: seen.append(len(copies)) or logits(copies, *places)
    )
    asked = [
        (text, [text.words[1]])
        for text in masked_words.read(["the good film", "the bad film", "THE BAD FILM"])
    ]
    good, bad, upper = masked_words.candidates(asked, len(PIECES))
    assert seen == [1]
    assert "good" not in good[0]
    assert "bad" in good[0]
    assert "bad" not in bad[0]
    assert "good" in bad[0]
    assert upper == bad


def test_longer_texts_than_the_model_reads_are_shown_in_windows(
    masked_lm: PreTrainedModel, tokenizer: Any
) -> None:
    """Cut off at the end, the last words of a long text would never change."""
    masked_words = MaskedWords(masked_lm, tokenizer, masked_share=0.0, positions=16)
    text = " ".join(WORDS[place % len(WORDS)] for place in range(50))
    ((read, words),) = asked = words_of(masked_words, [text])
    assert len(words) == 50
    (found,) = masked_words.candidates(asked, 3)
    ids = list(read.ids)
    for place in (0, 25, 49):
        start = min((0, 7, 14, 21, 28, 35, 36), key=lambda start: abs(start + 7 - place))
        shown = [tokenizer.cls_token_id, *ids[start : start + 14], tokenizer.sep_token_id]
        expected = by_formula(masked_lm, tokenizer, shown, place - start + 1, WORDS[place % len(WORDS)])
        assert found[place] == sorted(expected[:3])


@given(st.lists(st.sampled_from([*WORDS, "films", "unknown", ",", "[MASK]", "é", "中"]), max_size=12))
def test_special_and_continuing_pieces_and_unknown_words_are_never_candidates(words: list[str]) -> None:
    masked_words = _masked_words()
    for (text, asked), lists in zip(
        found := words_of(masked_words, [" ".join(words)]), masked_words.candidates(found, 99), strict=True
    ):
        for word, candidates in zip(asked, lists, strict=True):
            spelled = text.text[word.start : word.end]
            assert spelled in WORDS
            assert candidates == sorted(set(WORDS) - {spelled})


_made: list[MaskedWords] = []


def _masked_words() -> MaskedWords:
    if not _made:
        from transformers import BertTokenizerFast

        tokenizer = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(PIECES)})
        _made.append(MaskedWords(make_masked_lm(), tokenizer))
    return _made[0]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like RoBERTa's: a piece knows whether a space stands before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<pad>", "<mask>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the film was good", "Films were good, the film bad"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )


def test_byte_level_candidates_fit_the_space_before_them(byte_level: PreTrainedTokenizerFast) -> None:
    """ "film" and " film" are two pieces; the one without its space would run into the word before it."""
    config = BertConfig(
        **_SHAPE | {"vocab_size": len(byte_level)},
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=40,
    )
    masked_words = MaskedWords(randomise(BertForMaskedLM(config)), byte_level)
    (read,) = masked_words.read(["film was good"])
    assert [masked_words.is_one_piece(read, word) for word in read.words][1:] == [True, True]
    (lists,) = masked_words.candidates([(read, read.words[1:])], 999)
    spaced = {
        piece.removeprefix("Ġ") for piece in byte_level.get_vocab() if piece.startswith("Ġ") and piece != "Ġ"
    }
    assert {"the", "film", "bad"} <= set(lists[0]) <= spaced
    assert "was" not in lists[0]
    assert "was" in lists[1]
