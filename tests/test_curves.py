"""What is shown of a stage: every part with its training and eval losses, whatever the log holds."""

from typing import Any

from hypothesis import given, settings

from test_summary import HOSTILE
from tinybert.curves import stage_of_page

LOG: list[dict[str, Any]] = [
    {"loss": 9.0, "hidden_2_loss": 3.0, "attention_1_loss": 2.0, "embedding_loss": 1.0, "hidden_1_loss": 4.0,
     "step": 10, "learning_rate": 1e-4},
    {"eval_loss": 8.0, "eval_hidden_1_loss": 3.5, "eval_accuracy": 0.8, "eval_f1": 0.7, "step": 10},
    {"loss": 7.0, "hidden_1_loss": 3.0, "step": 20},
    {"train_loss": 8.0, "step": 20},
]  # fmt: skip


def test_each_part_of_each_layer_has_a_panel_in_order() -> None:
    """Whether it is layer 4 or the embeddings that does not learn is what one looks for."""
    stage = stage_of_page("intermediate", {"steps": 20, "seconds": 61.0, "log": LOG}, "accuracy")
    assert stage["title"] == "Intermediate stage"
    assert stage["sentences"] == ["20 steps in 61 s."]
    assert [panel["title"] for panel in stage["panels"]] == [
        "all parts",
        "embeddings",
        "hidden states, layer 1",
        "hidden states, layer 2",
        "attention scores, layer 1",
        "accuracy",
    ]
    assert stage["panels"][0]["series"] == {"training": [(10, 9.0), (20, 7.0)], "eval": [(10, 8.0)]}
    assert stage["panels"][-1]["series"] == {"eval": [(10, 80.0)]}


def test_a_single_part_is_not_shown_twice() -> None:
    """The sum of one part is that part."""
    log = [{"loss": 1.0, "prediction_loss": 1.0, "step": 1}]
    stage = stage_of_page("prediction", {"log": log}, "accuracy")
    assert [panel["title"] for panel in stage["panels"]] == ["soft labels"]


def test_the_closed_form_is_told_in_words() -> None:
    """It has no steps, and most of a student's score."""
    said = {"seconds": 39.0, "hidden_errors": [0.29, 0.33], "metrics": {"accuracy": 0.815}}
    assert stage_of_page("closed_form", said, "accuracy") == {
        "title": "Closed form",
        "sentences": [
            "The student was solved from its teacher in 39 s, before any training.",
            "As solved it scores accuracy 81.50.",
            "Relative error of its hidden states, layer by layer: 0.29, 0.33.",
        ],
        "panels": [],
    }


@settings(max_examples=150)
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_any_record_of_a_stage_is_shown_as_far_as_it_makes_sense(a: Any, b: Any, c: Any, d: Any) -> None:
    """A log that a crash left half written costs its panels, not the page."""
    stage = {
        "log": [a, {"step": 1, "loss": b, "x_loss": c}, {"step": d, "loss": 1.0}],
        "seconds": a,
        "steps": b,
    }
    shown = stage_of_page("intermediate", stage, "accuracy")
    assert all(points for panel in shown["panels"] for points in panel["series"].values())
    stage = {"log": b, "metrics": c, "hidden_errors": d, "seconds": None}
    assert stage_of_page("closed_form", stage, "accuracy")["sentences"]
