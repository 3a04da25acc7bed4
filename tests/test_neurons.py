"""Fewer neurons: the same number in each layer, plain folders, and what they wrote mostly kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from conftest import randomise
from tinybert.anatomy import Encoder, matrix
from tinybert.errors import InputError
from tinybert.neurons import check_neurons, cut_neurons

Batch = dict[str, torch.Tensor]


def batches(count: int = 4) -> list[Batch]:
    """Random pieces of all ids but 0, with padding at the end of some rows."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 24, (8, 16), generator=generator)
        lengths = torch.randint(4, 17, (8, 1), generator=generator)
        mask = (torch.arange(16) < lengths).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the last hidden states of real tokens (N, d)."""
    with torch.no_grad():
        return model(**batch).last_hidden_state[batch["attention_mask"].bool()]


def test_a_cut_model_opens_with_stock_code_and_has_the_smaller_matrices_in_all_layers(
    encoder: PreTrainedModel, tmp_path: Path
) -> None:
    """Masks over neurons, or a number for each layer, would be neither smaller nor a plain folder."""
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    smaller = cut_neurons(encoder, batches(), 24)
    smaller.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(tmp_path)
    for layer in Encoder(opened).layers:
        assert (layer.up.out_features, layer.down.in_features) == (24, 24)
    batch = batches(1)[0]
    assert torch.equal(states(opened, batch), states(smaller, batch))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    assert opened.num_parameters() < encoder.num_parameters()


def test_neurons_that_write_nothing_go_first_and_nothing_is_lost(
    tiny_encoder: Callable[..., PreTrainedModel],
) -> None:
    """A choice that took others would lose what the model knows while idle neurons stay."""
    model = tiny_encoder("bert", intermediate_size=40)
    idle = [torch.randperm(40, generator=torch.Generator().manual_seed(i))[:15] for i in range(3)]
    with torch.no_grad():
        for layer, places in zip(Encoder(model).layers, idle, strict=True):
            layer.down.weight[:, places] = 0
    smaller = cut_neurons(model, batches(8), 25)
    for layer, new, places in zip(Encoder(model).layers, Encoder(smaller).layers, idle, strict=True):
        kept = torch.tensor([i for i in range(40) if i not in places.tolist()])
        torch.testing.assert_close(new.up.weight, layer.up.weight[kept])
        torch.testing.assert_close(new.down.weight, layer.down.weight[:, kept], rtol=0, atol=1e-4)
    for batch in batches(2):
        torch.testing.assert_close(states(smaller, batch), states(model, batch), rtol=0, atol=1e-3)


def test_what_is_kept_is_solved_anew_and_nearer_than_the_old_weights(
    tiny_encoder: Callable[..., PreTrainedModel],
) -> None:
    """Without the ridge regression the neurons that stay do not make up for those that went."""
    model = tiny_encoder("bert", intermediate_size=64)
    smaller = cut_neurons(model, batches(24), 16)
    bare = cut_neurons(model, batches(1), 16)
    with torch.no_grad():
        for whole, solved, old in zip(
            Encoder(model).layers, Encoder(smaller).layers, Encoder(bare).layers, strict=True
        ):
            up = matrix(whole.up)
            same = torch.cdist(matrix(solved.up).T, up.T).argmin(1)
            old.up.load_state_dict(solved.up.state_dict())
            old.down.weight.copy_(whole.down.weight[:, same])
            old.down.bias.copy_(whole.down.bias)
    held_out = batches(30)[24:]
    solved_error, old_error = (
        sum(float((states(net, batch) - states(model, batch)).square().sum()) for batch in held_out)
        for net in (smaller, bare)
    )
    assert 0 < solved_error < 0.7 * old_error


def test_padding_has_no_part_in_the_choice(tiny_encoder: Callable[..., PreTrainedModel]) -> None:
    """Padded states are noise: a batch of short rows would choose by it."""
    model = tiny_encoder("bert")
    plain = cut_neurons(model, batches(), 20)
    noisy = batches()
    for batch in noisy:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], torch.tensor(7))
    again = cut_neurons(model, noisy, 20)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=1e-4)


def test_the_head_stays_as_it_is() -> None:
    """A head drawn anew answers at random."""
    config = BertConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    model = randomise(BertForSequenceClassification(config))
    smaller = cut_neurons(model, batches(), 39)
    assert torch.equal(smaller.classifier.weight, model.classifier.weight)
    assert torch.equal(smaller.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    for batch in batches(1):
        torch.testing.assert_close(smaller(**batch).logits, model(**batch).logits, rtol=0, atol=0.3)


@pytest.mark.parametrize("count", [0, -3, 40, 4000])
def test_a_number_that_is_no_cut_is_refused(tiny_encoder: Callable[..., PreTrainedModel], count: int) -> None:
    """Nothing would be removed, or everything."""
    with pytest.raises(InputError, match=f"--neurons is {count}: it must be from 1 to 39"):
        check_neurons(tiny_encoder("bert"), count)


def test_other_families_and_no_text_are_refused(tiny_encoder: Callable[..., PreTrainedModel]) -> None:
    """ALBERT's layers share one block: cutting it by one layer's states would break the others."""
    config = AlbertConfig(
        vocab_size=24, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=20
    )
    with pytest.raises(InputError, match="this model is albert"):
        check_neurons(AlbertModel(config), 10)
    with pytest.raises(InputError, match="no text to choose neurons on"):
        cut_neurons(tiny_encoder("bert"), [], 10)
