"""A layer's hidden states to K and V in the paged pool, with bias, K's norm and RoPE: the entry to all forms of it.

    fused_gemm, fused_gemm_tma   one product that does it all: a head a program, or several
    cublas_epilogue              cuBLAS, then a kernel that does the rest

`tuning.choose` says which serves a shape, `takes` whether a fused one can.
"""

from __future__ import annotations

import torch

from sglang_hcache.triton_kernels import cublas_epilogue, fused_gemm, fused_gemm_tma
from sglang_hcache.triton_kernels.checks import require_heads, require_indices, require_rows
from sglang_hcache.triton_kernels.projection import Projection
from sglang_hcache.triton_kernels.tuning import Fused


def takes(projection: Projection, form: Fused) -> bool:
    """Whether this fused form can do it."""
    return fused_gemm.takes(projection) if form.heads == 1 else fused_gemm_tma.takes(projection, form)


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
    beyond its range saturate. In rows and buffers, tokens may have gaps between them; each token's values may not.
    fused: the fused form to run; None for cuBLAS and a second kernel. workspace: `[m, N]` of the rows' dtype, for
    cuBLAS to process m rows at a time; by default about PART_ROWS. Raises ValueError for other arguments, and for a
    form that does not take the projection.
    """
    if not len(rows):
        return
    require_rows("rows", rows, 2, (projection.weight.dtype,))
    if rows.shape[1] != projection.width:
        raise ValueError(f"rows of {rows.shape[1]} values for a weight of {projection.width}")
    require_indices("positions", positions, len(rows))
    require_indices("slots", slots, len(rows))
    require_heads("k_buffer", k_buffer, projection.k_heads, projection.k_dim)
    require_heads("v_buffer", v_buffer, projection.v_heads, projection.v_dim)
    if fused is None:
        cublas_epilogue.project(rows, projection, positions, slots, k_buffer, v_buffer, workspace)
        return
    if not takes(projection, fused):
        raise ValueError(f"{fused} is not for this projection: see `takes`")
    form = fused_gemm if fused.heads == 1 else fused_gemm_tma
    form.project(rows, projection, positions, slots, k_buffer, v_buffer, fused)
