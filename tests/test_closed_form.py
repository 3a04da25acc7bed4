"""The closed-form student: exact where it can be, unbiased by padding, better than noise elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
)

from conftest import PIECES, randomise
from tinybert.capture import capture
from tinybert.closed_form import solve_student
from tinybert.errors import InputError
from tinybert.moments import Moments, choose, low_rank, with_one
from tinybert.student import StudentSize, make_student

FAMILIES = ("bert", "roberta", "electra", "distilbert", "mpnet")
MPNET: dict[str, Any] = {
    "vocab_size": len(PIECES),
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}


@pytest.fixture
def classifier(tiny_encoder: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """A random model with a head whose logits are far from constant."""

    def make(
        family: str, auto_class: Any = AutoModelForSequenceClassification, **config: Any
    ) -> PreTrainedModel:
        if family == "mpnet":
            encoder = randomise(MPNetModel(MPNetConfig(**MPNET | {"num_labels": 3} | config)))
        else:
            encoder = tiny_encoder(family, num_labels=3, **config)
        torch.manual_seed(1)
        model = auto_class.from_config(encoder.config)
        model.base_model.load_state_dict(encoder.state_dict(), strict=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "classifier" in name or "pooler" in name:
                    parameter.normal_(std=0.5)
        return model.eval()

    return make


def text(vocabulary: int, batches: int = 6, seed: int = 0, length: int = 20) -> list[dict[str, Tensor]]:
    """Random ragged batches (16, length)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        ids = torch.randint(5, vocabulary, (16, length), generator=generator)
        lengths = torch.randint(5, length + 1, (16, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def shape_of(model: PreTrainedModel) -> StudentSize:
    config = model.config
    neurons = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    return StudentSize(config.num_hidden_layers, config.hidden_size, neurons)


def all_layers(model: PreTrainedModel) -> tuple[int, ...]:
    return tuple(range(1, model.config.num_hidden_layers + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_of_the_teachers_size_is_the_teacher(
    family: str, classifier: Callable[..., PreTrainedModel]
) -> None:
    """If the construction is not exact where nothing is cut away, it is wrong everywhere."""
    teacher = classifier(family)
    student = make_student(teacher, shape_of(teacher))
    batches = text(teacher.config.vocab_size)
    held_out = text(teacher.config.vocab_size, 1, seed=9)[0]
    before = capture(student, held_out).logits
    result = solve_student(teacher, student, batches, all_layers(teacher))
    with torch.no_grad():
        wanted, got = capture(teacher, held_out), capture(student, held_out)
    assert (before - wanted.logits).abs().max() > 0.1  # the random start was somewhere else
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-4, rtol=0)
    real = held_out["attention_mask"].bool()
    for mine, its in zip(got.hidden, wanted.hidden, strict=True):
        torch.testing.assert_close(mine[real], its[real], atol=1e-3, rtol=0)
    for layer in range(teacher.config.num_hidden_layers):
        scores = [
            states.queries[layer] @ states.keys[layer].mT * states.scaling[layer] for states in (got, wanted)
        ]
        pairs = (real[:, None, :, None] & real[:, None, None, :]).expand_as(scores[0])
        torch.testing.assert_close(scores[0][pairs], scores[1][pairs], atol=1e-3, rtol=1e-3)
    assert max(result.hidden_errors) < 1e-5


def test_mpnets_position_bias_is_the_teachers_and_counts(classifier: Callable[..., PreTrainedModel]) -> None:
    """Equation 7 leaves the bias out of the scores: nobody would bring it back if the start lost it."""
    teacher = classifier("mpnet")
    student = make_student(teacher, shape_of(teacher))
    table = student.base_model.encoder.relative_attention_bias.weight
    with torch.no_grad():
        table.normal_()
    solve_student(teacher, student, text(teacher.config.vocab_size), all_layers(teacher))
    wanted = teacher.base_model.encoder.relative_attention_bias.weight
    assert torch.equal(table, wanted)
    assert table.data_ptr() != wanted.data_ptr()
    held_out = text(teacher.config.vocab_size, 1, seed=9)[0]
    with torch.no_grad():
        whole = capture(student, held_out).logits
        table.zero_()
        without = capture(student, held_out).logits
    assert (whole - without).abs().max() > 0.01, "a bias that changes nothing would not be missed"


def test_an_mpnet_student_needs_its_teachers_number_of_heads(
    classifier: Callable[..., PreTrainedModel],
) -> None:
    """The bias is one a head, the same in all layers: of other heads it would be another's."""
    teacher = classifier("mpnet")
    student = make_student(teacher, StudentSize(2, 16, 20, heads=2))
    with pytest.raises(InputError, match=r"has 2 heads and the teacher 4: .* leave --heads out"):
        solve_student(teacher, student, text(teacher.config.vocab_size), (1, 3))


@pytest.mark.parametrize(
    ("family", "options", "has_the_head"),
    [
        ("roberta", {"pad_token_id": 1}, True),
        ("roberta", {"type_vocab_size": 1}, True),
        ("electra", {"embedding_size": 32}, False),
        ("distilbert", {}, False),
    ],
)
def test_a_bert_of_the_teachers_size_is_the_teacher_of_another_family(
    family: str, options: dict[str, int], has_the_head: bool, classifier: Callable[..., PreTrainedModel]
) -> None:
    """A position or a token type taken from the wrong row makes another sentence of it."""
    teacher = classifier(family, **options)
    student = make_student(teacher, shape_of(teacher), family="bert")
    assert student.config.model_type == "bert"
    batches = text(teacher.config.vocab_size)
    result = solve_student(teacher, student, batches, all_layers(teacher))
    held_out = text(teacher.config.vocab_size, 1, seed=9)[0]
    with torch.no_grad():
        wanted, got = capture(teacher, held_out), capture(student, held_out)
    real = held_out["attention_mask"].bool()
    for mine, its in zip(got.hidden, wanted.hidden, strict=True):
        torch.testing.assert_close(mine[real], its[real], atol=1e-3, rtol=0)
    assert max(result.hidden_errors) < 1e-5
    if has_the_head:
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-3, rtol=0)
    else:  # tanh stands in for gelu and relu, as well as 96 sentences can tell
        missed = (got.logits - wanted.logits).square().sum()
        assert missed < 0.9 * (wanted.logits - wanted.logits.mean(0)).square().sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_start_where_the_hidden_loss_is_small(
    family: str, classifier: Callable[..., PreTrainedModel]
) -> None:
    """A projection of the wrong orientation or layer would undo the start in the first training steps."""
    teacher = classifier(family)
    student = make_student(teacher, shape_of(teacher))
    batches = text(teacher.config.vocab_size)
    result = solve_student(teacher, student, batches, all_layers(teacher))
    with torch.no_grad():
        wanted, got = capture(teacher, batches[0]), capture(student, batches[0])
    real = batches[0]["attention_mask"].bool()
    for mine, its, projection in zip(got.hidden, wanted.hidden, result.projections, strict=True):
        torch.testing.assert_close(mine[real] @ projection, its[real], atol=2e-2, rtol=0)


def padded_bert(live: int, width: int, neurons: int, dead_neurons: int) -> BertModel:
    """A BERT whose last hidden units, head dimensions and neurons are dead.

    Layer norm over the padded width equals layer norm over the live units but for a constant factor exactly
    where the live units sum to zero before and after it: what is written to them is centred, and the gains
    of a norm are equal. The student's own gains absorb the factor.
    """
    torch.manual_seed(3)
    heads, layers = 4, 2
    model = BertModel(
        BertConfig(
            vocab_size=60,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=neurons + dead_neurons,
            max_position_embeddings=32,
        )
    )
    head, live_head = width // heads, live // heads

    def write(linear: torch.nn.Linear) -> None:  # centred on the live units, nothing on the dead ones
        linear.weight[:live] -= linear.weight[:live].mean(0)
        linear.bias[:live] -= linear.bias[:live].mean()
        linear.weight[live:] = 0
        linear.bias[live:] = 0

    def settle(norm: torch.nn.LayerNorm, gain: float) -> None:
        norm.weight.fill_(gain)
        norm.bias.normal_()
        norm.bias[:live] -= norm.bias[:live].mean()
        norm.bias[live:] = 0

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        tables = model.embeddings
        for table in (tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings):
            table.weight[:, :live] -= table.weight[:, :live].mean(1, keepdim=True)
            table.weight[:, live:] = 0
        settle(tables.LayerNorm, 1.3)
        for number, layer in enumerate(model.encoder.layer):
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                dead = torch.arange(width) % head >= live_head
                linear.weight[dead] = 0
                linear.bias[dead] = 0
            write(layer.attention.output.dense)
            settle(layer.attention.output.LayerNorm, 0.8 + number)
            layer.output.dense.weight[:, neurons:] = 0
            write(layer.output.dense)
            settle(layer.output.LayerNorm, 1.1 - 0.3 * number)
    return model.eval()


def test_student_cut_down_to_the_live_part_of_a_padded_teacher_is_exact() -> None:
    """What carries nothing must cost nothing: units, head dimensions and neurons alike."""
    teacher = padded_bert(live=24, width=32, neurons=20, dead_neurons=12)
    student = make_student(teacher, StudentSize(2, 24, 20))
    batches = text(60, 10)
    result = solve_student(teacher, student, batches, (1, 2), ridge=1e-9)
    assert result.basis.tolist() == list(range(24))
    held_out = text(60, 1, seed=9)[0]
    with torch.no_grad():
        wanted, got = capture(teacher, held_out), capture(student, held_out)
    real = held_out["attention_mask"].bool()
    for mine, its in zip(got.hidden, wanted.hidden, strict=True):
        torch.testing.assert_close(mine[real], its[real][:, :24], atol=1e-3, rtol=0)
        assert its[real].abs().max() > 0.5


def test_more_or_less_padding_changes_nothing(classifier: Callable[..., PreTrainedModel]) -> None:
    """Calibration text of other lengths in the batch must not move the fit."""
    teacher = classifier("bert")
    tight = text(teacher.config.vocab_size, 6)
    loose = [
        {name: torch.nn.functional.pad(tensor, (0, 7)) for name, tensor in batch.items()} for batch in tight
    ]
    alone = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in tight
        for row in range(16)
    ]
    solved = []
    for batches in (tight, loose, alone):
        student = make_student(teacher, StudentSize(2, 20, 24))
        solve_student(teacher, student, batches, (1, 3))
        solved.append(capture(student.eval(), tight[0]).logits)
    torch.testing.assert_close(solved[1], solved[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(solved[2], solved[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_student_knows_more_than_a_random_one(
    family: str, classifier: Callable[..., PreTrainedModel]
) -> None:
    """Depth, width and neurons cut at once: states still follow the teacher's on text not calibrated on."""
    teacher = classifier(family)
    width = teacher.config.hidden_size - 8
    student = make_student(teacher, StudentSize(1, width, 24))
    result = solve_student(teacher, student, text(teacher.config.vocab_size), (2,))
    assert len(result.projections) == 2
    assert result.projections[0].shape == (width, teacher.config.hidden_size)
    assert result.hidden_errors[1] < 0.9
    held_out = text(teacher.config.vocab_size, 1, seed=9)[0]
    real = held_out["attention_mask"].bool()
    with torch.no_grad():
        mine, its = capture(student, held_out).hidden[1][real], capture(teacher, held_out).hidden[2][real]
    error = (mine @ result.projections[1] - its).square().sum() / (its - its.mean(0)).square().sum()
    assert error < 0.95


def test_fewer_heads_than_the_teacher(classifier: Callable[..., PreTrainedModel]) -> None:
    """Dropping heads must keep those that write most, and give finite weights."""
    teacher = classifier("bert")
    student = make_student(teacher, StudentSize(3, 32, 40, heads=2))
    result = solve_student(teacher, student, text(teacher.config.vocab_size), (1, 2, 3))
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
    assert max(result.hidden_errors) < 0.9


def test_head_on_every_token_is_pulled_back(classifier: Callable[..., PreTrainedModel]) -> None:
    """A token classifier predicts before it is trained, too."""
    teacher = classifier("bert", AutoModelForTokenClassification)
    student = make_student(teacher, shape_of(teacher))
    batches = text(teacher.config.vocab_size)
    solve_student(teacher, student, batches, (1, 2, 3))
    real = batches[0]["attention_mask"].bool()
    with torch.no_grad():
        wanted, got = capture(teacher, batches[0]).logits, capture(student, batches[0]).logits
    torch.testing.assert_close(got[real], wanted[real], atol=1e-2, rtol=0)


def test_teacher_is_left_as_it_was(classifier: Callable[..., PreTrainedModel]) -> None:
    """A teacher in training mode stays there, its weights untouched, and its dropout unused."""
    teacher = classifier("bert").train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = make_student(teacher, shape_of(teacher))
    result = solve_student(teacher, student, text(teacher.config.vocab_size), (1, 2, 3))
    assert teacher.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert max(result.hidden_errors) < 1e-5


def test_batches_may_come_from_a_function(classifier: Callable[..., PreTrainedModel]) -> None:
    """A corpus that is streamed anew each time gives what a list gives."""
    teacher = classifier("bert")
    batches = text(teacher.config.vocab_size)
    logits = []
    for source in (batches, lambda: iter(batches)):
        student = make_student(teacher, StudentSize(2, 24, 24), init="closed_form", calibration=source)
        logits.append(capture(student, batches[0]).logits)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [((2, 1), "each layer above the last"), ((1,), "each layer above"), ((2, 9), "the teacher's 3")],
)
def test_mapping_that_does_not_rise_is_refused(
    layer_map: tuple[int, ...], message: str, classifier: Callable[..., PreTrainedModel]
) -> None:
    """A wrong mapping is one line, not a broken student."""
    teacher = classifier("bert")
    student = make_student(teacher, StudentSize(2, 24, 24))
    with pytest.raises(InputError, match=message):
        solve_student(teacher, student, text(teacher.config.vocab_size), layer_map)


def test_other_families_are_refused_by_name(classifier: Callable[..., PreTrainedModel]) -> None:
    """The message says which families work and what to do."""
    teacher = classifier("bert")
    student = make_student(classifier("roberta"), StudentSize(1, 24, 24))
    with pytest.raises(InputError, match=r"from bert to roberta.*start at random"):
        solve_student(teacher, student, text(30), (1,))
    student = make_student(classifier("mpnet"), StudentSize(1, 24, 24), family="bert")
    with pytest.raises(InputError, match=r"from mpnet to bert.*any of them but mpnet; start at random"):
        solve_student(classifier("mpnet"), student, text(30), (1,))


def test_no_text_is_refused(classifier: Callable[..., PreTrainedModel]) -> None:
    """An empty calibration set is one line, not a singular matrix."""
    teacher = classifier("bert")
    student = make_student(teacher, StudentSize(1, 24, 24))
    with pytest.raises(InputError, match="no calibration text"):
        solve_student(teacher, student, [], (1,))


def test_ridge_equals_the_normal_equations() -> None:
    """Moments give the same answer as the rows they were made of."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(200, generator=generator, dtype=torch.float64)
    moments = Moments()
    for rows in (slice(0, 150), slice(150, 200)):
        moments.add(features[rows], targets[rows], weights[rows])
    root = weights.sqrt()[:, None]
    wanted = torch.linalg.lstsq(root * with_one(features), root * targets).solution
    got = moments.ridge(torch.zeros(7, 3, dtype=torch.float64), 1e-12)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=0)
    residual = with_one(features) @ got - targets
    mean = (weights[:, None] * targets).sum(0) / weights.sum()
    error = (weights[:, None] * residual.square()).sum() / (
        weights[:, None] * (targets - mean).square()
    ).sum()
    assert moments.error(got) == pytest.approx(error.item(), abs=1e-9)


def test_fewer_rows_than_features_are_fitted_too() -> None:
    """Twenty sentences are what somebody tries first; in float32 their Gram matrix is not quite positive."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 320, generator=generator) + 1
    targets = features @ torch.randn(320, 4, generator=generator)
    moments = Moments()
    moments.add(features, targets, torch.ones(48))
    scale = 1e-6 * moments.gram.diagonal().mean() * torch.eye(321, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moments.gram + scale).min() < 0  # else this test could not fail
    got = moments.ridge(torch.zeros(321, 4, dtype=torch.float64), 1e-6)
    assert moments.error(got) < 1e-3
    moments.gram[0, 0] = torch.nan
    with pytest.raises(InputError, match="are no numbers"):
        moments.ridge(torch.zeros(321, 4, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("count", [5, 256, 600])
def test_moments_are_sums_of_products(count: int) -> None:
    """Also where a Gram matrix is put together from blocks, of which half are mirrored."""
    generator = torch.Generator().manual_seed(0)
    features, targets = (torch.randn(90, size, generator=generator) for size in (count, 3))
    weights = torch.rand(90, generator=generator)
    moments = Moments()
    for rows in (slice(0, 40), slice(40, 90)):
        moments.add(features[rows], targets[rows], weights[rows])
    whole = with_one(features.double())
    weighted = whole * weights.double()[:, None]
    exact = 1e-12 if count <= 256 else 1e-4
    torch.testing.assert_close(moments.gram, weighted.T @ whole, atol=exact, rtol=0)
    torch.testing.assert_close(moments.cross, weighted.T @ targets.double(), atol=exact, rtol=0)
    torch.testing.assert_close(moments.gram, moments.gram.T, atol=exact, rtol=0)


def test_low_rank_factors_are_the_best_of_their_rank() -> None:
    """Eckart-Young: no other pair of factors of that rank comes nearer."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = low_rank(left, right, 2)
    u, s, v = torch.linalg.svd(left @ right.T)
    torch.testing.assert_close(first @ second.T, u[:, :2] * s[:2] @ v[:2])


def test_chosen_features_are_those_that_matter() -> None:
    """Copies and noise lose against the features the target is made of."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    features[:, 5] = features[:, 2]  # a copy adds nothing
    targets = 3 * features[:, [1]] - 2 * features[:, [2]] + 0.5 * features[:, [6]] + 4
    moments = Moments()
    moments.add(features, targets, torch.ones(500))
    chosen = choose(moments, 3).tolist()
    assert chosen in ([1, 2, 6], [1, 5, 6])
