"""The weighted objective: its parts, weights, projections and what they are divided by."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tinybert.errors import InputError
from tinybert.losses import Counts, States, attention_loss
from tinybert.objective import DistillationLoss, LossWeights

STUDENT_SIZE, TEACHER_SIZE, HEADS, LENGTH, BATCH, CLASSES = 6, 8, 2, 7, 4, 3
LAYER_MAP = (2, 4)
LABELS = torch.tensor([0, 2, 1, 1])
ALL_PARTS = {"embedding", "hidden_1", "hidden_2", "attention_1", "attention_2", "prediction", "gold"}
EVERYTHING = LossWeights(gold=1.0)


def make_states(layers: int, hidden_size: int, seed: int, heads: int = HEADS) -> States:
    """Random states of a model with ``layers`` layers, gradients wanted."""
    torch.manual_seed(seed)

    def leaves(count: int, *shape: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(BATCH, *shape, requires_grad=True) for _ in range(count))

    head_size = hidden_size // heads
    return States(
        hidden=leaves(layers + 1, LENGTH, hidden_size),
        queries=leaves(layers, heads, LENGTH, head_size),
        keys=leaves(layers, heads, LENGTH, head_size),
        scaling=(head_size**-0.5,) * layers,
        logits=leaves(1, CLASSES)[0],
    )


def make_batch(student_heads: int = HEADS) -> tuple[States, States, Tensor]:
    """Student, teacher and a mask with 17 real tokens in four sentences."""
    attention_mask = (torch.arange(LENGTH) < torch.tensor([[7], [3], [1], [6]])).long()
    student = make_states(2, STUDENT_SIZE, seed=1, heads=student_heads)
    return student, make_states(4, TEACHER_SIZE, seed=2), attention_mask


def make_objective(weights: LossWeights | None = None, **options: object) -> DistillationLoss:
    torch.manual_seed(0)
    return DistillationLoss(STUDENT_SIZE, TEACHER_SIZE, LAYER_MAP, weights=weights, **options)  # type: ignore[arg-type]


def on_each(states: States, change: Callable[[Tensor, int], Tensor]) -> States:
    """Change every tensor of the states; ``change`` is told the dimension of the tokens, or -1 for logits."""
    assert states.logits is not None
    return replace(
        states,
        hidden=tuple(change(tensor, 1) for tensor in states.hidden),
        queries=tuple(change(tensor, 2) for tensor in states.queries),
        keys=tuple(change(tensor, 2) for tensor in states.keys),
        logits=change(states.logits, -1),
    )


def rows(states: States, chosen: slice, length: int = LENGTH) -> States:
    """Cut sentences out of a batch, and their tokens after ``length``."""
    return on_each(states, lambda t, dim: t[chosen] if dim < 0 else t[chosen].narrow(dim, 0, length))


def assert_equal_parts(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, part in found.items():
        torch.testing.assert_close(part, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_every_part_is_there_by_name_and_positive() -> None:
    """A part that is missing or zero would silently not be trained."""
    student, teacher, attention_mask = make_batch()
    parts = make_objective(EVERYTHING)(student, teacher, attention_mask, LABELS)
    assert parts.keys() == ALL_PARTS
    assert all(part.ndim == 0 and part > 0 for part in parts.values())


def test_default_weights_are_the_papers() -> None:
    """The paper trains on every layer with lambda 1 and never on the gold label."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective()
    parts = objective(student, teacher, attention_mask)
    assert parts.keys() == ALL_PARTS - {"gold"}
    torch.testing.assert_close(objective.total(parts), sum(parts.values()))


