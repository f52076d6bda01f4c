"""Hidden states in eight bits a value and a scale a token: what comes back is close to what was captured, no more."""

from __future__ import annotations

import torch

from sglang_hcache.model import Unsupported
from sglang_hcache.restore import Projector
from sglang_hcache.triton_kernels.quantize import (
    CODE_TYPES,
    dequantize_lossy,
    dequantize_lossy_reference,
    quantize_lossy,
    quantize_lossy_reference,
)

_SCALE_BYTES = 4  # float32


class LossyCode:
    """Rows of `width` values of `dtype` as bytes, `row_bytes` each: their codes, then their scale.

    code: a key of `CODE_TYPES`; `triton_kernels.quantize` says how far off what comes back can be. Raises
    Unsupported for a width that scales cannot follow.
    """

    def __init__(self, code: str, width: int, dtype: torch.dtype) -> None:
        if width % _SCALE_BYTES:
            raise Unsupported(f"--hcache-lossy: a width of {width} is no multiple of {_SCALE_BYTES}; drop it")
        self._code, self._width, self._dtype = code, width, dtype
        self.row_bytes = width + _SCALE_BYTES

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """`[layers, n, width]` → uint8 `[layers, n, row_bytes]`, on the current stream."""
        flat = rows.reshape(-1, self._width)
        quantize = quantize_lossy_reference if rows.device.type == "cpu" else quantize_lossy
        codes, scales = quantize(flat, self._code)
        encoded = torch.cat([codes.view(torch.uint8), scales.view(torch.uint8).view(-1, _SCALE_BYTES)], dim=1)
        return encoded.view(*rows.shape[:-1], self.row_bytes)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 `[n, row_bytes]` → `[n, width]`, on the current stream."""
        codes = rows[:, : self._width].view(CODE_TYPES[self._code])
        scales = rows[:, self._width :].contiguous().view(torch.float32).view(-1)
        if rows.device.type == "cpu":
            return dequantize_lossy_reference(codes, scales, self._dtype)
        values = torch.empty(codes.shape, dtype=self._dtype, device=rows.device)
        dequantize_lossy(codes, scales, values)
        return values


class LossyProjector:
    """Another projector, on rows that were encoded."""

    def __init__(self, projector: Projector, code: LossyCode) -> None:
        self._projector = projector
        self._code = code

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        self._projector.project(layer, self._code.decode(rows), positions, slots)
