"""Arrays that are in device memory.

Where they are, through DLPack, without a copy and without their library.

References:
    https://dmlc.github.io/dlpack/latest/c_api.html, and for the protocol
    https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
from typing import Any

import numpy as np

from mmvision_export.core.errors import InputError

__all__ = ["DeviceArray", "device_array", "device_of", "empty_like", "library_of"]

_CUDA = 2  # kDLCUDA
_KINDS = {0: "i", 1: "u", 2: "f"}  # kDLInt, kDLUInt, kDLFloat


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclasses.dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array in the memory of a CUDA device.

    Attributes:
        address: Of its first value.
        shape: Its shape.
        dtype: Its type.
        device: Index of the CUDA device.
        owner: Keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


def device_of(array: Any) -> int | None:
    """Index of the CUDA device that an array is on.

    None for host memory and for what is no array.
    """
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return None
    try:
        kind, index = array.__dlpack_device__()
    except ValueError:  # torch's, of its meta device
        return None
    return int(index) if int(kind) == _CUDA else None


def device_array(array: Any, *, name: str, stream: int) -> DeviceArray:
    """Where an array on a CUDA device is.

    Args:
        array: Of a library with DLPack (torch, CuPy).
        name: What an error calls it.
        stream: The stream that will read it: its library makes that one wait for what is still
            writing it. Not 0, which DLPack forbids: 1 is the default stream.

    Raises:
        InputError: It cannot be exported, is of a type NumPy has not, or is not C-contiguous.
    """
    try:
        capsule = array.__dlpack__(stream=stream)
    except (AssertionError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} of type {type(array).__name__} cannot be read with DLPack: {error}"
        ) from error
    # The capsule stays with us, unconsumed: its destructor gives the memory back when the last
    # reference goes.
    tensor = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    kind = _KINDS.get(tensor.dtype.code)
    if kind is None or tensor.dtype.lanes != 1:
        raise InputError(
            f"{name} must be of a floating-point or integer type that NumPy has, got {array.dtype}"
        )
    expected = 1
    for i in reversed(range(tensor.ndim)):
        if tensor.strides and shape[i] != 1 and tensor.strides[i] != expected:
            raise InputError(
                f"{name} on a device must be C-contiguous", hint=f"{name}.contiguous()"
            )
        expected *= shape[i]
    address = (tensor.data or 0) + tensor.byte_offset
    dtype = np.dtype(f"{kind}{tensor.dtype.bits // 8}")
    return DeviceArray(address, shape, dtype, tensor.device.device_id, (array, capsule))


def library_of(array: Any) -> Any:
    """The top package that an array's class comes from, as `torch`.

    Imported, since there is an array.
    """
    package, _, _ = type(array).__module__.partition(".")
    return sys.modules[package]


def empty_like(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new array of the same library on the same device, not filled.

    The library allocates it, so that its own memory pool and streams account for it.

    Raises:
        InputError: The library is neither torch nor CuPy.
    """
    library = library_of(array)
    if hasattr(array, "new_empty"):  # torch
        return array.new_empty(shape, dtype=getattr(library, dtype.name))
    if hasattr(array, "__array_namespace__"):  # CuPy
        with array.device:
            return array.__array_namespace__().empty(shape, dtype=dtype)
    raise InputError(
        f"device arrays of {library.__name__} are not supported",
        hint="give torch or CuPy arrays, or NumPy's",
    )
