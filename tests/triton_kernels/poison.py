"""Outputs inside of larger memory, to see that a kernel writes all of them and nothing else."""

from __future__ import annotations

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
