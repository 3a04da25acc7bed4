"""The loss functions of TinyBERT: tensors of two models in, one scalar out.

Equation numbers are those of Jiao et al., arXiv 1909.10351v5. Shapes: B sequences, T tokens, h heads,
d the width of a model, d_k = d / h its head size, C classes. Everything is computed in float32 (float64
for float64 input) with autocast off, and every loss is a mean over real entries only, so that padding
never changes it. No gradient reaches a teacher. Call backward outside autocast, as torch asks.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinybert.errors import InputError

Padding = Literal["real", "reference"]

# Below this many tokens T x T scores are cheaper than Gram matrices (benchmarks/attention_loss.py).
GRAM_FROM_LENGTH = 96


@dataclass(frozen=True)
class States:
    """What one forward pass of one model shows.

    Attributes:
        hidden: Embedding output, then each layer's output: L + 1 tensors (B, T, d).
        queries: Each layer's queries before scaling: L tensors (B, h, T, d_k).
        keys: Each layer's keys, shaped alike.
        scaling: Each layer's factor on the query-key products, usually 1 / sqrt(d_k).
        logits: The head's output: (B, C), (B, T, C) of each token (start and end of answers: C = 2), or
            (N, V) at N masked places; None where only the encoder ran.
    """

    hidden: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    scaling: tuple[float, ...] = ()
    logits: Tensor | None = None


class Counts(NamedTuple):
    """What the losses of a batch are divided by.

    Given from outside, these are the counts of a whole accumulated or distributed batch, so that the sum
    of its pieces' losses is the loss of the whole.
    """

    examples: Tensor
    tokens: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> "Counts":
        """Count the examples, real tokens and real (query, key) pairs of a mask (B, T)."""
        lengths = attention_mask.sum(dim=-1).float()
        return cls(torch.ones_like(lengths).sum(), lengths.sum(), lengths.square().sum())


def _full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a loss with autocast off: bfloat16 sums of squares lose the small differences they are about."""

    @functools.wraps(function)
    def wrapper(student: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(student.device.type, enabled=False):
            return function(student, *args, **kwargs)

    return wrapper


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _masked(tensor: Tensor, factor: Tensor) -> Tensor:
    # Queries and keys come as views (B, T, h, d_k) -> (B, h, T, d_k): copied once here, not in each product.
    return tensor.to(factor.dtype, memory_format=torch.contiguous_format).mul(factor)


class _ScoreDifference(torch.autograd.Function):
    """|Qs Ks' - Qt Kt'|_F^2 summed over batch and heads, with or without the T x T scores.

    With S = Qs Ks' and T = Qt Kt' the squared norm is <Qs'Qs, Ks'Ks> - 2 <Qs'Qt, Ks'Kt> + <Qt'Qt, Kt'Kt>,
    the gradient dQs = 2 (Qs (Ks'Ks) - Qt (Kt'Ks)) and dKs = 2 (Ks (Qs'Qs) - Kt (Qt'Qs)). Every bracket is
    head size x head size: O(T d_k^2) work and O(T d_k) memory. Either form takes the gradient in the
    forward pass, in full precision, and keeps nothing else: no scores, nothing of the teacher.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, form: str
    ) -> Tensor:
        differentiable = any(ctx.needs_input_grad)
        if form == "direct":
            difference = queries @ keys.mT - teacher_queries @ teacher_keys.mT
            if differentiable:
                ctx.save_for_backward(difference @ keys, difference.mT @ queries)
            return difference.square().sum()
        student_qq, student_kk = queries.mT @ queries, keys.mT @ keys
        cross_qq, cross_kk = teacher_queries.mT @ queries, teacher_keys.mT @ keys
        teacher_qq, teacher_kk = teacher_queries.mT @ teacher_queries, teacher_keys.mT @ teacher_keys
        if differentiable:
            ctx.save_for_backward(
                queries @ student_kk - teacher_queries @ cross_kk, keys @ student_qq - teacher_keys @ cross_qq
            )
        student, cross, teacher = student_qq * student_kk, cross_qq * cross_kk, teacher_qq * teacher_kk
        # Rounding alone can take the loss of equal scores below zero.
        return (student.sum() - 2 * cross.sum() + teacher.sum()).clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        half_grad_queries, half_grad_keys = ctx.saved_tensors
        scale = 2 * grad_outputs[0]
        return half_grad_queries * scale, half_grad_keys * scale, None, None, None


def check_relation_heads(relation_heads: int, student_width: int, teacher_width: int) -> None:
    """Check that two models' queries and keys, h * d_k wide, can be split into r relation heads.

    Raises:
        InputError: r does not divide both widths; the message names the nearest number that does.
    """
    common = math.gcd(student_width, teacher_width)
    if relation_heads < 1 or common % relation_heads:
        divisors = [number for number in range(1, common + 1) if common % number == 0]
        nearest = min(divisors, key=lambda number: abs(number - relation_heads))
        raise InputError(
            f"relation_heads is {relation_heads}, which does not divide both the student's width "
            f"{student_width} and the teacher's {teacher_width}: give {nearest}, the nearest that does"
        )


def _relation_heads(asked: int | None, student_queries: Tensor, teacher_queries: Tensor) -> int | None:
    """Return how many relation heads to compare; None where heads themselves can be, one with one."""
    heads, teacher_heads = student_queries.shape[1], teacher_queries.shape[1]
    if asked is not None:
        check_relation_heads(
            asked, heads * student_queries.shape[-1], teacher_heads * teacher_queries.shape[-1]
        )
        return asked
    # What divides the number of heads divides their joint width, so this needs no check.
    return None if heads == teacher_heads else math.gcd(heads, teacher_heads)


def _relations(queries: Tensor, keys: Tensor, relation_heads: int) -> tuple[Tensor, Tensor, float]:
    """Join all heads of queries and keys (B, h, T, d_k) and split them again, into r relation heads.

    Returns both as (B, r, T, d_r), d_r = h * d_k / r, and the factor 1 / sqrt(d_r) on their products. The
    split is that of Wang et al. 2021 (MiniLMv2, arXiv 2012.15828), who compare softmaxed Q Q', K K' and V V'
    of one layer; here it serves the Q K' of equation 7. It is not equation 7 itself, as the scores are none
    that a model attends with: where r divides h, each is the sum of h / r neighbouring heads' scores over
    sqrt(h / r) (of heads scaled by 1 / sqrt(d_k)); with more relation heads than heads it is a sum over some
    of one head's dimensions.
    """
    # As attention makes them, heads lie side by side in (B, T, h * d_k): then nothing is copied here.
    queries, keys = (
        states.transpose(1, 2).flatten(2).unflatten(-1, (relation_heads, -1)).transpose(1, 2)
        for states in (queries, keys)
    )
    return queries, keys, queries.shape[-1] ** -0.5


@_full_precision
def attention_loss(
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    attention_mask: Tensor,
    *,
    student_scaling: float,
    teacher_scaling: float,
    relation_heads: int | None = None,
    pairs: Tensor | None = None,
    form: Literal["direct", "gram"] | None = None,
    padding: Padding = "real",
) -> Tensor:
    """Mean squared difference of the unnormalised attention scores, equation 7.

    A = scaling * Q K' before mask and softmax. Summed over heads and real (query, key) pairs, divided by
    heads * real pairs. Both forms give the same value and gradient; no gradient reaches the teacher.
    Between relation heads, as in MiniLMv2, the scores are no longer equation 7's: see ``_relations``.

    Args:
        student_queries: (B, h, T, d_k) of the student.
        student_keys: Likewise.
        teacher_queries: (B, h, T, d_k) of the teacher: same T, any h and d_k.
        teacher_keys: Likewise.
        attention_mask: (B, T), 1 = real token.
        student_scaling: Factor on the student's products.
        teacher_scaling: Factor on the teacher's products. Relation heads bring their own.
        relation_heads: r, into which both models' heads are split again; where their numbers differ, the
            greatest common divisor unless given.
        pairs: Real pairs to divide by; those of this mask unless given.
        form: ``"direct"`` makes the T x T scores, ``"gram"`` does not; by length unless given.
        padding: ``"reference"`` repeats the reference implementation: only padded keys and scores of
            -100 and below count as zero, and the mean runs over all h * T * T entries.

    Raises:
        InputError: ``relation_heads`` does not divide both widths h * d_k.
    """
    teacher_heads = teacher_queries.shape[1]
    r = _relation_heads(relation_heads, student_queries, teacher_queries)
    if r is not None:
        student_queries, student_keys, student_scaling = _relations(student_queries, student_keys, r)
        teacher_queries, teacher_keys, teacher_scaling = _relations(teacher_queries, teacher_keys, r)
    heads, length = student_queries.shape[1:3]
    real = attention_mask[:, None, :, None].to(torch.promote_types(student_queries.dtype, torch.float32))
    real_queries = torch.ones_like(real) if padding == "reference" else real
    queries = _masked(student_queries, real_queries * student_scaling)
    keys = _masked(student_keys, real)
    with torch.no_grad():
        teacher_queries = _masked(teacher_queries, real_queries * teacher_scaling)
        teacher_keys = _masked(teacher_keys, real)
    if padding == "reference":
        both = (queries @ keys.mT, teacher_queries @ teacher_keys.mT)
        student_scores, teacher_scores = (scores.masked_fill(scores <= -100, 0) for scores in both)
        total = F.mse_loss(student_scores, teacher_scores, reduction="sum")
        return total / (heads * (real.shape[0] * length**2 if pairs is None else pairs))
    # Where the Gram form pays moves with the size of what is compared.
    form = form or ("direct" if length * heads < GRAM_FROM_LENGTH * teacher_heads else "gram")
    total = _ScoreDifference.apply(queries, keys, teacher_queries, teacher_keys, form)
    return total / (heads * (Counts.of(attention_mask).pairs if pairs is None else pairs))


@_full_precision
def probability_loss(
    student_queries: Tensor,
    student_keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    attention_mask: Tensor,
    *,
    student_scaling: float,
    teacher_scaling: float,
    pairs: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of attention probabilities: equation 7 after mask and softmax, to compare with.

    Arguments and divisor are those of ``attention_loss``; it makes the T x T matrices.

    Raises:
        InputError: The models have different numbers of heads.
    """
    heads, teacher_heads = student_queries.shape[1], teacher_queries.shape[1]
    if heads != teacher_heads:
        raise InputError(f"{heads} heads against the teacher's {teacher_heads}: only scores can be compared")
    real = attention_mask[:, None, :, None].bool()

    def probabilities(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
        scores = _wide(queries) @ _wide(keys).mT * scaling
        return scores.masked_fill(~real.mT, float("-inf")).softmax(dim=-1).masked_fill(~real, 0)

    target = probabilities(teacher_queries.detach(), teacher_keys.detach(), teacher_scaling)
    difference = probabilities(student_queries, student_keys, student_scaling) - target
    return difference.square().sum() / (heads * (Counts.of(attention_mask).pairs if pairs is None else pairs))


class _SquaredDistance(torch.autograd.Function):
    """Squared error summed over the hidden size and real tokens; keeps its gradient and nothing else."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, target: Tensor, attention_mask: Tensor) -> Tensor:
        difference = _wide(projected - target)
        real = attention_mask.to(difference.dtype)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(difference.to(projected.dtype), real.to(projected.dtype))
        return torch.linalg.vector_norm(difference, dim=-1).square().mul(real).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        difference, real = ctx.saved_tensors
        return difference * (real * (2 * grad_outputs[0]).to(real.dtype)).unsqueeze(-1), None, None


def hidden_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: nn.Module,
    attention_mask: Tensor,
    *,
    tokens: Tensor | None = None,
    padding: Padding = "real",
) -> Tensor:
    """Mean squared difference of projected hidden states, equation 8, and of embeddings, equation 9.

    The projection runs in the precision around it (bfloat16 under autocast: its rounding is a thousandth
    of a state's size), difference and sum in full precision.

    Args:
        student_hidden: H_S (B, T, d').
        teacher_hidden: H_T (B, T, d).
        projection: Learnable W (d' -> d).
        attention_mask: (B, T), 1 = real token.
        tokens: Real tokens to divide by; those of this mask unless given.
        padding: ``"reference"`` takes the mean over padded tokens too.
    """
    projected = projection(student_hidden)
    with torch.autocast(student_hidden.device.type, enabled=False):
        if padding == "reference":
            attention_mask = torch.ones_like(attention_mask)
        total: Tensor = _SquaredDistance.apply(projected, teacher_hidden.detach(), attention_mask)
        tokens = Counts.of(attention_mask).tokens if tokens is None else tokens
        return total / (tokens * teacher_hidden.shape[-1])


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: nn.Module,
    attention_mask: Tensor,
    *,
    tokens: Tensor | None = None,
) -> Tensor:
    """Mean of 1 - cos(h_S W, h_T) over real tokens: L_cos of Sanh et al. 2019, arXiv 1910.01108.

    The projection runs in the precision around it, as in ``hidden_loss``, all else in full precision.

    Args:
        student_hidden: H_S (B, T, d').
        teacher_hidden: H_T (B, T, d).
        projection: W (d' -> d); the identity in the paper, whose widths agree.
        attention_mask: (B, T), 1 = real token.
        tokens: Real tokens to divide by; those of this mask unless given.
    """
    projected = projection(student_hidden)
    with torch.autocast(student_hidden.device.type, enabled=False):
        cosines = F.cosine_similarity(_wide(projected), _wide(teacher_hidden.detach()), dim=-1)
        total = (1 - cosines).mul(attention_mask.to(cosines.dtype)).sum()
        return total / (Counts.of(attention_mask).tokens if tokens is None else tokens)


@_full_precision
def soft_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    examples: Tensor | None = None,
    padding: Padding = "real",
) -> Tensor:
    """Soft cross-entropy between teacher and student predictions, equation 10.

    CE(softmax(z_T / t), z_S / t) * t^2, summed over classes, mean over examples: the factor keeps the size
    of the gradient when t changes (Hinton et al. 2015, section 2.1).

    Args:
        student_logits: z_S (B, C).
        teacher_logits: z_T (B, C).
        temperature: t > 0.
        examples: Examples to divide by; B unless given.
        padding: ``"reference"`` takes the mean over classes too and leaves out t^2.
    """
    target = F.softmax(_wide(teacher_logits.detach()) / temperature, dim=-1)
    log_probabilities = F.log_softmax(_wide(student_logits) / temperature, dim=-1)
    factor = 1 / student_logits.shape[-1] if padding == "reference" else temperature**2
    total = -(target * log_probabilities).sum() * factor
    return total / (student_logits.shape[0] if examples is None else examples)


@_full_precision
def score_loss(student_logits: Tensor, target: Tensor, *, examples: Tensor | None = None) -> Tensor:
    """Mean squared difference of regression scores (B, 1) from the teacher's or the gold ones (B,)."""
    total = (_wide(student_logits).flatten() - _wide(target.detach()).flatten()).square().sum()
    return total / (student_logits.shape[0] if examples is None else examples)


@_full_precision
def multi_label_loss(
    student_logits: Tensor, target: Tensor, *, temperature: float = 1.0, examples: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy on each label, where any number of them may hold: equation 10, label by label.

    CE(p, sigmoid(z_S / t)) * t^2, summed over labels, mean over examples.

    Args:
        student_logits: z_S (B, C).
        target: p (B, C): sigmoid(z_T / t) of a teacher, or the gold zeros and ones.
        temperature: t > 0.
        examples: Examples to divide by; B unless given.
    """
    logits = _wide(student_logits) / temperature
    total = F.binary_cross_entropy_with_logits(logits, _wide(target.detach()), reduction="sum")
    return total * temperature**2 / (student_logits.shape[0] if examples is None else examples)


@_full_precision
def gold_label_loss(student_logits: Tensor, labels: Tensor, *, examples: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student's logits (B, C) against gold class ids (B,)."""
    total = F.cross_entropy(_wide(student_logits), labels, reduction="sum")
    return total / (student_logits.shape[0] if examples is None else examples)
