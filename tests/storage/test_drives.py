"""Several drives at once: one that hangs, or is slow, is no other's loss."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sglang_hcache.storage import store as store_module
from sglang_hcache.storage import writer
from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.layout import ROOT
from sglang_hcache.storage.segment import SegmentWriter
from sglang_hcache.storage.store import READ_THREADS, LocalStore
from sglang_hcache.storage.stripe import Stripe
from sglang_hcache.storage.volume import Volume
from tests.prefetch.clients import until
from tests.storage.pages import LAYOUT, counters, fill, key_of, keys_of, open_store, save, served, states

SHARE = 40  # of 64 slots: what may wait for one of two drives, however many pages come at once


class Hang:
    """Has methods wait, for objects below a path, until `end`. `begun`: one of them does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._over = threading.Event(), threading.Event()
        self._patch = monkeypatch
        self.end = self._over.set

    def __call__(self, owner: type, name: str, below: Path) -> None:
        original = getattr(owner, name)

        def wait(of: Any, *arguments: Any) -> Any:
            if of.path.is_relative_to(below):
                self.begun.set()
                self._over.wait(600)
            return original(of, *arguments)

        self._patch.setattr(owner, name, wait)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    hang = Hang(monkeypatch)
    yield hang
    hang.end()


def lies_in(store: LocalStore, page: int) -> Path:
    place = store._files.locate([key_of(page)])[key_of(page)]
    assert isinstance(place.volume, Volume)
    return place.volume.path


def save_slowly(store: LocalStore, pages: range) -> None:
    """More than memory holds: what is not there yet is waited for."""
    for page in pages:
        deadline = time.monotonic() + 60
        while (slot := store.reserve()) is None:
            assert time.monotonic() < deadline, "memory is full of pages for the drive that hangs"
            time.sleep(0.001)
        fill(store.memory[slot], page)
        store.commit(key_of(page), slot, ROOT)


def test_a_drive_whose_reads_hang_does_not_keep_others_from_being_read(tmp_path: Path, hang: Hang) -> None:
    store = open_store(tmp_path / "a", tmp_path / "b", slots=128)
    save(store, range(60))
    assert store.flush(30)
    store.drop_host()
    in_a = [page for page in range(60) if lies_in(store, page) == tmp_path / "a"]
    in_b = [page for page in range(60) if lies_in(store, page) == tmp_path / "b"]
    hang(Volume, "read", tmp_path / "a")
    for page in in_a[: READ_THREADS + 2]:
        store.prefetch(f"hangs {page}", keys_of([page]))
    assert hang.begun.wait(60)
    assert served(store, in_b) == in_b
    assert not store.progress(f"hangs {in_a[0]}").done
    hang.end()
    assert store.wait(f"hangs {in_a[0]}", 60).slots
    assert store.close()


def test_what_a_drive_that_hangs_was_to_read_is_not_waited_for(tmp_path: Path, hang: Hang) -> None:
    """Nobody waits for it any more, so as many pages as may be leased are as many as there are without its slots."""
    drives = [tmp_path / "a", tmp_path / "b"]
    store = open_store(*drives, lease_limit=0.5)
    save(store, range(40))
    assert store.flush(30)
    store.drop_host()
    hang(Volume, "read", drives[0])
    page = next(page for page in range(40) if lies_in(store, page) == drives[0])
    store.prefetch("given up", [key_of(page)])
    assert hang.begun.wait(60)
    store.cut("given up")
    assert store.progress("given up")[:3] == ((), True, True)
    store.release("given up")
    save(store, range(100, 132))
    store.prefetch("all that may be leased", keys_of(range(100, 132)))
    assert len(store.wait("all that may be leased", 60).slots) == 31
    hang.end()
    store.close()


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_a_drive_whose_writes_hang_does_not_keep_others_from_being_written(
    tmp_path: Path, hang: Hang, policy: WritePolicy
) -> None:
    store = open_store(tmp_path / "a", tmp_path / "b", write_policy=policy)
    hang(SegmentWriter, "write", tmp_path / "a")
    save_slowly(store, range(600))
    a, b = store._volumes

    def only_a_lags() -> bool:
        store.drain()
        with store._lock:
            return not (store._writer._backlog or store._writer._by_volume[b].waiting)

    assert until(only_a_lags)
    stuck = store.drain()
    assert stuck == counters(store)["pages_dirty"] <= SHARE
    assert (a.pages, b.pages) == (0, 600 - stuck)
    hang.end()
    assert store.flush(30)
    assert counters(store)["pages_file"] == 600
    assert store.close()


