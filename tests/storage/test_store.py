from __future__ import annotations

import mmap
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.storage import store as stores
from sglang_hcache.storage.layout import ROOT
from sglang_hcache.storage.segment import SegmentReader, SegmentWriter
from sglang_hcache.storage.stripe import Place, Stripe
from tests.prefetch.clients import until
from tests.storage.pages import (
    LAYOUT,
    OTHER_FINGERPRINT,
    counters,
    fill,
    holds,
    key_of,
    keys_of,
    lease,
    open_store,
    save,
    segment_files,
    served,
    states,
)


@pytest.mark.parametrize("volumes", [0, 1, 3])
def test_pages_come_back_as_they_were(tmp_path: Path, volumes: int) -> None:
    store = open_store(*(tmp_path / str(i) for i in range(volumes)))
    save(store, range(20))
    assert store.contains(keys_of([0, 19, 20])) == [True, True, False]
    assert store.flush(30)
    assert served(store, range(21)) == list(range(20))
    store.drop_host()
    store.check()
    assert served(store, range(21)) == (list(range(20)) if volumes else [])
    assert counters(store)["hits_file"] == (20 if volumes else 0)
    store.close()


def test_pages_are_striped_and_survive_reopening(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    store = open_store(*directories)
    save(store, range(21))
    store.close()
    store.close()
    store = open_store(*directories)
    volumes = store.stats()["volumes"]
    assert isinstance(volumes, list)
    assert sorted(int(volume["pages"]) for volume in volumes) == [10, 11]
    assert served(store, range(21)) == list(range(21))
    save(store, range(30, 40))
    store.close()
    store = open_store(*directories)
    assert served(store, range(40)) == [*range(21), *range(30, 40)]
    store.close()


def test_a_page_that_is_on_file_is_not_written_again(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for _ in range(2):
        save(store, range(3))
        assert store.flush(30)
        store.drop_host()
    assert counters(store)["pages_written"] == 3
    save(store, [0, 0])
    assert counters(store)["pages_host"] == 1
    store.close()


def test_at_rest_files_take_what_they_hold_and_are_private(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    save(store, range(3))
    store.close()
    (segment,) = segment_files(tmp_path / "new")
    assert segment.stat().st_size == 3 * LAYOUT.record_bytes
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    empty = open_store(tmp_path / "empty")
    empty.close()
    assert not segment_files(tmp_path / "empty")


def test_a_half_filled_segment_is_filled_further(tmp_path: Path) -> None:
    for page in range(6):
        store = open_store(tmp_path)
        save(store, [page])
        store.close()
    assert len(segment_files(tmp_path)) == 1
    store = open_store(tmp_path)
    assert served(store, range(6)) == list(range(6))
    store.close()


def test_another_fingerprint_finds_nothing_and_destroys_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(5))
    store.close()
    (tmp_path / "index" / "data.mdb").unlink()  # what it rebuilds must not be the other's loss either
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT)
    assert served(other, range(5)) == []
    save(other, range(100, 103))
    other.close()
    store = open_store(tmp_path)
    assert served(store, range(103)) == list(range(5))
    store.close()


def test_a_volume_that_cannot_be_opened_does_not_take_the_others_down(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("a file, not a directory")
    store = open_store(tmp_path / "bad", tmp_path / "good", retry_s=0.05)
    save(store, range(4))
    assert store.flush(30)
    assert [state.split(":")[0] for state in states(store)] == ["failed", "ok"]
    store.drop_host()
    assert served(store, range(4)) == list(range(4))
    (tmp_path / "bad").unlink()
    assert until(lambda: states(store) == ["ok", "ok"])
    save(store, range(4, 8))
    store.close()
    assert segment_files(tmp_path / "bad")


def test_memory_never_fills_with_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("")
    store = open_store(tmp_path / "bad", slots=4)
    for page in range(40):
        save(store, [page])
        assert store.flush(30)
    assert counters(store)["pages_write_failed"] == 40
    assert counters(store)["pages_host"] == 4
    store.close()


@pytest.mark.parametrize("on_file", [False, True])
def test_no_more_is_leased_than_allowed(tmp_path: Path, on_file: bool) -> None:
    store = open_store(tmp_path, slots=8, lease_limit=0.5)
    save(store, range(6))
    assert store.flush(30)
    if on_file:
        store.drop_host()
    assert len(lease(store, "a", keys_of(range(3)))) == 3
    assert len(lease(store, "b", keys_of([3]))) == 1
    store.prefetch("d", keys_of(range(4, 6)))
    assert len(lease(store, "c", keys_of(range(4)))) == 4, "a slot that is leased already costs nothing"
    assert store.progress("d")[:3] == ((), False, False)
    assert counters(store)["pages_leased"] == 4
    store.check()
    for owner in "abc":
        store.release(owner)
    assert len(store.wait("d", 30).slots) == 2
    store.release("d")
    assert len(lease(store, "a", keys_of(range(6)))) == 4
    store.release("a")
    assert counters(store)["pages_leased"] == 0
    store.close()


def test_later_pages_in_memory_do_not_take_the_room_of_earlier_ones_on_file(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=8, lease_limit=0.5)
    save(store, range(4))
    assert store.flush(30)
    store.drop_host()
    save(store, range(4, 8))
    assert store.flush(30)
    slots = lease(store, "a", keys_of(range(8)))
    assert [holds(store.memory[slot], page) for page, slot in enumerate(slots)] == [True] * 4
    store.close()


def test_what_leaves_memory_while_files_are_asked_is_read_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pages are in memory when it is asked for; no hole in the prefix ends it there."""
    store = open_store(tmp_path)
    save(store, range(10))
    assert store.flush(30)
    store.drop_host()
    lease(store, "once", keys_of(range(6)))
    store.release("once")
    locate, asked = Stripe.locate, []

    def others_take_slots_meanwhile(files: Stripe, keys: Iterable[bytes]) -> dict[bytes, Place]:
        asked.append(list(keys))
        store.drop_host()
        return locate(files, asked[-1])

    monkeypatch.setattr(Stripe, "locate", others_take_slots_meanwhile)
    assert len(lease(store, "all", keys_of(range(10)))) == 10
    assert asked == [keys_of(range(6, 10)), keys_of(range(6))]
    store.close()


def test_a_new_lease_replaces_the_former_and_keeps_what_overlaps(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(6))
    assert store.flush(30)
    store.drop_host()
    first = lease(store, "a", keys_of(range(4)))
    read = counters(store)["bytes_read"]
    second = lease(store, "a", keys_of([0, 1, 2, 3, 4]))
    assert second[:4] == first
    assert counters(store)["bytes_read"] == read + LAYOUT.record_bytes
    assert lease(store, "a", keys_of([4])) == second[4:]
    assert counters(store)["pages_leased"] == 1
    store.release("a")
    store.release("a")
    assert counters(store)["pages_leased"] == 0
    store.close()


def test_a_lease_ends_where_a_page_is_missing_and_stays_put(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=4)
    save(store, [0, 1, 3])
    assert store.flush(30)
    slots = lease(store, "a", keys_of(range(4)))
    assert len(slots) == 2
    for page in range(10, 20):
        save(store, [page])
        assert store.flush(30)
    assert [holds(store.memory[slot], page) for page, slot in enumerate(slots)] == [True, True]
    assert store.reserve() is not None
    assert store.reserve() is not None
    assert store.reserve() is None
    store.close()


@pytest.mark.parametrize(
    "options", [{"fingerprint": b"short"}, {"slots": 0}, {"lease_limit": 0.0}, {"lease_limit": 1.1}]
)
def test_bad_values_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"fingerprint|host memory|lease_limit"):
        open_store(tmp_path, **options)  # type: ignore[arg-type]


def test_threads_capture_and_restore_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a", tmp_path / "b", slots=16, lease_limit=0.5)
    errors: list[BaseException] = []

    def capture(start: int) -> None:
        for page in range(start, start + 60):
            slot = store.reserve()
            if slot is None:
                store.flush(30)
            elif page % 7 == 0:
                store.abandon(slot)
            else:
                fill(store.memory[slot], page)
                store.commit(key_of(page), slot, ROOT)
            store.check()

    def restore(owner: str) -> None:
        for i in range(60):
            first = i % 50 + 1
            for page, slot in enumerate(lease(store, owner, keys_of(range(first, first + 5))), first):
                assert holds(store.memory[slot], page)
            store.check()
            if i % 3 == 0:
                store.release(owner)
            if i % 10 == 0:
                store.drop_host()
        store.release(owner)

    def guarded(work, argument) -> None:  # type: ignore[no-untyped-def]
        try:
            work(argument)
        except BaseException as error:
            errors.append(error)
            raise

    jobs = [(capture, 0), (capture, 20), (restore, "x"), (restore, "y"), (restore, "z")]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.check()
    assert counters(store)["pages_leased"] == counters(store)["pages_open"] == 0
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_many_reserves_do_not_wait_for_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture goes on while a disk hangs."""
    store = open_store(tmp_path)
    save(store, range(3))
    assert store.flush(30)
    store.drop_host()
    go, entered, read = threading.Event(), threading.Event(), SegmentReader.read

    def slow(*args) -> None:  # type: ignore[no-untyped-def]
        entered.set()
        assert go.wait(600)
        read(*args)

    monkeypatch.setattr(SegmentReader, "read", slow)
    thread = threading.Thread(target=lease, args=(store, "a", keys_of(range(3))))
    thread.start()
    assert entered.wait(30)
    save(store, range(10, 13))
    assert store.flush(30)
    go.set()
    thread.join()
    assert counters(store)["pages_leased"] == 3
    store.close()


def test_a_repeated_prefetch_is_told_of_like_the_first(tmp_path: Path) -> None:
    told: list[str] = []
    store = open_store(tmp_path, on_progress=told.append)
    save(store, range(3))
    for _ in range(2):
        told.clear()
        store.prefetch("a", keys_of(range(3)))
        assert store.wait("a", 60).done
        assert until(lambda: told)
        assert told == ["a"]
    store.close()


def test_one_process_keeps_pages_of_two_fingerprints_in_one_directory(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path, fingerprint=OTHER_FINGERPRINT)
    save(store, range(5))
    save(other, range(3, 8))
    for each in (store, other):
        assert states(each) == ["ok"]
        assert each.flush(30)
        each.drop_host()
    assert served(store, range(8)) == [0, 1, 2, 3, 4]
    store.close()
    assert served(other, range(8)) == [3, 4, 5, 6, 7]
    store = open_store(tmp_path)
    assert served(store, range(8)) == [0, 1, 2, 3, 4]
    store.close()
    other.close()


def test_pages_behind_the_last_slot_of_a_smaller_arena_are_misses_until_they_are_on_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, sync = threading.Event(), SegmentWriter.sync

    def when_told(writer: SegmentWriter) -> None:
        go.wait(600)
        sync(writer)

    monkeypatch.setattr(SegmentWriter, "sync", when_told)
    region = mmap.mmap(-1, 80 * LAYOUT.record_bytes)
    store = open_store(tmp_path, region=region)
    save(store, range(30))
    slots = [store.reserve() for _ in range(34)]
    for slot in slots[::-1]:
        assert slot is not None
        store.abandon(slot)
    store.resize(25, region)
    assert store.memory.shape[0] == 25
    assert store.contains(keys_of(range(31))) == [True] * 25 + [False] * 6
    assert store.reserve() is None
    assert store.used_behind()
    store.check()

    store.resize(32, region)
    save(store, [26, 40])
    assert store.reserve() is None, "pages that are not written yet keep their slots"
    assert served(store, range(41)) == [*range(25), 26, 40]
    store.check()
    store.resize(25, region)
    go.set()
    assert store.flush(30)
    store.check()
    assert not store.used_behind()
    assert served(store, range(41)) == [*range(30), 40]
    store.resize(80, region)
    save(store, range(50, 120))
    assert counters(store)["pages_total"] == 80
    assert served(store, range(50, 120)) == list(range(50, 120))
    store.check()
    store.close()


def test_a_page_that_is_read_into_a_slot_that_is_in_use_no_more_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = mmap.mmap(-1, 64 * LAYOUT.record_bytes)
    store = open_store(tmp_path, region=region)
    save(store, range(10))
    assert store.flush(30)
    store.drop_host()
    go, entered, read = threading.Event(), threading.Event(), SegmentReader.read

    def when_told(*arguments: Any) -> None:
        entered.set()
        go.wait(600)
        read(*arguments)

    monkeypatch.setattr(SegmentReader, "read", when_told)
    taken = [store.reserve() for _ in range(10)]
    store.prefetch("first", keys_of([3]))
    assert entered.wait(60)
    store.release("first")
    for slot in taken:
        assert slot is not None
        store.abandon(slot)
    store.resize(5, region)
    store.prefetch("second", keys_of([3]))
    go.set()
    assert store.wait("second", 60)[:3] == ((), True, True)
    store.check()
    assert not store.used_behind()
    assert served(store, range(10)) == list(range(10))
    store.close()


def test_of_a_prompt_that_was_never_seen_little_is_looked_up_on_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, range(10))
    assert store.flush(30)
    store.drop_host()
    locate, asked = Stripe.locate, list[int]()

    def counted(files: Stripe, keys: Iterable[bytes]) -> dict[bytes, Place]:
        wanted = list(keys)
        if wanted:
            asked.append(len(wanted))
        return locate(files, wanted)

    monkeypatch.setattr(Stripe, "locate", counted)
    monkeypatch.setattr(stores, "FIRST_LOOKUP", 2)
    store.prefetch("cold", keys_of(range(100, 5000)))
    assert asked == [2]
    asked.clear()
    store.prefetch("warm", keys_of([*range(10), *range(5000, 9000)]))
    assert asked == [2, 8, 32]
    slots, *is_over = store.wait("warm", 30)
    assert is_over == [True, True, 10]
    assert [page for page, slot in enumerate(slots) if holds(store.memory[slot], page)] == list(range(10))
    store.release("warm")
    store.close()
