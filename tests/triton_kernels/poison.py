"""Outputs inside of larger memory, to see that a kernel writes all of them and nothing else."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAP = 5  # rows before and after an output
POISONS = (0x00, 0xA5)  # a byte left as it was differs from what is expected under one of them


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor` `[rows, width]` as `[rows, bytes]`; what to compare where NaNs must be equal too."""
    return tensor.contiguous().view(torch.uint8)


def assert_writes(expected: torch.Tensor, row_gap: int, write: Callable[[torch.Tensor], None]) -> None:
    """`write(out)` makes `out` bitwise `expected` `[rows, width]`, with rows `row_gap` values apart."""
    rows, width = expected.shape
    for poison in POISONS:
        memory = torch.empty(rows + 2 * GAP, width + row_gap, dtype=expected.dtype, device=expected.device)
        memory.view(torch.uint8)[:] = poison
        write(memory[GAP : GAP + rows, :width])
        whole = torch.empty_like(memory)
        whole.view(torch.uint8)[:] = poison
        whole[GAP : GAP + rows, :width] = expected
        assert torch.equal(bits(memory), bits(whole))


def vast(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """More memory than a test needs but for its addresses: on a CPU, pages that are not written are not there."""
    if DEVICE == "cuda":
        return torch.empty(*shape, dtype=dtype, device=DEVICE)
    file, n_bytes = os.memfd_create("vast"), math.prod(shape) * dtype.itemsize
    os.ftruncate(file, n_bytes)
    memory = torch.frombuffer(mmap.mmap(file, n_bytes), dtype=dtype)
    os.close(file)
    return memory.view(shape)
