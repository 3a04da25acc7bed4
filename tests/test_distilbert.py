"""The DistilBERT objective against torch's own losses, and tiny masked language models trained by it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DataCollatorForTokenClassification,
    PreTrainedModel,
)

from conftest import PIECES, randomise, run_processes
from test_masked_words import FAMILIES
from test_trainer import TEXTS, InOrder, copies, moved, settings
from tinybert.capture import capture
from tinybert.distilbert import DistilBertLoss, DistilBertWeights
from tinybert.errors import InputError
from tinybert.losses import States

BATCH, LENGTH, PIECE_COUNT, STUDENT_SIZE, TEACHER_SIZE = 4, 7, 11, 6, 8
PARTS = {"soft_labels", "masked_lm", "cosine"}
MASK = (torch.arange(LENGTH) < torch.tensor([[7], [3], [1], [6]])).long()  # 17 real tokens


def make_labels() -> Tensor:
    """Five masked places, none in the third sentence."""
    labels = torch.full((BATCH, LENGTH), -100)
    for row, column, piece in ((0, 1, 3), (0, 6, 10), (1, 2, 0), (3, 0, 7), (3, 4, 7)):
        labels[row, column] = piece
    return labels


LABELS = make_labels()
PLACES = LABELS != -100


def make_states(size: int, seed: int, dtype: torch.dtype = torch.float64) -> States:
    """Random states of a model with one layer, gradients wanted."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, LENGTH, size), (BATCH, LENGTH, size), (int(PLACES.sum()), PIECE_COUNT))
    tensors = [2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    first, last, logits = (tensor.requires_grad_() for tensor in tensors)
    return States(hidden=(first, last), logits=logits)


def make_objective(student_size: int = TEACHER_SIZE, **options: Any) -> DistilBertLoss:
    torch.manual_seed(0)
    return DistilBertLoss(student_size, TEACHER_SIZE, **options).double()


def by_formula(
    student: States, teacher: States, temperature: float = 2.0, w: Any = None
) -> dict[str, Tensor]:
    """The three losses by torch's own functions; cross-entropy is divergence and the teacher's entropy."""
    assert student.logits is not None
    assert teacher.logits is not None
    target = F.softmax(teacher.logits.detach() / temperature, dim=-1)
    divergence = F.kl_div(F.log_softmax(student.logits / temperature, -1), target, reduction="batchmean")
    entropy = torch.distributions.Categorical(probs=target).entropy().mean()
    real = MASK.bool()
    last = student.hidden[-1][real] if w is None else student.hidden[-1][real] @ w
    same = torch.ones(len(last), dtype=last.dtype)
    return {
        "soft_labels": temperature**2 * (divergence + entropy),
        "masked_lm": F.cross_entropy(student.logits, LABELS[PLACES]),
        "cosine": F.cosine_embedding_loss(last, teacher.hidden[-1].detach()[real], same),
    }


def assert_equal_parts(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert found.keys() == expected.keys()
    for name, part in found.items():
        torch.testing.assert_close(
            part, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_parts_and_gradients_are_those_of_torchs_own_losses(temperature: float) -> None:
    """A comparison with DistilBERT is one only if the losses are DistilBERT's."""
    student, teacher = make_states(TEACHER_SIZE, 1), make_states(TEACHER_SIZE, 2)
    parts = make_objective(temperature=temperature)(student, teacher, MASK, LABELS)
    expected = by_formula(student, teacher, temperature)
    assert parts.keys() == PARTS
    assert all(part.ndim == 0 and part > 0.1 for part in parts.values())
    assert_equal_parts(parts, expected)
    leaves = [student.logits, student.hidden[-1]]
    found, wanted = (torch.autograd.grad(sum(p.values()), leaves) for p in (parts, expected))  # type: ignore[arg-type]
    for one, other in zip(found, wanted, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_the_default_weights_and_temperature_are_the_published_ones() -> None:
    """``--alpha_ce 5.0 --alpha_mlm 2.0 --alpha_cos 1.0`` at temperature 2 made DistilBERT."""
    student, teacher = make_states(TEACHER_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective()
    expected = by_formula(student, teacher, temperature=2.0)
    total = 5 * expected["soft_labels"] + 2 * expected["masked_lm"] + expected["cosine"]
    torch.testing.assert_close(objective.total(objective(student, teacher, MASK, LABELS)), total)
    weighted = make_objective(weights=DistilBertWeights(0.5, 0.25, 3.0))
    total = 0.5 * expected["soft_labels"] + 0.25 * expected["masked_lm"] + 3 * expected["cosine"]
    torch.testing.assert_close(weighted.total(weighted(student, teacher, MASK, LABELS)), total)


def test_where_widths_differ_a_learnt_projection_stands_between() -> None:
    """A narrow student cannot be compared with its teacher by angle; a frozen W would be a random target."""
    student, teacher = make_states(STUDENT_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective(STUDENT_SIZE)
    (weight,) = objective.parameters()
    torch.testing.assert_close(weight.T @ weight, torch.eye(STUDENT_SIZE).double(), atol=1e-6, rtol=0)
    start = torch.randn(STUDENT_SIZE, TEACHER_SIZE, dtype=torch.float64)
    objective.start_projections([start + 1, start])
    parts = objective(student, teacher, MASK, LABELS)
    assert_equal_parts(parts, by_formula(student, teacher, w=start))
    objective.total(parts).backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0

    def cosine(hidden: Tensor, matrix: Tensor) -> Tensor:
        states = replace(student, hidden=(hidden,))
        return torch.func.functional_call(
            objective, {"projection.weight": matrix}, (states, teacher, MASK, LABELS)
        )["cosine"]

    inputs = (student.hidden[-1].detach().requires_grad_(), weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(cosine, inputs)


def test_nothing_is_learnt_beside_the_student_where_no_loss_needs_it() -> None:
    """A parameter without a gradient makes processes wait for each other for ever; and none is published."""
    assert not list(make_objective(TEACHER_SIZE).parameters())
    assert not list(make_objective(STUDENT_SIZE, weights=DistilBertWeights(cosine=0)).parameters())
    assert len(list(make_objective(STUDENT_SIZE).parameters())) == 1
    make_objective(TEACHER_SIZE).start_projections([torch.eye(TEACHER_SIZE)])  # there is none to set


def test_padding_changes_no_part_and_gets_no_gradient() -> None:
    """The same sentences in a longer batch must give the same loss, whatever stands in the padding."""
    student, teacher = make_states(STUDENT_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective(STUDENT_SIZE)
    whole = objective(student, teacher, MASK, LABELS)
    objective.total(whole).backward()
    gradient = student.hidden[-1].grad
    assert gradient is not None
    assert gradient[MASK.bool()].abs().sum() > 0
    assert gradient[~MASK.bool()].abs().sum() == 0

    def widen(states: States) -> States:
        spoilt = [torch.where(MASK.bool()[..., None], state, 1e3) for state in states.hidden]
        return replace(states, hidden=tuple(F.pad(state, (0, 0, 0, 3), value=-9.0) for state in spoilt))

    wider = objective(widen(student), widen(teacher), F.pad(MASK, (0, 3)), F.pad(LABELS, (0, 3), value=-100))
    assert_equal_parts(wider, whole)


def pieces_of(states: States) -> list[States]:
    """The first sentence, with two masked places, and the other three."""
    assert states.logits is not None
    return [
        States(hidden=tuple(state[rows] for state in states.hidden), logits=states.logits[places])
        for rows, places in ((slice(0, 1), slice(0, 2)), (slice(1, 4), slice(2, 5)))
    ]


def test_pieces_of_a_batch_make_the_whole_by_its_counts_and_by_their_denominators() -> None:
    """Accumulated, distributed and evaluated batches must count each token and each masked place once."""
    student, teacher = make_states(STUDENT_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective(STUDENT_SIZE)
    whole = objective(student, teacher, MASK, LABELS)
    counts = objective.counts({"attention_mask": MASK, "labels": LABELS})
    assert [count.item() for count in counts[:2]] == [5, 17]
    summed = dict.fromkeys(PARTS, torch.zeros(()))
    averaged = dict.fromkeys(PARTS, torch.zeros(()))
    split = zip(pieces_of(student), pieces_of(teacher), (slice(0, 1), slice(1, 4)), strict=True)
    for one, other, rows in split:
        inputs = (one, other, MASK[rows], LABELS[rows])
        own = objective.counts({"attention_mask": MASK[rows], "labels": LABELS[rows]})
        for name, part in objective(*inputs, counts).items():
            summed[name] = summed[name] + part
        for name, part in objective(*inputs).items():
            share = objective.denominator(name, own) / objective.denominator(name, counts)
            averaged[name] = averaged[name] + part * share
    assert_equal_parts(summed, whole)
    assert_equal_parts(averaged, whole)


def test_a_batch_without_masked_places_teaches_nothing_about_pieces() -> None:
    """Short texts may leave none masked: a mean over none is NaN, and one NaN ends a training."""
    student, teacher = make_states(STUDENT_SIZE, 1), make_states(TEACHER_SIZE, 2)
    none = torch.full_like(LABELS, -100)
    objective = make_objective(STUDENT_SIZE)
    with_some = objective(student, teacher, MASK, LABELS)
    student, teacher = (replace(s, logits=s.logits[:0]) for s in (student, teacher))  # type: ignore[index]
    for counts in (None, objective.counts({"attention_mask": MASK, "labels": none})):
        parts = objective(student, teacher, MASK, none, counts)
        assert parts["soft_labels"] == parts["masked_lm"] == 0
        torch.testing.assert_close(parts["cosine"], with_some["cosine"])
    objective.total(parts).backward()
    assert student.hidden[-1].grad is not None
    assert student.hidden[-1].grad.isfinite().all()


def test_no_gradient_reaches_the_teacher() -> None:
    """A teacher that moves is no target."""
    student, teacher = make_states(STUDENT_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective(STUDENT_SIZE)
    objective.total(objective(student, teacher, MASK, LABELS)).backward()
    assert teacher.logits is not None
    assert teacher.logits.grad is None
    assert all(state.grad is None for state in teacher.hidden)


def test_losses_are_in_full_precision_under_autocast() -> None:
    """1 - cos of states that are nearly parallel is all rounding in bfloat16."""
    teacher = make_states(TEACHER_SIZE, 2, torch.float32)
    near = tuple(state.detach() * (1 + 1e-3 * state.detach()) for state in teacher.hidden)
    student = replace(make_states(TEACHER_SIZE, 1, torch.float32), hidden=near)
    objective = DistilBertLoss(TEACHER_SIZE, TEACHER_SIZE)
    plain = objective(student, teacher, MASK, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        under = objective(student, teacher, MASK, LABELS)
    assert {part.dtype for part in under.values()} == {torch.float32}
    assert 0 < plain["cosine"] < 1e-4
    assert_equal_parts(under, plain, atol=0.0, rtol=0.0)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        (DistilBertWeights(1, 0, 0), {"soft_labels"}),
        (DistilBertWeights(0, 1, 0), {"masked_lm"}),
        (DistilBertWeights(0, 0, 1), {"cosine"}),
    ],
)
def test_a_part_without_weight_costs_nothing(weights: DistilBertWeights, parts: set[str]) -> None:
    """A part that is not asked for needs neither states nor logits to be there."""
    student, teacher = make_states(TEACHER_SIZE, 1), make_states(TEACHER_SIZE, 2)
    objective = make_objective(weights=weights)
    assert (objective.reads_states, objective.reads_scores) == (parts == {"cosine"}, False)
    assert objective.reads_logits == (parts != {"cosine"})
    assert objective.depths == (None, None)
    if not objective.reads_states:
        student, teacher = replace(student, hidden=()), replace(teacher, hidden=())
    if not objective.reads_logits:
        student, teacher = replace(student, logits=None), replace(teacher, logits=None)
    assert objective(student, teacher, MASK, LABELS).keys() == parts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistilBertWeights(0, 0, 0), "every loss weight is 0.*at least one"),
        (lambda: DistilBertWeights(cosine=-1), "must not be negative.*cosine=-1"),
        (lambda: make_objective(temperature=0.0), "temperature must be above 0, got 0.0"),
        (
            lambda: make_objective().places({"attention_mask": MASK}),
            "no labels, so no masked places: mask it",
        ),
        (lambda: make_objective()(States(), States(), MASK, LABELS), "no logits of pieces: give masked"),
    ],
)
def test_what_would_train_nothing_or_backwards_is_refused(make: Callable[[], object], message: str) -> None:
    """A run that trains nothing looks like any other until hours later."""
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("any_masked", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_masked_language_model_gets_a_gradient(family: str, any_masked: bool) -> None:
    """One that gets none, also where nothing is masked, makes processes wait for each other for ever."""
    model, teacher = randomise(FAMILIES[family]()).train(), randomise(FAMILIES[family](), seed=1)
    labels = LABELS if any_masked else torch.full_like(LABELS, -100)
    inputs = {
        "input_ids": torch.randint(5, len(PIECES), MASK.shape),
        "attention_mask": MASK,
        "labels": labels,
    }
    objective = DistilBertLoss(32, 32)
    states = [capture(m, inputs, scores=False, places=objective.places(inputs)) for m in (model, teacher)]
    objective.total(objective(*states, MASK, labels)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight
    assert (head.bias.grad.abs().sum() > 0) == any_masked
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def make_masked_lm(layers: int, width: int, seed: int) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return randomise(BertForMaskedLM(config), seed)


def masked_rows(tokenizer: BertTokenizerFast) -> datasets.Dataset:
    """Eight ragged texts, every third piece masked from another one on: 1 to 5 places a row, in one none."""
    rows = []
    for number, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"]
        places = [] if number == 1 else range(1 + number % 2, len(ids) - 1, 3)
        labels = [piece if place in places else -100 for place, piece in enumerate(ids)]
        shown = [tokenizer.mask_token_id if place in places else piece for place, piece in enumerate(ids)]
        rows.append({"input_ids": shown, "attention_mask": [1] * len(ids), "labels": labels})
    return datasets.Dataset.from_list(rows)


def make_trainer(folder: Path, tokenizer: BertTokenizerFast, **options: Any) -> InOrder:
    """A student of 2 layers and 16 units under a teacher of 3 and 32, rows in order."""
    model, teacher = make_masked_lm(2, 16, seed=1), make_masked_lm(3, 32, seed=2)
    torch.manual_seed(3)
    objective = DistilBertLoss(16, 32, weights=options.pop("weights", None))
    rows = options.pop("rows", None) or masked_rows(tokenizer)
    return InOrder(
        model,
        teacher,
        settings(folder, **options),
        objective,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )


def test_a_student_learns_from_masked_text_and_the_teacher_stays(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """The objective has to train through the whole Trainer, head, projection and tied embeddings included."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=30)
    seen: list[set[str]] = []
    for model in (trainer.model, trainer.teacher):
        model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    student, teacher = copies(trainer.model), copies(trainer.teacher)
    projection, before = copies(trainer.objective), trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert seen
    assert all("labels" not in names for names in seen)
    assert {f"eval_{name}_loss" for name in PARTS} <= before.keys()
    for name in ("masked_lm", "cosine"):
        assert 0 < after[f"eval_{name}_loss"] < 0.8 * before[f"eval_{name}_loss"], name
    # The teacher's entropy stays in it.
    assert after["eval_soft_labels_loss"] < before["eval_soft_labels_loss"] - 0.5
    assert len(moved(trainer.model, student)) > 0.8 * len(student)
    assert moved(trainer.objective, projection) == set(projection) == {"projection.weight"}
    assert not moved(trainer.teacher, teacher)
    assert trainer.model.get_output_embeddings().weight is trainer.model.get_input_embeddings().weight
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        parts = {name: torch.tensor(entry[f"{name}_loss"]) for name in PARTS}
        assert entry["loss"] == pytest.approx(trainer.objective.total(parts).item(), rel=1e-4)


def test_accumulated_masked_batches_make_the_step_of_one_big_batch(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """A batch with one masked place must not weigh as much as one with five, nor one with none be NaN."""
    after = []
    for size in (8, 2, 1):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            optim="sgd",
            learning_rate=0.1,
            student_dropout=0.0,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        before, start = copies(trainer.model), trainer.evaluate()
        trainer.train()
        assert len(moved(trainer.model, before)) > 0.8 * len(before)
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        losses = {name: torch.tensor(logged[f"{name}_loss"]) for name in PARTS}
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(start[f"eval_{name}_loss"], rel=1e-5)
        after.append(copies(trainer.model) | copies(trainer.objective) | losses)
    for other in after[1:]:
        for name, tensor in after[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-6, rtol=1e-5)


def test_evaluation_is_over_all_masked_places_and_tokens_and_gathers_no_logits(
    tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    """Parts that hang on the batch size compare nothing; logits of a vocabulary's width fill the memory."""
    found = []
    for size in (8, 3, 1):
        trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=size)
        found.append(trainer.evaluate())
        assert trainer.predict(trainer.eval_dataset).predictions is None
    for other in found[1:]:
        for name in PARTS:
            assert other[f"eval_{name}_loss"] == pytest.approx(found[0][f"eval_{name}_loss"], rel=1e-5)
    nothing = masked_rows(tokenizer).select([1])
    metrics = make_trainer(tmp_path, tokenizer, rows=nothing).evaluate()
    assert metrics["eval_masked_lm_loss"] == metrics["eval_soft_labels_loss"] == 0
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_cosine_loss"])


def test_the_angle_alone_leaves_the_head(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """No loss reads the head then: weight decay alone would wear it down."""
    trainer = make_trainer(tmp_path, tokenizer, weights=DistilBertWeights(0, 0, 1), weight_decay=0.5)
    before = copies(trainer.model)
    trainer.train()
    changed = moved(trainer.model, before)
    assert any(name.startswith("bert.encoder") for name in changed)
    assert not any("transform" in name or "bias" in name for name in changed if name.startswith("cls"))


def test_rows_without_masked_places_are_refused(tmp_path: Path, tokenizer: BertTokenizerFast) -> None:
    """Plain text under this objective is a forgotten collator, not a student that has learnt all."""
    trainer = make_trainer(tmp_path, tokenizer, rows=masked_rows(tokenizer).remove_columns("labels"))
    trainer.data_collator = lambda rows: tokenizer.pad(rows, return_tensors="pt")
    with pytest.raises(InputError, match="the batch has no labels"):
        trainer.train()


_TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, torch
import test_distilbert as t

folder, size = Path(sys.argv[2]), int(sys.argv[3])
tokenizer = t.BertTokenizerFast(vocab={piece: place for place, piece in enumerate(conftest.PIECES)})
trainer = t.make_trainer(
    folder, tokenizer, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_steps=4,
    gradient_accumulation_steps=2, per_device_train_batch_size=size, per_device_eval_batch_size=2,
    student_dropout=0.0,  # drawn by each process for itself
    ddp_find_unused_parameters=False,  # waits for ever for a gradient that no loss gives
)
trainer.train()
metrics = trainer.evaluate()
state = {"weights": t.copies(trainer.model) | t.copies(trainer.objective),
         "eval": [metrics[f"eval_{name}_loss"] for name in sorted(t.PARTS)],
         "log": [entry["masked_lm_loss"] for entry in trainer.state.log_history if "loss" in entry]}
torch.save(state, folder / f"{size}-{trainer.args.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_make_the_student_of_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """The head runs at other places in each process, in one of them at none: no gradient may be missing."""
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    run_processes(1, script, tmp_path, 2)
    run_processes(2, script, tmp_path, 1)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("2-0", "1-0", "1-1"))
    for key, tensor in alone["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key]), key
        torch.testing.assert_close(first["weights"][key], tensor, atol=1e-5, rtol=1e-5)
    assert first["log"] == pytest.approx(alone["log"], rel=1e-4)
    assert first["eval"] == pytest.approx(alone["eval"], rel=1e-4)
