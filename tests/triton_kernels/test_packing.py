from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.triton_kernels.packing import (
    ALIGNMENT,
    HEADER_BYTES,
    PACKED,
    RAW,
    CorruptPage,
    check_pages,
    pack,
    packed_bound,
    read_header,
    unpack,
    unpack_reference,
)
from tests.triton_kernels.poison import DEVICE, assert_writes, bits

SHAPES = [(1, 1), (1, 33), (1, 4096), (2, 1024), (63, 48), (65, 100), (63, 2880), (7, 1)]


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(torch.bfloat16).to(DEVICE)


def from_bits(values: np.ndarray, rows: int, width: int) -> torch.Tensor:
    whole = torch.from_numpy(values.astype(np.uint16).view(np.int16).copy())
    return whole.view(torch.bfloat16).view(rows, width).to(DEVICE)


def assert_lossless(page: torch.Tensor, row_gap: int = 0) -> None:
    packed = pack(page)
    assert packed.numel() == read_header(packed).size <= packed_bound(*page.shape)
    assert torch.equal(bits(unpack_reference(packed)), bits(page))
    assert_writes(page, row_gap, lambda out: unpack(packed, out))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("row_gap", [0, 7])
def test_normal_values(rows: int, width: int, row_gap: int) -> None:
    assert_lossless(normal(rows, width), row_gap)


@pytest.mark.parametrize(("kind", "copies"), [(RAW, 1), (PACKED, 4)])
def test_every_bit_pattern(kind: int, copies: int) -> None:
    """All 65,536, once by themselves and once as the escapes among values that pack well."""
    patterns = np.arange(65536)
    common = np.tile((127 << 7) + np.arange(128), 512 * (copies - 1))
    order = np.random.default_rng(0).permutation(65536 * copies)
    page = from_bits(np.concatenate([patterns, common])[order], 64 * copies, 1024)
    assert read_header(pack(page)).kind == kind
    assert_lossless(page)


SPECIAL = [0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF, 0x3F80]


@given(
    data=st.data(),
    exponents=st.integers(1, 256),  # how many there are
    rows=st.integers(1, 5),
    width=st.integers(1, 700),
)
@settings(max_examples=60, deadline=None)
def test_random_pages(data: st.DataObject, exponents: int, rows: int, width: int) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = random.choice(256, exponents, replace=False)
    values = random.integers(0, 2, rows * width) << 15 | random.integers(0, 128, rows * width)
    values |= chosen[random.integers(0, exponents, rows * width)] << 7
    for place in data.draw(st.lists(st.integers(0, rows * width - 1), max_size=20)):
        values[place] = data.draw(st.sampled_from(SPECIAL))
    assert_lossless(from_bits(values, rows, width), row_gap=data.draw(st.integers(0, 3)))


def test_a_page_of_escapes_at_a_block_s_edges() -> None:
    page = torch.ones(4, 1024)
    page[:, [0, 31, 32, 511, 1023]] = torch.tensor([1e30, 1e-30, 1e20, 1e-20, 1e10])
    page[2] = 10.0 ** torch.linspace(-37, 37, 1024)  # a block of hardly anything else
    page = page.repeat(8, 1).to(torch.bfloat16).to(DEVICE)
    assert read_header(pack(page)).kind == PACKED
    assert_lossless(page)


@pytest.mark.parametrize(("rows", "width"), [(0, 64), (3, 0)])
def test_empty_pages(rows: int, width: int) -> None:
    assert_lossless(normal(rows, width))


def test_values_of_any_stride_are_packed() -> None:
    page = normal(48, 65)
    assert torch.equal(pack(page.T), pack(page.T.contiguous()))
    assert torch.equal(pack(page[:, ::2]), pack(page[:, ::2].contiguous()))


def test_packing_is_worth_it_for_normal_values_and_never_costs_more_than_a_header() -> None:
    assert pack(normal(64, 4096)).numel() <= 0.71 * 2 * 64 * 4096
    noise = from_bits(np.random.default_rng(0).integers(0, 65536, 64 * 512), 64, 512)
    assert pack(noise).numel() == packed_bound(64, 512)


