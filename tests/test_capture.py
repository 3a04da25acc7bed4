"""What ``capture`` shows of a stock model, and that it leaves the model as it was."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    DebertaV2Config,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedModel,
    XLMRobertaConfig,
)

from conftest import PIECES, QUICK, make_masked_lm, randomise
from test_masked_words import FAMILIES
from tinybert import capture as capture_room
from tinybert.capture import capture, check_capturable, evaluating
from tinybert.errors import InputError
from tinybert.losses import States
from tinybert.student import StudentSize, make_student
from tinybert.trainer import DistillationConfig, DistillationTrainer

# Families beside those of the fixture ``encoder``: configuration class and options.
_GLOBAL = "full_attention"
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    "xlm-roberta": (XLMRobertaConfig, {}),
    "albert": (AlbertConfig, {"embedding_size": 16}),
    "mpnet": (MPNetConfig, {}),
    "modernbert": (ModernBertConfig, {"local_attention": 4, **_SPECIAL}),
    "modernbert, global": (ModernBertConfig, {"layer_types": [_GLOBAL] * 3, **_SPECIAL}),
    "deberta-v2": (
        DebertaV2Config,
        {
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": "p2c|c2p",
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "attention_head_size": 8,
        },
    ),
}
CAPTURED = ("xlm-roberta", "albert", "mpnet", "modernbert, global")
REFUSED = tuple(name for name in OTHERS if name not in CAPTURED)

LENGTHS = (9, 1, 6)
Make = Callable[..., PreTrainedModel]


def batch() -> dict[str, Tensor]:
    """Three rows of 9, 1 and 6 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(5, 20, mask.shape, generator=generator) * mask, "attention_mask": mask}


def other(name: str, kind: Any = AutoModel, **options: Any) -> PreTrainedModel:
    """A random model of one of ``OTHERS``."""
    config_class, own = OTHERS[name]
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    shape |= {"vocab_size": len(PIECES), "max_position_embeddings": 64, "pad_token_id": 0}
    return randomise(kind.from_config(config_class(**shape | own | options)))


def real_rows(tensor: Tensor) -> list[Tensor]:
    """Cut the padding off the token dimension of (B, T, d)."""
    return [row[:length] for row, length in zip(tensor, LENGTHS, strict=True)]


