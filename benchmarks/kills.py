"""General distillation, killed at random moments and resumed each time, against an uninterrupted run.

    python benchmarks/kills.py --teacher D --corpus F... [--kills 10] [--max_steps 60] [-- MORE OPTIONS]

Runs ``tinybert general`` twice with the same options: once to its end; once killed by SIGKILL after random
times, in the middle of checkpoints too, and resumed. The weights must be equal to the last bit.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(options: argparse.Namespace, output: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "tinybert", "general", "--teacher", options.teacher),
        *("--corpus", *options.corpus, "--output_dir", str(output), "--max_steps", str(steps)),
        *("--save_steps", str(options.save_steps), "--student_dropout", "0.1", *options.more),
    ]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def timed_run(options: argparse.Namespace, output: Path, steps: int) -> float:
    """Run to the end; return the seconds."""
    started = time.monotonic()
    subprocess.run(command(options, output, steps), check=True, capture_output=True)
    return time.monotonic() - started


def killed_run(options: argparse.Namespace, output: Path, starting: float, training: float) -> None:
    """Kill and resume until the kills are used up, then let it end; print where each kill struck.

    Each attempt is given the time to start, and up to 1.6 times its share of the training.
    """
    draw = random.Random(options.seed)
    kills = 0
    while not (output / "run.json").exists():
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                [*command(options, output, options.max_steps), "--resume_from_checkpoint", "true"],
                stdout=said,
                stderr=said,
            )
            if kills < options.kills:
                try:
                    process.wait(starting + draw.uniform(0, 1.6) * training / options.kills)
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
            process.wait()
            stage = output / "checkpoints" / "general"
            kept = sorted(path.name for path in stage.iterdir()) if stage.exists() else []
            print(
                f"kill {kills}: exit {process.returncode}, on the disk: {', '.join(kept) or 'nothing'}",
                flush=True,
            )
            if process.returncode not in (0, -9):
                said.seek(0)
                sys.exit(said.read().decode()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="as of tinybert general")
    parser.add_argument("--corpus", nargs="+", required=True, help="as of tinybert general")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--save_steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="after --: more options of tinybert general")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="tinybert-kills-"))
    try:
        starting = timed_run(options, scratch / "short", 1)
        training = timed_run(options, scratch / "whole", options.max_steps) - starting
        print(f"{starting:.0f} s to start, {training:.0f} s for {options.max_steps} steps")
        killed_run(options, scratch / "killed", starting, max(0.0, training))
        same = digest(scratch / "whole") == digest(scratch / "killed")
        print("weights equal to the last bit" if same else "THE WEIGHTS DIFFER")
        sys.exit(not same)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
