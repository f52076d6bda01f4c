"""Projecting a layer's hidden states to K and V in the paged pool, with bias, K's norm and RoPE.

Two forms of the same function: one GEMM that does all (`_project`, or `_project_heads` with more heads a tile), and
cuBLAS followed by a kernel that does the rest (`_finish`). `tuning.py` says which serves a shape.
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

from sglang_hcache.triton_kernels.aot import CAPABILITIES, KernelSpec
from sglang_hcache.triton_kernels.tuning import (
    FINISH_TOKENS,
    FINISH_WARPS,
    PART_ROWS,
    SEVERAL_HEADS,
    SHAPES,
    Fused,
    Shape,
    candidates,
)

FP8_SINCE = 89  # a GPU before sm_89 has no instruction for it, and Triton 3.6 no substitute
_NO_NORM, _HEAD_NORM, _FULL_NORM = range(3)
_GROUP = 8  # blocks of tokens that share a pass over the weight, to find it in L2
_TILE = 128  # rows of a block of cuBLAS
_DESCRIBED = 16  # bytes that divide the address and the strides of what a descriptor describes


@dataclasses.dataclass(frozen=True)
class Projection:
    """What one layer's attention does to its input to get K and V; N = k_heads · k_dim + v_heads · v_dim.

    weight: `[N, width]`, K's rows first; bias: `[N]`. norm_weight: RMSNorm of K, over each head (`[k_dim]`) or over
    all of them (`[k_heads · k_dim]`); eps is added to the mean square. cos_sin: `[positions, rotary_dim]`, cosines
    then sines, as SGLang's rotary modules keep them; the first rotary_dim columns of a K head are turned, paired by
    halves (NeoX) or with their neighbours (GPT-J). K and V are divided by their scales before they are stored.
    Raises ValueError where shapes do not fit together.
    """

    weight: torch.Tensor
    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    eps: float = 0.0
    cos_sin: torch.Tensor | None = None
    neox: bool = True
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[0] != self.columns or self.weight.stride(1) != 1:
            raise ValueError(f"a weight {list(self.weight.shape)} for {self.columns} columns")
        if self.bias is not None and self.bias.shape != (self.columns,):
            raise ValueError(f"a bias {list(self.bias.shape)} for {self.columns} columns")
        if self.norm_weight is not None and self.norm_weight.numel() not in (self.k_dim, self.k_heads * self.k_dim):
            raise ValueError(f"a norm of {self.norm_weight.numel()} for {self.k_heads} heads of {self.k_dim}")
        if self.k_dim % 2 or self.v_dim % 2 or self.rotary_dim % 2 or self.rotary_dim > self.k_dim:
            raise ValueError(f"heads of {self.k_dim} and {self.v_dim}, {self.rotary_dim} of it turned")

    @property
    def columns(self) -> int:
        return self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def rotary_dim(self) -> int:
        return 0 if self.cos_sin is None else self.cos_sin.shape[1]

    @property
    def norm(self) -> int:
        if self.norm_weight is None:
            return _NO_NORM
        return _HEAD_NORM if self.norm_weight.numel() == self.k_dim else _FULL_NORM

    @property
    def shape(self) -> Shape:
        return Shape(self.weight.shape[1], self.k_heads, self.v_heads, self.k_dim)

    @property
    def _row_sizes(self) -> tuple[int, int]:
        """Bytes of a row of the input, and from a row of the weight to the next."""
        return self.weight[0].nbytes, self.weight.stride(0) * self.weight.itemsize

    def takes(self, form: Fused) -> bool:
        """Whether a fused kernel can do it.

        A program sees one head: not a norm over all, and its tile fits K's heads and V's alike. If it sees several,
        they are read by descriptors and turned as a whole: values of two bytes, aligned rows, no norm.
        """
        if self.norm == _FULL_NORM or self.k_dim != self.v_dim:
            return False
        return form.heads == 1 or (
            self.norm == _NO_NORM
            and self.neox
            and self.rotary_dim in (0, self.k_dim)
            and self.k_dim == triton.next_power_of_2(self.k_dim)
            and self.k_heads % form.heads == self.v_heads % form.heads == 0
            and self.weight.itemsize == 2
            and not any(size % _DESCRIBED for size in (self.weight.data_ptr(), *self._row_sizes))
        )


@triton.jit
def _pair(pair, DIM: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr):
    """The two columns of a head that are turned together; behind ROTARY / 2 pairs, two that stay."""
    if NEOX:
        first, second = pair, pair + ROTARY // 2
    else:
        first, second = 2 * pair, 2 * pair + 1
    turned = pair < ROTARY // 2
    return tl.where(turned, first, pair + ROTARY // 2), tl.where(turned, second, pair + DIM // 2)


@triton.jit
def _store_head(
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
        first, second = _pair(pair, K_DIM, ROTARY, NEOX)
        mask = (token < n)[:, None] & (pair < K_DIM // 2)[None, :]
        x1 = tl.load(rows + head * K_DIM + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(rows + head * K_DIM + second[None, :], mask=mask, other=0.0).to(tl.float32)
        _store_head(
            x1, x2, pair, first, second, token, n, head, slots, positions, cos_sin, norm_weight, inverse_rms, eps,
            k_buffer, k_stride, k_scale, K_DIM, ROTARY, NORM,
        )  # fmt: skip
    else:
        head -= K_HEADS
        pair = tl.arange(0, V_PAIRS)
        first, second = _pair(pair, V_DIM, V_DIM, True)
        mask = (token < n)[:, None] & (pair < V_DIM // 2)[None, :]
        rows += K_HEADS * K_DIM + head * V_DIM
        x1 = tl.load(rows + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(rows + second[None, :], mask=mask, other=0.0).to(tl.float32)
        _store_head(
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


@triton.jit
def _project(
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
    blocks = tl.cdiv(n, TOKENS)
    group = tl.program_id(0) // (GROUP * HEADS)
    in_group = tl.minimum(blocks - group * GROUP, GROUP)
    block = group * GROUP + tl.program_id(0) % (GROUP * HEADS) % in_group
    head = tl.program_id(0) % (GROUP * HEADS) // in_group

    token = block * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, PAIRS)
    first, second = _pair(pair, DIM, ROTARY, NEOX)
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
        _store_head(
            x1, x2, pair, first, second, token, n, head, slots, positions, cos_sin, norm_weight, norm_weight, eps,
            k_buffer, k_stride, k_scale, DIM, ROTARY, NORM,
        )  # fmt: skip
    else:
        _store_head(
            x1, x2, pair, first, second, token, n, head - K_HEADS, slots, positions, cos_sin, norm_weight,
            norm_weight, eps, v_buffer, v_stride, v_scale, DIM, 0, 0,
        )  # fmt: skip


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
def _project_heads(
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
    blocks = tl.cdiv(n, TOKENS)
    group = tl.program_id(0) // (GROUP * BLOCKS)
    in_group = tl.minimum(blocks - group * GROUP, GROUP)
    first_token = (group * GROUP + tl.program_id(0) % (GROUP * BLOCKS) % in_group) * TOKENS
    block = tl.program_id(0) % (GROUP * BLOCKS) // in_group

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


def project_kv(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    *,
    fused: Fused | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """K and V of `n` tokens into the pool's slots, on the current stream.

    rows: `[n, width]`, bf16, fp16 or fp32, as is the weight; positions, slots: int64 `[n]`, slots all different.
    k_buffer: `[slots, k_heads, k_dim]`, v_buffer likewise, in the pool's dtype, fp8 as torch's fp8 dtype; values
    beyond its range saturate. fused: run so; None for cuBLAS and a second kernel, on as many rows at a time as
    `workspace`, `[m, N]` of the rows' dtype, has; if left out, on about PART_ROWS. Raises ValueError for a form that
    the projection does not take.
    """
    if not len(rows):
        return
    if fused is None:
        if workspace is None:
            workspace = rows.new_empty(_part_rows(len(rows)), projection.columns)
        parts = (tensor.split(len(workspace)) for tensor in (rows, positions, slots))
        for some, their_positions, their_slots in zip(*parts, strict=True):
            projected = workspace[: len(some)]
            if projection.bias is None:
                torch.mm(some, projection.weight.T, out=projected)
            else:
                torch.addmm(projection.bias, some, projection.weight.T, out=projected)
            finish_kv(projected, projection, their_positions, their_slots, k_buffer, v_buffer)
        return
    if not projection.takes(fused):
        raise ValueError(f"{fused} is not for this projection: see Projection.takes")
    if fused.heads > 1:
        _launch_heads(rows, projection, positions, slots, k_buffer, v_buffer, fused)
        return
    p = projection
    heads = p.k_heads + p.v_heads
    _project[(triton.cdiv(len(rows), fused.tokens) * heads,)](
        rows,
        rows.stride(0),
        p.weight,
        p.weight.stride(0),
        _or_any(p.bias, rows),
        slots,
        positions,
        _or_any(p.cos_sin, rows),
        _or_any(p.norm_weight, rows),
        p.eps,
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        len(rows),
        WIDTH=rows.shape[1],
        K_HEADS=p.k_heads,
        HEADS=heads,
        DIM=p.k_dim,
        ROTARY=p.rotary_dim,
        NEOX=p.neox,
        NORM=p.norm,
        BIAS=p.bias is not None,
        PAIRS=_pairs(p.k_dim),
        TOKENS=fused.tokens,
        DEPTH=fused.depth,
        GROUP=_GROUP,
        num_warps=fused.warps,
        num_stages=fused.stages,
    )


def _launch_heads(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    fused: Fused,
) -> None:
    p, columns = projection, fused.heads * projection.k_dim
    blocks = p.columns // columns
    _project_heads[(triton.cdiv(len(rows), fused.tokens) * blocks,)](
        TensorDescriptor.from_tensor(rows, [fused.tokens, fused.depth]),
        TensorDescriptor.from_tensor(p.weight, [columns, fused.depth]),
        _or_any(p.bias, rows),
        slots,
        positions,
        _or_any(p.cos_sin, rows),
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        len(rows),
        WIDTH=rows.shape[1],
        K_BLOCKS=p.k_heads // fused.heads,
        BLOCKS=blocks,
        DIM=p.k_dim,
        TURN=p.rotary_dim != 0,
        BIAS=p.bias is not None,
        TOKENS=fused.tokens,
        COLUMNS=columns,
        DEPTH=fused.depth,
        GROUP=_GROUP,
        num_warps=fused.warps,
        num_stages=fused.stages,
    )


def _part_rows(n: int) -> int:
    """Parts of equal size, of about PART_ROWS; whole tiles of a product each."""
    parts = max(1, round(n / PART_ROWS))
    return min(n, -(-n // (parts * _TILE)) * _TILE)


def finish_kv(
    projected: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
) -> None:
    """What follows the GEMM: `projected`, `[n, N]`, bias included, into the pool's slots. As `project_kv` else."""
    p, n = projection, len(projected)
    inverse_rms = projected  # not read
    if p.norm == _FULL_NORM:
        inverse_rms = torch.empty(n, dtype=torch.float32, device=projected.device)
        columns = p.k_heads * p.k_dim
        _inverse_rms[(n,)](
            projected, projected.stride(0), inverse_rms, p.eps, COLUMNS=columns, BLOCK=1024, num_warps=4
        )
    _finish[(p.k_heads + p.v_heads, triton.cdiv(n, FINISH_TOKENS))](
        projected,
        projected.stride(0),
        slots,
        positions,
        _or_any(p.cos_sin, projected),
        _or_any(p.norm_weight, projected),
        inverse_rms,
        p.eps,
        k_buffer,
        k_buffer.stride(0),
        p.k_scale,
        v_buffer,
        v_buffer.stride(0),
        p.v_scale,
        n,
        K_HEADS=p.k_heads,
        K_DIM=p.k_dim,
        V_DIM=p.v_dim,
        ROTARY=p.rotary_dim,
        NEOX=p.neox,
        NORM=p.norm,
        K_PAIRS=_pairs(p.k_dim),
        V_PAIRS=_pairs(p.v_dim),
        TOKENS=FINISH_TOKENS,
        num_warps=FINISH_WARPS,
    )


