"""Shrinking a configuration, and the starts that need no text."""

import json
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    DistilBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from tinybert.errors import InputError
from tinybert.student import StudentSize, calibration_batches, make_student, shrink_config

Make = Callable[..., PreTrainedModel]
SMALL = StudentSize(layers=2, hidden_size=16, intermediate_size=20)


def full_size(teacher: PreTrainedModel, layers: int) -> StudentSize:
    return StudentSize(layers=layers, hidden_size=teacher.config.hidden_size, intermediate_size=40)


def test_the_defaults_are_tinybert_4() -> None:
    """Whoever names no size gets the paper's student."""
    assert StudentSize() == StudentSize(layers=4, hidden_size=312, intermediate_size=1200, heads=None)


def test_a_student_has_the_teachers_kind_and_the_asked_size(encoder: PreTrainedModel) -> None:
    """DistilBERT calls its sizes by other names: an unread name would leave the teacher's width."""
    encoder.config.id2label = {0: "no", 1: "yes"}
    student = make_student(encoder, SMALL)
    assert type(student) is type(encoder)
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 4)
    assert config.vocab_size == encoder.config.vocab_size
    assert config.id2label == {0: "no", 1: "yes"}
    shapes = {tuple(tensor.shape) for tensor in student.state_dict().values()}
    assert {(20, 16), (16, 20)} <= shapes, "the feed-forward size is not the asked one"
    assert student.num_parameters() < encoder.num_parameters() / 2
    with torch.no_grad():
        assert student(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state.shape == (1, 3, 16)


def test_the_teachers_configuration_is_not_touched(encoder: PreTrainedModel) -> None:
    """The teacher goes on with it: shrunk, its next checkpoint could not be opened."""
    before = encoder.config.to_json_string()
    make_student(encoder, SMALL)
    assert encoder.config.to_json_string() == before


@pytest.mark.parametrize(("embedding_size", "expected"), [(16, 16), (32, 12)])
def test_electras_embeddings_stay_factorised_or_not(
    tiny_encoder: Make, embedding_size: int, expected: int
) -> None:
    """A projection where the teacher has none changes what the student's layer 0 is."""
    teacher = tiny_encoder("electra", embedding_size=embedding_size)
    student = make_student(teacher, StudentSize(layers=1, hidden_size=12, intermediate_size=8))
    assert student.config.embedding_size == expected
    assert student.get_input_embeddings().weight.shape[1] == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (StudentSize(4, 16, 20), "num_hidden_layers is 4: it must be from 1 to the teacher's 3"),
        (StudentSize(0, 16, 20), "num_hidden_layers is 0: it must be from 1"),
        (StudentSize(2, 36, 20), "hidden_size is 36: it must be from 1 to the teacher's 32"),
        (StudentSize(2, 16, 99), "intermediate_size is 99: it must be from 1 to the teacher's 40"),
        (StudentSize(2, 16, 20, heads=8), "num_attention_heads is 8: it must be from 1 to the teacher's 4"),
        (StudentSize(2, 18, 20), "hidden size 18 is not divisible by 4 attention heads: use 16, or"),
        (StudentSize(2, 3, 20), "hidden size 3 is not divisible by 4 attention heads: use 4, or"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny_encoder: Make, size: StudentSize, message: str) -> None:
    """A student deeper or wider than its teacher is no student, and torch's own words do not say so."""
    with pytest.raises(InputError, match=message):
        shrink_config(tiny_encoder("bert").config, size)


def test_distilberts_own_names_do_not_reach_the_user(tiny_encoder: Make) -> None:
    """``hidden_dim`` is no option of ours: the message names the option to change."""
    with pytest.raises(InputError, match="intermediate_size is 99"):
        shrink_config(tiny_encoder("distilbert").config, StudentSize(2, 16, 99))


def test_the_seed_decides_the_random_start(encoder: PreTrainedModel) -> None:
    """The same seed must give the same student, whatever was drawn before."""
    first = make_student(encoder, SMALL, seed=1).state_dict()
    torch.rand(7)
    again, other = (make_student(encoder, SMALL, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_copy_of_all_layers_is_the_teacher(encoder: PreTrainedModel) -> None:
    """Every weight is found and put where it belongs."""
    student = make_student(encoder, full_size(encoder, encoder.config.num_hidden_layers), init="copy")
    inputs = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.ones(1, 4)}
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs)[0], encoder(**inputs)[0])
    assert student is not encoder
    next(student.parameters()).data.zero_()
    assert next(encoder.parameters()).abs().sum() > 0, "the copy shares its memory with the teacher"


