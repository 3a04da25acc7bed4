"""The task table, the meaning of labels, and the metrics."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from tinybert.errors import InputError
from tinybert.tasks import GLUE, compute_metrics, find_task, main_metric, read_labels


def logits_of(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count)[classes] * 3 - 1


def where(value: str) -> str:
    return f"label {value!r}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("CoLA", "cola"),
        ("SST-2", "sst2"),
        ("mrpc", "mrpc"),
        ("data/glue/STS-B/train.tsv", "stsb"),
        ("glue/QNLI/", "qnli"),
        ("C:\\glue\\RTE\\dev.tsv", "rte"),
        ("nyu-mll/glue/mnli_matched", "mnli"),
        ("wnli.jsonl.gz", "wnli"),
        ("mrpc/qqp.csv", "qqp"),
    ],
)
def test_a_glue_name_is_found_however_it_is_written(source: str, name: str) -> None:
    """A folder as GLUE ships it would be scored with the wrong metric and unnamed classes."""
    task = find_task(source)
    assert task is GLUE[name]


@pytest.mark.parametrize(
    "source",
    ["", "/", "cola_drinks.csv", "starter/train.csv", "cola/a/b/train.tsv", "colas", "sst", "xmrpc.tsv"],
)
def test_a_part_of_an_unrelated_name_is_not_a_task(source: str) -> None:
    """Reviews of soft drinks would be scored as grammar."""
    assert find_task(source) is None


def test_the_glue_table_is_whole_and_its_metrics_exist() -> None:
    """A metric that is never computed would fail at the first evaluation, after the training was paid for."""
    assert set(GLUE) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    for task in GLUE.values():
        some = logits_of([0, 1], 2) if task.kind == "classification" else np.array([0.0, 1.0])
        assert task.metric in compute_metrics(task.kind, some, np.array([0, 1]))
        assert (len(task.label_names) >= 2) == (task.kind == "classification")
    assert GLUE["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert GLUE["wnli"].label_names == tuple(reversed(GLUE["rte"].label_names))


def test_the_main_metric_is_the_tasks_own_unless_the_kind_was_changed() -> None:
    """STS-B read as classes would look for a correlation that is not computed."""
    assert main_metric("classification", GLUE["cola"]) == "matthews"
    assert main_metric("classification", GLUE["stsb"]) == "accuracy"
    assert main_metric("classification", None) == "accuracy"
    assert main_metric("regression", None) == "pearson_spearman"


def test_binary_metrics_equal_values_worked_out_by_hand() -> None:
    """Every reported number would be wrong."""
    # true positives 2, false positives 1, false negatives 1, true negatives 1
    scores = compute_metrics("classification", logits_of([1, 1, 1, 0, 0], 2), np.array([1, 1, 0, 1, 0]))
    assert scores == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "accuracy_f1": (3 / 5 + 2 / 3) / 2, "matthews": 1 / 6}
    )


def test_regression_metrics_equal_values_worked_out_by_hand() -> None:
    """Every reported correlation would be wrong; a column of predictions would be broadcast to a matrix."""
    scores = compute_metrics("regression", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    # centred: (-4, -1, 5) / 3 and (-1, 1, 0): products sum to 1, squares to 14 / 3 and 2
    pearson = 1 / math.sqrt(14 / 3 * 2)
    assert scores == pytest.approx(
        {"pearson": pearson, "spearman": 0.5, "pearson_spearman": (pearson + 0.5) / 2, "mse": 5 / 3}
    )


@pytest.mark.filterwarnings("ignore")  # sklearn's own, of a single label
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_metrics_of_many_classes_agree_with_sklearn(pairs: list[tuple[int, int]]) -> None:
    """F1 of more than two classes would not be the macro mean that it is said to be."""
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    scores = compute_metrics("classification", logits_of(predicted.tolist(), 4), labels)
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))
    assert all(math.isfinite(value) for value in scores.values())


def test_f1_of_a_model_with_spare_outputs_is_that_of_class_one_if_two_classes_are_said() -> None:
    """MRPC scored by a head with three outputs would report another F1 than every paper."""
    predicted, labels = [1, 1, 0, 1], np.array([1, 0, 0, 1])
    binary = compute_metrics("classification", logits_of(predicted, 3), labels, label_count=2)
    macro = compute_metrics("classification", logits_of(predicted, 3), labels)
    assert binary["f1"] == pytest.approx(f1_score(labels, predicted))
    assert macro["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert binary["f1"] != macro["f1"]


@given(st.lists(st.tuples(st.floats(-5, 5, width=16), st.floats(0, 5, width=16)), min_size=1, max_size=20))
def test_regression_metrics_agree_with_scipy_and_are_finite(pairs: list[tuple[float, float]]) -> None:
    """A NaN would make every later checkpoint lose against it, or win."""
    predicted, labels = (np.array(column) for column in zip(*pairs, strict=True))
    scores = compute_metrics("regression", predicted, labels)
    assert all(math.isfinite(value) for value in scores.values())
    if np.ptp(predicted) > 1e-3 and np.ptp(labels) > 1e-3:
        assert scores["pearson"] == pytest.approx(pearsonr(predicted, labels).statistic)
        assert scores["spearman"] == pytest.approx(spearmanr(predicted, labels).statistic)


@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_scores_zero_and_warns_of_nothing() -> None:
    """A collapsed student would report NaN, or fill the screen with scipy's warnings."""
    flat = compute_metrics("regression", np.full(4, 0.1), np.arange(4.0))
    assert (flat["pearson"], flat["spearman"], flat["pearson_spearman"]) == (0.0, 0.0, 0.0)
    assert compute_metrics("regression", np.array([1.0]), np.array([2.0]))["pearson"] == 0.0
    one_class = compute_metrics("classification", logits_of([0, 0, 0], 2), np.array([0, 1, 1]))
    assert (one_class["matthews"], one_class["f1"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "predictions", "labels", "message"),
    [
        ("classification", np.zeros((0, 2)), np.zeros(0), "N at least 1"),
        ("classification", np.zeros(3), np.zeros(3), r"\(N, classes\)"),
        ("classification", np.zeros((3, 2)), np.zeros(4), "labels of shape"),
        ("regression", np.zeros((3, 2)), np.zeros(3), r"expected \(N,\)"),
        ("regression", np.array([np.nan, 1]), np.zeros(2), "learning rate"),
        ("regression", np.array([np.inf, 1]), np.zeros(2), "learning rate"),
        ("classification", np.array([[np.nan, 1]]), np.zeros(1), "learning rate"),
    ],
)
def test_numbers_that_cannot_be_scored_are_refused(kind, predictions, labels, message: str) -> None:
    """A diverged model would be given the accuracy of class 0."""
    with pytest.raises(InputError, match=message):
        compute_metrics(kind, predictions, labels)


