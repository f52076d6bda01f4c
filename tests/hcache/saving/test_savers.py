"""Pages of which some layers are hidden states that were captured, and others K and V from the real pool."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache import windows
from sglang_hcache.codec import PackedCodec
from sglang_hcache.device.streams import Event, ImmediateStream
from sglang_hcache.model import layer_groups
from sglang_hcache.restoring.projector import KVProjector, PoolReader
from sglang_hcache.saving import savers
from sglang_hcache.saving.copy_out import CopyOut, InlineCopyOut, StreamCopyOut
from sglang_hcache.saving.open_pages import chunk_rows
from sglang_hcache.saving.savers import KVRows, PageSaver, RestoredKeys
from sglang_hcache.storage.layout import ROOT, ChunkLayout, positions
from sglang_hcache.storage.store import LocalStore
from tests.hcache.conftest import PAGE, slots_of
from tests.hcache.restoring.test_restore import Device, FakeEvent, FakeStream
from tests.storage.pages import lease

WIDTH, HEADS, HEAD = 6, 2, 4
HIDDEN, KV = range(0, 2), range(2, 5)
KEYS = [b"a" * 32, b"b" * 32, b"c" * 32]

kv_rows = partial(KVRows, gathering=ImmediateStream(), current=ImmediateStream(), forward=ImmediateStream())


@pytest.fixture
def pool() -> MHATokenToKVPool:
    pool = MHATokenToKVPool(
        8 * PAGE, PAGE, torch.float32, HEADS, HEAD, len(KV) + len(HIDDEN), "cpu", enable_memory_saver=False
    )
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.normal_()
    return pool


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    row_bytes = [4 * WIDTH] * len(HIDDEN) + [2 * 4 * HEADS * HEAD] * len(KV)
    layout = ChunkLayout(PAGE, tuple(PAGE * size for size in row_bytes))
    store = LocalStore(layout, bytes(16), 8 * layout.record_bytes, [])
    yield store
    store.check()


@pytest.fixture(params=["inline", "thread"])
def copy_out(request: pytest.FixtureRequest) -> Iterator[CopyOut]:
    copy_out = InlineCopyOut() if request.param == "inline" else StreamCopyOut(ImmediateStream(), ImmediateStream())
    copy_out.expect(1 << 20)
    yield copy_out
    copy_out.close()


@pytest.fixture(params=[1, 2, 100], ids=lambda pages: f"{pages} together")
def saver(
    request: pytest.FixtureRequest,
    copy_out: CopyOut,
    store: LocalStore,
    pool: MHATokenToKVPool,
    monkeypatch: pytest.MonkeyPatch,
) -> PageSaver:
    monkeypatch.setattr(savers, "_GATHERED_BYTES", request.param * len(KV) * PAGE * 2 * 4 * HEADS * HEAD)
    kv = kv_rows(store, copy_out, pool, KV)
    assert kv.pages_together == request.param
    return PageSaver(store, copy_out, captured=len(HIDDEN), kv=[kv])


def assert_kv(
    rows: np.ndarray[Any, np.dtype[np.uint8]], pool: MHATokenToKVPool, device_page: int, layer: int
) -> None:
    """rows: of one layer of a page."""
    expected = [buffer[layer][slots_of(device_page)].flatten(1) for buffer in (pool.k_buffer, pool.v_buffer)]
    assert np.array_equal(rows.view(np.float32), torch.cat(expected, dim=1).numpy())


def capture(saver: PageSaver, device_page: int, rows: torch.Tensor) -> torch.Tensor:
    """As a forward would: rows `[layers, n, width]`; returns the slots of the page."""
    slots = slots_of(device_page)
    saver.write(slots[: rows.shape[1]], torch.arange(rows.shape[1]), rows)
    return slots


def test_a_page_holds_both(saver: PageSaver, store: LocalStore, pool: MHATokenToKVPool) -> None:
    pages = (5, 2, 4)
    rows = torch.randn(len(pages), len(HIDDEN), PAGE, WIDTH)
    slots = torch.cat([capture(saver, *page) for page in zip(pages, rows, strict=True)])
    saver.save(KEYS, ROOT, slots)
    saver.clear()
    leased = lease(store, "test", KEYS)
    assert len(leased) == len(pages)
    hidden, kv = (chunk_rows(store, layers)[leased] for layers in (HIDDEN, KV))
    assert np.array_equal(hidden.view(np.float32), rows.numpy())
    for place, page in enumerate(pages):
        for index, layer in enumerate(KV):
            assert_kv(kv[place, index], pool, page, layer)


def test_a_page_that_was_not_captured_whole_is_left_out(saver: PageSaver, store: LocalStore) -> None:
    parts = [capture(saver, page, torch.randn(len(HIDDEN), rows, WIDTH)) for page, rows in ((1, PAGE), (3, PAGE - 1))]
    saver.save(KEYS[:2], ROOT, torch.cat(parts))
    saver.clear()
    assert store.contains(KEYS[:2]) == [True, False]
    assert saver.stats()["pages_incomplete"] == 1


def test_a_page_that_is_stored_already_gives_its_slot_back(saver: PageSaver, store: LocalStore) -> None:
    rows = torch.randn(len(HIDDEN), PAGE, WIDTH)
    saver.save(KEYS[:1], ROOT, capture(saver, 1, rows))
    slots = torch.cat([capture(saver, page, rows + page) for page in (2, 3)])
    saver.save([KEYS[0], KEYS[1]], ROOT, slots)
    saver.clear()
    assert store.contains(KEYS[:2]) == [True, True]
    (leased,) = lease(store, "test", KEYS[:1])
    assert np.array_equal(chunk_rows(store, HIDDEN)[leased].view(np.float32), rows.numpy()), "the first one stays"
    assert store.stats()["pages_open"] == 0


@pytest.mark.parametrize("trouble", ["no memory", "crowded"])
def test_pages_whose_k_and_v_cannot_be_copied_are_left_out(
    trouble: str, saver: PageSaver, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the slots that capture had filled for them are free again."""

    def no_memory(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError

    slots = capture(saver, 1, torch.randn(len(HIDDEN), PAGE, WIDTH))
    with monkeypatch.context() as patch:
        if trouble == "crowded":
            patch.setattr(type(saver._copy_out), "rows_to_host", lambda *_: None)
        else:
            patch.setattr(PoolReader, "read", no_memory)
        saver.save(KEYS[:1], ROOT, slots)
    saver.clear()
    assert store.contains(KEYS[:1]) == [False]
    assert saver.stats()["pages_incomplete"] == 1
    assert store.stats()["pages_open"] == 0
    saver.save(KEYS[:1], ROOT, capture(saver, 1, torch.randn(len(HIDDEN), PAGE, WIDTH)))
    saver.clear()
    assert store.contains(KEYS[:1]) == [True]


def test_pages_of_nothing_but_k_and_v(copy_out: CopyOut, pool: MHATokenToKVPool) -> None:
    """More than there are slots for: the first ones are kept, the others counted."""
    layers = range(pool.layer_num)
    layout = ChunkLayout(PAGE, (PAGE * 2 * 4 * HEADS * HEAD,) * pool.layer_num)
    store = LocalStore(layout, bytes(16), 4 * layout.record_bytes, [])
    others = [store.reserve(), store.reserve()]
    saver = PageSaver(store, copy_out, kv=[kv_rows(store, copy_out, pool, layers)])
    saver.save(KEYS, ROOT, slots_of(6, 1, 3))
    saver.clear()
    assert store.contains(KEYS) == [True, True, False]
    leased = lease(store, "test", KEYS[:2])
    for page, rows in zip((6, 1), chunk_rows(store, layers)[leased], strict=True):
        for layer in layers:
            assert_kv(rows[layer], pool, page, layer)
    stats = saver.stats()
    assert (stats["pages_saved"], stats["pages_incomplete"], stats["tokens_captured"]) == (2, 1, 0)
    assert None not in others
    store.check()


@pytest.mark.parametrize("seed", range(40))
def test_k_and_v_are_read_between_the_forwards_that_write_them(
    seed: int, store: LocalStore, pool: MHATokenToKVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And SGLang's scheduler, whose stream is the current one, need not wait for that."""
    device, read = Device(), PoolReader.read
    current, forward, gathering, copying = (FakeStream(device) for _ in range(4))
    slots = torch.zeros(PAGE, dtype=torch.int64)

    def make_slots() -> None:
        slots[:] = slots_of(5)

    def write(value: float) -> None:
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots_of(5)] = value

    monkeypatch.setattr(PoolReader, "read", lambda *args: device.submit(lambda: read(*args)))

    class CopyOutLater(InlineCopyOut):
        def rows_to_host(self, rows: torch.Tensor, made: Event | None = None) -> torch.Tensor:
            assert made is not None
            copying.wait(made)
            return rows

    kv = KVRows(store, CopyOutLater(), pool, KV, gathering=gathering, current=current, forward=forward)
    with current.active():
        device.submit(make_slots)
    with forward.active():
        device.submit(lambda: write(1.0))
    rows = kv.gather(slots)
    assert rows is not None
    with forward.active():
        device.submit(lambda: write(2.0))
    seen: list[torch.Tensor] = []
    with copying.active():
        device.submit(lambda: seen.append(rows.view(torch.float32).clone()))
    waits = [work for work in current.queue if getattr(work, "__func__", None) is FakeEvent.query]
    assert not waits
    device.finish(random.Random(seed))
    assert seen[0].unique().tolist() == [1.0]


def test_a_page_holds_what_a_draft_model_keeps_of_it(copy_out: CopyOut, pool: MHATokenToKVPool) -> None:
    """In a pool of its own, with other heads; its layers follow the model's."""
    draft = MHATokenToKVPool(8 * PAGE, PAGE, torch.bfloat16, HEADS + 1, HEAD, 2, "cpu", enable_memory_saver=False)
    buffers = [*draft.k_buffer, *draft.v_buffer]
    for buffer in buffers:
        buffer.normal_()
    sizes = [4 * WIDTH] * len(HIDDEN) + [2 * 2 * (HEADS + 1) * HEAD] * draft.layer_num
    layout = ChunkLayout(PAGE, tuple(PAGE * size for size in sizes))
    store = LocalStore(layout, bytes(16), 4 * layout.record_bytes, [])
    kv = kv_rows(store, copy_out, draft, range(draft.layer_num), before=len(HIDDEN))
    saver = PageSaver(store, copy_out, captured=len(HIDDEN), kv=[kv])
    rows, slots = torch.randn(len(HIDDEN), PAGE, WIDTH), slots_of(3)
    saver.save(KEYS[:1], ROOT, capture(saver, 3, rows))
    saver.clear()
    (leased,) = lease(store, "test", KEYS[:1])
    assert np.array_equal(chunk_rows(store, HIDDEN)[leased].view(np.float32), rows.numpy())
    expected = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer[slots] = 0
    projector, record = KVProjector(layer_groups(pool, [draft])), store.memory[leased]
    for index in range(draft.layer_num):
        stored = torch.from_numpy(layout.payload(record, len(HIDDEN) + index)).view(PAGE, -1)
        projector.project(pool.layer_num + index, stored, slots, slots)
    assert all(map(torch.equal, buffers, expected))
    store.check()


@pytest.mark.parametrize("together", [1, 2, 100])
def test_windowed_layers_are_saved_of_the_last_pages(
    together: int, copy_out: CopyOut, pool: MHATokenToKVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From slots of their own; of each page it is noted whether it has them. Here most layers have windows."""
    window = MHATokenToKVPool(4 * PAGE, PAGE, torch.float32, HEADS, HEAD, 11, "cpu", enable_memory_saver=False)
    monkeypatch.setattr(savers, "_GATHERED_BYTES", together * window.layer_num * PAGE * 2 * 4 * HEADS * HEAD)
    gathered, read = list[int](), PoolReader.read

    def noted(self: PoolReader, slots: torch.Tensor, out: torch.Tensor) -> None:
        gathered.append(out.nbytes)
        read(self, slots, out)

    monkeypatch.setattr(PoolReader, "read", noted)
    for buffer in (*window.k_buffer, *window.v_buffer):
        buffer.normal_()
    layers = pool.layer_num + window.layer_num
    layout = ChunkLayout(PAGE, (PAGE * 2 * 4 * HEADS * HEAD,) * layers)
    store = LocalStore(layout, bytes(16), 8 * layout.record_bytes, [])
    full = kv_rows(store, copy_out, pool, range(pool.layer_num))
    windowed = kv_rows(store, copy_out, window, range(window.layer_num), before=pool.layer_num)
    saver = PageSaver(store, copy_out, kv=[full], windowed=windowed)
    saver.save(KEYS, ROOT, slots_of(6, 1, 3), slots_of(2, 1))
    saver.clear()
    leased = lease(store, "test", KEYS)
    assert windows.ends(positions(store.memory, layout), leased, 1) == [2, 3]
    rows = chunk_rows(store, range(layers))[leased]
    for place, device_page in enumerate((6, 1, 3)):
        for layer in range(pool.layer_num):
            assert_kv(rows[place, layer], pool, device_page, layer)
    for place, device_page in ((1, 2), (2, 1)):
        for layer in range(window.layer_num):
            assert_kv(rows[place, pool.layer_num + layer], window, device_page, layer)
    saver.save([b"e" * 32, b"f" * 32], ROOT, slots_of(2, 4), slots_of(3, 1))
    assert max(gathered) <= savers._GATHERED_BYTES
    saver.save([b"d" * 32], KEYS[-1], slots_of(7))
    saver.clear()
    assert windows.ends(positions(store.memory, layout), lease(store, "test", [*KEYS, b"d" * 32]), 1) == [2, 3]
    store.check()


def test_pages_that_were_restored_are_known_once_and_from_the_first_on() -> None:
    restored = RestoredKeys(most=3)
    restored.add(KEYS)
    assert restored.take_leading([KEYS[0], b"new", KEYS[1]]) == 1
    assert restored.take_leading(KEYS) == 0, "the first one may have been evicted since, and be new"
    assert restored.take_leading(KEYS[1:]) == 2
    restored.add([*KEYS, b"d" * 32])
    assert restored.take_leading(KEYS[:1]) == 0, "the oldest is forgotten"
    assert restored.take_leading([*KEYS[1:], b"d" * 32]) == 3
    restored.add(KEYS)
    restored.clear()
    assert restored.take_leading(KEYS) == 0


def packs(*shape: int) -> torch.Tensor:
    return (1 + torch.rand(*shape, 128)).to(torch.bfloat16)  # two exponents: for sure


def does_not_pack() -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, (128,), dtype=torch.int16).view(torch.bfloat16)


@pytest.fixture
def codec() -> PackedCodec:
    return PackedCodec(torch.full((2, 128), 120, dtype=torch.uint8))


@pytest.fixture
def packed(codec: PackedCodec) -> Iterator[LocalStore]:
    layout = ChunkLayout(PAGE, (PAGE * codec.row_bytes,) * 2)
    store = LocalStore(layout, bytes(16), 8 * layout.record_bytes, [])
    yield store
    store.check()


def coded_by(codec: PackedCodec, rows: torch.Tensor) -> torch.Tensor:
    coded = torch.empty(2, rows[0, ..., 0].numel(), codec.row_bytes, dtype=torch.uint8)
    codec.encode(rows.flatten(1, -2), coded)
    return coded.view(*rows.shape[:-1], codec.row_bytes)


def test_a_token_that_a_code_has_no_room_for_leaves_its_page_out(codec: PackedCodec, packed: LocalStore) -> None:
    """And no other; the rest of the page that comes later is refused, too."""
    saver = PageSaver(packed, InlineCopyOut(), captured=2, codec=codec)
    rows = packs(2, 3, PAGE)
    rows[1, 1, 3] = does_not_pack()
    coded = coded_by(codec, rows)
    for part in (slice(0, 5), slice(5, PAGE)):
        slots = torch.cat([slots_of(page)[part] for page in (4, 2, 3)])
        saver.write(slots, torch.arange(PAGE)[part].repeat(3), coded[:, :, part].flatten(1, 2))
    saver.save(KEYS, ROOT, slots_of(4, 2, 3))
    saver.clear()
    assert packed.contains(KEYS) == [True, False, True]
    first, last = lease(packed, "test", [KEYS[0]]) + lease(packed, "test", [KEYS[2]])
    for page, leased in ((0, first), (2, last)):
        stored = torch.from_numpy(chunk_rows(packed, range(2))[leased])
        for layer in range(2):
            assert torch.equal(codec.decode(layer, stored[layer]), rows[layer, page])
    stats = saver.stats()
    assert (stats["tokens_not_encoded"], packed.stats()["pages_open"]) == (1, 0)
    assert (stats["pages_saved"], stats["pages_incomplete"]) == (2, 1)
    assert stats["tokens_captured"] + stats["tokens_not_captured"] == 3 * PAGE


def test_a_rejected_draft_that_a_code_has_no_room_for_costs_nothing(codec: PackedCodec, packed: LocalStore) -> None:
    """Of four that are verified at once the third does not fit, and neither it nor the fourth is accepted."""
    saver = PageSaver(packed, InlineCopyOut(), captured=2, codec=codec)
    rows, drafts = packs(2, PAGE), packs(2, 4)
    drafts[:, :2], drafts[1, 2] = rows[:, 5:7], does_not_pack()
    slots = slots_of(3)
    for first, verified in ((0, rows[:, :5]), (5, drafts), (7, rows[:, 7:])):
        here = slice(first, first + verified.shape[1])
        saver.write(slots[here], torch.arange(PAGE)[here], coded_by(codec, verified))
    saver.save(KEYS[:1], ROOT, slots)
    saver.clear()
    (leased,) = lease(packed, "test", KEYS[:1])
    stored = torch.from_numpy(chunk_rows(packed, range(2))[leased])
    assert all(torch.equal(codec.decode(layer, stored[layer]), rows[layer]) for layer in range(2))
    stats = saver.stats()
    assert (stats["tokens_not_encoded"], stats["tokens_not_captured"]) == (1, 2)
