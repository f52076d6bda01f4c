"""The GPU's copy engine through CUDA's driver: many copies in one call, without occupying a multiprocessor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_CUDA_12_8 = 12080  # the first that has the function; every later driver still has it in this form
_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_KERNELS = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
AT_ONCE = 128  # copies in a call: drivers are reported to hang with thousands of small ones

Addresses = npt.NDArray[np.int64]


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the locations are hints for managed memory."""

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    ]


# cuMemcpyBatchAsync: targets, sources, sizes, how many; attributes, the first copy of each, how many; the copy that
# failed; the stream.
BatchFunction = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.POINTER(Attributes), ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t),
    *(ctypes.POINTER(ctypes.c_size_t), ctypes.c_void_p),
)


class NoCopyEngine(RuntimeError):
    """The driver has no such function, or it has refused a call."""


class CopyEngine:
    """batch: a `BatchFunction`; the driver's, if left out. Raises NoCopyEngine without one."""

    def __init__(self, batch: Callable[..., int] | None = None) -> None:
        self._batch = batch or _of_driver()
        self._attributes = Attributes(source_order=_IN_STREAM_ORDER, flags=_BESIDE_KERNELS)
        self._firsts = np.zeros(AT_ONCE, np.uintp)  # one would do; drivers are reported to read one for each copy
        self._failed = ctypes.c_size_t(0)

    def copy(self, targets: Addresses, sources: Addresses, size: int, stream: int) -> None:
        """`size` bytes from each source to its target, in any order, on a stream that is not the default one.

        sources: in registered memory of the host; both arrays are contiguous. Raises NoCopyEngine where the driver
        refuses.
        """
        sizes = np.full(min(AT_ONCE, len(targets)), size, np.uintp)
        firsts = self._firsts.ctypes.data_as(ctypes.POINTER(ctypes.c_size_t))
        for begin in range(0, len(targets), AT_ONCE):
            some, from_ = targets[begin : begin + AT_ONCE], sources[begin : begin + AT_ONCE]
            error = self._batch(
                some.ctypes.data, from_.ctypes.data, sizes.ctypes.data, len(some),
                ctypes.byref(self._attributes), firsts, 1, ctypes.byref(self._failed), stream,
            )  # fmt: skip
            if error:
                failed = f"error {error} at copy {self._failed.value} of {len(some)}"
                raise NoCopyEngine(f"cuMemcpyBatchAsync: {failed}")


def _of_driver() -> Callable[..., int]:
    """Return the driver's function. Raises NoCopyEngine if there is none, or if the device uses other addresses."""
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")  # torch has loaded it
        found, status, addressable = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        error = driver.cuGetProcAddress_v2(
            b"cuMemcpyBatchAsync", ctypes.byref(found), _CUDA_12_8, ctypes.c_uint64(0), ctypes.byref(status)
        )
        error = error or driver.cuDeviceGetAttribute(
            ctypes.byref(addressable), _CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, torch.cuda.current_device()
        )
    except (OSError, AttributeError) as missing:
        raise NoCopyEngine(f"CUDA's driver: {missing}") from missing
    if error or not found.value:
        raise NoCopyEngine("CUDA's driver is older than 12.8")
    if not addressable.value:
        raise NoCopyEngine("registered memory has other addresses on the device")
    batch: Callable[..., int] = BatchFunction(found.value)
    return batch
