from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lmdb
import pytest

from sglang_hcache.storage import index, index_file, volume
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.segment import SegmentWriter
from sglang_hcache.storage.store import LocalStore
from sglang_hcache.storage.volume import UNREADABLE_S, Volume
from tests.prefetch.clients import until
from tests.storage.child import start_child
from tests.storage.pages import LAYOUT, counters, open_store, save, segment_files, served, states

ROUNDS = int(os.environ.get("HCACHE_FAULT_ROUNDS", "2"))
PAGES = 20
NEVER_S = 600.0


def flip(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    chance = random.Random(seed)
    for _ in range(max(1, len(data) // 200)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("")


def wait_until_ok(store: LocalStore) -> None:
    assert until(lambda: states(store) == ["ok"])


def retry(store: LocalStore) -> None:
    """Now, before `retry_s` is over."""
    store._volumes[0]._retry_at = 0.0
    wait_until_ok(store)


@contextmanager
def unobserved(monkeypatch: pytest.MonkeyPatch, *stores: LocalStore) -> Iterator[None]:
    """None of the stores looks meanwhile whether its directory is still there."""
    asked = set[Volume]()

    def not_yet(volume: Volume) -> bool:
        asked.add(volume)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Volume, "retry", not_yet)
        assert until(lambda: asked >= {volume for store in stores for volume in store._volumes})
        yield


def remove_at_once(path: Path) -> None:
    """Whoever uses it makes nothing anew in what is being removed."""
    gone = path.rename(path.with_name("gone"))
    shutil.rmtree(gone)


DAMAGES: list[Callable[[Path], object]] = [
    flip,
    truncate,
    lambda path: os.truncate(path, 0),
    Path.unlink,
    become_directory,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["flip", "truncate", "empty", "delete", "directory"])
@pytest.mark.parametrize("name", ["hcache.lock", "index/lock.mdb", "index/data.mdb", "segment"])
def test_damaged_files_are_found_and_cost_nothing_else(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    for round_ in range(ROUNDS):
        directory = tmp_path / str(round_)
        store = open_store(directory)
        save(store, range(PAGES))
        store.close()
        path = segment_files(directory)[round_ % 3] if name == "segment" else directory / name
        if damage is flip and not path.stat().st_size:
            path.write_bytes(b"\xff" * 100)
        if damage is flip:
            flip(path, seed=round_)
        else:
            damage(path)

        store = open_store(directory)
        assert states(store) == ["ok"]
        found = served(store, range(PAGES))
        count = counters(store)
        if name == "segment":
            assert found != list(range(PAGES)) or damage is flip
            assert count["pages_damaged"] == PAGES - len(found)
            assert count["files_damaged"] == (len(found) < PAGES)
        elif name == "index/data.mdb" and damage is flip:
            assert len(found) == PAGES or count["pages_damaged"] > 0 or count["index_rebuilt"] > 0
        elif name == "index/data.mdb":
            assert found == list(range(PAGES))
            assert count["index_rebuilt"] == 1 or damage is truncate, "what is cut off may have been unused"
        else:
            assert found == list(range(PAGES))

        save(store, (page for page in range(PAGES) if page not in found))
        store.close()
        store = open_store(directory)
        assert served(store, range(PAGES)) == list(range(PAGES)), "what was lost can be stored again"
        store.check()
        store.close()


@pytest.mark.parametrize("offset", [0, 8, 16, 40, 4096, 8192 + 16])
def test_an_index_with_a_damaged_page_does_not_crash_the_store(tmp_path: Path, offset: int) -> None:
    store = open_store(tmp_path)
    save(store, range(PAGES))
    store.close()
    data = tmp_path / "index" / "data.mdb"
    with data.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    store = open_store(tmp_path)
    assert states(store) == ["ok"]
    served(store, range(PAGES))
    store.close()


def test_what_is_damaged_while_open_is_a_miss(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(PAGES))
    assert store.flush(30)
    store.drop_host()
    for segment in segment_files(tmp_path):
        flip(segment)
    found = served(store, range(PAGES))
    assert counters(store)["pages_damaged"] == PAGES - len(found) > 0
    store.close()


def test_a_disk_that_fails_for_a_while_costs_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an NVMe drive does that is reset."""
    store = open_store(tmp_path, retry_s=NEVER_S)
    save(store, range(PAGES))
    assert store.flush(30)
    store.drop_host()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        assert served(store, range(5)) == []
        assert "input/output" in states(store)[0]
        assert counters(store)["pages_unreadable"] == 5
        assert served(store, range(5)) == []
        assert counters(store)["pages_unreadable"] == 5, "what has just failed is not tried again"
    assert served(store, range(5, PAGES)) == list(range(5, PAGES))
    save(store, [2])  # prefilled again
    retry(store)
    assert until(lambda: counters(store)["pages_written"] == PAGES + 1)
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(5)) == [2], "what was stored anew lies elsewhere"
    assert counters(store)["pages_damaged"] == 0
    monkeypatch.setattr(volume, "UNREADABLE_S", 0.0)
    store.close()
    store = open_store(tmp_path)
    assert served(store, range(PAGES)) == list(range(PAGES)), "all of them are still in the index"
    store.close()


def test_an_unreadable_record_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(volume, "time", SimpleNamespace(monotonic=lambda: now))
    store = open_store(tmp_path)
    save(store, range(3))
    assert store.flush(30)
    store.drop_host()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        assert served(store, range(3)) == []
    assert served(store, range(3)) == []
    now += UNREADABLE_S - 1
    assert served(store, range(3)) == []
    now += 2
    assert served(store, range(3)) == [0, 1, 2]
    store.close()


def test_a_disk_that_fails_while_the_index_is_rebuilt_costs_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    save(store, range(PAGES))
    store.close()
    shutil.rmtree(tmp_path / "index")
    reads = itertools.count()
    preadv = os.preadv

    def fail(*arguments: Any) -> int:
        if next(reads) > PAGES // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        store = open_store(tmp_path, retry_s=NEVER_S)
        assert "input/output" in states(store)[0]
    retry(store)
    assert served(store, range(PAGES)) == list(range(PAGES))
    store.close()


def test_nothing_is_written_to_a_deleted_file_once_it_is_missed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, range(3))
    assert store.flush(30)
    store.drop_host()
    for segment in segment_files(tmp_path):
        segment.unlink()
    assert served(store, range(3)) == []
    save(store, range(3))
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(3)) == [0, 1, 2]
    assert counters(store)["files_damaged"] == 1
    store.close()


def test_the_index_names_only_what_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for owner, name in ((SegmentWriter, "write"), (SegmentWriter, "sync"), (Index, "put_many")):
        original = getattr(owner, name)

        def noted(*args: object, _original: Callable[..., object] = original, _name: str = name) -> object:
            calls.append(_name)
            return _original(*args)

        monkeypatch.setattr(owner, name, noted)
    store = open_store(tmp_path)
    calls.clear()
    save(store, [0])
    assert store.flush(30)
    assert calls == ["write", "sync", "put_many"]
    store.close()


def test_a_failed_index_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, retry_s=NEVER_S)
    save(store, range(3))
    assert store.flush(30)
    with monkeypatch.context() as patch:
        error = lmdb.Error(f"mdb_txn_commit: {os.strerror(errno.ENOSPC)}")
        patch.setattr(Index, "put_many", Mock(side_effect=error))
        save(store, range(3, 6))
        assert store.flush(30)
        assert "the disk is full" in states(store)[0]
        store.drop_host()
        assert served(store, range(6)) == [0, 1, 2], "it still reads"
    retry(store)
    save(store, range(3, 6))
    store.close()
    store = open_store(tmp_path)
    assert served(store, range(6)) == list(range(6))
    store.close()


def test_a_killed_writer_leaves_whole_pages(tmp_path: Path) -> None:
    reported = 0
    chance = random.Random(1)
    for _ in range(ROUNDS * 3):
        child = start_child("write_forever", tmp_path, reported)
        assert child.stdout is not None
        assert child.stdout.readline()
        time.sleep(chance.random() * 0.3)
        child.kill()
        lines = child.communicate()[0].split()
        reported = int(lines[-1]) + 1 if lines else reported + 1
        store = open_store(tmp_path)
        assert served(store, range(reported + 50))[:reported] == list(range(reported))
        assert counters(store)["pages_damaged"] == 0
        store.close()
    used = sum(path.stat().st_size for path in segment_files(tmp_path))
    assert used <= (reported + 8 * ROUNDS * 3) * LAYOUT.record_bytes, "what a crash leaves behind is reused"


def test_two_processes_use_one_directory(tmp_path: Path) -> None:
    child = start_child("write_then_wait", tmp_path, 10)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    store = open_store(tmp_path)
    assert served(store, range(10)) == list(range(10))
    save(store, range(5, 20))
    assert store.flush(30)
    store.drop_host()
    assert child.communicate("go on\n", timeout=60)[0] == "10\n"
    assert served(store, range(20)) == list(range(20))
    assert counters(store)["pages_damaged"] == 0
    store.close()
    store = open_store(tmp_path)
    assert served(store, range(20)) == list(range(20))
    store.close()


def test_a_file_system_that_cannot_preallocate_is_written_all_the_same(tmp_path: Path) -> None:
    out = start_child("write_without_fallocate", tmp_path).communicate(timeout=60)[0]
    if out == "cannot filter system calls\n":
        pytest.skip(out)
    assert out == "ok 20\n"


@pytest.mark.parametrize(
    ("role", "reason"), [("write_on_full_disk", "file size limit"), ("write_unwritable", "permissions")]
)
def test_a_disk_that_refuses_is_said_to_and_comes_back(tmp_path: Path, role: str, reason: str) -> None:
    child = start_child(role, tmp_path)
    out = child.communicate(timeout=60)[0]
    if out.startswith("cannot drop"):
        pytest.skip(out)
    failed, memory, recovered = out.splitlines()
    assert failed.startswith("failed: ")
    assert reason in failed
    assert memory == "[0, 1, 2, 3] 4"
    assert recovered == "ok [10, 11, 12, 13]"
    assert child.returncode == 0


def test_a_full_disk_after_a_kill_is_no_dead_end(tmp_path: Path) -> None:
    """There is no room for a second copy of the index, though the directory is full of pages that could go."""
    within = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*within, "true"], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    mount = ["sh", "-c", f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}" && exec "$@"', "sh"]
    out = start_child("open_on_full_disk", tmp_path, within=[*within, *mount]).communicate(timeout=60)[0]
    assert out.splitlines()[-1:] == ["0 50 0"]


def test_a_lost_directory_is_said_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "volume"
    store = open_store(directory, retry_s=0.1)
    save(store, range(4))
    assert store.flush(30)
    remove_at_once(directory)
    for page in range(10, 60):
        save(store, [page])
        assert store.flush(30)
    assert until((directory / "index" / "data.mdb").exists)
    wait_until_ok(store)
    assert f"{directory} cannot be used: " in caplog.text
    save(store, range(60, 64))
    store.close()
    store = open_store(directory)
    assert states(store) == ["ok"]
    found = served(store, range(64))
    assert found[-4:] == list(range(60, 64))
    assert not set(found) & set(range(4))
    assert counters(store)["pages_damaged"] == counters(store)["index_rebuilt"] == 0
    store.close()


def test_a_directory_that_is_emptied_is_opened_anew_and_nobody_else_is_harmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who takes it for any other cache; another process may use it by then."""
    store = open_store(tmp_path / "cache", retry_s=0.1)
    save(store, range(20))
    assert store.flush(30)
    remove_at_once(tmp_path / "cache")
    assert until((tmp_path / "cache" / "index" / "data.mdb").exists)
    assert until(lambda: states(store) == ["ok"])
    save(store, range(20, 40))
    assert store.flush(30)
    store.drop_host()
    assert served(store, range(40)) == [*range(20, 40)]
    assert counters(store)["pages_damaged"] == counters(store)["files_damaged"] == 0
    sealed = tmp_path / "cache" / "index" / "closed.xxh3"
    with unobserved(monkeypatch, store):
        remove_at_once(tmp_path / "cache")
        with start_child("write_then_wait", tmp_path / "cache", 10) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "written\n"
            store.close()
            assert not sealed.exists(), "it is open"
            assert other.communicate("go on\n", timeout=60)[0] == "10\n"
    assert sealed.exists()


def test_an_index_that_is_broken_is_opened_anew_by_all_who_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by one that asks it nothing."""
    store, idle = (open_store(tmp_path, fingerprint=name * 16, retry_s=0.2) for name in (b"f", b"g"))
    for each in (store, idle):
        save(each, range(3))
        assert each.flush(30)
        each.drop_host()
    former = idle._volumes[0]._directory
    with monkeypatch.context() as patch:
        broken = Mock(side_effect=lmdb.CorruptedError("something broke"))
        patch.setattr(index, "encode", broken)
        save(store, [3])
        assert store.flush(30)
    assert until(lambda: states(store) + states(idle) == ["ok", "ok"] and idle._volumes[0]._directory is not former)
    for each in (store, idle):
        assert served(each, range(3)) == [0, 1, 2]
        save(each, range(3, 6))
        assert each.flush(30)
        assert states(each) == ["ok"]
        each.close()


def test_an_index_that_is_broken_is_checked_before_it_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, retry_s=0.1)
    save(store, range(3))
    assert store.flush(30)
    prepared = Mock(side_effect=index_file.copy_checked)
    monkeypatch.setattr(index_file, "copy_checked", prepared)
    with monkeypatch.context() as patch:
        patch.setattr(index, "encode", Mock(side_effect=lmdb.CorruptedError("something broke")))
        save(store, [3])
        assert store.flush(30)
    wait_until_ok(store)
    assert prepared.called
    store.close()


def test_a_full_disk_for_one_index_write_costs_nobody_else_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = (open_store(tmp_path, fingerprint=name * 16, retry_s=NEVER_S) for name in (b"f", b"g"))
    for each in (store, other):
        save(each, range(3))
        assert each.flush(30)
        each.drop_host()
    directories = [each._volumes[0]._directory for each in (store, other)]
    with monkeypatch.context() as patch:
        error = lmdb.DiskError(f"mdb_txn_commit: {os.strerror(errno.ENOSPC)}")
        patch.setattr(index, "encode", Mock(side_effect=error))
        save(store, [3])
        assert store.flush(30)
        assert "the disk is full" in states(store)[0]
    retry(store)
    assert [each._volumes[0]._directory for each in (store, other)] == directories, "nothing was opened anew"
    for each in (store, other):
        assert served(each, range(3)) == [0, 1, 2]
        each.close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EMFILE], ids=errno.errorcode.get)
def test_files_are_read_as_long_as_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """After the file system has been remounted, or this process has run out of files."""
    store, real = open_store(tmp_path, retry_s=0.1), os.open
    save(store, range(PAGES))
    assert store.flush(30)
    store.drop_host()
    retried = Mock(wraps=store._volumes[0]._revive)
    monkeypatch.setattr(store._volumes[0], "_revive", retried)

    def refuse(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        patch.setattr(os, "fdatasync", Mock(side_effect=OSError(code, os.strerror(code))))
        save(store, [50])
        assert store.flush(30)
        for _ in range(3):
            retried.reset_mock()
            assert until(lambda: retried.call_count >= 2)
            store.drop_host()
            assert served(store, range(PAGES)) == list(range(PAGES))
            assert states(store)[0].startswith("failed")
        save(store, [51])
        assert store.flush(30)
    assert until(lambda: counters(store)["pages_file"] == PAGES + 1)
    assert store.flush(30)
    store.drop_host()
    assert served(store, [50, 51]) == [51], "it was in memory all the time"
    store.close()


def test_records_that_a_failed_write_was_to_fill_are_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, retry_s=NEVER_S)
    save(store, range(3))
    assert store.flush(30)
    for _ in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
            save(store, [3, 4])
            assert store.flush(30)
            store.drop_host()
        assert states(store)[0].startswith("failed")
        retry(store)
    assert len(segment_files(tmp_path)) == 1, "they are eight"
    assert served(store, range(3)) == [0, 1, 2]
    store.close()


def test_a_directory_that_is_put_back_is_opened_anew_by_all_who_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [open_store(tmp_path / "volume", fingerprint=name * 16, retry_s=0.1) for name in (b"f", b"g")]
    idle = stores[1]._volumes[0]
    former = idle._directory
    with unobserved(monkeypatch, *stores):
        shutil.rmtree(tmp_path / "volume")
        (tmp_path / "volume").write_text("in its place")
    for page in range(20):  # some of them to a file that is gone
        save(stores[0], [page])
        assert stores[0].flush(30)
    assert states(stores[0])[0].startswith("failed")
    (tmp_path / "volume").unlink()
    assert until(lambda: states(stores[0]) + states(stores[1]) == ["ok", "ok"] and idle._directory is not former)
    for store in stores:
        save(store, range(100, 110))
        assert store.flush(30)
        store.drop_host()
        assert served(store, range(100, 110)) == list(range(100, 110))
        store.close()
    store = open_store(tmp_path / "volume")
    assert counters(store)["index_rebuilt"] == 0
    assert served(store, range(100, 110)) == list(range(100, 110))
    store.close()
