from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from sglang_hcache.triton_kernels.quantize import (
    CODE_TYPES,
    FLOOR,
    LARGEST,
    dequantize_rows,
    dequantize_rows_reference,
    lossy_row_bytes,
    quantize_rows,
    quantize_rows_reference,
)
from tests.triton_kernels.poison import DEVICE, assert_writes, bits

SHAPES = [(1, 4), (1, 4096), (63, 48), (65, 100), (5, 2880), (3, 1028)]
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


def quantize(values: torch.Tensor, code: str) -> torch.Tensor:
    """By the kernel: `[rows, width]` as `[rows, bytes]`."""
    out = torch.full((1, len(values), lossy_row_bytes(values.shape[1])), 0xA5, dtype=torch.uint8, device=DEVICE)
    quantize_rows(values[None], out, code)
    return out[0]


def parts(rows: torch.Tensor, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[rows, width]` and scales `[rows]`."""
    codes, scales = rows.split([rows.shape[1] - 4, 4], dim=1)
    return codes.view(CODE_TYPES[code]), scales.contiguous().view(torch.float32)[:, 0]


def assert_same(rows: torch.Tensor, expected: torch.Tensor, code: str) -> None:
    """Bitwise, except that any NaN of a scale is one."""
    (codes, scales), (expected_codes, expected_scales) = parts(rows, code), parts(expected, code)
    assert same(scales, expected_scales)
    assert torch.equal(codes.view(torch.int8), expected_codes.view(torch.int8))


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
    coded = quantize_rows_reference(values, code)
    assert_same(quantize(values, code), coded, code)
    expected = dequantize_rows_reference(coded, code, dtype)
    for row_gap in (0, 7):
        assert_writes(expected, row_gap, lambda out: dequantize_rows(coded, out, code))


class DividingAsCuda(TorchFunctionMode):
    """Torch's kernel there multiplies by the reciprocal of a number that is no tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "div" in func.__name__ and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype, device=args[0].device))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("code", CODES)
def test_the_reference_is_the_same_on_every_device(code: str) -> None:
    values = rows_of_many_sizes(256, 64, torch.bfloat16)
    expected = quantize_rows_reference(values, code)
    with DividingAsCuda():
        assert torch.equal(quantize_rows_reference(values, code), expected)
    assert torch.equal(quantize_rows_reference(values.cpu(), code), expected.cpu())


@pytest.mark.parametrize(("layers", "rows"), [(1, 5), (3, 2), (2, 0)])
@pytest.mark.parametrize("code", CODES)
def test_layers_and_rows_that_are_apart(code: str, layers: int, rows: int) -> None:
    values = rows_of_many_sizes(40, 200, torch.bfloat16).view(4, 10, 200)[:layers, : 2 * rows : 2, 8:136]
    expected = quantize_rows_reference(values, code)
    assert expected.shape == (layers, rows, lossy_row_bytes(128))
    assert_writes(expected.flatten(0, 1), 0, lambda out: quantize_rows(values, out.view(expected.shape), code))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_the_error_is_within_the_derived_bound(code: str, dtype: torch.dtype) -> None:
    values = rows_of_many_sizes(64, 1000, dtype, seed=1)
    values[:, :3] *= 30  # outliers, which leave few steps to the others
    values[:, 10:500] *= 1e-3
    y = torch.empty_like(values)
    dequantize_rows(quantize(values, code), y, code)
    error = (y.double() - values.double()).abs()
    allowed = bound(values.double(), y.double(), code, dtype)
    assert (error <= allowed).all()
    if dtype == torch.float32:
        assert (error > 0.99 * allowed).any()  # the bound is not a loose one


@given(data=st.data(), code=st.sampled_from(CODES), width=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_any_finite_row_is_within_the_bound(data: st.DataObject, code: str, width: int) -> None:
    width *= 4
    finite = st.floats(-(2.0**120), 2.0**120, width=32)
    values = torch.tensor([data.draw(st.lists(finite, min_size=width, max_size=width))], device=DEVICE)
    coded, y = quantize(values, code), torch.empty_like(values)
    assert_same(coded, quantize_rows_reference(values, code), code)
    dequantize_rows(coded, y, code)
    if values.abs().max() < FLOOR:
        assert not y.any()
    else:
        assert ((y.double() - values.double()).abs() <= bound(values.double(), y.double(), code, torch.float32)).all()


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_decoded_as_torch_does(code: str) -> None:
    """Also e4m3's NaN, which is never written."""
    dtype = torch.int8 if code == "int8" else torch.float8_e4m3fn
    codes = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE).view(dtype)[None]
    scale = torch.ones(1, 1, device=DEVICE)
    coded = torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=1)
    for out_dtype in DTYPES:
        out = torch.empty(1, 256, dtype=out_dtype, device=DEVICE)
        dequantize_rows(coded, out, code)
        assert same(out, codes.to(out_dtype))


@pytest.mark.parametrize("code", CODES)
def test_every_bf16_is_coded_as_the_reference_does(code: str) -> None:
    """Each of them beside a value that makes the scale 1, so that ties and tiny numbers occur."""
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    largest = LARGEST[torch.int8 if code == "int8" else torch.float8_e4m3fn]
    values = whole[whole.float().abs() <= largest]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 512)).view(-1, 512)
    values = torch.cat([values, torch.full_like(values[:, :4], largest)], 1).to(DEVICE)
    coded, expected = quantize(values, code), quantize_rows_reference(values, code)
    assert (parts(expected, code)[1] == 1).all()
    assert_same(coded, expected, code)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_a_row_with_nan_or_infinity_comes_back_as_nan(code: str, dtype: torch.dtype, bad: float) -> None:
    values = rows_of_many_sizes(3, 1500, dtype)
    values[1, 1400] = bad
    coded, out = quantize(values, code), torch.empty_like(values)
    assert_same(coded, quantize_rows_reference(values, code), code)
    dequantize_rows(coded, out, code)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("code", CODES)
def test_rows_below_the_floor_are_zero(code: str) -> None:
    values = torch.tensor([[0.0, -0.0], [FLOOR, -FLOOR], [FLOOR * 0.99, 0.0], [1e-45, 0.0]], device=DEVICE)
    values = values.repeat(1, 2)
    coded, out = quantize(values, code), torch.empty_like(values)
    assert_same(coded, quantize_rows_reference(values, code), code)
    dequantize_rows(coded, out, code)
    assert not out[[0, 2, 3]].any()
    assert torch.allclose(out[1], values[1])


def test_no_rows_are_no_work() -> None:
    coded = quantize(torch.empty(0, 8, device=DEVICE), "int8")
    assert coded.shape == (0, 12)
    dequantize_rows(coded, torch.empty(0, 8, device=DEVICE), "int8")


def test_arguments_are_checked() -> None:
    values = rows_of_many_sizes(4, 8, torch.float32)
    coded = quantize(values, "int8")
    with pytest.raises(ValueError, match="none of int8, fp8_e4m3"):
        quantize_rows(values[None], coded[None], "int4")
    with pytest.raises(ValueError, match="values have 3 dimensions"):
        quantize_rows(values[None].double(), coded[None], "int8")
    with pytest.raises(ValueError, match="neighbours"):
        quantize_rows(rows_of_many_sizes(8, 8, torch.float32).T[None], coded[None], "int8")
    with pytest.raises(ValueError, match="contiguous"):
        quantize_rows(values[None], coded[None, :3], "int8")
    with pytest.raises(ValueError, match="multiple of 4"):
        lossy_row_bytes(6)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_rows(coded[:3], values, "int8")
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        dequantize_rows(torch.cat([coded.flatten()[:1], coded.flatten()])[1:].view(4, -1), values, "int8")
    with pytest.raises(ValueError, match="out have 2 dimensions"):
        dequantize_rows(coded, values.double(), "int8")