def probabilities(states: States, layer: int, mask: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = states.queries[layer] @ states.keys[layer].mT * states.scaling[layer] + bias
    return scores.masked_fill(mask[:, None, None, :] == 0, float("-inf")).softmax(dim=-1)


def eager(model: PreTrainedModel, inputs: dict[str, Tensor], **options: bool) -> object:
    """The same model's outputs by transformers' own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs, **options)
    finally:
        model.set_attn_implementation(before)


def check_softmax(model: PreTrainedModel) -> None:
    inputs = batch()
    expected = eager(model, inputs, output_attentions=True).attentions
    with torch.no_grad():
        states = capture(model, inputs)
        bias = 0.0
        if model.config.model_type == "mpnet":
            bias = model.base_model.encoder.compute_position_bias(states.hidden[0])
            assert bias.std() > 0.01
    assert len(states.queries) == len(states.keys) == len(states.scaling) == len(expected) >= 2
    for layer, attention in enumerate(expected):
        found = probabilities(states, layer, inputs["attention_mask"], bias)
        assert found.std() > 0.01, "scores that are all alike would fit any mistake"
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(
                found[row, :, :length], attention[row, :, :length], atol=2e-6, rtol=1e-5
            )


def test_softmax_of_the_captured_scores_is_eager_attention(encoder: PreTrainedModel) -> None:
    """Without this, equation 7 would be computed on something that is not the attention scores."""
    check_softmax(encoder)


@pytest.mark.parametrize("name", CAPTURED)
def test_so_it_is_in_other_families_with_the_bias_that_is_left_out(name: str) -> None:
    """ALBERT's one layer runs three times, MPNet's scores miss the interface, ModernBERT's rotate first."""
    check_softmax(other(name))


def check_hidden(model: PreTrainedModel, scores: bool) -> None:
    inputs = batch()
    expected = eager(model, inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        states = capture(model, inputs, scores=scores)
        alone = capture(
            model, {name: tensor[2:, : LENGTHS[2]] for name, tensor in inputs.items()}, scores=scores
        )
    assert len(states.hidden) == model.config.num_hidden_layers + 1
    assert {state.shape[-1] for state in states.hidden} == {model.config.hidden_size}
    for found, wanted, single in zip(states.hidden, expected, alone.hidden, strict=True):
        for one, another in zip(real_rows(found), real_rows(wanted), strict=True):
            torch.testing.assert_close(one, another, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2, : LENGTHS[2]], single[0], atol=1e-5, rtol=1e-4)


def test_captured_hidden_states_are_the_models_own_and_padding_does_not_reach_them(
    encoder: PreTrainedModel,
) -> None:
    """Registered without its mask function, transformers would drop the mask and attend to padding."""
    check_hidden(encoder, scores=True)


@pytest.mark.parametrize(
    ("name", "scores"),
    [(name, scores) for name in OTHERS for scores in (True, False) if name in CAPTURED or not scores],
)
def test_hidden_states_are_the_models_own_in_other_families(name: str, scores: bool) -> None:
    """MPNet adds its mask to the scores: that of SDPA, true and false, would let padding through."""
    check_hidden(other(name), scores)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_other_families_are_those_of_their_own_attention(name: str) -> None:
    """Our backward pass takes over on CPUs: windows and rows without a key are masks it must respect."""
    model, inputs = other(name), batch()

    def gradients(hidden: tuple[Tensor, ...]) -> dict[str, Tensor]:
        model.zero_grad()
        torch.cat(real_rows(hidden[-1])).square().sum().backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    found = gradients(capture(model, inputs, scores=name in CAPTURED).hidden)
    model.set_attn_implementation("eager")
    wanted = gradients(model(**inputs, output_hidden_states=True).hidden_states)
    assert len(found) == len(wanted) > 10
    for parameter, gradient in wanted.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[parameter], gradient, atol=2e-5 * size + 1e-5, rtol=1e-3)


