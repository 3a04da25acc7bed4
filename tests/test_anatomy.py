"""Where a model's parts are: that its head can be run at chosen places alone."""

import pytest
import torch

from conftest import randomise
from test_masked_words import FAMILIES
from tinybert.anatomy import head_at

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()


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
