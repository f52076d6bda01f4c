"""Which page lies where in the segment files of a directory: an LMDB file, shared by all processes that use it.

Name of an entry: fingerprint (16 bytes), then the page's key (32 bytes). A fingerprint alone names its mark: all
pages its segments hold are in the index, and how large they are. The index is derived data; without a mark of this
version it is rebuilt from the segments.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt
import xxhash

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import make_private, remove, sync_directory
from sglang_hcache.storage.index_check import (
    ENTRY,
    ENTRY_VERSION,
    FINGERPRINT_BYTES,
    UNWRITABLE,
    Entry,
    decode,
    encode,
    last_transaction,
)

MAP_BYTES = 8 << 30  # address space, not memory: room for tens of millions of pages
MAX_READERS = 512  # read transactions at once, in all processes
CHECK_TIMEOUT_S = 20.0  # and a second more for every CHECK_RATE bytes
CHECK_RATE = 16 << 20
NAME_BYTES = FINGERPRINT_BYTES + 32
AT_ONCE = 1 << 14  # entries that are objects of Python at a time, where all are read

NAME = np.dtype([("fingerprint", ">u8", 2), ("key", ">u8"), ("rest", "V24")])
VALUE = np.dtype(
    [("segment", "S16"), ("slot", "<u4"), ("parent", ">u8"), ("hits", "<u4"), ("last_use", "<u4"), ("sum", "<u8")]
)

_SEGMENT, _SLOT, _SLOT_BYTES = slice(0, 16), slice(16, 20), 4  # of a value
_MARKED = "all pages listed"
_SIZES = struct.Struct("<II")  # of a mark, in the place of a parent: entry version, page_tokens
_MOST_HITS = (1 << 32) - 1
_SEAL = "closed.xxh3"
_SEALED = struct.Struct("<16sQ")  # digest of the file, number of its last transaction
_BLOCK_BYTES = 16 << 20
_BROKEN = (  # what LMDB says of the file itself, not of the disk or of one call
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)
_CHECK_PROGRAM = Path(__file__).with_name("index_check.py")


Rows = npt.NDArray[np.void]


class Used(NamedTuple):
    """The records that are named, by segment, as of a transaction."""

    slots: dict[str, bytearray]  # 4 bytes a record, as they stand in the entries
    transaction: int = -1

    @property
    def pages(self) -> int:
        return sum(map(len, self.slots.values())) // _SLOT_BYTES

    def count(self, segment: str) -> int:
        return len(self.slots.get(segment, b"")) // _SLOT_BYTES

    def of(self, segment: str) -> set[int]:
        return set(np.frombuffer(self.slots.get(segment, b""), "<u4").tolist())


class IndexStillOpen(lmdb.Error):
    """A condemned index that others in this process have not closed yet; it can be opened once they have."""


class Size(NamedTuple):
    """What a page of a fingerprint takes, and holds."""

    record_bytes: int
    page_tokens: int


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
    data, seal = path / "data.mdb", path / _SEAL
    if is_sealed(path) or not os.path.lexists(data):
        return
    fresh = Path(tempfile.mkdtemp(prefix="check-", dir=path))
    try:
        reason = copy_checked(data, fresh, damage)
        remove(seal)
        if reason is None:
            os.replace(fresh / "data.mdb", data)
        else:
            damage.file(data, reason)
            remove(data)
    finally:
        remove(fresh)
    sync_directory(path)


def seal_closed(path: Path) -> None:
    """Note what the index holds, for a caller who alone uses it and has closed it; it then opens without a check."""
    data = path / "data.mdb"
    content = _SEALED.pack(_digest(data), last_transaction(path))
    temporary = path / f"{_SEAL}.new"
    with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    os.replace(temporary, path / _SEAL)


def is_sealed(path: Path) -> bool:
    """Whether the index is, byte for byte, as it was when it was closed."""
    sealed = _read_seal(path)
    try:
        return sealed is not None and sealed[0] == _digest(path / "data.mdb")
    except OSError:
        return False


def _read_seal(path: Path) -> tuple[bytes, int] | None:
    """The digest of the index when it was closed, and the number of its last transaction."""
    try:
        content = (path / _SEAL).read_bytes()
    except OSError:
        return None
    return _SEALED.unpack(content) if len(content) == _SEALED.size else None


def _digest(data: Path) -> bytes:
    """Of a regular file's content; raises OSError for anything else."""
    digest = xxhash.xxh3_128()
    with open(data, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def copy_checked(data: Path, fresh: Path, damage: Damage) -> str | None:
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
    if child.returncode == -signal.SIGKILL:  # the kernel's doing, for want of memory; no damage is known to do that
        raise OSError(errno.ENOMEM, "the check of the index was killed")
    if child.returncode:
        return f"reading it failed (status {child.returncode}: {child.stderr.strip() or 'no message'})"
    dropped, last = map(int, child.stdout.split())
    sealed = _read_seal(data.parent)
    if sealed is not None and sealed[1] != last:
        return "it is not as of the last transaction"
    if dropped:
        damage.file(data, f"{dropped} of its entries were changed and are dropped")
        damage.count_pages(dropped)
    return None


class _Environment:
    """An index that is open in this process: once, however many use it, as LMDB's locks ask for."""

    _open: ClassVar[dict[Path, _Environment]] = {}
    _lock = threading.Lock()

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        self.users = 0
        self.condemned = False
        self.sound = True
        if writable and remove(path / _SEAL):
            sync_directory(path)
        self.env = lmdb.open(
            str(path), map_size=MAP_BYTES, max_readers=MAX_READERS, mode=0o600, readahead=False, readonly=not writable
        )
        if writable:
            self.env.reader_check()

    @classmethod
    def get(cls, path: Path, writable: bool) -> _Environment:
        path = path.resolve()
        with cls._lock:
            shared = cls._open.get(path)
            if shared is None:
                shared = cls._open[path] = cls(path, writable)
            elif shared.condemned:
                raise IndexStillOpen("it is still open for others, who have to open it anew, too")
            shared.users += 1
            return shared

    def put_back(self) -> None:
        with self._lock:
            self.users -= 1
            if not self.users:
                del self._open[self.path]
                self.env.close()


class Index:
    """The entries of one fingerprint. Thread-safe; several processes may have it open.

    Only to be opened after `prepare` by this or another process that had the directory to itself. One transaction a
    call. Every method raises lmdb.Error where the file, the disk or the map fails, also when it has been closed. A
    file that is found broken is condemned.
    """

    def __init__(self, path: Path, fingerprint: bytes, *, writable: bool = True) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._shared = _Environment.get(path, writable)
        self._env = self._shared.env
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
        """Delete those entries that still name the place given; how many."""
        return self.delete_names((self._fingerprint + key, entry.place) for key, entry in entries)

    def delete_names(self, names: Iterable[tuple[bytes, tuple[str, int]]]) -> int:
        """`delete_many` for entries of any fingerprint, by full name."""
        deleted = 0
        with self._in_use(), self._env.begin(write=True) as txn:
            for name, place in names:
                value = txn.get(name)
                if value is not None and (entry := decode(name, value)) is not None and entry.place == place:
                    deleted += txn.delete(name)
        return deleted

    def touch(self, hits: Mapping[bytes, int], now: int) -> None:
        """Add hits to those of the pages that have an entry, and set their last use, unix seconds.

        As it is called now and then, it also forgets readers that were killed: none of the file's space that is freed
        after such a one began would be used again.
        """
        with self._in_use():
            self._env.reader_check()
            with self._env.begin(write=True) as txn:
                for key, more in hits.items():
                    name = self._fingerprint + key
                    value = txn.get(name)
                    if value is not None and (entry := decode(name, value)) is not None:
                        total = min(entry.hits + more, _MOST_HITS)
                        txn.put(name, encode(name, entry._replace(hits=total, last_use=now)))

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

    def used(self, fingerprint: bytes, former: Used | None = None) -> Used:
        """The records that a fingerprint's entries name; `former` where nothing has changed since.

        Entries are not checked.
        """
        with self._in_use(), self._env.begin() as txn, txn.cursor() as cursor:
            transaction = txn.id()
            if former is not None and former.transaction == transaction:
                return former
            found = defaultdict[bytes, bytearray](bytearray)
            cursor.set_range(fingerprint)
            for name, value in cursor.iternext():
                if not name.startswith(fingerprint):
                    break
                if len(name) == NAME_BYTES and len(value) == ENTRY.size:
                    found[value[_SEGMENT]] += value[_SLOT]
        return Used({segment.decode("ascii", "replace"): slots for segment, slots in found.items()}, transaction)

    def raw(self) -> tuple[Rows, Rows]:
        """The pages of all fingerprints, by name, as arrays of NAME and of VALUE; only their size is checked."""
        names, values = [np.empty(0, NAME)], [np.empty(0, VALUE)]
        with self._in_use(), self._env.begin() as txn, txn.cursor() as cursor:
            pages = (item for item in cursor if len(item[0]) == NAME_BYTES and len(item[1]) == ENTRY.size)
            while some := list(itertools.islice(pages, AT_ONCE)):
                names.append(np.frombuffer(b"".join(name for name, _ in some), NAME))
                values.append(np.frombuffer(b"".join(value for _, value in some), VALUE))
        return np.concatenate(names, dtype=NAME), np.concatenate(values, dtype=VALUE)  # else it swaps bytes

    def is_marked(self, size: Size) -> bool:
        """Whether the index is known to name all pages of the fingerprint, and they have this size."""
        return self.get_many([b""]) == {b"": _mark_of(size)}

    def mark(self, size: Size) -> None:
        self.put_many([(b"", _mark_of(size))])

    def marks(self) -> dict[bytes, Size]:
        """The page size of each fingerprint whose pages are all named."""
        found = {}
        with self._in_use(), self._env.begin() as txn, txn.cursor() as cursor:
            more = cursor.first()
            while more:
                fingerprint = cursor.key()[:FINGERPRINT_BYTES]
                mark = txn.get(fingerprint)
                entry = None if mark is None else decode(fingerprint, mark)
                if entry is not None:
                    found[fingerprint] = Size(entry.slot, _SIZES.unpack(entry.parent)[1])
                more = cursor.set_range(fingerprint + b"\xff" * (NAME_BYTES - FINGERPRINT_BYTES + 1))
        return found

    def close(self) -> None:
        """Waits for the calls under way in other threads."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._calls)
        self._shared.put_back()

    @property
    def condemned(self) -> bool:
        """The file is not fit for use any more: all who have it open in this process must open it anew."""
        return self._shared.condemned

    @property
    def sound(self) -> bool:
        """False where the file has to be checked before it is used again."""
        return self._shared.sound

    def condemn(self) -> None:
        """The file is not what it was, or not sound."""
        self._shared.condemned, self._shared.sound = True, False

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise lmdb.Error("the index is closed")
            self._calls += 1
        try:
            yield
        except lmdb.PanicError:  # a write has failed half-way, for which LMDB keeps a copy
            self._shared.condemned = True
            raise
        except _BROKEN:
            self.condemn()
            raise
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()


def _mark_of(size: Size) -> Entry:
    return Entry(_MARKED, size.record_bytes, _SIZES.pack(ENTRY_VERSION, size.page_tokens))
