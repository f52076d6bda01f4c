from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_hcache.storage import directory as directory_module
from sglang_hcache.storage import evictor, locks, segment
from sglang_hcache.storage import quota as quotas
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.directory import Contents, Directory
from sglang_hcache.storage.files import allocate
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.layout import ROOT, seal
from sglang_hcache.storage.paths import bytes_on_disk
from sglang_hcache.storage.quota import Quota
from sglang_hcache.storage.store import LocalStore
from tests.prefetch.clients import until
from tests.storage.child import start_child
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    OTHER_FINGERPRINT,
    counters,
    fill,
    holds,
    key_of,
    keys_of,
    open_store,
    save,
    segment_files,
    served,
    states,
)

QUOTA = 100 * LAYOUT.record_bytes


def save_prefix(store: LocalStore, pages: range) -> None:
    """Pages of one prefix, in order."""
    for page in pages:
        slot = store.reserve()
        assert slot is not None
        fill(store.memory[slot], page)
        store.commit(key_of(page), slot, ROOT if page == pages[0] else key_of(page - 1))
    assert store.flush(30)


def on_file(store: LocalStore, pages: range) -> list[int]:
    store.drop_host()
    return [page for page, there in zip(pages, store.contains(keys_of(pages)), strict=True) if there]


def test_it_is_told_how_long_what_is_evicted_was_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, began, last_use = open_store(tmp_path, quota_bytes=QUOTA), time.time(), 0.0
    monkeypatch.setattr(evictor, "time", SimpleNamespace(time=lambda: time.time() + 5000))
    for start in range(0, 600, 20):
        assert ("evicted_idle_s" in store.stats()) == (counters(store)["pages_evicted"] > 0)
        save_prefix(store, range(start, start + 20))
        last_use = time.time()
    assert counters(store)["pages_evicted"]
    assert 5000 <= float(str(store.stats()["evicted_idle_s"])) <= 5000 + 1 + last_use - began, "used in whole seconds"
    store.close()


def test_the_quota_is_kept_and_a_prefix_loses_its_end_first(tmp_path: Path) -> None:
    store = open_store(tmp_path, quota_bytes=QUOTA)
    for start in range(0, 600, 20):
        save_prefix(store, range(start, start + 20))
        assert bytes_on_disk(tmp_path) <= QUOTA
        kept = on_file(store, range(start + 20))
        for page in kept:
            assert page % 20 == 0 or page - 1 in kept, "a page without the one before it is worth nothing"
        assert start + 19 in kept, "the newest pages are worth most"
        assert len(kept) > min(start, 60)
    assert states(store) == ["ok"]
    assert served(store, range(600)) == kept
    assert counters(store)["pages_evicted"] == 600 - len(kept) == 600 - counters(store)["pages_file"]
    assert counters(store)["pages_damaged"] == 0
    store.close()
    store = open_store(tmp_path, quota_bytes=QUOTA)
    again = served(store, range(600))
    assert all(page % 20 == 0 or page - 1 in again for page in again)
    assert set(again) <= set(kept)
    assert len(kept) - len(again) == counters(store)["pages_evicted"] <= 2, "the index grew by what was noted of use"
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_a_smaller_quota_is_kept_from_the_opening_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save_prefix(store, range(60))
    store.close()
    assert bytes_on_disk(tmp_path) > QUOTA / 2
    store = open_store(tmp_path, quota_bytes=QUOTA // 2)
    assert bytes_on_disk(tmp_path) <= QUOTA // 2
    kept = served(store, range(60))
    assert kept == list(range(len(kept)))
    assert len(kept) > 30
    save_prefix(store, range(100, 130))
    assert bytes_on_disk(tmp_path) <= QUOTA // 2
    assert states(store) == ["ok"]
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_a_much_smaller_quota_stays_full(tmp_path: Path) -> None:
    """What was evicted when it was lowered has left holes in all segments; so does what is evicted after that."""
    segment = 8 * LAYOUT.record_bytes
    store = open_store(tmp_path, slots=400, quota_bytes=50 * segment)
    save(store, range(300))
    assert store.flush(30)
    store._volumes[0].touch(dict.fromkeys(keys_of(random.Random(0).sample(range(300), 150)), 1))
    store.close()
    store = open_store(tmp_path, quota_bytes=30 * segment)
    for page in range(1000, 1100):
        save_prefix(store, range(page, page + 1))
        assert counters(store)["pages_file"] > 0.8 * 30 * 8
        assert bytes_on_disk(tmp_path) <= 30 * segment
    assert states(store) == ["ok"]
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_pages_of_a_model_that_is_not_used_any_more_make_room(tmp_path: Path) -> None:
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT, quota_bytes=QUOTA)
    save_prefix(other, range(35))
    save_prefix(other, range(35, 70))
    other.close()
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(70)), 0), now=1_000_000_000)
    index.close()
    store = open_store(tmp_path, quota_bytes=QUOTA)
    for first in range(1000, 1060, 10):
        save_prefix(store, range(first, first + 10))
        assert bytes_on_disk(tmp_path) <= QUOTA
    assert served(store, range(1000, 1060)) == list(range(1000, 1060))
    store.close()
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT, quota_bytes=QUOTA)
    kept = served(other, range(70))
    assert 0 < len(kept) < 70
    assert counters(other)["pages_damaged"] == 0
    other.close()


