"""A model in use: its ONNX files, and latencies matched to the right model."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from test_summary import HOSTILE
from tinybert.errors import InputError
from tinybert.served import onnx_lines, with_latencies
from tinybert.summary import Line

LINES = [Line("teacher"), Line("student"), Line("student ONNX"), Line("student int8")]


def benchmark(tmp_path: Path, **seconds: dict[tuple[int, int], float]) -> Path:
    """A benchmark's file: seconds by load, by ``folder__backend``."""
    rows = []
    for name, loads in seconds.items():
        folder, backend = name.split("__")
        measured = [
            {"batch_size": batch, "length": length, "p50": p50, "p90": 1.0}
            for (batch, length), p50 in loads.items()
        ]
        rows.append({"model": str(tmp_path / folder), "backend": backend, "loads": measured})
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"machine": {"cpu": "EPYC", "threads": 1}, "rows": rows}))
    return path


def test_onnx_files_are_lines_of_their_own(tmp_path: Path) -> None:
    """The file that is served is not the file that was trained."""
    made = Line("student", 0.9, 100, 400)
    assert onnx_lines(tmp_path, made) == []
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"x" * 410)
    (tmp_path / "onnx" / "model_quantized.onnx").write_bytes(b"x" * 110)
    assert onnx_lines(tmp_path, made) == [
        Line("student ONNX", None, 100, 410),
        Line("student int8", None, 100, 110),
    ]


def test_each_latency_goes_to_its_model_and_backend(tmp_path: Path) -> None:
    """One text at a time and the longest length: what the slowest single answer takes."""
    loads = {(1, 16): 0.001, (1, 128): 0.004, (32, 128): 0.1}
    path = benchmark(
        tmp_path,
        teacher__torch={(1, 128): 0.2, (1, 16): 0.1},
        student__torch=loads,
        student__onnx_int8={load: p50 / 2 for load, p50 in loads.items()},
        student__torch_bf16={(1, 128): 9.0},
        stranger__torch={(1, 128): 9.0},
    )
    folders = {"teacher": tmp_path / "teacher", "student": tmp_path / "x" / ".." / "student"}
    lines, said = with_latencies(LINES, path, folders)
    assert [line.latency for line in lines] == [200.0, 4.0, None, 2.0]
    assert said == "An answer here is the one to one text of 128 word pieces: the median, 1 thread of EPYC."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read --benchmark .*Expecting"),
        ("[]", "is not what tinybert benchmark --json writes: it is .., expected an object"),
        ('{"machine": {}, "rows": [{"model": "m"}]}', "'rows' 1 has no 'backend'"),
        ('{"machine": {}, "rows": []}', "measured nothing, and none of student: give a benchmark of"),
    ],
)
def test_a_file_that_says_nothing_of_the_run_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """An option that silently does nothing is worse than an error."""
    (tmp_path / "speed.json").write_text(content)
    with pytest.raises(InputError, match=message):
        with_latencies(LINES, tmp_path / "speed.json", {"student": Path("student")})
    with pytest.raises(InputError, match="cannot read --benchmark"):
        with_latencies(LINES, tmp_path / "absent.json", {"student": Path("student")})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(HOSTILE, HOSTILE, HOSTILE)
def test_any_content_is_read_or_refused(tmp_path: Path, machine: Any, loads: Any, p50: Any) -> None:
    """Half a file, another program's file."""
    row = {"model": "student", "backend": "torch", "loads": [{"batch_size": 1, "length": 2, "p50": p50}]}
    for rows in ([row], [row | {"loads": loads}], loads):
        (tmp_path / "speed.json").write_text(json.dumps({"machine": machine, "rows": rows}))
        try:
            lines, said = with_latencies(LINES, tmp_path / "speed.json", {"student": Path("student")})
        except InputError:
            continue
        assert lines[1].latency == 1000 * p50
        assert said
