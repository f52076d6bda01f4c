"""What others do at the wrong moment: pages are found all the same, and what is healthy stays in use."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import lmdb
import pytest

from sglang_hcache.cli.common import alone
from sglang_hcache.storage import evictor, index_file, locks
from sglang_hcache.storage.files import lock_within
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.locks import evicting
from sglang_hcache.storage.segments import Segments
from tests.prefetch.clients import until
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    counters,
    key_of,
    keys_of,
    lease,
    open_store,
    save,
    served,
    states,
)

RECORD = LAYOUT.record_bytes


def test_pages_that_leave_memory_while_their_prefetch_waits_are_read(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=16, lease_limit=0.5)
    for first in range(0, 40, 8):
        save(store, range(first, first + 8))
        assert store.flush(30)
    store.drop_host()
    assert len(lease(store, "warm", keys_of(range(4)))) == 4
    store.release("warm")
    store.prefetch("busy", keys_of(range(8, 16)))
    assert store.wait("busy", 60).done
    store.prefetch("waiter", keys_of(range(8)))
    assert counters(store)["prefetches_waiting"] == 1
    save(store, range(100, 108))
    assert store.flush(30)
    store.check()
    store.release("busy")
    assert len(store.wait("waiter", 60).slots) == 8
    store.release("waiter")
    store.close()


def test_a_directory_in_which_another_process_evicts_for_long_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, quota_bytes=200 * RECORD)
    save(store, range(16))
    store.close()
    monkeypatch.setattr(evictor, "evicting", lambda path: evicting(path, 0.2))
    held = os.open(tmp_path / "segments", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    store = open_store(tmp_path, quota_bytes=200 * RECORD)
    assert states(store) == ["ok"]
    assert served(store, range(16)) == list(range(16))
    os.close(held)
    store.close()


def test_an_entry_with_a_bad_name_stops_no_eviction(tmp_path: Path) -> None:
    """Changed while it is open, as by a drive that returns zeros."""
    store = open_store(tmp_path, quota_bytes=60 * RECORD, segment_bytes=8 * RECORD)
    save(store, range(8))
    assert store.flush(30)
    opened = store._volumes[0]._directory
    assert opened is not None
    with opened.index._env.begin(write=True) as transaction:
        name = FINGERPRINT + key_of(3)
        value = bytearray(transaction.get(name) or b"")
        value[5] = 0
        transaction.put(name, bytes(value))
    for first in range(8, 200, 8):
        save(store, range(first, first + 8))
        assert store.flush(30)
    assert states(store) == ["ok"]
    assert counters(store)["pages_write_failed"] == 0
    assert counters(store)["pages_evicted"] > 100
    store.close()


def test_pages_that_another_process_adds_during_an_opening_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, range(5))
    store.close()
    store = open_store(tmp_path)  # goes on in the file of those five
    lengths, calls = Segments.lengths, list[int]()

    def lengths_then_more(segments: Segments) -> dict[str, int]:
        found = lengths(segments)
        calls.append(len(found))
        if len(calls) == 1:
            save(store, range(5, 8))
            assert store.flush(30)
        return found

    monkeypatch.setattr(Segments, "lengths", lengths_then_more)
    second = open_store(tmp_path)
    assert calls
    assert counters(second)["pages_damaged"] == 0
    second.close()
    store.drop_host()
    assert served(store, range(8)) == list(range(8))
    store.close()


def test_an_index_whose_check_is_killed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, for want of memory: it is tried again later."""
    store = open_store(tmp_path)
    save(store, range(8))
    store.close()
    (tmp_path / "index" / "closed.xxh3").unlink()
    program = tmp_path / "killed.py"
    program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr(index_file, "_CHECK_PROGRAM", program)
        store = open_store(tmp_path)
        assert "the check of the index was killed" in states(store)[0]
        assert counters(store)["files_damaged"] == 0
        store.close()
    store = open_store(tmp_path)
    assert served(store, range(8)) == list(range(8))
    store.close()


def test_an_index_is_checked_also_by_who_waited_for_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That reads the index, and leaves the file as it is. Of two that wait one checks it."""
    store = open_store(tmp_path)
    save(store, range(8))
    store.close()
    (tmp_path / "index" / "closed.xxh3").unlink()
    prepared = Mock(side_effect=index_file.prepare)
    monkeypatch.setattr(locks, "prepare", prepared)
    with ThreadPoolExecutor(2) as pool:
        with alone(tmp_path):
            waiting = Mock(side_effect=lock_within)
            monkeypatch.setattr(locks, "lock_within", waiting)
            opened = [pool.submit(open_store, tmp_path, fingerprint=letter * 16) for letter in (b"f", b"g")]
            assert until(lambda: waiting.call_count == 2)
            assert not any(one.done() for one in opened)
        stores = [one.result() for one in opened]
    assert prepared.call_count == 1
    assert served(stores[0], range(8)) == list(range(8))
    for store in stores:
        store.close()


@pytest.mark.parametrize("method", ["delete_names", "raw"])
def test_a_drive_that_fails_does_not_fail_the_others(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its index is looked at, and pages in it deleted, where another one evicts."""
    store = open_store(tmp_path / "a", tmp_path / "b", quota_bytes=60 * RECORD, segment_bytes=8 * RECORD)
    first = 0
    while not counters(store)["pages_evicted"]:
        save(store, range(first, first + 8))
        assert store.flush(30)
        first += 8
    healthy, failing = (volume._directory for volume in store._volumes)
    assert healthy is not None
    assert failing is not None
    original, failed = getattr(Index, method), list[int]()

    def fail(mine: Index, *arguments: object) -> object:
        if mine is failing.index:
            failed.append(1)
            raise lmdb.Error("mdb_txn_commit: Input/output error")
        return original(mine, *arguments)

    failing._evictor = None  # it meets no error of its own
    monkeypatch.setattr(Index, method, fail)
    for more in range(first, first + 160, 8):
        save(store, range(more, more + 8))
        store.flush(30)
    assert failed
    assert states(store)[0] == "ok"
    assert counters(store)["pages_write_failed"] == 0
    store.close()
