"""Shrinking a configuration, and the starts that need no text."""

import json
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMultipleChoice,
    XLMRobertaConfig,
)

from conftest import PIECES, randomise
from tinybert.errors import InputError
from tinybert.student import calibration_batches, make_student
from tinybert.student_config import StudentSize, bert_config, shrink_config

Make = Callable[..., PreTrainedModel]
SMALL = StudentSize(layers=2, hidden_size=16, intermediate_size=20)


SHAPE = {
    "vocab_size": len(PIECES),
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LAYER_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def build(config_class: type, **options: object) -> PreTrainedModel:
    """A random teacher of four layers of any family."""
    return randomise(AutoModel.from_config(config_class(**SHAPE | options)))


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
        (StudentSize(4, 16, 20), "layers is 4: it must be from 1 to the teacher's 3"),
        (StudentSize(0, 16, 20), "layers is 0: it must be from 1"),
        (StudentSize(2, 36, 20), "hidden_size is 36: it must be from 1 to the teacher's 32"),
        (StudentSize(2, 16, 99), "intermediate_size is 99: it must be from 1 to the teacher's 40"),
        (StudentSize(2, 16, 20, heads=8), "heads is 8: it must be from 1 to the teacher's 4"),
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


@pytest.mark.parametrize(
    ("config_class", "options", "expected"),
    [
        (AlbertConfig, {"embedding_size": 32}, {"embedding_size": 16}),
        (AlbertConfig, {"embedding_size": 8, "num_hidden_groups": 4}, {"num_hidden_groups": 2}),
        (AlbertConfig, {"embedding_size": 8}, {"embedding_size": 8, "num_hidden_groups": 1}),
        (ModernBertConfig, {"cls_token_id": 2, "sep_token_id": 3}, {"layer_types": LAYER_TYPES[:2]}),
        (DebertaV2Config, {"attention_head_size": 8}, {"attention_head_size": 4, "pooler_hidden_size": 16}),
        (MPNetConfig, {}, {"relative_attention_num_buckets": 32}),
        (XLMRobertaConfig, {}, {}),
    ],
)
def test_widths_and_depths_that_hang_together_shrink_together(
    config_class: type, options: dict[str, int], expected: dict[str, object]
) -> None:
    """Each family keeps some size in a field of its own: left as it was, the student would not run."""
    teacher = build(config_class, **options)
    config = shrink_config(teacher.config, SMALL)
    assert {name: getattr(config, name) for name in expected} == expected
    read = config_class.from_dict(json.loads(config.to_json_string()))
    assert (read.num_hidden_layers, read.hidden_size, read.num_attention_heads) == (2, 16, 4)
    assert {name: getattr(read, name) for name in expected} == expected
    student = make_student(teacher, SMALL)
    states = student(input_ids=torch.tensor([[2, 5, 3]]), output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(1, 3, 16)] * 3


@pytest.mark.parametrize("init", ["copy", "random"])
def test_each_layer_attends_as_far_as_the_one_it_imitates(init: str) -> None:
    """A local layer's weights in a global layer turn by other angles: a copy would be of something else."""
    teacher = build(ModernBertConfig, cls_token_id=2, sep_token_id=3)
    assert teacher.config.layer_types == LAYER_TYPES
    student = make_student(teacher, full_size(teacher, 2), init=init, layer_map=(2, 4))
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.attention_type for layer in student.layers] == student.config.layer_types
    for layer, imitated in zip(student.layers, (teacher.layers[1], teacher.layers[3]), strict=True):
        assert torch.equal(layer.attn.Wqkv.weight, imitated.attn.Wqkv.weight) == (init == "copy")
    assert teacher.config.layer_types == LAYER_TYPES


def test_a_layer_that_lacks_a_norm_cannot_be_copied_further_up() -> None:
    """ModernBERT's first layer has one norm less: a KeyError would not say which mapping to take."""
    teacher = build(ModernBertConfig, cls_token_id=2, sep_token_id=3)
    with pytest.raises(
        InputError, match=r"cannot copy layers.1.attn_norm.weight: the teacher has no layers.0"
    ):
        make_student(teacher, full_size(teacher, 2), init="copy", layer_map=(1, 1))


def test_rotary_positions_need_an_even_head_size() -> None:
    """torch's own words are about shapes that nobody chose."""
    teacher = build(ModernBertConfig, cls_token_id=2, sep_token_id=3)
    with pytest.raises(InputError, match=r"hidden size 20 is 5 for each of 4 attention heads.*use 24"):
        make_student(teacher, StudentSize(2, 20, 20))


@pytest.mark.parametrize(("heads", "shared"), [(None, True), (2, False)])
def test_an_mpnet_student_starts_with_its_teachers_position_bias(heads: int | None, shared: bool) -> None:
    """Equation 7 leaves the bias out of the scores, so nothing else would make the student's alike."""
    teacher = build(MPNetConfig)
    student = make_student(teacher, StudentSize(2, 16, 20, heads), init="random")
    found, wanted = (model.encoder.relative_attention_bias.weight for model in (student, teacher))
    assert (found.shape == wanted.shape) == shared
    assert (shared and torch.equal(found, wanted)) == shared
    assert found.requires_grad
    assert found.data_ptr() != wanted.data_ptr()