@pytest.mark.parametrize(("layer_map", "expected"), [("top", (2, 3)), ("bottom", (1, 2)), ((1, 3), (1, 3))])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_copy_takes_the_mapped_layers(
    tiny_encoder: Make, family: str, layer_map: str | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """An offset of one copies the wrong layers, and the student learns all the same, only worse."""
    teacher = tiny_encoder(family)
    student = make_student(teacher, full_size(teacher, 2), init="copy", layer_map=layer_map)
    stacks = [(getattr(m, "encoder", None) or m.transformer).layer for m in (student, teacher)]
    for place, layer in enumerate(expected):
        found, wanted = stacks[0][place].state_dict(), stacks[1][layer - 1].state_dict()
        assert wanted
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_copy_brings_the_task_head_along(tiny_encoder: Make) -> None:
    """A student that starts as its teacher's layers should start with its answers too."""
    encoder = tiny_encoder("distilbert", num_labels=3)
    teacher = DistilBertForSequenceClassification(encoder.config).eval()
    student = make_student(teacher, full_size(encoder, 1), init="copy")
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert torch.equal(student.pre_classifier.weight, teacher.pre_classifier.weight)


def test_a_copy_between_widths_is_refused(tiny_encoder: Make) -> None:
    """Cut-off weights mean nothing; the message names the first that does not fit."""
    with pytest.raises(InputError, match=r"cannot copy .*: \(25, 32\) in the teacher, \(25, 16\)"):
        make_student(tiny_encoder("bert"), SMALL, init="copy")


def test_a_closed_form_without_text_is_refused(tiny_encoder: Make) -> None:
    """There is nothing to solve it on; a random student instead would be a silent substitute."""
    with pytest.raises(InputError, match="a closed-form start needs text"):
        make_student(tiny_encoder("bert"), SMALL, init="closed_form")


def test_a_closed_form_start_is_nearer_to_its_teacher_than_a_random_one(
    tiny_encoder: Make, tokenizer: BertTokenizerFast
) -> None:
    """Given text, the default start is solved on it, and the text is what is used."""
    teacher = AutoModelForSequenceClassification.from_config(tiny_encoder("bert", num_labels=2).config).eval()
    teacher.base_model.load_state_dict(tiny_encoder("bert").state_dict())
    texts = [
        f"the {a} film was {b} and the {c}" for a in ("good", "dull") for b in ("a", "very") for c in "a."
    ] * 8
    batches = calibration_batches(texts, tokenizer)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(texts)
    solved = make_student(teacher, SMALL, calibration=texts, tokenizer=tokenizer)
    random = make_student(teacher, SMALL)
    with torch.no_grad():
        wanted, found, noise = (model(**batches[0]).logits for model in (teacher, solved, random))
    assert (found - wanted).square().mean() < 0.5 * (noise - wanted).square().mean()


def test_a_shrunk_configuration_survives_being_written(tiny_encoder: Make, encoder: PreTrainedModel) -> None:
    """What is saved is what ``from_pretrained`` builds the student from."""
    config = shrink_config(encoder.config, SMALL)
    read: PreTrainedConfig = type(config).from_dict(json.loads(config.to_json_string()))
    assert (read.num_hidden_layers, read.hidden_size, read.num_attention_heads) == (2, 16, 4)
