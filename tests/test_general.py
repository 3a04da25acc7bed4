"""General distillation: what it makes, and that nothing that interrupts it changes what it makes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertTokenizerFast,
    PreTrainedModel,
    TrainerCallback,
)

from conftest import FILLERS, GOOD, QUICK, make_masked_lm, run_processes
from test_models import TEACHER_WIDTH, published_projections, write_published
from tinybert import general
from tinybert.checkpoints import last_whole
from tinybert.cli import main
from tinybert.corpus_trainer import CorpusTrainer, MaskedPieces
from tinybert.errors import InputError
from tinybert.general import GeneralArguments, GeneralConfig, distill_general, layer_table
from tinybert.objective import DistillationLoss
from tinybert.run_directory import Result
from tinybert.stages import DistillArguments, distill_task
from tinybert.student import fit_projections
from tinybert.trainer import DistillationConfig
from tinybert.training import EncoderTrainer

SHAPE = {"layers": 2, "hidden_size": 16, "intermediate_size": 20}
BLOCKS = {"block_size": 16, "shuffle_buffer": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three files of documents, and one of held-out ones."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("text")
    for name, documents in (("a", 30), ("b", 20), ("c", 25), ("held_out", 12)):
        pieces = []
        for _ in range(documents):
            lines = [" ".join(draw.choices(FILLERS + GOOD, k=draw.randint(5, 25))) for _ in range(4)]
            pieces.append("\n".join(lines))
        path = folder / f"{name}.txt" if name != "held_out" else folder / "eval" / "held_out.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
    return folder


def distil(text: Path, teacher: Path, output: Path, *, held_out: bool = False, **options: Any) -> Result:
    """Run 20 steps with a checkpoint every fifth; options of both dataclasses."""
    own = {name for kind in GeneralArguments.__mro__ for name in getattr(kind, "__annotations__", ())}
    mine = {name: value for name, value in options.items() if name in own}
    rest = {name: value for name, value in options.items() if name not in own}
    arguments = GeneralArguments(
        teacher=str(teacher),
        eval_corpus=[str(text / "eval")] if held_out else None,
        **({} if "student" in options else SHAPE) | BLOCKS | {"corpus": [str(text / "*.txt")]} | mine,
    )
    usual = QUICK | {"max_steps": 20, "save_steps": 5, "logging_steps": 1, "learning_rate": 3e-3}
    return distill_general(arguments, GeneralConfig(str(output), **usual | rest))


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def uninterrupted(text: Path, start_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose weights the interrupted ones must have in the end."""
    return distil(
        text, start_folder, tmp_path_factory.mktemp("whole") / "run", student_dropout=0.1
    ).output_dir


def test_the_student_comes_nearer_to_its_teacher_on_text_it_has_not_seen(
    text: Path, start_folder: Path, tmp_path: Path
) -> None:
    """The best checkpoint by held-out text is what is published, with the errors of each layer."""
    result = distil(text, start_folder, tmp_path / "run", held_out=True, init="random", max_steps=40)
    start, student = (figures.metrics for figures in result.figures)
    for m in range(3):
        assert student[f"hidden_error_{m}"] < 0.95 * start[f"hidden_error_{m}"]
    assert student["hidden_error"] == pytest.approx(sum(student[f"hidden_error_{m}"] for m in range(3)) / 3)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    evals = [entry for entry in record["stages"]["general"]["log"] if "eval_loss" in entry]
    assert student["loss"] == min(entry["eval_loss"] for entry in evals)
    assert len(evals) == 1 + 40 // 5, "at the start, and with each checkpoint"
    short = distil(text, start_folder, tmp_path / "short", held_out=True, max_steps=3, learning_rate=0.0)
    start, student = (figures.metrics for figures in short.figures)
    assert student["loss"] == pytest.approx(start["loss"], rel=1e-6)
    assert json.loads((tmp_path / "short" / "run.json").read_text())["stages"]["general"]["best_metric"]
    assert "hidden_error_2" in layer_table(result)
    assert "attention_1_loss" in layer_table(result)


