"""The DistilBERT objective: two masked language models' states in, named loss parts out.

Sanh et al. 2019, arXiv 1910.01108, section 3, beside which TinyBERT's general distillation is compared.
Shapes: B sequences, T tokens, N masked places, V pieces, d' and d the widths of student and teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from tinybert.errors import InputError
from tinybert.losses import Counts, States, cosine_loss, gold_label_loss, soft_label_loss

# The label of a token that is no masked place, as transformers' collators and losses have it.
UNMASKED = -100


@dataclass(frozen=True)
class DistilBertWeights:
    """The weights of the three parts; the published training command's unless given.

    The paper names none. The command stands in the README of transformers' research project
    ``distillation``: ``--alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0``.

    Attributes:
        soft_labels: Weight of the teacher's soft predictions (L_ce).
        masked_lm: Weight of the pieces that were masked (L_mlm).
        cosine: Weight of the angle between the last hidden states (L_cos).
    """

    soft_labels: float = 5.0
    masked_lm: float = 2.0
    cosine: float = 1.0

    def __post_init__(self) -> None:
        """Refuse weights that are negative or all zero, which would silently train nothing."""
        if min(astuple(self)) < 0:
            raise InputError(f"loss weights must not be negative, got {self}")
        if max(astuple(self)) == 0:
            raise InputError(
                "every loss weight is 0, so nothing would be trained: give at least one a weight"
            )


class DistilBertLoss(nn.Module):
    """L = 5 L_ce + 2 L_mlm + 1 L_cos over masked text: the losses of DistilBERT.

    - ``soft_labels``, L_ce: t^2 CE(softmax(z_T / t), softmax(z_S / t)), summed over pieces, mean over
      masked places. The published code takes the Kullback-Leibler divergence, which is less by the
      teacher's entropy: the gradient is the same. It takes every token unless told
      ``--restrict_ce_to_mask``; the logits of all are seven times the work and the memory.
    - ``masked_lm``, L_mlm: CE(z_S, the true piece), mean over masked places.
    - ``cosine``, L_cos: 1 - cos(h_S W, h_T) of the last layers, mean over real tokens.

    Where the widths agree there is no W, as published. Where they differ W (d', d) is learnt, without
    bias, as in equation 8 of TinyBERT: that is beyond the published loss, which has students as wide as
    their teacher alone.

    Args:
        student_hidden_size: d'.
        teacher_hidden_size: d.
        weights: Those of the parts.
        temperature: t, 2 in the published code.

    Raises:
        InputError: A temperature that is not positive.
    """

    def __init__(
        self,
        student_hidden_size: int,
        teacher_hidden_size: int,
        *,
        weights: DistilBertWeights | None = None,
        temperature: float = 2.0,
    ) -> None:
        """Create W, with orthogonal rows, where it is needed."""
        super().__init__()
        if temperature <= 0:
            raise InputError(f"the temperature must be above 0, got {temperature}")
        self.weights, self.temperature = weights or DistilBertWeights(), temperature
        self.projection: nn.Module = nn.Identity()
        if self.weights.cosine and student_hidden_size != teacher_hidden_size:
            projection = nn.Linear(student_hidden_size, teacher_hidden_size, bias=False)
            nn.init.orthogonal_(projection.weight)
            self.projection = projection

    @property
    def reads_states(self) -> bool:
        """Whether any part needs hidden states."""
        return self.weights.cosine > 0

    @property
    def reads_scores(self) -> bool:
        """Whether any part needs queries and keys: none does."""
        return False

    @property
    def reads_logits(self) -> bool:
        """Whether any part needs the student's logits."""
        return self.weights.soft_labels + self.weights.masked_lm > 0

    @property
    def reads_teacher(self) -> bool:
        """Whether any part needs the teacher: the masked pieces alone do not."""
        return self.weights.soft_labels + self.weights.cosine > 0

    @property
    def depths(self) -> tuple[int | None, int | None]:
        """Student and teacher layers that have to run: all, for the logits and the last states."""
        return None, None

    def places(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return where alone the losses read the head: the masked places (B, T).

        Raises:
            InputError: The batch has no labels.
        """
        if "labels" not in batch:
            raise InputError(
                "the batch has no labels, so no masked places: mask it, as with transformers' "
                "DataCollatorForLanguageModeling"
            )
        return batch["labels"] != UNMASKED

    def counts(self, batch: Mapping[str, Tensor]) -> Counts:
        """Count what the parts of a batch are divided by; its ``examples`` are the masked places."""
        return _counts(batch["attention_mask"], self.places(batch))

    def denominator(self, part: str, counts: Counts) -> Tensor:
        """Return what a part was divided by, so that means over batches can be means over entries."""
        return counts.tokens if part == "cosine" else counts.examples

    def start_projections(self, start: Sequence[Tensor]) -> None:
        """Set W, where there is one, to the last of the matrices (d', d) in H_S W ~ H_T."""
        if isinstance(self.projection, nn.Linear):
            with torch.no_grad():
                self.projection.weight.copy_(start[-1].T)

    def weight(self, part: str) -> float:
        """Return the weight of a part."""
        return float(getattr(self.weights, part))

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the parts that ``forward`` gave."""
        return torch.stack([self.weight(name) * part for name, part in parts.items()]).sum()

    def forward(
        self,
        student: States,
        teacher: States,
        attention_mask: Tensor,
        labels: Tensor,
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted parts that have a weight, as scalars by name.

        Args:
            student: States of the student; its logits (N, V) at the masked places, row by row.
            teacher: States of the teacher, likewise.
            attention_mask: (B, T), 1 = real token.
            labels: The true pieces (B, T) at the masked places, -100 elsewhere.
            counts: What to divide by; this batch's own counts unless given.
        """
        masked = labels != UNMASKED
        counts = counts or _counts(attention_mask, masked)
        # Without a masked place the sums below are 0: by 1 they stay that, by 0 they would be no number.
        examples = torch.where(counts.examples > 0, counts.examples, 1.0)
        parts: dict[str, Tensor] = {}
        if self.weights.soft_labels:
            parts["soft_labels"] = soft_label_loss(
                _logits(student), _logits(teacher), temperature=self.temperature, examples=examples
            )
        if self.weights.masked_lm:
            parts["masked_lm"] = gold_label_loss(_logits(student), labels[masked], examples=examples)
        if self.weights.cosine:
            parts["cosine"] = cosine_loss(
                student.hidden[-1], teacher.hidden[-1], self.projection, attention_mask, tokens=counts.tokens
            )
        return parts


def _counts(attention_mask: Tensor, masked: Tensor) -> Counts:
    counts = Counts.of(attention_mask)
    return counts._replace(examples=masked.sum().to(counts.examples))


def _logits(states: States) -> Tensor:
    if states.logits is None:
        raise InputError("a model shows no logits of pieces: give masked language models, head and all")
    return states.logits
