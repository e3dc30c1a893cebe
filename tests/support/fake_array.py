"""A device array of a library like torch, in the stand-in's memory, which holds DLPack's rules for streams."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np

from mmvision_export.runtime.backends.cuda import Cuda
from mmvision_export.runtime.backends.device_array import _pointer_of, _Tensor
from tests.support.fake_driver import FakeDriver

_KINDS: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in ("float16", "float32")}


class Tensor:
    """Values on the device.

    `written_by` is the stream that its library writes it in: the values are there when that stream's turn comes, and a
    consumer's stream is made to wait for it, as the protocol asks of a producer.

    References:
        https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html, `stream`:
        None is the legacy default stream, -1 asks for no synchronisation, 0 is forbidden, 1 is the legacy default
        stream, 2 the per-thread one, and greater is a handle. torch raises AssertionError for 0.
    """

    def __init__(
        self,
        driver: FakeDriver,
        cuda: Cuda,
        host: np.ndarray,
        *,
        device: int = 0,
        written_by: int | None = None,
    ) -> None:
        self.driver, self.cuda, self.device = driver, cuda, device
        self.shape, self.dtype = host.shape, host.dtype
        self.asked_for: list[int | None] = []
        cuda.use()
        self.address = cuda.allocate(max(host.nbytes, 1))
        self.written_by = written_by
        self._host = np.ascontiguousarray(host)
        if written_by is None:
            self._bytes()[:] = self._host.reshape(-1).view(np.uint8)
        else:
            cuda.to_device(self.address, self._host, written_by)

    def _bytes(self) -> np.ndarray:
        return self.driver.region(self.address, int(np.prod(self.shape)) * self.dtype.itemsize)

    def free(self) -> None:
        self.cuda.free(self.address)

    def numpy(self) -> np.ndarray:
        """What is in its memory now; nothing is waited for."""
        values: np.ndarray = self._bytes().view(self.dtype).reshape(self.shape).copy()
        return values

    def cpu(self) -> np.ndarray:
        self.cuda.use()
        if self.written_by is not None:
            self.cuda.synchronize(self.written_by)
        return self.numpy()

    def new_empty(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        kind: np.dtype[Any] = _KINDS.get(
            getattr(dtype, "__name__", str(dtype)), np.dtype(np.float16)
        )
        return Tensor(self.driver, self.cuda, np.zeros(shape, kind), device=self.device)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream != 0, "unsupported stream 0"  # as torch has it
        assert stream is None or stream >= -1, f"unsupported stream {stream}"
        self.asked_for.append(stream)
        if self.written_by is not None and stream != -1:
            with contextlib.ExitStack() as freed:
                event = self.cuda.new_event()
                freed.callback(self.cuda.free_event, event)
                self.cuda.record(event, self.written_by)
                self.cuda.wait(1 if stream is None else stream, event)
        # NumPy's capsule of the same bytes, told that they are on a GPU.
        capsule = self._bytes().view(self.dtype).reshape(self.shape).__dlpack__()
        tensor = ctypes.cast(_pointer_of(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
        tensor.device.device_type, tensor.device.device_id = self.__dlpack_device__()
        return capsule
