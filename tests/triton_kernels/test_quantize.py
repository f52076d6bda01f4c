from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.triton_kernels.quantize import (
    FLOOR,
    LARGEST,
    dequantize_lossy,
    dequantize_lossy_reference,
    quantize_lossy,
    quantize_lossy_reference,
)
from tests.triton_kernels.poison import DEVICE, assert_writes, bits

SHAPES = [(1, 1), (1, 4096), (63, 48), (65, 100), (5, 2880), (3, 1025)]
CODES = ["int8", "fp8_e4m3"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SLACK = 1 + 2.0**-14  # of the bounds that the module derives
ROUNDING = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.float32: (0.0, 0.0)}


def rows_of_many_sizes(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, width, generator=generator) * size).to(dtype).to(DEVICE)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bitwise, except that any NaN is one."""
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(
        bits(left[~left.isnan()][None]), bits(right[~right.isnan()][None])
    )


def bound(x: torch.Tensor, y: torch.Tensor, code: str, dtype: torch.dtype) -> torch.Tensor:
    """The largest error that the module allows, of fp64 `x` `[rows, width]` that came back as `y`."""
    largest = x.abs().amax(1, keepdim=True)
    steps = largest / 254 if code == "int8" else torch.maximum(x.abs() / 16, largest / 458752)
    relative, absolute = ROUNDING[dtype]
    return steps * SLACK + y.abs() * relative + absolute


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_kernels_are_bitwise_their_references(code: str, dtype: torch.dtype, rows: int, width: int) -> None:
    values = rows_of_many_sizes(rows, width + 3, dtype)[:, :width]  # rows that are apart
    codes, scales = quantize_lossy(values, code)
    expected_codes, expected_scales = quantize_lossy_reference(values, code)
    assert codes.dtype == expected_codes.dtype
    assert same(scales, expected_scales)
    assert torch.equal(codes.view(torch.int8), expected_codes.view(torch.int8))
    expected = dequantize_lossy_reference(codes, scales, dtype)
    for row_gap in (0, 7):
        assert_writes(expected, row_gap, lambda out: dequantize_lossy(codes, scales, out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_the_error_is_within_the_derived_bound(code: str, dtype: torch.dtype) -> None:
    values = rows_of_many_sizes(64, 1000, dtype, seed=1)
    values[:, :3] *= 30  # outliers, which leave few steps to the others
    values[:, 10:500] *= 1e-3
    codes, scales = quantize_lossy(values, code)
    y = torch.empty_like(values)
    dequantize_lossy(codes, scales, y)
    error = (y.double() - values.double()).abs()
    allowed = bound(values.double(), y.double(), code, dtype)
    assert (error <= allowed).all()
    if dtype == torch.float32:
        assert (error > 0.99 * allowed).any()  # the bound is not a loose one


@given(data=st.data(), code=st.sampled_from(CODES), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_finite_row_is_within_the_bound(data: st.DataObject, code: str, width: int) -> None:
    finite = st.floats(-(2.0**120), 2.0**120, width=32)
    values = torch.tensor([data.draw(st.lists(finite, min_size=width, max_size=width))], device=DEVICE)
    codes, scales = quantize_lossy(values, code)
    assert torch.equal(codes.view(torch.int8), quantize_lossy_reference(values, code)[0].view(torch.int8))
    y = torch.empty_like(values)
    dequantize_lossy(codes, scales, y)
    if values.abs().max() < FLOOR:
        assert not y.any()
    else:
        assert ((y.double() - values.double()).abs() <= bound(values.double(), y.double(), code, torch.float32)).all()


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_decoded_as_torch_does(code: str) -> None:
    """Also e4m3's NaN, which is never written."""
    dtype = torch.int8 if code == "int8" else torch.float8_e4m3fn
    codes = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE).view(dtype)[None]
    scales = torch.ones(1, device=DEVICE)
    for out_dtype in DTYPES:
        out = torch.empty(1, 256, dtype=out_dtype, device=DEVICE)
        dequantize_lossy(codes, scales, out)
        assert same(out, codes.to(out_dtype))


@pytest.mark.parametrize("code", CODES)
def test_every_bf16_is_coded_as_the_reference_does(code: str) -> None:
    """Each of them beside a value that makes the scale 1, so that ties and tiny numbers occur."""
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    largest = LARGEST[torch.int8 if code == "int8" else torch.float8_e4m3fn]
    values = whole[whole.float().abs() <= largest]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 512)).view(-1, 512)
    values = torch.cat([values, torch.full_like(values[:, :1], largest)], 1).to(DEVICE)
    codes, scales = quantize_lossy(values, code)
    expected, expected_scales = quantize_lossy_reference(values, code)
    assert (scales == 1).all()
    assert (expected_scales == 1).all()
    assert torch.equal(codes.view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_a_row_with_nan_or_infinity_comes_back_as_nan(code: str, dtype: torch.dtype, bad: float) -> None:
    values = rows_of_many_sizes(3, 1500, dtype)
    values[1, 1400] = bad
    codes, scales = quantize_lossy(values, code)
    assert same(scales, quantize_lossy_reference(values, code)[1])
    assert torch.equal(codes.view(torch.int8), quantize_lossy_reference(values, code)[0].view(torch.int8))
    out = torch.empty_like(values)
    dequantize_lossy(codes, scales, out)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("code", CODES)
def test_rows_below_the_floor_are_zero(code: str) -> None:
    values = torch.tensor([[0.0, -0.0], [FLOOR, -FLOOR], [FLOOR * 0.99, 0.0], [1e-45, 0.0]], device=DEVICE)
    codes, scales = quantize_lossy(values, code)
    assert same(scales, quantize_lossy_reference(values, code)[1])
    out = torch.empty_like(values)
    dequantize_lossy(codes, scales, out)
    assert not out[[0, 2, 3]].any()
    assert torch.allclose(out[1], values[1])


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (3, 0)])
def test_empty(rows: int, width: int) -> None:
    codes, scales = quantize_lossy(torch.empty(rows, width, device=DEVICE), "int8")
    assert codes.shape == (rows, width)
    assert torch.equal(scales, torch.zeros(rows, device=DEVICE))
    dequantize_lossy(codes, scales, torch.empty(rows, width, device=DEVICE))


def test_arguments_are_checked() -> None:
    values = rows_of_many_sizes(4, 8, torch.float32)
    codes, scales = quantize_lossy(values, "int8")
    with pytest.raises(ValueError, match="none of int8, fp8_e4m3"):
        quantize_lossy(values, "int4")
    with pytest.raises(ValueError, match="values are"):
        quantize_lossy(values.double(), "int8")
    with pytest.raises(ValueError, match="neighbours"):
        quantize_lossy(values.T, "int8")
    with pytest.raises(ValueError, match="one shape"):
        dequantize_lossy(codes, scales[:3], values)
    with pytest.raises(ValueError, match="contiguous fp32"):
        dequantize_lossy(codes, scales.double(), values)
    with pytest.raises(ValueError, match="codes are"):
        dequantize_lossy(values, scales, values)
