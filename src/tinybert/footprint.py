"""A model in a process of its own: the memory that opening and running it takes.

Run as ``python -m tinybert.footprint``, which loads nothing but what the backend needs: for ONNX no torch.
"""

import json
import subprocess
import sys
from pathlib import Path

BACKENDS = ("torch", "torch_bf16", "onnx", "onnx_int8")


def peak_memory(
    backend: str, source: str | Path, batch: int, length: int, threads: int, timeout: float = 600
) -> int | None:
    """Return the most bytes that a fresh process holds while it opens a model and runs it twice.

    Args:
        backend: One of ``BACKENDS``.
        source: The model folder, or for ONNX the file.
        batch: Texts at once.
        length: Pieces of each.
        threads: Of the matrix products.
        timeout: Seconds.

    Returns:
        None where the platform does not tell, or the process failed.
    """
    words = [sys.executable, "-m", "tinybert.footprint"]
    words += [json.dumps([backend, str(source), batch, length, threads])]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=True)
        return int(done.stdout.split()[-1]) or None
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None


def _own_peak() -> int:
    """Return this process's largest resident size in bytes; 0 where nothing tells."""
    try:  # not getrusage: on Linux a child starts with its parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(backend: str, source: str, batch: int, length: int, threads: int) -> None:
    if backend.startswith("onnx"):
        import numpy as np

        from tinybert.sessions import open_session, runner

        run = runner(open_session(Path(source), threads))
        ids = np.full((batch, length), 1, np.int64)
        for _ in range(2):
            run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        return
    import torch

    from tinybert.models import open_whole

    torch.set_num_threads(threads)
    model = open_whole(source).eval()
    if backend == "torch_bf16":
        model = model.bfloat16()
    tokens = torch.ones(batch, length, dtype=torch.long)
    with torch.inference_mode():
        for _ in range(2):
            model(input_ids=tokens, attention_mask=tokens)


if __name__ == "__main__":
    _run(*json.loads(sys.argv[1]))
    print(_own_peak())
