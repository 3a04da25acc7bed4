"""ONNX files against PyTorch, and what becomes of a folder when a file is not good enough."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from transformers import AlbertConfig, BertTokenizerFast, MPNetConfig, PreTrainedModel

from conftest import PIECES, randomise
from tinybert import export, quantize
from tinybert.cli import main
from tinybert.errors import InputError, Rejected
from tinybert.export import ExportArguments, to_onnx
from tinybert.run_directory import Result
from tinybert.sessions import open_session, runner
from tinybert.stages import EvaluateArguments, evaluate

Save = Callable[[PreTrainedModel, Path], Path]


OTHERS = {"mpnet": MPNetConfig, "albert": AlbertConfig}


@pytest.fixture
def with_head(tiny_encoder: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """``with_head(family, head)``: a random model with an Auto class's head, such as ``ForMaskedLM``."""

    def make(family: str, head: str, **options: Any) -> PreTrainedModel:
        if family in OTHERS:
            sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40}
            sizes |= {"num_attention_heads": 4, "max_position_embeddings": 66, "vocab_size": len(PIECES)}
            config = OTHERS[family](**sizes, **options)
        else:
            config = tiny_encoder(family, **options).config
        return randomise(getattr(transformers, f"AutoModel{head}").from_config(config), seed=1)

    return make


@pytest.fixture
def teacher(taught: Result, tmp_path: Path) -> Path:
    """A fine-tuned model folder of the test's own."""
    return shutil.copytree(taught.output_dir, tmp_path / "teacher")


def test_as_many_classes_as_tokens_are_all_compared(with_head: Callable[..., PreTrainedModel]) -> None:
    """Class scores taken for scores of tokens would be left unread where the padding is."""
    model = with_head("bert", "ForSequenceClassification", num_labels=4)
    batch = {
        "input_ids": torch.tensor([[2, 5, 3, 0]] * 2),
        "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2),
    }
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    largest = max(1.0, np.abs(logits).max())
    logits[:, 3] += 0.5
    found = export.largest_difference(model, lambda _: {"logits": logits}, [batch])
    assert found == pytest.approx(0.5 / largest, rel=1e-4)


