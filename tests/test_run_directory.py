"""The run directory: claimed only when it may be, filled whole, resumed where it stopped."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import TrainingArguments

from conftest import make_masked_lm
from tinybert.errors import InputError
from tinybert.run_directory import (
    CHECKPOINTS,
    PAGE,
    RECORD,
    Figures,
    Result,
    Run,
    check_claimable,
    file_size,
    run_record,
    write_whole,
)
from tinybert.training import TrainingConfig


@dataclass
class Arguments:
    """Stands for a command's dataclass."""

    model: str = "m"


def make_run(folder: Path | str, **options: object) -> Run:
    overwrite = bool(options.pop("overwrite", False))
    config = TrainingArguments(str(folder), use_cpu=True, report_to="none", **options)  # type: ignore[arg-type]
    config.overwrite_output_dir = overwrite
    return Run(config, Arguments(), inputs=[])


def test_a_folder_that_is_not_there_or_empty_may_be_claimed_and_is_not_made_by_the_check(
    tmp_path: Path,
) -> None:
    """A check that makes the folder leaves litter behind every mistyped option."""
    check_claimable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    check_claimable(tmp_path)


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    """One line instead of an OSError after the training."""
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match=r"the output .*out is a file: give a folder"):
        check_claimable(tmp_path / "out")


@pytest.mark.parametrize("name", [".", "model", "model/deep/train.csv"])
@pytest.mark.parametrize("allowed", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_holds_an_input_is_refused_even_to_overwrite(
    tmp_path: Path, name: str, allowed: dict[str, bool]
) -> None:
    """Overwriting the teacher while reading it destroys what cannot be made again."""
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "train.csv").write_text("x")
    with pytest.raises(InputError, match=r"holds the input .*: choose another output folder"):
        check_claimable(tmp_path, inputs=[str(tmp_path / name)], **allowed)
    check_claimable(tmp_path / "model" / "other", inputs=[str(tmp_path / name), "owner/hub-name"])


def test_a_link_to_an_input_is_seen_through(tmp_path: Path) -> None:
    """The same folder by another name."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "teacher")
    with pytest.raises(InputError, match="holds the input"):
        check_claimable(tmp_path / "link", inputs=[str(tmp_path / "teacher")])


def test_a_folder_with_something_in_it_needs_to_be_said(tmp_path: Path) -> None:
    """Whoever forgets to change the output folder keeps the earlier model."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not empty: choose another, or add --overwrite_output_dir true or"):
        check_claimable(tmp_path)
    check_claimable(tmp_path, overwrite=True)
    check_claimable(tmp_path, resume=True)


def test_a_run_stopped_before_its_first_checkpoint_leaves_its_folder_free(tmp_path: Path) -> None:
    """Nothing can be lost there, and the same command is to work again."""
    make_run(tmp_path).claim()
    check_claimable(tmp_path)
    (tmp_path / CHECKPOINTS / "finetune" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / CHECKPOINTS / "finetune" / "checkpoint-1" / "model.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"true or --resume_from_checkpoint true$"):
        check_claimable(tmp_path)
    with pytest.raises(InputError, match=r"or add --overwrite_output_dir true$"):
        check_claimable(tmp_path, resume=None)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    """It would train nothing and say it did."""
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(InputError, match="is finished: nothing to resume"):
        check_claimable(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out at the end, it would cost the whole training."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=rf"cannot be made: {tmp_path} is not writable"):
        check_claimable(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_strategy": "no"}, "--save_strategy no would leave no model to choose: give epoch or steps"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps: .* give --save_strategy steps"),
        ({"metric_for_best_model": "f1"}, "--metric_for_best_model f1: the task's own metric chooses"),
    ],
)
def test_a_schedule_that_stages_would_not_keep_is_refused(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    """Overridden without a word, it would cost whoever relies on it hours."""
    with pytest.raises(InputError, match=message):
        Run(TrainingConfig(str(tmp_path), use_cpu=True, report_to="none", **options), None, ())


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_stages_are_evaluated_when_they_are_saved(tmp_path: Path, strategy: str) -> None:
    """As often as was asked for."""
    config = TrainingConfig(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy=strategy, save_steps=7
    )
    stage = Run(config, None, ()).stage_config("prediction", config, best="f1")
    assert (stage.eval_strategy, stage.save_strategy, stage.eval_steps) == (strategy, strategy, 7)


def test_overwriting_removes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    """A folder of somebody's notes must survive; an old record or page beside a new model would lie."""
    for name in (
        f"{CHECKPOINTS}/finetune/checkpoint-3/model.safetensors",
        "notes/mine.txt",
        "mine.txt",
        RECORD,
        PAGE,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    run = make_run(tmp_path, overwrite=True)
    assert (tmp_path / RECORD).exists(), "the check alone removes nothing"
    run.claim()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"notes/mine.txt", "mine.txt", f"{CHECKPOINTS}/settings.json"}


def test_a_run_goes_on_with_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    """Half of the steps at one rate and half at another make a model that no command describes."""
    make_run(tmp_path, learning_rate=1e-4).claim()
    again = {"resume_from_checkpoint": "true", "logging_steps": 7, "per_device_train_batch_size": 2}
    make_run(tmp_path, learning_rate=1e-4, **again).claim()
    with pytest.raises(InputError, match=r"begun with learning_rate 0.0001, and is to go on with 0.0002"):
        make_run(tmp_path, learning_rate=2e-4, **again).claim()
    with pytest.raises(InputError, match=r"begun with bf16 False, and is to go on with True"):
        make_run(tmp_path, learning_rate=1e-4, bf16=True, **again).claim()
    kept = tmp_path / CHECKPOINTS / "settings.json"
    for damaged in ("{", "3", "[1]"):
        whole = kept.read_text()
        kept.write_text(damaged)
        with pytest.raises(InputError, match="was begun with, is damaged"):
            make_run(tmp_path, learning_rate=1e-4, **again).claim()
        kept.write_text(whole)
    for more in ({"overwrite": True}, again):
        settled = make_run(tmp_path, learning_rate=2e-4, **more)
        settled.arguments = Arguments("found out after the check, such as the length of rows")
        settled.claim()


@pytest.mark.parametrize("word", [None, "false", "False", ""])
def test_resuming_has_to_be_asked_for(tmp_path: Path, word: str | None) -> None:
    """``--resume_from_checkpoint false`` means no."""
    assert not make_run(tmp_path, resume_from_checkpoint=word).resume
    assert make_run(tmp_path, resume_from_checkpoint="true").resume


def test_no_output_folder_is_an_error() -> None:
    """transformers would write into ``trainer_output``, wherever one stands."""
    with pytest.raises(InputError, match="no output folder was given: add --output_dir"):
        TrainingConfig()


def test_an_interrupted_write_leaves_the_old_files(tmp_path: Path) -> None:
    """A model file that is half old and half new opens, and answers nonsense."""
    (tmp_path / "model").write_text("old")

    def write(folder: Path) -> None:
        (folder / "model").write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path, write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"model": "old"}


