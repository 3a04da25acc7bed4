"""Baselines: the same student from the same start, as many steps long, and what each of them reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import QUICK, toy_rows, write_csv
from tinybert.baselines import settle_baseline
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, distill_task
from tinybert.student import StudentSize, make_student
from tinybert.trainer import DistillationConfig
from tinybert.training import EncoderTrainer

Toy = dict[str, str]
SMALL: dict[str, Any] = {"layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_length": 16}
PARTS = {
    "finetune": {"gold_loss"},
    "soft_labels": {"prediction_loss"},
    "pkd": {"gold_loss", "prediction_loss", "patient_1_loss"},
}


def run(toy: Toy, teacher: Path, folder: Path, settings: dict[str, Any], **options: Any) -> Result:
    options = {"intermediate_epochs": 6, "prediction_epochs": 6, "prediction_learning_rate": 5e-3} | options
    arguments = DistillArguments(**toy, teacher=str(teacher), **SMALL | options)
    return distill_task(arguments, DistillationConfig(str(folder), **QUICK | {"logging_steps": 1} | settings))


def record_of(result: Result) -> dict[str, Any]:
    return json.loads((result.output_dir / "run.json").read_text())


def logged_parts(stage: dict[str, Any]) -> set[str]:
    return {name for name in stage["log"][0] if name.endswith("_loss")}


@pytest.fixture(scope="session")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy task's rows, their gold labels the opposite of what the teacher thinks."""
    folder, other = tmp_path_factory.mktemp("contrary"), {"negative": "positive", "positive": "negative"}
    rows = {"train": toy_rows(96), "eval": toy_rows(33, seed=1)}
    return {
        name: str(write_csv(folder / f"{name}.csv", [(text, other[label]) for text, label in some]))
        for name, some in rows.items()
    }


@pytest.mark.parametrize("init", ["closed_form", "random"])
@pytest.mark.parametrize("baseline", list(PARTS))
def test_a_baseline_learns_from_what_its_name_says(
    baseline: str, init: str, tmp_path: Path, toy: Toy, contrary: Toy, taught: Result
) -> None:
    """Gold labels and teacher contradict each other here, so the student's answers tell who taught it."""
    rows = contrary if baseline == "finetune" else contrary | {"eval": toy["eval"]}
    options: dict[str, Any] = {"baseline": baseline, "init": init, "force": True}
    # PKD listens to both: with the soft labels nine to one it must answer as the teacher does.
    options |= {"pkd_alpha": 0.9, "pkd_beta": 1.0} if baseline == "pkd" else {}
    result = run(rows, taught.output_dir, tmp_path / "s", {}, **options)
    assert result.figures[-1].metrics["accuracy"] >= 0.8
    assert [row.name for row in result.figures] == ["teacher", f"student, {baseline}"]
    record = record_of(result)
    assert set(record["stages"]) == {baseline} | ({"closed_form"} if init == "closed_form" else set())
    assert record["stages"][baseline]["steps"] == 6 * 12, "both stages' steps"
    assert logged_parts(record["stages"][baseline]) == PARTS[baseline]
    assert record["arguments"]["baseline"] == baseline
    assert record["models"][-1]["name"] == f"student, {baseline}"
    assert f"student, {baseline}" in (result.output_dir / "README.md").read_text()
    assert (result.output_dir / "teacher_logits").exists() == (baseline == "soft_labels")


def test_a_baseline_starts_where_the_full_job_starts_and_is_as_large(
    tmp_path: Path, toy: Toy, taught: Result
) -> None:
    """Another start or size, and the comparison would be of these."""
    teacher = AutoModelForSequenceClassification.from_pretrained(taught.output_dir)
    start = make_student(teacher, StudentSize(2, 16, 32), init="random")
    settings = {"max_steps": 1, "warmup_steps": 0}
    result = run(
        toy,
        taught.output_dir,
        tmp_path / "s",
        settings,
        baseline="finetune",
        init="random",
        intermediate_epochs=0,
        prediction_learning_rate=1e-9,
    )
    student = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    torch.testing.assert_close(dict(student.state_dict()), dict(start.state_dict()), atol=1e-6, rtol=0)
    assert any(
        not torch.equal(start.state_dict()[name], value) for name, value in student.state_dict().items()
    )


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [((6, 4), -1, (10, -1)), ((6, 4), 5, (10, 10)), ((0, 4), 5, (4, 5)), ((None, None), -1, (3, -1))],
)
def test_a_baseline_is_as_long_as_the_full_job(
    epochs: tuple[Any, Any], max_steps: int, expected: tuple[float, int], toy: Toy
) -> None:
    """Fewer steps would flatter the distilled student."""
    arguments = DistillArguments(
        **toy, teacher="t", baseline="soft_labels", intermediate_epochs=epochs[0], prediction_epochs=epochs[1]
    )
    settled, config = settle_baseline(arguments, DistillationConfig("out", **QUICK, max_steps=max_steps))
    assert settled.intermediate_epochs == 0
    assert (settled.prediction_epochs, config.max_steps) == expected