def test_large_outputs_are_compared_to_seven_digits(with_head: Callable[..., PreTrainedModel]) -> None:
    """A model that predicts prices is as exact as float32 is, which is not to a ten thousandth."""
    model = with_head("bert", "ForSequenceClassification", num_labels=1)
    with torch.no_grad():
        model.classifier.bias.fill_(1e5)
        batch = {
            "input_ids": torch.tensor([[2, 5, 3]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        }
        logits = model(**batch).logits.numpy() + 0.01
    found = export.largest_difference(model, lambda _: {"logits": logits}, [batch])
    assert found == pytest.approx(1e-7, rel=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", ""),
        ("bert", "ForSequenceClassification"),
        ("bert", "ForTokenClassification"),
        ("bert", "ForQuestionAnswering"),
        ("bert", "ForMaskedLM"),
        ("roberta", "ForSequenceClassification"),
        ("roberta", "ForMaskedLM"),
        ("electra", "ForSequenceClassification"),
        ("electra", "ForTokenClassification"),
        ("distilbert", "ForSequenceClassification"),
        ("distilbert", "ForQuestionAnswering"),
        ("mpnet", "ForSequenceClassification"),
        ("mpnet", "ForTokenClassification"),
        ("albert", "ForSequenceClassification"),
    ],
)
def test_a_file_answers_as_pytorch_does_at_any_size_and_padding(
    family: str, head: str, with_head: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> None:
    """A graph with a batch, a length or an absent padding frozen into it fails on the first other request."""
    model = with_head(family, head)
    exported = to_onnx(ExportArguments(str(save_model(model, tmp_path / "model"))))
    run = runner(open_session(exported.folder / "model.onnx"))
    generator = torch.Generator().manual_seed(3)
    for batch, length in ((1, 1), (5, 3), (2, 50), (7, 17)):
        ids = torch.randint(5, len(PIECES), (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, length // 2 + 1 :] = 0
        ids[mask == 0] = model.config.pad_token_id
        inputs = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            expected = model(**inputs)
        found = run(inputs)
        names = {"": {"last_hidden_state"}, "ForQuestionAnswering": {"start_logits", "end_logits"}}
        assert found.keys() == names.get(head, {"logits"})
        for name, values in found.items():
            values = values[mask.bool().numpy()] if values.shape[:2] == mask.shape else values
            wanted = expected[name][mask.bool()] if expected[name].shape[:2] == mask.shape else expected[name]
            assert np.abs(wanted.numpy() - values).max() < 1e-4
            assert values.std() > 0.01 or values.size == 1


def test_inputs_and_axes_have_names(teacher: Path) -> None:
    """Optimum and transformers.js feed a session by the names of its inputs, whatever its order is."""
    to_onnx(ExportArguments(str(teacher)))
    session = open_session(teacher / "onnx" / "model.onnx")
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    assert shapes.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(shape == ["batch", "sequence"] for shape in shapes.values())
    assert [(entry.name, entry.shape) for entry in session.get_outputs()] == [("logits", ["batch", 2])]
    names = json.loads((teacher / "config.json").read_text())["id2label"]
    assert names == {"0": "negative", "1": "positive"}
    assert not list(teacher.glob(".writing*"))


def test_the_second_text_of_a_pair_is_told_apart(teacher: Path) -> None:
    """A graph that lost its segments scores pairs as if both texts were one."""
    to_onnx(ExportArguments(str(teacher)))
    run = runner(open_session(teacher / "onnx" / "model.onnx"))
    ids = np.arange(5, 13)[None]
    first, second = (
        run({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0 + kind})
        for kind in (0, 1)
    )
    assert np.abs(first["logits"] - second["logits"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["regression", "multi_label"])
def test_every_kind_of_sequence_head_is_scored_as_in_pytorch(
    kind: str, with_head: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> None:
    """A score that pairs rows with other rows' logits looks like a loss of quality."""
    labels = {"regression": {"num_labels": 1}, "multi_label": {"num_labels": 3}}[kind]
    problem = "regression" if kind == "regression" else "multi_label_classification"
    model = with_head("bert", "ForSequenceClassification", problem_type=problem, **labels)
    folder = save_model(model, tmp_path / "model")
    words = PIECES[5:23]
    texts = [f"{words[place % 17]} {words[place % 13]} {words[place // 8]}" for place in range(30)]
    assert len(set(texts)) == len(texts)
    marks = [[f"LABEL_{place % 3}"] if kind == "multi_label" else place / 7 for place in range(30)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, marks, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    check = str(tmp_path / "rows.jsonl")
    exported = to_onnx(ExportArguments(str(folder), check=check, int8=True, max_drop=100, max_length=64))
    expected = evaluate(EvaluateArguments(str(folder), check, max_length=64))
    assert exported.metric in expected
    assert exported.scores["fp32"] == pytest.approx(expected[exported.metric], abs=1e-5)
    assert exported.scores["int8"] == pytest.approx(expected[exported.metric], abs=0.15)


def test_int8_is_smaller_and_scored(
    teacher: Path, toy: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A score of a file that is not the one on disk is a promise about nothing."""
    assert (
        main(["export", "--model", str(teacher), "--int8", "--check", toy["eval"], "--max_length", "16"]) == 0
    )
    shown = capsys.readouterr().out
    expected = evaluate(EvaluateArguments(str(teacher), toy["eval"], max_length=16))
    assert shown.count(f"{100 * expected['accuracy']:.2f}") == 2
    assert "not measured" not in shown
    sizes = {path.name: path.stat().st_size for path in (teacher / "onnx").iterdir()}
    assert sizes.keys() == {"model.onnx", "model_quantized.onnx"}
    assert sizes["model_quantized.onnx"] < sizes["model.onnx"]
    nodes = {node.op_type for node in onnx.load(teacher / "onnx" / "model_quantized.onnx").graph.node}
    assert "MatMulInteger" in nodes


def test_a_layer_that_runs_several_times_is_quantised_at_each(
    with_head: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> None:
    """Its weights reach all runs but the first through copies, which the quantiser takes for no weights."""
    model = with_head("albert", "ForSequenceClassification")
    exported = to_onnx(ExportArguments(str(save_model(model, tmp_path / "model")), int8=True))
    counts = []
    for name in ("model.onnx", "model_quantized.onnx"):
        graph = onnx.load(exported.folder / name).graph
        weights = {entry.name for entry in graph.initializer}
        counts.append(Counter(node.op_type for node in graph.node if weights & set(node.input)))
    products = counts[0]["MatMul"] + counts[0]["Gemm"]
    assert counts[1]["MatMulInteger"] == products >= model.config.num_hidden_layers * 6
    assert counts[1]["MatMul"] == 0


def test_int8_without_rows_says_that_it_is_not_measured(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody should serve a file of unknown quality without having been told."""
    assert main(["export", "--model", str(teacher), "--int8"]) == 0
    assert "What 8-bit weights cost is not measured" in capsys.readouterr().out


def test_int8_that_loses_too_much_is_not_kept(
    teacher: Path, toy: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate that reports a loss and leaves the file gets the file served."""
    to_onnx(ExportArguments(str(teacher), int8=True))

    def wreck(source: Path, target: Path, *, reduce_range: bool) -> None:
        model = onnx.load(source)
        for entry in model.graph.initializer:
            if "classifier" in entry.name:
                entry.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(entry), entry.name))
        onnx.save(model, target)

    monkeypatch.setattr(export, "quantize", wreck)
    assert (
        main(["export", "--model", str(teacher), "--int8", "--check", toy["eval"], "--max_length", "16"]) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "points of accuracy" in line
    assert "more than --max_drop 1" in line
    assert [path.name for path in (teacher / "onnx").iterdir()] == ["model.onnx"]


def test_a_graph_that_answers_otherwise_is_not_written(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer's error shows nowhere but in the answers."""
    before, right = contents(teacher), export.export_graph

    def wrong(model: PreTrainedModel, *rest: Any) -> None:
        head: Any = model.classifier
        with torch.no_grad():
            head.bias.add_(1e-3)
            right(model, *rest)
            head.bias.sub_(1e-3)

    monkeypatch.setattr(export, "export_graph", wrong)
    with pytest.raises(Rejected, match=r"differ by \d\.\de-04 .* more than 1e-04: nothing was written"):
        to_onnx(ExportArguments(str(teacher)))
    assert contents(teacher) == before
    assert not (teacher / "onnx").exists()


def test_an_earlier_int8_file_goes_when_it_is_not_made_again(teacher: Path) -> None:
    """Beside new 32-bit weights it would answer as the old ones did."""
    to_onnx(ExportArguments(str(teacher), int8=True))
    assert (teacher / "onnx" / "model_quantized.onnx").exists()
    to_onnx(ExportArguments(str(teacher)))
    assert [path.name for path in (teacher / "onnx").iterdir()] == ["model.onnx"]


def test_another_folder_gets_all_that_serving_needs(teacher: Path, tmp_path: Path) -> None:
    """Labels and tokenizer that stay behind make a file that nobody can read."""
    before = contents(teacher)
    to_onnx(ExportArguments(str(teacher), output_dir=str(tmp_path / "served")))
    names = {path.name for path in (tmp_path / "served").rglob("*")}
    assert names >= {"onnx", "model.onnx", "config.json", "tokenizer.json"}
    assert contents(teacher) == before


@pytest.mark.parametrize("reduce_range", [False, True])
def test_reduced_range_keeps_weights_to_seven_bits(teacher: Path, reduce_range: bool) -> None:
    """On x86 without VNNI sums of two 8-bit products overflow, and the answers are silently wrong."""
    to_onnx(ExportArguments(str(teacher), int8=True, reduce_range=reduce_range))
    model = onnx.load(teacher / "onnx" / "model_quantized.onnx")
    weights = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    products = [weights[node.input[1]] for node in model.graph.node if node.op_type == "MatMulInteger"]
    largest = max(np.abs(matrix.astype(int)).max() for matrix in products if matrix.dtype == np.int8)
    assert (60 < largest <= 64) if reduce_range else largest > 120


@pytest.mark.parametrize(
    ("capabilities", "reduced"),
    [
        ({"architecture": "x86_64", "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx_vnni": True}, False),
        ({"architecture": "x86_64", "avx2": True}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_reduced_range_is_for_x86_without_vnni(
    capabilities: dict[str, Any], reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too narrow costs accuracy for nothing, too wide costs it all."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert quantize.needs_reduced_range() is reduced


def test_rows_of_a_table_are_rounded_each_by_its_own_scale(tmp_path: Path) -> None:
    """One outlier among 30,000 pieces must not coarsen all the others."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(512, 128)).astype(np.float32)
    table[7] *= 1000
    table[9] = 0
    rows, scales = quantize.rounded_rows(table)
    assert rows.dtype == np.int8
    off = np.abs(rows * scales - table)
    assert (off <= np.abs(table).max(1, keepdims=True) / 127 / 2 * 1.001).all()

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "ids"], ["states"], axis=0)],
        "looked up",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [onnx.helper.make_tensor_value_info("states", onnx.TensorProto.FLOAT, ["batch", "sequence", 128])],
        [numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    quantize.quantize_tables(model)
    assert "table" not in {entry.name for entry in model.graph.initializer}
    onnx.save(model, tmp_path / "table.onnx")
    ids = np.array([[1, 7, 9], [511, 0, 1]])
    found = open_session(tmp_path / "table.onnx").run(None, {"ids": ids})[0]
    assert np.abs(found - (rows * scales)[ids]).max() == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"model": "{t}/absent"}, "there is no model folder"),
    "a file": ({"model": "{t}/config.json"}, "config.json is a file"),
    "drop": ({"max_drop": -1}, "--max_drop is -1.0: expected points from 0 to 100"),
    "drop, nan": ({"max_drop": "nan"}, "--max_drop is nan: expected"),
    "drop, nothing to check": ({"max_drop": 1, "int8": True}, "--max_drop is for --int8 with --check"),
    "columns": ({"label_column": "label"}, "--label_column is about the rows of --check"),
    "length, no rows": ({"max_length": 16}, "--max_length is about the rows of --check"),
    "range": ({"reduce_range": "true"}, "--reduce_range is for --int8"),
    "check": ({"check": "{t}/absent.csv", "max_length": 16}, "no such file"),
    "length": ({"check": "{e}", "max_length": 65}, "--max_length is 65: it must be from 3 to 64"),
    "another model": ({"output_dir": "{t}/other"}, "other holds the weights of another model"),
    "output": ({"output_dir": "{t}/config.json"}, "config.json is a file: give a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    name: str, teacher: Path, toy: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback tells a user nothing, and a half-written file is served."""
    options, message = BAD[name]
    words = []
    for option, value in ({"model": "{t}"} | options).items():
        words += [f"--{option}", str(value).replace("{t}", str(teacher)).replace("{e}", toy["eval"])]
    shutil.copytree(teacher, teacher / "other")
    before = contents(teacher)
    assert main(["export", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert contents(teacher) == before


def test_rows_are_refused_where_nothing_can_be_scored(
    with_head: Callable[..., PreTrainedModel], save_model: Save, toy: dict[str, str], tmp_path: Path
) -> None:
    """A gate that passes without having looked is worse than none."""
    folder = save_model(with_head("bert", "ForMaskedLM"), tmp_path / "model")
    with pytest.raises(InputError, match=r"--check scores models with a head .* is a BertForMaskedLM"):
        to_onnx(ExportArguments(str(folder), int8=True, check=toy["eval"]))


def test_a_head_that_onnx_tools_do_not_know_is_refused(
    with_head: Callable[..., PreTrainedModel], save_model: Save, tmp_path: Path
) -> None:
    """Multiple choice reads three axes; a file with two would answer other questions."""
    folder = save_model(with_head("bert", "ForMultipleChoice"), tmp_path / "model")
    with pytest.raises(InputError, match=r"cannot export a BertForMultipleChoice: expected one of \*ForSeq"):
        to_onnx(ExportArguments(str(folder)))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, teacher: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: BertTokenizerFast
) -> None:
    """Most installations have no ONNX, and an ImportError says nothing of extras."""
    before = contents(teacher)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'pip install "tinybert\[onnx\]"'):
        to_onnx(ExportArguments(str(teacher)))
    assert contents(teacher) == before
