"""Lossy int8 and fp8 (e4m3) with a scale per row: what comes back is close to what was stored, not equal.

A row of w values takes w codes of a byte, then its scale, fp32 and little-endian; w is a multiple of 4. With a = the
largest magnitude of a row, and for x of the row and its y as `dequantize_rows` writes it to fp32:

    int8      |y - x| <= a / 254 * (1 + 2^-14)
    fp8_e4m3  |y - x| <= max(|x| / 16, a / 458,752) * (1 + 2^-14)

A code is at most half a step from x / scale. Steps are 1 for int8, whose largest code is 127, so half a step is
a / 254. An e4m3 number has three bits of mantissa, so half a step is at most 1/16 of it down to its smallest normal
number 2^-6, and 2^-10 below; its largest is 448, so that is a / (448 * 1024). The scale, the quotient and the product
are rounded to fp32, 2^-24 each, of magnitudes up to 127 or 448 steps: 2^-14 of a half step covers all three. Writing
bf16 or fp16 adds half a unit in the last place of y: up to 2^-8 |y|, or 2^-11 |y| (at least 2^-25).

A row whose largest magnitude is below FLOOR comes back as zeros. A row that holds a NaN or an infinity has no
scale: its scale is NaN and all of it comes back as NaN, so that it is never mistaken for one that was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec, signature_of
from sglang_hcache.triton_kernels.checks import require_bytes, require_rows

FLOOR = 2.0**-100  # far above fp32's denormals, so a scale is never one
CODE_TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
VALUE_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TILE = 1024  # values of a row that a program holds at a time
NUM_WARPS = 4
_SCALE_BYTES = 4


def lossy_row_bytes(width: int) -> int:
    """Of a row of `width` values. Raises ValueError where that is no multiple of 4."""
    if width % _SCALE_BYTES or width <= 0:
        raise ValueError(f"rows of {width} values cannot be coded: {width} is no multiple of {_SCALE_BYTES}")
    return width + _SCALE_BYTES


def quantize_rows_reference(values: torch.Tensor, code: str) -> torch.Tensor:
    """Values `[…, width]` as uint8 `[…, lossy_row_bytes(width)]`: as `quantize_rows`, in PyTorch on any device."""
    dtype, width = _code_type(code), values.shape[-1]
    x = values.reshape(values.shape[:-1].numel(), width).float()
    largest = x.abs().amax(1)
    most = torch.full_like(largest, LARGEST[dtype])  # CUDA divides by a number as times its reciprocal: other bits
    scales = torch.where(largest < FLOOR, 0.0, largest / most)
    scales = torch.where(x.isfinite().all(1), scales, torch.nan)
    quotients = x / torch.where(scales > 0, scales, 1.0)[:, None]
    quotients = torch.where(scales[:, None] > 0, quotients, 0.0)
    coded = torch.empty(len(x), lossy_row_bytes(width), dtype=torch.uint8, device=x.device)
    coded[:, :width] = (quotients.round() if dtype == torch.int8 else quotients).to(dtype).view(torch.uint8)
    coded[:, width:] = scales.view(torch.uint8).view(-1, _SCALE_BYTES)
    return coded.view(*values.shape[:-1], coded.shape[1])


def dequantize_rows_reference(rows: torch.Tensor, code: str, dtype: torch.dtype) -> torch.Tensor:
    """Rows `[n, lossy_row_bytes(width)]` as `[n, width]` of `dtype`: as `dequantize_rows`, in PyTorch."""
    codes, scales = rows.split([rows.shape[1] - _SCALE_BYTES, _SCALE_BYTES], dim=1)
    values: torch.Tensor = codes.view(_code_type(code)).float() * scales.contiguous().view(torch.float32)
    return values.to(dtype)


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22: beyond 2^23 fp32 holds integers only."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_e4m3(x):
    """fp32 of magnitude up to 448 to the nearest e4m3, ties to even, as int32; done by hand, since sm_80 cannot."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # 120: fp32's bias less e4m3's
    tiny = _round(magnitude.to(tl.float32, bitcast=True) * 512.0).to(tl.uint32)
    code = tl.where(magnitude < 0x3C800000, tiny, normal)  # 2^-6
    return (tl.minimum(code, 0x7E) | ((bits >> 24) & 0x80)).to(tl.int32)