@pytest.mark.parametrize(
    ("values", "given_names", "known", "expected"),
    [
        (["pos", "neg"], None, (), ("classification", ("neg", "pos"), [1, 0])),
        (["10", "9"], None, (), ("classification", ("9", "10"), [1, 0])),
        (["1.0", "0.0"], None, (), ("classification", ("0", "1"), [1, 0])),
        (["1", "x"], None, (), ("classification", ("1", "x"), [0, 1])),
        (["1", "2.5"], None, (), ("regression", (), [1.0, 2.5])),
        (["5", "1"], ("1", "2", "3", "4", "5"), (), ("classification", ("1", "2", "3", "4", "5"), [4, 0])),
        (["5.0", "1.0"], ("1", "2", "5"), (), ("classification", ("1", "2", "5"), [2, 0])),
        (["1", "0"], None, ("1", "2"), ("classification", ("1", "2"), [1, 0])),
        (["1", "0"], ("2", "1"), ("1", "2"), ("classification", ("2", "1"), [0, 1])),
        (
            ["1", "0"],
            ("LABEL_0", "LABEL_1"),
            ("bad", "good"),
            ("classification", ("LABEL_0", "LABEL_1"), [1, 0]),
        ),
        (["POSITIVE"], ("negative", "positive"), (), ("classification", ("negative", "positive"), [1])),
        (["a", "A"], ("A", "a"), (), ("classification", ("A", "a"), [1, 0])),
        (
            ["0", "2"],
            ("No", "Maybe", "Yes"),
            ("yes", "maybe", "no"),
            ("classification", ("No", "Maybe", "Yes"), [2, 0]),
        ),
    ],
)
def test_labels_mean_what_their_names_say(values, given_names, known, expected) -> None:
    """A teacher with another order of classes would be measured at 10 % instead of 83 %."""
    assert read_labels(values, None, given_names, known, where) == expected


@pytest.mark.parametrize(
    ("values", "kind", "given_names", "message"),
    [
        (["pos", "meh"], None, ("neg", "pos"), "label 'meh' is not one of the known labels 'neg', 'pos'"),
        (["pos"], None, ("LABEL_0", "LABEL_1"), "write labels as 0 to 1, or name the classes"),
        (["2"], None, ("neg", "pos"), "label '2' is not one"),
        (["-1", "0"], None, ("neg", "pos"), "label '-1' is not one"),
        (["0", "1", "2"], None, ("1", "2", "3"), "label '0' is not one of the known labels '1', '2', '3'"),
        (["0.5", "NA", "1.5"], None, None, "label 'NA' is not a number.*or give --kind classification"),
        (["1.0", "high"], "regression", None, "label 'high' is not a number"),
        (["nan"], "regression", None, "label 'nan' is not a number"),
        (["1_0"], "regression", None, "label '1_0' is not a number"),
    ],
)
def test_a_label_that_means_nothing_is_named(values, kind, given_names, message: str) -> None:
    """Rows would be trained on a class that the model does not have."""
    with pytest.raises(InputError, match=message):
        read_labels(values, kind, given_names, (), where)


def test_multi_label_metrics_are_those_of_the_definition() -> None:
    """Counted by hand: a logit above 0 is a yes."""
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 4)), generator.integers(0, 2, (50, 4))
    yes, true = logits > 0, labels == 1
    hits, said, held = (yes & true).sum(0), yes.sum(0), true.sum(0)
    found = compute_metrics("multi_label", logits, labels.astype(np.float32))
    assert found["f1_micro"] == pytest.approx(2 * hits.sum() / (said.sum() + held.sum()))
    assert found["f1_macro"] == pytest.approx((2 * hits / (said + held)).mean())
    assert found["accuracy"] == pytest.approx((yes == true).all(1).mean())
    assert compute_metrics("multi_label", np.full((2, 2), -1.0), np.zeros((2, 2)))["f1_micro"] == 0.0
    with pytest.raises(InputError, match=r"expected \(N, labels\) twice"):
        compute_metrics("multi_label", logits, labels[:, :3])
