"""Distillation on the Hugging Face Trainer: everything of it applies, only the loss is ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from tinybert.anatomy import dropping, states_pass_by
from tinybert.capture import capture, check_capturable, evaluating
from tinybert.collation import MODEL_INPUTS
from tinybert.distilbert import DistilBertLoss
from tinybert.errors import InputError, check_least
from tinybert.losses import Counts, States
from tinybert.mapping import layer_map
from tinybert.objective import Compared, DistillationLoss, Kind, LossWeights
from tinybert.training import EncoderTrainer, TrainingConfig

PROJECTIONS_NAME = "projections.safetensors"

Objective = DistillationLoss | DistilBertLoss


@dataclass
class DistillationConfig(TrainingConfig):
    """``TrainingConfig`` plus the objective of equation 6."""

    layer_map: list[str] = field(
        default_factory=lambda: ["uniform"],
        metadata={"help": "uniform, top, bottom, or one teacher layer (from 1) for each student layer."},
    )
    embedding_weight: float = field(default=1.0, metadata={"help": "Weight of the embedding loss, eq. 9."})
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state loss, eq. 8."})
    attention_weight: float = field(default=1.0, metadata={"help": "Weight of the attention loss, eq. 7."})
    relation_heads: int | None = field(
        default=None,
        metadata={
            "help": "Join both models' heads and split them into so many for the attention loss (MiniLMv2). "
            "Unless given: the heads, or where their numbers differ the greatest common divisor."
        },
    )
    attention_compares: Compared = field(
        default="scores",
        metadata={"help": "What eq. 7 compares: the unnormalised scores, or their softmax, to compare with."},
    )
    prediction_weight: float = field(default=1.0, metadata={"help": "Weight of the soft labels, eq. 10."})
    gold_weight: float = field(default=0.0, metadata={"help": "Weight of the gold labels (0 in the paper)."})
    layer_weights: list[float] | None = field(
        default=None, metadata={"help": "lambda of each layer, eq. 6: embeddings, 1..M, prediction. All 1."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature t of the soft labels."})
    projection_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projections; that of the student unless given."}
    )
    student_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Dropout of the student's states; its own config's unless given. Its attention has "
            "none while it imitates."
        },
    )
    padding: Literal["real", "reference"] = field(
        default="real",
        metadata={"help": "'reference' averages over padding as the reference implementation does."},
    )

    def __post_init__(self) -> None:
        """Check the fields of our own.

        Raises:
            InputError: A temperature that is not positive, a dropout rate that is none, no relation head.
        """
        if self.temperature <= 0:
            raise InputError(f"--temperature must be above 0, got {self.temperature}")
        if self.student_dropout is not None and not 0 <= self.student_dropout < 1:
            raise InputError(f"--student_dropout must be 0 or more and below 1, got {self.student_dropout}")
        check_least(self, {"relation_heads": 1})
        super().__post_init__()

    def mapping_strategy(self) -> str | list[int]:
        """Return ``layer_map`` as ``tinybert.mapping.layer_map`` takes it: a name or numbers."""
        if all(entry.isdigit() for entry in self.layer_map):
            return [int(entry) for entry in self.layer_map]
        return " ".join(self.layer_map)

    def layers_of_teacher(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, ...]:
        """Return g(1), ..., g(M) for two models.

        Raises:
            InputError: The mapping does not fit their depths.
        """
        depth, teacher_depth = student.config.num_hidden_layers, teacher.config.num_hidden_layers
        return layer_map(self.mapping_strategy(), depth, teacher_depth)

    def objective(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        kind: Kind = "classification",
    ) -> DistillationLoss:
        """Build the loss for two models from these settings.

        Raises:
            InputError: A layer mapping, layer weights or relation heads that do not fit the models, or a
                model that does not show its scores.
        """
        objective = DistillationLoss(
            student.config.hidden_size,
            teacher.config.hidden_size,
            self.layers_of_teacher(student, teacher),
            weights=LossWeights(
                self.embedding_weight,
                self.hidden_weight,
                self.attention_weight,
                self.prediction_weight,
                self.gold_weight,
                tuple(self.layer_weights or ()),
            ),
            kind=kind,
            temperature=self.temperature,
            padding=self.padding,
            relation_heads=self.relation_heads,
            attention_compares=self.attention_compares,
        )
        _check_shown(objective, student, teacher)
        return objective


class DistillationTrainer(EncoderTrainer):
    """A Trainer whose loss is the student's distance from a teacher.

    The teacher is frozen: in eval mode and under no_grad at every forward, outside the student's state
    dict, the optimiser and DDP. The projections of the objective are trained beside the student in a
    parameter group of their own, kept with checkpoints for resuming, and never part of the saved model.

    Args:
        model: The student; its encoder (``student.base_model``) is enough where no loss reads logits.
        teacher: The teacher, with its head where a loss reads logits. May be None where the data set has
            a column ``teacher_logits`` and no loss reads states.
        args: A ``DistillationConfig``.
        objective: The loss; ``args.objective(model, teacher)`` unless given. A ``DistilBertLoss`` wants
            masked language models and batches with ``labels``.
        **kwargs: Those of ``transformers.Trainer``.
    """

    # Losses are divided by the counts of the whole accumulated batch (``_get_num_items_in_batch``).
    loss_is_scaled_for_ga = True
    args: DistillationConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: Any,
        teacher: PreTrainedModel | None,
        args: DistillationConfig,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that the teacher shows what the losses read."""
        if objective is None:
            if teacher is None:
                raise InputError(
                    "no teacher was given: give one, or an objective that reads cached logits only"
                )
            objective = args.objective(model, teacher)  # checks what the models show
        else:
            _check_shown(objective, model, teacher)
        if objective.reads_states and teacher is None:
            raise InputError("no teacher was given, and the losses read its states: give one")
        super().__init__(model=model, args=args, **kwargs)
        self.teacher: Any = teacher if objective.reads_logits or teacher is None else teacher.base_model
        if self.teacher is not None:
            self.teacher.to(self.args.device)
            if args.torch_compile:
                self.teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.objective: Objective = objective.to(self.args.device)
        self._synced_objective: nn.Module = self.objective
        # Parts noted since the last log, with their step and counts; training and evaluation apart.
        self._parts: dict[bool, list[tuple[int, dict[str, Tensor], Counts]]] = {True: [], False: []}
        self.add_callback(_ObjectiveCallback(self.objective))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of one batch; with ``return_outputs`` also a dict with the student's logits."""
        counts = num_items_in_batch or self.objective.counts(inputs)
        teacher = self.observe_teacher(inputs)
        student = self._observe(model, inputs, layers=self.objective.depths[0])
        parts = self._synced_objective(student, teacher, inputs["attention_mask"], _gold(inputs), counts)
        noted = {name: part.detach() for name, part in parts.items()}
        if model.training and self.args.logging_strategy == "no":
            self._parts[True].clear()  # nobody will read them
        self._parts[model.training].append((self.state.global_step, noted, counts))
        loss = self.objective.total(parts)
        return (loss, {"logits": student.logits}) if return_outputs else loss

    def observe_teacher(self, inputs: Mapping[str, Any]) -> States:
        """Return the teacher's states; its logits alone where they came with the batch; or nothing."""
        if not self.objective.reads_teacher:
            return States()
        if "teacher_logits" in inputs and not self.objective.reads_states:
            return States(logits=inputs["teacher_logits"])
        if self.teacher is None:
            raise InputError(
                "the data set has no column teacher_logits and no teacher was given: give one of them"
            )
        with evaluating(self.teacher):
            return self._observe(self.teacher, inputs, layers=self.objective.depths[1])

    def _observe(self, model: nn.Module, inputs: Mapping[str, Any], *, layers: int | None) -> States:
        read = self.objective
        if self.args.torch_compile:
            layers = None  # cutting a compiled model short would compile it anew at every step
        return capture(
            model,
            inputs,
            states=read.reads_states,
            scores=read.reads_scores,
            layers=layers,
            places=read.places(inputs),
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, at ``student_dropout`` and with what no loss reaches held still.

        Dropped attention probabilities would need the T x T matrices, so while the student imitates there
        are none.
        """
        dropout = self.args.student_dropout
        of_attention = 0.0 if self.objective.reads_teacher else dropout
        unread = [] if self.objective.reads_logits else states_pass_by(self.model)
        trainable = [parameter for parameter in unread if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with dropping(self.model, dropout, of_attention):
                return super().train(*args, **kwargs)
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def parts_of_step(self) -> Mapping[str, Tensor]:
        """Return the parts of the last batch's loss by name."""
        noted = self._parts[True]
        return noted[-1][1] if noted else {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give the projections their own parameter group, without weight decay."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        projections = list(self.objective.parameters())
        if is_new and projections:
            rate = self.args.projection_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": projections, "lr": rate, "weight_decay": 0.0})
            if self.accelerator.num_processes > 1:
                self._synced_objective = self.accelerator.prepare_model(self.objective)
        return optimizer

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count what the losses of one accumulated, distributed batch are divided by.

        Gradients are averaged over processes, so each counts the global batch divided by their number.
        """
        if not batch_samples:
            return None
        counts = [torch.stack(self.objective.counts(batch)) for batch in batch_samples]
        total = torch.stack(counts).sum(dim=0).to(device)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "mean")
        return Counts(*total)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Evaluate the distillation loss; return the student's logits where the metrics need them.

        Those at masked places stay here: gathered over an evaluation set they fill any memory.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        logits = outputs["logits"]
        if prediction_loss_only or logits is None or self.objective.places(inputs) is not None:
            return loss.detach(), None, None
        return loss.detach(), logits.detach().float(), _gold(inputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add the loss parts, as means over all that was evaluated, to the metrics.

        ``eval_loss`` is the Trainer's: the mean over batches, each weighed by its rows.
        """
        self._parts[False].clear()
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, value in self._mean_parts(False).items():
            output.metrics[f"{prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss parts by name beside the loss."""
        if "loss" in logs:
            logs |= self._mean_parts(True)
        super().log(logs, start_time)

    def _mean_parts(self, training: bool) -> dict[str, float]:
        noted = self._parts[training]
        if not noted:
            return {}
        names = list(noted[0][1])
        values = torch.stack([torch.stack([parts[name] for name in names]) for _, parts, _ in noted])
        if training:
            # A step may be several batches, each already divided by the counts of the whole step.
            means = values.sum(dim=0) / len({step for step, _, _ in noted})
            means = self.accelerator.reduce(means, "mean")
        else:
            denominator = self.objective.denominator
            sizes = [torch.stack([denominator(name, counts) for name in names]) for *_, counts in noted]
            weighed = torch.stack([values, torch.ones_like(values)]) * torch.stack(sizes)
            total, size = self.accelerator.reduce(weighed.sum(dim=1), "sum")
            means = total / torch.where(size > 0, size, 1.0)
        noted.clear()
        return {f"{name}_loss": mean for name, mean in zip(names, means.tolist(), strict=True)}

    def _set_signature_columns_if_needed(self) -> None:
        """Let through the filter of unused columns what the teacher reads, and its cached logits."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        read = {*columns, *MODEL_INPUTS, "teacher_logits", "labels"}
        self._signature_columns = list(read)  # type: ignore[assignment]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Keep the projections with the training state: checkpoints have them, the saved model does not."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_file(self.objective.state_dict(), Path(output_dir, PROJECTIONS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, PROJECTIONS_NAME)
        if not path.is_file():
            raise InputError(f"the checkpoint {checkpoint} has no {PROJECTIONS_NAME}: resume from another")
        self.objective.load_state_dict(load_file(path, device=str(self.args.device)))


def _gold(inputs: Mapping[str, Any]) -> Any:
    """Return the labels of a batch; of answers their first and last tokens (B, 2); None where it has none."""
    if "start_positions" in inputs:
        return torch.stack([inputs["start_positions"], inputs["end_positions"]], dim=1)
    return inputs.get("labels")


class _ObjectiveCallback(TrainerCallback):
    """Zeroes the projections' gradients after each step; the Trainer does so for its model alone."""

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.objective.zero_grad()


def _check_shown(objective: Objective, *models: PreTrainedModel | None) -> None:
    softmaxed = isinstance(objective, DistillationLoss) and objective.attention_compares == "probabilities"
    for model in models:
        if objective.reads_scores and model is not None:
            check_capturable(model)
            if softmaxed and model.config.model_type == "mpnet":
                raise InputError(
                    "MPNet adds a position bias to its scores, so products of queries and keys alone do not "
                    "give its attention probabilities: leave --attention_compares at scores"
                )
