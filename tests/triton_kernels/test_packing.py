from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.triton_kernels.packing import (
    TILE,
    fits_at,
    pack_rows,
    pack_rows_reference,
    packed_row_bytes,
    unpack_rows,
    unpack_rows_reference,
    usual_exponents,
)
from tests.triton_kernels.poison import DEVICE, assert_writes, bits

WIDTHS = [64, 128, 192, 2048, 2880, 4096, 4160]
SPECIAL = [0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF, 0x3F80]


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(torch.bfloat16).to(DEVICE)


def from_bits(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint16).view(np.int16).copy()).view(torch.bfloat16).to(DEVICE)


def none_usual(width: int, layers: int = 1) -> torch.Tensor:
    """Exponents are what they are."""
    return torch.zeros(layers, width, dtype=torch.uint8, device=DEVICE)


def pack(values: torch.Tensor, usual: torch.Tensor | None = None) -> torch.Tensor:
    """By the kernel: `[rows, width]` as `[rows, bytes]`."""
    width = values.shape[1]
    out = torch.full((1, len(values), packed_row_bytes(width)), 0xA5, dtype=torch.uint8, device=DEVICE)
    pack_rows(values[None], none_usual(width) if usual is None else usual, out)
    return out[0]


def escapes(row: np.ndarray, usual: np.ndarray) -> int:
    """Values of a row, as bits, whose relative exponent is none of the seven most frequent."""
    return int(np.sort(np.bincount((row >> 7) - usual & 0xFF))[:-7].sum())


def assert_lossless(values: torch.Tensor, row_gap: int = 0, usual: torch.Tensor | None = None) -> torch.Tensor:
    """Of the rows that fit, and just those fit whose escapes have room; kernel and reference agree in every byte.

    Returns which do.
    """
    width = values.shape[1]
    usual = none_usual(width) if usual is None else usual
    packed = pack(values, usual)
    assert torch.equal(packed, pack_rows_reference(values[None], usual)[0])
    fit = packed[:, fits_at(width)] == 0
    whole, of_channels = values.contiguous().view(torch.int16).cpu().numpy(), usual[0].cpu().numpy().astype(np.int16)
    assert fit.tolist() == [escapes(row, of_channels) <= width // 8 - 8 for row in whole]
    kept, back = values[fit].contiguous(), packed[fit].contiguous()
    assert torch.equal(bits(unpack_rows_reference(back, usual[0])), bits(kept))
    assert_writes(kept, row_gap, lambda out: unpack_rows(back, usual[0], out))
    return fit


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "row_gap"), [(1, 0), (3, 7), (0, 0)])
def test_normal_values(rows: int, width: int, row_gap: int) -> None:
    assert_lossless(normal(rows, width), row_gap)


def test_normal_values_fit_in_three_quarters() -> None:
    packed = pack_rows_reference(normal(256, 4096)[None], none_usual(4096))[0]
    assert packed.numel() == packed_row_bytes(4096) * 256 == 0.75 * 2 * 256 * 4096
    assert not packed[:, fits_at(4096)].any()


def test_channels_of_many_scales_fit_by_what_is_usual_in_each() -> None:
    """As the input of a trained model's first layer: by the exponents themselves hardly a row fits."""
    width = TILE + 192
    scales = torch.exp2(torch.randint(-12, 13, (width,), generator=torch.Generator().manual_seed(1))).to(DEVICE)
    some, others = (normal(rows, width, seed) * scales for seed, rows in ((2, 130), (3, 5)))
    usual = usual_exponents(some.to(torch.bfloat16)[None])
    assert usual.shape == (1, width)
    assert not assert_lossless(others.to(torch.bfloat16)).any()
    assert assert_lossless(others.to(torch.bfloat16), 3, usual).all()


def test_the_usual_exponent_is_the_median_of_a_channel_in_a_layer() -> None:
    exponents = torch.tensor([[[1, 255], [7, 255], [3, 0]], [[0, 9], [0, 9], [0, 8]]])
    values = from_bits((exponents << 7).numpy())
    assert usual_exponents(values).tolist() == [[3, 255], [0, 9]]


def test_every_bit_pattern() -> None:
    """All 65,536: by themselves, where no row fits; and as escapes among values that pack well, where all do."""
    patterns = np.random.default_rng(0).permutation(65536)
    alone = from_bits(patterns.reshape(4, 16384))
    among = np.tile((127 << 7) + np.arange(128), (36, 128))
    among[:, ::8][:, :1821] = np.resize(patterns, (36, 1821))
    for values, fits in ((alone, False), (from_bits(among), True)):
        assert bool((pack(values)[:, fits_at(16384)] == 0).all()) is fits
        assert_lossless(values)


