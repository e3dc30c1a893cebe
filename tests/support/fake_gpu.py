"""A stand-in for TensorRT, on the stand-in for the CUDA driver, that enforces TensorRT's rules.

No kernel runs: an "engine" computes a number per token from what is in device memory when its stream's turn comes,
enough to see that the right bytes went to the right address in the right order. What TensorRT leaves undefined fails
here: an address or shape or profile not set, memory too small, a capture of a context that has not run in its shape, a
thread without a device. What CUDA leaves undefined fails in the driver's stand-in.
"""

from __future__ import annotations

from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mmvision_export.artifacts.external_data import external_locations
from tests.support.fake_driver import FakeDriver

INPUTS = ("pixel_values", "grid_thw")
TENSORS = {"pixel_values": np.float16, "grid_thw": np.int64, "image_embeds": np.float16}


class Context:
    """An execution context: everything must be set before it runs."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.ran: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert not self.trt.driver.is_capturing(stream)
        if self.trt.refuses("set_optimization_profile_async") or not 0 <= index < len(
            self.trt.profiles
        ):
            return False
        self.profile, self.shapes = index, {}
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.profile is not None
        needed = self.trt.memory_bytes(self.profile)
        assert size >= needed, "too little memory for activations"
        self.trt.driver.region(memory, size)
        self.memory = memory, size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile selected"
        least, most = self.trt.profiles[self.profile][name]
        if self.trt.refuses("set_input_shape") or not least <= shape[0] <= most:
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in TENSORS
        if self.trt.refuses("set_tensor_address"):
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        driver = self.trt.driver
        assert driver.is_current(), "no device is this thread's"
        assert set(self.shapes) == set(INPUTS), "a shape is not set"
        assert set(self.addresses) == set(TENSORS), "an address is not set"
        assert self.memory is not None, "no memory for activations"
        if driver.is_capturing(stream):
            assert self.ran == self.shapes, "captured before it ran once in this shape"
        if self.trt.refuses("execute_async_v3"):
            return False
        self.ran = dict(self.shapes)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        shapes["image_embeds"] = (shapes["pixel_values"][0] // 4, self.trt.text_hidden)

        def array(name: str) -> np.ndarray:
            kind = np.dtype(TENSORS[name])
            size = int(np.prod(shapes[name])) * kind.itemsize
            values: np.ndarray = driver.region(addresses[name], size).view(kind)
            return values.reshape(shapes[name])

        def work() -> None:
            pixels, grid = array("pixel_values"), array("grid_thw")
            self.trt.first_rows.append(tuple(int(value) for value in grid[0]))
            assert grid.prod(axis=1).sum() == len(pixels)
            assert np.isfinite(pixels).all(), "padding that is not finite"
            if self.trt.rows_per_slot is not None:
                check_slots(pixels, grid, self.trt.rows_per_slot)
            array("image_embeds")[:] = expected_embeds(pixels, self.trt.text_hidden)

        ranges = [(addresses[name], array(name).nbytes) for name in TENSORS]
        result = driver.launch_work(work, [*ranges, self.memory], stream)
        if result:
            self.trt.log_error(f"Cuda Runtime ({result}) in a layer")
        return result == 0


def check_slots(pixels: np.ndarray, grid: np.ndarray, rows_per_slot: int) -> None:
    """What a graph for images in slots of equal length assumes of its inputs."""
    slots, rest = divmod(len(grid), rows_per_slot)
    assert rest == 0
    assert len(pixels) % slots == 0, "slots of different length"
    length = len(pixels) // slots
    counts = grid.prod(axis=1).reshape(slots, rows_per_slot)
    assert (counts.sum(axis=1) == length).all(), "an image and its padding are no slot"
    assert (counts[:, 0] > 0).all(), "a slot without an image"
    for slot, count in enumerate(counts[:, 0]):
        assert not pixels[slot * length + count : (slot + 1) * length].any(), "padding is not zeros"


def expected_embeds(pixels: np.ndarray, text_hidden: int) -> np.ndarray:
    """What the stand-in computes: the first value of each token's first patch, repeated."""
    return np.repeat(pixels[::4, :1].astype(np.float16), text_hidden, axis=1)


class Cache:
    """TensorRT-RTX's runtime cache: takes only what it made itself, and grows by one byte each time it is written."""

    magic = b"cache of this GPU"

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.content = self.magic

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(self.magic):
            self.trt.refuses(self.trt.fail or "")
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content + b"."


