"""Arrays and streams of a caller's library: taken as they are, given back as what came.

Torch, CuPy and CUDA Python are known by what their objects have, and are not imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mmvision_export.core.errors import InputError
from mmvision_export.runtime.backends.cuda import LEGACY_STREAM
from mmvision_export.runtime.backends.device_array import device_of, library_of

__all__ = ["as_given", "handle_of", "host_array"]


def host_array(array: Any) -> Any:
    """What NumPy can read, without a copy where there is one already.

    torch's bfloat16, which NumPy has not, becomes float32: each of its numbers is one of float32.

    Raises:
        InputError: It needs a gradient, which nothing here gives, or its library refuses.
    """
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        return array
    if device_of(array) is not None:  # grid_thw: a few numbers, which the checks need on the host
        return np.asarray(array.cpu() if hasattr(array, "cpu") else array.get())
    if getattr(array, "requires_grad", False):
        raise InputError(
            f"a {type(array).__name__} that requires a gradient was given, and an encoder computes no gradients",
            hint="give pixel_values.detach()",
        )
    if str(getattr(array, "dtype", "")) == "torch.bfloat16":
        array = array.float()
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"a {type(array).__name__} cannot be read as a CPU array: {error}"
        ) from error


def as_given(result: npt.NDArray[np.floating], given: Any) -> Any:
    """A result as an array of the library that its input came from, without a copy.

    NumPy's for NumPy's and lists.
    """
    if isinstance(given, np.ndarray) or not hasattr(given, "__dlpack__"):
        return result
    library = library_of(given)
    return library.from_dlpack(result) if hasattr(library, "from_dlpack") else result


def handle_of(stream: Any) -> int:
    """The handle of a stream object of torch, CuPy or CUDA Python.

    Never 0, the default stream's other name.
    """
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