def test_gradients_flow_from_captured_scores_to_the_weights(encoder: PreTrainedModel) -> None:
    """Detached queries would train nothing with the attention loss."""
    states = capture(encoder, batch())
    sum(tensor.square().sum() for tensor in (*states.queries, *states.keys)).backward()
    assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_capture_leaves_the_attention_setting_also_when_the_forward_raises(
    encoder: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config left at our name is saved with the student, and no stock transformers could open it."""
    before = encoder.config._attn_implementation
    assert before not in (None, capture_room._NAME)
    capture(encoder, batch())
    assert encoder.config._attn_implementation == before
    with pytest.raises(IndexError):
        capture(encoder, {"input_ids": torch.tensor([[10_000]]), "attention_mask": torch.ones(1, 1)})
    assert encoder.config._attn_implementation == before
    assert capture_room._calls is None
    assert capture_room._NAME not in str(encoder.config.to_dict())


def test_nothing_global_holds_the_graph_after_a_capture(tiny_encoder: Make) -> None:
    """A list kept at module level would keep every step's activations: memory grows until it ends."""
    model = tiny_encoder("bert")
    states = capture(model, batch())
    query = weakref.ref(states.queries[0])
    assert query() is not None
    assert query().grad_fn is not None
    del states
    gc.collect()
    assert query() is None
    assert capture_room._calls is None


def test_capture_records_under_no_grad(encoder: PreTrainedModel) -> None:
    """The teacher is observed under no_grad: its scores must be there, without a graph."""
    with torch.no_grad():
        states = capture(encoder, batch())
    assert len(states.queries) == encoder.config.num_hidden_layers
    assert not any(tensor.requires_grad for tensor in (*states.queries, *states.keys, *states.hidden))


def test_capture_leaves_out_what_is_not_asked_for(encoder: PreTrainedModel) -> None:
    """The prediction stage reads logits only: keeping every layer's states would waste its memory."""
    states = capture(encoder, batch() | {"labels": torch.zeros(3)}, states=False, scores=False)
    assert states == States()
    assert capture(encoder, batch(), states=False).hidden == ()
    assert capture(encoder, batch(), scores=False).queries == ()


@pytest.mark.parametrize("layers", [1, None])
def test_running_the_first_layers_only_shows_what_they_show_in_a_full_run(
    encoder: PreTrainedModel, layers: int | None
) -> None:
    """With the mapping "bottom" the layers above are not run: those below must not notice, nor stay cut."""
    inputs = batch()
    with torch.no_grad():
        whole, cut = capture(encoder, inputs), capture(encoder, inputs, layers=layers)
        again = capture(encoder, inputs)
    count = layers or encoder.config.num_hidden_layers
    assert (len(cut.hidden), len(cut.queries), len(again.queries)) == (count + 1, count, len(whole.queries))
    for found, wanted in zip(
        (*cut.hidden, *cut.queries), (*whole.hidden[: count + 1], *whole.queries), strict=False
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_running_few_layers_shows_what_a_full_run_shows_in_other_families(name: str, layers: int) -> None:
    """ModernBERT normalises its last state: cut short, a middle layer's state would be another."""
    model, scores = other(name), name in CAPTURED
    with torch.no_grad():
        whole = capture(model, batch(), scores=scores)
        cut = capture(model, batch(), scores=scores, layers=layers)
        assert len(capture(model, batch(), scores=scores).hidden) == 4
    assert len(cut.hidden) > layers
    for found, wanted in zip((cut.hidden[: layers + 1]), whole.hidden, strict=False):
        torch.testing.assert_close(found, wanted)
    for found, wanted in zip((*cut.queries, *cut.keys)[:1], whole.queries, strict=False):
        torch.testing.assert_close(found, wanted)


def test_the_embedding_output_is_there_where_no_layer_is_read(encoder: PreTrainedModel) -> None:
    """A loss on the embeddings alone runs no layer, and transformers shows their output at the first."""
    with torch.no_grad():
        whole, cut = capture(encoder, batch()), capture(encoder, batch(), layers=0)
    assert len(cut.hidden) == 2
    torch.testing.assert_close(cut.hidden[0], whole.hidden[0])


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone: enough for DDP to wrap a model."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_run_at_places_alone_gives_the_logits_of_a_full_run_there(
    family: str, wrapped: bool, one_process: None
) -> None:
    """Nine in ten logits of a masked LM are read by nobody; those that are must not change, nor states."""
    model, inputs = randomise(FAMILIES[family]()), batch()
    places = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    places[[0, 0, 2, 2], [7, 1, 5, 0]] = True
    runner = DistributedDataParallel(model) if wrapped else model
    whole = capture(runner, inputs)
    assert whole.logits is not None
    found = capture(runner, inputs, places=places)
    assert found.logits is not None
    assert found.logits.shape == (4, model.config.vocab_size)
    torch.testing.assert_close(found.logits, whole.logits[places])
    assert len(found.hidden) == len(whole.hidden) == 3
    for one, other in zip((*found.hidden, *found.keys), (*whole.hidden, *whole.keys), strict=True):
        torch.testing.assert_close(one, other)
    sum(tensor.square().sum() for tensor in (found.logits, found.hidden[-1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    nowhere = capture(runner, inputs, places=torch.zeros_like(places))
    assert nowhere.logits is not None
    assert nowhere.logits.shape == (0, model.config.vocab_size)
    again = capture(runner, inputs)
    torch.testing.assert_close(again.logits, whole.logits)


def test_a_model_compiled_for_whole_sequences_gives_its_logits_at_places_too() -> None:
    """Compiled code does not look for new hooks: the first row's logits would pass for those of places."""
    model, inputs = make_masked_lm(), batch()
    places = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    places[[0, 2], [1, 5]] = True
    with torch.no_grad():
        whole = capture(model, inputs, scores=False).logits
        compiled = torch.compile(model, backend="eager")
        capture(compiled, inputs, scores=False)
        found = capture(compiled, inputs, scores=False, places=places).logits
    assert whole is not None
    torch.testing.assert_close(found, whole[places])


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_run_their_head_at_places_alone(name: str) -> None:
    """General distillation with the masked language model's loss reads one logit row in seven."""
    model, inputs = other(name, AutoModelForMaskedLM), batch()
    places = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    places[[0, 0, 2, 2], [7, 1, 5, 0]] = True
    with torch.no_grad():
        whole = capture(model, inputs, scores=False)
        found = capture(model, inputs, scores=False, places=places)
    assert whole.logits is not None
    torch.testing.assert_close(found.logits, whole.logits[places])
    torch.testing.assert_close(found.hidden[-1], whole.hidden[-1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deberta-v2", "DebertaV2Model cannot be captured (they are sums of products of contents and of"),
        ("modernbert", "ModernBertModel cannot be captured (some layers attend within a window alone"),
    ],
)
def test_other_scores_are_refused_by_name_and_the_rest_is_there(name: str, reason: str) -> None:
    """Without a refusal the attention loss would be about something that the model never computes."""
    assert name in REFUSED
    model = other(name)
    with pytest.raises(InputError) as refusal:
        check_capturable(model)
    message = str(refusal.value)
    assert reason in message
    assert "set attention_weight to 0, as hidden states and predictions can be" in message
    assert "\n" not in message
    assert capture_room._calls is None
    assert model.config._attn_implementation != capture_room._NAME
    assert len(capture(model, batch(), scores=False).hidden) == 4


def test_a_model_that_bypasses_the_interface_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tiny_encoder: Make
) -> None:
    """A family that nobody here has heard of must not pass with no scores at all."""
    monkeypatch.setattr(capture_room, "MPNetSelfAttention", type(None))
    with pytest.raises(InputError, match=r"MPNetModel cannot be captured \(0 of 3 layers use transformers'"):
        check_capturable(other("mpnet"))


def test_layers_with_two_states_each_are_refused() -> None:
    """ALBERT with two inner layers shows seven states for three layers: the mapping would take wrong ones."""
    model = other("albert", inner_group_num=2)
    with pytest.raises(
        InputError, match="AlbertModel shows 7 hidden states for 3 layers, and 4 were expected"
    ):
        capture(model, batch(), scores=False)
    with pytest.raises(InputError, match="6 of 3 layers"):
        check_capturable(model)
    assert capture(model, batch(), states=False, scores=False) == States()


def test_alberts_first_state_is_what_its_layers_read() -> None:
    """Its embeddings are narrower than its layers: equation 9 is about states that can be mapped as these."""
    model, inputs = other("albert"), batch()
    with torch.no_grad():
        found = capture(model, inputs).hidden[0]
        embedded = model.embeddings(inputs["input_ids"])
        torch.testing.assert_close(found, model.encoder.embedding_hidden_mapping_in(embedded))
    assert embedded.shape[-1] == 16


def test_mpnets_probabilities_are_not_those_of_its_products(tmp_path: Path) -> None:
    """Its position bias is no product of queries and keys: a softmax without it is no attention of MPNet."""
    config = DistillationConfig(output_dir=str(tmp_path), attention_compares="probabilities")
    with pytest.raises(InputError, match="position bias"):
        config.objective(other("mpnet"), other("mpnet"))


@pytest.mark.parametrize("wrapped", [False, True])
def test_mpnets_hooks_live_for_one_forward_pass(wrapped: bool, one_process: None) -> None:
    """A hook that stays would note every later run, by whomever, and hold its graph."""
    model = other("mpnet")
    runner = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    states = capture(runner, batch())
    sum(tensor.square().sum() for tensor in (*states.queries, *states.keys)).backward()
    assert model.encoder.layer[2].attention.attn.k.weight.grad.abs().sum() > 0
    with pytest.raises(IndexError), torch.no_grad():
        capture(runner, {"input_ids": torch.tensor([[10_000]]), "attention_mask": torch.ones(1, 1)})
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert capture_room._calls is None
    query = weakref.ref(states.queries[0])
    assert query() is not None
    del states
    gc.collect()
    assert query() is None


def test_a_compiled_mpnet_shows_its_scores_also_after_a_run_without_them() -> None:
    """Compiled code does not look for new hooks: the second run would be refused for want of scores."""
    model = other("mpnet")
    with torch.no_grad():
        whole = capture(model, batch())
        compiled = torch.compile(model, backend="eager")
        assert capture(compiled, batch(), scores=False).queries == ()
        for _ in range(2):
            found = capture(compiled, batch())
            for one, another in zip(
                (*found.queries, *found.keys), (*whole.queries, *whole.keys), strict=True
            ):
                torch.testing.assert_close(one, another)


def distil(
    name: str, folder: Path, tokenizer: BertTokenizerFast, **options: Any
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Two steps from a teacher to a student of one of ``OTHERS``; the student and what was logged."""
    teacher = other(name, AutoModelForSequenceClassification, num_labels=3)
    student = make_student(teacher, StudentSize(2, 16, 24), init="random")
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    still = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    texts = [
        "the film was good",
        "bad",
        "a very dull plot with a poor cast and the story was awful",
        "superb",
    ]
    rows = datasets.Dataset.from_dict(dict(tokenizer(texts)))
    config = DistillationConfig(
        str(folder / "run"), max_steps=2, logging_steps=1, save_strategy="no", **QUICK | options
    )
    trainer = DistillationTrainer(
        student, teacher, config, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    after = student.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) > len(before) / 2
    assert all(torch.equal(still[key], tensor) for key, tensor in teacher.state_dict().items())
    return student, trainer.state.log_history


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_distilled_and_open_in_stock_transformers(
    name: str, tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A student whose configuration kept some width of its teacher's cannot be opened again."""
    captured = name in CAPTURED
    student, log = distil(name, tmp_path, tokenizer, attention_weight=float(captured))
    parts = {"embedding_loss", "hidden_1_loss", "hidden_2_loss", "prediction_loss"}
    parts |= {"attention_1_loss", "attention_2_loss"} if captured else set()
    assert {key for key in log[0] if key.endswith("_loss")} == parts
    assert all(log[0][part] > 0 for part in parts)
    student.eval().save_pretrained(tmp_path / "student")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert type(opened) is type(student)
    inputs = batch()
    with torch.no_grad():
        found, wanted = (capture(model, inputs, scores=False).logits for model in (opened.eval(), student))
    assert wanted.shape == (3, 3)
    assert wanted.std() > 0
    torch.testing.assert_close(found, wanted)
    assert opened.num_parameters() == student.num_parameters()


@pytest.mark.parametrize("name", REFUSED)
def test_the_trainer_refuses_scores_before_training(
    name: str, tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """Found out at the first step, it would be after the data was read and the folder claimed."""
    with pytest.raises(
        InputError, match=r"ForSequenceClassification cannot be captured.*attention_weight to 0"
    ):
        distil(name, tmp_path, tokenizer)


@pytest.mark.parametrize("training", [True, False])
def test_check_capturable_leaves_mode_and_weights(encoder: PreTrainedModel, training: bool) -> None:
    """A check that put a teacher into eval mode, or took a step, would change what it is asked about."""
    encoder.train(training)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    generator_state = torch.get_rng_state()
    check_capturable(encoder)
    assert all(module.training == training for module in encoder.modules())
    assert torch.equal(torch.get_rng_state(), generator_state)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_evaluating_gives_the_mode_back_when_its_body_raises(encoder: PreTrainedModel) -> None:
    """A teacher handed over in train mode must come back in train mode, whatever happened."""
    encoder.train()
    seen = []

    def body() -> None:
        with evaluating(encoder):
            seen.append((encoder.training, torch.is_grad_enabled()))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        body()
    assert seen == [(False, False)]
    assert encoder.training
    assert torch.is_grad_enabled()
