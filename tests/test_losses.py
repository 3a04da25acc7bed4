"""The loss functions against plain float64 arithmetic, torch's own losses and the reference's formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinybert.errors import InputError
from tinybert.losses import (
    GRAM_FROM_LENGTH,
    Counts,
    attention_loss,
    check_relation_heads,
    gold_label_loss,
    hidden_loss,
    multi_label_loss,
    probability_loss,
    score_loss,
    soft_label_loss,
)

FORMS = ("direct", "gram")
SCALING = {"student_scaling": 5**-0.5, "teacher_scaling": 8**-0.5}


def make_states(
    length: int,
    dtype: torch.dtype = torch.float32,
    heads: int = 3,
    batch: int = 4,
    shapes: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Student and teacher queries and keys, laid out as attention makes them, and a ragged mask.

    ``shapes`` are the heads and head size of the student, then of the teacher.
    """
    torch.manual_seed(length)
    of_student, of_teacher = shapes or ((heads, 5), (heads, 8))
    both = (of_student, of_student, of_teacher, of_teacher)
    states = [torch.randn(batch, length, *shape).to(dtype).transpose(1, 2) for shape in both]
    lengths = torch.randint(1, length + 1, (batch, 1))
    lengths[0] = length
    for state in states[:2]:
        state.requires_grad_()
    return states, (torch.arange(length) < lengths).long()


def plain_attention_loss(states: list[Tensor], attention_mask: Tensor) -> Tensor:
    """Equation 7 by its words: in float64, one head of one sentence without its padding at a time."""
    squares, entries = [], 0
    student_queries, student_keys, teacher_queries, teacher_keys = (state.double() for state in states)
    for row, length in enumerate(attention_mask.sum(dim=-1).tolist()):
        for head in range(student_queries.shape[1]):
            at = (row, head, slice(length))
            student_scores = student_queries[at] @ student_keys[at].T * SCALING["student_scaling"]
            teacher_scores = teacher_queries[at] @ teacher_keys[at].T * SCALING["teacher_scaling"]
            squares.append((student_scores - teacher_scores).square().sum())
            entries += length * length
    return torch.stack(squares).sum() / entries


def plain_relation_loss(states: list[Tensor], attention_mask: Tensor, relation_heads: int) -> Tensor:
    """The same by relation heads: one sentence's heads written side by side, then cut into equal columns."""
    squares, entries = [], 0
    for row, length in enumerate(attention_mask.sum(dim=-1).tolist()):
        cut = []
        for state in states:
            joined = torch.cat([state[row, head, :length].double() for head in range(state.shape[1])], dim=1)
            size = joined.shape[1] // relation_heads
            cut.append([joined[:, size * r : size * (r + 1)] for r in range(relation_heads)])
        for student_q, student_k, teacher_q, teacher_k in zip(*cut, strict=True):
            student_scores = student_q @ student_k.T / student_q.shape[1] ** 0.5
            teacher_scores = teacher_q @ teacher_k.T / teacher_q.shape[1] ** 0.5
            squares.append((student_scores - teacher_scores).square().sum())
            entries += length * length
    return torch.stack(squares).sum() / entries


def gradients(loss: Tensor, states: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, states[:2]))


def error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("length", [1, 7, 32, GRAM_FROM_LENGTH, 130])
@pytest.mark.parametrize("form", [*FORMS, None])
def test_attention_loss_equals_plain_float64_arithmetic(form: str | None, length: int) -> None:
    """A wrong attention loss or gradient trains towards something that is not the teacher."""
    states, attention_mask = make_states(length)
    loss = attention_loss(*states, attention_mask, form=form, **SCALING)
    truth = plain_attention_loss(states, attention_mask)
    assert loss > 0
    assert error(loss, truth) < 1e-6
    for gradient, true in zip(gradients(loss, states), gradients(truth, states), strict=True):
        assert error(gradient, true) < 1e-6