def test_relative_hidden_errors_are_those_of_the_definition(
    text: Path, start_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sums over all held-out tokens in float64, W taken from the trainer."""
    kept: list[CorpusTrainer] = []
    loop = CorpusTrainer.evaluation_loop
    monkeypatch.setattr(
        CorpusTrainer,
        "evaluation_loop",
        lambda self, *args, **kwargs: (kept.append(self), loop(self, *args, **kwargs))[1],
    )
    distil(text, start_folder, tmp_path / "run", held_out=True, max_steps=5, per_device_eval_batch_size=3)
    trainer = kept[-1]
    reported = trainer.evaluate()
    own, its, layers = [[], [], []], [[], [], []], (0, *trainer.objective.layer_map)
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            mask = batch["attention_mask"].bool()
            mine = trainer.model.eval()(**batch, output_hidden_states=True).hidden_states
            goals = trainer.teacher.eval()(**batch, output_hidden_states=True).hidden_states
            for m, g in enumerate(layers):
                own[m].append((mine[m][mask] @ trainer.objective.projections[str(m)].weight.T).double())
                its[m].append(goals[g][mask].double())
    for m in range(3):
        ours, theirs = torch.cat(own[m]), torch.cat(its[m])
        wanted = (ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()
        assert reported[f"eval_hidden_error_{m}"] == pytest.approx(wanted.item(), rel=1e-5)


def test_any_transformers_program_opens_the_result_and_a_task_goes_on_from_it(
    text: Path, start_folder: Path, uninterrupted: Path, toy: dict[str, str], taught: Result, tmp_path: Path
) -> None:
    """A plain encoder folder: no projections, no head, the teacher's tokenizer."""
    model, report = AutoModel.from_pretrained(uninterrupted, output_loading_info=True)
    assert model.config.num_hidden_layers == 2
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {path.name for path in uninterrupted.iterdir()} >= {"config.json", "tokenizer.json", "run.json"}
    assert not (uninterrupted / "checkpoints").exists()
    arguments = DistillArguments(
        **toy,
        teacher=str(taught.output_dir),
        student=str(uninterrupted),
        max_length=16,
        intermediate_epochs=1,
        prediction_epochs=1,
    )
    result = distill_task(arguments, DistillationConfig(str(tmp_path / "task"), **QUICK))
    assert result.figures[-1].metrics["accuracy"] > 0


def test_held_out_documents_of_any_length_are_evaluated_with_masked_pieces(
    text: Path, save_model: Callable[[PreTrainedModel, Path], Path], tmp_path: Path
) -> None:
    """Those shorter than a block are padded, their masked pieces too."""
    teacher = save_model(make_masked_lm(), tmp_path / "teacher")
    text = shutil.copytree(text, tmp_path / "text")
    (text / "eval" / "held_out.txt").write_text("good film fine plot\n\nbad\n\na fine good film\n" * 5)
    result = distil(
        text, teacher, tmp_path / "run", held_out=True, objective="distilbert", layers=1, init="random"
    )
    assert result.figures[-1].metrics["loss"] > 0


def test_the_losses_of_distilbert_are_learnt_on_masked_text(
    text: Path, save_model: Callable[[PreTrainedModel, Path], Path], tmp_path: Path
) -> None:
    """The result is a masked language model, and all three parts are reported."""
    teacher = save_model(make_masked_lm(), tmp_path / "teacher")
    result = distil(
        text, teacher, tmp_path / "run", held_out=True, objective="distilbert", layers=1, init="random"
    )
    start, student = (figures.metrics for figures in result.figures)
    for part in ("soft_labels_loss", "masked_lm_loss", "cosine_loss"):
        assert student[part] < start[part]
    assert result.metric == "cosine_loss"
    AutoModelForMaskedLM.from_pretrained(result.output_dir)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_published_student_goes_on_with_the_projections_it_came_with(
    layout: str,
    text: Path,
    tiny_encoder: Callable[..., PreTrainedModel],
    save_model: Callable[[PreTrainedModel, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A config without a type, ``bert.`` before the names, and ``fit_dense`` among the weights."""
    published = write_published(tmp_path / "published", layout)
    teacher = save_model(tiny_encoder("bert", hidden_size=TEACHER_WIDTH), tmp_path / "teacher")
    started: list[list[Tensor]] = []
    monkeypatch.setattr(DistillationLoss, "start_projections", lambda self, start: started.append(start))
    distil(
        text, teacher, tmp_path / "run", student=str(tmp_path / "published"), max_steps=1, learning_rate=0.0
    )
    names = ["fit_dense"] * 3 if layout == "v1" else [f"fit_denses.{m}" for m in range(3)]
    weights_in_file = published_projections(layout)
    for start, name in zip(started[0], names, strict=True):
        assert torch.equal(start, weights_in_file[name].T)
    made = AutoModel.from_pretrained(tmp_path / "run")
    for name, tensor in published.bert.encoder.state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], tensor), name


def test_projections_that_are_fitted_are_least_squares(
    tiny_encoder: Callable[..., PreTrainedModel], text: Path, tokenizer: BertTokenizerFast
) -> None:
    """Against numpy's solver over all tokens at once; padding counts for nothing."""
    teacher = tiny_encoder("bert", hidden_size=24)
    student = tiny_encoder("bert", hidden_size=16, num_hidden_layers=2, seed=1)
    lines = [line for line in (text / "a.txt").read_text().splitlines() if line]
    batches = [dict(tokenizer(lines[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 64, 8)]
    found = fit_projections(student, teacher, batches, (1, 3))
    for m, g in enumerate((0, 1, 3)):
        own, goals = [], []
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                own.append(student(**batch, output_hidden_states=True).hidden_states[m][mask].double())
                goals.append(teacher(**batch, output_hidden_states=True).hidden_states[g][mask].double())
        mine, its = torch.cat(own), torch.cat(goals)
        wanted = torch.linalg.lstsq(mine, its).solution
        error = (mine @ found[m].double() - its).square().sum()
        assert error < 1.001 * (mine @ wanted - its).square().sum()


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = EncoderTrainer.training_step

    def training_step(self: EncoderTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EncoderTrainer, "training_step", training_step)


@pytest.mark.parametrize("steps", [(3,), (7, 19), (5, 10, 11)])
def test_a_resumed_run_ends_at_the_weights_of_the_uninterrupted_one(
    steps: tuple[int, ...],
    text: Path,
    start_folder: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Order of the data, dropout and optimiser state: to the last bit, wherever it was interrupted."""
    for step in steps:
        with monkeypatch.context() as patch:
            interrupted_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                distil(
                    text, start_folder, tmp_path / "run", student_dropout=0.1, resume_from_checkpoint="true"
                )
    result = distil(text, start_folder, tmp_path / "run", student_dropout=0.1, resume_from_checkpoint="true")
    assert weights(result.output_dir) == weights(uninterrupted)


def test_other_blocks_or_another_seed_make_another_student(
    text: Path, start_folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """What the equality above is worth."""
    other = distil(text, start_folder, tmp_path / "run", student_dropout=0.1, shuffle_buffer=32)
    assert weights(other.output_dir) != weights(uninterrupted)


def files_of(folder: Path) -> set[str]:
    """Return the files under a folder, also while others come and go."""
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


def test_killed_again_and_again_it_still_ends_there(
    text: Path, start_folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments, in the middle of checkpoints too."""
    draw = random.Random(0)
    fork = multiprocessing.get_context("fork")
    stage = tmp_path / "run" / "checkpoints" / "general"
    kills = 0
    while not (tmp_path / "run" / "run.json").exists():
        before = files_of(stage)
        child = fork.Process(
            target=distil,
            args=(text, start_folder, tmp_path / "run"),
            kwargs={"student_dropout": 0.1, "resume_from_checkpoint": "true"},
        )
        child.start()
        if kills < 4:
            # By the clock a fast machine would be done, and a slow one not have begun.
            while child.is_alive() and files_of(stage) <= before:
                time.sleep(0.001)
            child.join(draw.uniform(0, 0.05))
            if child.is_alive():
                child.kill()
                kills += 1
        child.join(120)
        assert child.exitcode in (0, -signal.SIGKILL)
    assert kills
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_sigterm_keeps_all_and_exits_with_0(
    text: Path, start_folder: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the very command with one more option goes on."""
    options = {"teacher": start_folder, "corpus": text / "*.txt", "output_dir": tmp_path / "run"}
    options |= SHAPE | BLOCKS
    options |= {name: value for name, value in QUICK.items() if name != "disable_tqdm"}
    options |= {"max_steps": 20, "save_steps": 5, "learning_rate": 3e-3, "student_dropout": 0.1}
    command = ["general", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    class Terminate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 11:
                os.kill(os.getpid(), signal.SIGTERM)

    original = CorpusTrainer.__init__

    def with_signal(self: CorpusTrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Terminate())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CorpusTrainer, "__init__", with_signal)
        assert main(command) == 0
    said = capsys.readouterr().err
    assert "stopped at step 12 of 20" in said
    assert "--resume_from_checkpoint true goes on" in said
    assert last_whole(tmp_path / "run" / "checkpoints" / "general").name == "checkpoint-12"  # type: ignore[union-attr]
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    assert weights(tmp_path / "run") == weights(uninterrupted)


def test_a_loss_that_is_no_number_names_its_part(
    text: Path, start_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of a dozen parts went wrong is the first question."""
    original = CorpusTrainer.compute_loss

    def spoilt(self: CorpusTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 12:
            self.objective.projections["2"].weight.data.fill_(float("nan"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CorpusTrainer, "compute_loss", spoilt)
    with pytest.raises(InputError, match=r"the loss is nan at step 13 \(hidden_2 is nan\): .*checkpoint-10"):
        distil(text, start_folder, tmp_path / "run")


def test_another_corpus_cannot_be_resumed_with(
    text: Path, start_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps left would be counted, and the blocks dealt, from text that was never begun."""
    with monkeypatch.context() as patch:
        interrupted_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            distil(text, start_folder, tmp_path / "run")
    more = tmp_path / "text"
    more.mkdir()
    (more / "a.txt").write_text((text / "a.txt").read_text() + "\n\nthe film was great\n")
    with pytest.raises(InputError, match="corpus"):
        distil(more, start_folder, tmp_path / "run", resume_from_checkpoint="true")


def test_epochs_are_passes_over_the_corpus(text: Path, start_folder: Path, tmp_path: Path) -> None:
    """As many steps as the blocks of the passes make."""
    result = distil(text, start_folder, tmp_path / "run", max_steps=-1, num_train_epochs=2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    blocks = 0
    vocabulary = BertTokenizerFast.from_pretrained(start_folder)
    for path in text.glob("*.txt"):
        for document in path.read_text().strip().split("\n\n"):
            blocks += -(-len(vocabulary(document, add_special_tokens=False)["input_ids"]) // 14)
    assert record["stages"]["general"]["steps"] == -(-2 * blocks // 16)
    assert result.metric is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 2}, "max_length|block_size"),
        ({"block_size": 100}, "from 3 to 64"),
        ({"objective": "distilbert", "mask_probability": 0.0}, "about masked pieces"),
        ({"mask_probability": 1.5}, "above 0 and below 1, got 1.5"),
        ({"shuffle_buffer": 0}, "--shuffle_buffer must be 1 or more, got 0"),
        ({"eval_blocks": 0}, "--eval_blocks must be 1 or more, got 0"),
        ({"eval_blocks": 9}, "--eval_blocks has no meaning without --eval_corpus"),
        ({"tokens_per_batch": 512}, "--tokens_per_batch has no meaning"),
        ({"objective": "distilbert", "hidden_weight": 0.0}, "--hidden_weight has no meaning"),
        ({"save_strategy": "epoch"}, "--save_strategy has no meaning in general distillation"),
        ({"corpus": ["nowhere/*.txt"]}, r"nowhere/\*.txt"),
        ({"layers": 9}, "layers is 9"),
        ({"block_size": 128}, "--block_size is 128: it must be from 3 to 64"),
        ({"hidden_size": 18}, "not divisible"),
        ({"objective": "distilbert"}, "no masked-LM head"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    options: dict[str, Any], words: str, text: Path, start_folder: Path, tmp_path: Path
) -> None:
    """Found before anything is trained."""
    with pytest.raises(InputError, match=words) as caught:
        distil(text, start_folder, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(text: Path, start_folder: Path, tmp_path: Path) -> None:
    """Its pieces have no embedding: an index out of range, on a GPU an assertion that names nothing."""
    folder = Path(shutil.copytree(start_folder, tmp_path / "teacher"))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"teacher makes piece 25, and the model knows 25 only"):
        distil(text, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_unknown_length_needs_a_number_of_steps(
    text: Path, start_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's stream may not say how long it is."""
    monkeypatch.setattr(general, "pass_length", lambda *args, **kwargs: None)
    with pytest.raises(InputError, match="add --max_steps"):
        distil(text, start_folder, tmp_path / "run", max_steps=-1)
    assert not (tmp_path / "run").exists()


def test_masks_depend_on_the_batch_number_alone(tokenizer: BertTokenizerFast) -> None:
    """A resumed run and two processes must mask what the one run masked."""
    mask = MaskedPieces(tokenizer, 0.3, seed=1)
    ids = torch.randint(5, 20, (64, 16))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first, other = mask(batch, 3), mask(batch, 4)
    torch.manual_seed(5)
    assert all(torch.equal(first[name], again) for name, again in mask(batch, 3).items())
    assert not torch.equal(first["labels"], other["labels"])
    drawn = first["labels"] != -100
    assert torch.equal(first["labels"][drawn], ids[drawn])
    assert torch.equal(first["input_ids"][~drawn], ids[~drawn])
    assert not drawn[:, 0].any()
    assert not drawn[:, -1].any()
    assert 0.25 < drawn[:, 1:-1].float().mean() < 0.35
    shown = (first["input_ids"] == tokenizer.mask_token_id)[drawn].float().mean()
    assert 0.7 < shown < 0.9


_TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from tinybert.corpus_trainer import CorpusTrainer
from test_general import distil

seen, step = [], CorpusTrainer.training_step
def noting(self, model, inputs, *rest):
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        seen.append(ids[mask.bool()].tolist())
    return step(self, model, inputs, *rest)
CorpusTrainer.training_step = noting

text, teacher, output, size = (Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
options = {"max_steps": 50, "save_steps": 25, "per_device_train_batch_size": size}
distil(text, teacher, output, **options, **json.loads(sys.argv[6]))
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
Path(f"{output}-{rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mask_probability": 0.2}])
def test_two_processes_are_one_with_the_same_global_batch(
    options: dict[str, Any], text: Path, start_folder: Path, tmp_path: Path
) -> None:
    """Each block is seen by exactly one of them, and the loss curve and the weights are the same."""
    script = tmp_path / "run.py"
    script.write_text(_TWO_PROCESSES)
    for processes, size in ((1, 16), (2, 8)):
        output = tmp_path / f"run{processes}"
        run_processes(processes, script, text, start_folder, output, size, json.dumps(options))
    alone, together = (load_file(tmp_path / f"run{n}" / "model.safetensors") for n in (1, 2))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-4, rtol=0)
    records = [json.loads((tmp_path / f"run{n}" / "run.json").read_text()) for n in (1, 2)]
    curves = [
        [entry["loss"] for entry in record["stages"]["general"]["log"] if "loss" in entry]
        for record in records
    ]
    assert len(curves[0]) == 50
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    whole, *parts = (
        json.loads((tmp_path / name).read_text()) for name in ("run1-0.json", "run2-0.json", "run2-1.json")
    )
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(parts[0]) == len(parts[1]) == len(whole) // 2