def test_a_drive_that_hangs_does_not_keep_others_from_evicting(tmp_path: Path, hang: Hang) -> None:
    store = open_store(tmp_path / "a", tmp_path / "b", slots=256, quota_bytes=40 * LAYOUT.record_bytes)
    save(store, range(60))
    assert store.flush(30)
    hang(SegmentWriter, "write", tmp_path / "a")
    save(store, [60, 61])
    assert until(lambda: store._volumes[0]._hangs)
    with store._volumes[0]._directory.index._env.begin(write=True):  # type: ignore[union-attr]  # as in a commit
        save_slowly(store, range(100, 400))
        assert until(lambda: counters(store)["pages_written"] >= 60 + 150)
        assert counters(store)["pages_evicted"] > 0
    hang.end()
    assert store.close()


def test_what_a_drive_that_hangs_has_to_note_takes_no_more_and_more_memory(
    tmp_path: Path, hang: Hang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MOST_TOUCHED", 10)
    store = open_store(tmp_path / "a", tmp_path / "b")
    hang(SegmentWriter, "write", tmp_path / "a")
    save(store, range(30))
    assert hang.begun.wait(60)
    assert served(store, range(30)) == list(range(30))
    assert len(store._writer._by_volume[store._volumes[0]].touched) == 10
    hang.end()
    assert store.close()


def test_drives_are_written_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, write = threading.Barrier(2), Volume.write

    def meet(volume: Volume, *arguments: Any) -> bool:
        both.wait(60)  # raises where only one comes
        return write(volume, *arguments)

    monkeypatch.setattr(Volume, "write", meet)
    store = open_store(tmp_path / "a", tmp_path / "b")
    save(store, range(2))
    assert store.flush(30)
    assert counters(store)["pages_written"] == 2
    monkeypatch.setattr(Volume, "write", write)
    assert store.close()


@pytest.mark.parametrize("hanging", [(Volume, "read"), (SegmentWriter, "write"), (Volume, "retry")], ids=str)
def test_closing_does_not_wait_for_a_drive_that_hangs(
    tmp_path: Path, hang: Hang, hanging: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CLOSE_WAIT_S", 0.5)
    join, in_vain = threading.Thread.join, list[float]()

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if thread.is_alive():
            in_vain.append(timeout or 0.0)

    store = open_store(tmp_path / "a", tmp_path / "b")
    save(store, range(10))
    assert store.flush(30)
    store.drop_host()
    hang(*hanging, tmp_path / "a")
    for page in range(10):
        store.prefetch(f"reads {page}", keys_of([page]))
    save(store, range(10, 12))
    assert hang.begun.wait(60)
    flush = Mock(side_effect=store.flush)
    with monkeypatch.context() as patch:
        patch.setattr(store, "flush", flush)
        patch.setattr(threading.Thread, "join", noted)
        assert not store.close(), "a thread may still use its memory"
    flush.assert_called_once_with(0.5)
    assert sum(in_vain) <= 0.5, "of all threads together"
    assert not store.close()
    assert until((tmp_path / "b" / "index" / "closed.xxh3").exists), "the other is closed as always"
    hang.end()
    assert until(store.close)
    assert (tmp_path / "a" / "index" / "closed.xxh3").exists()


def test_what_a_failed_drive_was_to_write_is_written_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = open_store(tmp_path / "a", tmp_path / "b", retry_s=600.0), SegmentWriter.write
    begun, refused = threading.Event(), threading.Event()

    def refuse(writer: SegmentWriter, *arguments: Any) -> None:
        if writer.path.is_relative_to(tmp_path / "a"):
            begun.set()
            refused.wait(60)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(writer, *arguments)

    monkeypatch.setattr(SegmentWriter, "write", refuse)
    save(store, range(2))
    assert begun.wait(60)
    save(store, range(2, 20))  # some of them wait in its queue
    refused.set()
    assert store.flush(30)
    assert [state.split(":")[0] for state in states(store)] == ["failed", "ok"]
    assert (counters(store)["pages_written"], counters(store)["pages_write_failed"]) == (20, 0)
    store.drop_host()
    assert served(store, range(20)) == list(range(20))
    store.check()
    store.close()


def test_selective_queues_a_new_page_in_the_slot_of_one_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, write_policy=WritePolicy.SELECTIVE)
    with monkeypatch.context() as patch:
        patch.setattr(Volume, "write", Mock(side_effect=RuntimeError("a bug of ours")))
        save(store, [0, 0])
        assert store.flush(30)
    assert counters(store)["pages_write_failed"] == 1
    store.drop_host()
    save(store, [1])
    assert store.flush(30)
    assert counters(store)["pages_file"] == 0, "it has been used once"
    save(store, [1])
    assert store.flush(30)
    assert counters(store)["pages_file"] == 1
    store.check()
    store.close()


def test_a_bug_ends_no_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad").write_text("not a directory yet")
    with monkeypatch.context() as patch:
        revive = Mock(side_effect=RuntimeError("a bug of ours"))
        patch.setattr(Volume, "_revive", revive)
        store = open_store(tmp_path / "bad", retry_s=0.05)
        assert until(lambda: revive.call_count >= 2)
        assert store._writer.threads[0].is_alive()
    assert "a bug of ours" in caplog.text
    (tmp_path / "bad").unlink()
    save(store, range(3))
    assert until(lambda: counters(store)["pages_file"] == 3)
    store.close()


def test_selective_writes_what_was_used_twice_once_a_directory_works_again(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("not a directory yet")
    store = open_store(tmp_path / "bad", retry_s=0.05, write_policy=WritePolicy.SELECTIVE)
    save(store, [0, 0, 1])
    (tmp_path / "bad").unlink()
    assert until(lambda: counters(store)["pages_file"])
    assert store.flush(30)
    store.drop_host()
    assert served(store, [0, 1]) == [0]
    store.close()


def test_selective_works_without_directories() -> None:
    store = open_store(write_policy=WritePolicy.SELECTIVE)
    save(store, [0, 0, 0])
    assert served(store, [0]) == [0]
    assert store.flush(1)
    assert counters(store)["pages_write_failed"] == 0
    store.close()


class Drive:
    """As much of a volume as placement asks for."""

    def __init__(self) -> None:
        self.healthy, self.behind = True, 0


def test_pages_go_round_the_drives_that_work_and_do_not_lag() -> None:
    drives = [Drive() for _ in range(3)]
    stripe = Stripe(drives)  # type: ignore[arg-type]

    def take(pages: int) -> list[int]:
        chosen = [stripe.next(lambda drive: drive.behind, most_behind=4) for _ in range(pages)]  # type: ignore[attr-defined]
        return [drives.index(drive) for drive in chosen]  # type: ignore[arg-type]

    assert take(6) == [0, 1, 2, 0, 1, 2]
    drives[1].healthy = False
    assert take(4) == [0, 2, 0, 2]
    drives[1].healthy, drives[0].behind = True, 4
    assert take(3) == [0, 1, 2]
    drives[0].behind = 5
    assert take(3) == [1, 2, 1]
    drives[1].behind = drives[2].behind = 1
    assert take(3) == [2, 0, 1]
    for drive in drives:
        drive.healthy = False
    assert stripe.next() is None
    assert Stripe([]).next() is None


def test_pages_are_found_by_what_is_behind_them() -> None:
    arena = Arena(4, 4096)
    for page, backing in enumerate((Backing.CLEAN, Backing.UNBACKED, Backing.DIRTY, Backing.UNBACKED)):
        slot = arena.reserve()
        assert slot is not None
        arena.cache(key_of(page), slot, backing)
    found = arena.backed_by(Backing.UNBACKED, 0, 3) + arena.backed_by(Backing.UNBACKED, 3, 9)
    assert [page[1:] for page in sorted(found)] == [(1, key_of(1)), (3, key_of(3))]
