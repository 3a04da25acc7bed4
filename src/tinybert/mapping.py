"""Which teacher layer each student layer imitates: the mapping n = g(m) of the paper, section 3.1."""

from collections.abc import Sequence
from itertools import pairwise

from tinybert.errors import InputError

STRATEGIES = ("uniform", "top", "bottom")


def layer_map(strategy: str | Sequence[int], student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Return g(1), ..., g(M), the 1-based teacher layer that each student layer imitates.

    With M student and N teacher layers: ``uniform`` is g(m) = m N / M, rounded half to even where M does
    not divide N (6 -> 4 gives 2, 3, 4, 6; 12 -> 5 gives 2, 5, 7, 10, 12), so that the last student layer
    always imitates the last teacher layer; ``top`` is g(m) = m + N - M; ``bottom`` is g(m) = m. A sequence
    is taken as it is, after a check. The embeddings (g(0) = 0) and the prediction (g(M+1) = N+1) always
    correspond and are not listed.

    Args:
        strategy: A name from ``STRATEGIES`` or one teacher layer for each student layer.
        student_layers: M, at least 1.
        teacher_layers: N, at least M.

    Raises:
        InputError: A depth that cannot be mapped, an unknown name, or an explicit mapping of the wrong
            length, out of range or decreasing.
    """
    depths = f"{student_layers} student layers and {teacher_layers} teacher layers"
    if not 1 <= student_layers <= teacher_layers:
        raise InputError(f"cannot map {depths}: the student needs between 1 and {teacher_layers} layers")
    if strategy == "uniform":
        return tuple(round(m * teacher_layers / student_layers) for m in range(1, student_layers + 1))
    if strategy == "top":
        return tuple(m + teacher_layers - student_layers for m in range(1, student_layers + 1))
    if strategy == "bottom":
        return tuple(range(1, student_layers + 1))
    if isinstance(strategy, str):
        names = ", ".join(STRATEGIES)
        raise InputError(
            f"unknown layer mapping {strategy!r}: use {names}, or one teacher layer a student layer"
        )
    return _checked(tuple(strategy), student_layers, teacher_layers, depths)


def _checked(
    explicit: tuple[int, ...], student_layers: int, teacher_layers: int, depths: str
) -> tuple[int, ...]:
    if len(explicit) != student_layers:
        raise InputError(
            f"the layer mapping {explicit} has {len(explicit)} entries for {depths}: give one each"
        )
    if not all(1 <= layer <= teacher_layers for layer in explicit):
        raise InputError(
            f"the layer mapping {explicit} leaves the range 1 to {teacher_layers} ({depths}, counted from 1)"
        )
    if any(later < earlier for earlier, later in pairwise(explicit)):
        raise InputError(
            f"the layer mapping {explicit} decreases ({depths}): list teacher layers from low to high"
        )
    return explicit
