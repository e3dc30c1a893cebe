"""`VisionEncoder`: open a model and call it. This, with what it imports, is what is deployed.

Needs numpy, pillow and the chosen backend; loads neither torch nor onnx. PyAV is needed for video.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.artifacts.manifest import model_directory_of
from mmvision_export.core.errors import BackendError, InputError
from mmvision_export.core.progress import Progress
from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.preprocess import (
    PREPROCESSOR,
    PreprocessorConfig,
    patches_from_images,
)
from mmvision_export.runtime.backends import Backend, BackendOptions, DeviceBackend, open_backend
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM
from mmvision_export.runtime.backends.device_array import device_array, device_of, empty_like
from mmvision_export.runtime.grid import checked_grid, checked_pixel_values, tokens_per_image

if TYPE_CHECKING:
    from mmvision_export.models.minimax_m3_vl.video import VideoSegment

__all__ = ["VisionEncoder"]


class VisionEncoder:
    """The vision encoder in one runtime. Safe for use by several threads.

    ```python
    with VisionEncoder.open("engines/tiny") as encoder:
        image_embeds = encoder(pixel_values, grid_thw)  # one packed batch
        per_image = encoder.encode_images([Image.open("photo.jpg")])  # a list of [tokens, text_hidden]
        for segment in encoder.encode_video("clip.mp4"):  # as they are done
            print(segment.timestamps, segment.image_embeds.shape)
    ```
    """

    def __init__(self, backend: Backend, preprocessor: PreprocessorConfig) -> None:
        self._backend = backend
        self._preprocessor = preprocessor

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        device: int = 0,
        threads: int | None = None,
        streams: int = 1,
        cuda_graphs: bool = True,
        capture_on_open: bool = False,
        kernels: str | None = None,
        runtime_cache: str | Path | None = None,
        flavour: str | None = None,
        cpu_kernels: bool = True,
    ) -> VisionEncoder:
        """Open a model directory or an engine file.

        An engine is executable content: open only what you or somebody you trust built.

        Args:
            path: The directory, or an `.engine` with its sidecar beside it.
            backend: `auto`, or one of `mmvision_export.runtime.backends.BACKENDS`.
            device: CUDA device.
            threads: Threads of the CPU backend; its own choice if None.
            streams: Calls that a TensorRT engine runs at once; more wait. Weights are shared, activations are not.
            cuda_graphs: Whether a TensorRT engine built with `--buckets` is run by one CUDA graph for each bucket.
            capture_on_open: Whether they are captured here, rather than in the first call of each bucket.
            kernels: When TensorRT-RTX specialises kernels to a shape: `lazy`, `eager` or `none`. Default: eager for an
                engine with buckets, else lazy.
            runtime_cache: Where TensorRT-RTX keeps compiled kernels: a file for `tensorrt-rtx`, by default beside the
                engine, and a folder for `onnxruntime-rtx`.
            flavour: Which graph of the directory `onnxruntime-cpu` runs, as `cpu-int8`; the best exact one if None.
            cpu_kernels: Whether `onnxruntime-cpu` uses kernels of `mmvision build-plugins --cpu`, where there are any.

        Raises:
            BackendError: The runtime is not installed, or does not work here.
            ManifestError: The files are missing, damaged, or not for this machine.
            ConfigError: `preprocessor_config.json` is malformed.
        """
        path = Path(path)
        options = BackendOptions(
            device=device,
            threads=threads,
            streams=streams,
            cuda_graphs=cuda_graphs,
            capture_on_open=capture_on_open,
            kernels=kernels,
            runtime_cache=None if runtime_cache is None else Path(runtime_cache),
            flavour=flavour,
            cpu_kernels=cpu_kernels,
        )
        opened = open_backend(backend, path, options)
        try:
            directory = model_directory_of(path)
            preprocessor = PreprocessorConfig.for_encoder(opened.config)
            if directory is not None and (directory / PREPROCESSOR).is_file():
                preprocessor = PreprocessorConfig.read(directory / PREPROCESSOR, opened.config)
        except BaseException:
            opened.close()
            raise
        return cls(opened, preprocessor)

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
        return max((profile.max_patches for profile in self._backend.profiles), default=None)

    @property
    def info(self) -> dict[str, Any]:
        """What runs: backend, files, versions, accepted sizes, and why other backends were passed over."""
        profiles = self._backend.profiles
        limits: dict[str, Any] = {}
        if profiles:
            limits = {
                "max_patches": self.max_patches,
                "max_images": max(profile.max_images for profile in profiles),
            }
        return {"backend": self._backend.name, **self._backend.info, **limits}

    def __call__(self, pixel_values: Any, grid_thw: Any, *, stream: Any = None) -> Any:
        """Encode one packed batch of any number of images.

        Args:
            pixel_values: `[num_patches, patch_dim]` float32 (or the model's float16): NumPy, or anything with DLPack.
                On a CUDA device, for a TensorRT engine, it must be of the model's type, and its values are not checked.
            grid_thw: `[num_images, 3]` integers, rows (t, h, w) in patches.
            stream: CUDA stream for a TensorRT engine to work in: a handle, or an object of torch, CuPy or CUDA Python.
                With patches on the device it returns as soon as the work is in the stream.

        Returns:
            image_embeds `[num_image_tokens, text_hidden_size]` in the model's float type, images in order: a NumPy
            array, or what `pixel_values` is, torch or CuPy, on the device it is on.

        Raises:
            InputError: The input breaks a rule of `grid_thw`, has an image too large for the engine, or is not finite.
            BackendError: The runtime failed, or cannot read device memory.
        """
        if device_of(pixel_values) is not None:
            return self._encode_on_device(pixel_values, _host_array(grid_thw), stream)
        patches = checked_pixel_values(_host_array(pixel_values), self.config, self._backend.dtype)
        grid = checked_grid(_host_array(grid_thw), self.config, num_patches=len(patches))
        if stream is None:
            return _as_given(self._backend.run(patches, grid), pixel_values)
        backend = self._device_backend("a CUDA stream")
        tokens = len(patches) // self.config.patches_per_token
        image_embeds = np.empty((tokens, self.config.text_hidden_size), self.dtype)
        backend.run_into(image_embeds, patches, grid, stream=_handle_of(stream))
        return _as_given(image_embeds, pixel_values)

    def _encode_on_device(self, pixel_values: Any, grid_thw: Any, stream: Any) -> Any:
        backend = self._device_backend("arrays on a CUDA device")
        handle = None if stream is None else _handle_of(stream)
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
        shape = (source.shape[0] // self.config.patches_per_token, self.config.text_hidden_size)
        result = empty_like(pixel_values, shape, self.dtype)
        target = device_array(
            result, name="image_embeds", stream=LEGACY_STREAM if handle is None else handle
        )
        backend.run_into(target, source, grid, stream=handle)
        return result

    def _device_backend(self, what: str) -> DeviceBackend:
        if not isinstance(self._backend, DeviceBackend):
            raise BackendError(
                f"{self._backend.name} does not take {what}",
                hint="give arrays in host memory, or open an engine",
            )
        return self._backend

    def encode_images(
        self, images: Iterable[Image.Image], *, resize_to_fit: bool = False
    ) -> list[npt.NDArray[np.floating]]:
        """Encode images of any sizes in one packed batch.

        Args:
            images: Any Pillow images.
            resize_to_fit: Make an image too large for the engine as small as it has to be, rather than refuse it.

        Returns:
            One `[tokens, text_hidden_size]` array per image.

        Raises:
            InputError: No images, one that cannot be processed, or one larger than the engine takes.
            BackendError: The runtime failed.
        """
        pixel_values, grid_thw = patches_from_images(
            images, self.preprocessor_for(resize_to_fit=resize_to_fit)
        )
        image_embeds = self(pixel_values, grid_thw)
        return np.split(image_embeds, np.cumsum(tokens_per_image(grid_thw, self.config))[:-1])

    def preprocessor_for(self, *, resize_to_fit: bool) -> PreprocessorConfig:
        """The preprocessing, with the largest area that the engine takes if it shall resize to that.

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
        progress: Progress | None = None,
    ) -> Iterator[VideoSegment]:
        """Encode a video, segment by segment.

        Frames are sampled evenly and decoded as they are needed: memory does not grow with the length of the video.

        Args:
            path: Anything PyAV reads.
            fps: Frames to sample per second, within the limits of `VideoConfig`.
            resize_to_fit: Make frames as small as the engine asks for, rather than refuse the video.
            progress: Told about each segment.

        Yields:
            Segments of at most `config.segment_max_frames` temporal patches, in order.

        Raises:
            InputError: The file cannot be read, or its frames are larger than the engine takes.
            BackendError: PyAV is missing, or the runtime failed.
        """
        from mmvision_export.models.minimax_m3_vl.video import VideoConfig, encoded_segments

        config = VideoConfig.for_preprocessor(self._preprocessor, fps=fps)
        if resize_to_fit and self.max_patches is not None:
            config = config.within(self.max_patches // self.config.segment_max_frames)
        yield from encoded_segments(self, Path(path), config, progress or Progress())

    def close(self) -> None:
        """Free the runtime's memory. The encoder cannot be used afterwards."""
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


def _host_array(array: Any) -> Any:
    """What NumPy can read, without a copy where there is one already."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        return array
    if device_of(array) is not None:  # grid_thw: a few numbers, which the checks need on the host
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array.get())
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"a {type(array).__name__} cannot be read as a CPU array: {error}"
        ) from error


def _as_given(result: npt.NDArray[np.floating], given: Any) -> Any:
    """A result as an array of the library that its input came from, without a copy; NumPy's for NumPy's and lists."""
    if isinstance(given, np.ndarray) or not hasattr(given, "__dlpack__"):
        return result
    library = sys.modules[type(given).__module__.partition(".")[0]]
    return library.from_dlpack(result) if hasattr(library, "from_dlpack") else result


def _handle_of(stream: Any) -> int:
    """The handle of a stream object of torch, CuPy or CUDA Python; never 0, the default stream's other name."""
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1]) or LEGACY_STREAM
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute)) or LEGACY_STREAM
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream or LEGACY_STREAM
    given = stream if isinstance(stream, int) else type(stream).__name__
    raise InputError(
        f"stream must be a CUDA stream or its handle, got {given}",
        hint="as torch.cuda.current_stream()",
    )
