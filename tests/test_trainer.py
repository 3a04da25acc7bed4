"""Training: what moves, what must not, and that interruption, padding and batching change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    TrainerCallback,
)

from conftest import run_processes
from tinybert.capture import capture
from tinybert.errors import InputError
from tinybert.losses import Counts
from tinybert.objective import DistillationLoss, LossWeights
from tinybert.student import StudentSize, make_student
from tinybert.trainer import PROJECTIONS_NAME, DistillationConfig, DistillationTrainer, TrainingConfig

TEXTS = (
    "the film was good",
    "bad",
    "a very dull plot with a poor cast and the story was awful",
    "superb cast",
    "the plot was fine and the story great",
    "awful film",
    "a good plot with a very fine cast",
    "the story was poor",
)
LABELS = (1, 0, 0, 1, 1, 0, 1, 0)
PARTS = {"embedding", "hidden_1", "attention_1", "hidden_2", "attention_2", "prediction"}

Parts = Callable[..., DistillationTrainer]


@pytest.fixture
def teacher(tiny_encoder: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    encoder = tiny_encoder("bert", num_labels=2)
    model = BertForSequenceClassification(encoder.config)
    model.bert.load_state_dict(encoder.state_dict())
    return model.eval()


@pytest.fixture
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return make_student(teacher, StudentSize(layers=2, hidden_size=16, intermediate_size=24))


@pytest.fixture
def rows(tokenizer: BertTokenizerFast) -> datasets.Dataset:
    """Eight ragged rows of 3 to 14 tokens."""
    encoded = dict(tokenizer(list(TEXTS)))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert len(set(lengths)) > 4
    return datasets.Dataset.from_dict(encoded | {"length": lengths, "labels": list(LABELS)})


@pytest.fixture
def collate(tokenizer: BertTokenizerFast) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


def settings(folder: Path, **options: Any) -> DistillationConfig:
    plain = {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "max_steps": 3,
    }
    return DistillationConfig(str(folder), **plain | options)


class InOrder(DistillationTrainer):
    """Takes the rows as they lie, so that two ways of batching them see the same ones."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


