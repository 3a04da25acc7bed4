"""What ``capture`` shows of a stock model, and that it leaves the model as it was."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AlbertConfig, AlbertModel, MPNetConfig, MPNetModel, PreTrainedModel

from conftest import make_masked_lm, randomise
from test_masked_words import FAMILIES
from tinybert import capture as capture_room
from tinybert.capture import capture, check_capturable, evaluating
from tinybert.errors import InputError
from tinybert.losses import States

LENGTHS = (9, 1, 6)
Make = Callable[..., PreTrainedModel]


def batch() -> dict[str, Tensor]:
    """Three rows of 9, 1 and 6 tokens, padded."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(5, 20, mask.shape, generator=generator) * mask, "attention_mask": mask}


def real_rows(tensor: Tensor) -> list[Tensor]:
    """Cut the padding off the token dimension of (B, T, d)."""
    return [row[:length] for row, length in zip(tensor, LENGTHS, strict=True)]


def probabilities(states: States, layer: int, mask: Tensor) -> Tensor:
    scores = states.queries[layer] @ states.keys[layer].mT * states.scaling[layer]
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


def test_softmax_of_the_captured_scores_is_eager_attention(encoder: PreTrainedModel) -> None:
    """Without this, equation 7 would be computed on something that is not the attention scores."""
    inputs = batch()
    expected = eager(encoder, inputs, output_attentions=True).attentions
    with torch.no_grad():
        states = capture(encoder, inputs)
    assert len(states.queries) == len(states.keys) == len(states.scaling) == len(expected) >= 2
    for layer, attention in enumerate(expected):
        found = probabilities(states, layer, inputs["attention_mask"])
        assert found.std() > 0.01, "scores that are all alike would fit any mistake"
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(
                found[row, :, :length], attention[row, :, :length], atol=2e-6, rtol=1e-5
            )


def test_captured_hidden_states_are_the_models_own_and_padding_does_not_reach_them(
    encoder: PreTrainedModel,
) -> None:
    """Registered without its mask function, transformers would drop the mask and attend to padding."""
    inputs = batch()
    expected = eager(encoder, inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        states = capture(encoder, inputs)
        alone = capture(encoder, {name: tensor[2:, : LENGTHS[2]] for name, tensor in inputs.items()})
    assert len(states.hidden) == encoder.config.num_hidden_layers + 1
    for found, wanted, single in zip(states.hidden, expected, alone.hidden, strict=True):
        for one, other in zip(real_rows(found), real_rows(wanted), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2, : LENGTHS[2]], single[0], atol=1e-5, rtol=1e-4)


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


def test_models_that_bypass_the_interface_are_refused_by_name() -> None:
    """MPNet computes its scores itself: without a refusal its attention loss would be about nothing."""
    config = MPNetConfig(
        vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    model = MPNetModel(config)
    with pytest.raises(InputError, match=r"MPNetModel cannot be captured.*attention_weight to 0"):
        check_capturable(model)
    assert capture(model.eval(), batch(), scores=False).hidden


def test_layers_that_share_weights_are_recorded_in_the_order_of_their_calls() -> None:
    """ALBERT's layers are one module without a layer index: recorded by module, all but one were lost."""
    config = AlbertConfig(
        vocab_size=20,
        hidden_size=24,
        embedding_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
    )
    model = AlbertModel(config).eval()
    inputs = batch()
    with torch.no_grad():
        states = capture(model, inputs)
    for layer, attention in enumerate(eager(model, inputs, output_attentions=True).attentions):
        found = probabilities(states, layer, inputs["attention_mask"])
        torch.testing.assert_close(found[0], attention[0], atol=2e-6, rtol=1e-5)


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
