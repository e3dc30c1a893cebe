"""What one stream needs to run an engine.

A context for each profile, buffers at fixed addresses, and CUDA graphs.

Every profile has an execution context of its own, since a captured graph is tied to the state of
the context it was captured from. They run one after the other, so that they share the memory for
activations: the largest profile's.

All of a lane's work is in its own stream, which is joined to a stream of the caller's by events on
both sides. It is never the default stream, in which TensorRT synchronises, and does not wait for
it, so that what other threads put there breaks no capture.
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
from mmvision_export.models.minimax_m3_vl.memory import gigabytes
from mmvision_export.models.minimax_m3_vl.packed_batch import PackedBatch
from mmvision_export.runtime.available_memory import device_available_bytes
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM, Cuda
from mmvision_export.runtime.backends.device_array import DeviceArray
from mmvision_export.runtime.backends.pinned_rows import PinnedRows
from mmvision_export.runtime.planner import LaunchLayout, Piece

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

    Attributes:
        refusals: Profile -> why its launch could not be captured. It is launched without a graph.
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
        self.refusals: dict[int, str] = {}
        self._shapes: dict[int, tuple[int, int]] = {}
        self._cleanup = contextlib.ExitStack()

    def open(
        self, engine: trt.ICudaEngine, new_context: Callable[[], trt.IExecutionContext]
    ) -> None:
        """Allocate everything.

        Raises:
            BackendError: The device has less memory than the engine needs, or TensorRT or CUDA refused
                a step.
        """
        cuda, config = self._cuda, self._config
        self._stream = self._held(cuda.new_stream(), cuda.free_stream)
        self._arrived = self._held(cuda.new_event(), cuda.free_event)
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
        memory_bytes = max(
            engine.get_device_memory_size_for_profile_v2(i) for i in range(len(self._profiles))
        )
        _refuse_beyond_memory(
            sum(sizes.values()) + memory_bytes, device_available_bytes(cuda), cuda.device
        )
        self._addresses = {
            name: self._held(cuda.allocate(size), cuda.free) for name, size in sizes.items()
        }
        self._rows = PinnedRows(cuda, images, self._cleanup)
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
        layouts: Sequence[LaunchLayout],
        batch: PackedBatch,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
        *,
        stream: int | None,
    ) -> None:
        """Run the launches of a batch, in order.

        Args:
            layouts: Of the launches, from a planner.
            batch: In host memory, or with a `DeviceArray` for its patches.
            image_embeds: `[num_image_tokens, text_hidden_size]`, filled.
            stream: A stream of the caller's, or None. With one, and all arrays on the device, this
                returns before the embeddings are there; what the caller puts into that stream comes
                after them.
        """
        on_device = [isinstance(array, DeviceArray) for array in (batch.pixel_values, image_embeds)]
        joined = LEGACY_STREAM if stream is None and any(on_device) else stream
        if joined is not None:
            self._cuda.record(self._arrived, joined)
            self._cuda.wait(self._stream, self._arrived)
        try:
            for layout in layouts:
                self._launch(layout, batch.pixel_values, image_embeds)
            self._cuda.record(self._done, self._stream)
            if stream is not None:
                self._cuda.wait(stream, self._done)
            if stream is None or not all(on_device):
                self._cuda.synchronize(self._stream)
        except BaseException:
            # What was enqueued before may still be writing into the caller's arrays.
            with contextlib.suppress(BackendError):
                self._cuda.synchronize(self._stream)
            raise

    def _launch(
        self,
        layout: LaunchLayout,
        pixel_values: npt.NDArray[np.floating] | DeviceArray,
        image_embeds: npt.NDArray[np.floating] | DeviceArray,
    ) -> None:
        for piece in layout.pieces:
            self._bring(piece, pixel_values)
        self._execute_padded(layout)
        for piece in layout.pieces:
            self._give(piece.tokens(self._config.patches_per_token), image_embeds)

    def _bring(self, piece: Piece, pixel_values: npt.NDArray[np.floating] | DeviceArray) -> None:
        target = self._addresses["pixel_values"] + piece.launch.start * self._patch_bytes
        if isinstance(pixel_values, DeviceArray):
            source = pixel_values.address + piece.batch.start * self._patch_bytes
            size = (piece.batch.stop - piece.batch.start) * self._patch_bytes
            self._cuda.on_device(target, source, size, self._stream)
        else:
            self._cuda.to_device(target, pixel_values[piece.batch], self._stream)

    def _give(self, tokens: Piece, image_embeds: npt.NDArray[np.floating] | DeviceArray) -> None:
        source = self._addresses["image_embeds"] + tokens.launch.start * self._token_bytes
        if isinstance(image_embeds, DeviceArray):
            target = image_embeds.address + tokens.batch.start * self._token_bytes
            size = (tokens.batch.stop - tokens.batch.start) * self._token_bytes
            self._cuda.on_device(target, source, size, self._stream)
        else:
            self._cuda.to_host(image_embeds[tokens.batch], source, self._stream)

    def _execute_padded(self, layout: LaunchLayout) -> None:
        """Run on what was brought, with zeros between."""
        for gap in layout.gaps:
            # What an earlier batch left there would be as good, but this is the same each time.
            self._cuda.zero(
                self._addresses["pixel_values"] + gap.start * self._patch_bytes,
                (gap.stop - gap.start) * self._patch_bytes,
                self._stream,
            )
        self._rows.send(self._addresses["grid_thw"], layout.rows, self._stream)
        self._execute(layout.profile, (layout.num_patches, len(layout.rows)))

    def capture_all(self, idle: Callable[[int], LaunchLayout]) -> None:
        """Run each bucket once on padding alone and capture it, so that no later call does.

        Args:
            idle: The layout of a bucket's launch without an image, of a planner.

        Raises:
            BackendError: TensorRT or CUDA refused a step. A refused capture is none: see
                `refusals`.
        """
        if not self._captures:
            return
        for index, profile in enumerate(self._profiles):
            if profile.is_bucket:
                self._execute_padded(idle(index))
        self._cuda.synchronize(self._stream)

    def _execute(self, profile: int, shape: tuple[int, int]) -> None:
        if (graph := self._graphs.get(profile)) is not None:
            self._cuda.launch(graph, self._stream)
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
        enqueue()
        is_captured = self._captures and self._profiles[profile].is_bucket
        if is_captured and profile not in self.refusals:
            self._capture(profile, enqueue)

    def _capture(self, profile: int, enqueue: Callable[[], None]) -> None:
        """Capture what has just been enqueued, for the next time.

        After a run as usual, in which TensorRT does what it puts off until the first. Capturing
        runs nothing, so that the embeddings stay as they are: if it is refused, they are as good as
        before.
        """
        self._cuda.synchronize(self._stream)
        try:
            graph = self._cuda.captured(enqueue, self._stream)
        except BackendError as error:
            self.refusals[profile] = error.message
            return
        self._graphs[profile] = self._held(graph, self._cuda.free_graph)

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        self._checked(context.execute_async_v3(self._stream), "enqueue the engine")

    def close(self) -> None:
        """Wait for what is still running, and free everything.

        Raises:
            BackendError: What was running failed. Everything is freed all the same.
        """
        try:
            if self._contexts:
                self._cuda.synchronize(self._stream)
        finally:
            self._contexts.clear()
            self._graphs.clear()
            self._cleanup.close()


def _refuse_beyond_memory(needed: int, available: int, device: int) -> None:
    if needed > available:
        raise BackendError(
            f"a stream of the engine needs {needed} bytes ({gigabytes(needed)}) for patches, "
            f"embeddings and activations, CUDA device {device} has {available} bytes "
            f"({gigabytes(available)}) available",
            hint="open it with fewer streams, free memory, or build an engine with smaller buckets",
        )