def project_kv_reference(
    rows: torch.Tensor,
    projection: Projection,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
) -> None:
    """As `project_kv`, in PyTorch and float64, rounded once, to the buffers' dtype."""
    p = projection
    projected = rows.double() @ p.weight.double().T
    if p.bias is not None:
        projected += p.bias.double()
    key, value = projected.split([p.k_heads * p.k_dim, p.v_heads * p.v_dim], dim=1)
    if p.norm_weight is not None:
        over = key.unflatten(1, (-1, p.norm_weight.numel()))
        inverse = (over.square().mean(dim=-1, keepdim=True) + p.eps).rsqrt()
        key = (over * inverse * p.norm_weight.double()).flatten(1)
    key, value = key.unflatten(1, (p.k_heads, p.k_dim)), value.unflatten(1, (p.v_heads, p.v_dim))
    if p.cos_sin is not None:
        cos, sin = p.cos_sin[positions].double()[:, None].chunk(2, dim=-1)
        turned, stays = key.split([p.rotary_dim, p.k_dim - p.rotary_dim], dim=-1)
        x1, x2 = turned.chunk(2, dim=-1) if p.neox else (turned[..., ::2], turned[..., 1::2])
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        turned = torch.cat((y1, y2), dim=-1) if p.neox else torch.stack((y1, y2), dim=-1).flatten(-2)
        key = torch.cat((turned, stays), dim=-1)
    k_buffer[slots] = (key / p.k_scale).to(k_buffer.dtype)
    v_buffer[slots] = (value / p.v_scale).to(v_buffer.dtype)


