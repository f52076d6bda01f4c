"""Which page lies where in the segment files of a directory: an LMDB file, shared by all processes that use it.

Name of an entry: fingerprint (16 bytes), then the page's key (32 bytes). A fingerprint alone names its mark: all
pages its segments hold are in the index. The index is derived data; without a mark it is rebuilt from the segments.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import make_private, remove, sync_directory
from sglang_hcache.storage.index_check import UNWRITABLE, Entry, decode, encode

MAP_BYTES = 1 << 30  # address space, not memory: room for about ten million pages
MAX_READERS = 512  # read transactions at once, in all processes
CHECK_TIMEOUT_S = 20.0  # and a second more for every CHECK_RATE bytes
CHECK_RATE = 16 << 20

_MARK = Entry("all pages listed", 0)
_CHECK_PROGRAM = Path(__file__).with_name("index_check.py")


def prepare(path: Path, damage: Damage) -> None:
    """Make the index in a directory safe to open, for a caller who alone uses it.

    Keeps every sound entry of an index that can be read, in a fresh file; removes one that cannot. Starts a process
    and waits for it. Raises OSError where the disk does not let it.
    """
    if os.path.lexists(path) and not path.is_dir():
        damage.file(path, "it is not a directory")
        remove(path)
    make_private(path)
    remove(path / "lock.mdb")
    for leftover in path.glob("check-*"):
        remove(leftover)
    data = path / "data.mdb"
    if not os.path.lexists(data):
        return
    fresh = Path(tempfile.mkdtemp(prefix="check-", dir=path))
    try:
        reason = _check(data, fresh, damage)
        if reason is None:
            os.replace(fresh / "data.mdb", data)
        else:
            damage.file(data, reason)
            remove(data)
    finally:
        remove(fresh)
    sync_directory(path)


def _check(data: Path, fresh: Path, damage: Damage) -> str | None:
    """Copy what is sound of the index to `fresh`; why there is nothing to keep, or None."""
    if not data.is_file():
        return "it is not a regular file"
    timeout_s = CHECK_TIMEOUT_S + data.stat().st_size / CHECK_RATE
    command = [sys.executable, "-P", str(_CHECK_PROGRAM), str(data.parent), str(fresh)]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {timeout_s:.0f} s"
    if child.returncode == UNWRITABLE:
        raise OSError(errno.ENOSPC, f"no fresh copy of the index can be written ({child.stderr.strip()})")
    if child.returncode:
        return f"reading it failed (status {child.returncode}: {child.stderr.strip() or 'no message'})"
    dropped = int(child.stdout)
    if dropped:
        damage.file(data, f"{dropped} of its entries were changed and are dropped")
        damage.count_pages(dropped)
    return None


class Index:
    """The entries of one fingerprint. Thread-safe; several processes may have it open.

    Only to be opened after `prepare` by this or another process that had the directory to itself. One transaction a
    call. Every method raises lmdb.Error where the file, the disk or the map fails, also when it has been closed.
    """

    def __init__(self, path: Path, fingerprint: bytes) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._env = lmdb.open(str(path), map_size=MAP_BYTES, max_readers=MAX_READERS, mode=0o600, readahead=False)
        self._env.reader_check()
        self._idle = threading.Condition()
        self._calls = 0
        self._closed = False

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries of those keys that have a sound one."""
        found = {}
        with self._in_use(), self._env.begin(buffers=False) as txn:
            for key in keys:
                name = self._fingerprint + key
                value = txn.get(name)
                if value is not None and (entry := decode(name, value)) is not None:
                    found[key] = entry
        return found

    def put_many(self, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Add or replace entries: all or none, and durable on return."""
        with self._in_use(), self._env.begin(write=True) as txn:
            for key, entry in entries:
                name = self._fingerprint + key
                txn.put(name, encode(name, entry))

    def delete_many(self, entries: Iterable[tuple[bytes, Entry]]) -> int:
        """Delete those entries that still are as given; how many."""
        deleted = 0
        with self._in_use(), self._env.begin(write=True) as txn:
            for key, entry in entries:
                name = self._fingerprint + key
                if txn.get(name) == encode(name, entry):
                    deleted += txn.delete(name)
        return deleted

    def entries(self) -> list[tuple[bytes, Entry]]:
        """All sound entries of the fingerprint, by key."""
        found = []
        with self._in_use(), self._env.begin() as txn, txn.cursor() as cursor:
            at = len(self._fingerprint)
            more = cursor.set_range(self._fingerprint)
            while more and (name := cursor.key()).startswith(self._fingerprint):
                entry = decode(name, cursor.value())
                if entry is not None and len(name) > at:
                    found.append((name[at:], entry))
                more = cursor.next()
        return found

    def is_marked(self) -> bool:
        """Whether the index is known to name all pages of the fingerprint."""
        return self.get_many([b""]) == {b"": _MARK}

    def mark(self) -> None:
        self.put_many([(b"", _MARK)])

    def close(self) -> None:
        """Waits for the calls under way in other threads."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._calls)
        self._env.close()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise lmdb.Error("the index is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()