def side_by_side(pages: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Packed pages one after the other, each at a multiple of ALIGNMENT, and where they begin."""
    packed, starts, size = [pack(page) for page in pages], [], 0
    for each in packed:
        starts.append(size)
        size += -(-each.numel() // ALIGNMENT) * ALIGNMENT
    memory = torch.full((size,), 0xA5, dtype=torch.uint8, device=DEVICE)
    for start, each in zip(starts, packed, strict=True):
        memory[start : start + each.numel()] = each
    return memory, starts


@pytest.mark.parametrize("row_gap", [0, 3])
def test_pages_raw_and_packed_are_decoded_together(row_gap: int) -> None:
    noise = from_bits(np.random.default_rng(1).integers(0, 65536, 16 * 200), 16, 200)
    pages = [normal(16, 200, seed=1), noise, normal(16, 200, seed=2) * 1e-30, torch.zeros_like(noise)]
    packed, starts = side_by_side(pages)
    check_pages(packed, starts, 16, 200)
    where = torch.tensor(starts, dtype=torch.int64, device=DEVICE)
    assert_writes(torch.cat(pages), row_gap, lambda out: unpack(packed, out, where))
    order = torch.tensor([3, 0, 0], device=DEVICE)  # any order, and one of them twice
    expected = torch.cat([pages[i] for i in order.tolist()])
    assert_writes(expected, row_gap, lambda out: unpack(packed, out, where[order]))


def test_a_page_ends_where_its_header_says() -> None:
    """Later bytes are not looked at, so a page may lie in a larger buffer."""
    page = normal(3, 70)
    packed = torch.cat([pack(page), torch.full((100,), 0xFF, dtype=torch.uint8, device=DEVICE)])
    assert torch.equal(bits(unpack_reference(packed)), bits(page))
    assert_writes(page, 0, lambda out: unpack(packed, out))


def spoilt(packed: torch.Tensor, offset: int, value: int) -> torch.Tensor:
    """`packed` with another 32-bit field at `offset`."""
    copy = packed.clone()
    field = torch.frombuffer(bytearray(struct.pack("<I", value)), dtype=torch.uint8)
    copy[offset : offset + 4] = field.to(DEVICE)
    return copy


@pytest.mark.parametrize("page", [normal(16, 200), from_bits(np.arange(16 * 200) * 37 % 65536, 16, 200)])
@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, 0x31504249, "not a packed page"),
        (4, 2, "neither raw"),
        (8, 17, "do not take|are wanted"),
        (8, 0xFFFFFFFF, "at most"),
        (12, 300, "do not take|are wanted"),
        (16, 0, "do not take"),
        (16, 0xFFFFFFFF, "do not take"),
        (20, 100_000, "do not take|raw page has escapes"),
        (24, 0x7E7E7E7E, "two codes|raw page has"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    page: torch.Tensor, offset: int, value: int, message: str
) -> None:
    packed = spoilt(pack(page), offset, value)
    with pytest.raises(CorruptPage, match=message):
        unpack(packed, torch.empty_like(page))
    with pytest.raises(CorruptPage):
        unpack_reference(packed)


def test_cut_pages_are_refused() -> None:
    packed = pack(normal(16, 200))
    for size in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, packed.numel() - 1):
        with pytest.raises(CorruptPage):
            unpack_reference(packed[:size].clone())


def test_the_reference_counts_the_escapes() -> None:
    packed = pack(normal(16, 200))
    words = HEADER_BYTES + 32 * 100
    with pytest.raises(CorruptPage, match="values are escaped"):
        unpack_reference(spoilt(packed, words + 4, 0xFFFFFFFF))
    with pytest.raises(CorruptPage, match="do not begin"):
        unpack_reference(spoilt(packed, HEADER_BYTES + 44 * 100 + 4, 1))


@pytest.mark.parametrize("beyond", [0, 1, 0x7FFFFFF0, 0x80000000])
def test_a_wrong_count_of_escapes_does_not_lead_the_kernel_astray(beyond: int) -> None:
    """No header check sees it. Values come out wrong, but nothing outside of the page or of the output is touched."""
    page = normal(16, 200)
    packed = pack(page)
    third_block = HEADER_BYTES + 44 * 100 + 4 * 2  # where a tile begins
    packed = spoilt(packed, third_block, read_header(packed).escapes + beyond)
    packed = torch.cat([packed, torch.full((4096,), 0xFF, dtype=torch.uint8, device=DEVICE)])  # exponents of NaN
    memory = torch.full((18, 200), 7.0, dtype=torch.bfloat16, device=DEVICE)
    unpack(packed, memory[1:17])
    assert torch.equal(memory[1:11], page[:10])
    assert not torch.equal(memory[1:17], page)
    assert memory.isfinite().all()
    assert (memory[[0, 17]] == 7.0).all()


def test_arguments_are_checked() -> None:
    page = normal(4, 64)
    packed = pack(page)
    with pytest.raises(ValueError, match="bf16"):
        pack(page.float())
    with pytest.raises(ValueError, match=r"\[rows, width\]"):
        pack(page[0])
    with pytest.raises(ValueError, match="neighbours"):
        unpack(packed, torch.empty_like(page.T.contiguous()).T)
    with pytest.raises(ValueError, match="are wanted"):
        unpack(packed, torch.empty_like(page[:3]))
    with pytest.raises(ValueError, match="contiguous"):
        unpack(packed.repeat_interleave(2)[::2], torch.empty_like(page))
    with pytest.raises(ValueError, match="multiple of 16"):
        unpack(torch.cat([packed[:1], packed])[1:], torch.empty_like(page))
    with pytest.raises(ValueError, match="not 3 pages"):
        unpack(packed, torch.empty_like(page), torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(CorruptPage, match="no multiple"):
        check_pages(packed.cpu(), [8], 4, 64)
