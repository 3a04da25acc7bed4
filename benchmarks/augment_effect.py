"""What augmentation does to a student's score, at an equal number of training steps.

    python benchmarks/augment_effect.py --train F --eval F --teacher D --masked_lm M --word_vectors F \
        --output results.jsonl [--seeds 42 1 2]

Three ways for each seed: ``without``; ``with`` (``--copies`` copies a row); ``filtered`` (of these, those
whose label the teacher gives at least ``--keep_if_teacher_agrees``). The student starts in closed form from
the rows as they are, solved once a seed. Augmented rows are a random sample of rows and copies, as large as
the rows of all prediction epochs together, which is then one epoch: steps are equal, and no augmented row is
seen twice in a stage. Reported is the score after the last step, not of the best checkpoint, so that the
ways that are scored more often gain nothing by it.

Results are appended to the output as they come; what is there already is not run again.
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import tinybert.stages
from tinybert.augment_files import AugmentArguments, AugmentJob
from tinybert.run_directory import RECORD
from tinybert.stages import DistillArguments, distill_task
from tinybert.trainer import DistillationConfig

WAYS = ("without", "with", "filtered")


class Rows:
    """Augmented rows of every seed; words are looked up once."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the models and read the rows."""
        self.job = AugmentJob(
            AugmentArguments(
                data=options.train,
                output="never.parquet",
                masked_lm=options.masked_lm,
                word_vectors=options.word_vectors,
                copies=options.copies,
                teacher=options.teacher,
                max_length=options.max_length,
                keep_if_teacher_agrees=options.keep_if_teacher_agrees,
            )
        )
        self.table = pa.concat_tables(self.job.source.tables())

    def sample(self, way: str, seed: int, count: int, path: Path) -> None:
        """Write ``count`` rows drawn from all rows and their copies."""
        job, table, draw = self.job, self.table, random.Random(seed)
        job.augmenter.seed = seed
        texts = job.texts(table, 0)
        pool = []
        for row, copies in enumerate(job.augmenter.copies_of(texts, range(len(texts)))):
            pool += [(row, changed, is_copy) for is_copy, changed in enumerate([texts[row], *copies])]
        draw.shuffle(pool)
        labels = job.filter.labels(table, 0) if job.filter is not None else []
        chosen: list[Any] = []
        while len(chosen) < count:  # a piece at a time: the teacher is asked about no more than are needed
            piece, pool = pool[: count - len(chosen)], pool[count - len(chosen) :]
            if way == "filtered" and job.filter is not None:
                kept = job.filter.keep([[text] for _, text, _ in piece], labels[[row for row, *_ in piece]])
                piece = [entry for entry, agrees in zip(piece, kept, strict=True) if agrees or not entry[2]]
            chosen += piece
        result = table.take(pa.array([row for row, *_ in chosen]))
        for place, name in enumerate(job.columns):
            column = pa.array([text[place] for _, text, _ in chosen])
            result = result.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(result, path)


def solve_once(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Return the closed form with a memory of the last seed: its student and what else it returned."""
    known: dict[int, tuple[Any, Any]] = {}

    def solve_or_copy(teacher: Any, student: Any, *rest: Any, seed: int) -> Any:
        if seed not in known:
            solved = solve(teacher, student, *rest, seed=seed)
            known.clear()
            known[seed] = (copy.deepcopy(student.state_dict()), copy.deepcopy(solved))
        state, solved = known[seed]
        student.load_state_dict(state)
        return copy.deepcopy(solved)

    return solve_or_copy


def run(options: argparse.Namespace, rows: Rows, way: str, seed: int) -> dict[str, Any]:
    """Distil one student; return its scores and what it took."""
    intermediate, prediction = options.intermediate_epochs, options.prediction_epochs
    with tempfile.TemporaryDirectory() as scratch:
        folder, sample = Path(scratch), None
        if way != "without":
            rows.sample(way, seed, round(rows.job.rows * prediction), folder / "sample.parquet")
            sample, intermediate, prediction = (
                str(folder / "sample.parquet"),
                intermediate / prediction,
                1.0,
            )
        arguments = DistillArguments(
            options.train,
            options.eval,
            teacher=options.teacher,
            augmented=sample,
            max_length=options.max_length,
            intermediate_epochs=intermediate,
            prediction_epochs=prediction,
        )
        config = DistillationConfig(str(folder / "run"), seed=seed, report_to="none", disable_tqdm=True)
        distill_task(arguments, config)
        record = json.loads((folder / "run" / RECORD).read_text())
    metric, stages = record["metric"], record["stages"]
    scores = [log[f"eval_{metric}"] for log in stages["prediction"]["log"] if f"eval_{metric}" in log]
    return {
        "train": "/".join(Path(options.train).parts[-2:]),
        "way": way,
        "seed": seed,
        "metric": metric,
        "score": 100 * scores[-1],
        "best": 100 * max(scores),
        "teacher": 100 * record["models"][0]["metrics"][metric],
        "solved": 100 * stages["closed_form"]["metrics"][metric],
        "steps": [stages[stage]["steps"] for stage in ("intermediate", "prediction")],
        "seconds": record["seconds"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the scores by way: mean and range over seeds."""
    lines = [
        "| data | way | seeds | teacher | solved | score, mean | lowest to highest | steps |",
        "|---" * 8 + "|",
    ]
    for train in dict.fromkeys(result["train"] for result in results):
        for way in WAYS:
            found = [result for result in results if (result["train"], result["way"]) == (train, way)]
            if found:
                scores = [result["score"] for result in found]
                cells = [
                    f"{train} ({found[0]['metric']})",
                    way,
                    str(len(found)),
                    f"{found[0]['teacher']:.1f}",
                    f"{statistics.mean(result['solved'] for result in found):.1f}",
                    f"{statistics.mean(scores):.1f}",
                    f"{min(scores):.1f} to {max(scores):.1f}",
                    "+".join(map(str, found[0]["steps"])),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "eval", "teacher", "masked_lm", "word_vectors"):
        parser.add_argument(f"--{name}", required=True, help="as of tinybert distill")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file of results, appended to")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--keep_if_teacher_agrees", type=float, default=0.5)
    parser.add_argument("--intermediate_epochs", type=float, default=1.0)
    parser.add_argument("--prediction_epochs", type=float, default=2.0)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()

    def results() -> list[dict[str, Any]]:
        lines = options.output.read_text().splitlines() if options.output.exists() else []
        return [json.loads(line) for line in lines]

    train = "/".join(Path(options.train).parts[-2:])
    tinybert.distillation.solve_student = solve_once(tinybert.distillation.solve_student)
    rows = Rows(options)
    for seed in options.seeds:
        for way in options.ways:
            if (train, way, seed) not in {(r["train"], r["way"], r["seed"]) for r in results()}:
                result = json.dumps(run(options, rows, way, seed))
                with options.output.open("a") as file:
                    file.write(result + "\n")
    print(table(results()))


if __name__ == "__main__":
    main()