@pytest.mark.parametrize(
    ("baseline", "options"),
    [
        ("finetune", {"attention_weight": 0.0}),
        ("finetune", {"temperature": 2.0}),
        ("finetune", {"gold_weight": 0.5}),
        ("finetune", {"projection_learning_rate": 1e-3}),
        ("finetune", {"pkd_beta": 10.0}),
        ("soft_labels", {"hidden_weight": 2.0}),
        ("soft_labels", {"gold_weight": 0.5}),
        ("soft_labels", {"relation_heads": 2}),
        ("soft_labels", {"intermediate_learning_rate": 1e-3}),
        ("pkd", {"embedding_weight": 0.0}),
        ("pkd", {"prediction_weight": 0.5}),
        ("pkd", {"layer_weights": [1.0, 1.0, 1.0, 1.0]}),
        (None, {"pkd_alpha": 0.1}),
    ],
)
def test_options_that_a_baseline_would_not_read_are_refused(
    baseline: str | None, options: dict[str, Any], toy: Toy
) -> None:
    """Whoever gives one believes that it does something."""
    (name,) = options
    own = {name: value for name, value in options.items() if name in DistillArguments.__dataclass_fields__}
    arguments = DistillArguments(**toy, teacher="t", baseline=baseline, **own)
    config = DistillationConfig("out", **QUICK, **({} if own else options))
    when = f"with --baseline {baseline}" if baseline else "without --baseline pkd"
    with pytest.raises(InputError, match=f"--{name} has no meaning {when}: leave it out"):
        settle_baseline(arguments, config)


def test_the_command_says_so_in_one_line(
    toy: Toy, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On the command line it is a line and a status, before anything is opened or written."""
    options = ["--teacher", "nowhere", "--train", toy["train"], "--eval", toy["eval"], "--layer_map", "top"]
    options += ["--output_dir", str(tmp_path / "out"), "--baseline", "finetune", "--attention_weight", "0"]
    assert main(["distill", *options]) == 2
    assert capsys.readouterr().err == (
        "tinybert: error: --attention_weight has no meaning with --baseline finetune: leave it out\n"
    )
    assert not (tmp_path / "out").exists()


def test_fine_tuning_alone_has_the_models_own_dropout(
    tmp_path: Path, toy: Toy, taught: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of attention it is off while a teacher is imitated; without one it is what it always is."""
    seen: list[set[float]] = []
    original = EncoderTrainer.training_step

    def training_step(self: EncoderTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)})
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(EncoderTrainer, "training_step", training_step)
    for number, (baseline, settings) in enumerate(
        [("finetune", {}), ("soft_labels", {}), ("finetune", {"student_dropout": 0.3})]
    ):
        options = {"baseline": baseline, "init": "random", "intermediate_epochs": 0}
        run(toy, taught.output_dir, tmp_path / str(number), {"max_steps": 1} | settings, **options)
    assert seen == [{0.1}, {0.0, 0.1}, {0.3}]


def test_pkd_killed_and_resumed_ends_at_the_same_student(
    tmp_path: Path, toy: Toy, taught: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its projections are trained, too: drawn anew on resuming, the student would be another."""
    options: dict[str, Any] = {"baseline": "pkd", "intermediate_epochs": 1, "prediction_epochs": 2}
    whole = run(toy, taught.output_dir, tmp_path / "whole", {}, **options)
    original = EncoderTrainer.training_step
    steps: list[int] = []

    def training_step(self: EncoderTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 9:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EncoderTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        run(toy, taught.output_dir, tmp_path / "halves", {}, **options)
    resumed = run(toy, taught.output_dir, tmp_path / "halves", {"resume_from_checkpoint": "true"}, **options)
    first, second = ((result.output_dir / "model.safetensors").read_bytes() for result in (whole, resumed))
    assert first == second
    assert len(steps) == 9 + 12
