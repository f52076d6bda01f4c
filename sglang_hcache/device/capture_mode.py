"""CUDA graphs that SGLang captures while it serves, and the calls that our threads make meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """While it lasts, this thread may use CUDA whatever another one captures; on the CPU, nothing is different.

    Otherwise CUDA refuses to wait for an event or to register memory while any thread captures a graph in the default
    mode ("global"), and spoils that graph: SGLang captures those of image encoders so, at the first image of a size.
    """
    if not torch.cuda.is_available():
        yield
        return
    former = _exchange(_RELAXED)
    try:
        yield
    finally:
        if former is not None:
            _exchange(former)


def _exchange(mode: int) -> int | None:
    """Set the calling thread's mode, and return the one that it had; None where the driver does not."""
    value = ctypes.c_int(mode)
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # torch has loaded it
    except OSError:
        return None
    return None if driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(value)) else value.value
