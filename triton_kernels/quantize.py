"""Lossy int8 and fp8 (e4m3) with a scale per row: what comes back is close to what was stored, not equal.

With a = the largest magnitude of a row, and for x of the row and its y as `dequantize_lossy` writes it to fp32:

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

import torch
import triton
import triton.language as tl

from sglang_hcache.triton_kernels.aot import KernelSpec

FLOOR = 2.0**-100  # far above fp32's denormals, so a scale is never one
CODE_TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
VALUE_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TILE = 1024  # values of a row that a program holds at a time
NUM_WARPS = 4


def quantize_lossy_reference(values: torch.Tensor, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_lossy`, in plain PyTorch on any device."""
    dtype = _code_type(code)
    x = values.float()
    if x.shape[1] == 0:
        return x.to(dtype), torch.zeros(x.shape[0], device=x.device)
    largest = x.abs().amax(1)
    scales = torch.where(largest < FLOOR, 0.0, largest / LARGEST[dtype])
    scales = torch.where(x.isfinite().all(1), scales, torch.nan)
    quotients = x / torch.where(scales > 0, scales, 1.0)[:, None]
    quotients = torch.where(scales[:, None] > 0, quotients, 0.0)
    return (quotients.round() if dtype == torch.int8 else quotients).to(dtype), scales


def dequantize_lossy_reference(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantize_lossy`, in plain PyTorch on any device; returns `[rows, width]` of `dtype`."""
    return (codes.float() * scales[:, None]).to(dtype)


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
    values,  # *bf16, *fp16 or *fp32 [rows, width]
    codes,  # *i8 [rows, width], the bits of fp8 too
    scales,  # *fp32 [rows]
    width,
    values_stride,  # values from a row to the next
    codes_stride,
    FP8: tl.constexpr,
    FLOOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    values += row * values_stride
    codes += row * codes_stride
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
    tl.store(scales + row, scale)
    divisor = tl.where(keep, scale, 1.0)
    for start in range(0, width, TILE):
        inside = start + column < width
        x = tl.load(values + start + column, mask=inside, other=0.0).to(tl.float32)
        quotient = tl.div_rn(tl.where(keep, x, 0.0), divisor)
        code = _to_e4m3(quotient) if FP8 else _round(quotient).to(tl.int32)
        tl.store(codes + start + column, code.to(tl.int8), mask=inside)


@triton.jit
def _dequantize_kernel(
    codes,  # *i8 [rows, width], the bits of fp8 too
    scales,  # *fp32 [rows]
    out,  # *i16 (bf16's bits), *fp16 or *fp32 [rows, width]
    width,
    codes_stride,  # values from a row to the next
    out_stride,
    FP8: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows, tiles of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    code = tl.load(codes + row * codes_stride + column, mask=column < width, other=0)
    x = _from_e4m3(code.to(tl.uint8, bitcast=True).to(tl.uint32)) if FP8 else code.to(tl.float32)
    y = x * tl.load(scales + row)
    if out.dtype.element_ty == tl.int16:
        y = _to_bf16_bits(y)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=column < width)


def quantize_lossy(values: torch.Tensor, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[rows, width]` of int8 or float8_e4m3fn and scales `[rows]` fp32 of values `[rows, width]`.

    values  bf16, fp16 or fp32; rows may be apart, values of a row may not
    code    "int8" or "fp8_e4m3"

    Lossy: the module says by how much, and what becomes of NaN and infinity. Raises ValueError for other arguments.
    """
    dtype = _code_type(code)
    _require_rows("values", values, tuple(VALUE_TYPES))
    rows, width = values.shape
    codes = torch.empty(rows, width, dtype=dtype, device=values.device)
    scales = torch.empty(rows, dtype=torch.float32, device=values.device)
    if rows:
        _quantize_kernel[(rows,)](
            values, codes.view(torch.int8), scales, width, values.stride(0), codes.stride(0),
            FP8=code == "fp8_e4m3", FLOOR=FLOOR, TILE=TILE, num_warps=NUM_WARPS,
        )  # fmt: skip
    return codes, scales


def dequantize_lossy(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Writes codes * scales, rounded to its dtype, to `out` `[rows, width]` bf16, fp16 or fp32.

    codes   `[rows, width]` int8 or float8_e4m3fn; rows of codes and out may be apart, values of a row may not
    scales  `[rows]` fp32, contiguous

    Raises ValueError for other arguments.
    """
    _require_rows("codes", codes, tuple(LARGEST))
    _require_rows("out", out, tuple(VALUE_TYPES))
    if codes.shape != out.shape or scales.shape != codes.shape[:1]:
        shapes = [tuple(each.shape) for each in (codes, scales, out)]
        raise ValueError("codes {}, scales {} and out {} are not of one shape".format(*shapes))
    if scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales are contiguous fp32, not {scales.dtype}")
    rows, width = codes.shape
    stored = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    if rows and width:
        _dequantize_kernel[(rows, triton.cdiv(width, TILE))](
            codes.view(torch.int8), scales, stored, width, codes.stride(0), out.stride(0),
            FP8=codes.dtype == torch.float8_e4m3fn, TILE=TILE, num_warps=NUM_WARPS,
        )  # fmt: skip


def _code_type(code: str) -> torch.dtype:
    if code not in CODE_TYPES:
        raise ValueError(f"code {code!r} is none of {', '.join(CODE_TYPES)}")
    return CODE_TYPES[code]


def _require_rows(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != 2 or tensor.dtype not in dtypes:
        raise ValueError(f"{name} are [rows, width] of {dtypes}, not {tuple(tensor.shape)} of {tensor.dtype}")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"the values of a row of {name} are {tensor.stride(1)} apart, they must be neighbours")


def compile_specs() -> Iterator[KernelSpec]:
    """The configurations that `quantize_lossy` and `dequantize_lossy` launch."""
    for code in CODE_TYPES:
        for dtype in VALUE_TYPES.values():
            fp8 = {"FP8": code == "fp8_e4m3", "TILE": TILE}
            sizes = {"width": "i32", "values_stride": "i32", "codes_stride": "i32", "out_stride": "i32"}
            pointers = {"values": dtype, "codes": "*i8", "scales": "*fp32", "out": dtype.replace("bf", "i")}
            for name, kernel in (("quantize", _quantize_kernel), ("dequantize", _dequantize_kernel)):
                signature = {key: kind for key, kind in (pointers | sizes).items() if key in kernel.arg_names}
                yield KernelSpec(
                    name=f"{name}_lossy_{code}_{dtype[1:]}",
                    kernel=kernel,
                    signature=signature,
                    constexprs=fp8 | ({"FLOOR": FLOOR} if name == "quantize" else {}),
                    num_warps=NUM_WARPS,
                    aligned=tuple(signature),
                )