@triton.jit
def _from_e4m3(code):
    """e4m3 as uint32 to fp32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # 2^-9
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, value.to(tl.uint32, bitcast=True))
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _to_bf16_bits(x):
    """fp32 to the nearest bf16, ties to even, as int16; by hand, since Triton's interpreter rounds otherwise."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) <= 0x7F800000, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _quantize_kernel(
    values,  # *bf16, *fp16 or *fp32 [layers, rows, width]
    coded,  # *i8 [layers, rows, width + 4], contiguous
    width,
    values_layer,  # values from a layer to the next
    values_stride,  # values from a row to the next
    FP8: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows, layers."""
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    values += layer * values_layer + row * values_stride
    coded += (layer * tl.num_programs(0) + row) * (width + 4)
    column = tl.arange(0, TILE)
    largest = tl.zeros((TILE,), tl.float32)
    broken = tl.zeros((TILE,), tl.int32)
    for start in range(0, width, TILE):
        x = tl.load(values + start + column, mask=start + column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        broken = broken | ((x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
    peak = tl.max(largest, 0)
    scale = tl.div_rn(peak, 448.0 if FP8 else 127.0)
    keep = (peak >= FLOOR) & (tl.max(broken, 0) == 0)
    scale = tl.where(keep, scale, tl.where(tl.max(broken, 0) == 0, 0.0, float("nan")))
    tl.store((coded + width).to(tl.pointer_type(tl.float32), bitcast=True), scale)
    divisor = tl.where(keep, scale, 1.0)
    for start in range(0, width, TILE):
        inside = start + column < width
        x = tl.load(values + start + column, mask=inside, other=0.0).to(tl.float32)
        quotient = tl.div_rn(tl.where(keep, x, 0.0), divisor)
        code = _to_e4m3(quotient) if FP8 else _round(quotient).to(tl.int32)
        tl.store(coded + start + column, code.to(tl.int8), mask=inside)


@triton.jit
def _dequantize_kernel(
    coded,  # *i8 [rows, width + 4], contiguous
    out,  # *i16 (bf16's bits), *fp16 or *fp32 [rows, width]
    width,
    out_stride,  # values from a row to the next
    FP8: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows, tiles of a row."""
    row = tl.program_id(0).to(tl.int64)
    coded += row * (width + 4)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    code = tl.load(coded + column, mask=column < width, other=0)
    x = _from_e4m3(code.to(tl.uint8, bitcast=True).to(tl.uint32)) if FP8 else code.to(tl.float32)
    y = x * tl.load((coded + width).to(tl.pointer_type(tl.float32), bitcast=True))
    if out.dtype.element_ty == tl.int16:
        y = _to_bf16_bits(y)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=column < width)


def quantize_rows(values: torch.Tensor, out: torch.Tensor, code: str) -> None:
    """Writes values `[layers, n, width]` bf16, fp16 or fp32 to `out` `[layers, n, lossy_row_bytes(width)]` uint8.

    code    "int8" or "fp8_e4m3"

    Layers and rows of values may be apart, values of a row may not; out is contiguous. On the current stream, in one
    launch. Lossy: the module says by how much, and what becomes of NaN and infinity. Raises ValueError for other
    arguments.
    """
    fp8 = _code_type(code) == torch.float8_e4m3fn
    require_rows("values", values, 3, VALUE_TYPES)
    layers, rows, width = values.shape
    require_bytes("coded rows", out, (layers, rows, lossy_row_bytes(width)), _SCALE_BYTES)
    if layers and rows:
        _quantize_kernel[(rows, layers)](
            values, out.view(torch.int8), width, values.stride(0), values.stride(1),
            FP8=fp8, FLOOR=FLOOR, TILE=TILE, num_warps=NUM_WARPS,
        )  # fmt: skip


def dequantize_rows(coded: torch.Tensor, out: torch.Tensor, code: str) -> None:
    """Writes rows `[n, lossy_row_bytes(width)]` uint8 to `out` `[n, width]` bf16, fp16 or fp32.

    Rows of out may be apart, values of a row may not; coded is contiguous. On the current stream. Raises ValueError
    for other arguments.
    """
    fp8 = _code_type(code) == torch.float8_e4m3fn
    require_rows("out", out, 2, VALUE_TYPES)
    rows, width = out.shape
    require_bytes("coded rows", coded, (rows, lossy_row_bytes(width)), _SCALE_BYTES)
    stored = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    if rows:
        _dequantize_kernel[(rows, triton.cdiv(width, TILE))](
            coded.view(torch.int8), stored, width, out.stride(0), FP8=fp8, TILE=TILE, num_warps=NUM_WARPS
        )


def _code_type(code: str) -> torch.dtype:
    if code not in CODE_TYPES:
        raise ValueError(f"code {code!r} is none of {', '.join(CODE_TYPES)}")
    return CODE_TYPES[code]


def compile_specs() -> Iterator[KernelSpec]:
    """The configurations that `quantize_rows` and `dequantize_rows` launch."""
    for code in CODE_TYPES:
        for dtype in VALUE_TYPES.values():
            both: dict[str, Any] = {"FP8": code == "fp8_e4m3", "TILE": TILE}
            of_kernel = {"quantize": both | {"FLOOR": FLOOR}, "dequantize": both}
            sizes = {"width": "i32", "values_layer": "i64", "values_stride": "i32", "out_stride": "i32"}
            pointers = {"values": dtype, "coded": "*i8", "out": dtype.replace("bf", "i")}
            for name, kernel in (("quantize", _quantize_kernel), ("dequantize", _dequantize_kernel)):
                signature = signature_of(kernel, pointers | sizes, of_kernel[name])
                yield KernelSpec(
                    name=f"{name}_rows_{code}_{dtype[1:]}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=of_kernel[name],
                    num_warps=NUM_WARPS,
                    aligned=tuple(signature),
                )
