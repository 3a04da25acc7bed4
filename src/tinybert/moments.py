"""The linear algebra of the closed-form student: second moments in, weights out.

Features carry a constant 1 as their last column, so every map of d features is a (d + 1, k) matrix whose
last row is the bias. Everything here is float64 and knows nothing of Transformers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tinybert.errors import InputError

_BLOCK = 256  # columns: nearly half of the work of a Gram matrix of a thousand and more is left out


def with_one(features: Tensor) -> Tensor:
    """(n, d) -> (n, d + 1): append the constant 1."""
    return F.pad(features, (0, 1), value=1.0)


class Moments:
    """Weighted sums f'f and f't over rows, so memory does not grow with the number of rows.

    Attributes:
        gram: (d + 1, d + 1), f'f with the constant 1 appended to f.
        cross: (d + 1, k), f't.
        energy: (k,), sums of t^2.
    """

    def __init__(self) -> None:
        """Start with no rows."""
        self.gram = self.cross = self.energy = torch.zeros(())

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Count rows: features (n, d), targets (n, k), weights (n,) >= 0.

        The products of one batch are taken in float32 where there are many features, as they cost most
        of the time there; sums over batches are always float64.
        """
        if features.shape[1] <= 256:
            features, targets = features.double(), targets.double()
        root = weights.double().sqrt()[:, None].to(features.dtype)
        features, goals = with_one(features) * root, targets * root
        self.gram = self.gram + _gram(features)
        self.cross = self.cross + (features.T @ goals).double()
        self.energy = self.energy + (weights.double() @ targets.double().square())

    def mapped(self, matrix: Tensor) -> "Moments":
        """Return the moments of [f, 1] @ matrix, matrix (d + 1, e + 1) keeping the constant last."""
        new = Moments()
        new.gram, new.cross, new.energy = matrix.T @ self.gram @ matrix, matrix.T @ self.cross, self.energy
        return new

    def ridge(self, prior: Tensor, strength: float, columns: slice = slice(None)) -> Tensor:
        """Return argmin_W |f W - t|^2 + strength * mean(diag f'f) * |W - prior|^2, (d + 1, k).

        Shrinking towards a prior instead of zero costs nothing where the prior is already right.

        Raises:
            InputError: A sum is no number.
        """
        scale = strength * self.gram.diagonal().mean().clamp_min(1e-30)
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(self.gram + scale * eye)
        while failed and scale.isfinite():
            # Of fewer rows than features float32 leaves eigenvalues a little below zero.
            scale = 100 * scale
            factor, failed = torch.linalg.cholesky_ex(self.gram + scale * eye)
        if failed:
            raise InputError("states on the calibration text are no numbers: a model's weights are damaged")
        return prior + torch.cholesky_solve(self.cross[:, columns] - self.gram @ prior, factor)

    def error(self, weights: Tensor, columns: slice = slice(None)) -> float:
        """Return |f W - t|^2 / |t - mean t|^2 for W (d + 1, k)."""
        cross, energy = self.cross[:, columns], self.energy[columns].sum()
        missed = energy - 2 * (weights * cross).sum() + (weights * (self.gram @ weights)).sum()
        spread = energy - (cross[-1].square() / self.gram[-1, -1]).sum()
        return (missed / spread.clamp_min(1e-30)).item()

    def norm(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gain and the bias (d,) that fit feature i to target columns[i], unit by unit."""
        count, size = self.gram[-1, -1], len(columns)
        features, targets = self.gram[-1, :-1] / count, self.cross[-1, columns] / count
        products = self.cross[torch.arange(size), columns] / count
        variance = self.gram.diagonal()[:-1] / count - features.square()
        gain = (products - features * targets) / variance.clamp_min(1e-12)
        return gain, targets - gain * features


def _gram(rows: Tensor) -> Tensor:
    """(n, d) -> rows' rows (d, d), float64: symmetric, so only blocks from the diagonal on are multiplied."""
    gram = rows.new_empty(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for start in range(0, len(gram), _BLOCK):
        block = slice(start, start + _BLOCK)
        product = rows[:, block].T @ rows[:, start:]
        gram[block, start:], gram[start:, block] = product, product.T
    return gram


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return M^1/2 and its inverse for a symmetric M, with directions the data hardly has damped."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(0) + 1e-7 * values.mean()
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (p, r), B (q, r), r <= rank, with A B' nearest to left @ right' in the Frobenius norm.

    A truncated SVD (Eckart-Young), its singular values shared between the two; nothing is touched where the
    factors are already as small as asked for.
    """
    if left.shape[1] <= rank:
        return left, right
    (left_basis, left_core), (right_basis, right_core) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    root = s[:rank].sqrt()
    return left_basis @ u[:, :rank] * root, right_basis @ v[:rank].T * root


def attention_factors(
    moment: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's Q, K, V (d' + 1, d') and O (d' + 1, d') that are nearest to the teacher's.

    Head by head: Q K' and V O are products of two factors of the teacher's head size; the best factors of the
    student's, where inputs are distributed as the moment says, come from an SVD after whitening.

    Args:
        moment: E[f f'] (d' + 1, d' + 1) of the student's inputs, the constant 1 last.
        teacher: Its Q, K, V as functions of the student's input (d' + 1, d), its O (d + 1, d').
        heads: Of the teacher and of the student. Where they are fewer, those whose values, written out, vary
            most are kept; the others leave their mean behind.
        generator: Of small noise in the dimensions that are to spare.
    """
    query, key, value, out = teacher
    width, new_width = query.shape[1], out.shape[1]
    root, inverse = roots(moment)
    mean = moment[-1]
    size, new_size = width // heads[0], new_width // heads[1]
    columns = [slice(h * size, (h + 1) * size) for h in range(heads[0])]
    deviation, _ = roots(moment - mean[:, None] * mean)
    energy = torch.stack([(deviation @ value[:, h] @ out[:-1][h]).square().sum() for h in columns])
    kept = energy.sort(descending=True, stable=True).indices[: heads[1]].sort().values.tolist()
    shape = (new_width + 1, new_width)
    noise = [0.02 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]
    new_query, new_key, new_value = torch.zeros_like(noise[0]), *noise
    new_out = torch.zeros(shape, dtype=torch.float64)
    new_out[-1] = out[-1]
    for i, old in enumerate(columns):
        if i not in kept:
            new_out[-1] += mean @ value[:, old] @ out[:-1][old]
    for place, old in enumerate(columns[head] for head in kept):
        left, right = low_rank(root @ query[:, old], root @ key[:, old], new_size)
        new = slice(place * new_size, place * new_size + left.shape[1])
        # Scores are divided by the square root of the head size, which has changed.
        scale = (new_size / size) ** 0.25
        new_query[:, new], new_key[:, new] = scale * inverse @ left, scale * inverse @ right
        left, right = low_rank(root @ value[:, old], out[:-1][old].T, new_size)
        new_value[:, new], new_out[new] = inverse @ left, right.T
    return new_query, new_key, new_value, new_out


def choose(moments: Moments, count: int) -> Tensor:
    """Pick ``count`` features whose linear combinations fit the targets best, greedily; sorted indices.

    Orthogonal matching pursuit on the moments alone, in thirty steps: take the features that explain most of
    what is left, remove what they explain from all others (a Schur complement), repeat. The constant is in.
    """
    total = len(moments.gram) - 1
    if count >= total:
        return torch.arange(total)
    step = max(1, count // 30)
    gram, cross = moments.gram.clone(), moments.cross.clone()
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    floor = 1e-6 * gram.diagonal().mean()
    free = torch.ones(total + 1, dtype=torch.bool)
    chosen: list[int] = []
    picked = torch.tensor([total])
    while True:
        free[picked] = False
        share = torch.linalg.solve(gram[picked][:, picked], gram[picked])
        cross -= share.T @ cross[picked]
        gram -= gram[:, picked] @ share
        if len(chosen) == count:
            return torch.tensor(sorted(chosen))
        gains = cross.square().sum(1) / gram.diagonal().clamp_min(floor)
        gains[~free] = -1.0
        picked = gains.topk(min(step, count - len(chosen))).indices
        chosen += picked.tolist()
