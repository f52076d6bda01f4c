"""What grows with the number of pages grows no faster: operations and bytes are counted, no time is taken."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_hcache.storage import index as index_module
from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.eviction import choose
from sglang_hcache.storage.evictor import Evictor
from sglang_hcache.storage.fetch import Fetch, Fetches
from sglang_hcache.storage.index import Index, Size
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import ROOT
from sglang_hcache.storage.stripe import Place
from sglang_hcache.storage.table import Table
from sglang_hcache.storage.volume import Volume
from tests.storage.pages import FINGERPRINT, LAYOUT, counters, key_of, open_store, save, states

PAGES = 20_000
PREFIX = 2_000


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Of long prefixes."""
    index = Index(tmp_path_factory.mktemp("index"), FINGERPRINT)
    index.mark(Size(LAYOUT.record_bytes, LAYOUT.page_tokens))
    keys = [key_of(page) for page in range(PAGES)]
    index.put_many(
        (key, Entry(f"{page // 800:016x}", page % 800, keys[page - 1][:8] if page % PREFIX else bytes(8), 0, page))
        for page, key in enumerate(keys)
    )
    return index


@contextmanager
def no_garbage() -> Iterator[None]:
    """What earlier tests have left is not collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def traced_memory() -> Iterator[None]:
    with no_garbage():
        tracemalloc.start()
        try:
            yield
        finally:
            tracemalloc.stop()


@contextmanager
def traced(note: Any) -> Iterator[None]:
    with no_garbage():
        sys.settrace(note)
        try:
            yield
        finally:
            sys.settrace(None)


def peak_bytes_a_page(work: Any) -> float:
    work()  # what is imported meanwhile does not count
    with traced_memory():
        work()
        return tracemalloc.get_traced_memory()[1] / PAGES


def test_choosing_what_to_evict_takes_little_memory_a_page(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "AT_ONCE", 256)

    def work() -> None:
        table = Table.join([Table.read(index)])
        freed = np.where(table.segment_number >= 0, table.record_bytes, 0)
        victims = choose(table.forest, table.worth(time.time()), freed, int(freed.sum()) // 20)
        assert victims.any()

    peak = peak_bytes_a_page(work)
    assert peak < 320, "two arrays of what is in the index, and what is computed of that"


def test_the_records_that_are_named_take_a_few_bytes_a_page(index: Index) -> None:
    assert peak_bytes_a_page(lambda: index.used(FINGERPRINT)) < 20


def test_full_directories_choose_what_to_evict_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, most, original, lock = 0, 0, Evictor._choose, threading.Lock()

    def choose_slowly(*arguments: Any) -> Any:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        try:
            return original(*arguments)
        finally:
            with lock:
                at_work -= 1

    monkeypatch.setattr(Evictor, "_choose", choose_slowly)
    store = open_store(*(tmp_path / name for name in "abcd"), slots=256, quota_bytes=20 * LAYOUT.record_bytes)
    save(store, range(160))
    assert store.flush(300)
    assert counters(store)["pages_evicted"]
    assert most == 1
    assert states(store) == ["ok"] * 4
    store.close()


class CountingSlots(dict[int, int]):
    looked_up = 0

    def __getitem__(self, index: int) -> int:
        self.looked_up += 1
        return super().__getitem__(index)


def started(pages: int, owners: int = 1) -> Fetches:
    """All want the same pages, which are to be read."""
    lock = threading.Lock()
    lock.acquire()
    fetches = Fetches(Arena(2 * pages, 4096), 2 * pages, lock)
    keys = [key_of(page) for page in range(pages)]
    nowhere = Place(None, None)  # type: ignore[arg-type]
    for owner in range(owners):
        fetches.start(Fetch(str(owner), keys, dict.fromkeys(keys, nowhere), 0))
    return fetches


def most_lines(work: Callable[[], None], functions: set[str]) -> int:
    """Of code, that one call of any of these takes, with what it calls."""
    most = depth = lines = 0

    def note(frame: Any, event: str, _: Any) -> Any:
        nonlocal most, depth, lines
        if event == "call":
            if not depth and frame.f_code.co_qualname not in functions:
                return None
            lines = lines if depth else 0
            depth += 1
        elif event == "return":
            depth -= 1
        lines += 1
        most = max(most, lines)
        return note

    with traced(note):
        work()
    return most


def test_no_call_of_an_arena_is_the_longer_the_more_pages_there_are() -> None:
    """Whoever waits for the store's lock waits for all of it."""
    slots, run = 4000, 200
    arena = Arena(slots, 4096)

    def save(prefix: int) -> None:
        batch = []
        for page in range(prefix * run, (prefix + 1) * run):
            slot = arena.reserve()
            assert slot is not None
            arena.cache(key_of(page), slot, Backing.UNBACKED, key_of(page - 1) if page % run else ROOT)
            arena.mark(slot, Backing.DIRTY)
            batch.append(slot)
        for slot in reversed(batch):
            arena.mark(slot, Backing.CLEAN)

    def use(prefix: int) -> None:
        leased = [arena.slot_of(key_of(prefix * run + page)) for page in range(run)]
        for slot in leased:
            assert slot is not None
            arena.lease(slot)
        for slot in leased:
            assert slot is not None
            arena.release([slot])

    def work() -> None:
        for prefix in range(slots // run, slots // run + 4):
            save(prefix)
            use(prefix - 2)

    for prefix in range(slots // run):
        save(prefix)
    calls = {f"Arena.{name}" for name in ("reserve", "cache", "mark", "lease", "release")}
    assert most_lines(work, calls) < 200


def test_pages_in_memory_take_little_more_there() -> None:
    pages = 50_000

    def fill() -> Arena:
        arena = Arena(pages, 4096)
        for page in range(pages):
            slot = arena.reserve()
            assert slot is not None
            arena.cache(key_of(page), slot, Backing.CLEAN, key_of(page - 1) if page % PREFIX else ROOT)
        return arena

    with traced_memory():
        arena = fill()
        assert tracemalloc.get_traced_memory()[0] / pages < 320
        assert arena.cached == pages


def test_what_has_been_announced_is_not_looked_at_again() -> None:
    fetches = started(pages := 300)
    slots = fetches._by_owner["0"].slots = CountingSlots()
    told = 0
    while not fetches.progress("0", told).done:
        read = fetches.take_read(None)  # type: ignore[arg-type]
        assert read is not None
        fetches.finish_read(read, sound=True)
        told += len(fetches.progress("0", told).slots)
    assert told == pages
    assert slots.looked_up <= 3 * pages


def test_who_gives_up_looks_at_no_other_who_waits_for_the_same_page() -> None:
    def calls(owners: int) -> int:
        fetches, count = started(pages=50, owners=owners), 0

        def note(frame: Any, event: str, _: Any) -> Any:
            nonlocal count
            frame.f_trace_lines = True
            count += event == "line"
            return note

        with traced(note):
            for owner in range(10):
                fetches.cut(str(owner))
        return count

    assert calls(110) < 2 * calls(20)


def test_a_long_queue_is_not_looked_at_with_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, looked_up, parent = 1024, 0, Arena.parent
    queued, write = threading.Event(), Volume.write

    def count(arena: Arena, slot: int) -> bytes:
        nonlocal looked_up
        looked_up += 1
        return parent(arena, slot)

    def wait(*arguments: Any) -> bool:
        queued.wait(300)
        return write(*arguments)

    monkeypatch.setattr(Arena, "parent", count)
    monkeypatch.setattr(Volume, "write", wait)
    store = open_store(tmp_path, slots=2 * pages)
    save(store, range(pages))
    queued.set()
    assert store.flush(60)
    assert counters(store)["pages_written"] == pages
    assert looked_up <= 4 * pages
    store.close()


def test_reads_that_nobody_waits_for_do_not_pile_up_behind_a_drive_that_hangs() -> None:
    fetches = started(pages := 50)
    keys = fetches._by_owner["0"].keys
    nowhere = Place(None, None)  # type: ignore[arg-type]
    for _ in range(100):
        fetches.start(Fetch("0", [], {}, 0))
        fetches.start(Fetch("0", keys, dict.fromkeys(keys, nowhere), 0))
    assert len(fetches._queues[nowhere.volume].reads) <= 2 * pages
    assert fetches.reading == pages
    fetches.check()
