"""Registers host memory with CUDA (pins it), so that the GPU can copy from it, and to it, directly."""

from __future__ import annotations

import logging
import time

import torch

logger = logging.getLogger(__name__)

# A call holds locks of the driver for about 0.1 s a gigabyte, for which all CUDA calls wait, other processes' too.
_MOST_AT_ONCE = 64 << 20
_BREATH_S = 0.0005  # after each call, so that those who wait come next


class PinnedMemory:
    """Registers the given memory until `release`. `pinned`: whether CUDA accepted it.

    memory: `[rows, …]`, registered some rows at a time: a copy may not cross from one row to another.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._parts: list[int] = []  # addresses
        self.pinned = False
        if not torch.cuda.is_available() or not memory.nbytes:
            return
        for part in memory.split(max(1, _MOST_AT_ONCE // memory[0].nbytes)):
            if int(error := torch.cuda.cudart().cudaHostRegister(part.data_ptr(), part.nbytes, 0)):
                self.release()
                _forget_error()
                logger.warning(
                    "hcache: CUDA cannot register %.1f GB of host memory (%s): copies between it and the device take "
                    "another step, and the scheduler waits for them. A smaller --hicache-size, or a higher limit of "
                    "locked memory, may help.",
                    memory.nbytes / 1e9,
                    torch.cuda.cudart().cudaGetErrorString(error),
                )
                return
            self._parts.append(part.data_ptr())
            time.sleep(_BREATH_S)
        self.pinned = True

    def release(self) -> None:
        """No copy from it, or to it, may be under way."""
        while self._parts:
            if int(error := torch.cuda.cudart().cudaHostUnregister(self._parts.pop())):
                _forget_error()
                reason = torch.cuda.cudart().cudaGetErrorString(error)
                logger.warning("hcache: CUDA keeps a part of host memory registered (%s)", reason)
            time.sleep(_BREATH_S)
        self.pinned = False


def _forget_error() -> None:
    """Launch a kernel to consume the error: CUDA reports a failed call again at the next launch, whoever makes it."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as error:
        logger.debug("hcache: %s", error)
