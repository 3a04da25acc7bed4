"""The four ways of ``train_step.py`` to take a training step of the intermediate stage.

a: the reference implementation's arithmetic: padded to 128 tokens (or T), fp32, T x T scores with the mask
   in them, -100 and below set to 0, means over everything, one projection, states of all layers kept.
   Kinder than the original, which leaves its teacher's dropout on and steps its optimiser in Python.
b: plain Hugging Face, fp32: padded to the longest text, eager attention, squared error of
   ``output_attentions`` (probabilities, so another loss), means over everything.
c: tinybert in fp32: batches of like length, no T x T scores, no dropout of attention, fused AdamW.
d: the same under bfloat16 autocast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, BertConfig, BertModel, PreTrainedModel

from tinybert.capture import capture, evaluating
from tinybert.mapping import layer_map
from tinybert.objective import DistillationLoss, LossWeights
from tinybert.student import make_student

Batch = dict[str, Tensor]
Step = Callable[[Batch], None]

VARIANTS = {"a": "reference", "b": "plain HF", "c": "ours fp32", "d": "ours bf16"}


def make_teacher(device: torch.device) -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig()).to(device).requires_grad_(False)


_scores: list[Tensor] = []


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT * options["scaling"] + attention_mask
    _scores.append(scores)
    probabilities = F.dropout(scores.softmax(dim=-1), options["dropout"], module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


AttentionInterface.register("reference", _reference_attention)


def _reference_states(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    _scores.clear()
    mask = (1.0 - batch["attention_mask"][:, None, None, :].float()) * -10000.0
    outputs = model(batch["input_ids"], attention_mask=mask, output_hidden_states=True)
    return outputs.hidden_states, tuple(_scores)


def _eager_states(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    return outputs.hidden_states, outputs.attentions


def _cut_error(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    nothing = torch.zeros_like(student_scores)
    student_scores = torch.where(student_scores <= -1e2, nothing, student_scores)
    return F.mse_loss(student_scores, torch.where(teacher_scores <= -1e2, nothing, teacher_scores))


def common_loss(
    variant: str, student: PreTrainedModel, teacher: PreTrainedModel, projection: nn.Module, batch: Batch
) -> Tensor:
    """Return the loss of a or b: mean squared differences over everything, from states kept of all layers."""
    teacher.set_attn_implementation("reference" if variant == "a" else "eager")
    states_of = _reference_states if variant == "a" else _eager_states
    attention_error = _cut_error if variant == "a" else F.mse_loss
    with evaluating(teacher):
        target_hidden, target_attention = states_of(teacher, batch)
    hidden, attention = states_of(student, batch)
    loss = F.mse_loss(projection(hidden[0]), target_hidden[0])
    for m, g in enumerate(layer_map("uniform", len(attention), len(target_attention)), start=1):
        loss = loss + F.mse_loss(projection(hidden[m]), target_hidden[g])
        loss = loss + attention_error(attention[m - 1], target_attention[g - 1])
    return loss


def our_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, objective: DistillationLoss, batch: Batch
) -> Tensor:
    teacher.set_attn_implementation("sdpa")
    student_layers, teacher_layers = objective.depths
    with evaluating(teacher):
        target = capture(teacher, batch, layers=teacher_layers)
    made = capture(student, batch, layers=student_layers)
    return objective.total(objective(made, target, batch["attention_mask"]))


def make_step(variant: str, teacher: BertModel) -> Step:
    """Return one way's training step; every way starts from the same student."""
    device = teacher.device
    student = make_student(teacher).to(device).train()
    width, teacher_width = student.config.hidden_size, teacher.config.hidden_size
    if variant in "ab":
        student.set_attn_implementation("reference" if variant == "a" else "eager")
        head: nn.Module = nn.Linear(width, teacher_width)
        loss_of = partial(common_loss, variant, student, teacher)
    else:
        student.set_attn_implementation("sdpa")
        for name, module in student.named_modules():
            if isinstance(module, nn.Dropout) and name.endswith("attention.self.dropout"):
                module.p = 0.0  # as ``DistillationTrainer`` has it
        mapped = layer_map("uniform", student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        head = DistillationLoss(width, teacher_width, mapped, weights=LossWeights(prediction=0))
        loss_of = partial(our_loss, student, teacher)
    head.to(device)
    learned = [parameter for module in (student, head) for parameter in module.parameters()]
    implementation = {"foreach": True} if variant in "ab" else {"fused": True}
    optimizer = torch.optim.AdamW(learned, lr=5e-5, weight_decay=0.0, **implementation)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant == "d"):
            loss = loss_of(head, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
