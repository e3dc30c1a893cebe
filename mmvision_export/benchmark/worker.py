"""One side of a comparison in a process of its own, told what to do line by line.

`python -m mmvision_export.benchmark.worker SIDE DIRECTORY THREADS` answers each line of JSON on
standard input by one on standard output. A process each, so that memory can be told apart and no
thread pool is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmvision_export.artifacts.manifest import GRAPH, Manifest
from mmvision_export.benchmark.sides import cpu_has_bf16, without_precision
from mmvision_export.core.errors import BackendError, InputError, message_and_hint
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedGrid
from mmvision_export.models.sample_batches import batch_of_grid
from mmvision_export.ops.domain import DOMAIN
from mmvision_export.runtime.available_memory import host_available_bytes
from mmvision_export.runtime.backends.onnxruntime_amx import library_in, verified_library
from mmvision_export.runtime.memory_guard import MemoryGuard
from mmvision_export.runtime.planner import whole_layout

__all__ = ["main"]

_GEMM = (1024, 1280, 5120)  # rows, k, n: the encoder's largest product, for one block of patches
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


def main() -> None:
    """Answer until standard input ends.

    Open the side, run a batch, or measure a matrix product in its runtime.
    """
    side, directory, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    # Libraries may print: they get standard error, the answers a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    state: dict[str, Any] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            start = time.perf_counter()
            state["run"], facts = _open(side, directory, threads)
            opened = time.perf_counter() - start
            return {
                **facts,
                "open_s": opened,
                "rss_bytes": _memory("VmRSS"),
                "file_bytes": _memory("RssFile"),
            }
        if request["do"] == "gemm":
            runtime, gflops = _gemm(side, directory, threads)
            return {"runtime": runtime, "gflops": gflops}
        return _timed(state["run"], request)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = answer(request)
        except Exception as error:  # reported on the other side, whatever it is
            message, hint = message_and_hint(error)
            reply = {"error": message, "hint": hint}
        print(json.dumps(reply), file=answers)


def _open(side: str, directory: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    backend, _, graph = side.partition(":")
    if backend.startswith("openvino"):
        return _open_openvino(backend, directory, threads)
    if "onnxruntime" in backend or "tensorrt" in backend:
        return _open_backend(backend, graph, directory, threads)
    import torch

    from mmvision_export.benchmark.peers import peer_from_encoder
    from mmvision_export.models.weights import DTYPES, WeightSource

    torch.set_num_threads(threads)
    manifest = Manifest.read(directory)
    source = WeightSource.from_manifest(manifest.source, manifest.config)
    name, asked = without_precision(side)
    precision = asked or manifest.precision
    loaded = source.load(DTYPES[precision])
    if loaded.source.get("sha256") != manifest.source.get("sha256"):
        raise BackendError("the weights differ from the exported ones")
    peer = peer_from_encoder(name, loaded.encoder)

    def run(pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out = peer(torch.from_numpy(pixel_values), torch.from_numpy(grid_thw))
            # NumPy has no bfloat16.
            result: np.ndarray = (out.float() if out.dtype == torch.bfloat16 else out).numpy()
            return result

    package = {"transf": "transformers", "nemo": "nemo-automodel"}.get(side[:6], "torch")
    import importlib.metadata

    return run, {
        "version": importlib.metadata.version(package),
        "precision": precision,
        "emulated": precision == "bf16" and not cpu_has_bf16(),
    }


def _open_openvino(side: str, directory: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    from mmvision_export.runtime.vision_encoder import VisionEncoder

    backend, precision = without_precision(side)
    encoder = VisionEncoder.open(directory, backend=backend, threads=threads, precision=precision)
    return encoder, {"version": encoder.facts.version, "precision": encoder.facts.precision}


def _open_backend(
    backend: str, graph: str, directory: Path, threads: int
) -> tuple[Run, dict[str, Any]]:
    from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, create_session
    from mmvision_export.runtime.vision_encoder import VisionEncoder

    if graph == GRAPH:  # as it is: no backend picks it where there is a better one
        Manifest.read(directory).verify(directory, [graph])
        session = create_session(directory / graph, provider=PROVIDERS[backend], threads=threads)
        import onnxruntime

        config = Manifest.read(directory).config
        guard = MemoryGuard(LaunchMemory(config=config, way="dense"), host_available_bytes)

        def run_graph(pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
            grid = PackedGrid(grid_thw, config.patches_per_token)
            with guard.watched(grid, [whole_layout(grid)]):
                (out,) = session.run(None, {"pixel_values": pixel_values, "grid_thw": grid_thw})
            return np.asarray(out)

        return run_graph, {"version": onnxruntime.__version__, "precision": "fp32"}
    flavour = graph.removeprefix("model.").removesuffix(".onnx") or None
    encoder = VisionEncoder.open(directory, backend=backend, threads=threads, flavour=flavour)
    run: Run = encoder
    if not backend.endswith(("-cpu", "-amx")):
        run = _with_cuda_events(encoder)
    facts = encoder.facts
    return run, {
        "version": facts.version,
        "precision": "int8"
        if "int8" in facts.precision
        else "fp32"
        if flavour
        else facts.precision,
    }


def _with_cuda_events(encoder: Run) -> Run:
    """Keep the time between two CUDA events around each call, in milliseconds, in `run.device_ms`.

    Never run.
    """
    from mmvision_export.runtime.backends.cuda import LEGACY_STREAM, Cuda

    cuda = Cuda(0)
    cuda.use()
    first, last = cuda.new_event(timing=True), cuda.new_event(timing=True)

    def run(pixel_values: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        cuda.record(first, LEGACY_STREAM)
        out = encoder(pixel_values, grid_thw)
        cuda.record(last, LEGACY_STREAM)
        cuda.wait_here(last)
        run.device_ms = cuda.elapsed_ms(first, last)  # type: ignore[attr-defined]
        return out

    return run


def _timed(run: Run, request: dict[str, Any]) -> dict[str, Any]:
    """One run of a batch.

    Its time, its memory, and how much of the machine somebody else had meanwhile.
    """
    pixel_values, grid_thw = batch_of_grid(request["grid"], patch_dim=request["patch_dim"], seed=0)
    _reset_peak()
    before = _memory("VmRSS")
    busy, cpu, start = _busy_s(), time.process_time(), time.perf_counter()
    try:
        out = run(pixel_values, grid_thw)
    except InputError as error:  # a batch of ours is valid: it needs too much memory
        return {"refused": message_and_hint(error)[0]}
    seconds = time.perf_counter() - start
    own, every = time.process_time() - cpu, _busy_s() - busy
    if request.get("save"):
        np.save(request["save"], out)
    return {
        "seconds": seconds,
        "device_ms": getattr(run, "device_ms", None),
        "cpu_s": own,
        "foreign_cpus": max(0.0, every - own) / seconds,
        "before_bytes": before,
        "peak_bytes": _memory("VmHWM"),
        "file_bytes": _memory("RssFile"),
        "finite": bool(np.isfinite(out).all()),
    }


def _gemm(side: str, directory: Path, threads: int) -> tuple[str, float]:
    """Whose matrix product the side uses, and its best of several, float32, in GFLOP/s."""
    rows, k, n = _GEMM
    generator = np.random.default_rng(0)
    x, w = (
        generator.standard_normal((rows, k), np.float32),
        generator.standard_normal((n, k), np.float32),
    )
    product: Callable[[], Any]
    if side.startswith("onnxruntime"):
        import onnx

        from mmvision_export.runtime.backends.onnxruntime import PROVIDERS, create_session

        runtime, op, operators = "ONNX Runtime", "Gemm <transB: int = 1>", None
        if side.startswith("onnxruntime-amx"):
            runtime, op = "our AMX kernels", f"{DOMAIN}.Linear"
            operators = verified_library(library_in(directory), named=False)
        graph = f"g (float[m, k] x) => (float[m, n] y) {{y = {op} (x, w)}}"
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 18, "{DOMAIN}": 1]> {graph}'
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
        session = create_session(
            model.SerializeToString(),
            provider=PROVIDERS["onnxruntime-cpu"],
            threads=threads,
            operators=operators,
        )
        product = lambda: session.run(None, {"x": x})  # noqa: E731
    elif side.startswith("openvino"):
        runtime, product = "OpenVINO", _openvino_product(x, w, threads)
    else:
        import torch

        torch.set_num_threads(threads)
        runtime = "PyTorch"
        a, b = torch.from_numpy(x), torch.from_numpy(w)
        product = lambda: torch.nn.functional.linear(a, b)  # noqa: E731
    times = []
    for _ in range(12):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return runtime, 2e-9 * rows * k * n / min(times)


def _openvino_product(x: np.ndarray, w: np.ndarray, threads: int) -> Callable[[], Any]:
    """The product of x [rows, k] and w [n, k] transposed, float32, as a call without arguments."""
    from mmvision_export.runtime.backends.openvino import import_openvino

    openvino = import_openvino()
    ops = openvino.opset15
    rows = ops.parameter([-1, x.shape[1]], np.float32)
    model = openvino.Model([ops.matmul(rows, ops.constant(w), False, True)], [rows])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def _memory(field: str) -> int:
    """A line of /proc/self/status in bytes; where there is none, the peak of the whole life."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


def _busy_s() -> float:
    """CPU seconds that this machine has spent on anything, since it started.

    0 where it does not say.
    """
    try:
        fields = [
            int(field)
            for field in Path("/proc/stat")
            .read_text(encoding="ascii")
            .split("\n", 1)[0]
            .split()[1:9]
        ]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
