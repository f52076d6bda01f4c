"""The page store in a scheduler process: messages to the prefetcher, payload in shared memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.connection import Connection, Unavailable
from sglang_hcache.storage.arena import rows
from sglang_hcache.storage.contract import Progress, Stats
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.region import Region, wait_until_taken

NOTHING_YET = Progress((), False, known=False)
ASK_S = 0.5  # a question on the scheduler's thread may not cost more


@dataclass(eq=False)
class _Prefetch:
    number: int  # of the message that asks for it; 0 where nobody is asked
    slots: list[int] = field(default_factory=list)
    known: bool = False
    done: bool = False
    total: int | None = None
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    told: Progress = NOTHING_YET  # the last time somebody asked: a scheduler asks for all, at each step

    def progress(self) -> Progress:
        state = self.done, self.known or self.done, self.total
        if (len(self.told.slots), *self.told[1:]) != (len(self.slots), *state):
            self.told = Progress(tuple(self.slots), *state)
        return self.told


class StoreClient:
    """Base of a ChunkStore with a session to a prefetcher, on this host or another; subclasses start and close it.

    `news`: an eventfd that becomes readable whenever a prefetch is done or the store is gone.
    """

    def __init__(self, connection: Connection, news: int) -> None:
        self.connection = connection
        self.layout = connection.hello.layout
        self._news = news
        self._figures: Stats = {}  # as the prefetcher has told them last

    @property
    def alive(self) -> bool:
        return self.connection.alive

    @property
    def why_ended(self) -> str:
        return self.connection.why_ended

    @property
    def lost(self) -> bool:
        return self.connection.lost

    @property
    def prefetcher_pid(self) -> int:
        """On its own host."""
        return self.connection.welcome.pid

    def flush(self, timeout_s: float) -> bool:
        try:
            return self.connection.ask(m.Flush(), m.Flushed, timeout_s).complete
        except Unavailable:
            return False

    def give_up(self, why: str) -> None:
        """Behave as if the prefetcher were gone; the memory stays as it is until `close`."""
        self.connection.give_up(why)

    def _ask_figures(self) -> str:
        """Ask the prefetcher for its figures; returns its state. Without an answer in time the former ones stay."""
        try:
            self._figures = self.connection.ask(m.Stats(), m.Figures, ASK_S).figures
        except Unavailable as error:
            return f"gone: {error}"
        return "ok"

    def _notify(self) -> None:
        os.eventfd_write(self._news, 1)


class PrefetchClient(StoreClient):
    """A ChunkStore in the memory of another process on this host, for as long as that process lives.

    Raises Unavailable where that memory cannot be shared.
    """

    def __init__(self, connection: Connection, *, news: int) -> None:
        super().__init__(connection, news)
        welcome = connection.welcome
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._grant = self._slots_asked_for = connection.hello.grant
        self._granted: deque[int] = deque()
        self._held = 0  # granted slots, and those that are being filled
        self._share = sys.maxsize  # of these, once others want some, too
        self._by_owner: dict[str, _Prefetch] = {}  # by owner: what these are called is nothing to the prefetcher
        self._by_number: dict[int, _Prefetch] = {}  # the same, by number
        self._reserve_failed = 0
        try:
            region = Region.attach(welcome.region, welcome.slots * self.layout.record_bytes)
        except OSError as error:
            raise Unavailable(f"its memory cannot be shared: {error}") from None
        region.close()
        self.memory: Record = rows(region.memory, welcome.slots, self.layout.record_bytes)
        connection.start(self._receive, self._ended)

    def reserve(self) -> int | None:
        with self._lock:
            slot = self._granted.popleft() if self._granted and self.alive else None
            self._reserve_failed += slot is None
            wanted = self._grant - len(self._granted) - self._slots_asked_for
            if wanted < max(1, self._grant // 2):
                return slot
            self._slots_asked_for += wanted
        self.connection.send(m.Want(slots=wanted))
        return slot

    def abandon(self, slot: int) -> None:
        with self._lock:
            if self.alive:
                self._granted.append(slot)
                self._give_back()

    def commit(self, key: bytes, slot: int, parent: bytes) -> None:
        with self._lock:
            self._held -= 1
            self.connection.send(m.Commit(pages=[m.Page(key, parent, slot)]))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the pages the prefetcher has in memory or on file; none where it does not answer."""
        try:
            return self.connection.ask(m.Lookup(keys=list(keys)), m.Found, ASK_S).present
        except Unavailable:
            return [False] * len(keys)

    def prefetch(
        self,
        owner: str,
        keys: Sequence[bytes],
        *,
        priority: int = 0,
        page_priority: int = 0,
    ) -> None:
        message = m.Prefetch(
            keys=list(keys[: m.MAX_KEYS]),
            priority=priority,
            page_priority=page_priority,
        )
        with self._lock:
            former = self._by_owner.get(owner)
            prefetch = self._by_owner[owner] = _Prefetch(self.connection.send(message), done=not self.alive)
            self._by_number[prefetch.number] = prefetch
            if former is not None:  # only now: what is in both stays in place
                self._release(former)

    def progress(self, owner: str) -> Progress:
        with self._lock:
            return self._progress(owner)

    def wait(self, owner: str, timeout_s: float, *, until_known: bool = False) -> Progress:
        with self._lock:
            self._changed.wait_for(lambda: self._progress(owner).ends_wait(until_known=until_known), timeout_s)
            return self._progress(owner)

    def took_s(self, owner: str) -> float:
        with self._lock:
            prefetch = self._by_owner.get(owner)
            return max(0.0, prefetch.ended_at - prefetch.began_at) if prefetch else 0.0

    def cut(self, owner: str) -> None:
        with self._lock:
            if prefetch := self._by_owner.get(owner):
                self.connection.send(m.Cancel(prefetch=prefetch.number))

    def release(self, owner: str) -> None:
        with self._lock:
            if prefetch := self._by_owner.pop(owner, None):
                self._release(prefetch)

    def drop_host(self) -> None:
        self.connection.send(m.DropHost())

    def stats(self) -> Stats:
        with self._lock:
            stats: Stats = {"reserve_failed": self._reserve_failed, "pages_granted": len(self._granted)}
        stats["prefetcher"] = self._ask_figures()
        return (self._figures if self.alive else {}) | stats

    def wait_until_memory_taken(self) -> None:
        """Wait until the system has allocated all of `memory`, or allocates no more of it."""
        wait_until_taken(self.connection.welcome.region, self.memory.nbytes)

    def close(self) -> None:
        """Say goodbye to the prefetcher. Nobody may read or write the memory any more."""
        self.connection.close()
        self.memory = self.memory[:0].copy()  # the region is unmapped with its last view

    def _give_back(self) -> None:
        """Return the empty slots beyond our share to the prefetcher: others may be waiting for them."""
        slots = [self._granted.pop() for _ in range(min(len(self._granted), self._held - self._share))]
        self._held -= len(slots)
        for first in range(0, len(slots), m.MAX_KEYS):
            self.connection.send(m.GiveBack(slots=slots[first : first + m.MAX_KEYS]))

    def _release(self, prefetch: _Prefetch) -> None:
        self._by_number.pop(prefetch.number, None)
        self.connection.send(m.Release(prefetch=prefetch.number))

    def _progress(self, owner: str) -> Progress:
        prefetch = self._by_owner.get(owner)
        return prefetch.progress() if prefetch else Progress((), True)

    def _receive(self, message: m.FromServer, _: Sequence[memoryview]) -> None:
        with self._lock:
            if isinstance(message, m.Granted):
                self._granted.extend(message.slots)
                self._held += len(message.slots)
                self._slots_asked_for -= len(message.slots)
            elif isinstance(message, m.Share):
                self._share = message.slots
                self._give_back()
            elif isinstance(message, m.Ready):
                if (prefetch := self._by_number.get(message.answers)) is None:
                    return
                assert message.first == len(prefetch.slots), "pages are announced in order"
                prefetch.slots.extend(message.slots)
                prefetch.known = True
                prefetch.done, prefetch.total = message.done, message.total
                prefetch.ended_at = time.monotonic() if message.done else 0.0
                self._changed.notify_all()
                if message.done:
                    self._notify()

    def _ended(self) -> None:
        with self._lock:
            for prefetch in self._by_owner.values():
                prefetch.done = True
            self._changed.notify_all()
        self._notify()
