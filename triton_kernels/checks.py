"""What kernels take for granted of their arguments, and a wrapper has to check. All raise ValueError."""

from __future__ import annotations

from collections.abc import Collection

import torch


def require_rows(name: str, tensor: torch.Tensor, dims: int, dtypes: Collection[torch.dtype]) -> None:
    """Layers and rows may be apart, the values of a row may not."""
    if tensor.dim() != dims or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} have {dims} dimensions of {wanted}, not {tuple(tensor.shape)} of {tensor.dtype}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the values of a row of {name} are {tensor.stride(-1)} apart, they must be neighbours")


def require_bytes(name: str, tensor: torch.Tensor, shape: tuple[int, ...], alignment: int) -> None:
    if tensor.dtype != torch.uint8 or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{name} are contiguous {shape} of uint8, not {tuple(tensor.shape)} of {tensor.dtype}")
    if tensor.data_ptr() % alignment:
        raise ValueError(f"{name} begin at a multiple of {alignment} bytes")


def require_indices(name: str, tensor: torch.Tensor, n: int) -> None:
    """int64: a slot times its stride is beyond int32 in a large pool."""
    if tensor.dtype != torch.int64 or tensor.shape != (n,) or not tensor.is_contiguous():
        raise ValueError(f"{name} are contiguous [{n}] of int64, not {list(tensor.shape)} of {tensor.dtype}")


def require_heads(name: str, buffer: torch.Tensor, heads: int, dim: int) -> None:
    """`[slots, heads, dim]`: slots may be apart, the values of a slot may not."""
    if buffer.shape[1:] != (heads, dim):
        raise ValueError(f"{name} has slots of {list(buffer.shape[1:])}, not {[heads, dim]}")
    if buffer.stride(2) != 1 or (heads > 1 and buffer.stride(1) != dim):
        raise ValueError(f"the values of a slot of {name} are apart, they must be neighbours")
