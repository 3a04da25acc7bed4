"""Figures that people choose a model by: operations against torch's counter, every number's meaning."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, MPNetConfig, PreTrainedModel

from conftest import PIECES
from tinybert import benchmark
from tinybert.benchmark import BenchmarkArguments, measure, recommend, table
from tinybert.cli import main
from tinybert.errors import InputError
from tinybert.export import ExportArguments, to_onnx
from tinybert.flops import forward_flops
from tinybert.footprint import peak_memory
from tinybert.run_directory import Result

_SIZES: dict[str, Any] = {
    "vocab_size": len(PIECES),
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 66,
}
OTHER_FAMILIES = {"albert": AlbertConfig(**_SIZES, embedding_size=16), "mpnet": MPNetConfig(**_SIZES)}


@pytest.fixture(scope="module")
def served(taught: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both ONNX files."""
    folder = shutil.copytree(taught.output_dir, tmp_path_factory.mktemp("served") / "served")
    to_onnx(ExportArguments(str(folder), int8=True))
    return folder


@pytest.mark.parametrize("head", ["", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "albert", "mpnet"])
def test_operations_are_those_that_torch_counts(
    family: str, head: str, tiny_encoder: Callable[..., PreTrainedModel]
) -> None:
    """A formula that forgets the head or a projection favours the model that has it."""
    config = OTHER_FAMILIES[family] if family in OTHER_FAMILIES else tiny_encoder(family).config
    model = getattr(transformers, f"AutoModel{head}").from_config(config, attn_implementation="eager").eval()
    for batch, length in ((1, 7), (3, 20)):
        ids = torch.ones(batch, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        assert forward_flops(model, batch, length) == counter.get_total_flops() > 0


def test_operations_of_other_attention_are_not_guessed() -> None:
    """DeBERTa multiplies positions too: a plain formula would call it cheap."""
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**_SIZES))
    assert forward_flops(model, 1, 8) is None


