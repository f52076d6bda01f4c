"""The store of pages where the prefetcher is on another host: an arena of our own, records over the network.

A page is read from, and written to, the prefetcher as the local store reads and writes its files; so leases, waiting
for room, joining of reads, verification and eviction are those of `LocalStore`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.client import NOTHING_YET, StoreClient
from sglang_hcache.prefetch.connection import Connection, Unavailable
from sglang_hcache.storage.contract import Progress, Stats
from sglang_hcache.storage.eviction import Keep
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import ChunkDamaged, Record, read_header, verify
from sglang_hcache.storage.store import READ_THREADS, LocalStore

LOCATE_S = 30.0  # on a thread of ours; a session with a prefetcher that does not answer ends sooner
READ_S = 30.0  # the longest a page is waited for
LATE_S = 1.0  # the same for a page that nobody needs any more, but at least
LATE = 4  # times as long as recent pages took: it may be on its way
AGAIN_S = 30.0  # a page that has not come is not asked for again for so long: the drive that it lies on may hang
LOOK_S = 0.1  # between two looks whether somebody still needs it
POLL_S = 0.5
CLOSE_FLUSH_S = 5.0
SOMEWHERE = Entry("", 0)  # the prefetcher knows where

logger = logging.getLogger(__name__)

# Figures on files: only the prefetcher knows them.
FIGURES_OF_PREFETCHER = (
    "volumes",
    "pages_file",
    "pages_damaged",
    "pages_unreadable",
    "files_damaged",
    "index_rebuilt",
    "pages_evicted",
    "evicted_idle_s",
)
COUNTED_BY_BOTH = ("pages_write_failed", "pages_damaged_on_the_way")


@dataclass(eq=False)
class _Read:
    """A page that a reading thread waits for."""

    frame: memoryview | None = None
    ended: bool = False


class RemoteFiles:
    """The prefetcher as a store's files: `locate`, `read` and `write` are questions to it. Any thread may ask."""

    def __init__(self, connection: Connection, gone: Callable[[], None]) -> None:
        self._connection = connection
        self._fingerprint = connection.hello.fingerprint
        self._layout = connection.hello.layout
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._reads: dict[int, _Read] = {}  # by number of the message that asks for it
        self._late: dict[bytes, float] = {}  # key of a page that has not come → when to ask for it again
        self._takes_s = 0.0  # a page, at most, of late
        self.is_awaited: Callable[[bytes], bool] = lambda key: True  # whether somebody needs what is being read
        self._gone = gone
        self.damaged = 0
        connection.start(self._receive, self._ended)
        connection.send(m.Credit(pages=READ_THREADS))

    @property
    def healthy(self) -> bool:
        return self._connection.alive

    def locate(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        now, late = time.monotonic(), self._late
        wanted = [key for key in keys if late.get(key, now) <= now][: m.MAX_KEYS]
        if not wanted:
            return {}
        try:
            present = self._connection.ask(m.Lookup(keys=wanted), m.Found, LOCATE_S).present
        except Unavailable:
            return {}
        return {key: SOMEWHERE for key, there in zip(wanted, present, strict=False) if there}

    def read(self, key: bytes, entry: Entry, out: Record) -> bool:
        """Fetch the page into `out`; False where it cannot be had, or is not what was stored."""
        asked_at = time.monotonic()
        with self._lock:
            number = self._connection.send(m.Prefetch(keys=[key], priority=0, page_priority=0))
            read = self._reads[number] = _Read()
        while not self._over(read):
            waited_s = time.monotonic() - asked_at
            if waited_s > READ_S or (waited_s > max(LATE_S, LATE * self._takes_s) and not self.is_awaited(key)):
                break
        with self._lock:
            self._reads.pop(number, None)
            now = time.monotonic()
            if read.frame is not None:
                self._takes_s = max(now - asked_at, 0.9 * self._takes_s)
            elif now > asked_at + LATE_S:
                self._late = {key: until for key, until in self._late.items() if until > now} | {key: now + AGAIN_S}
        self._connection.send(m.Release(prefetch=number))
        if read.frame is None:
            return False
        data = np.frombuffer(read.frame, np.uint8)
        fits = data.shape == out.shape
        if fits:
            out[:] = data
        self._connection.send(m.Credit(pages=1))
        try:
            if not fits:
                raise ChunkDamaged(f"it has {len(data)} bytes")
            verify(out, self._layout, self._fingerprint, key)
        except ChunkDamaged:
            self.damaged += 1
            return False
        return True

    def _over(self, read: _Read) -> bool:
        """Whether it has come to its end, at once or in a while."""
        with self._lock:
            return self._changed.wait_for(lambda: read.ended or not self._connection.alive, LOOK_S)

    def write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep = list) -> bool:
        """Send sealed records; once this returns their memory can be used again, as the prefetcher verifies them."""
        trackers = []
        for key, record in pages:
            frame = zmq.Frame(record.data, track=True, copy=False)
            trackers.append(frame.tracker)
            parent = read_header(record, self._layout).parent
            self._connection.send(m.Commit(pages=[m.Page(key, parent, 0)]), [frame])
            del frame  # ZeroMQ is done with the memory when nobody refers to it
        for tracker in trackers:
            while self._connection.alive and not tracker.done:
                with contextlib.suppress(zmq.NotDone):
                    tracker.wait(POLL_S)
        return all(tracker.done for tracker in trackers)

    def touch(self, hits: Mapping[bytes, int]) -> None:
        """The prefetcher sees by itself what is asked for."""

    def retry(self) -> bool:
        """It is gone for good."""
        return False

    def close(self) -> None:
        self._connection.close()

    def _receive(self, message: m.FromServer, payload: Sequence[memoryview]) -> None:
        if not isinstance(message, m.Ready):
            return
        with self._lock:
            read = self._reads.get(message.answers)
            if read is not None:
                read.frame = payload[0] if payload else None
                read.ended = True
                self._changed.notify_all()
        if read is None and payload:
            self._connection.send(m.Credit(pages=len(payload)))

    def _ended(self) -> None:
        with self._lock:
            self._changed.notify_all()
        self._gone()