@pytest.mark.parametrize("width", [1024, TILE + 64])
@pytest.mark.parametrize("more", [0, 1])
def test_a_list_of_escapes_that_is_just_full(width: int, more: int) -> None:
    room = width // 8 - 8
    common = np.arange(width - room - more) % 7 + 20
    row = np.concatenate([common, np.arange(room + more) % 50 + 200])
    values = from_bits(np.stack([row, np.roll(row, width // 2)]) << 7)
    fits = pack(values)[:, fits_at(width)]
    assert escapes(values.view(torch.int16).cpu().numpy()[0], np.zeros(1, np.int16)) == room + more
    assert fits.tolist() == [more, more]
    assert_lossless(values)


@given(
    data=st.data(),
    exponents=st.integers(1, 256),  # how many there are
    rows=st.integers(1, 4),
    steps=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_random_rows(data: st.DataObject, exponents: int, rows: int, steps: int) -> None:
    width = 64 * steps
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = random.choice(256, exponents, replace=False)
    skewed = (exponents * random.random((rows, width)) ** data.draw(st.sampled_from([1, 4]))).astype(int)
    values = random.integers(0, 2, (rows, width)) << 15 | random.integers(0, 128, (rows, width))
    values |= chosen[skewed] << 7
    for place in data.draw(st.lists(st.integers(0, rows * width - 1), max_size=20)):
        values.flat[place] = data.draw(st.sampled_from(SPECIAL))
    usual = random.integers(0, data.draw(st.sampled_from([1, 3, 256])), (1, width)).astype(np.uint8)
    assert_lossless(from_bits(values), data.draw(st.integers(0, 3)), torch.from_numpy(usual).to(DEVICE))


def test_zeros_and_what_lies_beyond_a_row_are_not_confused() -> None:
    """A width that fills no tile: what is read beyond the row counts for no exponent."""
    row = np.repeat(np.arange(100, 108), 24) << 7  # eight exponents, none of them 0, of 24 values each
    packed = pack(from_bits(row[None]))
    width = row.size
    assert packed[0, width * 11 // 8 : fits_at(width)].tolist() == list(range(100, 107))
    assert_lossless(from_bits(row[None]))


@pytest.mark.parametrize(("layers", "rows"), [(1, 5), (3, 2), (2, 0)])
def test_layers_and_rows_that_are_apart(layers: int, rows: int) -> None:
    values = normal(4 * 10, 200).view(4, 10, 200)[:layers, : 2 * rows : 2, 8:136]
    usual = torch.arange(4 * 128, dtype=torch.uint8, device=DEVICE).view(4, 128)[:layers]
    expected = pack_rows_reference(values, usual)
    assert expected.shape == (layers, rows, packed_row_bytes(128))
    assert_writes(expected.flatten(0, 1), 0, lambda out: pack_rows(values, usual, out.view(expected.shape)))
    for layer, one in enumerate(expected):
        by_itself = pack_rows_reference(values[layer : layer + 1], usual[layer : layer + 1])
        assert torch.equal(one, by_itself[0])


@pytest.mark.parametrize("seed", range(3))
def test_wrong_bytes_do_not_lead_the_kernel_astray(seed: int) -> None:
    """Values come out wrong, as the reference's do, but nothing outside of the row is read or written."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, packed_row_bytes(2112)), dtype=np.uint8)
    noise[1] = 0xFF  # nothing but escapes
    packed = torch.from_numpy(noise).to(DEVICE)
    memory = torch.full((5, 2112), 7.0, dtype=torch.bfloat16, device=DEVICE)
    usual = none_usual(2112)[0]
    unpack_rows(packed, usual, memory[1:4])
    assert (memory[[0, 4]] == 7.0).all()
    followed = torch.cat([packed, torch.from_numpy(noise[::-1].copy()).to(DEVICE)])
    again = torch.empty(6, 2112, dtype=torch.bfloat16, device=DEVICE)
    unpack_rows(followed, usual, again)
    assert torch.equal(bits(again[:3]), bits(memory[1:4])), "what follows a row was read"


def test_arguments_are_checked() -> None:
    values = normal(4, 64)
    packed, usual = pack(values), none_usual(64)
    with pytest.raises(ValueError, match="3 dimensions of bfloat16"):
        pack_rows(values[None].float(), usual, packed[None])
    with pytest.raises(ValueError, match="3 dimensions of bfloat16"):
        pack_rows(values, usual, packed)
    with pytest.raises(ValueError, match="neighbours"):
        pack_rows(normal(64, 64).T[None], usual, pack(normal(64, 64))[None])
    with pytest.raises(ValueError, match="contiguous"):
        pack_rows(values[None], usual, packed[None, :3])
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_rows(normal(4, 96)[None], none_usual(96), packed[None])
    with pytest.raises(ValueError, match="multiple of 64"):
        packed_row_bytes(0)
    with pytest.raises(ValueError, match="neighbours"):
        unpack_rows(packed, usual[0], torch.empty_like(normal(64, 4)).T)
    with pytest.raises(ValueError, match="contiguous"):
        unpack_rows(packed, usual[0], torch.empty_like(values[:3]))
    with pytest.raises(ValueError, match="contiguous"):
        unpack_rows(packed.repeat_interleave(2, 1)[:, ::2], usual[0], torch.empty_like(values))
    with pytest.raises(ValueError, match="multiple of 16"):
        unpack_rows(
            torch.cat([packed.flatten()[:1], packed.flatten()])[1:].view(4, -1), usual[0], torch.empty_like(values)
        )
    with pytest.raises(ValueError, match="usual exponents are contiguous"):
        pack_rows(values[None], none_usual(64, layers=2), packed[None])
    with pytest.raises(ValueError, match="usual exponents are contiguous"):
        unpack_rows(packed, usual, torch.empty_like(values))
