"""The paper's ablations, each a line on the command: which loss is gone, and that the rest still teaches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from conftest import QUICK
from tinybert.cli import main
from tinybert.run_directory import Result
from tinybert.student import StudentSize, make_student

EMBEDDING = {"embedding_loss"}
HIDDEN = {"hidden_1_loss", "hidden_2_loss"}
ATTENTION = {"attention_1_loss", "attention_2_loss"}
ENCODER = EMBEDDING | HIDDEN | ATTENTION
SOFT, GOLD = {"prediction_loss"}, {"gold_loss"}
# Where a parameter must not move by what is left: the head by states, layers by embeddings, and the last
# layer's values and feed-forward block by its own scores.
HEAD, LAYERS, LAST_VALUES = ("classifier", "pooler"), ("encoder.layer",), ("layer.1.attention.self.value",)
LAST_BLOCK = ("layer.1.intermediate", "layer.1.output", "layer.1.attention.output", *LAST_VALUES)
ALONE = ["--prediction_epochs", "0"]

# Options; parts of the intermediate and of the prediction stage; what keeps its start.
ABLATIONS: dict[str, tuple[list[str], set[str], set[str], tuple[str, ...]]] = {
    "nothing": ([], ENCODER, SOFT, ()),
    "prediction": (ALONE, ENCODER, set(), HEAD),
    "soft labels": (["--prediction_weight", "0", "--gold_weight", "1"], ENCODER, GOLD, ()),
    "embeddings": (["--embedding_weight", "0", *ALONE], HIDDEN | ATTENTION, set(), HEAD),
    "hidden states": (["--hidden_weight", "0", *ALONE], EMBEDDING | ATTENTION, set(), (*HEAD, *LAST_BLOCK)),
    "attention": (["--attention_weight", "0", *ALONE], EMBEDDING | HIDDEN, set(), HEAD),
    "scores": (["--attention_compares", "probabilities", *ALONE], ENCODER, set(), HEAD),
    "Transformer losses": (
        ["--hidden_weight", "0", "--attention_weight", "0", *ALONE],
        EMBEDDING,
        set(),
        (*HEAD, *LAYERS),
    ),
    "all of the intermediate stage": (["--intermediate_epochs", "0"], set(), SOFT, ()),
}


def command(toy: dict[str, str], teacher: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Two steps a stage from a random start; what the run recorded."""
    plain = {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_length": 16, "init": "random"}
    plain |= {name: value for name, value in QUICK.items() if name != "disable_tqdm"}
    plain |= {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "intermediate_learning_rate": 5e-3}
    plain |= {"teacher": teacher, **toy, "output_dir": folder, "prediction_learning_rate": 5e-3}
    line = [part for name, value in plain.items() for part in (f"--{name}", str(value))]
    assert main(["distill", *line, *options]) == 0
    return json.loads((folder / "run.json").read_text())


def parts(stage: dict[str, Any]) -> dict[str, float]:
    """The parts of the first step's loss."""
    return {name: value for name, value in stage["log"][0].items() if name.endswith("_loss")}


@pytest.mark.parametrize("name", ABLATIONS)
def test_what_is_switched_off_is_gone_and_the_student_moves_by_the_rest(
    name: str, tmp_path: Path, toy: dict[str, str], taught: Result
) -> None:
    """A switch that does nothing makes a row of the paper's table that is wrong and looks right."""
    options, intermediate, prediction, still = ABLATIONS[name]
    record = command(toy, taught.output_dir, tmp_path / "student", *options)
    stages = record["stages"]
    assert set(stages) == {
        stage for stage, wanted in (("intermediate", intermediate), ("prediction", prediction)) if wanted
    }
    for stage, wanted in (("intermediate", intermediate), ("prediction", prediction)):
        if wanted:
            assert set(parts(stages[stage])) == wanted
            assert min(parts(stages[stage]).values()) > 0
    teacher = AutoModelForSequenceClassification.from_pretrained(taught.output_dir)
    start = make_student(teacher, StudentSize(2, 16, 32), init="random").state_dict()
    after = load_file(tmp_path / "student" / "model.safetensors")
    moved = {key for key, value in after.items() if not torch.equal(value, start[key])}
    held = {key for key in after if any(part in key for part in still)}
    # A key's bias adds the same to all scores of a query, which softmax takes away.
    assert moved >= {key for key in after if key not in held and "key.bias" not in key}
    assert not moved & held


def test_each_mapping_teaches_from_the_layers_it_names(
    tmp_path: Path, toy: dict[str, str], taught: Result
) -> None:
    """Mapped otherwise than said, the paper's comparison of mappings compares a mapping with itself."""
    mappings = {"top": ["top"], "2 3": ["2", "3"], "bottom": ["bottom"], "1 2": ["1", "2"]}
    found = {
        name: parts(
            command(
                toy, taught.output_dir, tmp_path / name, "--layer_map", *mapping, "--prediction_epochs", "0"
            )["stages"]["intermediate"]
        )
        for name, mapping in mappings.items()
    }
    assert found["top"] == found["2 3"]
    assert found["bottom"] == found["1 2"]
    different = {name for name in ENCODER if found["top"][name] != found["bottom"][name]}
    assert different == HIDDEN | ATTENTION, "the embeddings have but one layer to be like"


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (
            ["--embedding_weight", "0", "--hidden_weight", "0", "--attention_weight", "0"],
            "--intermediate_epochs 0",
        ),
        (["--prediction_weight", "0"], "--prediction_epochs 0"),
    ],
)
def test_a_stage_without_any_loss_is_refused_and_told_how_to_be_left_out(
    options: list[str],
    left_out: str,
    tmp_path: Path,
    toy: dict[str, str],
    taught: Result,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would run for hours and change nothing."""
    line = ["--teacher", str(taught.output_dir), "--train", toy["train"], "--eval", toy["eval"]]
    line += [
        "--output_dir",
        str(tmp_path / "out"),
        "--layers",
        "2",
        "--hidden_size",
        "16",
        "--use_cpu",
        "True",
    ]
    line += ["--intermediate_size", "32", "--max_length", "16", "--report_to", "none"]
    assert main(["distill", *line, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "every loss weight is 0, so nothing would be trained: give at least one a weight" in error
    assert left_out in error
    assert not (tmp_path / "out").exists()
