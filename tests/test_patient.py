"""The objective of PKD against its formula, written out example by example."""

import pytest
import torch
from torch import Tensor, nn

from tinybert.errors import InputError
from tinybert.losses import Counts, States, gold_label_loss, soft_label_loss
from tinybert.patient import PatientLoss, patient_loss

MASK = (torch.arange(5) < torch.tensor([[5], [2], [4]])).long()
LABELS = torch.tensor([1, 0, 1])


def states(layers: int, width: int, seed: int) -> States:
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(3, 5, width, generator=generator) for _ in range(layers + 1)]
    return States(hidden=tuple(hidden), logits=torch.randn(3, 2, generator=generator))


def by_formula(mine: Tensor, its: Tensor) -> float:
    """Mean over examples and units, from (B, T, d) and (B, T, d)."""
    total = 0.0
    for one, another in zip(mine.detach(), its.detach(), strict=True):
        first, second = one[0] / one[0].square().sum().sqrt(), another[0] / another[0].square().sum().sqrt()
        total += float((first - second).square().sum())
    return total / mine.shape[0] / mine.shape[2]


def test_the_loss_is_the_papers_on_first_tokens_alone() -> None:
    """A baseline that is not what its name says would be compared with in vain."""
    mine, its = states(1, 6, 0).hidden[1].requires_grad_(), states(1, 6, 1).hidden[1].requires_grad_()
    loss = patient_loss(mine, its, nn.Identity())
    assert loss.item() == pytest.approx(by_formula(mine, its), rel=1e-6)
    torch.testing.assert_close(patient_loss(3.0 * mine, 0.2 * its, nn.Identity()), loss)
    loss.backward()
    assert its.grad is None, "the teacher is not to be taught"
    assert mine.grad is not None
    assert mine.grad[:, 0].abs().sum() > 0
    assert mine.grad[:, 1:].abs().sum() == 0


def test_the_total_is_that_of_the_paper_with_means_and_without_the_last_layer() -> None:
    """The last layer's state is what the head reads: the paper leaves it out."""
    student, teacher = states(3, 6, 0), states(5, 6, 1)
    loss = PatientLoss(6, 6, (2, 3, 5), alpha=0.3, beta=50.0, temperature=2.0)
    assert list(loss.parameters()) == [], "as published, where the widths agree"
    assert (loss.reads_states, loss.reads_scores, loss.reads_logits) == (True, False, True)
    assert loss.reads_teacher
    assert loss.depths == (None, None)
    parts = loss(student, teacher, MASK, LABELS)
    assert list(parts) == ["prediction", "gold", "patient_1", "patient_2"]
    first, second = (by_formula(student.hidden[m], teacher.hidden[g]) for m, g in ((1, 2), (2, 3)))
    assert (parts["patient_1"].item(), parts["patient_2"].item()) == pytest.approx((first, second), rel=1e-6)
    soft = soft_label_loss(student.logits, teacher.logits, temperature=2.0)
    wanted = 0.7 * gold_label_loss(student.logits, LABELS) + 0.3 * soft + 50.0 * (first + second) / 2
    torch.testing.assert_close(loss.total(parts), wanted)


def test_pieces_of_a_batch_add_up_to_the_whole_with_its_counts() -> None:
    """With accumulated gradients a loss that divides by its own rows would count small batches too much."""
    student, teacher = states(2, 4, 0), states(2, 6, 1)
    loss = PatientLoss(4, 6, (1, 2))
    counts = loss.counts({"attention_mask": MASK})
    assert counts == Counts.of(MASK)
    assert loss.denominator("patient_1", counts) == 3
    whole = loss(student, teacher, MASK, LABELS)
    pieces = []
    for rows in (slice(0, 1), slice(1, 3)):
        own, its = (
            States(hidden=tuple(state[rows] for state in some.hidden), logits=some.logits[rows])
            for some in (student, teacher)
        )
        pieces.append(loss(own, its, MASK[rows], LABELS[rows], counts))
    for name, part in whole.items():
        torch.testing.assert_close(pieces[0][name] + pieces[1][name], part)


def test_projections_between_widths_are_learnt_and_start_where_they_are_told() -> None:
    """Without a projection widths that differ cannot be compared; one that is not trained compares noise."""
    student, teacher = states(2, 4, 0), states(2, 6, 1)
    loss = PatientLoss(4, 6, (1, 2))
    start = [torch.randn(4, 6, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    loss.start_projections(start)
    assert [tuple(parameter.shape) for parameter in loss.parameters()] == [(6, 4)]
    parts = loss(student, teacher, MASK, LABELS)
    projected = student.hidden[1] @ start[1]
    assert parts["patient_1"].item() == pytest.approx(by_formula(projected, teacher.hidden[1]), rel=1e-5)
    loss.total(parts).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((1, 2), {"alpha": 1.5}, "--pkd_alpha is a share: it must be from 0 to 1, got 1.5"),
        ((1, 2), {"beta": 0.0}, "--pkd_beta must be above 0, got 0.0"),
        ((2,), {}, "the student has one layer: give it --layers 2 or more, or take --baseline soft_labels"),
    ],
)
def test_what_leaves_nothing_of_pkd_is_refused(
    layers: tuple[int, ...], options: dict[str, float], message: str
) -> None:
    """A baseline called PKD that is none would stand in a table under that name."""
    with pytest.raises(InputError, match=message):
        PatientLoss(4, 6, layers, **options)