def test_a_model_that_is_idle_holds_no_files_that_another_one_could_evict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT, quota_bytes=QUOTA, retry_s=0.05)
    directory, chance = idle._volumes[0]._directory, random.Random(0)
    assert directory is not None
    for page in range(200):  # pages go here and there, so that most files get room
        save_prefix(idle, range(page, page + 1))
        directory.index.touch({key_of(page): chance.randrange(100)}, now=1_000_000_000)
    monkeypatch.setattr(directory_module, "IDLE_S", 0.0)
    assert until(lambda: not directory._segments.held())
    store = open_store(tmp_path, quota_bytes=QUOTA)
    for first in range(1000, 1200, 10):
        save_prefix(store, range(first, first + 10))
    assert counters(store)["pages_file"] > 60, "and not the 38 that the other one's files would leave it"
    save_prefix(idle, range(300, 310))
    assert on_file(idle, range(300, 310)) == list(range(300, 310))
    assert bytes_on_disk(tmp_path) <= QUOTA
    assert states(idle) == states(store) == ["ok"]
    idle.close()
    store.close()


def test_pages_that_others_evict_are_not_counted_any_more(tmp_path: Path) -> None:
    idle = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT, quota_bytes=QUOTA)
    save_prefix(idle, range(40))
    index = Index(tmp_path / "index", OTHER_FINGERPRINT)
    index.touch(dict.fromkeys(keys_of(range(40)), 0), now=1_000_000_000)
    index.close()
    store = open_store(tmp_path, quota_bytes=QUOTA)
    for first in range(1000, 1300, 10):
        save_prefix(store, range(first, first + 10))
    assert counters(idle)["pages_file"] == len(on_file(idle, range(40))) < 40
    assert counters(store)["pages_file"] == len(on_file(store, range(1000, 1300)))
    idle.close()
    store.close()


