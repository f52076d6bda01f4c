"""Getting runs of pages into memory for owners: leases, reads under way, and who waits for which."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.contract import Progress
from sglang_hcache.storage.layout import parent_of
from sglang_hcache.storage.stripe import PageFiles, Place


@dataclass(eq=False)
class Fetch:
    """What an owner asked for: a run of pages, the first `ready` of which are leased for it, without a gap."""

    owner: str
    keys: Sequence[bytes]
    places: Mapping[bytes, Place]
    priority: int
    came: int = 0  # how many others had come to the waiting room before it
    admitted: bool = False
    ready: int = 0
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    slots: dict[int, int] = field(default_factory=dict)  # page's position in the run → leased slot

    @property
    def done(self) -> bool:
        return self.admitted and self.ready == len(self.keys)

    def progress(self, first: int = 0) -> Progress:
        slots = tuple(self.slots[i] for i in range(first, self.ready))
        return Progress(slots, self.done, self.admitted, len(self.keys))


@dataclass(frozen=True)
class Need:
    """What a fetch would take beyond what is leased or being read already."""

    fetch: Fetch
    leases: int
    missing: set[bytes]  # those of its pages that are not in memory


@dataclass(eq=False)
class Read:
    """A page on its way from a file into an open slot, for all who wait for it."""

    key: bytes
    slot: int
    place: Place
    priority: int
    waiting: dict[Fetch, int] = field(default_factory=dict)  # to the page's position in its run
    started: bool = False
    dropped: bool = False


_turn = attrgetter("priority", "came")


@dataclass(eq=False)
class _Queue:
    """What is to be read of one volume, the most urgent first."""

    readable: threading.Condition
    reads: list[tuple[int, int, Read]] = field(default_factory=list)
    dropped: int = 0  # since those were last removed; a drive that hangs removes none

    def drop(self, read: Read) -> None:
        read.dropped = True
        self.dropped += 1
        if 2 * self.dropped > len(self.reads):
            self.dropped = 0
            self.reads = [item for item in self.reads if not item[2].dropped]
            heapq.heapify(self.reads)


class Fetches:
    """The leases of one arena. Not thread-safe: the store's lock guards it.

    `limit`: slots that may be leased in all, those being read included. `changed` collects the owners whose progress
    has changed since it was last taken.
    """

    def __init__(self, arena: Arena, limit: int, lock: threading.Lock) -> None:
        self._arena = arena
        self.limit = limit
        self._by_owner: dict[str, Fetch] = {}
        self._reads: dict[bytes, Read] = {}
        self._queues = defaultdict[PageFiles, _Queue](lambda: _Queue(threading.Condition(lock)))
        self._order = itertools.count()
        self._waiting_room: list[Fetch] = []  # sorted by turn: exactly those that are not admitted
        self._refused: Need | None = None  # of the first one, when last tried; by now it needs at least as much
        self._closed = False
        self.changed: set[str] = set()
        self.hits_host = 0

    # ---- for owners ----

    def start(self, fetch: Fetch) -> None:
        """Begin a fetch in place of the owner's former one. Keys that are nowhere must have been cut off."""
        former = self._by_owner.pop(fetch.owner, None)
        self._by_owner[fetch.owner] = fetch
        if self._must_queue(fetch):
            # Without leases of its own: two that wait for each other's would wait for ever.
            fetch.came = next(self._order)
            insort(self._waiting_room, fetch, key=_turn)
            self.changed.add(fetch.owner)
        else:
            self._admit(fetch)
        if former is not None:
            self._give_up(former)
        self.admit_waiting()

    def progress(self, owner: str, first: int = 0) -> Progress:
        fetch = self._by_owner.get(owner)
        return fetch.progress(first) if fetch else Progress((), True)

    def took_s(self, owner: str) -> float:
        fetch = self._by_owner.get(owner)
        return max(0.0, fetch.ended_at - fetch.began_at) if fetch else 0.0

    def cut(self, owner: str) -> None:
        """What is not in memory yet is not waited for any more."""
        if fetch := self._by_owner.get(owner):
            if fetch.admitted:
                self._cut(fetch, fetch.ready)
            else:
                self._leave_waiting_room(fetch)
                slots = map(self._arena.slot_of, fetch.keys)
                self._cut(fetch, next((i for i, slot in enumerate(slots) if slot is None), len(fetch.keys)))
                self._lease_cached(fetch)
            self.admit_waiting()

    def release(self, owner: str) -> None:
        if fetch := self._by_owner.pop(owner, None):
            self._give_up(fetch)
            self.changed.discard(owner)
            self.admit_waiting()

    def committed(self, key: bytes) -> None:
        """A page has come into memory that was not read for anybody."""
        if self._refused is not None:
            self._refused.missing.discard(key)
        self.admit_waiting()

    # ---- for readers ----

    def is_awaited(self, key: bytes) -> bool:
        """Whether an owner waits for a page that is being read."""
        read = self._reads.get(key)
        return read is not None and bool(read.waiting)

    def wait_for_read(self, volume: PageFiles) -> bool:
        """Until there may be a page to read of a volume, under the lock. False once closed."""
        queue = self._queues[volume]
        queue.readable.wait_for(lambda: queue.reads or self._closed)
        return not self._closed

    def take_read(self, volume: PageFiles) -> Read | None:
        """The most urgent page to read of a volume, if there is one. None once closed."""
        reads = self._queues[volume].reads
        while reads and not self._closed:
            read = heapq.heappop(reads)[2]
            if not (read.dropped or read.started):
                read.started = True
                return read
        return None

    def finish_read(self, read: Read, *, sound: bool) -> None:
        del self._reads[read.key]
        cached = self._arena.slot_of(read.key)
        # The page was committed meanwhile or could not be read, or `resize` has cut off its slot.
        if cached is not None or not sound or read.slot >= self._arena.slots:
            self._arena.abandon(read.slot)
        else:
            self._arena.cache(read.key, read.slot, Backing.CLEAN, parent_of(self._arena.memory[read.slot]))
            cached = read.slot
        for fetch, index in read.waiting.items():
            if cached is None:
                self._cut(fetch, index)
            else:
                self._pin(fetch, index, cached)
        self.admit_waiting()

    def close(self) -> None:
        self._closed = True
        for queue in self._queues.values():
            queue.readable.notify_all()

    # ---- figures ----

    @property
    def leased(self) -> int:
        """Slots that are leased, or will be once they are read."""
        return self._arena.leased + len(self._reads)

    @property
    def reading(self) -> int:
        return len(self._reads)

    @property
    def waiting(self) -> int:
        return len(self._waiting_room)

    def check(self) -> None:
        """Assert that leases are those of the fetches, and no more than allowed."""
        pinned = [slot for fetch in self._by_owner.values() for slot in fetch.slots.values()]
        assert all(self._arena.is_leased(slot) for slot in pinned)
        assert len(set(pinned)) == self._arena.leased
        assert self.leased <= self.limit
        for key, read in self._reads.items():
            assert read.key == key
            assert not read.dropped
            assert read.started or read.waiting
        waiting = [fetch for fetch in self._by_owner.values() if not fetch.admitted]
        assert self._waiting_room == sorted(waiting, key=_turn)
        if self._waiting_room and self._refused is not None and self._refused.fetch is self._waiting_room[0]:
            need = self._need(self._waiting_room[0])
            assert self._refused.leases <= need.leases
            assert self._refused.missing <= need.missing
        for fetch in self._by_owner.values():
            assert set(range(fetch.ready)) <= set(fetch.slots)
            assert fetch.ready not in fetch.slots

    def _room(self) -> int:
        return self.limit - self.leased

    def _need(self, fetch: Fetch) -> Need:
        slots = {key: self._arena.slot_of(key) for key in fetch.keys if key not in self._reads}
        leases = sum(slot is None or not self._arena.is_leased(slot) for slot in slots.values())
        return Need(fetch, leases, {key for key, slot in slots.items() if slot is None})

    def _must_queue(self, fetch: Fetch) -> bool:
        """Whether it does not fit now, or would take slots that a waiting fetch, no less urgent, needs."""
        need = self._need(fetch)
        behind = self._waiting_room and self._waiting_room[0].priority <= fetch.priority
        return self._must_wait(need) or bool(behind and need.leases)

    def _must_wait(self, need: Need) -> bool:
        """Whether there will be more room, or more slots, than there are now, and the fetch needs them."""
        # What a drive that hangs was to read, and nobody waits for any more, may never come back.
        comes_back = self._arena.leased > 0 or any(read.waiting for read in self._reads.values())
        if comes_back and need.leases > self._room():
            return True
        enough = min(len(need.missing), self._room(), self._arena.slots // 2)  # more may never be free at once
        return self._arena.dirty > 0 and enough > self._arena.available

    def _lease_cached(self, fetch: Fetch) -> list[int]:
        """Lease the pages in memory and cut the run where room ends; returns the positions of pages to be read."""
        room, to_read = self._room(), list[int]()
        for index, key in enumerate(fetch.keys):
            slot = self._arena.slot_of(key)
            is_new = not self._arena.is_leased(slot) if slot is not None else key not in self._reads
            if is_new:
                if room <= 0:
                    self._cut(fetch, index)
                    break
                room -= 1
                self._refused = None  # it may be one that the first of the waiting needs, too
            if slot is None:
                to_read.append(index)
            else:
                self._pin(fetch, index, slot)
                self.hits_host += 1
        return to_read

    def _admit(self, fetch: Fetch) -> None:
        """Lease, join or start a read for each page of the run, as far as room and slots go."""
        fetch.admitted = True
        self.changed.add(fetch.owner)
        for index in self._lease_cached(fetch):
            read = self._reads.get(fetch.keys[index]) or self._begin_read(fetch, fetch.keys[index])
            if read is None:
                self._cut(fetch, index)
                return
            if fetch.priority < read.priority and not read.started:
                read.priority = fetch.priority
                self._enqueue(read)  # once more; whoever comes to its former place finds it started
            read.waiting[fetch] = index

    def _begin_read(self, fetch: Fetch, key: bytes) -> Read | None:
        if key not in fetch.places or (slot := self._arena.reserve()) is None:
            return None
        read = self._reads[key] = Read(key, slot, fetch.places[key], fetch.priority)
        self._enqueue(read)
        return read

    def _enqueue(self, read: Read) -> None:
        queue = self._queues[read.place.volume]
        heapq.heappush(queue.reads, (read.priority, next(self._order), read))
        queue.readable.notify()

    def admit_waiting(self) -> None:
        """In order of priority; the first that does not fit holds back the others, so that none starves."""
        while self._waiting_room:
            first, need = self._waiting_room[0], self._refused
            if need is None or need.fetch is not first or not self._must_wait(need):
                need = self._refused = self._need(first)
            if self._must_wait(need):
                return
            self._waiting_room.pop(0)
            self._admit(first)

    def _leave_waiting_room(self, fetch: Fetch) -> None:
        if not fetch.admitted:
            fetch.admitted = True
            del self._waiting_room[bisect_left(self._waiting_room, _turn(fetch), key=_turn)]

    def _pin(self, fetch: Fetch, index: int, slot: int) -> None:
        self._arena.lease(slot)
        fetch.slots[index] = slot
        while fetch.ready in fetch.slots:
            fetch.ready += 1
        self._touched(fetch)

    def _cut(self, fetch: Fetch, length: int) -> None:
        """The run ends before page `length`: what lies behind is worth nothing without it."""
        fetch.keys, behind = fetch.keys[:length], fetch.keys[length:]
        self._arena.release(fetch.slots.pop(i) for i in sorted(fetch.slots) if i >= length)
        self._leave_reads(fetch, behind)
        self._touched(fetch)

    def _touched(self, fetch: Fetch) -> None:
        fetch.ended_at = time.monotonic() if fetch.done else 0.0
        self.changed.add(fetch.owner)

    def _give_up(self, fetch: Fetch) -> None:
        self._leave_waiting_room(fetch)
        self._arena.release(fetch.slots[i] for i in sorted(fetch.slots))
        fetch.slots.clear()
        self._leave_reads(fetch, fetch.keys)
        fetch.keys, fetch.places, fetch.ready = (), {}, 0

    def _leave_reads(self, fetch: Fetch, keys: Iterable[bytes]) -> None:
        for key in keys:
            if (read := self._reads.get(key)) is None:
                continue
            read.waiting.pop(fetch, None)
            if not read.waiting and not read.started:
                self._queues[read.place.volume].drop(read)
                del self._reads[key]
                self._arena.abandon(read.slot)
