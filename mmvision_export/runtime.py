"""`VisionEncoder`: open a model and call it. This, with what it imports, is what is deployed.

Needs numpy, pillow and the chosen backend; loads neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmvision_export.backends import Backend, open_backend
from mmvision_export.config import EncoderConfig
from mmvision_export.errors import InputError
from mmvision_export.grid import checked_grid, checked_pixel_values, tokens_per_image
from mmvision_export.manifest import PREPROCESSOR, model_directory_of
from mmvision_export.preprocess import PreprocessorConfig, patches_from_images

__all__ = ["VisionEncoder"]


class VisionEncoder:
    """The vision encoder in one runtime.

    ```python
    with VisionEncoder.open("engines/tiny") as encoder:
        image_embeds = encoder(pixel_values, grid_thw)  # one packed batch
        per_image = encoder.encode_images([Image.open("photo.jpg")])  # a list of [tokens, text_hidden]
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
        flavour: str | None = None,
    ) -> VisionEncoder:
        """Open a model directory or an engine file.

        Args:
            path: The directory, or an `.engine` with its sidecar beside it.
            backend: `auto`, `onnxruntime-cpu`, `onnxruntime-cuda`, `tensorrt` or `tensorrt-rtx`.
            device: CUDA device.
            threads: Threads of the CPU backend; its own choice if None.
            flavour: Which graph of the directory `onnxruntime-cpu` runs, as `cpu-int8`; `model.onnx` if None.

        Raises:
            BackendError: The runtime is not installed, or does not work here.
            ManifestError: The files are missing, damaged, or not for this machine.
            ConfigError: `preprocessor_config.json` is malformed.
        """
        path = Path(path)
        opened = open_backend(backend, path, device=device, threads=threads, flavour=flavour)
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
    def preprocessor(self) -> PreprocessorConfig:
        """How images become patches."""
        return self._preprocessor

    @property
    def info(self) -> dict[str, Any]:
        """What runs: backend, files, versions, accepted sizes, and why other backends were passed over."""
        profile = self._backend.profile
        limits = {} if profile is None else {"max_patches": profile.max_patches, "max_images": profile.max_images}
        return {"backend": self._backend.name, **self._backend.info, **limits}

    def __call__(self, pixel_values: npt.ArrayLike, grid_thw: npt.ArrayLike) -> npt.NDArray[np.floating]:
        """Encode one packed batch.

        Args:
            pixel_values: `[num_patches, patch_dim]` float32 (or the model's float16), NumPy or anything with DLPack on
                the CPU.
            grid_thw: `[num_images, 3]` integers, rows (t, h, w) in patches.

        Returns:
            image_embeds `[num_image_tokens, text_hidden_size]` in the model's float type, images in order.

        Raises:
            InputError: The input breaks a rule of `grid_thw` or of the engine's profile, or is not finite.
            BackendError: The runtime failed.
        """
        patches = checked_pixel_values(_from_dlpack(pixel_values), self.config, self._backend.dtype)
        grid = checked_grid(_from_dlpack(grid_thw), self.config, num_patches=len(patches))
        self._check_profile(len(patches), len(grid))
        return self._backend.run(patches, grid)

    def encode_images(self, images: Sequence[Image.Image]) -> list[npt.NDArray[np.floating]]:
        """Encode images of any sizes in one packed batch.

        Returns:
            One `[tokens, text_hidden_size]` array per image.

        Raises:
            InputError: No images, one that cannot be processed, or more than the engine takes.
            BackendError: The runtime failed.
        """
        pixel_values, grid_thw = patches_from_images(images, self._preprocessor)
        image_embeds = self(pixel_values, grid_thw)
        return np.split(image_embeds, np.cumsum(tokens_per_image(grid_thw, self.config))[:-1])

    def _check_profile(self, num_patches: int, num_images: int) -> None:
        profile = self._backend.profile
        if profile is None:
            return
        if not profile.min_patches <= num_patches <= profile.max_patches:
            per_token = self.config.patches_per_token
            raise InputError(
                f"the batch has {num_patches} patches ({num_patches // per_token} image tokens), the engine takes "
                f"{profile.min_patches} to {profile.max_patches} ({profile.max_patches // per_token} image tokens)",
                hint="send fewer or smaller images, or build an engine with a larger --max-patches",
            )
        if num_images > profile.max_images:
            raise InputError(
                f"the batch has {num_images} images, the engine takes at most {profile.max_images}",
                hint="send fewer images, or build an engine with a larger --max-images",
            )

    def close(self) -> None:
        """Free the runtime's memory. The encoder cannot be used afterwards."""
        self._backend.close()

    def __enter__(self) -> VisionEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _from_dlpack(array: Any) -> Any:
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        return array
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise InputError(f"a {type(array).__name__} cannot be read as a CPU array: {error}") from error
