"""What one stream needs to run an engine: a context for each profile, buffers at fixed addresses, and CUDA graphs.

Every profile has an execution context of its own, since a captured graph is tied to the state of the context it was
captured from. They run one after the other, so that they share the memory for activations: the largest profile's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.profile import Profile
from mmvision_export.core.errors import BackendError
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.launch_planner import Launch, padding_rows

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Lane"]

Checked = Callable[[Any, str], Any]


class Lane:
    """One stream with all that its launches need, allocated once.

    Args:
        cuda: The device.
        checked: Turns a refusal of TensorRT into an error.
        config: The encoder's dimensions.
        dtype: Float type of patches and embeddings.
        profiles: The engine's.
        captures: Whether launches in a bucket are captured as CUDA graphs here.
    """

    def __init__(
        self,
        cuda: Cuda,
        checked: Checked,
        config: EncoderConfig,
        dtype: np.dtype[Any],
        profiles: Sequence[Profile],
        *,
        captures: bool,
    ) -> None:
        self._cuda = cuda
        self._checked = checked
        self._config = config
        self._dtype = dtype
        self._profiles = profiles
        self._captures = captures
        self._contexts: list[trt.IExecutionContext] = []
        self._graphs: dict[int, int] = {}
        self._shapes: dict[int, tuple[int, int]] = {}
        self._cleanup = contextlib.ExitStack()

    def open(
        self, engine: trt.ICudaEngine, new_context: Callable[[], trt.IExecutionContext]
    ) -> None:
        """Allocate everything.

        Raises:
            BackendError: TensorRT or CUDA refused a step.
        """
        cuda, config = self._cuda, self._config
        self._stream = self._held(cuda.new_stream(), cuda.free_stream)
        self._done = self._held(cuda.new_event(), cuda.free_event)
        patches = max(profile.max_patches for profile in self._profiles)
        images = max(profile.max_images for profile in self._profiles)
        tokens = patches // config.patches_per_token
        self._patch_bytes = config.patch_dim * self._dtype.itemsize
        self._token_bytes = config.text_hidden_size * self._dtype.itemsize
        sizes = {
            "pixel_values": patches * self._patch_bytes,
            "grid_thw": images * 3 * np.dtype(np.int64).itemsize,
            "image_embeds": tokens * self._token_bytes,
        }
        self._addresses = {
            name: self._held(cuda.allocate(size), cuda.free) for name, size in sizes.items()
        }
        memory_bytes = max(
            engine.get_device_memory_size_for_profile_v2(i) for i in range(len(self._profiles))
        )
        memory = self._held(cuda.allocate(memory_bytes), cuda.free) if memory_bytes else 0
        for index in range(len(self._profiles)):
            context = new_context()
            self._contexts.append(context)
            selected = context.set_optimization_profile_async(index, self._stream)
            self._checked(selected, f"select profile {index}")
            context.set_device_memory(memory, memory_bytes)
            for name, address in self._addresses.items():
                self._checked(
                    context.set_tensor_address(name, address), f"take the address of {name}"
                )
        cuda.synchronize(self._stream)

    def _held(self, handle: int, free: Callable[[int], None]) -> int:
        self._cleanup.callback(free, handle)
        return handle

    def run(
        self,
        plan: Sequence[Launch],
        batch: PackedBatch,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        *,
        stream: int | None,
    ) -> None:
        """Run the launches of a batch, in order.

        Args:
            plan: From `plan_launches`.
            batch: In host memory, or with a `DeviceArray` for its patches.
            image_embeds: `[num_image_tokens, text_hidden_size]`, filled.
            stream: A stream of the caller's. If embeddings are for the device, this returns before they are there.
        """
        on = self._stream if stream is None else stream
        self._cuda.wait(
            on, self._done
        )  # the lane's last call may still be running, on another stream
        try:
            for launch in plan:
                self._launch(launch, batch, image_embeds, on)
            self._cuda.record(self._done, on)
            if stream is None or not isinstance(image_embeds, DeviceArray):
                self._cuda.synchronize(on)
        except BaseException:
            # What was enqueued before may still be writing into the caller's arrays.
            with contextlib.suppress(BackendError):
                self._cuda.synchronize(on)
            raise

    def _launch(
        self,
        launch: Launch,
        batch: PackedBatch,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        stream: int,
    ) -> None:
        profile = self._profiles[launch.profile]
        first, num_patches = launch.patches.start, launch.patches.stop - launch.patches.start
        pixel_values, rows = batch.pixel_values, batch.grid.rows[launch.images]
        rows = np.concatenate([rows, padding_rows(num_patches, len(rows), profile, self._config)])
        padded = profile.max_patches if profile.is_bucket else num_patches
        target = self._addresses["pixel_values"]
        if isinstance(pixel_values, DeviceArray):
            source = pixel_values.address + first * self._patch_bytes
            self._cuda.on_device(target, source, num_patches * self._patch_bytes, stream)
        else:
            self._cuda.to_device(target, pixel_values[launch.patches], stream)
        if padded > num_patches:
            # What an earlier batch left there would be as good, but this is the same each time.
            rest = (padded - num_patches) * self._patch_bytes
            self._cuda.zero(target + num_patches * self._patch_bytes, rest, stream)
        self._cuda.to_device(self._addresses["grid_thw"], rows, stream)
        self._execute(launch.profile, (padded, len(rows)), stream)
        per_token = self._config.patches_per_token
        tokens = slice(first // per_token, launch.patches.stop // per_token)
        source, size = (
            self._addresses["image_embeds"],
            (tokens.stop - tokens.start) * self._token_bytes,
        )
        if isinstance(image_embeds, DeviceArray):
            self._cuda.on_device(
                image_embeds.address + tokens.start * self._token_bytes, source, size, stream
            )
        else:
            self._cuda.to_host(image_embeds[tokens], source, stream)

    def _execute(self, profile: int, shape: tuple[int, int], stream: int) -> None:
        if (graph := self._graphs.get(profile)) is not None:
            self._cuda.launch(graph, stream)
            return
        context = self._contexts[profile]
        if self._shapes.get(profile) != shape:
            for name, sizes in (
                ("pixel_values", (shape[0], self._config.patch_dim)),
                ("grid_thw", (shape[1], 3)),
            ):
                self._checked(
                    context.set_input_shape(name, sizes), f"accept {name} of shape {list(sizes)}"
                )
            self._shapes[profile] = shape
        enqueue = functools.partial(self._enqueue, context)
        enqueue(stream)
        if self._captures and self._profiles[profile].is_bucket:
            # After a run as usual, in which TensorRT does what it puts off until the first. Capturing runs nothing, so
            # that the embeddings stay as they are; it is done on the lane's stream, which is never the default one.
            self._cuda.synchronize(stream)
            graph = self._cuda.captured(functools.partial(enqueue, self._stream), self._stream)
            self._graphs[profile] = self._held(graph, self._cuda.free_graph)

    def _enqueue(self, context: trt.IExecutionContext, stream: int) -> None:
        self._checked(context.execute_async_v3(stream), "enqueue the engine")

    def close(self) -> None:
        """Free everything."""
        self._contexts.clear()
        self._graphs.clear()
        self._cleanup.close()