@pytest.fixture
def make_trainer(
    tmp_path: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: datasets.Dataset,
    collate: DataCollatorWithPadding,
) -> Parts:
    """``make_trainer(**options of the config)``; ``model``, ``teacher``, ... replace the defaults."""

    def make(
        folder: str = "out",
        *,
        model: Any = student,
        teacher: Any = teacher,
        rows: Any = rows,
        objective: Any = None,
        callbacks: Any = None,
        kind: type[DistillationTrainer] = DistillationTrainer,
        **options: Any,
    ) -> DistillationTrainer:
        args = settings(tmp_path / folder, **options)
        return kind(
            model,
            teacher,
            args,
            objective,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
            callbacks=callbacks,
        )

    return make


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def set_dropout(model: nn.Module, rate: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = rate


def clone(model: PreTrainedModel) -> PreTrainedModel:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@pytest.mark.parametrize("comes_in_train_mode", [True, False])
def test_training_changes_the_student_and_nothing_of_the_teacher(
    make_trainer: Parts, student: PreTrainedModel, teacher: PreTrainedModel, comes_in_train_mode: bool
) -> None:
    """A teacher that moves, or comes back in another mode, spoils whatever its owner does next."""
    teacher.train(comes_in_train_mode)
    teacher.bert.embeddings.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    rates = [module.p for module in teacher.modules() if isinstance(module, nn.Dropout)]
    config, before, student_before = teacher.config.to_dict(), copies(teacher), copies(student)
    trainer = make_trainer()
    trainer.train()
    trainer.evaluate()
    assert moved(teacher, before) == set()
    assert all(module.training == comes_in_train_mode for module in teacher.modules())
    assert {name: parameter.requires_grad for name, parameter in teacher.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [module.p for module in teacher.modules() if isinstance(module, nn.Dropout)] == rates
    assert teacher.config.to_dict() == config
    assert len(moved(student, student_before)) > 0.8 * len(student_before)


def test_the_teachers_targets_carry_no_dropout_noise_while_the_student_trains(
    make_trainer: Parts, student: PreTrainedModel, teacher: PreTrainedModel, rows: Any, collate: Any
) -> None:
    """The reference implementation never calls eval(): its targets are noisy and its student learns noise."""
    batch = collate([rows[index] for index in range(4)])
    with torch.no_grad():
        expected = teacher(**batch, output_hidden_states=True)
    set_dropout(teacher, 0.5)
    teacher.train()
    student.train()
    with torch.no_grad():
        assert not torch.allclose(teacher(**batch).logits, expected.logits), "its dropout is alive"
    trainer = make_trainer()
    seen = trainer.observe_teacher(batch)
    torch.testing.assert_close(seen.logits, expected.logits, atol=1e-5, rtol=1e-4)
    for layer, hidden in enumerate(expected.hidden_states):
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(seen.hidden[layer][real], hidden[real], atol=1e-5, rtol=1e-4)
    assert not any(tensor.requires_grad for tensor in (*seen.hidden, *seen.queries, seen.logits))
    assert trainer.compute_loss(student, batch) != trainer.compute_loss(student, batch), "student: dropout on"


def test_the_teacher_is_in_neither_the_students_state_nor_the_optimiser(
    make_trainer: Parts, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """A teacher inside the student's checkpoint makes it ten times as big; in the optimiser it moves."""
    trainer = make_trainer()
    optimised = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert optimised.isdisjoint(id(parameter) for parameter in teacher.parameters())
    assert optimised == {id(p) for module in (student, trainer.objective) for p in module.parameters()}
    assert set(trainer.model.state_dict()) == set(type(student)(student.config).state_dict())


def test_projections_are_a_group_of_their_own_with_their_own_rate_from_the_first_step(
    make_trainer: Parts,
) -> None:
    """Two peers never optimised their projections: the student then bends to a random matrix."""
    trainer = make_trainer(projection_learning_rate=5e-2, weight_decay=0.1, max_steps=1)
    optimizer = trainer.create_optimizer()
    group = optimizer.param_groups[-1]
    assert group["params"] == list(trainer.objective.parameters())
    assert len(group["params"]) == 3
    assert (group["lr"], group["weight_decay"]) == (5e-2, 0.0)
    assert {other["lr"] for other in optimizer.param_groups[:-1]} == {1e-2}
    before = copies(trainer.objective)
    trainer.train()
    assert moved(trainer.objective, before) == set(before)


def test_projections_take_the_students_rate_unless_given_one_and_zero_is_one(make_trainer: Parts) -> None:
    """``0 or default`` would train projections that were to be held still."""
    assert make_trainer().create_optimizer().param_groups[-1]["lr"] == 1e-2
    trainer = make_trainer(projection_learning_rate=0.0)
    before = copies(trainer.objective)
    trainer.train()
    assert moved(trainer.objective, before) == set()


def test_each_step_uses_the_projections_gradient_of_that_step_alone(
    make_trainer: Parts, student: PreTrainedModel, rows: Any, collate: Any
) -> None:
    """The Trainer zeroes its model's gradients only: left alone, the projections' would add up for ever."""
    set_dropout(student, 0.0)
    rate, batch = 0.05, collate(list(rows))
    trainer = make_trainer(
        optim="sgd",
        learning_rate=0.0,
        projection_learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        max_steps=4,
    )
    expected = DistillationLoss(16, 32, trainer.objective.layer_map)
    expected.load_state_dict(trainer.objective.state_dict())
    twin = make_trainer(objective=expected)
    for _ in range(4):
        gradients = torch.autograd.grad(twin.compute_loss(student, batch), list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    before = copies(trainer.objective)
    trainer.train()
    assert moved(trainer.objective, before) == set(before)
    for name, tensor in trainer.objective.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_the_saved_model_has_no_projections_and_the_checkpoint_has(
    make_trainer: Parts, student: PreTrainedModel, tmp_path: Path
) -> None:
    """Leaked projections make a student that stock transformers warns about; lost ones spoil a resume."""
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert not (tmp_path / "model" / PROJECTIONS_NAME).exists()
    for folder in (tmp_path / "model", checkpoint):
        assert set(load_file(folder / "model.safetensors")) == set(student.state_dict())
    kept = load_file(checkpoint / PROJECTIONS_NAME)
    assert len(kept) == 3
    for name, tensor in trainer.objective.state_dict().items():
        assert torch.equal(kept[name], tensor)


class Stop(TrainerCallback):
    """Ends training after a number of steps, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_stopping_and_resuming_equals_not_stopping_bit_for_bit(
    make_trainer: Parts, teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """A resume that restarts the projections, the optimiser or the dropout makes another student."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "save_only_model": False}

    def fresh(folder: str, **more: Any) -> DistillationTrainer:
        size = StudentSize(layers=2, hidden_size=16, intermediate_size=24)
        return make_trainer(folder, model=make_student(teacher, size), **options, **more)

    whole = fresh("whole")
    start = copies(whole.objective)
    whole.train()
    fresh("halves", callbacks=[Stop(3)]).train()
    resumed = fresh("halves")
    torch.manual_seed(99)
    resumed.objective.load_state_dict({name: torch.randn_like(tensor) for name, tensor in start.items()})
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 5
    assert moved(whole.objective, start) == set(start)
    assert moved(resumed.model, copies(whole.model)) == set()
    assert moved(resumed.objective, copies(whole.objective)) == set()
    losses = [
        [
            {name: value for name, value in entry.items() if "loss" in name}
            for entry in trainer.state.log_history[:5]
        ]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_a_checkpoint_without_projections_is_refused(make_trainer: Parts, tmp_path: Path) -> None:
    """Going on with fresh projections would undo what the student has learnt, without a word."""
    make_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / PROJECTIONS_NAME).unlink()
    with pytest.raises(InputError, match=rf"has no {PROJECTIONS_NAME}: resume from another"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("logging_steps", [1, 2, 5])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_logged_loss_comes_with_its_parts_and_is_their_weighted_sum(
    make_trainer: Parts, logging_steps: int, accumulation: int
) -> None:
    """A total says nothing about which part is stuck; parts off by a factor say something wrong."""
    trainer = make_trainer(
        logging_steps=logging_steps,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        attention_weight=0.5,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(logging_steps, 7, logging_steps))
    for entry in logged:
        parts = {name: torch.tensor(entry[f"{name}_loss"]) for name in PARTS}
        assert all(value > 0 for value in parts.values())
        assert entry["loss"] == pytest.approx(trainer.objective.total(parts).item(), rel=1e-4)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 3
    for entry in evaluated:
        parts = {name: torch.tensor(entry[f"eval_{name}_loss"]) for name in PARTS}
        assert entry["eval_loss"] == pytest.approx(trainer.objective.total(parts).item(), rel=1e-4)


def test_evaluated_parts_do_not_depend_on_the_batches(make_trainer: Parts) -> None:
    """Averaged over ragged batches, runs with other batch sizes could not be compared."""
    trainer = make_trainer(gold_weight=0.5)
    found = []
    for size in (8, 3, 1):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        found.append({name: metrics[f"eval_{name}_loss"] for name in (*PARTS, "gold")})
    assert min(found[0].values()) > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_a_resumed_run_logs_means_over_its_own_steps(make_trainer: Parts, tmp_path: Path) -> None:
    """Divided by steps counted from 0, the parts logged first after a resume would look far too small."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 5}
    make_trainer(callbacks=[Stop(3)], **options).train()
    trainer = make_trainer(**options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert (trainer.state.global_step, entry["step"]) == (6, 5)
    parts = {name: torch.tensor(entry[f"{name}_loss"]) for name in PARTS}
    assert entry["loss"] == pytest.approx(trainer.objective.total(parts).item(), rel=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_the_intermediate_stage_leaves_pooler_and_head(
    make_trainer: Parts, student: PreTrainedModel, whole: bool
) -> None:
    """No intermediate loss reads them: weight decay alone would wear them down."""
    before = copies(student)
    flags = [parameter.requires_grad for parameter in student.parameters()]
    model = student if whole else student.base_model
    make_trainer(model=model, prediction_weight=0.0, weight_decay=0.5).train()
    changed = moved(student, before)
    assert changed
    assert not any("pooler" in name or "classifier" in name for name in changed)
    assert [parameter.requires_grad for parameter in student.parameters()] == flags


@pytest.mark.parametrize(("batch_size", "padding"), [(1, "real"), (2, "real"), (4, "real"), (2, "reference")])
def test_accumulated_batches_make_the_step_of_one_big_batch(
    make_trainer: Parts, student: PreTrainedModel, rows: datasets.Dataset, batch_size: int, padding: str
) -> None:
    """Averaged over ragged pieces, a short piece's tokens would count for more than a long one's."""
    set_dropout(student, 0.0)
    if padding == "reference":  # which pads all batches alike
        rows = rows.select([0] * 8)
    before, after = copies(student), []
    for size in (8, batch_size):
        model = clone(student)
        set_dropout(model, 0.0)
        trainer = make_trainer(
            model=model,
            kind=InOrder,
            optim="sgd",
            learning_rate=0.1,
            max_steps=1,
            rows=rows,
            padding=padding,
            gold_weight=0.3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        # The projections' start is random.
        trainer.objective.load_state_dict(
            {
                n: torch.linspace(-0.3, 0.3, t.numel()).view_as(t)
                for n, t in trainer.objective.state_dict().items()
            }
        )
        trainer.train()
        assert moved(model, before)
        after.append(copies(model) | copies(trainer.objective))
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, atol=1e-6, rtol=1e-5)


def test_a_teacher_reads_segments_that_its_student_has_not(
    make_trainer: Parts, tiny_encoder: Callable[..., PreTrainedModel]
) -> None:
    """Without its token types a pair would be one text to the teacher, in this stage alone."""
    trainer = make_trainer(model=tiny_encoder("distilbert"), prediction_weight=0.0)
    assert "token_type_ids" in next(iter(trainer.get_train_dataloader()))


def test_the_loss_of_a_padded_batch_is_that_of_its_rows(
    make_trainer: Parts, student: PreTrainedModel, rows: Any, collate: Any
) -> None:
    """If padding counted, a row's loss would depend on its neighbours' length."""
    trainer = make_trainer(gold_weight=0.5)
    batch = collate(list(rows))
    counts = Counts.of(batch["attention_mask"])
    whole = trainer.compute_loss(student, batch)
    alone = [trainer.compute_loss(student, collate([row]), num_items_in_batch=counts) for row in rows]
    assert all(loss > 0 for loss in alone)
    torch.testing.assert_close(torch.stack(alone).sum(), whole, atol=1e-5, rtol=1e-5)
    wider = {
        name: nn.functional.pad(tensor, (0, 5)) if tensor.ndim == 2 else tensor
        for name, tensor in batch.items()
    }
    torch.testing.assert_close(trainer.compute_loss(student, wider), whole, atol=1e-5, rtol=1e-5)


def test_a_set_smaller_than_one_batch_trains(
    make_trainer: Parts, student: PreTrainedModel, rows: datasets.Dataset
) -> None:
    """The reference implementation drops partial batches: a small set trains nothing, silently."""
    before = copies(student)
    trainer = make_trainer(
        rows=rows.select(range(3)), per_device_train_batch_size=64, max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(moved(student, before)) > 0.8 * len(before)


def prediction_only(student: PreTrainedModel, teacher: PreTrainedModel) -> DistillationLoss:
    weights = LossWeights(embedding=0, hidden=0, attention=0)
    return DistillationLoss(student.config.hidden_size, teacher.config.hidden_size, (1, 3), weights=weights)


def test_cached_teacher_logits_give_the_teachers_own_loss(
    make_trainer: Parts, student: PreTrainedModel, teacher: PreTrainedModel, rows: Any, collate: Any
) -> None:
    """The cache saves the teacher's forward passes; if it were not the same it would teach something else."""
    with torch.no_grad():
        logits = [teacher(**collate([row])).logits[0].tolist() for row in rows]
    cached = rows.add_column("teacher_logits", logits)
    objective = prediction_only(student, teacher)
    with_teacher = make_trainer(objective=objective, per_device_eval_batch_size=8).evaluate()
    without = make_trainer(objective=objective, teacher=None, rows=cached, per_device_eval_batch_size=8)
    metrics = without.evaluate()
    assert metrics["eval_loss"] > 0
    assert metrics["eval_loss"] == pytest.approx(with_teacher["eval_loss"], rel=1e-5)
    before = copies(student)
    without.train()
    assert moved(student, before)


def test_cached_logits_do_not_stand_in_for_states(
    make_trainer: Parts, teacher: PreTrainedModel, student: PreTrainedModel, rows: Any
) -> None:
    """With an intermediate loss the teacher has to be looked at, whatever columns there are."""
    cached = rows.add_column("teacher_logits", [[0.0, 0.0]] * len(rows))
    trainer = make_trainer(rows=cached)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(make_trainer().evaluate()["eval_loss"], rel=0.2)
    with pytest.raises(InputError, match="no teacher was given, and the losses read its states: give one"):
        make_trainer(teacher=None, objective=trainer.objective)


def test_a_missing_teacher_is_said_so(make_trainer: Parts, student: Any, teacher: Any) -> None:
    """Each way of having no targets ends in one clear line and not in a crash inside torch."""
    with pytest.raises(InputError, match="no teacher was given: give one, or an objective"):
        make_trainer(teacher=None)
    trainer = make_trainer(teacher=None, objective=prediction_only(student, teacher))
    with pytest.raises(InputError, match="no column teacher_logits and no teacher"):
        trainer.train()


def test_a_model_whose_scores_cannot_be_captured_is_refused_before_training(
    make_trainer: Parts, student: PreTrainedModel
) -> None:
    """Found out at the first step, it would be after the data was read and the folder claimed."""
    teacher = DebertaV2Model(
        DebertaV2Config(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
        )
    )
    with pytest.raises(InputError, match="DebertaV2Model cannot be captured"):
        make_trainer(teacher=teacher, prediction_weight=0.0)
    before = copies(student)
    make_trainer(teacher=teacher, prediction_weight=0.0, attention_weight=0.0).train()
    assert moved(student, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0, got 0.0"),
        ({"layer_map": ["sideways"]}, "unknown layer mapping 'sideways'"),
        ({"layer_map": ["1", "9"]}, r"\(1, 9\) leaves the range 1 to 3"),
        ({"layer_map": ["3", "1"]}, r"\(3, 1\) decreases"),
        ({"layer_weights": [1.0]}, "got 1 layer weights for 2 student layers"),
        ({"hidden_weight": -1.0}, "must not be negative"),
        ({"relation_heads": 0}, "--relation_heads must be 1 or more, got 0"),
        ({"relation_heads": 5}, "relation_heads is 5, .* width 16 and the teacher's 32: give 4, the nearest"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    make_trainer: Parts, options: dict[str, Any], message: str
) -> None:
    """Each is a mistyped option: it must not end in a traceback, nor in training something else."""
    with pytest.raises(InputError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize("relation_heads", [None, 1, 16])
def test_a_student_learns_the_attention_of_a_teacher_with_more_heads(
    make_trainer: Parts, tiny_encoder: Callable[..., PreTrainedModel], relation_heads: int | None
) -> None:
    """Models that exist rarely have the same number of heads: 4, and 12 of its teacher."""
    teacher = tiny_encoder("bert", hidden_size=48, num_attention_heads=12)
    student = make_student(teacher, StudentSize(layers=2, hidden_size=16, intermediate_size=24, heads=4))
    before, teacher_before = copies(student), copies(teacher)
    trainer = make_trainer(
        model=student,
        teacher=teacher,
        relation_heads=relation_heads,
        prediction_weight=0.0,
        embedding_weight=0.0,
        hidden_weight=0.0,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        max_steps=15,
    )
    assert trainer.objective.relation_heads == relation_heads
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for name in ("attention_1", "attention_2"):
        assert 0 < last[f"eval_{name}_loss"] < 0.9 * first[f"eval_{name}_loss"]
    assert moved(student, before)
    assert not moved(teacher, teacher_before)


def test_an_explicit_layer_map_is_read_from_option_words(tmp_path: Path) -> None:
    """Options come as words: ``--layer_map 1 3`` must mean the numbers."""
    assert settings(tmp_path, layer_map=["1", "3"]).mapping_strategy() == [1, 3]
    assert settings(tmp_path, layer_map=["top"]).mapping_strategy() == "top"


@pytest.mark.parametrize("config", [TrainingConfig, DistillationConfig])
@pytest.mark.parametrize(
    ("capabilities", "given", "expected"),
    [
        ({"avx512_bf16": True}, None, True),
        ({"amx_bf16": True}, None, True),
        ({"avx2": True}, None, False),
        ({"avx512_bf16": True}, False, False),
        ({"avx2": True}, True, True),
    ],
)
def test_bfloat16_is_the_default_where_the_cpu_has_it_and_a_choice_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: type[TrainingConfig],
    capabilities: dict[str, bool],
    given: bool | None,
    expected: bool,
) -> None:
    """Emulated bfloat16 is slower than float32; and who asks for float32 must get it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    args = config(str(tmp_path), bf16=given, report_to="none")
    assert args.bf16 is expected
    assert args.device.type == "cpu"


def test_training_under_bfloat16_autocast_moves_the_student_and_keeps_float32_losses(
    make_trainer: Parts, student: PreTrainedModel
) -> None:
    """The default on recent CPUs: parts in bfloat16 would lose the small differences they are about."""
    before = copies(student)
    trainer = make_trainer(bf16=True)
    trainer.train()
    assert moved(student, before)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    plain = make_trainer(model=clone(student), objective=trainer.objective).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_teacher_runs_in_the_precision_of_the_student(
    make_trainer: Parts, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's autocast covers the trained model alone; a float32 teacher is most of a step's time."""
    seen = set()

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return capture(*args, **kwargs)

    monkeypatch.setattr("tinybert.trainer.capture", watch)
    trainer = make_trainer(bf16=bf16, max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert seen == {bf16}


@pytest.mark.parametrize(("rate", "wanted"), [(None, 0.1), (0.0, 0.0), (0.25, 0.25)])
def test_dropout_is_of_states_while_training_and_the_models_own_after(
    make_trainer: Parts, student: PreTrainedModel, rate: float | None, wanted: float
) -> None:
    """Dropped attention probabilities would need T x T matrices, which the losses do without."""

    def rates() -> set[tuple[bool, float]]:
        named = student.named_modules()
        return {("attention.self" in name, part.p) for name, part in named if isinstance(part, nn.Dropout)}

    seen: list[set[tuple[bool, float]]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(rates())

    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    make_trainer(callbacks=[Watch()], student_dropout=rate, max_steps=1).train()
    assert seen == [{(False, wanted), (True, 0.0)}]
    assert rates() == {(False, 0.1), (True, 0.1)}


_TWO_PROCESSES = """
import sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest
import test_trainer as t
from transformers import BertForSequenceClassification, BertTokenizerFast, DataCollatorWithPadding
import datasets

folder, size, stage = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tokenizer = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(conftest.PIECES)})
config_class, model_class, shape = conftest._FAMILIES["bert"]
config = config_class(**conftest._SHARED | shape | {"intermediate_size": 40, "num_labels": 2})
config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
teacher = conftest.randomise(BertForSequenceClassification(config))
student = t.make_student(teacher, t.StudentSize(layers=2, hidden_size=16, intermediate_size=24))
encoded = dict(tokenizer(list(t.TEXTS)))
rows = datasets.Dataset.from_dict(encoded | {"labels": list(t.LABELS)})
weights = {"all": {}, "intermediate": {"prediction_weight": 0.0}}[stage]
args = t.settings(
    folder, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_steps=4,
    gradient_accumulation_steps=2, per_device_train_batch_size=size,
    ddp_find_unused_parameters=False,  # waits for ever for a gradient that no loss gives
    **weights,
)
model = student if stage == "all" else student.base_model
trainer = t.InOrder(
    model, teacher, args, train_dataset=rows, eval_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
before = t.copies(trainer.objective)
trainer.train()
assert t.moved(trainer.objective, before)
metrics = trainer.evaluate()
state = {"student": t.copies(student), "projections": t.copies(trainer.objective),
         "log": [entry["hidden_1_loss"] for entry in trainer.state.log_history if "loss" in entry]}
torch.save(state, folder / f"{stage}-{size}-{args.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["all", "intermediate"])
def test_two_processes_make_the_student_of_one_with_the_same_global_batch(tmp_path: Path, stage: str) -> None:
    """Unsynchronised projections, or losses divided by one process's counts, would teach otherwise."""
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    run_processes(1, script, tmp_path, 2, stage)
    run_processes(2, script, tmp_path, 1, stage)
    alone = torch.load(tmp_path / f"{stage}-2-0.pt")
    first, second = (torch.load(tmp_path / f"{stage}-1-{process}.pt") for process in (0, 1))
    for name in ("student", "projections"):
        assert alone[name]
        for key, tensor in alone[name].items():
            assert torch.equal(first[name][key], second[name][key]), key
            torch.testing.assert_close(first[name][key], tensor, atol=1e-5, rtol=1e-5)
    assert first["log"] == pytest.approx(alone["log"], rel=1e-4)