def test_each_student_layer_reads_the_teacher_layer_it_is_mapped_to() -> None:
    """One layer off trains every layer towards the wrong target, and nothing crashes."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective()
    before = objective(student, teacher, attention_mask)

    def changed(name: str, layer: int) -> set[str]:
        tensors = list(getattr(teacher, name))
        tensors[layer] = tensors[layer] + 1
        after = objective(student, replace(teacher, **{name: tuple(tensors)}), attention_mask)
        return {part for part, value in after.items() if not torch.equal(value, before[part])}

    expected_hidden = [{"embedding"}, set(), {"hidden_1"}, set(), {"hidden_2"}]
    expected_attention = [set(), {"attention_1"}, set(), {"attention_2"}]
    assert [changed("hidden", layer) for layer in range(5)] == expected_hidden
    assert [changed("queries", layer) for layer in range(4)] == expected_attention
    assert [changed("keys", layer) for layer in range(4)] == expected_attention


@pytest.mark.parametrize("student_heads", [HEADS, 3])
def test_padding_changes_no_part(student_heads: int) -> None:
    """The same sentences in a longer batch must give the same loss, whatever stands in the padding."""
    student, teacher, attention_mask = make_batch(student_heads)
    objective = make_objective(EVERYTHING)
    whole = objective(student, teacher, attention_mask, LABELS)

    def spoil(tensor: Tensor, dim: int) -> Tensor:
        shape = [BATCH if d == 0 else LENGTH if d == dim else 1 for d in range(tensor.ndim)]
        return tensor if dim < 0 else torch.where(attention_mask.bool().view(shape), tensor, 1e3)

    spoilt = objective(on_each(student, spoil), on_each(teacher, spoil), attention_mask, LABELS)
    assert_equal_parts(spoilt, whole)

    # Each sentence alone and unpadded, weighed by its own examples, tokens and pairs.
    sums = dict.fromkeys(whole, torch.zeros(()))
    for row, length in enumerate(attention_mask.sum(dim=-1).tolist()):
        alone = slice(row, row + 1)
        parts = objective(
            rows(student, alone, length), rows(teacher, alone, length), torch.ones(1, length), LABELS[alone]
        )
        for name, part in parts.items():
            share = (
                length**2 / 95
                if "attention" in name
                else 1 / 4
                if name in ("prediction", "gold")
                else length / 17
            )
            sums[name] = sums[name] + part * share
    assert_equal_parts(sums, whole)


@pytest.mark.parametrize(("student_heads", "relation_heads"), [(3, None), (6, None), (3, 2), (2, 1)])
def test_attention_parts_are_compared_by_relation_heads(
    student_heads: int, relation_heads: int | None
) -> None:
    """An option that does not reach the loss would compare other heads than asked for, in silence."""
    student, teacher, attention_mask = make_batch(student_heads)
    parts = make_objective(EVERYTHING, relation_heads=relation_heads)(
        student, teacher, attention_mask, LABELS
    )
    for m, g in enumerate(LAYER_MAP, start=1):
        expected = attention_loss(
            student.queries[m - 1],
            student.keys[m - 1],
            teacher.queries[g - 1],
            teacher.keys[g - 1],
            attention_mask,
            student_scaling=1.0,
            teacher_scaling=1.0,
            relation_heads=relation_heads or {3: 1, 6: 2}[student_heads],
        )
        assert parts.pop(f"attention_{m}") == expected > 0
    others = make_objective(EVERYTHING)(student, teacher, attention_mask, LABELS)
    assert_equal_parts(parts, {name: others[name] for name in ALL_PARTS - {"attention_1", "attention_2"}})


def test_relation_heads_that_do_not_fit_are_refused_when_the_loss_is_made() -> None:
    """Found out at the first step, it would be after the data was read and the folder claimed."""
    with pytest.raises(InputError, match=r"relation_heads is 4, .* width 6 and the teacher's 8: give 2,"):
        make_objective(relation_heads=4)
    make_objective(LossWeights(attention=0), relation_heads=4)  # the prediction stage reads no scores


def test_padding_gets_no_gradient() -> None:
    """A gradient at padded positions would be noise added to every update."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(EVERYTHING)
    objective.total(objective(student, teacher, attention_mask, LABELS)).backward()
    real = attention_mask.bool()
    on_tokens = [state.grad for state in student.hidden]
    on_tokens += [state.grad.transpose(1, 2) for state in (*student.queries, *student.keys)]  # type: ignore[union-attr]
    for gradient in on_tokens:
        assert gradient is not None
        assert gradient[real].abs().sum() > 0
        assert gradient[~real].abs().sum() == 0


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label"])
def test_pieces_of_a_batch_add_up_to_the_whole_given_its_counts(kind: str) -> None:
    """Accumulated and distributed batches must train as one large batch does, ragged or not."""
    student, teacher, attention_mask = make_batch()
    labels = LABELS
    if kind == "regression":
        student, teacher = (replace(s, logits=s.logits[:, :1]) for s in (student, teacher))  # type: ignore[index]
        labels = LABELS.float()
    if kind == "multi_label":
        labels = torch.eye(student.logits.shape[1])[LABELS]  # type: ignore[union-attr]
    objective = make_objective(EVERYTHING, kind=kind)
    whole = objective(student, teacher, attention_mask, labels)
    counts = Counts.of(attention_mask)
    pieces = [
        objective(rows(student, piece), rows(teacher, piece), attention_mask[piece], labels[piece], counts)
        for piece in (slice(0, 1), slice(1, 4))
    ]
    assert_equal_parts({name: pieces[0][name] + pieces[1][name] for name in whole}, whole)


