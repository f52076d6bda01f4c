"""Registers the store's memory with CUDA (pins it), so that the GPU can copy from it directly."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


class PinnedMemory:
    """Registers the given memory until `release`. `pinned`: whether CUDA accepted it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._address = memory.data_ptr()
        self.pinned = False
        if not torch.cuda.is_available():
            return
        error = torch.cuda.cudart().cudaHostRegister(self._address, memory.nbytes, 0)
        self.pinned = int(error) == 0
        if not self.pinned:
            _forget_error()
            logger.warning(
                "hcache: CUDA cannot register %.1f GB of host memory (%s): restoring copies it once more, and the "
                "scheduler waits for that. A smaller --hicache-size, or a higher limit of locked memory, may help.",
                memory.nbytes / 1e9,
                torch.cuda.cudart().cudaGetErrorString(error),
            )

    def release(self) -> None:
        """No copy from it may be under way."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self.pinned = False


def _forget_error() -> None:
    """CUDA reports a failed call once more to whoever launches a kernel next: let that be a kernel of nobody."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError as error:
        logger.debug("hcache: %s", error)
