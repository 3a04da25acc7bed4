"""The TinyBERT objective: two models' states in, named loss parts out. Owns the learnable projections.

Equation numbers are those of Jiao et al., arXiv 1909.10351v5; shapes as in ``tinybert.losses``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinybert.errors import InputError
from tinybert.losses import (
    Counts,
    Padding,
    States,
    attention_loss,
    check_relation_heads,
    gold_label_loss,
    hidden_loss,
    multi_label_loss,
    probability_loss,
    score_loss,
    soft_label_loss,
)
from tinybert.tasks import Kind

Compared = Literal["scores", "probabilities"]


@dataclass(frozen=True)
class LossWeights:
    """The lambdas of equation 6: a weight a kind of loss, times a weight a layer.

    Attributes:
        embedding: Weight of equation 9.
        hidden: Weight of equation 8, at every mapped layer.
        attention: Weight of equation 7, or of its like on relation heads, at every mapped layer.
        prediction: Weight of equation 10, or of the squared error to the teacher's score.
        gold: Weight of the loss against the gold label (0 in the paper).
        layers: lambda_0 (embeddings), ..., lambda_M, lambda_(M+1) (prediction); all 1 where empty.
    """

    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    prediction: float = 1.0
    gold: float = 0.0
    layers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse weights that are negative or all zero, which would silently train nothing."""
        kinds = (self.embedding, self.hidden, self.attention, self.prediction, self.gold)
        if min(kinds + self.layers) < 0:
            raise InputError(f"loss weights must not be negative, got {self}")
        if max(kinds) == 0:
            raise InputError(
                "every loss weight is 0, so nothing would be trained: give at least one a weight, or leave "
                "the stage out (--intermediate_epochs 0, --prediction_epochs 0)"
            )


