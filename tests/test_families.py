"""One small distillation of every family: captured, or refused by name with what works instead."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
    pipeline,
)

from conftest import QUICK, randomise, toy_rows
from test_capture import CAPTURED, OTHERS, other
from test_every_kind import write_rows
from tinybert.errors import InputError
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, EvaluateArguments, distill_task, evaluate
from tinybert.trainer import DistillationConfig

SOLVED = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet")
FAMILIES = ("bert", "roberta", "electra", "distilbert", *OTHERS)
STAGES = ("intermediate", "prediction")
LABELS = {0: "negative", 1: "positive"}
SHAPE: dict[str, Any] = {"layers": 2, "hidden_size": 16, "intermediate_size": 24, "max_length": 16}
Save = Callable[[PreTrainedModel, Path], Path]


@pytest.fixture
def make_teacher(
    tiny_encoder: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> Callable[[str], Path]:
    """``make_teacher(family)``: the folder of a random classifier of two classes."""

    def make(family: str) -> Path:
        if family in OTHERS:
            model = other(family, AutoModelForSequenceClassification, id2label=LABELS)
        else:
            config = tiny_encoder(family, id2label=LABELS).config
            model = randomise(AutoModelForSequenceClassification.from_config(config))
        return save_model(model, tmp_path / "teacher")

    return make


def distil(toy: dict[str, str], teacher: Path, folder: Path, weight: float, **options: Any) -> Result:
    """Two steps a stage, from a teacher that knows nothing."""
    arguments = DistillArguments(**toy, teacher=str(teacher), force=True, **SHAPE | options)
    settings = QUICK | {"max_steps": 2, "logging_steps": 1, "attention_weight": weight}
    return distill_task(arguments, DistillationConfig(str(folder), **settings))


def check_result(result: Result, toy: dict[str, str], parts: set[str]) -> PreTrainedModel:
    """Check what was trained and that stock transformers opens it; return what it opens."""
    stages = json.loads((result.output_dir / "run.json").read_text())["stages"]
    for stage, wanted in (("intermediate", parts), ("prediction", {"prediction_loss"})):
        first = {name: value for name, value in stages[stage]["log"][0].items() if name.endswith("_loss")}
        assert set(first) == wanted
        assert min(first.values()) > 0
    opened = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    found = evaluate(EvaluateArguments(str(result.output_dir), toy["eval"], max_length=16))
    assert found == pytest.approx(result.figures[-1].metrics)
    answers = pipeline("text-classification", str(result.output_dir), device="cpu")(["a good film", "bad"])
    assert {answer["label"] for answer in answers} <= set(LABELS.values())
    assert result.figures[1].parameters < result.figures[0].parameters
    return opened


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled_or_told_how(
    family: str, make_teacher: Callable[[str], Path], toy: dict[str, str], tmp_path: Path
) -> None:
    """A family that fails half-way, or is distilled on something that is not its scores, costs a night."""
    teacher, folder = make_teacher(family), tmp_path / "student"
    parts = {"embedding_loss", "hidden_1_loss", "hidden_2_loss"}
    options: dict[str, Any] = {}
    if family not in SOLVED:
        name = family.partition(",")[0]
        with pytest.raises(InputError, match=rf"no closed-form start from {name} to {name}.*init random"):
            distil(toy, teacher, folder, 0.0)
        options["init"] = "random"
    captured = family not in OTHERS or family in CAPTURED
    if captured:
        parts |= {"attention_1_loss", "attention_2_loss"}
    else:
        with pytest.raises(
            InputError, match=r"cannot be captured .* set attention_weight to 0, as hidden st"
        ):
            distil(toy, teacher, folder, 1.0, **options)
    assert not folder.exists(), "a refusal must come before anything is written"
    opened = check_result(distil(toy, teacher, folder, float(captured), **options), toy, parts)
    assert type(opened) is type(AutoModelForSequenceClassification.from_pretrained(teacher))
    assert (opened.config.num_hidden_layers, opened.config.hidden_size) == (2, 16)


HEADS = {"tokens": AutoModelForTokenClassification, "questions": AutoModelForQuestionAnswering}
TAGS = dict(enumerate(("O", "B-POS", "I-POS", "B-NEG", "I-NEG")))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_tags_and_answers(
    family: str, kind: str, tiny_encoder: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> None:
    """Heads over tokens hang on each family in a way of its own, and so do its places and pieces."""
    labels = {"id2label": TAGS, "label2id": {name: number for number, name in TAGS.items()}}
    given = labels if kind == "tokens" else {}
    if family in OTHERS:
        teacher = other(family, HEADS[kind], **given)
    else:
        teacher = randomise(HEADS[kind].from_config(tiny_encoder(family, **given).config))
    source = save_model(teacher, tmp_path / "teacher")
    rows = {name: str(write_rows(kind, tmp_path / name, seed)) for seed, name in enumerate(("train", "eval"))}
    captured = family not in OTHERS or family in CAPTURED
    options = {"max_length": 24, "init": "closed_form" if family in SOLVED else "random"}
    result = distil(rows, source, tmp_path / "student", float(captured), **options)
    stages = json.loads((result.output_dir / "run.json").read_text())["stages"]
    log = [{name for name in stages[stage]["log"][0] if name.endswith("_loss")} for stage in STAGES]
    assert ("attention_2_loss" in log[0], "hidden_2_loss" in log[0]) == (captured, True)
    assert log[1] == {"prediction_loss"}
    opened = HEADS[kind].from_pretrained(result.output_dir)
    assert type(opened) is type(teacher)
    assert opened.config.num_hidden_layers == 2
    asked = {"max_length": 24} | ({"stride": 8} if kind == "questions" else {})
    found = evaluate(EvaluateArguments(str(result.output_dir), rows["eval"], **asked))
    assert found[result.metric or ""] == pytest.approx(result.figures[-1].metrics[result.metric or ""])


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerBase:
    """A tokenizer as RoBERTa's: pieces of bytes, <s> is 0, <pad> 1, </s> 2."""
    bare = Tokenizer(BPE())
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [text.replace(" ", "Ġ") for text, _ in toy_rows(60)]
    bare.train_from_iterator(texts, BpeTrainer(vocab_size=90, special_tokens=specials, show_progress=False))
    learnt = json.loads(bare.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return RobertaTokenizer(vocab=learnt["vocab"], merges=merges)


@pytest.mark.parametrize("init", ["closed_form", "random"])
def test_a_bert_student_reads_the_pieces_of_its_roberta_teacher(
    init: str, byte_pairs: PreTrainedTokenizerBase, toy: dict[str, str], tmp_path: Path
) -> None:
    """It is deployed where only BERT runs: with a tokenizer of BERT's own it would read noise."""
    config = RobertaConfig(
        vocab_size=len(byte_pairs),
        num_hidden_layers=3,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        max_position_embeddings=40,
        type_vocab_size=1,
        id2label=LABELS,
    )
    teacher = randomise(AutoModelForSequenceClassification.from_config(config))
    teacher.save_pretrained(tmp_path / "teacher")
    byte_pairs.save_pretrained(tmp_path / "teacher")
    options = {"student_family": "bert", "init": init, "max_length": 30}
    result = distil(toy, tmp_path / "teacher", tmp_path / "student", 1.0, **options)
    parts = {f"{kind}_{m}_loss" for kind in ("hidden", "attention") for m in (1, 2)} | {"embedding_loss"}
    student = check_result(result, toy, parts)
    made = student.config
    assert (made.model_type, made.vocab_size) == ("bert", len(byte_pairs))
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (1, 0, 2)
    assert made.max_position_embeddings == 38
    text = "a very good film"
    opened = AutoTokenizer.from_pretrained(result.output_dir)
    ids = byte_pairs(text)["input_ids"]
    assert opened(text)["input_ids"] == ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert len(ids) > 4
    inputs = opened([text, "bad"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        together = student.eval()(**inputs).logits
        alone = student(**opened("bad", return_tensors="pt")).logits
    assert inputs["input_ids"][1, -1] == 1
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)


def test_a_student_that_is_there_has_its_family(
    make_teacher: Callable[[str], Path], toy: dict[str, str], tmp_path: Path
) -> None:
    """Both given, one of them would do nothing."""
    teacher = make_teacher("bert")
    built = {"layers": 4, "hidden_size": 312, "intermediate_size": 1200}  # as they are unless given
    with pytest.raises(InputError, match="--student_family has no meaning with --student"):
        distil(toy, teacher, tmp_path / "s", 1.0, student=str(teacher), student_family="bert", **built)