def test_others_that_evict_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many pages that takes longer than any other lock is kept."""
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.1)
    store = open_store(tmp_path, quota_bytes=QUOTA)
    lock = os.open(tmp_path / "segments", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    slot = store.reserve()
    assert slot is not None
    fill(store.memory[slot], 0)
    store.commit(key_of(0), slot, ROOT)
    assert not store.flush(1.0)
    assert states(store) == ["ok"]
    os.close(lock)
    assert store.flush(30)
    assert on_file(store, range(1)) == [0]
    store.close()


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    child = start_child("write_then_wait", tmp_path, 7)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    store = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT, quota_bytes=QUOTA)
    for first in range(1000, 1300, 50):
        save_prefix(store, range(first, first + 50))
    assert bytes_on_disk(tmp_path) <= QUOTA
    assert states(store) == ["ok"]
    assert child.communicate("go on\n", timeout=60)[0] == "7\n"
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_files_that_no_index_lists_go_first(tmp_path: Path) -> None:
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT)
    save_prefix(other, range(50))
    other.close()
    shutil.rmtree(tmp_path / "index")
    store = open_store(tmp_path, quota_bytes=QUOTA)
    save_prefix(store, range(1000, 1035))
    save_prefix(store, range(1035, 1070))
    assert on_file(store, range(1000, 1070)) == list(range(1000, 1070))
    assert bytes_on_disk(tmp_path) <= QUOTA
    assert not [path for path in segment_files(tmp_path) if path.parent.name == OTHER_FINGERPRINT.hex()]
    store.close()


def test_pages_of_others_stay_where_the_index_was_damaged(tmp_path: Path) -> None:
    """Nobody knows any more whether it lists all of theirs; those that it lists are evicted by their value."""
    others, ours = range(40), range(1000, 1080)
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT)
    save_prefix(other, others)
    other.close()
    name, index = OTHER_FINGERPRINT + key_of(39), tmp_path / "index" / "data.mdb"
    index.write_bytes(re.sub(re.escape(name) + b".", name + b"?", index.read_bytes(), flags=re.DOTALL))
    store = open_store(tmp_path, quota_bytes=QUOTA)
    for start in range(ours[0], ours[-1], 20):
        save_prefix(store, range(start, start + 20))
    left = on_file(store, ours)
    evicted = counters(store)["pages_evicted"]
    assert bytes_on_disk(tmp_path) <= QUOTA
    store.close()
    other = open_store(tmp_path, fingerprint=OTHER_FINGERPRINT)
    left += on_file(other, others)
    assert len(left) + evicted == len(others) - 1 + len(ours), "but for the one whose entry was changed"
    assert served(other, others) == [page for page in left if page in others] != []
    assert counters(other)["pages_damaged"] == 0
    other.close()


def test_a_striped_prefix_is_one_prefix(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    store = open_store(*directories, quota_bytes=QUOTA // 2)
    for start in range(0, 300, 20):
        save_prefix(store, range(start, start + 20))
        kept = on_file(store, range(start + 20))
        assert counters(store)["pages_file"] == len(kept)
        assert start + 19 in kept
        for page in kept:
            assert page % 20 == 0 or page - 1 in kept
    assert all(bytes_on_disk(directory) <= QUOTA // 2 for directory in directories)
    assert served(store, range(300)) == kept
    assert counters(store)["pages_damaged"] == 0
    store.close()


@pytest.mark.parametrize("pages", [20, 300])
def test_a_page_that_was_evicted_since_it_was_located_is_missed_without_damage(tmp_path: Path, pages: int) -> None:
    damage = Damage()
    quota = Quota(tmp_path, 20 * LAYOUT.record_bytes, LAYOUT.record_bytes)
    directory = Directory(tmp_path, Contents(LAYOUT, FINGERPRINT, 1 << 30), damage=damage, quota=quota)

    def write(page: int) -> None:
        record = np.zeros(LAYOUT.record_bytes, np.uint8)
        fill(record, page)
        seal(record, LAYOUT, FINGERPRINT, key_of(page), ROOT)
        directory.write([(key_of(page), record)])

    for page in range(10):
        write(page)
    located = directory.locate(keys_of(range(10)))
    out = np.zeros(LAYOUT.record_bytes, np.uint8)
    assert directory.read(key_of(0), located[key_of(0)], out)
    for page in range(10, 10 + pages):
        write(page)
    still = directory.locate(keys_of(range(10)))
    for page in range(10):
        found = directory.read(key_of(page), located[key_of(page)], out)
        assert found == (still.get(key_of(page), located[key_of(page)]).place == located[key_of(page)].place) or (
            key_of(page) not in still and not found
        )
        assert not found or holds(out, page)
    assert len(still) < 10
    assert (damage.pages, damage.files) == (0, 0)
    directory.close()


class Disk:
    """A file system of `size` bytes, as far as the store can tell: one may run into its end, and ask what is free."""

    def __init__(self, size: int, *directories: Path) -> None:
        self.size = size
        self.directories = directories
        self.others = 0  # bytes that are not ours
        self.ran_full = 0

    @property
    def free(self) -> int:
        return max(0, self.size - self.others - sum(map(bytes_on_disk, self.directories)))

    def allocate(self, fd: int, length: int) -> bool:
        if length - os.fstat(fd).st_blocks * 512 > self.free:
            self.ran_full += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return allocate(fd, length)

    def statvfs(self, _: Path) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=self.free // 4096, f_frsize=4096, f_blocks=self.size // 4096)

    def put_in(self, monkeypatch: pytest.MonkeyPatch, keep_bytes: int = 0) -> None:
        monkeypatch.setattr(quotas, "KEEP_BYTES", keep_bytes)
        monkeypatch.setattr(segment, "allocate", self.allocate)
        monkeypatch.setattr(os, "statvfs", self.statvfs)


def limits(store: LocalStore) -> list[int]:
    volumes = store.stats()["volumes"]
    assert isinstance(volumes, list)
    return [int(volume["quota_bytes"]) for volume in volumes]


def test_without_a_quota_a_tenth_of_the_disk_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(QUOTA, tmp_path)
    disk.put_in(monkeypatch)
    store = open_store(tmp_path)
    for start in range(0, 300, 20):
        save_prefix(store, range(start, start + 20))
        assert disk.free >= QUOTA // 10
    assert disk.ran_full == 0
    assert states(store) == ["ok"]
    assert counters(store)["pages_file"] > 60
    assert set(range(280, 300)) <= set(on_file(store, range(300)))
    limit = limits(store)[0]
    store.close()
    store = open_store(tmp_path)
    assert abs(limits(store)[0] - limit) < 2 * 4096, "what we take does not count as taken by others"
    store.close()


@pytest.mark.parametrize(
    ("size", "others", "limit"),
    [
        (1000, 0, 900),  # a tenth of what is free
        (1000, 700, 250),  # a twentieth of the disk
        (1000, 900, 50),
        (1000, 960, 10),  # less than that is free: a quarter
        (100, 50, 40),  # 10 GB
        (100, 88, 3),
        (15, 0, 5),
        (8, 0, 2),
    ],
)
@pytest.mark.parametrize("sharers", [1, 2])
def test_others_can_live_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, others: int, limit: int, sharers: int
) -> None:
    """Sizes in GB. A root disk that fills up takes the machine down."""
    disk = Disk(size * 10**9)
    disk.others = others * 10**9
    disk.put_in(monkeypatch, keep_bytes=10 * 10**9)
    quota = Quota(tmp_path, None, 4096, sharers)
    quota.find_limit(full=False)
    assert quota.limit == pytest.approx(limit * 10**9 / sharers, rel=0.01)


def test_directories_on_one_disk_share_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    disk = Disk(QUOTA, *directories)
    disk.put_in(monkeypatch)
    store = open_store(*directories)
    for start in range(0, 300, 20):
        save_prefix(store, range(start, start + 20))
    assert disk.ran_full == 0
    assert disk.free >= QUOTA // 10
    assert sum(limits(store)) <= QUOTA
    store.close()


@pytest.mark.parametrize("quota", [None, 10 * QUOTA], ids=["default", "larger than the disk"])
def test_on_a_full_disk_the_least_valuable_pages_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quota: int | None
) -> None:
    disk = Disk(QUOTA, tmp_path)
    disk.put_in(monkeypatch)
    store = open_store(tmp_path, quota_bytes=quota, retry_s=600.0)
    save_prefix(store, range(30))
    disk.others = disk.free
    save_prefix(store, range(100, 130))
    assert "cannot be used: the disk is full" in caplog.text
    assert served(store, range(100, 130)) == list(range(100, 130)), "they stay in memory"
    store._volumes[0]._retry_at = 0.0
    assert until(lambda: states(store) == ["ok"]), "it waits for somebody to make room"
    for start in range(200, 260, 5):
        save_prefix(store, range(start, start + 5))
    assert states(store) == ["ok"]
    assert disk.ran_full
    assert set(range(255, 260)) <= set(on_file(store, range(300)))
    assert counters(store)["pages_damaged"] == 0
    store.close()


def test_a_quota_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="quota"):
        open_store(tmp_path, quota_bytes=LAYOUT.record_bytes)
    assert threading.active_count() <= threads, "one that is left would keep its memory"
