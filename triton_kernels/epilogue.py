"""What follows the product for one head: K's norm, RoPE, the scale, and the way into the pool.

Columns are kept in two halves: of each pair that RoPE turns, the first and the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FP8_SINCE = 89  # a GPU before sm_89 has no instruction for a pool in fp8, and Triton no substitute


@triton.jit
def pair_columns(pair, DIM: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr):
    """The two columns of a head that are turned together; behind ROTARY / 2 pairs, two that stay."""
    if NEOX:
        first, second = pair, pair + ROTARY // 2
    else:
        first, second = 2 * pair, 2 * pair + 1
    turned = pair < ROTARY // 2
    return tl.where(turned, first, pair + ROTARY // 2), tl.where(turned, second, pair + DIM // 2)


@triton.jit
def store_head(
    x1,  # float32 [tokens, pairs], the first columns of the pairs
    x2,
    pair,
    first,
    second,
    token,
    n,
    head,
    slots,
    positions,
    cos_sin,
    norm_weight,
    inverse_rms,
    eps,
    buffer,
    stride,
    scale,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    NORM: tl.constexpr,
):
    """One head of some tokens: normed (NORM: see `projection`), turned, divided by its scale, into the pool."""
    inside = token < n
    column = pair < DIM // 2
    mask = inside[:, None] & column[None, :]
    if NORM != 0:
        if NORM == 1:
            squares = tl.sum(tl.where(mask, x1 * x1 + x2 * x2, 0.0), axis=1)
            inverse = 1.0 / tl.sqrt(squares / DIM + eps)
            weights = norm_weight
        else:
            inverse = tl.load(inverse_rms + token, mask=inside, other=0.0)
            weights = norm_weight + head * DIM
        x1 = x1 * inverse[:, None] * tl.load(weights + first, mask=column, other=0.0).to(tl.float32)[None, :]
        x2 = x2 * inverse[:, None] * tl.load(weights + second, mask=column, other=0.0).to(tl.float32)[None, :]
    if ROTARY != 0:
        turned = mask & (pair < ROTARY // 2)[None, :]
        angles = cos_sin + tl.load(positions + token, mask=inside, other=0)[:, None] * ROTARY + pair[None, :]
        cos = tl.load(angles, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(angles + ROTARY // 2, mask=turned, other=0.0).to(tl.float32)
        x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    place = buffer + tl.load(slots + token, mask=inside, other=0)[:, None] * stride + head * DIM
    tl.store(place + first[None, :], (x1 / scale).to(buffer.dtype.element_ty), mask=mask)
    tl.store(place + second[None, :], (x2 / scale).to(buffer.dtype.element_ty), mask=mask)


def pair_lanes(dim: int) -> int:
    """Columns of a tile that holds half a head: a power of two, and at least the 16 that a product needs."""
    return max(16, int(triton.next_power_of_2(dim // 2)))


def or_unread(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not read, where there is no tensor."""
    return other if tensor is None else tensor
