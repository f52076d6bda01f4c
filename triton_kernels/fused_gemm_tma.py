"""K and V by one kernel, a program of which makes several heads by one product, of tiles loaded by TMA.

For heads whose size is a power of two, turned by halves or not at all, and not normed. A tile of 128 × 256 is as wide
as Hopper's tensor cores multiply at once, and the input is read once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_hcache.triton_kernels.aot import KernelSpec
from sglang_hcache.triton_kernels.epilogue import or_unread
from sglang_hcache.triton_kernels.projection import NO_NORM, Projection
from sglang_hcache.triton_kernels.projection_specs import spec, without_memory
from sglang_hcache.triton_kernels.tile_order import GROUP, tile_of_program
from sglang_hcache.triton_kernels.tuning import SEVERAL_HEADS, SHAPES, Fused

_DESCRIBED = 16  # bytes that divide the address and the strides of what a descriptor describes


@triton.jit
def _store_heads(
    x,  # float32 [TOKENS, COLUMNS], of whole heads
    token,
    n,
    first_column,
    slots,
    positions,
    cos_sin,
    buffer,
    stride,
    scale,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    TURN: tl.constexpr,
):
    """As `epilogue.store_head`, of several whole heads at once, without a norm, turned by halves or not at all."""
    inside = token < n
    inverse = 1.0 / scale
    if TURN:
        HALF: tl.constexpr = DIM // 2
        pair = tl.arange(0, HALF)
        halves = tl.permute(tl.reshape(x, (TOKENS, COLUMNS // DIM, 2, HALF)), (0, 1, 3, 2))
        x1, x2 = tl.split(halves)  # [TOKENS, heads, HALF]
        angles = cos_sin + tl.load(positions + token, mask=inside, other=0)[:, None] * DIM + pair[None, :]
        cos = tl.load(angles, mask=inside[:, None], other=1.0).to(tl.float32)[:, None, :]
        sin = tl.load(angles + HALF, mask=inside[:, None], other=0.0).to(tl.float32)[:, None, :]
        y1 = ((x1 * cos - x2 * sin) * inverse).to(buffer.dtype.element_ty)
        y2 = ((x2 * cos + x1 * sin) * inverse).to(buffer.dtype.element_ty)
        values = tl.reshape(tl.permute(tl.join(y1, y2), (0, 1, 3, 2)), (TOKENS, COLUMNS))
    else:
        values = (x * inverse).to(buffer.dtype.element_ty)
    column = first_column + tl.arange(0, COLUMNS)
    place = buffer + tl.load(slots + token, mask=inside, other=0)[:, None] * stride + column[None, :]
    tl.store(place, values, mask=inside[:, None])


@triton.jit
def _fused_gemm_tma(
    rows,  # descriptor of [n, WIDTH], in blocks of [TOKENS, DEPTH]
    weight,  # descriptor of [columns, WIDTH], in blocks of [COLUMNS, DEPTH]
    bias,
    slots,
    positions,
    cos_sin,
    k_buffer,
    k_stride,
    k_scale,
    v_buffer,
    v_stride,
    v_scale,
    n,
    WIDTH: tl.constexpr,
    K_BLOCKS: tl.constexpr,  # of columns
    BLOCKS: tl.constexpr,  # K's and V's
    DIM: tl.constexpr,
    TURN: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    token_block, block = tile_of_program(n, TOKENS, BLOCKS, GROUP)
    first_token = token_block * TOKENS
    x = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        x = tl.dot(rows.load([first_token, start]), weight.load([block * COLUMNS, start]).T, x)
    if BIAS:
        x += tl.load(bias + block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.float32)[None, :]
    token = first_token + tl.arange(0, TOKENS)
    if block < K_BLOCKS:
        _store_heads(
            x, token, n, block * COLUMNS, slots, positions, cos_sin, k_buffer, k_stride, k_scale,
            TOKENS, COLUMNS, DIM, TURN,
        )  # fmt: skip
    else:
        _store_heads(
            x, token, n, (block - K_BLOCKS) * COLUMNS, slots, positions, cos_sin, v_buffer, v_stride, v_scale,
            TOKENS, COLUMNS, DIM, False,
        )  # fmt: skip


def takes(projection: Projection, form: Fused) -> bool:
    """Whether tiles consist of whole heads of K or of V, and a descriptor can be made of the weight and of rows."""
    p = projection
    row_sizes = (p.width * p.weight.itemsize, p.weight.stride(0) * p.weight.itemsize)
    return (
        p.norm == NO_NORM
        and p.neox
        and p.rotary_dim in (0, p.k_dim)
        and p.k_dim == p.v_dim == triton.next_power_of_2(p.k_dim)
        and p.k_heads % form.heads == p.v_heads % form.heads == 0
        and p.weight.itemsize == 2
        and not any(size % _DESCRIBED for size in (p.weight.data_ptr(), *row_sizes))
    )


def project(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    form: Fused,
) -> None:
    p, constants = projection, _constants(projection, form)
    _fused_gemm_tma[(triton.cdiv(len(rows), form.tokens) * constants["BLOCKS"],)](
        TensorDescriptor.from_tensor(rows, [form.tokens, form.depth]),
        TensorDescriptor.from_tensor(p.weight, [constants["COLUMNS"], form.depth]),
        or_unread(p.bias, rows),
        slots,
        positions,
        or_unread(p.cos_sin, rows),
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        len(rows),
        **constants,
        num_warps=form.warps,
        num_stages=form.stages,
    )


def _constants(p: Projection, form: Fused) -> dict[str, Any]:
    columns = form.heads * p.k_dim
    return {
        "WIDTH": p.width,
        "K_BLOCKS": p.k_heads // form.heads,
        "BLOCKS": p.columns // columns,
        "DIM": p.k_dim,
        "TURN": p.rotary_dim != 0,
        "BIAS": p.bias is not None,
        "TOKENS": form.tokens,
        "COLUMNS": columns,
        "DEPTH": form.depth,
        "GROUP": GROUP,
    }


def compile_specs() -> Iterator[KernelSpec]:
    """Of one shape, for the GPUs that have a configuration, with every option."""
    shape, pools = SHAPES["Llama-2-7B"], ("*bf16", "*fp8e4nv")
    options = ((True, False), (True, True), (False, True))
    for (capability, form), (turn, bias), pool in itertools.product(SEVERAL_HEADS.items(), options, pools):
        p = without_memory(shape, rotary_dim=shape.head_dim if turn else 0, bias=bias)
        constants = _constants(p, form)
        undescribed = spec(
            f"project {form.heads} heads by {form.warps}, turned {int(turn)}, bias {int(bias)}, into {pool[1:]}",
            _fused_gemm_tma,
            constants,
            warps=form.warps,
            stages=form.stages,
            pool=pool,
        )
        described = {
            name: f"tensordesc<bf16[{block},{form.depth}]>"
            for name, block in (("rows", form.tokens), ("weight", constants["COLUMNS"]))
        }
        yield dataclasses.replace(
            undescribed,
            signature={**undescribed.signature, **described},
            aligned=[name for name in undescribed.aligned if name not in described],
            capabilities=(capability,),
        )
