"""Which page lies where in the segment files of a directory: an LMDB file, shared by all processes that use it.

Name of an entry: fingerprint (16 bytes), then the page's key (32 bytes). A fingerprint alone names its mark: all
pages its segments hold are in the index, and how large they are. The index is derived data; without a mark of this
version it is rebuilt from the segments.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

import lmdb
import numpy as np
import numpy.typing as npt

from sglang_hcache.storage.index_check import ENTRY, ENTRY_VERSION, FINGERPRINT_BYTES, Entry, decode, encode
from sglang_hcache.storage.index_file import unseal
from sglang_hcache.storage.layout import KEY_BYTES

MAP_BYTES = 8 << 30  # address space, not memory: room for tens of millions of pages
MAX_READERS = 512  # read transactions at once, in all processes
NAME_BYTES = FINGERPRINT_BYTES + KEY_BYTES
AT_ONCE = 1 << 14  # entries that are objects of Python at a time, where all are read

NAME = np.dtype([("fingerprint", ">u8", 2), ("key", ">u8"), ("rest", "V24")])
VALUE = np.dtype(
    [("segment", "S16"), ("slot", "<u4"), ("parent", ">u8"), ("hits", "<u4"), ("last_use", "<u4"), ("sum", "<u8")]
)

_SEGMENT, _SLOT, _SLOT_BYTES = slice(0, 16), slice(16, 20), 4  # of a value
_MARKED = "all pages listed"
_SIZES = struct.Struct("<II")  # of a mark, in the place of a parent: entry version, page_tokens
_MOST_HITS = (1 << 32) - 1
_BROKEN = (  # what LMDB says of the file itself, not of the disk or of one call
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)

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


class _Environment:
    """An index that is open in this process: once, however many use it, as LMDB's locks ask for."""

    _open: ClassVar[dict[Path, _Environment]] = {}
    _lock = threading.Lock()

    def __init__(self, path: Path, writable: bool) -> None:
        self.path = path
        self.users = 0
        self.condemned = False
        self.sound = True
        self.pages = Counter[bytes]()  # by fingerprint
        self.counting = threading.Lock()  # `pages` is as of the last transaction that was committed here
        if writable:
            unseal(path)
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
                if (entry := decode(name, txn.get(name))) is not None:
                    found[key] = entry
        return found

    @property
    def pages(self) -> int:
        """Of the fingerprint, as far as this process knows: what others write and delete is seen by `used`."""
        return self._shared.pages[self._fingerprint]

    def put_many(self, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Add or replace entries: all or none, and durable on return."""
        new = 0
        with self._in_use(), self._shared.counting:
            with self._env.begin(write=True) as txn:
                for key, entry in entries:
                    name = self._fingerprint + key
                    new += len(name) == NAME_BYTES and txn.get(name) is None
                    txn.put(name, encode(name, entry))
            self._shared.pages[self._fingerprint] += new

    def delete_many(self, entries: Iterable[tuple[bytes, Entry]]) -> int:
        """Delete those entries that still name the place given; how many."""
        return self.delete_names((self._fingerprint + key, entry.place) for key, entry in entries)

    def delete_names(self, names: Iterable[tuple[bytes, tuple[str, int]]]) -> int:
        """`delete_many` for entries of any fingerprint, by full name."""
        deleted = Counter[bytes]()
        with self._in_use(), self._shared.counting:
            with self._env.begin(write=True) as txn:
                for name, place in names:
                    entry = decode(name, txn.get(name))
                    if entry is not None and entry.place == place:
                        deleted[name[:FINGERPRINT_BYTES]] += txn.delete(name)
            self._shared.pages.subtract(deleted)
        return deleted.total()

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
                    if (entry := decode(name, txn.get(name))) is not None:
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
        with self._in_use(), ExitStack() as opened:
            with self._shared.counting:
                txn = opened.enter_context(self._env.begin())
                believed = self._shared.pages[fingerprint]
            cursor = opened.enter_context(txn.cursor())
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
        used = Used({segment.decode("ascii", "replace"): slots for segment, slots in found.items()}, transaction)
        with self._shared.counting:
            self._shared.pages[fingerprint] += used.pages - believed
        return used

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
                if (entry := decode(fingerprint, txn.get(fingerprint))) is not None:
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
