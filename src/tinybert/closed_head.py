"""The head of a student in closed form: its teacher's, pulled back through the map of the last layer."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tinybert.anatomy import Encoder, SequenceHead, assign, matrix
from tinybert.moments import Moments, with_one

# Gives the student's last states of first tokens (B, d') and the teacher's (B, d), from the start each time.
FirstTokens = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def solve_head(
    teacher: Encoder,
    student: Encoder,
    reach: Tensor,
    basis: Tensor,
    first_tokens: FirstTokens,
    *,
    ridge: float,
) -> None:
    """Set the weights of the student's head, so that it predicts before it is trained.

    A head on every token is linear and goes through ``reach``. One on the first token has a layer in
    between: of its units those are kept that the logits hang on.

    Args:
        teacher: Read only.
        student: Its head is set; one that neither model has is left out.
        reach: [h_S, 1] -> [h_T, 1] of the last layers, (d' + 1, d + 1).
        basis: (d',) the teacher's hidden units that the student keeps.
        first_tokens: The calibration text's.
        ridge: Strength of the shrinkage towards the teacher's own weights.
    """
    heads = [encoder.sequence_head() for encoder in (teacher, student)]
    if heads[0] is not None and heads[1] is not None:
        _solve_sequence_head(heads[0], heads[1], reach, basis, first_tokens, ridge)
    for name in ("classifier", "qa_outputs"):
        source = getattr(teacher.model, name, None)
        if isinstance(source, nn.Linear) and heads[0] is None:  # reads every token's state
            assign(getattr(student.model, name), reach @ matrix(source))


def _solve_sequence_head(
    teacher: SequenceHead,
    student: SequenceHead,
    reach: Tensor,
    basis: Tensor,
    first_tokens: FirstTokens,
    ridge: float,
) -> None:
    """Choose the pooled units that the logits hang on; re-solve the rest on the student's own states."""
    pooled = reach @ matrix(teacher.dense)
    out = _identity(pooled.shape[1]) if teacher.out is None else matrix(teacher.out)
    moments = Moments()
    for states, _ in first_tokens():
        units = teacher.activation(with_one(states.double()) @ pooled)
        moments.add(units, units @ out[:-1] + out[-1], torch.ones(len(states)))
    mean = moments.gram[-1, :-1] / moments.gram[-1, -1]
    variance = moments.gram.diagonal()[:-1] / moments.gram[-1, -1] - mean.square()
    energy = variance * out[:-1].square().sum(1)
    kept = basis if teacher.out is None else energy.topk(len(basis)).indices.sort().values
    assign(student.dense, pooled[:, kept])
    if teacher.out is None or student.out is None:
        return
    prior = torch.cat([out[kept], out[-1:]])
    dropped = torch.ones(len(mean), dtype=torch.bool)
    dropped[kept] = False
    prior[-1] += mean[dropped] @ out[:-1][dropped]
    moments = Moments()
    for states, goal in first_tokens():
        # The student's own activation: another family's may be another.
        units = student.activation(with_one(states.double()) @ pooled[:, kept])
        logits = teacher.activation(with_one(goal.double()) @ matrix(teacher.dense)) @ out[:-1] + out[-1]
        moments.add(units, logits, torch.ones(len(states)))
    assign(student.out, moments.ridge(prior, ridge))


def _identity(width: int) -> Tensor:
    return torch.eye(width + 1, dtype=torch.float64)[:, :-1]