@pytest.mark.parametrize("padding", ["real", "reference"])
def test_means_over_batches_weighed_by_their_denominators_are_those_of_the_whole(padding: str) -> None:
    """Evaluated in batches, a part would otherwise hang on where the batches are cut."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(EVERYTHING, padding=padding)
    whole = objective(student, teacher, attention_mask, LABELS)
    all_counts = objective.counts({"attention_mask": attention_mask})
    means = dict.fromkeys(whole, torch.zeros(()))
    for piece in (slice(0, 1), slice(1, 4)):
        counts = objective.counts({"attention_mask": attention_mask[piece]})
        inputs = (rows(student, piece), rows(teacher, piece), attention_mask[piece], LABELS[piece])
        for name, part in objective(*inputs).items():
            share = objective.denominator(name, counts) / objective.denominator(name, all_counts)
            means[name] = means[name] + part * share
    assert_equal_parts(means, whole)
    assert objective.places({"attention_mask": attention_mask, "labels": LABELS}) is None


def test_no_gradient_reaches_the_teacher_and_every_student_state_gets_one() -> None:
    """A teacher that moves is no target; a student state without gradient is not trained."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(EVERYTHING)
    objective.total(objective(student, teacher, attention_mask, LABELS)).backward()
    for states, learns in ((student, True), (teacher, False)):
        for tensor in (*states.hidden, *states.queries, *states.keys, states.logits):
            assert tensor is not None
            assert (tensor.grad is not None) == learns


def test_reference_mode_repeats_the_reference_implementation() -> None:
    """Parity with the published code is claimed part by part, padded positions and class mean included."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(padding="reference", temperature=2.0)
    parts = objective(student, teacher, attention_mask)
    additive = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
    expected = {}
    for m, g in enumerate((0, *LAYER_MAP)):
        projected = student.hidden[m] @ objective.projections[str(m)].weight.T  # type: ignore[operator,union-attr]
        expected[f"hidden_{m}" if m else "embedding"] = nn.MSELoss()(projected, teacher.hidden[g])
        if m:
            scores = [
                states.queries[n - 1] @ states.keys[n - 1].transpose(-1, -2) / states.keys[0].shape[-1] ** 0.5
                + additive
                for states, n in ((student, m), (teacher, g))
            ]
            seen = [torch.where(score <= -1e2, torch.zeros(()), score) for score in scores]
            expected[f"attention_{m}"] = nn.MSELoss()(*seen)
    assert student.logits is not None
    assert teacher.logits is not None
    likelihood = -F.softmax(teacher.logits / 2.0, dim=-1) * F.log_softmax(student.logits / 2.0, dim=-1)
    expected["prediction"] = likelihood.mean()
    assert_equal_parts(parts, expected)


def test_regression_compares_scores_with_the_teachers_and_the_gold_ones() -> None:
    """The reference leaves the teacher out of regression: nothing would be distilled."""
    student, teacher, attention_mask = make_batch()
    student, teacher = (replace(s, logits=s.logits[:, :1]) for s in (student, teacher))  # type: ignore[index]
    objective = make_objective(LossWeights(0, 0, 0, 1, 1), kind="regression")
    gold = torch.tensor([0.5, 5.0, 3.0, 2.0])
    parts = objective(student, teacher, attention_mask, gold)
    assert_equal_parts(
        parts,
        {
            "prediction": F.mse_loss(student.logits, teacher.logits),  # type: ignore[arg-type]
            "gold": F.mse_loss(student.logits[:, 0], gold),  # type: ignore[index]
        },
    )


positive = st.floats(0.01, 10.0)


@given(st.tuples(*[positive] * 5), st.tuples(*[positive] * 4))
def test_total_weighs_each_part_by_its_kind_times_its_layer(
    kinds: tuple[float, ...], layers: tuple[float, ...]
) -> None:
    """Equation 6 with its lambdas: a weight on the wrong layer trains another model than asked for."""
    student, teacher, attention_mask = make_batch()
    parts = make_objective(EVERYTHING)(student, teacher, attention_mask, LABELS)
    weighted = make_objective(LossWeights(*kinds, layers=layers))
    assert_equal_parts(weighted(student, teacher, attention_mask, LABELS), parts)  # parts are unweighted
    embedding, hidden, attention, prediction, gold = kinds
    expected = (
        layers[0] * embedding * parts["embedding"]
        + layers[1] * (hidden * parts["hidden_1"] + attention * parts["attention_1"])
        + layers[2] * (hidden * parts["hidden_2"] + attention * parts["attention_2"])
        + layers[3] * (prediction * parts["prediction"] + gold * parts["gold"])
    )
    torch.testing.assert_close(weighted.total(parts), expected)


@pytest.mark.parametrize(
    ("weights", "parts", "projections"),
    [
        (LossWeights(0, 0, 0, 1), {"prediction"}, set()),
        (LossWeights(prediction=0), ALL_PARTS - {"prediction", "gold"}, {"0", "1", "2"}),
        (LossWeights(0, 0, 1, 0), {"attention_1", "attention_2"}, set()),
        (LossWeights(0, 1, 0, 0), {"hidden_1", "hidden_2"}, {"1", "2"}),
        (LossWeights(layers=(0, 0, 1, 0)), {"hidden_2", "attention_2"}, {"2"}),
    ],
)
def test_a_part_without_weight_costs_nothing(
    weights: LossWeights, parts: set[str], projections: set[str]
) -> None:
    """A part that is not asked for takes no time, no projection, and needs no states to be there."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(weights)
    if not objective.reads_states:
        student, teacher = States(logits=student.logits), States(logits=teacher.logits)
    if not objective.reads_logits:
        student, teacher = replace(student, logits=None), replace(teacher, logits=None)
    assert objective(student, teacher, attention_mask).keys() == parts
    assert set(objective.projections) == projections
    assert objective.reads_states == bool({"hidden", "attention"} & {part.split("_")[0] for part in parts})