def plain_probability_loss(states: list[Tensor], attention_mask: Tensor) -> Tensor:
    """Squared differences of softmaxed scores in float64, one head of one sentence without its padding."""
    squares, entries = [], 0
    for row, length in enumerate(attention_mask.sum(dim=-1).tolist()):
        for head in range(states[0].shape[1]):
            sq, sk, tq, tk = (state[row, head, :length].double() for state in states)
            student = (sq @ sk.T * SCALING["student_scaling"]).softmax(-1)
            teacher = (tq @ tk.T * SCALING["teacher_scaling"]).softmax(-1)
            squares.append((student - teacher).square().sum())
            entries += length * length
    return torch.stack(squares).sum() / entries


@pytest.mark.parametrize("length", [1, 7, 40])
def test_probabilities_are_compared_as_a_softmax_of_real_keys_has_them(length: int) -> None:
    """Padding that took part in the softmax would make the comparison with scores an unfair one."""
    states, attention_mask = make_states(length)
    loss = probability_loss(*states, attention_mask, **SCALING)
    truth = plain_probability_loss(states, attention_mask)
    assert (loss - truth).abs() <= 1e-6 * truth
    for gradient, true in zip(gradients(loss, states), gradients(truth, states), strict=True):
        assert torch.allclose(gradient.double(), true.double(), rtol=1e-4, atol=1e-9)
    same = [*states[:2], *(state.detach() for state in states[:2])]
    assert probability_loss(*same, attention_mask, student_scaling=1, teacher_scaling=1) == 0


def test_probabilities_of_unlike_heads_are_refused() -> None:
    """Broadcasting one head over many would compare what does not belong together."""
    states, attention_mask = make_states(7, shapes=((1, 5), (3, 8)))
    with pytest.raises(InputError, match="only scores can be compared"):
        probability_loss(*states, attention_mask, **SCALING)


