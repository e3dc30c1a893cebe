"""What the ONNX parser of each TensorRT makes of an operator.

An engine without loops, without conditionals and without shapes that depend on data runs on the
device alone, and its launch can be captured in a CUDA graph. Whether a graph gives such an engine
is decided by its parser, which changes from version to version. The rows below say how. They hold
the operators that the lowered graphs use, and those that must not come back into them.

References:
    https://github.com/onnx/onnx-tensorrt, in the commits that NVIDIA/TensorRT pins:

    | TensorRT | commit  |   | TensorRT | commit  |   | TensorRT | commit  |
    | -------- | ------- | - | -------- | ------- | - | -------- | ------- |
    | 10.1     | 96e7811 |   | 10.8     | 118ed0a |   | 10.15    | fa5aa9f |
    | 10.3     | 62bdde2 |   | 10.10    | 3b9c961 |   | 10.16    | 6bde659 |
    | 10.6     | 4442153 |   | 10.13    | 346bdca |   | 11.0     | 5ab48c5 |
    | 10.7     | 9c69a24 |   | 10.14    | c727277 |   | 11.1     | 7c51a63 |

    Types and opsets are those of `docs/operators.md`; how an operator is imported is in
    `onnxOpImporters.cpp`. A row names the commit that it was read in. The parsers of 10.1, 10.3,
    10.8 and 10.10 were also run on the lowered graphs, against a network that records its calls.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from mmvision_export.artifacts.build_target import Installation

__all__ = [
    "ImportedAs",
    "OperatorRow",
    "ParserVersion",
    "latest_opset",
    "operator_row",
    "parser_version",
]

ParserVersion = tuple[int, int]
"""The TensorRT, major and minor, whose parser it is."""

ImportedAs = Literal[
    "layers",  # nothing but layers that a strongly typed network takes
    "loop",
    "conditional",
    "data-dependent shape",
    "rejected call",  # the importer sets a precision, which a strongly typed network refuses
    "undecided",  # documentation and source of that version disagree
]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_NUMBERS = _FLOATS | {ir.DataType.INT32, ir.DataType.INT64}
_ANY = _NUMBERS | {ir.DataType.BOOL}
_QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorRow:
    """How the parsers import one operator, from one TensorRT on until the operator's next row.

    Attributes:
        types: What its operands may be.
        operands: Indices of the inputs that `types` is about; others are indices, axes, shapes.
        since: First TensorRT whose parser does so.
        imported_as: What becomes of it.
        keeps_stash_type: Whether its statistics are float32 for operands that are not, where ONNX
            asks for that.
        source: Where it was read.
    """

    types: frozenset[ir.DataType]
    operands: tuple[int, ...] = (0,)
    since: ParserVersion = (10, 0)
    imported_as: ImportedAs = "layers"
    keeps_stash_type: bool = True
    source: str = "operators.md, 96e7811 to 7c51a63"


_CUMSUM_LOOP = "96e7811 onnxOpImporters.cpp:1128 (addLoop, addRecurrence); the same in 9c69a24"
_CUMSUM_LAYER = "118ed0a onnxOpImporters.cpp:1241 (addCumulative); operators.md has floats only"
_LAYER_NORM_CALL = (
    "96e7811 onnxOpImporters.cpp:2800 (setComputePrecision); the same in 3775e49 (10.4)"
)
_LAYER_NORM_TYPED = (
    "4442153, 3b9c961:3109 (stash_type is left aside in a strongly typed network); "
    "5ab48c5 (stash_type is read and not used)"
)

_ROWS: dict[tuple[str, str], tuple[OperatorRow, ...]] = {
    ("", "Add"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Attention"): (
        OperatorRow(
            types=_FLOATS,
            operands=(0, 1, 2),
            since=(10, 14),
            source="operators.md, c727277; not in 3b9c961 (10.10)",
        ),
    ),
    ("", "Cast"): (OperatorRow(types=_ANY),),
    ("", "CastLike"): (OperatorRow(types=_ANY, operands=(0, 1)),),
    ("", "Concat"): (OperatorRow(types=_ANY),),
    ("", "Constant"): (OperatorRow(types=_ANY, operands=()),),
    ("", "Cos"): (OperatorRow(types=_FLOATS),),
    ("", "CumSum"): (
        OperatorRow(types=_FLOATS, imported_as="loop", source=_CUMSUM_LOOP),
        OperatorRow(types=_FLOATS, since=(10, 8), source=_CUMSUM_LAYER),
    ),
    ("", "DequantizeLinear"): (OperatorRow(types=_QUANTIZED),),
    ("", "Div"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Equal"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Erf"): (OperatorRow(types=_FLOATS),),
    ("", "Gather"): (OperatorRow(types=_ANY),),
    ("", "Gelu"): (OperatorRow(types=_FLOATS),),
    ("", "Gemm"): (OperatorRow(types=_FLOATS, operands=(0, 1, 2)),),
    ("", "GreaterOrEqual"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Identity"): (OperatorRow(types=_ANY),),
    ("", "If"): (OperatorRow(types=_ANY, operands=(), imported_as="conditional"),),
    ("", "LayerNormalization"): (
        OperatorRow(
            types=_FLOATS, operands=(0, 1, 2), imported_as="rejected call", source=_LAYER_NORM_CALL
        ),
        OperatorRow(
            types=_FLOATS,
            operands=(0, 1, 2),
            since=(10, 6),
            keeps_stash_type=False,
            source=_LAYER_NORM_TYPED,
        ),
    ),
    ("", "Loop"): (OperatorRow(types=_ANY, operands=(), imported_as="loop"),),
    ("", "MatMul"): (OperatorRow(types=_FLOATS, operands=(0, 1)),),
    ("", "Mod"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Mul"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "NonZero"): (OperatorRow(types=_FLOATS, imported_as="data-dependent shape"),),
    ("", "Pad"): (OperatorRow(types=_NUMBERS),),
    ("", "QuantizeLinear"): (OperatorRow(types=_FLOATS),),
    ("", "Range"): (OperatorRow(types=_NUMBERS, operands=(0, 1, 2)),),
    ("", "ReduceMean"): (OperatorRow(types=_NUMBERS),),
    ("", "ReduceSum"): (OperatorRow(types=_NUMBERS),),
    ("", "Reshape"): (OperatorRow(types=_ANY),),
    ("", "Scan"): (OperatorRow(types=_FLOATS, operands=(), imported_as="loop"),),
    ("", "Shape"): (OperatorRow(types=_ANY),),
    ("", "Sin"): (OperatorRow(types=_FLOATS),),
    ("", "Slice"): (OperatorRow(types=_ANY),),
    ("", "Softmax"): (OperatorRow(types=_FLOATS),),
    ("", "Sqrt"): (OperatorRow(types=_FLOATS),),
    ("", "Squeeze"): (OperatorRow(types=_ANY),),
    ("", "Sub"): (OperatorRow(types=_NUMBERS, operands=(0, 1)),),
    ("", "Transpose"): (OperatorRow(types=_ANY),),
    ("", "Unsqueeze"): (OperatorRow(types=_ANY),),
    ("", "Where"): (OperatorRow(types=_ANY, operands=(1, 2)),),
    ("trt", "TRT_Attention"): (
        OperatorRow(
            types=_FLOATS - {ir.DataType.FLOAT},
            operands=(0, 1, 2),
            since=(11, 0),
            imported_as="undecided",
            source="2f3fa34 TRT_custom_ops.md: lengths at inputs 6 and 7, a scale; "
            "5ab48c5 onnxOpImporters.cpp: at inputs 4 and 5, no scale",
        ),
        OperatorRow(
            types=_FLOATS - {ir.DataType.FLOAT},
            operands=(0, 1, 2),
            since=(11, 1),
            source="7c51a63 TRT_custom_ops.md: lengths at inputs 4 and 5, no scale",
        ),
    ),
}

# As documented in 96e7811 and 3775e49 (10.4); 4442153 to 3b9c961; c727277 and 7c51a63.
_LATEST_OPSETS: tuple[tuple[ParserVersion, int], ...] = (
    ((10, 0), 20),
    ((10, 6), 22),
    ((10, 14), 24),
)


def parser_version(installation: Installation) -> ParserVersion:
    """Whose parser a TensorRT has.

    TensorRT-RTX counts its own versions. 1.7 has the API of TensorRT 11, and takes `TRT_Attention`
    as 11.1 does.
    """
    if installation.backend == "tensorrt-rtx":
        return (11, 1)
    return installation.tensorrt_version.release


def operator_row(domain: str, op_type: str, parser: ParserVersion) -> OperatorRow | None:
    """The row that holds for a parser, or None if none is listed: it may not have the operator."""
    rows = [row for row in _ROWS.get((domain, op_type), ()) if row.since <= parser]
    return rows[-1] if rows else None


def latest_opset(parser: ParserVersion) -> int:
    """The last opset of `ai.onnx` that a parser is documented for."""
    return [opset for since, opset in _LATEST_OPSETS if since <= parser][-1]