def test_writing_needs_nothing_outside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output folder that is a mount: nothing can be renamed into it from its parent."""
    target, used = tmp_path / "mount", []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (used.append((old, new)), replace(old, new)))
    write_whole(target, lambda folder: (folder / "model").write_text("new"))
    assert (target / "model").read_text() == "new"
    assert used
    assert all(Path(path).is_relative_to(target) for pair in used for path in pair)
    assert [path.name for path in target.iterdir()] == ["model"]
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


def test_the_table_shows_each_model_once_with_its_metric_in_percent() -> None:
    """The table is what the user takes away."""
    teacher = Figures("teacher", {"accuracy": 0.91236}, 22_713_216, 90_852_864)
    student = Figures("student", {"accuracy": 0.9}, 14_350_000, 57_400_000, seconds=61.4)
    lines = Result(Path("out"), "accuracy", (teacher, student)).table().splitlines()
    assert [line.split() for line in lines] == [
        ["accuracy", "parameters", "file", "time"],
        ["teacher", "91.24", "22.71", "M", "90.9", "MB"],
        ["student", "90.00", "14.35", "M", "57.4", "MB", "61", "s"],
    ]
    assert len({len(line) for line in (lines[0], lines[2])}) == 1


def test_an_error_is_no_percentage() -> None:
    """The same figure stands below as 0.4443, and 44.43 reads like a score."""
    student = Figures("student", {"hidden_error": 0.44431}, 1_000_000, 4_000_000)
    assert Result(Path("out"), "hidden_error", (student,)).table().splitlines()[1].split()[1] == "0.4443"


def test_run_settings_can_be_written_as_json(tmp_path: Path) -> None:
    """A setting that json does not know would lose the run at its last step."""
    run = make_run(tmp_path)
    training = run.config.to_sanitized_dict()
    made = run_record(run.arguments, Result(tmp_path, "accuracy", ()), 1.0, {}, training=training)
    record = json.dumps(made, default=str)
    assert json.loads(record)["training"]["seed"] == 42
    assert set(json.loads(record)) >= {
        "arguments",
        "training",
        "versions",
        "data",
        "models",
        "stages",
        "seconds",
    }


def test_a_record_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is pushed to the hub as it is, and with it the token that was typed to push it."""
    monkeypatch.setattr("sys.argv", ["tinybert", "distill", "--hub_token", "hf_secret", "--seed=1"])
    record = run_record(Arguments(), Result(tmp_path, "accuracy", ()), 1.0, {})
    assert record["command"] == ["tinybert", "distill", "--hub_token", "...", "--seed=1"]


def test_the_size_of_a_file_counts_shared_weights_once(tmp_path: Path) -> None:
    """A masked LM's head shares the embeddings: counted twice, a student seems a third larger than it is."""
    model = make_masked_lm()
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk - 8000 < file_size(model) < on_disk