class RemoteClient(StoreClient):
    """A ChunkStore in this process, with a prefetcher on another host behind it, for as long as that answers.

    The `host_bytes` of the session's hello bound the arena of this process. Raises ValueError for bad values.
    """

    def __init__(self, connection: Connection, *, news: int) -> None:
        super().__init__(connection, news)
        hello, layout = connection.hello, self.layout
        self._tickets = itertools.count(1)
        self._pending: dict[str, int] = {}  # owner → ticket of a prefetch that has not been looked up yet
        self._closed = False
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        slots = max(1, hello.host_bytes // layout.record_bytes)
        self._region = mmap.mmap(-1, slots * layout.record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._files = RemoteFiles(connection, self._notify)
        self._store = LocalStore(
            layout,
            hello.fingerprint,
            hello.host_bytes,
            [],
            files=self._files,
            region=self._region,
            on_progress=self._progressed,
        )
        self._files.is_awaited = self._store.is_awaited
        self._worker = threading.Thread(target=self._work, name="hcache-remote", daemon=True)
        self._worker.start()

    @property
    def memory(self) -> Record:
        return self._store.memory

    def reserve(self) -> int | None:
        return self._store.reserve() if self.alive else None

    def abandon(self, slot: int) -> None:
        self._store.abandon(slot)

    def commit(self, key: bytes, slot: int, parent: bytes) -> None:
        self._store.commit(key, slot, parent)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return self._store.contains(keys)

    def prefetch(
        self,
        owner: str,
        keys: Sequence[bytes],
        *,
        priority: int = 0,
        page_priority: int = 0,
    ) -> None:
        ticket, wanted = next(self._tickets), list(keys)
        with self._lock:
            self._pending[owner] = ticket

        def look_up() -> None:
            if self._pending.get(owner) != ticket:
                return
            try:
                self._store.prefetch(owner, wanted, priority=priority, page_priority=page_priority)
            except Exception:  # a bug of ours: the request goes on without these pages, and others are looked up
                logger.exception("hcache: pages could not be looked up at the prefetcher.")
                self._store.release(owner)  # it may still have what it asked for before
            with self._lock:
                current = self._pending.get(owner) == ticket
                if current:
                    del self._pending[owner]
                    self._settled.notify_all()
            if not current:
                self._store.release(owner)
            self._progressed(owner)

        self._jobs.put(look_up)

    def progress(self, owner: str) -> Progress:
        with self._lock:
            return NOTHING_YET if owner in self._pending else self._store.progress(owner)

    def wait(self, owner: str, timeout_s: float, *, until_known: bool = False) -> Progress:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if not self._settled.wait_for(lambda: owner not in self._pending, timeout_s):
                return NOTHING_YET
        return self._store.wait(owner, max(0.0, deadline - time.monotonic()), until_known=until_known)

    def took_s(self, owner: str) -> float:
        return self._store.took_s(owner)

    def cut(self, owner: str) -> None:
        with self._lock:
            if owner in self._pending:
                self._jobs.put(lambda: self._store.cut(owner))
                return
        self._store.cut(owner)

    def release(self, owner: str) -> None:
        with self._lock:
            self._pending.pop(owner, None)
            self._settled.notify_all()
        self._store.release(owner)

    def flush(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        return self._store.flush(timeout_s) and super().flush(max(0.0, deadline - time.monotonic()))

    def drop_host(self) -> None:
        """Of this process alone: the prefetcher's memory serves others."""
        self._store.drop_host()

    def stats(self) -> Stats:
        stats = self._store.stats() | {"pages_damaged_on_the_way": self._files.damaged}
        stats["prefetcher"] = self._ask_figures()
        known = {name: self._figures[name] for name in FIGURES_OF_PREFETCHER if name in self._figures}
        both = {name: _number(stats, name) + _number(self._figures, name) for name in COUNTED_BY_BOTH}
        return self._figures | stats | known | both

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._store.flush(CLOSE_FLUSH_S)
        self._jobs.put(None)
        self._files.close()  # first: the store's threads may be waiting for it
        self._worker.join()
        self._store.close()
        self._region.madvise(mmap.MADV_DONTNEED)  # whoever still refers to it: there may be no room for another

    def _work(self) -> None:
        """Look pages up in this thread: a lookup waits for the prefetcher, and no caller may block on that."""
        while (job := self._jobs.get()) is not None:
            job()

    def _progressed(self, owner: str) -> None:
        if self.progress(owner).done:
            self._notify()


def _number(stats: Stats, name: str) -> int:
    value = stats.get(name, 0)
    return value if isinstance(value, int) else 0
