"""Where a model's parts are: that its head can be run at chosen places alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from conftest import randomise
from test_masked_words import FAMILIES
from tinybert.anatomy import Encoder, dropping, feed_forward_name, head_at

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()


def test_a_configuration_names_the_neurons_that_its_layers_have(encoder: PreTrainedModel) -> None:
    """By another name the number would be set beside the one that counts."""
    neurons = getattr(encoder.config, feed_forward_name(encoder.config))
    assert {layer.up.out_features for layer in Encoder(encoder).layers} == {neurons}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_sees_chosen_places_in_their_order_and_all_of_them_afterwards(family: str) -> None:
    """A hook that stays would cut every later run of the model, by whomever."""
    model = randomise(FAMILIES[family]())
    inputs = {"input_ids": IDS, "attention_mask": MASK, "output_hidden_states": True}
    with torch.no_grad():
        whole = model(**inputs)
        rows, columns = [2, 0, 0, 2], [1, 8, 3, 1]  # out of order, one of them twice
        with head_at(model, (rows, columns)):
            chosen = model(**inputs)
        places = torch.zeros(3, 9, dtype=torch.bool)
        places[rows, columns] = True
        with head_at(model, places):
            masked = model(**inputs)
    assert whole.logits.std() > 0.01
    torch.testing.assert_close(chosen.logits[0], whole.logits[rows, columns])
    torch.testing.assert_close(masked.logits[0], whole.logits[[0, 0, 2], [3, 8, 1]])
    for found in (chosen, masked):
        assert torch.equal(found.hidden_states[-1], whole.hidden_states[-1])
    with pytest.raises(RuntimeError, match="inside"), head_at(model, places):
        raise RuntimeError("inside")
    assert torch.equal(model(**inputs).logits, whole.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_states_and_of_attention_are_told_apart(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention probabilities are B x h x T x T; a rate meant for states would drop half of them, or none."""
    model = FAMILIES[family]().train()
    model.config._attn_implementation = "eager"
    drop, seen = F.dropout, set()

    def watched(states: Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> Tensor:
        seen.add((states.dim() == 4, p))
        return drop(states, p, *args, **kwargs)

    monkeypatch.setattr(F, "dropout", watched)
    before = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    with dropping(model, 0.25, 0.75):
        model(input_ids=IDS, attention_mask=MASK)
    assert seen - {(True, 0.0), (False, 0.0)} <= {(True, 0.75), (False, 0.25)}
    assert (False, 0.25) in seen
    seen.clear()
    with dropping(model, 0.0, None):
        model(input_ids=IDS, attention_mask=MASK)
    assert {rate for of_attention, rate in seen if not of_attention} <= {0.0}
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == before
