"""attend() against softmax(scaling Q K' + mask) V written out in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tinybert.attention
from tinybert.attention import attend, suits

SCALING = 0.3


def make_inputs(length: int, dtype: torch.dtype, head_size: int = 6) -> tuple[Tensor, ...]:
    """Return Q, K, V as models make them: views of (B, T, h, d_k)."""
    torch.manual_seed(length)
    made = torch.randn(3, 5, length, 2, head_size).to(dtype).transpose(2, 3)
    return tuple(tensor.requires_grad_() for tensor in made.unbind())


def make_mask(length: int) -> Tensor:
    real = torch.arange(length) < torch.tensor([length, 1, length // 2, length, 2])[:, None]
    return real[:, None, None, :].expand(-1, 1, length, -1)


def by_formula(inputs: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in inputs)
    scores = SCALING * query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    output = scores.softmax(-1) @ value
    grads = torch.autograd.grad((output * weights_like(output)).sum(), (query, key, value))
    return output, grads


def weights_like(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, tolerance: float, padded: bool
) -> None:
    inputs = make_inputs(9, dtype)
    mask = make_mask(9) if padded else None
    true_output, true_grads = by_formula(inputs, mask)
    output = attend(*inputs, mask, SCALING)
    grads = torch.autograd.grad((output * weights_like(output)).sum(), inputs)
    assert output.dtype == dtype
    assert error(output, true_output) < tolerance
    for grad, true in zip(grads, true_grads, strict=True):
        assert grad.dtype == dtype
        assert error(grad, true) < tolerance


@pytest.mark.parametrize("at_a_time", [1, 3 * 2 * 81, 10**9])
def test_gradients_do_not_depend_on_how_many_texts_are_done_at_a_time(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass goes through the batch in parts, also parts that do not divide it."""
    inputs, mask = make_inputs(9, torch.float32), make_mask(9)
    monkeypatch.setattr(tinybert.attention, "_SCORES_AT_A_TIME", at_a_time)
    output = attend(*inputs, mask, SCALING)
    grads = torch.autograd.grad((output * weights_like(output)).sum(), inputs)
    for grad, true in zip(grads, by_formula(inputs, mask)[1], strict=True):
        assert error(grad, true) < 1e-5


def test_a_text_of_padding_alone_spreads_no_nan() -> None:
    inputs, mask = make_inputs(4, torch.float32), make_mask(4).clone()
    mask[2] = False
    output = attend(*inputs, mask, SCALING)
    grads = torch.autograd.grad(output.nan_to_num()[[0, 1, 3, 4]].sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)


def test_what_it_cannot_do_is_left_to_torch() -> None:
    query, key, _ = make_inputs(4, torch.float32)
    assert suits(query, key, None, 0.0)
    assert suits(query, key, make_mask(4), 0.0)
    assert not suits(query, key, None, 0.1)
    assert not suits(query.detach(), key, None, 0.0)
    assert not suits(query.double(), key, None, 0.0)
    assert not suits(query, key[:, :1], None, 0.0)
    assert not suits(query, key, torch.zeros(5, 1, 4, 4), 0.0)
    assert not suits(query, key, make_mask(4)[:1], 0.0)


def test_torch_agrees() -> None:
    inputs, mask = make_inputs(33, torch.float32), make_mask(33)
    expected = F.scaled_dot_product_attention(*inputs, mask, scale=SCALING)
    output = attend(*inputs, mask, SCALING)
    torch.testing.assert_close(output, expected)
    for grad, true in zip(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-5)