def test_weights_in_several_files_are_counted_together(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard alone would make a big model look small."""
    monkeypatch.setattr(benchmark, "_VISIT_SECONDS", 0.01)
    folder = shutil.copytree(served, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(served)
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    options = {"batch_size": [1], "length": [4], "rounds": 1, "memory": False, "backend": ["torch"]}
    (row,) = measure(BenchmarkArguments([str(folder)], **options))["rows"]
    assert row["file_bytes"] == sum(shard.stat().st_size for shard in shards)


def test_models_are_called_by_what_tells_them_apart() -> None:
    """Two folders called student are one name for two models."""
    names = benchmark._short_names(["runs/a/student", "runs/b/student", "teacher/", "owner/name"])
    assert list(names.values()) == ["a/student", "b/student", "teacher", "name"]
    assert benchmark._short_names(["student", "runs/student"]) == {
        "student": "student",
        "runs/student": "runs/student",
    }


def test_everything_is_measured_in_turn(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures without their machine, or of one backend under another's name, mislead."""
    monkeypatch.setattr(benchmark, "_VISIT_SECONDS", 0.01)
    output = tmp_path / "figures.json"
    before = torch.get_num_threads()
    result = measure(
        BenchmarkArguments(
            [str(served)], batch_size=[2, 1], length=[4], rounds=3, bf16=True, memory=False, json=str(output)
        )
    )
    assert torch.get_num_threads() == before
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert [row["backend"] for row in result["rows"]] == ["torch", "torch_bf16", "onnx", "onnx_int8"]
    files = ["model.safetensors"] * 2 + ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    assert [row["file_bytes"] for row in result["rows"]] == [(served / f).stat().st_size for f in files]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(served)
    for row in result["rows"]:
        assert row["parameters"] == sum(part.numel() for part in model.parameters())
        assert [(load["batch_size"], load["length"]) for load in row["loads"]] == [(1, 4), (2, 4)]
        for load in row["loads"]:
            assert load["calls"] >= 3
            assert 0 < load["p50"] <= load["p90"]
            assert load["texts_per_second"] == pytest.approx(load["batch_size"] / load["p50"])
            assert load["flops"] == forward_flops(model, load["batch_size"], 4)
    assert [load["speedup"] for load in result["rows"][0]["loads"]] == [1, 1]
    assert result["machine"]["cpu"]
    assert result["machine"]["threads"] == 1
    assert {"torch", "onnxruntime", "python"} <= result["machine"]["versions"].keys()
    shown = table(result)
    assert result["machine"]["cpu"] in shown
    assert shown.count("onnx_int8") >= 3
    assert "batch 2, length 4" in shown


def test_the_order_changes_from_round_to_round(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever always runs after the largest model always finds cold caches."""
    turns: list[str] = []
    monkeypatch.setattr(benchmark, "_MOST_CALLS", 1)  # beside the one that is not counted

    def noting(model: Any, backend: str) -> Callable[[object], None]:
        return lambda ids: turns.append("torch")

    monkeypatch.setattr(benchmark, "_torch_run", noting)
    monkeypatch.setattr(benchmark, "_onnx_run", lambda file, threads: lambda ids: turns.append(file.name))
    measure(BenchmarkArguments([str(served)], batch_size=[1], length=[4], rounds=8, memory=False))
    rounds = [tuple(turns[start : start + 6 : 2]) for start in range(0, len(turns), 6)]
    assert len(rounds) == 8
    assert all(set(each) == {"torch", "model.onnx", "model_quantized.onnx"} for each in rounds)
    assert len(set(rounds)) > 2


def test_the_fastest_backend_is_recommended_for_each_load() -> None:
    """Which one is fastest differs between one short text and a batch of long ones."""

    def row(model: str, backend: str, *seconds: float) -> dict[str, Any]:
        sizes = ((1, 16), (32, 128))
        loads = [
            {"batch_size": batch, "length": length, "p50": taken}
            for (batch, length), taken in zip(sizes, seconds, strict=True)
        ]
        return {"model": model, "backend": backend, "loads": loads}

    rows = [row("a", "torch", 3.0, 2.0), row("a", "onnx", 1.0, 4.0), row("b", "torch", 0.5, 0.5)]
    picked = [
        (pick["model"], pick["length"], pick["backend"], pick["times_slowest"]) for pick in recommend(rows)
    ]
    assert picked == [
        ("a", 16, "onnx", 3.0),
        ("a", 128, "torch", 2.0),
        ("b", 16, "torch", 1),
        ("b", 128, "torch", 1),
    ]


def test_memory_is_that_of_a_fresh_process(served: Path) -> None:
    """The memory of this process is that of all models at once, and of pytest."""
    onnx = peak_memory("onnx_int8", served / "onnx" / "model_quantized.onnx", 1, 8, 1)
    plain = peak_memory("torch", served, 1, 8, 1)
    assert onnx is not None
    assert plain is not None
    # ONNX Runtime and numpy without torch: what a server of the file needs.
    assert 20e6 < onnx < 0.6 * plain
    assert peak_memory("onnx", served / "absent.onnx", 1, 8, 1) is None


BAD: dict[str, tuple[list[str], str]] = {
    "no folder": (["--models", "{s}/absent"], "there is no model folder"),
    "backend": (["--models", "{s}", "--backend", "tensorrt"], "--backend is ['tensorrt']: expected torch"),
    "no file": (
        ["--models", "{p}", "--backend", "onnx_int8", "--length", "8"],
        "tinybert export --model",
    ),
    "length": (["--models", "{s}", "--length", "65"], "--length is 65: "),
    "no length": (["--models", "{s}", "--length", "0"], "--length is [0]: expected"),
    "rounds": (["--models", "{s}", "--rounds", "0"], "--rounds is 0: expected"),
    "batch": (["--models", "{s}", "--batch_size", "many"], "invalid int value: 'many'"),
    "output": (["--models", "{s}", "--length", "8", "--json", "{s}/absent/x.json"], "cannot write --json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str,
    served: Path,
    taught: Result,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Minutes of measuring must not end in a traceback."""
    monkeypatch.setattr(benchmark, "_VISIT_SECONDS", 0.0)
    words, message = BAD[name]
    filled = [word.replace("{s}", str(served)).replace("{p}", str(taught.output_dir)) for word in words]
    few = [] if "--rounds" in filled else ["--rounds", "1"]
    assert main(["benchmark", *filled, *few, "--memory", "false"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_file_that_is_no_onnx_is_named(served: Path, tmp_path: Path) -> None:
    """ONNX Runtime speaks of protocol buffers; the user needs the path."""
    folder = shutil.copytree(served, tmp_path / "damaged")
    (folder / "onnx" / "model.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(InputError, match=r"cannot open .*damaged/onnx/model.onnx in ONNX Runtime"):
        measure(BenchmarkArguments([str(folder)], length=[8], memory=False))
