"""K and V by cuBLAS' product, and a kernel that does the rest: for every projection, on every GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec
from sglang_hcache.triton_kernels.epilogue import or_unread, pair_columns, pair_lanes, store_head
from sglang_hcache.triton_kernels.projection import FULL_NORM, Projection
from sglang_hcache.triton_kernels.projection_specs import spec, without_memory
from sglang_hcache.triton_kernels.tuning import Shape

# The product is made, and finished, in parts of about so many rows: 32 MB of 8,192 columns, which `_finish` finds in
# the L2 cache (50 MB on an H100), and enough tiles for four rounds of its multiprocessors.
PART_ROWS = 2048
_CUBLAS_ROWS = 128  # of a block of cuBLAS
_TOKENS = 16  # of a program of `_finish`
_WARPS = 4
_RMS_BLOCK = 1024  # columns that `_inverse_rms` reads at a time


@triton.jit
def _finish(
    projected,  # [n, N]
    projected_stride,
    slots,
    positions,
    cos_sin,
    norm_weight,
    inverse_rms,  # float32 [n]
    eps,
    k_buffer,
    k_stride,
    k_scale,
    v_buffer,
    v_stride,
    v_scale,
    n,
    K_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    NEOX: tl.constexpr,
    NORM: tl.constexpr,
    K_PAIRS: tl.constexpr,
    V_PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = projected + token.to(tl.int64)[:, None] * projected_stride
    if head < K_HEADS:
        pair = tl.arange(0, K_PAIRS)
        first, second = pair_columns(pair, K_DIM, ROTARY, NEOX)
        mask = (token < n)[:, None] & (pair < K_DIM // 2)[None, :]
        x1 = tl.load(rows + head * K_DIM + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(rows + head * K_DIM + second[None, :], mask=mask, other=0.0).to(tl.float32)
        store_head(
            x1, x2, pair, first, second, token, n, head, slots, positions, cos_sin, norm_weight, inverse_rms, eps,
            k_buffer, k_stride, k_scale, K_DIM, ROTARY, NORM,
        )  # fmt: skip
    else:
        head -= K_HEADS
        pair = tl.arange(0, V_PAIRS)
        first, second = pair_columns(pair, V_DIM, V_DIM, True)
        mask = (token < n)[:, None] & (pair < V_DIM // 2)[None, :]
        rows += K_HEADS * K_DIM + head * V_DIM
        x1 = tl.load(rows + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(rows + second[None, :], mask=mask, other=0.0).to(tl.float32)
        store_head(
            x1, x2, pair, first, second, token, n, head, slots, positions, cos_sin, norm_weight, inverse_rms, eps,
            v_buffer, v_stride, v_scale, V_DIM, 0, 0,
        )  # fmt: skip


@triton.jit
def _inverse_rms(rows, stride, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(rows + token * stride + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(out + token, 1.0 / tl.sqrt(tl.sum(squares) / COLUMNS + eps))


def project(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    workspace: torch.Tensor | None,
) -> None:
    """On as many rows at a time as `workspace` has; `project_kv` says more."""
    if workspace is None:
        workspace = rows.new_empty(part_rows(len(rows)), projection.columns)
    parts = (tensor.split(len(workspace)) for tensor in (rows, positions, slots))
    for some, their_positions, their_slots in zip(*parts, strict=True):
        projected = workspace[: len(some)]
        if projection.bias is None:
            torch.mm(some, projection.weight.T, out=projected)
        else:
            torch.addmm(projection.bias, some, projection.weight.T, out=projected)
        _finish_kv(projected, projection, their_positions, their_slots, k_buffer, v_buffer)


def part_rows(n: int) -> int:
    """Parts of equal size, of about PART_ROWS; whole tiles of a product each."""
    parts = max(1, round(n / PART_ROWS))
    return min(n, -(-n // (parts * _CUBLAS_ROWS)) * _CUBLAS_ROWS)


def _finish_kv(
    projected: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
) -> None:
    """What follows the product: `projected`, `[n, N]`, bias included, into the pool's slots."""
    p, n = projection, len(projected)
    inverse_rms = None
    if p.norm == FULL_NORM:
        inverse_rms = torch.empty(n, dtype=torch.float32, device=projected.device)
        _inverse_rms[(n,)](
            projected, projected.stride(0), inverse_rms, p.eps, COLUMNS=p.k_heads * p.k_dim, BLOCK=_RMS_BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
    _finish[(p.k_heads + p.v_heads, triton.cdiv(n, _TOKENS))](
        projected,
        projected.stride(0),
        slots,
        positions,
        or_unread(p.cos_sin, projected),
        or_unread(p.norm_weight, projected),
        or_unread(inverse_rms, projected),
        p.eps,
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        n,
        **_constants(p),
        num_warps=_WARPS,
    )


def _constants(p: Projection) -> dict[str, Any]:
    return {
        "K_HEADS": p.k_heads,
        "K_DIM": p.k_dim,
        "V_DIM": p.v_dim,
        "ROTARY": p.rotary_dim,
        "NEOX": p.neox,
        "NORM": p.norm,
        "K_PAIRS": pair_lanes(p.k_dim),
        "V_PAIRS": pair_lanes(p.v_dim),
        "TOKENS": _TOKENS,
    }


def compile_specs() -> Iterator[KernelSpec]:
    """What follows the product, with every option; no size is a constant but those of heads."""
    for dim, rotary, neox, norm_size, pool in (
        (64, 16, True, 0, "*bf16"),
        (96, 96, True, 0, "*fp16"),
        (128, 128, True, 0, "*bf16"),
        (128, 128, True, 32 * 128, "*bf16"),
        (128, 128, False, 128, "*bf16"),
        (128, 0, True, 0, "*fp8e5"),
        (128, 128, True, 0, "*fp8e4nv"),
        (256, 256, True, 0, "*bf16"),
    ):
        shape = Shape(width=4096, k_heads=32, v_heads=32, head_dim=dim)
        p = without_memory(shape, rotary_dim=rotary, neox=neox, norm_size=norm_size)
        name = f"finish heads of {dim}, {rotary} turned, norm {p.norm}, into {pool[1:]}"
        yield spec(name, _finish, _constants(p), warps=_WARPS, stages=1, pool=pool)
    yield KernelSpec(
        name="inverse_rms",
        kernel=_inverse_rms,
        signature={"rows": "*bf16", "stride": "i32", "out": "*fp32", "eps": "fp32"},
        constexprs={"COLUMNS": 4096, "BLOCK": _RMS_BLOCK},
        num_warps=_WARPS,
        aligned=("rows", "stride", "out"),
    )
