"""Batches under a token budget; training that survives SIGTERM, NaN and a full disk."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, PreTrainedModel, TrainerCallback, TrainerState

from tinybert.checkpoints import last_whole
from tinybert.errors import InputError
from tinybert.training import EncoderTrainer, TrainingConfig


def test_forward_is_in_full_precision_again_after_training_in_bf16(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Scores reported after training must be those of the saved model, not of bfloat16 left around it."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_encoder("bert").config)
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}
    config = TrainingConfig(
        str(tmp_path), bf16=True, max_steps=1, train_sampling_strategy="random", disable_tqdm=True
    )
    EncoderTrainer(model=model, args=config, train_dataset=[row] * 4).train()
    fresh = BertForSequenceClassification(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        wanted, got = fresh(ids).logits, model.eval()(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = fresh(ids).logits.float()
    assert torch.equal(got, wanted)
    assert not torch.equal(rounded, wanted)  # else this test could not fail


def test_an_encoder_still_shows_its_hidden_states_after_training_in_bf16(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """accelerate's own unwrapping takes off what collects them: a second stage would find none."""

    class Trainer(EncoderTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> torch.Tensor:
            return model(inputs["input_ids"]).last_hidden_state.square().mean()

    model = tiny_encoder("bert")
    config = TrainingConfig(
        str(tmp_path), bf16=True, max_steps=1, train_sampling_strategy="random", disable_tqdm=True
    )
    Trainer(model=model, args=config, train_dataset=[{"input_ids": [5, 6, 7]}] * 4).train()
    shown = model(torch.arange(5, 15)[None], output_hidden_states=True).hidden_states
    assert shown is not None
    assert [states.dtype for states in shown] == [torch.float32] * 4


def test_one_process_takes_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' DataParallel runs replicas in threads, and they would capture each other's states."""
    monkeypatch.setattr(TrainingConfig, "_setup_devices", torch.device("cpu"), raising=False)
    monkeypatch.setattr(TrainingConfig, "_n_gpu", 4, raising=False)
    assert TrainingConfig(str(tmp_path)).n_gpu == 1


def test_float16_is_refused_where_it_would_be_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate leaves float16 out on a processor and says nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--fp16 needs a GPU"):
        TrainingConfig(str(tmp_path), fp16=True)


ROW = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}


def classifier(tiny_encoder: Callable[..., PreTrainedModel]) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_encoder("bert").config)


def training(folder: Path, **options: Any) -> TrainingConfig:
    usual = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "report_to": "none"}
    return TrainingConfig(str(folder), **usual | {"save_strategy": "steps", "save_steps": 2} | options)


class At(TrainerCallback):
    """Does something at the start of one step."""

    def __init__(self, step: int, act: Callable[[Any], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.act(kwargs["model"])


@pytest.fixture
def trained(tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., EncoderTrainer]:
    """``trained(callback)``: a trainer of twelve steps, checkpoints every second, and the callback."""

    def make(*callbacks: TrainerCallback, **options: Any) -> EncoderTrainer:
        args = training(tmp_path / "out", max_steps=12, **options)
        rows = [ROW] * 48
        return EncoderTrainer(
            model=classifier(tiny_encoder), args=args, train_dataset=rows, callbacks=list(callbacks)
        )

    return make


def test_sigterm_ends_training_within_its_step_with_a_checkpoint_of_it(
    trained: Callable[..., EncoderTrainer], tmp_path: Path
) -> None:
    """A machine that is taken away says so with SIGTERM, and gives seconds."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = trained(At(5, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.stopped
    assert trainer.state.global_step == 5
    assert last_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-5"
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = trained()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert (resumed.state.global_step, resumed.stopped) == (12, False)


def scored(tiny_encoder: Callable[..., PreTrainedModel], folder: Path, *callbacks: Any) -> EncoderTrainer:
    """Three epochs of four steps, each evaluated; the loss gets worse from the first on."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    epochs = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3}
    return EncoderTrainer(
        model=classifier(tiny_encoder),
        args=training(folder, **best, **epochs, learning_rate=1e-2, warmup_steps=0),
        train_dataset=[ROW] * 16,
        eval_dataset=[ROW | {"labels": 1 - ROW["labels"]}] * 4,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path, step: int
) -> None:
    """Evaluated where it was cut short, it would choose among checkpoints that the other does not have."""

    def evaluated(trainer: EncoderTrainer) -> list[tuple[int, float]]:
        return [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]

    whole = scored(tiny_encoder, tmp_path / "whole")
    whole.train()
    stopped = scored(
        tiny_encoder, tmp_path / "part", At(step, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    )
    stopped.train()
    assert stopped.state.global_step == step
    assert evaluated(stopped) == [row for row in evaluated(whole) if row[0] <= step]
    (tmp_path / "part").rename(tmp_path / "moved")
    resumed = scored(tiny_encoder, tmp_path / "moved")
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved" / f"checkpoint-{step}"))
    assert evaluated(resumed) == evaluated(whole)
    assert resumed.state.best_metric == whole.state.best_metric == evaluated(whole)[0][1]
    for mine, its in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_best_checkpoint_that_is_gone_counts_no_more(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model that is published would not be the one whose score is recorded."""
    stopped = scored(tiny_encoder, tmp_path, At(6, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    stopped.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = scored(tiny_encoder, tmp_path)
    with caplog.at_level("WARNING", "tinybert"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "the best so far, is gone" in caplog.text
    assert (resumed.state.best_global_step, Path(resumed.state.best_model_checkpoint).name) == (
        8,
        "checkpoint-8",
    )


def test_accumulated_batches_have_the_loss_of_one_big_batch(trained: Callable[..., EncoderTrainer]) -> None:
    """Summed instead, the loss would be clipped as many times harder as there are batches."""
    found = []
    for size in (8, 2):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = trained(**batches, logging_steps=1)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert np.allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_way_back(
    value: float, trained: Callable[..., EncoderTrainer], tmp_path: Path
) -> None:
    """Trained on, every weight would be NaN, and the checkpoints after it too."""

    def spoil(model: Any) -> None:
        model.classifier.bias.data.fill_(value)

    words = r"the loss is (nan|inf) at step 5 .*last good checkpoint is .*-4, and"
    with pytest.raises(InputError, match=words):
        trained(At(5, spoil)).train()
    assert last_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"


def test_weights_that_are_no_numbers_are_not_kept(
    trained: Callable[..., EncoderTrainer], tmp_path: Path
) -> None:
    """A gradient that overflowed shows in the loss of the next step only."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                kwargs["model"].classifier.weight.data[0, 0] = float("nan")

    with pytest.raises(InputError, match=r"classifier.weight is no number at step 6; .*checkpoint-4"):
        trained(Spoil()).train()
    assert last_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    """With a limit on file sizes in place of a full disk: the optimiser's file is the largest."""
    script = f"""
import os, resource, signal
from transformers import BertConfig, BertForSequenceClassification
from tinybert.errors import InputError
from tinybert.training import EncoderTrainer, TrainingConfig
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
model = BertForSequenceClassification(config)
args = TrainingConfig({str(tmp_path / "out")!r}, use_cpu=True, disable_tqdm=True, max_steps=4,
                      save_strategy="steps", save_steps=2, report_to="none")
class Full(EncoderTrainer):
    def training_step(self, *rest):
        if self.state.global_step == 2:
            size = os.path.getsize(os.path.join(args.output_dir, "checkpoint-2", "model.safetensors"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
        return super().training_step(*rest)
trainer = Full(model=model, args=args, train_dataset=[{ROW}] * 64)
try:
    trainer.train()
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "cannot write the checkpoint of step 4" in done.stdout, done.stderr[-2000:]
    assert "make room; the last good checkpoint is" in done.stdout
    assert last_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_the_best_checkpoint_is_kept_beside_the_last_ones_and_loaded_in_the_end(
    tiny_encoder: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Written aside, a checkpoint must still be known by the place it comes to."""
    losses = iter([3.0, 1.0, 4.0, 5.0, 6.0])

    class Told(EncoderTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            self.control.should_evaluate = False
            return {"eval_loss": next(losses)}

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 10}
    trainer = Told(
        model=classifier(tiny_encoder),
        args=training(tmp_path / "out", **best, metric_for_best_model="loss", greater_is_better=False),
        train_dataset=[ROW] * 40,
        eval_dataset=[ROW],
    )
    trainer.train()
    folder = tmp_path / "out"
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-4")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-10"}
    kept = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.model.state_dict().items())
    state = TrainerState.load_from_json(str(folder / "checkpoint-10" / "trainer_state.json"))
    assert state.best_model_checkpoint == str(folder / "checkpoint-4")