@pytest.mark.parametrize("config_class", [XLMRobertaConfig, AlbertConfig, MPNetConfig, DebertaV2Config])
def test_a_copy_of_all_layers_is_the_teacher_in_other_families(config_class: type) -> None:
    """Names of layers differ between families: one that is not found would be another layer's weights."""
    teacher = build(config_class)
    student = make_student(teacher, full_size(teacher, 4), init="copy")
    inputs = {"input_ids": torch.tensor([[2, 5, 9, 3]]), "attention_mask": torch.ones(1, 4)}
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs)[0], teacher(**inputs)[0])


def test_xlm_robertas_closed_form_is_nearer_to_its_teacher_than_a_random_start(
    tokenizer: BertTokenizerFast,
) -> None:
    """Its parts lie where RoBERTa's do, and its name alone would have refused it."""
    encoder = build(XLMRobertaConfig, num_labels=2)
    teacher = AutoModelForSequenceClassification.from_config(encoder.config).eval()
    teacher.base_model.load_state_dict(encoder.state_dict(), strict=False)
    texts = [f"the {a} film was {b} and the story" for a in ("good", "dull") for b in ("a", "very")] * 16
    batches = calibration_batches(texts, tokenizer)
    solved, random = make_student(teacher, SMALL, calibration=batches), make_student(teacher, SMALL)
    inputs = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted, found, noise = (model(**inputs).logits for model in (teacher, solved, random))
    assert (found - wanted).square().mean() < 0.5 * (noise - wanted).square().mean()


@pytest.mark.parametrize(
    ("config_class", "options", "expected"),
    [
        (RobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1}, {"type_vocab_size": 1, "pad_token_id": 1}),
        (DebertaV2Config, {"type_vocab_size": 0}, {"type_vocab_size": 2}),
        (ModernBertConfig, {"cls_token_id": 2, "sep_token_id": 3}, {"hidden_act": "gelu"}),
        (DistilBertConfig, {"activation": "relu", "hidden_dim": 40}, {"hidden_act": "relu"}),
        (AlbertConfig, {"embedding_size": 8, "hidden_act": "gelu_new"}, {"hidden_act": "gelu_new"}),
    ],
)
def test_a_bert_of_another_familys_teacher_reads_its_pieces(
    config_class: type, options: dict[str, object], expected: dict[str, object]
) -> None:
    """RoBERTa's table of positions begins with two rows that no token reads; its padding is piece 1."""
    teacher = build(config_class, max_position_embeddings=20, id2label={0: "no", 1: "yes"}, **options)
    config = bert_config(teacher.config, SMALL)
    wanted = {"vocab_size": len(PIECES), "eos_token_id": 3, "id2label": {0: "no", 1: "yes"}} | expected
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.max_position_embeddings == (18 if config_class is RobertaConfig else 20)
    student = make_student(teacher, SMALL, family="bert")
    assert type(student) is BertModel
    ids = torch.randint(5, 20, (1, config.max_position_embeddings))
    with torch.no_grad():
        assert student(input_ids=ids).last_hidden_state.shape == (1, config.max_position_embeddings, 16)
        assert teacher(input_ids=ids).last_hidden_state.shape[1] == config.max_position_embeddings


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (AutoModelForTokenClassification, BertForTokenClassification),
        (AutoModelForQuestionAnswering, BertForQuestionAnswering),
        (AutoModelForMaskedLM, BertForMaskedLM),
        (AutoModelForSequenceClassification, BertForSequenceClassification),
    ],
)
def test_a_bert_has_its_teachers_kind_of_head(kind: type, expected: type) -> None:
    """A student without the head has nothing to learn the predictions with."""
    config = build(RobertaConfig, num_labels=3).config
    assert type(make_student(kind.from_config(config), SMALL, family="bert")) is expected


def test_heads_that_bert_lacks_and_copies_between_families_are_refused() -> None:
    """torch's own words would be about names of weights that nobody chose."""
    teacher = build(RobertaConfig)
    with pytest.raises(InputError, match="cannot copy roberta layers into BERT's: leave --student"):
        make_student(teacher, full_size(teacher, 4), family="bert", init="copy")
    chooser = RobertaForMultipleChoice(teacher.config)
    with pytest.raises(InputError, match="BERT has no head like RobertaForMultipleChoice's"):
        make_student(chooser, SMALL, family="bert")


def test_a_bert_teachers_bert_student_is_made_as_ever(tiny_encoder: Make) -> None:
    """The option names what the teacher is already: nothing may change."""
    plain, named = (make_student(tiny_encoder("bert"), SMALL, family=family) for family in (None, "bert"))
    assert plain.config.to_dict() == named.config.to_dict()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in named.state_dict().items())