@pytest.mark.parametrize(("student_size", "teacher_size"), [(6, 8), (8, 6)])
def test_projections_start_orthogonal(student_size: int, teacher_size: int) -> None:
    """A start that keeps lengths and angles neither blows up nor loses what the student knows."""
    objective = DistillationLoss(student_size, teacher_size, LAYER_MAP)
    weights = [parameter.detach() for parameter in objective.parameters()]
    assert [tuple(weight.shape) for weight in weights] == [(teacher_size, student_size)] * 3
    for weight in weights:
        small = weight.T @ weight if teacher_size > student_size else weight @ weight.T
        torch.testing.assert_close(small, torch.eye(6))
    assert not torch.equal(weights[0], weights[1])


def test_projections_start_as_the_identity_where_the_widths_agree() -> None:
    """A student copied from its teacher then starts with no loss."""
    _, teacher, attention_mask = make_batch()
    objective = DistillationLoss(TEACHER_SIZE, TEACHER_SIZE, (1, 2, 3, 4))
    parts = objective(teacher, teacher, attention_mask)
    assert parts["prediction"] > 0  # the teacher's entropy
    assert all(part == 0 for name, part in parts.items() if name.startswith(("embedding", "hidden")))
    assert all(part < 1e-6 for name, part in parts.items() if name.startswith("attention"))


def test_projections_can_be_started_from_given_matrices() -> None:
    """The closed form knows W already; transposed or shifted by a layer it would be a bad start."""
    student, teacher, attention_mask = make_batch()
    start = [torch.randn(STUDENT_SIZE, TEACHER_SIZE) for _ in range(3)]
    hidden = list(teacher.hidden)
    for m, g in enumerate((0, *LAYER_MAP)):
        hidden[g] = student.hidden[m] @ start[m]
    objective = make_objective(LossWeights(attention=0, prediction=0))
    teacher = replace(teacher, hidden=tuple(hidden))
    assert all(part > 0.1 for part in objective(student, teacher, attention_mask).values())
    objective.start_projections(start)
    assert all(part < 1e-10 for part in objective(student, teacher, attention_mask).values())


