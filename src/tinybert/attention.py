"""Attention for students on CPUs: torch's fused kernel forward, matrix products backward.

The backward pass of torch's fused CPU kernel takes 3 to 15 times as long as ours at 16 to 128 tokens and
a student's head sizes (docs/log.md); forward it cannot be bettered.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Scores made at a time in the backward pass: they and what is made of them stay in a core's cache.
_SCORES_AT_A_TIME = 2**19


class _Attention(torch.autograd.Function):
    """softmax(scaling Q K' + mask) V.

    With P the softmax, O = P V and dO the gradient of O: dV = P' dO, dS = P * (dO V' - rowsum(dO * O)),
    dQ = scaling dS K, dK = scaling dS' Q (Dao et al. 2022, FlashAttention, appendix B). Scores and softmax
    are made in float32 as in the forward kernel, the other products in the precision of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output = ctx.saved_tensors
        grad_output = grad_outputs[0]
        grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        batch, heads, length, _ = query.shape
        step = max(1, _SCORES_AT_A_TIME // (heads * length * key.shape[2]))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            q, k, v, g = (tensor[part] for tensor in (query, key, value, grad_output))
            scores = (q.float() * ctx.scaling) @ k.float().mT
            if mask is not None:
                # The lowest number, not minus infinity: a row without a key has no NaN to spread.
                scores.masked_fill_(~mask[part], torch.finfo(scores.dtype).min)
            probabilities = scores.softmax(dim=-1)
            grad_scores = (g @ v.mT).float()
            grad_scores -= (g.float() * output[part].float()).sum(dim=-1, keepdim=True)
            grad_scores = grad_scores.mul_(probabilities).to(query.dtype)
            for grad, product in zip(
                grads,
                (
                    (grad_scores @ k).mul_(ctx.scaling),
                    (grad_scores.mT @ q).mul_(ctx.scaling),
                    probabilities.to(query.dtype).mT @ g,
                ),
                strict=True,
            ):
                grad[part] = product
        return *grads, None, None


def suits(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Return whether ``attend`` can do, and does faster than torch, what a model asks of its attention."""
    return (
        query.device.type == "cpu"
        and query.requires_grad
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape[1] == key.shape[1]
        and (mask is None or (mask.dtype == torch.bool and mask.shape[0] == query.shape[0]))
        and not dropout
        and not torch.compiler.is_compiling()
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return softmax(scaling Q K' + mask) V, (B, h, T, d_k), differentiable once.

    Args:
        query: (B, h, T, d_k), float32 or bfloat16.
        key: Likewise.
        value: Likewise.
        mask: Boolean, (B, 1 or h, T or 1, T), true where a key is attended to; all unless given.
        scaling: Factor on the scores.
    """
    output: Tensor = _Attention.apply(query, key, value, mask, scaling)
    return output
