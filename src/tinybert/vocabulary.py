"""A smaller vocabulary: the pieces that a corpus uses, a tokenizer that knows no others, a model cut to them.

Text whose pieces are all kept is tokenised as before, and the cut model computes the same bits from it. Why,
of each kind of tokenizer:

- WordPiece takes the longest piece that fits, from the left: where that one is kept, it is still the
  longest.
- BPE merges the pair that is first in its list, again and again. All pieces that a kept piece is merged from
  are kept with it, so its merges are, in their order; a merge that is gone was not made in such text anyway.
- Unigram takes the segmentation with the highest score: what is best of all is best of fewer. The price of
  an unknown character hangs on the lowest score of all pieces, so that piece is kept.

Other text falls into shorter pieces: all single characters of the vocabulary are kept. What could not be
spelt before is [UNK] as before (with WordPiece, as long as each character of its pieces is a piece of its
own).
"""

import copy
import json
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tinybert.errors import InputError, one_line


class Cut(NamedTuple):
    """A smaller vocabulary and those who read it.

    Attributes:
        model: Opens with stock code, as before.
        tokenizer: Gives the new ids.
        kept: (new size,) the old id of each new one.
        coverage: Share of the pieces in the corpus that are kept.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept: np.ndarray
    coverage: float


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[str]], size: int
) -> Cut:
    """Cut a model and its tokenizer to the pieces that some text uses most.

    Besides these, special and added tokens and all single characters are kept; they count towards the size.
    Where the text uses fewer pieces, the first ones of the old vocabulary fill the rest: they were the most
    frequent ones where it was made.

    Args:
        model: Any transformers encoder, with any head; read only.
        tokenizer: Its fast tokenizer: WordPiece, BPE or Unigram; read only.
        texts: The corpus, in batches.
        size: Pieces to keep.

    Raises:
        InputError: A tokenizer of another kind, a size that is no cut or has no room for what must stay, no
            text, or a model that does not fit its tokenizer.
    """
    check_fits(model, tokenizer)
    pieces = _Pieces(tokenizer, _special_ids(model.config))
    pieces.check_size(size)
    counts = pieces.count(texts)
    kept = pieces.choose(counts, size)
    smaller = cut_embeddings(model, kept)
    coverage = float(counts[kept].sum() / counts.sum())
    return Cut(smaller, pieces.tokenizer_of(kept), kept, coverage)


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model has an embedding for each piece of a tokenizer.

    Raises:
        InputError: It has not.
    """
    embeddings: Any = model.get_input_embeddings()
    rows, largest = len(embeddings.weight), max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"the tokenizer has ids up to {largest} and the model's embeddings {rows} rows: give a folder "
            "where the two belong together"
        )