class RuntimeConfig:
    """TensorRT-RTX's runtime configuration."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.strategy: int | None = None
        self.cache: Cache | None = None
        self.cuda_graph_strategy = 0
        self.dynamic_shapes_kernel_specialization_strategy = 0

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache | None:
        return None if self.trt.refuses("create_runtime_cache") else Cache(self.trt)

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return not self.trt.refuses("set_runtime_cache")


class Engine:
    """A deserialised engine. Without its weights it has no context, and with a context no other budget."""

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt
        self.num_optimization_profiles = len(trt.profiles)
        self.has_weights = not trt.is_stripped
        self.has_contexts = False
        self.budget = trt.streamable_bytes

    @property
    def streamable_weights_size(self) -> int:
        return self.trt.streamable_bytes

    def get_weight_streaming_automatic_budget(self) -> int:
        assert self.trt.streamable_bytes
        return self.trt.streamable_bytes // 4

    @property
    def weight_streaming_budget_v2(self) -> int:
        assert self.trt.streamable_bytes
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert self.trt.streamable_bytes, "not built to stream weights"
        assert not self.has_contexts, "a budget with active contexts"
        assert budget >= 0
        if self.trt.refuses("weight_streaming_budget_v2"):
            raise RuntimeError("Error in set weight streaming budget.")  # as the binding does
        self.budget = budget

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return (-1, self.trt.widths[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(itemsize=self.trt.itemsizes[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:
        least, most = self.trt.profiles[index][name]
        return [(rows, self.trt.widths[name]) for rows in (least, most, most)]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.trt.memory_bytes(index)

    def create_runtime_config(self) -> RuntimeConfig | None:
        return None if self.trt.refuses("create_runtime_config") else RuntimeConfig(self.trt)

    def create_execution_context(self, how: int | RuntimeConfig) -> Context | None:
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        assert strategy == TensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        assert self.trt.driver.is_current(), "no device is this thread's"
        assert self.has_weights, "an engine without its weights"
        self.has_contexts = True
        if isinstance(how, RuntimeConfig):
            self.trt.configs.append(how)
        return None if self.trt.refuses("create_execution_context") else Context(self.trt)


class EngineRefitter:
    """Puts weights into an engine, once a parser has brought them all."""

    def __init__(self, trt: TensorRT, engine: Engine) -> None:
        assert not engine.has_contexts
        self.trt = trt
        self.engine = engine
        self.is_brought = False

    def get_missing_weights(self) -> list[str]:
        return [] if self.is_brought else ["layers.0.mlp.fc1.weight"]

    def refit_cuda_engine(self) -> bool:
        if self.trt.refuses("refit_cuda_engine") or self.get_missing_weights():
            return False
        self.engine.has_weights = True
        return True


class ParserRefitter:
    """Brings a graph's weights: from files beside the path that it is given."""

    num_errors = 1

    def __init__(self, refitter: EngineRefitter) -> None:
        self.refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        trt = self.refitter.trt
        if trt.refuses("refit_from_bytes"):
            return False
        for location in external_locations(model):
            trt.weights_read.append((Path(path).parent / location).read_bytes())
        self.refitter.is_brought = not trt.refuses("get_missing_weights")
        return True

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "a parser's error")


Limits = dict[str, tuple[int, int]]


class TensorRT:
    """The module, as far as it is used. `fail` names a call that shall fail, after logging `reason`."""

    __version__ = "1.7.1.116"

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = 2

    class DynamicShapesKernelSpecializationStrategy:
        LAZY, EAGER, NONE = 0, 1, 2

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = 1

    class ILogger:
        class Severity:
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2
            INFO = 3
            VERBOSE = 4

        def __init__(self) -> None:
            pass

    def __init__(self, driver: FakeDriver, text_hidden: int, profiles: list[Limits]) -> None:
        self.driver = driver
        self.text_hidden = text_hidden
        self.profiles = profiles
        # A float16 engine of the released patch size.
        self.widths = {"pixel_values": 1176, "grid_thw": 3, "image_embeds": text_hidden}
        self.itemsizes = {"pixel_values": 2, "grid_thw": 8, "image_embeds": 2}
        self.fail: str | None = None
        self.rows_per_slot: int | None = None
        self.deserialised: list[bytes] = []
        self.configs: list[RuntimeConfig] = []
        self.first_rows: list[tuple[int, ...]] = []  # of each launch, as it found them
        self.is_stripped = False
        self.has_host_code = False
        self.engine_host_code_allowed = False
        self.streamable_bytes = 0
        self.weights_read: list[bytes] = []
        self._logger: Any = None

    def Refitter(self, engine: Engine, logger: Any) -> EngineRefitter | None:
        return None if self.refuses("Refitter") else EngineRefitter(self, engine)

    def OnnxParserRefitter(self, refitter: EngineRefitter, logger: Any) -> ParserRefitter:
        return ParserRefitter(refitter)

    def memory_bytes(self, profile: int) -> int:
        """Memory for activations."""
        return 3 * self.profiles[profile]["pixel_values"][1]

    def refuses(self, call: str) -> bool:
        if call != self.fail:
            return False
        self._logger.log(self.ILogger.Severity.WARNING, "not a reason")
        self.log_error(f"reason of {call}")
        return True

    def log_error(self, message: str) -> None:
        self._logger.log(self.ILogger.Severity.ERROR, message)

    def Runtime(self, logger: Any) -> TensorRT | None:
        self._logger = logger
        assert self.driver.is_current(), "no device is this thread's"
        return None if self.refuses("Runtime") else self

    def deserialize_cuda_engine(self, plan: bytes | mmap) -> Engine | None:
        with memoryview(plan) as view:  # as the binding does, for the call
            self.deserialised.append(bytes(view))
        if self.has_host_code and not self.engine_host_code_allowed:
            self.log_error("host code is not allowed")
            return None
        return None if self.refuses("deserialize_cuda_engine") else Engine(self)
