"""The objective of PKD, patient knowledge distillation, beside which task-specific distillation is compared.

Sun et al. 2019, arXiv 1908.09355, section 3. Shapes: B sequences, T tokens, d' and d the widths of student
and teacher, M student layers, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinybert.collation import PER_TOKEN
from tinybert.errors import InputError
from tinybert.losses import Counts, Padding, States
from tinybert.objective import DistillationLoss, Kind, LossWeights


def patient_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    projection: nn.Module,
    *,
    examples: Tensor | None = None,
) -> Tensor:
    """Mean squared difference of two layers' first-token states, each divided by its Euclidean length.

    |h_S W / |h_S W| - h_T / |h_T||^2 / d, mean over examples, in full precision after the projection.

    Args:
        student_hidden: (B, T, d'); the first token's state is that of [CLS].
        teacher_hidden: (B, T, d).
        projection: W (d' -> d); the identity in the paper, whose widths agree.
        examples: Examples to divide by; B unless given.
    """
    projected, target = projection(student_hidden[:, 0]), teacher_hidden[:, 0].detach()
    with torch.autocast(student_hidden.device.type, enabled=False):
        wide = torch.promote_types(projected.dtype, torch.float32)
        difference = F.normalize(projected.to(wide), dim=-1) - F.normalize(target.to(wide), dim=-1)
        return difference.square().sum() / (
            target.shape[-1] * (target.shape[0] if examples is None else examples)
        )


class PatientLoss(DistillationLoss):
    """L = (1 - alpha) L_gold + alpha L_soft + beta L_patient, trained in one stage.

    - ``gold`` and ``prediction``: the losses of the gold and of the teacher's soft labels, as in
      ``DistillationLoss``.
    - ``patient_m``, m = 1..M-1: ``patient_loss`` of student layer m and teacher layer g(m); L_patient is
      their mean. The last layer is left out, as in the paper: the head reads it.

    The paper writes sums over layers and units; means, as its authors' code has them, are what its values of
    beta (10 to 1000) belong to. Where the widths agree there is no W, as published. Where they differ a W
    (d', d) without bias is learnt at each layer: that is beyond the published loss, which has students as
    wide as their teacher alone.

    Args:
        student_hidden_size: d'.
        teacher_hidden_size: d.
        layer_map: g(1), ..., g(M), counted from 1.
        alpha: Share of the soft labels; the gold labels have the rest.
        beta: Weight of the first-token states.
        kind: See ``DistillationLoss``.
        temperature: t of the soft labels; 5 to 20 in the paper.
        padding: See ``DistillationLoss``.

    Raises:
        InputError: A share or a weight that cannot be, or a student of one layer.
    """

    def __init__(
        self,
        student_hidden_size: int,
        teacher_hidden_size: int,
        layer_map: Sequence[int],
        *,
        alpha: float = 0.5,
        beta: float = 100.0,
        kind: Kind = "classification",
        temperature: float = 1.0,
        padding: Padding = "real",
    ) -> None:
        """Create a projection a layer where the widths differ."""
        if not 0 <= alpha <= 1:
            raise InputError(f"--pkd_alpha is a share: it must be from 0 to 1, got {alpha}")
        if kind in PER_TOKEN:
            raise InputError(
                f"PKD compares states of first tokens, which do not do {kind}: take --baseline soft_labels"
            )
        if beta <= 0:
            raise InputError(f"--pkd_beta must be above 0, got {beta}: without it nothing of PKD is left")
        if len(layer_map) < 2:
            raise InputError(
                "PKD compares the layers below the last, and the student has one layer: give it --layers 2 "
                "or more, or take --baseline soft_labels"
            )
        super().__init__(
            student_hidden_size,
            teacher_hidden_size,
            layer_map,
            weights=LossWeights(0.0, 0.0, 0.0, prediction=alpha, gold=1 - alpha),
            kind=kind,
            temperature=temperature,
            padding=padding,
        )
        self.beta = beta
        shape = student_hidden_size, teacher_hidden_size
        self.patient = nn.ModuleDict({str(m): _projection(*shape) for m in range(1, len(layer_map))})

    @property
    def reads_states(self) -> bool:
        """Whether any part needs hidden states: the patient ones do."""
        return True

    def start_projections(self, start: Sequence[Tensor]) -> None:
        """Set the projections, where there are any, to the matrices W (d', d) in H_S W ~ H_T, layers 0..M."""
        with torch.no_grad():
            for m, projection in self.patient.items():
                if isinstance(projection, nn.Linear):
                    projection.weight.copy_(start[int(m)].T)

    def weight(self, part: str) -> float:
        """Return the weight of a part."""
        return self.beta / len(self.patient) if part.startswith("patient") else super().weight(part)

    def forward(
        self,
        student: States,
        teacher: States,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted parts, as scalars by name; see ``DistillationLoss.forward``."""
        counts = counts or Counts.of(attention_mask)
        parts = super().forward(student, teacher, attention_mask, labels, counts)
        for name, projection in self.patient.items():
            m, g = int(name), self.layer_map[int(name) - 1]
            parts[f"patient_{m}"] = patient_loss(
                student.hidden[m], teacher.hidden[g], projection, examples=counts.examples
            )
        return parts


def _projection(student_width: int, teacher_width: int) -> nn.Module:
    if student_width == teacher_width:
        return nn.Identity()
    projection: Any = nn.Linear(student_width, teacher_width, bias=False)
    nn.init.orthogonal_(projection.weight)
    return projection