class DistillationLoss(nn.Module):
    """Equation 6: a weighted sum over layers m = 0..M+1 of L_layer(student m, teacher g(m)).

    The projections W_e and W_h (one a layer) are this module's parameters: train them with the student,
    keep them with its checkpoints, never inside it.

    Args:
        student_hidden_size: d'.
        teacher_hidden_size: d.
        layer_map: g(1), ..., g(M), counted from 1 (``tinybert.mapping.layer_map``).
        weights: The lambdas.
        kind: What the logits are: class scores, one regression score, a score for each of several labels,
            class scores of each token, of which those with a label count, or scores of each token as the
            start and as the end of an answer, of which those of real tokens count.
        temperature: t of equation 10.
        padding: See ``attention_loss``.
        relation_heads: See ``attention_loss``: given, or where the models' numbers of heads differ, the
            attention parts compare heads joined and split again (MiniLMv2) instead of equation 7's.
        attention_compares: Equation 7's scores, or their softmax (``losses.probability_loss``).
    """

    def __init__(
        self,
        student_hidden_size: int,
        teacher_hidden_size: int,
        layer_map: Sequence[int],
        *,
        weights: LossWeights | None = None,
        kind: Kind = "classification",
        temperature: float = 1.0,
        padding: Padding = "real",
        relation_heads: int | None = None,
        attention_compares: Compared = "scores",
    ) -> None:
        """Create the projections: the identity where the widths agree, else orthogonal rows.

        Raises:
            InputError: Weights that train nothing, or of another depth; relation heads that do not fit, or
                with probabilities, which are of heads as they are.
        """
        super().__init__()
        self.attention_compares = attention_compares
        if attention_compares == "probabilities" and (relation_heads is not None or padding == "reference"):
            raise InputError(
                "attention probabilities are compared head with head over real tokens: "
                "leave out relation heads and the reference's padding, or compare scores"
            )
        self.layer_map = tuple(layer_map)
        self.weights = weights or LossWeights()
        self.kind, self.temperature, self.padding = kind, temperature, padding
        self.relation_heads = relation_heads
        if relation_heads is not None and self.weights.attention:
            check_relation_heads(relation_heads, student_hidden_size, teacher_hidden_size)
        layers = self.weights.layers
        if layers and len(layers) != len(self.layer_map) + 2:
            raise InputError(
                f"got {len(layers)} layer weights for {len(self.layer_map)} student layers: "
                f"give {len(self.layer_map) + 2} (embeddings, each layer, prediction)"
            )
        self._last = len(self.layer_map) + 1
        parts = [f"{kind}_{m}" for kind in ("hidden", "attention") for m in range(1, self._last)]
        if not any(self.weight(part) for part in ("embedding", *parts, "prediction", "gold")):
            raise InputError(
                f"the layer weights {layers} leave every loss at 0, so nothing would be trained: "
                "give a weight to a layer whose kind of loss has one"
            )
        projected = [m for m in range(self._last) if self._weight("hidden" if m else "embedding", m)]
        self.projections = nn.ModuleDict(
            {str(m): nn.Linear(student_hidden_size, teacher_hidden_size, bias=False) for m in projected}
        )
        for projection in self._projections():
            start = nn.init.eye_ if student_hidden_size == teacher_hidden_size else nn.init.orthogonal_
            start(projection.weight)

    @property
    def reads_states(self) -> bool:
        """Whether any part needs hidden states or attention scores."""
        return self.weights.embedding + self.weights.hidden + self.weights.attention > 0

    @property
    def reads_scores(self) -> bool:
        """Whether any part needs queries and keys."""
        return self.weights.attention > 0

    @property
    def reads_logits(self) -> bool:
        """Whether any part needs the student's logits."""
        return self.weights.prediction + self.weights.gold > 0

    @property
    def reads_teacher(self) -> bool:
        """Whether any part needs the teacher: the gold labels alone do not."""
        return self.reads_states or self.weights.prediction > 0

    @property
    def depths(self) -> tuple[int | None, int | None]:
        """Student and teacher layers that have to run, from below; None is all of them, for the logits."""
        if self.reads_logits:
            return None, None
        read = [m for m in range(1, self._last) if self._weight("hidden", m) + self._weight("attention", m)]
        deepest = max(read, default=0)
        return deepest, self.layer_map[deepest - 1] if deepest else 0

    def places(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return where alone the losses read a token head, (B, T); None, as they read whole sequences."""
        return None

    def counts(self, batch: Mapping[str, Tensor]) -> Counts:
        """Count what the parts of a batch are divided by."""
        mask = batch["attention_mask"]
        counts = Counts.of(mask if self.padding == "real" else torch.ones_like(mask))
        if self.reads_logits and self.kind == "token_classification":
            labelled = _labelled(batch.get("labels")).sum()
            counts = counts._replace(examples=labelled.to(counts.examples.dtype).clamp_min(1))
        return counts

    def denominator(self, part: str, counts: Counts) -> Tensor:
        """Return what a part was divided by, so that means over batches can be means over entries."""
        kind = part.partition("_")[0]
        if kind in ("embedding", "hidden"):
            return counts.tokens
        return counts.pairs if kind == "attention" else counts.examples

    def start_projections(self, start: Sequence[Tensor]) -> None:
        """Set the projections of layers 0..M to the matrices W (d', d) in H_S W ~ H_T."""
        with torch.no_grad():
            for m, projection in zip(self.projections, self._projections(), strict=True):
                projection.weight.copy_(start[int(m)].T)

    def _projections(self) -> list[nn.Linear]:
        return [module for module in self.projections.values() if isinstance(module, nn.Linear)]

    def _weight(self, kind: str, layer: int) -> float:
        return getattr(self.weights, kind) * (self.weights.layers[layer] if self.weights.layers else 1.0)

    def weight(self, part: str) -> float:
        """Return the weight of a part: lambda of its kind times lambda of its layer."""
        kind, _, layer = part.partition("_")
        if kind == "embedding":
            return self._weight(kind, 0)
        return self._weight(kind, int(layer) if layer else self._last)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the parts that ``forward`` gave."""
        return torch.stack([self.weight(name) * part for name, part in parts.items()]).sum()

    def forward(
        self,
        student: States,
        teacher: States,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted parts that have a weight, as scalars by name.

        Names: ``embedding``, ``hidden_1`` ... ``hidden_M``, ``attention_1`` ... ``attention_M``,
        ``prediction``, ``gold``.

        Args:
            student: States of the student: M + 1 hidden states.
            teacher: States of the teacher, of all layers up to g(M) at least.
            attention_mask: (B, T), 1 = real token.
            labels: Gold class ids or scores (B,), first and last tokens of answers (B, 2), read by ``gold``
                only; or class ids of tokens (B, T), -100 where none is, which say what ``prediction`` reads.
            counts: What to divide by; this batch's own counts unless given.
        """
        labelled = {} if labels is None else {"labels": labels}
        counts = counts or self.counts({"attention_mask": attention_mask} | labelled)
        parts: dict[str, Tensor] = {}
        for m, g in enumerate((0, *self.layer_map)):
            if str(m) in self.projections:
                parts[f"hidden_{m}" if m else "embedding"] = hidden_loss(
                    student.hidden[m],
                    teacher.hidden[g],
                    self.projections[str(m)],
                    attention_mask,
                    tokens=counts.tokens,
                    padding=self.padding,
                )
            if m and self._weight("attention", m):
                parts[f"attention_{m}"] = self._attention_part(student, teacher, m, attention_mask, counts)
        if self.reads_logits:
            rows = self._rows(student.logits, teacher.logits, labels, attention_mask, counts.examples)
            parts |= self._prediction_parts(*rows)
        return parts

    def _attention_part(
        self, student: States, teacher: States, m: int, attention_mask: Tensor, counts: Counts
    ) -> Tensor:
        g = self.layer_map[m - 1]
        attention = (
            student.queries[m - 1],
            student.keys[m - 1],
            teacher.queries[g - 1],
            teacher.keys[g - 1],
            attention_mask,
        )
        scaling = {"student_scaling": student.scaling[m - 1], "teacher_scaling": teacher.scaling[g - 1]}
        if self.attention_compares == "probabilities":
            return probability_loss(*attention, **scaling, pairs=counts.pairs)
        return attention_loss(
            *attention,
            **scaling,
            relation_heads=self.relation_heads,
            pairs=counts.pairs,
            padding=self.padding,
        )

    def _rows(
        self, student_logits: Any, teacher_logits: Any, labels: Any, attention_mask: Tensor, examples: Tensor
    ) -> tuple[Any, Any, Any, Tensor]:
        """Return logits (N, C) twice, labels (N,) and their number, where tokens have logits of their own.

        Each token with a label is an example. Of answers, the start is one and the end another; the classes
        are the real tokens of the window.
        """

        def rows(of_tokens: Tensor | None) -> Tensor | None:
            if of_tokens is None:
                return None
            if self.kind == "token_classification":
                return of_tokens[_labelled(labels)]
            # Not the least number there is: divided by a temperature it must stay one.
            ends = of_tokens.float().transpose(1, 2).masked_fill(attention_mask[:, None] == 0, -1e9)
            return ends.flatten(0, 1)

        if self.kind == "token_classification":
            return rows(student_logits), rows(teacher_logits), labels[_labelled(labels)], examples
        if self.kind == "question_answering":
            gold = None if labels is None else labels.flatten()
            return rows(student_logits), rows(teacher_logits), gold, 2 * examples
        return student_logits, teacher_logits, labels, examples

    def _prediction_parts(
        self, student_logits: Any, teacher_logits: Any, labels: Any, examples: Tensor
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        t = self.temperature
        if self._weight("prediction", self._last):
            if self.kind == "regression":
                loss = score_loss(student_logits, teacher_logits, examples=examples)
            elif self.kind == "multi_label":
                target = torch.sigmoid(teacher_logits.float() / t)
                loss = multi_label_loss(student_logits, target, temperature=t, examples=examples)
            else:
                loss = soft_label_loss(
                    student_logits, teacher_logits, temperature=t, examples=examples, padding=self.padding
                )
            parts["prediction"] = loss
        if self._weight("gold", self._last):
            if labels is None:
                raise InputError(
                    "gold_weight is above 0, but the rows have no labels: give some, or set it to 0"
                )
            gold_losses = {"regression": score_loss, "multi_label": multi_label_loss}
            gold_loss: Any = gold_losses.get(self.kind, gold_label_loss)
            parts["gold"] = gold_loss(student_logits, labels, examples=examples)
        return parts


def _labelled(labels: Tensor | None) -> Tensor:
    """Return where tokens have a label (B, T)."""
    if labels is None:
        raise InputError("the tokens have no labels, which say where a word begins: give labelled rows")
    return labels != -100
