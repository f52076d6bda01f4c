"""What the projection's kernels share when compiled ahead: types of arguments, and projections without memory."""

from __future__ import annotations

from typing import Any

import torch

from sglang_hcache.triton_kernels.aot import CAPABILITIES, KernelSpec, signature_of
from sglang_hcache.triton_kernels.epilogue import FP8_SINCE
from sglang_hcache.triton_kernels.projection import Projection
from sglang_hcache.triton_kernels.tuning import Shape

_TYPES = {
    **dict.fromkeys(("rows", "weight", "bias", "projected", "norm_weight"), "*bf16"),
    **dict.fromkeys(("slots", "positions"), "*i64"),
    **dict.fromkeys(("cos_sin", "inverse_rms"), "*fp32"),
    **dict.fromkeys(("rows_stride", "weight_stride", "projected_stride", "k_stride", "v_stride", "n"), "i32"),
    **dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32"),
}


def without_memory(
    shape: Shape, *, rotary_dim: int, neox: bool = True, norm_size: int = 0, bias: bool = False
) -> Projection:
    """A projection of bf16 tensors that have no values."""
    columns = (shape.k_heads + shape.v_heads) * shape.head_dim
    return Projection(
        weight=_nothing(columns, shape.width),
        k_heads=shape.k_heads,
        k_dim=shape.head_dim,
        v_heads=shape.v_heads,
        v_dim=shape.head_dim,
        bias=_nothing(columns) if bias else None,
        norm_weight=_nothing(norm_size) if norm_size else None,
        cos_sin=_nothing(1, rotary_dim) if rotary_dim else None,
        neox=neox,
    )


def _nothing(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def spec(
    name: str, kernel: Any, constants: dict[str, Any], *, warps: int, stages: int, pool: str = "*bf16"
) -> KernelSpec:
    """pool: Triton's type of a pointer into K's and V's pools."""
    signature = signature_of(kernel, _TYPES | {"k_buffer": pool, "v_buffer": pool}, constants)
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name.endswith("stride")]
    capabilities = [c for c in CAPABILITIES if "fp8" not in pool or c >= FP8_SINCE]
    return KernelSpec(name, kernel, signature, constants, warps, stages, aligned, capabilities)