class _Pieces:
    """The pieces of a tokenizer: which are needed, which are used, and what hangs on what."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_ids: Iterable[int]) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"the vocabulary of {type(tokenizer).__name__} cannot be cut: it is no fast tokenizer"
            )
        self._tokenizer = tokenizer
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._state = json.loads(self._backend.to_str())
        self._model = self._state["model"]
        self.kind = str(self._model.get("type"))
        self._check_kind()
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self.total = max(self._ids.values()) + 1
        self._names = {place: name for name, place in self._ids.items()}
        self._prefix = self._model.get("continuing_subword_prefix") or "" if self.kind == "WordPiece" else ""
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(self._model.get("merges", ()))}
        self.needed = self._needed(special_ids)

    def _check_kind(self) -> None:
        if self.kind not in ("WordPiece", "BPE", "Unigram"):
            raise InputError(
                f"the vocabulary of a {self.kind} tokenizer cannot be cut: expected WordPiece, BPE or Unigram"
            )
        names = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
        odd = [name for name in names if self._model.get(name)]
        if self.kind == "BPE" and odd:
            raise InputError(f"the vocabulary of a BPE tokenizer with {odd[0]} cannot be cut: leave it whole")

    def _needed(self, special_ids: Iterable[int]) -> set[int]:
        """Return the ids that stay: special and added ones, single characters, what prices unknown ones."""
        needed = {place for place in special_ids if place in self._names}
        needed |= {token["id"] for token in self._state["added_tokens"]}
        needed |= {place for place in self._tokenizer.all_special_ids if place in self._names}
        for name, place in self._ids.items():
            is_byte = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
            if len(name) == 1 or len(name.removeprefix(self._prefix)) == 1 or is_byte:
                needed.add(place)
        if self._model.get("unk_token") in self._ids:
            needed.add(self._ids[self._model["unk_token"]])
        if self.kind == "Unigram":
            scores = [score for _, score in self._model["vocab"]]
            needed |= {int(np.argmin(scores))} | {self._model["unk_id"]} - {None}
        return needed

    def check_size(self, size: int) -> None:
        """Check, before any text is read, that so many pieces can be kept."""
        if size >= len(self._ids):
            raise InputError(f"--vocabulary is {size}: there are {len(self._ids)} pieces, so give fewer")
        if size < len(self.needed):
            raise InputError(
                f"--vocabulary is {size}: special tokens and single characters, which spell all other words, "
                f"are {len(self.needed)} here, so give more"
            )

    def count(self, texts: Iterable[Sequence[str]]) -> np.ndarray:
        """Return how often each id (total,) occurs in some text."""
        counts = np.zeros(self.total, np.int64)
        for batch in texts:
            encodings = self._backend.encode_batch_fast(list(batch), add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
            counts += np.bincount(ids, minlength=self.total)
        if not counts.any():
            raise InputError("the corpus has no text: name files with text")
        return counts

    def choose(self, counts: np.ndarray, size: int) -> np.ndarray:
        """Return the old ids of a vocabulary of at most so many pieces, in the order of the new ones."""
        chosen = set(self.needed)
        for place in np.lexsort((np.arange(self.total), -counts)).tolist():
            if len(chosen) == size:
                break
            if place in chosen or place not in self._names:
                continue
            if more := self._with_parts(self._names[place], is_used=counts[place] > 0):
                missing = more - chosen
                if len(chosen) + len(missing) <= size:
                    chosen |= missing
        kept = sorted(chosen)
        # RoBERTa and MPNet count positions from the padding's id on, so it stays where it can.
        padding = self._tokenizer.pad_token_id
        if padding is not None and padding < len(kept) and padding in self._model_ids():
            kept.remove(padding)
            kept.insert(padding, padding)
        return np.array(kept)

    def _model_ids(self) -> set[int]:
        """Return the ids of all pieces but added tokens that lie beyond the model's own vocabulary."""
        vocabulary = self._model["vocab"]
        return set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))

    def _with_parts(self, piece: str, *, is_used: bool) -> set[int]:
        """Return the ids of a piece and of all it is merged from; none if no text can have this piece."""
        if self.kind == "BPE":
            return self._derivation(piece)
        if not is_used and not self._is_a_word(piece):
            return set()
        return {self._ids[piece]}

    def _is_a_word(self, piece: str) -> bool:
        """Whether some text may have a piece: the [unused7] of BERT falls into several words."""
        if self.kind == "Unigram":
            return [token.value for token in self._backend.model.tokenize(piece)] == [piece]
        text = piece.removeprefix(self._prefix)
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [(text, None)]
        if self._backend.pre_tokenizer is not None:
            words = self._backend.pre_tokenizer.pre_tokenize_str(text)
        return [word for word, _ in words] == [piece.removeprefix(self._prefix)]

    def _derivation(self, piece: str) -> set[int]:
        """Merge a piece from its characters as BPE does; return the ids of all that come up on the way."""
        parts, made = list(piece), set(piece)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            rank, place = min((self._ranks.get(pair, len(self._ranks)), at) for at, pair in enumerate(pairs))
            if rank == len(self._ranks):
                return set()
            parts[place : place + 2] = ["".join(pairs[place])]
            made.add(parts[place])
        return {self._ids[part] for part in made} if made <= self._ids.keys() else set()

    def tokenizer_of(self, kept: np.ndarray) -> PreTrainedTokenizerBase:
        """Return a tokenizer of the same class that knows the kept pieces alone, by their new ids.

        Raises:
            InputError: The class makes something else of the cut files.
        """
        places = {old: new for new, old in enumerate(kept.tolist())}
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        _cut_state(state, places)
        expected = {name: places[old] for name, old in self._ids.items() if old in places}
        with TemporaryDirectory(prefix="tinybert-") as folder:
            self._tokenizer.save_pretrained(folder)
            Path(folder, "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
            try:
                tokenizer = type(self._tokenizer).from_pretrained(folder, trust_remote_code=False)
            except Exception as error:  # tokenizers raises bare Exception
                raise InputError(f"this tokenizer cannot be cut: {one_line(error)}") from error
        made = json.loads(tokenizer.backend_tokenizer.to_str())
        differs = [name for name in state if made.get(name) != state[name]]
        if tokenizer.get_vocab() != expected or differs:
            raise InputError(
                f"{type(tokenizer).__name__} does not take a smaller vocabulary as it is "
                f"({', '.join(differs) or 'other ids'} would change): leave --vocabulary out"
            )
        tokenizer.init_kwargs["name_or_path"] = tokenizer.name_or_path = self._tokenizer.name_or_path
        return tokenizer


def _cut_state(state: dict[str, Any], places: dict[int, int]) -> None:
    """Cut the content of a ``tokenizer.json`` to the old ids among ``places``, and give the new ones."""
    model = state["model"]
    if isinstance(model["vocab"], list):
        inverse = sorted((new, old) for old, new in places.items() if old < len(model["vocab"]))
        model["vocab"] = [model["vocab"][old] for _, old in inverse]
        if model["unk_id"] is not None:
            model["unk_id"] = places[model["unk_id"]]
    else:
        kept = {piece: places[old] for piece, old in model["vocab"].items() if old in places}
        model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept.keys()]
    for token in state["added_tokens"]:
        token["id"] = places[token["id"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    if state["padding"] is not None:
        state["padding"]["pad_id"] = places[state["padding"]["pad_id"]]
    _cut_processor(state["post_processor"] or {}, places)


def _cut_processor(processor: dict[str, Any], places: dict[int, int]) -> None:
    for inner in processor.get("processors", ()):
        _cut_processor(inner, places)
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [places[place] for place in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = places[processor[name][1]]


def write_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what tokenizers without ``tokenizer.json`` read: ``vocab.txt``, or ``vocab.json`` and merges.

    Of Unigram there is no such file but SentencePiece's own, which is not written.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "WordPiece":
        pieces = sorted(model["vocab"], key=model["vocab"].get)
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    if model["type"] == "BPE":
        text = json.dumps(model["vocab"], ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def _special_ids(config: PreTrainedConfig) -> list[int]:
    """Return the ids that a configuration names."""
    found = [value for name, value in config.to_dict().items() if name.endswith("_token_id")]
    return [value for value in found if isinstance(value, int)]


@torch.no_grad()
def cut_embeddings(model: PreTrainedModel, kept: np.ndarray) -> PreTrainedModel:
    """Return a copy of a model that knows only some pieces: embeddings and, if it has one, masked-LM head.

    Args:
        model: Any transformers encoder; read only.
        kept: (new size,) the old id of each new one.

    Raises:
        InputError: The class does not build a smaller model from its configuration alone, or the smaller one
            computes something else.
    """
    places = {old: new for new, old in enumerate(kept.tolist())}
    config = copy.deepcopy(model.config)
    config.vocab_size = len(kept)
    for name, value in model.config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, places.get(value))  # one that named no piece names none now
    smaller = type(model)(config)
    source, rows, old_size = model.state_dict(), torch.from_numpy(kept), model.config.vocab_size
    for name, tensor in smaller.state_dict().items():
        cut = source[name]
        if cut.shape != tensor.shape:
            if (len(cut), *tensor.shape[1:]) != (old_size, *cut.shape[1:]):
                raise InputError(
                    f"cannot cut {name} {tuple(cut.shape)} of {type(model).__name__} to {len(kept)}"
                )
            cut = cut[rows]
        tensor.copy_(cut)
    smaller.eval()
    _check_same(model, smaller, rows)
    return smaller


def _check_same(model: PreTrainedModel, smaller: PreTrainedModel, rows: torch.Tensor) -> None:
    """Check that both models make the same of the same pieces; ids that positions hang on would show."""
    length = min(len(rows), 16)
    was_training = model.training
    old = model.eval().base_model(input_ids=rows[None, :length]).last_hidden_state
    model.train(was_training)
    new = smaller.base_model(input_ids=torch.arange(length)[None]).last_hidden_state
    if not old.isfinite().all():
        raise InputError("the model computes no finite numbers: its weights are damaged")
    if not torch.equal(old, new):
        raise InputError(
            f"{type(model).__name__} computes something else once its vocabulary is cut: leave --vocabulary "
            "out"
        )


def check_pieces(source: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that a model has an embedding for every piece its tokenizer may make.

    Raises:
        InputError: It has not: they are not of one model.
    """
    embeddings: Any = model.get_input_embeddings()
    largest, pieces = max(tokenizer.get_vocab().values()), embeddings.num_embeddings
    if largest >= pieces:
        raise InputError(
            f"the tokenizer of {source} makes piece {largest}, and the model knows {pieces} only: put the "
            "tokenizer into its folder that it was trained with"
        )


def vocabulary_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Say how the vocabularies of two tokenizers differ; None where every piece has the same id in both."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if student_ids == teacher_ids:
        return None
    piece = min(
        (piece for piece in student_ids | teacher_ids if student_ids.get(piece) != teacher_ids.get(piece)),
        key=str,
    )
    return (
        f"different vocabularies ({len(student_ids)} and {len(teacher_ids)} pieces; "
        f"{piece!r} is {student_ids.get(piece)} and {teacher_ids.get(piece)})"
    )
