"""K and V by one kernel, a program of which makes one head by two products, of half a head each.

Each half has one column of every pair that RoPE turns, so the epilogue needs no column of another thread. For heads
of any size, normed one by one or not at all, on any GPU; the input is read twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec
from sglang_hcache.triton_kernels.epilogue import or_unread, pair_columns, pair_lanes, store_head
from sglang_hcache.triton_kernels.projection import FULL_NORM, Projection
from sglang_hcache.triton_kernels.projection_specs import spec, without_memory
from sglang_hcache.triton_kernels.tile_order import GROUP, tile_of_program
from sglang_hcache.triton_kernels.tuning import SHAPES, Fused, candidates


@triton.jit
def _fused_gemm(
    rows,  # [n, WIDTH]
    rows_stride,
    weight,
    weight_stride,
    bias,
    slots,
    positions,
    cos_sin,
    norm_weight,
    eps,
    k_buffer,
    k_stride,
    k_scale,
    v_buffer,
    v_stride,
    v_scale,
    n,
    WIDTH: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEADS: tl.constexpr,  # K's and V's
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    NEOX: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, head = tile_of_program(n, TOKENS, HEADS, GROUP)
    token = block * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAIRS)
    first, second = pair_columns(pair, DIM, ROTARY, NEOX)
    inside, column = token < n, pair < DIM // 2
    depth = tl.arange(0, DEPTH)
    x_place = rows + token.to(tl.int64)[:, None] * rows_stride + depth[None, :]
    w1_place = weight + (head * DIM + first).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    w2_place = weight + (head * DIM + second).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    x1 = tl.zeros([TOKENS, PAIRS], tl.float32)
    x2 = tl.zeros([TOKENS, PAIRS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        here = start + depth < WIDTH
        x = tl.load(x_place + start, mask=inside[:, None] & here[None, :], other=0.0)
        w1 = tl.load(w1_place + start, mask=column[None, :] & here[:, None], other=0.0)
        w2 = tl.load(w2_place + start, mask=column[None, :] & here[:, None], other=0.0)
        x1 = tl.dot(x, w1, x1, input_precision="ieee")
        x2 = tl.dot(x, w2, x2, input_precision="ieee")
    if BIAS:
        x1 += tl.load(bias + head * DIM + first, mask=column, other=0.0).to(tl.float32)[None, :]
        x2 += tl.load(bias + head * DIM + second, mask=column, other=0.0).to(tl.float32)[None, :]
    if head < K_HEADS:
        store_head(
            x1, x2, pair, first, second, token, n, head, slots, positions, cos_sin, norm_weight, norm_weight, eps,
            k_buffer, k_stride, k_scale, DIM, ROTARY, NORM,
        )  # fmt: skip
    else:
        store_head(
            x1, x2, pair, first, second, token, n, head - K_HEADS, slots, positions, cos_sin, norm_weight,
            norm_weight, eps, v_buffer, v_stride, v_scale, DIM, 0, 0,
        )  # fmt: skip


def takes(projection: Projection) -> bool:
    """Whether no norm spans several heads, and K's heads and V's have the same size."""
    return projection.norm != FULL_NORM and projection.k_dim == projection.v_dim


def project(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    form: Fused,
) -> None:
    p = projection
    _fused_gemm[(triton.cdiv(len(rows), form.tokens) * (p.k_heads + p.v_heads),)](
        rows,
        rows.stride(0),
        p.weight,
        p.weight.stride(0),
        or_unread(p.bias, rows),
        slots,
        positions,
        or_unread(p.cos_sin, rows),
        or_unread(p.norm_weight, rows),
        p.eps,
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        len(rows),
        **_constants(p, form),
        num_warps=form.warps,
        num_stages=form.stages,
    )


def _constants(p: Projection, form: Fused) -> dict[str, Any]:
    return {
        "WIDTH": p.width,
        "K_HEADS": p.k_heads,
        "HEADS": p.k_heads + p.v_heads,
        "DIM": p.k_dim,
        "ROTARY": p.rotary_dim,
        "NEOX": p.neox,
        "NORM": p.norm,
        "BIAS": p.bias is not None,
        "PAIRS": pair_lanes(p.k_dim),
        "TOKENS": form.tokens,
        "DEPTH": form.depth,
        "GROUP": GROUP,
    }


def compile_specs() -> Iterator[KernelSpec]:
    """Each known shape in each of its configurations, plain, and with a norm and a bias."""
    for shape, model in {shape: model for model, shape in SHAPES.items()}.items():
        for form, extras in itertools.product(candidates(shape.head_dim, capability=0), (False, True)):
            dim = shape.head_dim
            p = without_memory(shape, rotary_dim=dim, norm_size=dim if extras else 0, bias=extras)
            name = f"project {model} {form.tokens}x{form.depth}, norm {p.norm}, bias {int(extras)}"
            yield spec(name, _fused_gemm, _constants(p, form), warps=form.warps, stages=form.stages)
