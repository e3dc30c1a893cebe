"""Percentiles of each bucket's latency on the device, by CUDA events, beside clocks and power."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.backends import BackendOptions
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.backends.tensorrt import TensorRTBackend
from mmvision_export.verify_gpu.budget import Budget
from mmvision_export.verify_gpu.built_engine import BuiltEngine, Opener, filling_batch, open_engine
from mmvision_export.verify_gpu.clocks import describe_clocks
from mmvision_export.verify_gpu.findings import Finding, Findings, Status

__all__ = ["arrays_on_device", "check_latency"]

_PART = "latency"
_WARM_UP, _RUNS = 10, 200
_PERCENTILES = (50, 90, 99)


def check_latency(
    engines: Sequence[BuiltEngine],
    cuda: Cuda,
    findings: Findings,
    budget: Budget,
    *,
    options: BackendOptions,
    opener: Opener = open_engine,
) -> None:
    """Time launches of one image that fills the bucket, from and to device memory."""
    for engine in engines:
        for bucket in engine.buckets:
            case = f"{engine.name}, {bucket.max_patches} patches"
            if budget.is_spent(_PART):
                findings.not_run(_PART, case, "no time is left")
                continue
            with findings.failure_is_a_finding(_PART, case):
                backend = opener(engine.path, options)
                try:
                    times, clocks = _times_ms(backend, cuda, bucket.max_patches)
                finally:
                    backend.close()
                values = np.percentile(times, _PERCENTILES)
                numbers = {f"p{p}_ms": float(v) for p, v in zip(_PERCENTILES, values, strict=True)}
                numbers["runs"] = float(len(times))
                # What ran on the stand-in took the time of this CPU.
                status: Status = "launched" if findings.is_stand_in else "pass"
                findings.add(
                    Finding(part=_PART, case=case, status=status, numbers=numbers, detail=clocks)
                )
    cuda.close()


def _times_ms(backend: TensorRTBackend, cuda: Cuda, num_patches: int) -> tuple[list[float], str]:
    """Milliseconds of each run, with the copies into and out of the engine's buffers, and clocks."""
    with (
        arrays_on_device(backend, cuda, num_patches) as (source, target, stream),
        contextlib.ExitStack() as freed,
    ):
        first, last = (cuda.new_event(timing=True) for _ in range(2))
        for event in (first, last):
            freed.callback(cuda.free_event, event)
        times = []
        for run in range(_WARM_UP + _RUNS):
            cuda.record(first, stream)
            backend.run_into(target, source, stream=stream)
            cuda.record(last, stream)
            cuda.wait_here(last)
            if run >= _WARM_UP:
                times.append(cuda.elapsed_ms(first, last))
        # An idle GPU lowers its clocks: they are read while it works.
        for _ in range(_WARM_UP):
            backend.run_into(target, source, stream=stream)
        clocks = describe_clocks(cuda)
    return times, clocks


@contextlib.contextmanager
def arrays_on_device(
    backend: TensorRTBackend, cuda: Cuda, num_patches: int
) -> Iterator[tuple[PackedBatch, DeviceArray, int]]:
    """Patches and room for the embeddings on the device, and a stream, freed at the end.

    Yields:
        The batch of one image with its patches on the device; room for image_embeds
        `[num_image_tokens, text_hidden_size]`; the stream's handle.
    """
    cuda.use()
    with contextlib.ExitStack() as freed:
        stream = cuda.new_stream()
        freed.callback(cuda.free_stream, stream)
        _, batch = filling_batch(backend, num_patches, seed=0)
        host = np.ascontiguousarray(batch.pixel_values)
        shapes = (host.shape, (batch.grid.num_tokens, backend.config.text_hidden_size))
        arrays = []
        for shape in shapes:
            address = cuda.allocate(int(np.prod(shape)) * backend.dtype.itemsize)
            freed.callback(cuda.free, address)
            arrays.append(DeviceArray(address, shape, backend.dtype, cuda.device, None))
        source, target = arrays
        cuda.to_device(source.address, host, stream)
        cuda.synchronize(stream)
        freed.callback(cuda.synchronize, stream)
        yield PackedBatch(source, batch.grid), target, stream
