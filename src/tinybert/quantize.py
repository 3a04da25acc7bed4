"""ONNX file -> ONNX file with 8-bit weights: matrices a scale each output, embeddings a scale each row."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinybert.errors import InputError
from tinybert.sessions import MISSING

_SMALLEST_TABLE = 1 << 16  # numbers in an embedding table that is worth two more nodes


def needs_reduced_range() -> bool:
    """Return whether this CPU adds pairs of 8-bit products in 16 bits, which overflow.

    x86 without VNNI does: weights then keep to 7 bits. ARM never does.
    """
    capabilities = torch.cpu.get_capabilities()
    is_x86 = str(capabilities.get("architecture", "")).lower() in ("x86_64", "amd64", "i386", "x86")
    return is_x86 and not (capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def quantize(source: Path, target: Path, *, reduce_range: bool) -> None:
    """Write an ONNX file with 8-bit weights beside one with 32-bit weights.

    Matrix products: signed weights with one scale for each output, activations quantised as they come
    (dynamically), so no calibration text is needed. Embedding tables: signed, one scale for each row, which
    ONNX Runtime's own quantiser does not have: it gives a table one scale, set by its largest number.

    Args:
        source: An fp32 file of ``tinybert.export``.
        target: Where to write.
        reduce_range: Whether to keep weights of matrices within 7 bits, see ``needs_reduced_range``.

    Raises:
        InputError: The packages are not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise InputError(MISSING) from error
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises preparation that the exporter has done
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Attention"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            # What fused operators give is not known to shape inference; in these models it is always this.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.root.setLevel(level)
    model = onnx.load(target)
    quantize_tables(model)
    onnx.save(model, target)


def quantize_tables(model: Any) -> None:
    """Give each embedding table of an ONNX model 8-bit rows, a scale each; changes the model.

    Rows are looked up as they are, then multiplied: Gather -> Cast -> Mul, on the few rows that a text needs.

    Args:
        model: An ``onnx.ModelProto``.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tables = {entry.name: entry for entry in graph.initializer if len(entry.dims) == 2}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes, done = [], set()
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        # A table that a matrix product reads too (a masked-LM head's) stays for it.
        if table is None or not _is_large(table) or any(r.op_type != "Gather" for r in readers[table.name]):
            nodes.append(node)
            continue
        rows, scales, output = f"{table.name}_int8", f"{table.name}_scale", node.output[0]
        if table.name not in done:
            done.add(table.name)
            weights, steps = rounded_rows(numpy_helper.to_array(table))
            graph.initializer.append(numpy_helper.from_array(weights, rows))
            graph.initializer.append(numpy_helper.from_array(steps, scales))
        nodes += [
            helper.make_node("Gather", [rows, node.input[1]], [f"{output}_int8"], axis=0),
            helper.make_node("Gather", [scales, node.input[1]], [f"{output}_scale"], axis=0),
            helper.make_node("Cast", [f"{output}_int8"], [f"{output}_cast"], to=table.data_type),
            helper.make_node("Mul", [f"{output}_cast", f"{output}_scale"], [output]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    for name in done:
        graph.initializer.remove(tables[name])


def _is_large(table: Any) -> bool:
    return int(table.dims[0]) * int(table.dims[1]) >= _SMALLEST_TABLE


def rounded_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a table (rows, d) as int8 (rows, d) and scales (rows, 1): their product, within half a scale."""
    scales = np.maximum(np.abs(table).max(1, keepdims=True), 1e-12) / 127
    return np.rint(table / scales).astype(np.int8), scales.astype(table.dtype)
