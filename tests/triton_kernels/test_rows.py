"""Rows of bytes between layouts: every byte asked for is moved, and no other is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_hcache.triton_kernels.rows import PoolLayers, copy_rows, copy_rows_reference, scatter_kv
from tests.triton_kernels.poison import vast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _bytes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("programs", [1, 5, 1000])
@pytest.mark.parametrize("warps", [1, 16])
@pytest.mark.parametrize(("n", "row_bytes"), [(1, 16), (63, 80), (65, 1600), (7, 8208)])
def test_rows_of_several_layers_move_and_nothing_else(n: int, row_bytes: int, warps: int, programs: int) -> None:
    layers, space = 3, 2 * n
    layer_bytes = space * row_bytes + 64
    source = _bytes(layers * layer_bytes, seed=1)
    memory = _bytes((layers * n + 2) * row_bytes, seed=2)
    expected = memory.clone()
    target, wanted = (each[row_bytes:-row_bytes].view(layers, n, row_bytes) for each in (memory, expected))
    offsets = torch.randperm(space, device=DEVICE)[:n] * row_bytes

    copy_rows(source, offsets, target, layer_bytes=layer_bytes, programs=programs, warps=warps)
    copy_rows_reference(source, offsets, wanted, layer_bytes=layer_bytes)
    assert torch.equal(memory, expected)


def test_no_rows_are_no_work() -> None:
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    copy_rows(_bytes(64, seed=1), empty, _bytes(0, seed=0).view(1, 0, 16), programs=1, warps=1)


@pytest.mark.parametrize(("source", "row", "distance"), [(64, 24, 0), (72, 16, 0), (64, 16, 24)])
def test_sizes_that_are_no_multiples_are_refused(source: int, row: int, distance: int) -> None:
    offsets, target = torch.zeros(1, dtype=torch.int64, device=DEVICE), _bytes(row, 1).view(1, 1, row)
    with pytest.raises(ValueError, match=f"{row} bytes"):
        copy_rows(_bytes(source, 0), offsets, target, layer_bytes=distance, programs=1, warps=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_keys_and_values_come_back_to_other_slots(dtype: torch.dtype) -> None:
    slots, n, size = 40, 13, torch.empty((), dtype=dtype).element_size()
    keys, values = (
        _bytes(slots * heads * 48 * size, seed=heads).view(dtype).view(slots, heads, 48) for heads in (2, 3)
    )
    rows = torch.empty(n, 5 * 48 * size, dtype=torch.uint8, device=DEVICE)
    order = torch.randperm(slots, device=DEVICE)
    source, target = order[:n], order[n : 2 * n]
    before = [buffer.view(torch.uint8).clone() for buffer in (keys, values)]

    PoolLayers([(keys, values)]).gather_kv(source, rows[None])
    scatter_kv(rows, target, (keys, values))

    others = torch.ones(slots, dtype=torch.bool, device=DEVICE)
    others[target] = False
    for buffer, was in zip((keys, values), before, strict=True):
        now = buffer.view(torch.uint8)
        assert torch.equal(now[target], was[source])
        assert torch.equal(now[others], was[others])


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize(("k_bytes", "v_bytes"), [(8, 8), (96, 160), (9000, 9000), (1152, 0)])
def test_layers_are_gathered_at_once_and_nothing_else_is_written(k_bytes: int, v_bytes: int, layers: int) -> None:
    space, n, row = 30, 13, k_bytes + v_bytes
    sizes = (k_bytes, v_bytes) if v_bytes else (k_bytes,)
    pool = [
        tuple(_bytes(space * size, seed=10 * layer + part).view(space, size) for part, size in enumerate(sizes))
        for layer in range(layers)
    ]
    slots = torch.randperm(space, device=DEVICE)[:n]
    memory = _bytes((layers * n + 2) * row, seed=99)
    expected = memory.clone()
    expected[row:-row] = torch.cat(
        [torch.cat([buffer[slots] for buffer in buffers], dim=1).view(-1) for buffers in pool]
    )
    PoolLayers(pool).gather_kv(slots, memory[row:-row].view(layers, n, row))
    assert torch.equal(memory, expected)


def test_layers_that_begin_at_odd_words_are_gathered() -> None:
    memory, slots = _bytes(2 * 640 + 8, seed=3), torch.tensor([3, 0, 4], device=DEVICE)
    pool = [tuple(part.view(5, 128) for part in memory[begin:][:1280].view(2, 640)) for begin in (0, 8)]
    out = torch.zeros(2, 3, 256, dtype=torch.uint8, device=DEVICE)
    PoolLayers(pool).gather_kv(slots, out)
    for rows, (keys, values) in zip(out, pool, strict=True):
        assert torch.equal(rows, torch.cat([keys[slots], values[slots]], dim=1))


def test_other_layers_or_layers_that_differ_are_refused() -> None:
    pool, slots = [(_bytes(64, 0).view(4, 16),)] * 3, torch.tensor([0, 1], device=DEVICE)
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=f"{count} layers, not for 3"):
            PoolLayers(pool).gather_kv(slots, _bytes(count * 32, 0).view(count, 2, 16))
    with pytest.raises(ValueError, match="of 2 sizes"):
        PoolLayers([*pool, (_bytes(64, 0).view(2, 32),)])


def test_latents_come_back_to_other_slots() -> None:
    """One buffer, of MLA, in the place of K's and V's."""
    latents = _bytes(20 * 72 * 2, seed=1).view(torch.bfloat16).view(20, 1, 72)
    rows = torch.empty(7, 144, dtype=torch.uint8, device=DEVICE)
    order = torch.randperm(20, device=DEVICE)
    before = latents.view(torch.uint8).clone()
    PoolLayers([(latents,)]).gather_kv(order[:7], rows[None])
    scatter_kv(rows, order[7:14], (latents,))
    now = latents.view(torch.uint8)
    assert torch.equal(rows, before[order[:7]].view(7, -1))
    assert torch.equal(now[order[7:14]], before[order[:7]])
    assert torch.equal(now[order[14:]], before[order[14:]])
    assert torch.equal(now[order[:7]], before[order[:7]])


def test_rows_of_another_size_are_refused() -> None:
    buffer = torch.zeros(4, 2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="64 \\+ 64 bytes"):
        scatter_kv(torch.zeros(2, 31, device=DEVICE), torch.tensor([0, 1], device=DEVICE), (buffer, buffer.clone()))


@pytest.mark.parametrize("change", [lambda index: index.int(), lambda index: index.repeat_interleave(2)[::2]])
def test_indices_that_the_kernels_would_misread_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    buffer, index = torch.zeros(4, 2, 8, device=DEVICE), change(torch.tensor([0, 1], device=DEVICE))
    with pytest.raises(ValueError, match="slots are contiguous"):
        scatter_kv(torch.zeros(2, 32, device=DEVICE), index, (buffer, buffer.clone()))
    with pytest.raises(ValueError, match="offsets are contiguous"):
        copy_rows(_bytes(64, 0), index, _bytes(32, 1).view(1, 2, 16), programs=1, warps=1)


def test_offsets_in_a_large_pool_are_beyond_int32() -> None:
    """In words of eight bytes, too."""
    last = 2**31 // 64 + 3
    pool, slots = vast(last + 1, 512, dtype=torch.uint8), torch.tensor([last, last - 2], device=DEVICE)
    rows, back = _bytes(2 * 512, seed=1).view(2, 512), torch.zeros(2, 512, dtype=torch.uint8, device=DEVICE)
    scatter_kv(rows, slots, (pool,))
    assert torch.equal(pool[slots], rows)
    PoolLayers([(pool,)]).gather_kv(slots, back[None])
    assert torch.equal(back, rows)
    copy_rows(pool, slots[1:] * 512, back[None, 1:], layer_bytes=1024, programs=1, warps=1)
    assert torch.equal(back[1], rows[1])
