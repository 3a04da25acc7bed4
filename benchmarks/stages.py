"""What the stages cost beyond their training steps, through the package itself.

    python benchmarks/stages.py --data_dir GLUE --tokenizer FOLDER [--rows 1536] [--json OUT]

Teacher: BERT-base's shape, random weights; student: TinyBERT-4's; SST-2's first rows, batches of at most
4,096 tokens. Everything runs in one process, in turn, ``--rounds`` times; medians.

Intermediate stage: one epoch of ``tinybert distill`` (its ``train_runtime``, without evaluation and
checkpoints, whose time is given apart) against the bare step of ``ways.py`` over the same batches.
Prediction stage: one epoch of steps that run the teacher against one that reads its cached logits, and the
time to compute or to read them; whether students trained on computed and on read logits are equal.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_loss import cpu_name
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
)
from ways import make_step

from tinybert.data import load_data, tokenize
from tinybert.evaluation import cached_logits, with_teacher_logits
from tinybert.run_directory import RECORD
from tinybert.sampling import TokenBatchSampler
from tinybert.stages import DistillArguments, distill_task
from tinybert.student import make_student
from tinybert.trainer import DistillationConfig, DistillationTrainer

TOKENS_PER_BATCH = 4096


def write_rows(data_dir: Path, folder: Path, rows: int) -> Path:
    with open(data_dir / "SST-2" / "train.tsv", encoding="utf-8", newline="") as file:
        kept = [line for _, line in zip(range(rows), csv.DictReader(file, delimiter="\t"), strict=False)]
    path = folder / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(kept)
    return path


def write_teacher(tokenizer_dir: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig()).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "teacher")
    return folder / "teacher"


def config(folder: Path, **options: Any) -> DistillationConfig:
    return DistillationConfig(
        str(folder), tokens_per_batch=TOKENS_PER_BATCH, report_to="none", disable_tqdm=True, **options
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def intermediate(
    teacher_dir: Path, rows: Path, batches: list[Any], step: Any, folder: Path
) -> dict[str, Any]:
    """Run one epoch of the stage through the package and its bare steps; return their seconds."""
    arguments = DistillArguments(
        str(rows),
        str(rows),
        teacher=str(teacher_dir),
        init="random",
        intermediate_epochs=1.0,
        prediction_epochs=0.0,
        force=True,
    )
    half = len(batches) // 2  # the machine's speed drifts: half of the bare steps before, half after
    before, _ = timed(lambda: [step(batch) for batch in batches[:half]])
    whole, _ = timed(lambda: distill_task(arguments, config(folder)))
    after, _ = timed(lambda: [step(batch) for batch in batches[half:]])
    record = json.loads((folder / RECORD).read_text())["stages"]["intermediate"]
    logs = record["log"]
    evaluation = next(log["eval_runtime"] for log in logs if "eval_runtime" in log)
    train = next(log["train_runtime"] for log in logs if "train_runtime" in log)
    assert record["steps"] == len(batches)
    return {
        "bare_s": before + after,
        "epoch_s": train - evaluation,
        "evaluation_s": evaluation,
        "rest_of_command_s": whole - train,
    }


def prediction(
    teacher: PreTrainedModel, train: Any, tokenizer: Any, folder: Path, args: DistillationConfig
) -> dict[str, Any]:
    """Run one epoch on the teacher itself, on logits computed and on logits read; return their seconds."""
    bf16 = bool(args.bf16)
    compute_s, computed = timed(lambda: cached_logits(teacher, train, tokenizer, folder, bf16=bf16))
    read_s, read = timed(lambda: cached_logits(teacher, train, tokenizer, folder, bf16=bf16))
    students, seconds = {}, {}
    for name, logits in (("teacher", None), ("computed", computed), ("read", read)):
        student = make_student(teacher)
        trainer = DistillationTrainer(
            student,
            teacher if logits is None else None,
            args,
            args.objective(student, teacher),
            train_dataset=train if logits is None else with_teacher_logits(train, logits),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        seconds[name], _ = timed(trainer.train)
        students[name] = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    apart = (students["teacher"] - students["read"]).norm() / students["teacher"].norm()
    return {
        "teacher_s": seconds["teacher"],
        "cached_s": seconds["read"],
        "compute_logits_s": compute_s,
        "read_logits_s": read_s,
        "computed_equals_read": torch.equal(students["computed"], students["read"]),
        "weights_apart": apart.item(),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of both stages."""
    teacher_dir, path = (
        write_teacher(options.tokenizer, folder),
        write_rows(options.data_dir, folder, options.rows),
    )
    teacher = BertForSequenceClassification.from_pretrained(teacher_dir).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    train = tokenize(load_data(path), tokenizer, 128)
    collate = DataCollatorWithPadding(tokenizer)
    keep = ("input_ids", "attention_mask", "token_type_ids")
    batches = [
        dict(collate([{name: train[row][name] for name in keep} for row in batch]))
        for batch in TokenBatchSampler(train["length"], TOKENS_PER_BATCH, seed=0)
    ]
    step = make_step("d", teacher.base_model)
    step(batches[0])  # warms up
    rounds: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        figures = intermediate(teacher_dir, path, batches, step, folder / f"run{turn}")
        args = replace(config(folder / f"prediction{turn}", num_train_epochs=1), save_strategy="no")
        args = replace(args, embedding_weight=0.0, hidden_weight=0.0, attention_weight=0.0)
        rounds.append(figures | prediction(teacher, train, tokenizer, folder / f"logits{turn}", args))
    result = {
        name: statistics.median(figures[name] for figures in rounds)
        for name in rounds[0]
        if name.endswith("_s")
    }
    return result | {
        "step_rate_kept": statistics.median(r["bare_s"] / r["epoch_s"] for r in rounds),
        "cached_speed_up": statistics.median(r["teacher_s"] / r["cached_s"] for r in rounds),
        "computed_equals_read": all(r["computed_equals_read"] for r in rounds),
        "weights_apart": max(r["weights_apart"] for r in rounds),
        "steps": len(batches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="GLUE folder: SST-2/train.tsv")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--rows", type=int, default=1536, help="rows of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="medians over so many rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    facts = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "rounds": options.rounds}
    for name, figure in (facts | figures).items():
        print(f"{name:22} {figure:.4g}" if isinstance(figure, float) else f"{name:22} {figure}")
    if options.json:
        options.json.write_text(json.dumps(facts | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
