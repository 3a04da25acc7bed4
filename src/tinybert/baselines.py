"""What distillation is measured against: the same student, taught without a teacher or with less of it."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel

from tinybert.errors import refuse_given
from tinybert.objective import DistillationLoss, Kind
from tinybert.patient import PatientLoss
from tinybert.trainer import DistillationConfig

Baseline = Literal["finetune", "soft_labels", "pkd"]

_ATTENTION = ("attention_weight", "attention_compares", "relation_heads")
_LAYER_LOSSES = ("embedding_weight", "hidden_weight", *_ATTENTION, "layer_weights")
_LABEL_WEIGHTS = ("prediction_weight", "gold_weight")
# Options that say something of a run with the full objective, and of a baseline nothing.
_UNREAD: dict[str, tuple[str, ...]] = {
    "finetune": ("temperature", "padding", "projection_learning_rate", "pkd_alpha", "pkd_beta"),
    "soft_labels": ("projection_learning_rate", "pkd_alpha", "pkd_beta"),
    "pkd": (),
}


@dataclass(kw_only=True)
class BaselineArguments:
    """Whether a student is distilled, or made in one of the ways that distillation is compared with."""

    baseline: Baseline | None = field(
        default=None,
        metadata={
            "help": "The same student from the same start for as many steps as both stages have, in one "
            "stage: finetune (gold labels, no teacher), soft_labels (nothing else) or pkd (gold and soft "
            "labels, first tokens' states)."
        },
    )
    pkd_alpha: float | None = field(
        default=None, metadata={"help": "PKD: share of the soft labels, the gold ones have the rest; 0.5."}
    )
    pkd_beta: float | None = field(
        default=None, metadata={"help": "PKD: weight of the first tokens' normalised states; 100."}
    )

    @property
    def made_by(self) -> str:
        """What the student is called in tables: how it was made, where that is not distillation."""
        return "student" if self.baseline is None else f"student, {self.baseline}"


Arguments = TypeVar("Arguments", bound=BaselineArguments)


def settle_baseline(arguments: Arguments, config: DistillationConfig) -> tuple[Arguments, DistillationConfig]:
    """Turn a baseline into a run of the prediction stage alone, as many steps long as both stages.

    Args:
        arguments: Those of ``distill_task``.
        config: Likewise.

    Raises:
        InputError: An option was given that the baseline would not read.
    """
    baseline = arguments.baseline
    if baseline is None:
        refuse_given(arguments, ("pkd_alpha", "pkd_beta"), "without --baseline pkd")
        return arguments, config
    unread = (*_LAYER_LOSSES, *_LABEL_WEIGHTS, *_UNREAD[baseline])
    refuse_given(arguments, ("intermediate_learning_rate", *unread), f"with --baseline {baseline}")
    refuse_given(config, unread, f"with --baseline {baseline}")
    stages: Any = arguments
    epochs = stages.intermediate_epochs, stages.prediction_epochs
    one_stage = replace(stages, intermediate_epochs=0.0, prediction_epochs=sum(epochs))
    if config.max_steps > 0:  # of each stage
        config = replace(config, max_steps=config.max_steps * sum(stage > 0 for stage in epochs))
    if baseline == "finetune":
        config = replace(config, prediction_weight=0.0, gold_weight=1.0)
    return one_stage, config


def last_objective(
    arguments: BaselineArguments,
    config: DistillationConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    kind: Kind,
) -> DistillationLoss:
    """Build the loss of the prediction stage, or of the baseline in its place.

    Raises:
        InputError: See ``DistillationConfig.objective`` and ``PatientLoss``.
    """
    if arguments.baseline != "pkd":
        return config.objective(student, teacher, kind=kind)
    return PatientLoss(
        student.config.hidden_size,
        teacher.config.hidden_size,
        config.layers_of_teacher(student, teacher),
        alpha=0.5 if arguments.pkd_alpha is None else arguments.pkd_alpha,
        beta=100.0 if arguments.pkd_beta is None else arguments.pkd_beta,
        kind=kind,
        temperature=config.temperature,
        padding=config.padding,
    )
