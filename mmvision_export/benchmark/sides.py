"""Who can be measured: backends, graphs in them, PyTorch implementations; their names."""

from __future__ import annotations

from collections.abc import Mapping

from mmvision_export.core.processor import processor_flags

__all__ = ["BF16", "PEERS", "cpu_has_bf16", "label_of", "without_precision"]

BF16 = "-bf16"
"""Ends the name of a side that computes in bfloat16, whatever the model directory's precision."""

PEERS: Mapping[str, str] = {
    "transformers-eager": "transformers eager",
    "transformers-sdpa": "transformers SDPA",
    "transformers-sdpa-bf16": "transformers SDPA bf16",
    "nemo": "NeMo",
    "torch-eager": "PyTorch SDPA",
    "torch-eager-bf16": "PyTorch SDPA bf16",
    "torch-compile": "PyTorch compiled",
    "torch-compile-bf16": "PyTorch compiled bf16",
}
"""Name for `--against` -> what tables call it. `torch-*` are this package's own encoder."""

_BACKENDS = {
    "onnxruntime-cpu": "ONNX Runtime",
    "onnxruntime-amx": "ONNX Runtime AMX",
    "onnxruntime-cuda": "ONNX Runtime CUDA",
    "onnxruntime-tensorrt": "ONNX Runtime TensorRT",
    "onnxruntime-rtx": "ONNX Runtime TensorRT-RTX",
    "openvino": "OpenVINO",
    "openvino-bf16": "OpenVINO bf16",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
_GRAPHS = {
    "model.onnx": "portable graph",
    "model.cpu-int8.onnx": "INT8",
}


def label_of(side: str) -> str:
    """What tables call a side."""
    backend, _, graph = side.partition(":")
    name = PEERS.get(backend) or _BACKENDS.get(backend, backend)
    return f"{name} {_GRAPHS.get(graph, graph)}" if graph else name


def without_precision(side: str) -> tuple[str, str | None]:
    """A side's name without its precision, and that, None if it is the model directory's."""
    return (side.removesuffix(BF16), "bf16") if side.endswith(BF16) else (side, None)


def cpu_has_bf16() -> bool:
    """Whether the system says of this CPU that it multiplies bfloat16, or PyTorch emulates it."""
    return not processor_flags().isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