def test_training_the_projections_lowers_the_hidden_losses() -> None:
    """Peers forgot to optimise them, so the student had to chase a random projection."""
    student, teacher, attention_mask = make_batch()
    objective = make_objective(LossWeights(attention=0, prediction=0))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    first = objective(student, teacher, attention_mask)
    for _ in range(20):
        optimizer.zero_grad()
        objective.total(objective(student, teacher, attention_mask)).backward()
        optimizer.step()
    last = objective(student, teacher, attention_mask)
    assert all(last[name] < 0.9 * first[name] for name in ("embedding", "hidden_1", "hidden_2"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossWeights(0, 0, 0, 0, 0), "every loss weight is 0.*at least one"),
        (lambda: LossWeights(hidden=-1), "must not be negative.*hidden=-1"),
        (lambda: LossWeights(layers=(1, 1, -1, 1)), "must not be negative"),
        (
            lambda: make_objective(LossWeights(layers=(1, 1, 1))),
            "got 3 layer weights for 2 student layers: give 4",
        ),
        (lambda: make_objective(LossWeights(layers=(0, 0, 0, 0))), r"\(0, 0, 0, 0\) leave every loss at 0"),
        (lambda: make_objective(LossWeights(0, 0, 0, 1, layers=(1, 1, 1, 0))), "leave every loss at 0"),
    ],
)
def test_weights_that_would_train_nothing_or_backwards_are_refused(
    make: Callable[[], object], message: str
) -> None:
    """A run that trains nothing looks like any other until hours later."""
    with pytest.raises(InputError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


TAGS = torch.tensor(
    [
        [-100, 2, 0, -100, 1, 1, -100],
        [-100, 2, -100] + [-100] * 4,
        [-100] * 7,
        [-100, 0, 1, 2, 0] + [-100] * 2,
    ]
)
SPANS = torch.tensor([[1, 5], [0, 0], [0, 0], [3, 4]])


def make_token_batch(kind: str) -> tuple[States, States, Tensor, Tensor]:
    """A batch whose logits are one row for each token, and its labels."""
    student, teacher, attention_mask = make_batch()
    torch.manual_seed(3)
    classes = CLASSES if kind == "token_classification" else 2
    logits = [torch.randn(BATCH, LENGTH, classes, requires_grad=True) for _ in range(2)]
    student, teacher = (replace(s, logits=some) for s, some in zip((student, teacher), logits, strict=True))
    return student, teacher, attention_mask, TAGS if kind == "token_classification" else SPANS


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_soft_labels_of_words_are_a_mean_over_first_pieces(temperature: float) -> None:
    """One by one: neither padding, nor special tokens, nor the rest of a word say anything."""
    student, teacher, attention_mask, labels = make_token_batch("token_classification")
    objective = make_objective(EVERYTHING, kind="token_classification", temperature=temperature)
    found = objective(student, teacher, attention_mask, labels)
    soft, gold = [], []
    for row, place in (labels != -100).nonzero().tolist():
        mine, its = student.logits[row, place], teacher.logits[row, place]  # type: ignore[index]
        target = (its / temperature).softmax(0)
        soft.append(-(target * (mine / temperature).log_softmax(0)).sum() * temperature**2)
        gold.append(-mine.log_softmax(0)[labels[row, place]])
    assert len(soft) == 9
    torch.testing.assert_close(found["prediction"], torch.stack(soft).mean())
    torch.testing.assert_close(found["gold"], torch.stack(gold).mean())
    found["prediction"].backward()
    gradient = student.logits.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(-1) > 0, labels != -100)
    with pytest.raises(InputError, match="the tokens have no labels"):
        objective(student, teacher, attention_mask)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_soft_labels_of_answers_are_a_mean_over_starts_and_ends(temperature: float) -> None:
    """One by one: the classes are the real tokens of each window, and no others."""
    student, teacher, attention_mask, labels = make_token_batch("question_answering")
    objective = make_objective(EVERYTHING, kind="question_answering", temperature=temperature)
    found = objective(student, teacher, attention_mask, labels)
    soft, gold = [], []
    for row in range(BATCH):
        real = int(attention_mask[row].sum())
        for side in range(2):
            mine, its = student.logits[row, :real, side], teacher.logits[row, :real, side]  # type: ignore[index]
            target = (its / temperature).softmax(0)
            soft.append(-(target * (mine / temperature).log_softmax(0)).sum() * temperature**2)
            gold.append(-mine.log_softmax(0)[labels[row, side]])
    torch.testing.assert_close(found["prediction"], torch.stack(soft).mean())
    torch.testing.assert_close(found["gold"], torch.stack(gold).mean())
    found["prediction"].backward()
    gradient = student.logits.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert (gradient[attention_mask == 0] == 0).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("kind", ["token_classification", "question_answering"])
def test_pieces_of_token_batches_add_up_to_the_whole_given_its_counts(kind: str) -> None:
    """A batch may have many sentences and few words, and one may have no word at all."""
    student, teacher, attention_mask, labels = make_token_batch(kind)
    objective = make_objective(EVERYTHING, kind=kind)
    whole = objective(student, teacher, attention_mask, labels)
    counts = objective.counts({"attention_mask": attention_mask, "labels": labels})
    assert counts.examples == (9 if kind == "token_classification" else BATCH)
    each = [
        objective(rows(student, piece), rows(teacher, piece), attention_mask[piece], labels[piece], counts)
        for piece in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    assert_equal_parts({name: sum(some[name] for some in each) for name in whole}, whole)  # type: ignore[misc]
    alone = slice(2, 3)
    for part in objective(
        rows(student, alone), rows(teacher, alone), attention_mask[alone], labels[alone]
    ).values():
        assert part.isfinite()
