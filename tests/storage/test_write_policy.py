"""When pages go to files, under SGLang's three policies."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.storage import writer
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.segment import SegmentWriter
from sglang_hcache.storage.store import LocalStore
from tests.prefetch.clients import until
from tests.storage.pages import counters, keys_of, lease, open_store, save, served


def on_file(store: LocalStore) -> int:
    return counters(store)["pages_file"]


def test_write_through_writes_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(5))
    assert store.flush(30)
    assert on_file(store) == 5
    store.close()


def test_selective_writes_what_is_used_a_second_time(tmp_path: Path) -> None:
    store = open_store(tmp_path, write_policy=WritePolicy.SELECTIVE)
    save(store, range(6))
    assert store.flush(30)
    assert on_file(store) == 0
    lease(store, "asked for", keys_of([1, 2]))
    store.release("asked for")
    save(store, [4])  # computed once more
    assert store.flush(30)
    assert on_file(store) == 3
    store.close()
    store = open_store(tmp_path)
    assert served(store, range(6)) == [1, 2, 4]
    store.close()


def test_selective_loses_what_was_used_once_when_memory_is_short(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=4, write_policy=WritePolicy.SELECTIVE)
    save(store, range(6))
    assert served(store, range(6)) == [2, 3, 4, 5]
    store.check()
    store.close()


def test_write_back_writes_when_memory_gets_short_and_loses_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=16, write_policy=WritePolicy.WRITE_BACK)
    save(store, range(8))
    assert on_file(store) == 0

    def has_room() -> bool:
        if (slot := store.reserve()) is not None:
            store.abandon(slot)
        return slot is not None

    for page in range(8, 40):
        assert until(has_room), "the writer makes none"
        save(store, [page])
    assert on_file(store) >= 40 - 16
    assert store.flush(30), "a page on file needs a slot to be read into"
    assert served(store, range(40)) == list(range(40))
    store.check()
    store.close()


def test_write_back_writes_the_rest_on_closing(tmp_path: Path) -> None:
    store = open_store(tmp_path, write_policy=WritePolicy.WRITE_BACK)
    save(store, range(10))
    assert on_file(store) == 0
    store.close()
    store = open_store(tmp_path)
    assert served(store, range(10)) == list(range(10))
    store.close()


def test_pages_that_no_disk_could_take_are_written_when_one_works_again(tmp_path: Path) -> None:
    directory = tmp_path / "volume"
    directory.write_text("not a directory yet")
    store = open_store(directory, retry_s=0.05)
    save(store, range(5))
    assert store.flush(30)
    assert counters(store)["pages_write_failed"] == 5
    directory.unlink()
    assert until(lambda: on_file(store) == 5)
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(5)) == list(range(5))
    store.check()
    store.close()


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_drives_that_are_too_slow_leave_memory_to_new_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: WritePolicy
) -> None:
    """Those are written once they are used again, and drives have caught up."""
    go_on, write = threading.Event(), SegmentWriter.write

    def hang(*arguments: Any) -> None:
        assert go_on.wait(30)
        write(*arguments)

    monkeypatch.setattr(SegmentWriter, "write", hang)
    monkeypatch.setattr(writer, "BATCH_PAGES", 1)
    store = open_store(tmp_path, slots=16, write_policy=policy)
    save(store, range(40))
    dirty = counters(store)["pages_dirty"]
    assert dirty < 16
    assert counters(store)["pages_write_skipped"] == 40 - dirty
    assert counters(store)["pages_write_failed"] == 0
    assert served(store, range(40)) == [*range(dirty), *range(40 - (16 - dirty), 40)], "the first wait, the last fit"
    go_on.set()
    assert store.flush(30)
    assert on_file(store) == dirty
    last = range(39, 40)
    assert served(store, last) == [39]
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(40)) == [*range(dirty), *last]
    store.check()
    store.close()


def test_write_back_writes_when_a_prefetch_waits_for_slots(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=64, write_policy=WritePolicy.WRITE_BACK)
    save(store, range(30))
    assert store.flush(30)
    store.drop_host()
    save(store, range(100, 140))
    assert on_file(store) == 30
    store.prefetch("reader", keys_of(range(30)))
    slots, done, *_ = store.wait("reader", 60)
    assert done, "it waits for ever"
    assert len(slots) == 30
    assert on_file(store) > 30
    store.check()
    store.close()


def test_write_back_writes_what_comes_while_a_prefetch_waits_for_slots(tmp_path: Path) -> None:
    """There was nothing to write when it began to wait, and nobody else asks for anything."""
    store = open_store(tmp_path, lease_limit=0.5, write_policy=WritePolicy.WRITE_BACK)
    save(store, range(33))
    assert store.flush(30)
    store.drop_host()
    lease(store, "another", keys_of([32]))
    store.prefetch("half", keys_of(range(32)))
    assert not store.wait("half", 0.2).done
    save(store, range(100, 140))
    store.release("another")
    assert len(store.wait("half", 60).slots) == 32
    store.close()


def test_a_prefetch_of_more_than_memory_holds_does_not_wait_for_every_page_to_be_written(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=16, write_policy=WritePolicy.WRITE_BACK)
    for first in range(0, 30, 10):
        save(store, range(first, first + 10))
        assert store.flush(30)
    store.drop_host()
    save(store, range(90, 94))
    store.prefetch("reader", keys_of(range(30)))
    slots, done, *_ = store.wait("reader", 60)
    assert done
    assert len(slots) >= 12
    store.close()
