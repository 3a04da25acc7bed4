"""The model card: metadata that the Hub reads, the run's figures, and nobody's Markdown or YAML."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from test_report import HOSTILE
from test_summary import HOSTILE as JUNK
from test_summary import RECORD, STUDENT, changed, lines_of
from tinybert.model_card import is_unedited, model_card, origins, pipeline_task
from tinybert.summary import Line


def card_of(record: dict[str, Any], name: str = "student", lines: list[Line] | None = None) -> str:
    return model_card(record, lines or lines_of(record), name, "BertForSequenceClassification")


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    return found


def test_the_hub_reads_the_score_and_what_the_model_is() -> None:
    """Its pages, searches and leaderboards are made of this."""
    card = card_of(changed(origins={"base_model": "bert-base-uncased", "dataset": "nyu-mll/glue"}))
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert (data.base_model, data.datasets) == ("bert-base-uncased", ["nyu-mll/glue"])
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.891, "dev.csv")
    assert {"language", "license"}.isdisjoint(metadata(card)), "nobody said"


def test_what_nobody_knows_is_left_out() -> None:
    """A wrong base model is worse than none."""
    found = metadata(card_of(RECORD))
    assert {"base_model", "datasets"}.isdisjoint(found)
    unscored = changed(metric=None, models=[STUDENT], arguments={"corpus": ["a.txt"], "teacher": "t"})
    assert {"model-index", "metrics"}.isdisjoint(metadata(card_of(unscored)))


def test_the_card_has_the_figures_the_limits_and_the_command() -> None:
    """It is all that most people who take a model ever read of it."""
    card = card_of(RECORD)
    assert "keeps 99.0% of its teacher's accuracy (89.10 against 90.00)" in card
    assert "| student | 89.10 | 99.0% | 11.00 M | 44.0 MB | 62 s |" in card
    assert "It learned from train.csv (7000 rows)" in card
    assert "at most 64 word pieces" in card
    assert "tinybert distill --teacher 'runs/my teacher'" in card
    assert 'pipeline("text-classification", model="student")' in card
    assert "int8" not in card
    lines = [*lines_of(RECORD), Line("student int8", 0.88)]
    assert "The int8 file answers some rows otherwise" in card_of(RECORD, lines=lines)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.isprintable()])
def test_names_of_files_and_folders_stay_names(text: str) -> None:
    """A card is rendered on a public page."""
    record = deepcopy(RECORD)
    record["data"]["train"]["source"] = record["data"]["eval"]["source"] = text
    record["arguments"]["teacher"] = record["command"][-1] = text
    card = card_of(record, name=text)
    metadata(card)
    text_of_card = card.split("\n---\n", 1)[1].rpartition("<!-- Written")[0]
    outside = "".join(text_of_card.split("```")[::2])
    code = "".join(outside.split("`")[::2]).replace("\\<", "")
    assert "<script" not in code
    assert "<img" not in code


@settings(max_examples=200)
@given(
    st.sampled_from(["arguments", "data", "origins", "versions", "command", "metric", "models"]), JUNK, JUNK
)
def test_any_record_has_a_card(key: str, one: Any, other: Any) -> None:
    """The card is written with the model: one that fails would lose the run."""
    changes: dict[str, Any] = {
        "arguments": {"teacher": one, "max_length": other, "baseline": one},
        "data": {"train": {"source": one, "rows": other}, "eval": {"source": other, "rows": one}},
        "origins": one if isinstance(one, list) else {"base_model": one, "dataset": other},
        "versions": {},
        "command": [str(one), str(other)],
        "metric": str(one),
        "models": [STUDENT | {"name": str(one), "metrics": {"accuracy": 1e17}}],
    }
    record = changed(**{key: changes[key]})
    card = card_of(record, name=str(other) or "x")
    assert is_unedited(card)
    assert metadata(card)["library_name"] == "transformers"


def test_an_edited_card_is_known_from_one_of_ours() -> None:
    """Whoever wrote a paragraph about their data must find it again."""
    card = card_of(RECORD)
    assert is_unedited(card)
    assert not is_unedited(card.replace("## Limits", "## Limits, and what we found"))
    assert not is_unedited(card + "\nMore.")
    assert not is_unedited("# Mine\n")


def test_hub_names_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/teacher` looks like a hub name, and is a folder."""
    monkeypatch.chdir(tmp_path)
    assert origins({"teacher": "bert-base-uncased", "train": "glue/sst2"}) == {
        "base_model": "bert-base-uncased",
        "dataset": "nyu-mll/glue",
    }
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    assert origins({"teacher": "runs/teacher", "train": "/data/train.csv"}) == {}
    for content, expected in (("{", {}), ("[]", {}), (json.dumps({"origins": {"base_model": "a b"}}), {})):
        (tmp_path / "runs" / "teacher" / "run.json").write_text(content)
        assert origins({"teacher": "runs/teacher"}) == expected
    (tmp_path / "runs/teacher/run.json").write_text(json.dumps({"origins": {"base_model": "owner/base"}}))
    assert origins({"teacher": "runs/teacher"}) == {"base_model": "owner/base"}


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_pipeline_is_that_of_the_model(architecture: str, task: str) -> None:
    """The Hub's widget and `pipeline` go by it."""
    assert pipeline_task(architecture) == task