@pytest.mark.parametrize("length", [7, 130])
@pytest.mark.parametrize("form", FORMS)
def test_attention_loss_of_bfloat16_states_under_autocast_is_computed_in_float32(
    form: str, length: int
) -> None:
    """In bfloat16 the loss would be 1 % off and noisy, more than the differences it is about."""
    states, attention_mask = make_states(length, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss(*states, attention_mask, form=form, **SCALING)
    truth = plain_attention_loss(states, attention_mask)
    assert loss.dtype == torch.float32
    assert error(loss, truth) < 1e-6
    for gradient, true in zip(gradients(loss, states), gradients(truth, states), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert error(gradient, true) < 2.0**-8  # the rounding of the result alone


@pytest.mark.parametrize("form", FORMS)
def test_backward_inside_an_autocast_region_still_runs_in_float32(form: str) -> None:
    """Autocast may be on again when the gradient is taken; it must not become a bfloat16 one."""
    states, attention_mask = make_states(70)
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss(*states, attention_mask, form=form, **SCALING)
        found = gradients(loss, states)
    for gradient, true in zip(
        found, gradients(plain_attention_loss(states, attention_mask), states), strict=True
    ):
        assert error(gradient, true) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_attention_loss_passes_gradcheck(form: str) -> None:
    """Its gradient is written by hand, so it is compared with finite differences, scale included."""
    states, attention_mask = make_states(6, torch.float64, heads=2, batch=2)

    def scaled_loss(student_queries: Tensor, student_keys: Tensor) -> Tensor:
        return 3 * attention_loss(
            student_queries, student_keys, *states[2:], attention_mask, form=form, **SCALING
        )

    assert torch.autograd.gradcheck(scaled_loss, states[:2])


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_refused(form: str) -> None:
    """The hand-written gradient carries no graph: silence would give a wrong Hessian."""
    states, attention_mask = make_states(6)
    loss = attention_loss(*states, attention_mask, form=form, **SCALING).square()
    (gradient, _) = torch.autograd.grad(loss, states[:2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@given(st.integers(1, 60), st.floats(1e-3, 1e3))
def test_equal_scores_give_no_loss_and_never_a_negative_one(length: int, size: float) -> None:
    """The Gram form subtracts large sums: a loss below zero would reach the logs as nonsense."""
    states, attention_mask = make_states(length)
    queries, keys = (state.detach() * size for state in states[:2])
    turn = nn.init.orthogonal_(torch.empty(5, 5))  # leaves every product of a query and a key as it is
    loss = attention_loss(
        queries,
        keys,
        queries @ turn,
        keys @ turn,
        attention_mask,
        form="gram",
        student_scaling=1.0,
        teacher_scaling=1.0,
    )
    scores = (queries @ keys.mT).square().mean()
    assert 0 <= loss <= 1e-5 * scores


class LargestProduct(TorchDispatchMode):
    """Notes whether any operation makes a matrix of ``length`` x ``length``."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shape, self.seen = (length, length), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.seen |= isinstance(result, Tensor) and tuple(result.shape[-2:]) == self.shape
        return result


@pytest.mark.parametrize(
    ("length", "makes_scores"), [(GRAM_FROM_LENGTH - 1, True), (GRAM_FROM_LENGTH, False), (300, False)]
)
def test_long_sentences_never_build_a_score_matrix(length: int, makes_scores: bool) -> None:
    """Memory that grows with the square of the length is what the Gram form is there to avoid."""
    states, attention_mask = make_states(length)
    with LargestProduct(length) as watch:
        attention_loss(*states, attention_mask, **SCALING).backward()
    assert watch.seen == makes_scores


def reference_attention_loss(states: list[Tensor], attention_mask: Tensor) -> Tensor:
    """The reference implementation's arithmetic: an additive mask on keys, then small scores to zero."""
    student_queries, student_keys, teacher_queries, teacher_keys = states
    additive = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
    student_scores = student_queries @ student_keys.transpose(-1, -2) * SCALING["student_scaling"] + additive
    teacher_scores = teacher_queries @ teacher_keys.transpose(-1, -2) * SCALING["teacher_scaling"] + additive
    zero = torch.zeros(())
    return nn.MSELoss()(
        torch.where(student_scores <= -1e2, zero, student_scores),
        torch.where(teacher_scores <= -1e2, zero, teacher_scores),
    )


@pytest.mark.parametrize("length", [9, 130])
def test_reference_mode_repeats_the_reference_attention_loss(length: int) -> None:
    """Parity with the published code can only be shown if its quirks are repeated exactly."""
    states, attention_mask = make_states(length)
    with torch.no_grad():
        states[0][0] *= 80  # real scores far below -100, which the reference takes for padding
        assert ((states[0] @ states[1].mT * SCALING["student_scaling"])[0] <= -100).any()
    loss = attention_loss(*states, attention_mask, padding="reference", **SCALING)
    truth = reference_attention_loss(states, attention_mask)
    assert error(loss, truth) < 1e-6
    assert error(loss, plain_attention_loss(states, attention_mask)) > 1e-2
    for gradient, true in zip(gradients(loss, states), gradients(truth, states), strict=True):
        assert error(gradient, true) < 1e-6


# Heads and head sizes of students 48 wide and teachers 96 wide.
UNEQUAL = ((16, 3), (12, 8))
FEWER = ((4, 12), (12, 8))
COPRIME = ((3, 16), (4, 24))
EQUAL = ((12, 4), (12, 8))


@pytest.mark.parametrize("length", [7, 130])
@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize(
    ("shapes", "relation_heads", "expected"),
    [
        (UNEQUAL, None, 4),
        (FEWER, None, 4),
        (COPRIME, None, 1),
        (UNEQUAL, 1, 1),
        (UNEQUAL, 6, 6),  # parts of some heads beside whole ones
        (UNEQUAL, 48, 48),
        (EQUAL, 3, 3),
        (EQUAL, 24, 24),
    ],
)
def test_relation_heads_equal_plain_float64_arithmetic(
    shapes: tuple[tuple[int, int], tuple[int, int]],
    relation_heads: int | None,
    expected: int,
    form: str | None,
    length: int,
) -> None:
    """Split along the wrong axis, tokens or heads of a sentence would be compared with strangers."""
    states, attention_mask = make_states(length, shapes=shapes)
    loss = attention_loss(*states, attention_mask, form=form, relation_heads=relation_heads, **SCALING)
    truth = plain_relation_loss(states, attention_mask, expected)
    assert loss > 0
    assert error(loss, truth) < 1e-6
    for gradient, true in zip(gradients(loss, states), gradients(truth, states), strict=True):
        assert error(gradient, true) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_relation_heads_as_many_as_heads_are_the_heads_bit_for_bit(form: str) -> None:
    """Relation heads lead on from equation 7: where each is one head, nothing may differ."""
    states, attention_mask = make_states(70)
    heads = attention_loss(*states, attention_mask, form=form, **SCALING)
    relations = attention_loss(*states, attention_mask, form=form, relation_heads=3, **SCALING)
    assert torch.equal(relations, heads)
    for found, expected in zip(gradients(relations, states), gradients(heads, states), strict=True):
        assert torch.equal(found, expected)


def test_equal_numbers_of_heads_are_compared_as_they_are_by_the_models_own_scaling() -> None:
    """A run between equal heads must not change by a bit for what was made for unequal ones."""
    states, attention_mask = make_states(20)
    real = attention_mask[:, None, :, None].float()
    scaled = [states[place].contiguous() * (real * factor) for place, factor in ((0, 0.3), (2, 0.7))]
    keys = [states[place].contiguous() * real for place in (1, 3)]
    difference = scaled[0] @ keys[0].mT - scaled[1] @ keys[1].mT
    expected = difference.square().sum() / (3 * Counts.of(attention_mask).pairs)
    loss = attention_loss(*states, attention_mask, student_scaling=0.3, teacher_scaling=0.7)
    assert torch.equal(loss, expected)
    assert not torch.equal(loss, attention_loss(*states, attention_mask, relation_heads=3, **SCALING))


def test_a_relation_head_of_whole_heads_scores_their_sum() -> None:
    """What the documentation says differs from equation 7: 12 heads in 4 are summed by threes."""
    states, attention_mask = make_states(9, shapes=FEWER)
    student_scores, head_scores = (
        queries @ keys.mT / queries.shape[-1] ** 0.5 for queries, keys in (states[:2], states[2:])
    )
    teacher_scores = head_scores.unflatten(1, (4, 3)).sum(dim=2) / 3**0.5
    real = attention_mask[:, None, :, None] * attention_mask[:, None, None, :]
    squares = (student_scores - teacher_scores).square() * real
    loss = attention_loss(*states, attention_mask, **SCALING)
    torch.testing.assert_close(loss, squares.sum() / (4 * real.sum()))


@pytest.mark.parametrize("form", FORMS)
def test_neither_padding_nor_the_cut_of_batches_changes_the_loss_of_relation_heads(form: str) -> None:
    """The same sentences must teach the same, whatever they are batched with."""
    states, attention_mask = make_states(20, shapes=UNEQUAL)
    loss = attention_loss(*states, attention_mask, form=form, **SCALING)
    found = gradients(loss, states)
    spoilt = [torch.where(attention_mask.bool()[:, None, :, None], state, 1e3) for state in states]
    torch.testing.assert_close(attention_loss(*spoilt, attention_mask, form=form, **SCALING), loss)
    pairs, total = Counts.of(attention_mask).pairs, torch.zeros(())
    for row, length in enumerate(attention_mask.sum(dim=-1).tolist()):
        alone = [state[row : row + 1, :, :length] for state in states]
        total = total + attention_loss(*alone, torch.ones(1, length), form=form, pairs=pairs, **SCALING)
    torch.testing.assert_close(total, loss)
    for gradient, summed in zip(found, gradients(total, states), strict=True):
        torch.testing.assert_close(gradient, summed)
        assert gradient.transpose(1, 2)[~attention_mask.bool()].abs().sum() == 0


@pytest.mark.parametrize(("length", "makes_scores"), [(287, True), (288, False)])
def test_larger_relation_heads_are_scored_longer(length: int, makes_scores: bool) -> None:
    """Gram matrices grow with the square of a head's size: thrice as large, they pay thrice as late."""
    assert GRAM_FROM_LENGTH == 288 / 3
    states, attention_mask = make_states(length, shapes=UNEQUAL, batch=2)
    with LargestProduct(length) as watch:
        attention_loss(*states, attention_mask, **SCALING).backward()
    assert watch.seen == makes_scores


@pytest.mark.parametrize(("relation_heads", "nearest"), [(0, 1), (-3, 1), (5, 4), (15, 16), (96, 48)])
def test_relation_heads_that_do_not_divide_both_widths_are_refused(relation_heads: int, nearest: int) -> None:
    """The message leads to a number that works, and that number does."""
    states, attention_mask = make_states(6, shapes=UNEQUAL)
    message = (
        f"relation_heads is {relation_heads}, which does not divide both the student's width 48 and the "
        f"teacher's 96: give {nearest}, the nearest that does"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        attention_loss(*states, attention_mask, relation_heads=relation_heads, **SCALING)
    check_relation_heads(nearest, 48, 96)
    assert attention_loss(*states, attention_mask, relation_heads=nearest, **SCALING) > 0


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_the_greatest_common_divisor_of_heads_always_fits(
    heads: int, size: int, teacher_heads: int, teacher_size: int
) -> None:
    """The default is taken without a check: what divides the heads divides what they are joined to."""
    check_relation_heads(math.gcd(heads, teacher_heads), heads * size, teacher_heads * teacher_size)


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-6), (True, 5e-3)])
def test_hidden_loss_equals_plain_float64_arithmetic(autocast: bool, tolerance: float) -> None:
    """Padding in the sum would make the loss depend on the batch; autocast may round the projection only."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 5, requires_grad=True), torch.randn(3, 6, 8)
    attention_mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    projection = nn.Linear(5, 8, bias=False)
    real = attention_mask.bool()
    difference = student.double()[real] @ projection.weight.double().T - teacher.double()[real]
    assert difference.shape == (11, 8)
    truth = difference.square().mean()
    learned = (student, projection.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = hidden_loss(student, teacher, projection, attention_mask)
    assert error(loss, truth) < tolerance
    found = torch.autograd.grad(loss, learned)
    for gradient, true in zip(found, torch.autograd.grad(truth, learned), strict=True):
        assert error(gradient, true) < tolerance


def test_hidden_loss_of_bfloat16_projections_is_summed_in_float32() -> None:
    """Summed in bfloat16, thousands of small squares stop adding up."""
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 64, 32), torch.randn(8, 64, 32)
    mask = torch.ones(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = hidden_loss(student.bfloat16(), teacher, nn.Identity(), mask)
    assert loss.dtype == torch.float32
    assert error(loss, (student.bfloat16().double() - teacher.double()).square().mean()) < 1e-6


@given(st.integers(2, 9), st.floats(0.5, 10.0))
def test_soft_labels_equal_torch_cross_entropy_and_kl_up_to_the_teachers_entropy(
    classes: int, temperature: float
) -> None:
    """Equation 10 is a cross-entropy: least where the student is the teacher, and there its entropy."""
    torch.manual_seed(classes)
    student, teacher = 3 * torch.randn(2, 7, classes, dtype=torch.float64)
    loss = soft_label_loss(student, teacher, temperature=temperature)
    target = (teacher / temperature).softmax(-1)
    torch.testing.assert_close(loss, temperature**2 * F.cross_entropy(student / temperature, target))
    entropy = soft_label_loss(teacher, teacher, temperature=temperature)
    divergence = F.kl_div((student / temperature).log_softmax(-1), target, reduction="batchmean")
    torch.testing.assert_close(loss - entropy, temperature**2 * divergence)
    assert loss > entropy > 0


def test_soft_label_gradient_tends_to_the_centred_logit_difference_as_temperature_grows() -> None:
    """Without t^2 the learning rate would have to change with the temperature (Hinton et al. 2015)."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(soft_label_loss(student, teacher, temperature=1e4), student)
    difference = student.detach() - teacher
    expected = (difference - difference.mean(dim=-1, keepdim=True)) / 5 / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_reference_mode_repeats_the_reference_soft_cross_entropy() -> None:
    """The reference averages over classes and has no t^2; parity needs both."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5)
    loss = soft_label_loss(student, teacher, temperature=2.0, padding="reference")
    truth = (-F.softmax(teacher / 2.0, dim=-1) * F.log_softmax(student / 2.0, dim=-1)).mean()
    torch.testing.assert_close(loss, truth)


def test_score_and_gold_losses_equal_torchs() -> None:
    """A (B, 1) score against (B,) targets broadcasts to B x B and trains every score to the mean."""
    torch.manual_seed(0)
    scores, target, labels = torch.randn(6, 1), torch.randn(6), torch.tensor([0, 2, 1, 1, 0, 2])
    torch.testing.assert_close(score_loss(scores, target), F.mse_loss(scores[:, 0], target))
    torch.testing.assert_close(score_loss(scores, target[:, None]), F.mse_loss(scores[:, 0], target))
    logits = torch.randn(6, 3)
    torch.testing.assert_close(gold_label_loss(logits, labels), F.cross_entropy(logits, labels))


def test_a_repeated_batch_gives_the_same_prediction_losses() -> None:
    """A loss that grew with the batch would need another learning rate for every batch size."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for loss, target in ((soft_label_loss, teacher), (gold_label_loss, labels)):
        torch.testing.assert_close(
            loss(student.repeat(3, 1), target.repeat(3, *[1] * (target.ndim - 1))), loss(student, target)
        )
    torch.testing.assert_close(
        score_loss(student[:, :1].repeat(3, 1), teacher[:, 0].repeat(3)),
        score_loss(student[:, :1], teacher[:, 0]),
    )


def _attention(student: Tensor, teacher: Tensor, mask: Tensor, **options: Any) -> Tensor:
    heads = [tensor.unflatten(-1, (2, -1)).transpose(1, 2) for tensor in (student, teacher)]
    return attention_loss(heads[0], heads[0], heads[1], heads[1], mask, **SCALING, **options)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t, mask: _attention(s, t, mask, form="direct"),
        lambda s, t, mask: _attention(s, t, mask, form="gram"),
        lambda s, t, mask: _attention(s, t, mask, padding="reference"),
        lambda s, t, mask: _attention(s, t, mask, relation_heads=3),
        lambda s, t, mask: hidden_loss(s, t, nn.Identity(), mask),
        lambda s, t, mask: hidden_loss(s, t, nn.Identity(), mask, padding="reference"),
        lambda s, t, mask: soft_label_loss(s[:, 0], t[:, 0]),
        lambda s, t, mask: score_loss(s[:, 0, :1], t[:, 0, 0]),
    ],
    ids=["direct", "gram", "reference", "relations", "hidden", "hidden-reference", "soft", "score"],
)
def test_no_loss_sends_a_gradient_to_the_teacher(loss: Callable[..., Tensor]) -> None:
    """A teacher that moves towards its student makes the loss fall and the student no better."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 5, 6, requires_grad=True) for _ in range(2))
    loss(student, teacher, torch.ones(2, 5, dtype=torch.long)).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_counts_hold_examples_tokens_and_pairs_of_any_mask_type(dtype: torch.dtype) -> None:
    """Tokenizers give integer masks, collators boolean ones: the divisor must not depend on it."""
    counts = Counts.of(torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=dtype))
    assert [count.item() for count in counts] == [2, 4, 10]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_multi_label_loss_is_binary_cross_entropy_on_each(temperature: float) -> None:
    """Written out with logarithms; its gradient keeps its size when the temperature changes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    p, q = torch.sigmoid(teacher / temperature), torch.sigmoid(student / temperature)
    wanted = -(p * q.log() + (1 - p) * (1 - q).log()).sum() / 5 * temperature**2
    found = multi_label_loss(student, p, temperature=temperature)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (found, wanted)))
    halves = [multi_label_loss(student[i], p[i], examples=torch.tensor(5.0)) for i in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(halves), multi_label_loss(student, p))
