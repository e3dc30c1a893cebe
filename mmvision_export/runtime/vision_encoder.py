"""`VisionEncoder`: open a model and call it. This class and its imports are what a user deploys.

Needs numpy, pillow and the chosen backend; loads neither torch nor onnx. PyAV is needed for video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from mmvision_export.artifacts.manifest import Manifest, model_directory_of
from mmvision_export.artifacts.preprocessing import preprocessor_of
from mmvision_export.core.errors import BackendError, InputError, NotFiniteError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.image_sources import ImageSource, batch_from_sources
from mmvision_export.models.minimax_m3_vl.packed_batch import (
    PackedBatch,
    checked_batch,
    checked_grid,
)
from mmvision_export.models.minimax_m3_vl.preprocess import PreprocessorConfig
from mmvision_export.runtime.backends import (
    Backend,
    BackendInfo,
    BackendOptions,
    DeviceBackend,
    open_backend,
)
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM
from mmvision_export.runtime.backends.device_array import device_array, device_of, empty_like
from mmvision_export.runtime.callers_arrays import as_given, handle_of, host_array
from mmvision_export.runtime.finite_embeds import refuse_not_finite
from mmvision_export.runtime.launch_planner import ANY_SIZE
from mmvision_export.runtime.own_process import OwnProcess

if TYPE_CHECKING:
    from mmvision_export.models.minimax_m3_vl.memory import LaunchBytes
    from mmvision_export.models.minimax_m3_vl.resize import ResizeRule
    from mmvision_export.models.minimax_m3_vl.video import VideoSegment

__all__ = ["VisionEncoder"]


class VisionEncoder:
    """The vision encoder in one runtime. Safe for use by several threads.

    ```python
    with VisionEncoder.open("engines/tiny") as encoder:
        image_embeds = encoder(pixel_values, grid_thw)  # one packed batch
        per_image = encoder.encode_images([Image.open("photo.jpg")])  # [tokens, text_hidden] each
        for segment in encoder.encode_video("clip.mp4"):  # as they are done
            print(segment.timestamps, segment.image_embeds.shape)
    ```
    """

    def __init__(
        self, backend: Backend, preprocessor: PreprocessorConfig, *, refuse_non_finite: bool = True
    ) -> None:
        self._backend = backend
        self._process = OwnProcess(backend)
        self._preprocessor = preprocessor
        self._refuse_non_finite = refuse_non_finite

    @classmethod
    def open(
        cls,
        path: str | Path,
        options: BackendOptions | None = None,
        *,
        resize: ResizeRule | None = None,
        max_long_side: int | None = None,
        **changes: Any,
    ) -> VisionEncoder:
        """Open a model directory or an engine file.

        Graphs and weights may come from anybody. An engine is executable content. An engine in the
        directory is opened if this user has built it (`core.trust`). Any other engine is opened only
        if `path` names it, or with `trust=True`.

        Args:
            path: The directory, or an `.engine` with its record beside it.
            options: How to open the model.
            resize: Rule by which images get their size; None for the model directory's.
            max_long_side: Bound of the rule `long-side`, in pixels.
            **changes: Fields of `BackendOptions` by keyword, as `backend="onnxruntime-cpu"`.

        Raises:
            BackendError: The runtime is not installed, or does not work here.
            ManifestError: The files are missing, damaged, or not for this machine.
            ConfigError: `preprocessor_config.json` is malformed, or the rule has no such bound.
            TypeError: `changes` has an unknown field.
        """
        path = Path(path)
        options = dataclasses.replace(options or BackendOptions(), **changes)
        opened = open_backend(path, options)
        try:
            directory = model_directory_of(path)
            if directory is None:
                preprocessor = PreprocessorConfig.for_encoder(opened.config)
            else:
                preprocessor = preprocessor_of(directory, Manifest.read(directory))
            preprocessor = preprocessor.by(resize, max_long_side=max_long_side)
        except BaseException:
            opened.close()
            raise
        return cls(opened, preprocessor, refuse_non_finite=options.refuse_non_finite)

    @property
    def config(self) -> EncoderConfig:
        """The encoder's dimensions."""
        return self._backend.config

    @property
    def dtype(self) -> np.dtype[Any]:
        """Float type of the embeddings."""
        return self._backend.dtype

    @property
    def preprocessor(self) -> PreprocessorConfig:
        """How images become patches."""
        return self._preprocessor

    @property
    def max_patches(self) -> int | None:
        """Most patches of one image, or None for any number."""
        return self._backend.largest_image

    @property
    def patches_per_call(self) -> int:
        """How many patches to gather for a call when images come one by one.

        The largest launch, or, for a graph that takes any size, enough to be fast.
        """
        sizes = (profile.max_patches for profile in self._backend.profiles)
        return max(sizes, default=ANY_SIZE.opt_patches)

    @property
    def facts(self) -> BackendInfo:
        """What runs: files, versions, and why other backends were passed over."""
        return self._backend.info

    @property
    def info(self) -> dict[str, Any]:
        """The facts as JSON values, with the backend's name and the accepted sizes."""
        profiles = self._backend.profiles
        limits: dict[str, Any] = {}
        if profiles:
            limits = {
                "max_patches": self.max_patches,
                "max_images": max(profile.slots or profile.max_images for profile in profiles),
            }
        resize = str(self._preprocessor)
        return {"backend": self._backend.name, **self.facts.to_dict(), "resize": resize, **limits}

    def __call__(self, pixel_values: Any, grid_thw: Any, *, stream: Any = None) -> Any:
        """Encode one packed batch of any number of images.

        Args:
            pixel_values: `[num_patches, patch_dim]` float32 (or the model's float16): NumPy, or
                anything with DLPack. On a CUDA device, for a TensorRT engine, it must be of the
                model's type, and its values are not checked.
            grid_thw: `[num_images, 3]` integers, rows (t, h, w) in patches.
            stream: CUDA stream for a TensorRT engine to work in: a handle, or an object of torch,
                CuPy or CUDA Python. With patches on the device it returns as soon as the work is in
                the stream.

        Returns:
            image_embeds `[num_image_tokens, text_hidden_size]` in the model's float type, images in
            order: a NumPy array, or what `pixel_values` is, torch or CuPy, on the device it is on.

        Raises:
            InputError: The input breaks a rule of `grid_thw`, has an image too large for the
                engine or for the memory that is available, or is not finite.
            NotFiniteError: Embeddings of some images are not finite; it has those of the others.
            BackendError: The runtime failed, or cannot read device memory.
        """
        if device_of(pixel_values) is not None:
            return self._encode_on_device(pixel_values, host_array(grid_thw), stream)
        batch = checked_batch(
            host_array(pixel_values), host_array(grid_thw), self.config, self.dtype
        )
        if stream is None:
            return as_given(self.encode(batch), pixel_values)
        backend = self._device_backend("a CUDA stream")
        image_embeds = np.empty((batch.grid.num_tokens, self.config.text_hidden_size), self.dtype)
        backend.run_into(image_embeds, batch, stream=handle_of(stream))
        self._checked(image_embeds, batch)
        return as_given(image_embeds, pixel_values)

    def encode(self, batch: PackedBatch) -> npt.NDArray[np.floating]:
        """Encode a batch that has been validated, such as one that preprocessing made.

        Returns:
            image_embeds `[num_image_tokens, text_hidden_size]` in the model's float type.

        Raises:
            InputError: An image is too large for the engine or for the memory that is available, or
                its patches are not finite.
            NotFiniteError: Embeddings of some images are not finite; it has those of the others.
            BackendError: The runtime failed.
        """
        batch = batch.of_type(self.dtype)
        self._process.refuse_fork()
        image_embeds = self._backend.run(batch)
        self._checked(image_embeds, batch)
        return image_embeds

    def _checked(self, image_embeds: npt.NDArray[np.floating], batch: PackedBatch) -> None:
        if self._refuse_non_finite:
            backend = self._backend
            refuse_not_finite(image_embeds, batch, backend.run, is_isolated=backend.is_isolated)

    def _encode_on_device(self, pixel_values: Any, grid_thw: Any, stream: Any) -> Any:
        backend = self._device_backend("arrays on a CUDA device")
        handle = None if stream is None else handle_of(stream)
        source = device_array(
            pixel_values, name="pixel_values", stream=LEGACY_STREAM if handle is None else handle
        )
        if source.device != backend.device:
            raise InputError(
                f"pixel_values are on CUDA device {source.device}, the encoder is on {backend.device}"
            )
        if source.dtype != self.dtype:
            raise InputError(
                f"pixel_values on a device must be {self.dtype}, which the engine takes, got {source.dtype}",
                hint=f"convert it there: pixel_values.to(torch.{self.dtype}), pixel_values.astype('{self.dtype}')",
            )
        if len(source.shape) != 2 or source.shape[1] != self.config.patch_dim:
            raise InputError(
                f"pixel_values must have shape [num_patches, {self.config.patch_dim}], got {list(source.shape)}"
            )
        grid = checked_grid(grid_thw, self.config, num_patches=source.shape[0])
        shape = (grid.num_tokens, self.config.text_hidden_size)
        result = empty_like(pixel_values, shape, self.dtype)
        target = device_array(
            result, name="image_embeds", stream=LEGACY_STREAM if handle is None else handle
        )
        backend.run_into(target, PackedBatch(source, grid), stream=handle)
        return result

    def _device_backend(self, what: str) -> DeviceBackend:
        if not isinstance(self._backend, DeviceBackend):
            raise BackendError(
                f"{self._backend.name} does not take {what}",
                hint="give arrays in host memory, or open an engine",
            )
        self._process.refuse_fork()
        return self._backend

    @overload
    def encode_images(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        resize_to_fit: bool = False,
        not_finite: Literal["raise"] = "raise",
    ) -> list[npt.NDArray[np.floating]]: ...

    @overload
    def encode_images(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        resize_to_fit: bool = False,
        not_finite: Literal["none"],
    ) -> list[npt.NDArray[np.floating] | None]: ...

    def encode_images(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        resize_to_fit: bool = False,
        not_finite: Literal["raise", "none"] = "raise",
    ) -> list[npt.NDArray[np.floating]] | list[npt.NDArray[np.floating] | None]:
        """Encode images of any sizes in one packed batch.

        Files are opened as `mmvision run` opens them: regular files of a known format.

        Args:
            images: One image or several: Pillow images, paths of files, or uint8 arrays
                `[height, width, 3]` in RGB.
            resize_to_fit: Shrink an image that is too large for the engine, rather than refuse it.
            not_finite: How to handle an image whose embeddings are not finite: `raise` refuses the
                call, `none` returns None for this image and the embeddings of the others.

        Returns:
            One `[tokens, text_hidden_size]` array per image, in a list for one image too.

        Raises:
            InputError: There are no images, an image cannot be processed, or an image is too large
                for the engine or for the available memory.
            NotFiniteError: Embeddings of some images are not finite; it has those of the others.
            BackendError: The runtime failed.
        """
        if not_finite not in ("raise", "none"):
            raise InputError(f"not_finite must be 'raise' or 'none', got {not_finite!r}")
        preprocessor = self.preprocessor_for(resize_to_fit=resize_to_fit)
        batch = batch_from_sources(images, preprocessor, dtype=self.dtype)
        try:
            return batch.grid.split(self.encode(batch))
        except NotFiniteError as error:
            if not_finite == "raise":
                raise
            return error.image_embeds

    def memory_for(self, num_patches: int) -> LaunchBytes | None:
        """Memory that one image needs while it is encoded, beside the weights.

        Returns:
            An upper bound; None for an engine, which allocated its memory when it was opened.
        """
        guard = self._backend.guard
        return None if guard is None else guard.image(num_patches)

    def available_bytes(self) -> int | None:
        """Memory that an image may use now; None for an engine, and where the system does not say."""
        guard = self._backend.guard
        return None if guard is None else guard.available_bytes()

    def preprocessor_for(self, *, resize_to_fit: bool) -> PreprocessorConfig:
        """The preprocessing, with the area that the engine takes if it resizes.

        Raises:
            InputError: The engine takes no image as large as the preprocessing's smallest.
        """
        if not resize_to_fit or self.max_patches is None:
            return self._preprocessor
        return self._preprocessor.within(self.max_patches)

    def encode_video(
        self,
        path: str | Path,
        *,
        fps: float = 1.0,
        resize_to_fit: bool = False,
        max_pixels: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[VideoSegment]:
        """Encode a video, segment by segment.

        Frames are sampled evenly and decoded as they are needed. So memory does not grow with the
        length of the video.

        Args:
            path: A file in one of the containers of `video_file.CONTAINERS`.
            fps: Frames to sample per second, within the limits of `VideoConfig`.
            resize_to_fit: Shrink frames that are too large for the engine, rather than refuse the
                video.
            max_pixels: Most pixels of a frame of the file; the limit of `VideoConfig` if None.
            progress: Told about each segment.

        Yields:
            Segments of at most `config.segment_max_frames` temporal patches, in order.

        Raises:
            InputError: The file cannot be read, or its frames are larger than the engine takes.
            BackendError: PyAV is missing, or the runtime failed.
        """
        from mmvision_export.models.minimax_m3_vl.video import VideoConfig, encoded_segments

        config = VideoConfig.for_preprocessor(self._preprocessor, fps=fps)
        if max_pixels is not None:
            config = dataclasses.replace(config, max_pixels=max_pixels)
        if resize_to_fit and self.max_patches is not None:
            config = config.within(self.max_patches // self.config.segment_max_frames)
        yield from encoded_segments(self, Path(path), config, progress or Progress())

    def __repr__(self) -> str:
        """What runs, as `<VisionEncoder engines/tiny/model.cpu.onnx: onnxruntime-cpu, fp32>`."""
        facts = self.facts
        file = facts.engine or "/".join(part for part in (facts.model, facts.graph) if part)
        return f"<VisionEncoder {file}: {self._backend.name}, {facts.precision}>"

    def close(self) -> None:
        """Free the runtime's memory. The encoder cannot be used afterwards. A fork frees nothing."""
        if self._process.is_this:
            self._backend.close()

    def __enter__(self) -> VisionEncoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