def _pairs(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim // 2)))


def _or_any(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that the kernel does not read, where there is no tensor."""
    return other if tensor is None else tensor


def compile_specs() -> Iterator[KernelSpec]:
    """The fused form of each known shape in each configuration, and what follows cuBLAS, with every option."""
    for shape, model in {shape: model for model, shape in SHAPES.items()}.items():
        plain_or_not = ((_NO_NORM, False), (_HEAD_NORM, True))
        for fused, (norm, bias) in itertools.product(candidates(shape.head_dim, capability=0), plain_or_not):
            yield _spec(
                f"project {model} {fused.tokens}x{fused.depth}, norm {norm}, bias {int(bias)}",
                _project,
                fused.warps,
                fused.stages,
                WIDTH=shape.width,
                K_HEADS=shape.k_heads,
                HEADS=shape.k_heads + shape.v_heads,
                DIM=shape.head_dim,
                ROTARY=shape.head_dim,
                NEOX=True,
                NORM=norm,
                BIAS=bias,
                PAIRS=_pairs(shape.head_dim),
                TOKENS=fused.tokens,
                DEPTH=fused.depth,
                GROUP=_GROUP,
            )
    turned, pools = ((True, False), (True, True), (False, True)), ("*bf16", "*fp8e4nv")
    for (capability, fused), (turn, bias), pool in itertools.product(SEVERAL_HEADS.items(), turned, pools):
        columns = fused.heads * 128
        spec = _spec(
            f"project {fused.heads} heads by {fused.warps}, turned {int(turn)}, bias {int(bias)}, into {pool[1:]}",
            _project_heads,
            fused.warps,
            fused.stages,
            pool,
            WIDTH=4096,
            K_BLOCKS=4096 // columns,
            BLOCKS=8192 // columns,
            DIM=128,
            TURN=turn,
            BIAS=bias,
            TOKENS=fused.tokens,
            COLUMNS=columns,
            DEPTH=fused.depth,
            GROUP=_GROUP,
        )
        blocks = {"rows": (fused.tokens, fused.depth), "weight": (columns, fused.depth)}
        described = {name: f"tensordesc<bf16[{rows},{depth}]>" for name, (rows, depth) in blocks.items()}
        aligned = [name for name in spec.aligned if name not in described]
        signature = {**spec.signature, **described}
        yield dataclasses.replace(spec, signature=signature, aligned=aligned, capabilities=(capability,))
    for dim, rotary, neox, norm, pool in (
        (64, 16, True, _NO_NORM, "*bf16"),
        (96, 96, True, _NO_NORM, "*fp16"),
        (128, 128, True, _NO_NORM, "*bf16"),
        (128, 128, True, _FULL_NORM, "*bf16"),
        (128, 128, False, _HEAD_NORM, "*bf16"),
        (128, 0, True, _NO_NORM, "*fp8e5"),
        (128, 128, True, _NO_NORM, "*fp8e4nv"),
        (256, 256, True, _NO_NORM, "*bf16"),
    ):
        yield _spec(
            f"finish heads of {dim}, {rotary} turned, norm {norm}, into {pool[1:]}",
            _finish,
            FINISH_WARPS,
            1,
            pool,
            K_HEADS=32,
            K_DIM=dim,
            V_DIM=dim,
            ROTARY=rotary,
            NEOX=neox,
            NORM=norm,
            K_PAIRS=_pairs(dim),
            V_PAIRS=_pairs(dim),
            TOKENS=FINISH_TOKENS,
        )
    yield KernelSpec(
        name="inverse_rms",
        kernel=_inverse_rms,
        signature={"rows": "*bf16", "stride": "i32", "out": "*fp32", "eps": "fp32"},
        constexprs={"COLUMNS": 4096, "BLOCK": 1024},
        aligned=("rows", "stride", "out"),
    )


_TYPES = {
    **dict.fromkeys(("rows", "weight", "bias", "projected", "norm_weight"), "*bf16"),
    **dict.fromkeys(("slots", "positions"), "*i64"),
    **dict.fromkeys(("cos_sin", "inverse_rms"), "*fp32"),
    **dict.fromkeys(("rows_stride", "weight_stride", "projected_stride", "k_stride", "v_stride", "n"), "i32"),
    **dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32"),
}


def _spec(name: str, kernel: Any, warps: int, stages: int, pool: str = "*bf16", /, **constexprs: Any) -> KernelSpec:
    types = _TYPES | {"k_buffer": pool, "v_buffer": pool}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constexprs}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name.endswith("stride")]
    capabilities = [c for c in CAPABILITIES if "fp8" not in pool or c >= FP8_SINCE]
    return KernelSpec(name, kernel, signature, constexprs, warps, stages, aligned, capabilities)
