"""The host tier's memory, cut in slots of one record each."""

from __future__ import annotations

import itertools
import mmap
from array import array
from collections import Counter
from collections.abc import Iterable
from enum import Enum

import numpy as np
import numpy.typing as npt

from sglang_hcache.storage.layout import ALIGNMENT, ROOT, Record
from sglang_hcache.storage.steady import SlotQueue, SplitDict


class Backing(Enum):
    """What stands behind a cached slot."""

    DIRTY = "must be written to a file first"
    CLEAN = "is in a file, too"
    UNBACKED = "is in memory only, and may be lost"


def rows(region: mmap.mmap, slots: int, record_bytes: int) -> Record:
    """The region's first slots as uint8 [slots, record_bytes]; raises ValueError where it has fewer."""
    return np.frombuffer(region, np.uint8, slots * record_bytes).reshape(slots, record_bytes)


class Arena:
    """Slots, which page lies in which, and the order in which they are given up.

    A slot is free, open (whoever reserved it fills it) or cached (it holds a page). A cached slot can be leased,
    by several at once. Only cached slots that are neither leased nor dirty are evicted, least recently used first.
    Using a page means using all pages before it, so a page is evicted after those that follow it: `_queue` holds
    the listed pages that no listed page follows. All evictable pages are listed; one that is leased stays listed
    until eviction comes to it. A page that is not listed, as a dirty one, does not hold back the page before it. Not
    thread-safe; no call blocks, and all but `resize`, `evict_all` and `check` take microseconds.

    `memory`: uint8 [slots or more, record_bytes], rows aligned to pages of memory. `slots`: how many of them are in
    use. Slots that `resize` has cut off have no state, except those that are still open or hold a page that is leased
    or dirty: such a page can no longer be found, and is gone once it is neither.
    """

    def __init__(self, slots: int, record_bytes: int, region: mmap.mmap | None = None) -> None:
        """`region`: memory to use, of that size at least; private memory by default."""
        assert slots > 0
        assert record_bytes % ALIGNMENT == 0
        if region is None:
            region = mmap.mmap(-1, slots * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = _eager(region, slots, record_bytes)
        self.slots = slots
        self._free: list[int] = []  # below `_fresh`
        self._fresh = 0  # no slot from here on has been reserved yet
        self._open: set[int] = set()
        self._behind: set[int] = set()  # slots behind the last that are open or cached
        self._slot_of = SplitDict[int]()
        # By slot. Arrays of objects, not lists: the garbage collector would look through those.
        self._key_of = _nones(slots)  # bytes where a page is cached
        self._parent_of = _nones(slots)
        self._backing = _nones(slots)
        self._listed = bytearray(slots)  # whether it can be evicted, but for a lease since its turn last came
        self._leases = array("i", [0]) * slots
        self._used_at = array("q", [0]) * slots  # ticks of `_clock`
        self._clock = itertools.count(1)
        self._dirty = self._leased = self._evictable = 0
        self._followers = SplitDict[int]()  # key → listed pages that follow it, if there are any
        self._queue = SlotQueue()
        self._queue.grow(slots)

    def resize(self, slots: int, region: mmap.mmap) -> None:
        """Use so many slots from now on. `region`: the same memory, of that size at least."""
        assert slots > 0
        if slots > len(self.memory):
            self.memory = _eager(region, slots, self.memory.shape[1])
            self._grow(slots)
        former, self.slots = self.slots, slots
        back = range(former, min(slots, self._fresh))
        self._free = [slot for slot in self._free if slot < slots]
        self._free += [slot for slot in back if slot not in self._behind]
        gone = range(slots, min(former, self._fresh))
        self._behind = {slot for slot in self._behind if slot >= slots}
        self._behind.update(slot for slot in gone if slot in self._open or self._key_of[slot] is not None)
        for slot in gone:
            if self._key_of[slot] is not None and self._is_found(slot):
                del self._slot_of[self._key_of[slot]]
                if self._listed[slot]:
                    self._unlist(slot)
                if self._is_evictable(slot):
                    self._evict(slot)

    def _grow(self, slots: int) -> None:
        more = slots - len(self._leases)
        self._key_of = np.concatenate([self._key_of, _nones(more)])
        self._parent_of = np.concatenate([self._parent_of, _nones(more)])
        self._backing = np.concatenate([self._backing, _nones(more)])
        self._listed.extend(bytes(more))
        self._leases.extend(array("i", [0]) * more)
        self._used_at.extend(array("q", [0]) * more)
        self._queue.grow(slots)

    @property
    def used_behind(self) -> bool:
        """Whether a slot behind the last is not done with yet."""
        return bool(self._behind)

    def reserve(self) -> int | None:
        """A slot to fill, open until `cache` or `abandon`; None where nothing can be evicted."""
        if not self.available:
            return None
        if not self.free:
            self._evict(self._next_to_go())
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._fresh = self._fresh, self._fresh + 1
        self._open.add(slot)
        return slot

    def abandon(self, slot: int) -> None:
        self._open.remove(slot)
        self._give_back(slot)

    def cache(self, key: bytes, slot: int, backing: Backing, parent: bytes = ROOT) -> None:
        """The open slot holds page `key` from now on, which follows page `parent`."""
        assert self._slot_of.get(key) is None
        assert slot < self.slots
        self._open.remove(slot)
        self._slot_of[key] = slot
        self._key_of[slot] = key
        before = self._slot_of.get(parent)
        self._parent_of[slot] = parent if before is None else self._key_of[before]  # the same, but one object
        self._backing[slot] = backing
        self._dirty += backing is Backing.DIRTY
        self._used_at[slot] = next(self._clock)
        if backing is not Backing.DIRTY:
            self._make_evictable(slot)

    def parent(self, slot: int) -> bytes:
        """Of the page in a cached slot."""
        parent: bytes = self._parent_of[slot]
        return parent

    def slot_of(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def mark(self, slot: int, backing: Backing) -> None:
        """Say what stands behind a cached slot now."""
        was_dirty, is_dirty = self._backing[slot] is Backing.DIRTY, backing is Backing.DIRTY
        self._backing[slot] = backing
        self._dirty += is_dirty - was_dirty
        if is_dirty and not was_dirty:
            self._evictable -= not self._leases[slot]
            if self._listed[slot]:
                self._unlist(slot)
        elif was_dirty and not is_dirty and not self._leases[slot]:
            self._make_evictable(slot)

    def lease(self, slot: int) -> None:
        assert self._backing[slot] is not None
        self._leases[slot] += 1
        if self._leases[slot] == 1:
            self._leased += 1
            self._evictable -= self._backing[slot] is not Backing.DIRTY
        if slot in self._queue:
            self._use(slot)

    def release(self, slots: Iterable[int]) -> None:
        """End one lease of each of a run's pages, in their order."""
        run = list(slots)
        if run:
            self._use(run[-1])
        for slot in reversed(run):
            self._leases[slot] -= 1
            if not self._leases[slot]:
                self._leased -= 1
                if self._backing[slot] is not Backing.DIRTY:
                    self._make_evictable(slot)

    def evict_all(self) -> None:
        """Evict everything that can be."""
        while self._evictable:
            self._evict(self._next_to_go())

    @property
    def cached(self) -> int:
        return len(self._slot_of)

    @property
    def leased(self) -> int:
        return self._leased

    @property
    def opened(self) -> int:
        return len(self._open)

    @property
    def dirty(self) -> int:
        return self._dirty

    @property
    def free(self) -> int:
        return len(self._free) + max(0, self.slots - self._fresh)

    @property
    def available(self) -> int:
        """Slots that `reserve` can give."""
        return self.free + self._evictable

    def backing(self, slot: int) -> Backing:
        backing: Backing = self._backing[slot]
        return backing

    def backed_by(self, backing: Backing, first: int, end: int) -> list[tuple[int, int, bytes]]:
        """The pages in slots `first` to `end` - 1 with this backing: last use, slot and key of each.

        Last use is a tick of a logical clock: the later a page was stored or used, the greater.
        """
        return [
            (self._used_at[slot], slot, self._key_of[slot])
            for slot in range(first, min(end, self.slots))
            if self._backing[slot] is backing
        ]

    def is_leased(self, slot: int) -> bool:
        return self._leases[slot] > 0

    def check(self) -> None:
        """Assert that each slot is in exactly one state, and that all maps agree."""
        every = range(len(self._leases))
        cached = {slot for slot in every if self._key_of[slot] is not None}
        fresh = set(range(self._fresh, self.slots))
        assert len(self._free) == len(set(self._free))
        assert all(slot < min(self.slots, self._fresh) for slot in self._free)
        assert len({*self._free, *self._open, *cached}) == len(self._free) + len(self._open) + len(cached)
        assert not fresh & {*self._free, *self._open, *cached}
        assert {*self._free, *self._open, *cached, *fresh} >= set(range(self.slots))
        assert self._behind == {slot for slot in {*self._open, *cached} if slot >= self.slots}
        assert all(self._key_of[slot] == key and slot < self.slots for key, slot in self._slot_of.items())
        for by_slot in (self._backing, self._parent_of):
            assert {slot for slot in every if by_slot[slot] is not None} == cached
        leased = {slot for slot in every if self._leases[slot]}
        assert leased <= cached
        assert self._leased == len(leased)
        assert all(self._leases[slot] >= 0 for slot in every)
        dirty = {slot for slot in cached if self._backing[slot] is Backing.DIRTY}
        assert self._dirty == len(dirty)
        evictable = cached - dirty - leased
        assert self._evictable == len(evictable)
        assert all(self._is_found(slot) for slot in evictable)
        listed = {slot for slot in every if self._listed[slot]}
        assert not listed & dirty
        assert evictable <= listed <= set(map(self._slot_of.get, map(self._key_of.__getitem__, cached)))
        assert dict(self._followers.items()) == Counter(self._parent_of[slot] for slot in listed)
        last = {slot for slot in listed if self._followers.get(self._key_of[slot]) is None}
        queue = list(self._queue)
        assert len(queue) == len(set(queue))
        assert set(queue) == last

    def _is_evictable(self, slot: int) -> bool:
        backing = self._backing[slot]
        return backing is not None and backing is not Backing.DIRTY and not self._leases[slot]

    def _is_found(self, slot: int) -> bool:
        """Whether the page in a cached slot can be found."""
        return self._slot_of.get(self._key_of[slot]) == slot

    def _use(self, slot: int) -> None:
        self._used_at[slot] = next(self._clock)
        if slot in self._queue:
            self._queue.discard(slot)
            self._queue.append(slot)

    def _make_evictable(self, slot: int) -> None:
        """The page can be evicted from now on."""
        self._evictable += 1
        if not self._is_found(slot):
            self._evict(slot)
        elif not self._listed[slot]:
            self._list(slot)

    def _list(self, slot: int) -> None:
        """List the page: from now on the page before it is evicted only after it."""
        self._listed[slot] = True
        parent = self._parent_of[slot]
        others = self._followers.get(parent)
        self._followers[parent] = (others or 0) + 1
        if others is None and (before := self._slot_of.get(parent)) is not None:
            self._queue.discard(before)
        if self._followers.get(self._key_of[slot]) is None:
            self._queue.append(slot)

    def _unlist(self, slot: int) -> None:
        """Unlist the page: the page before it no longer waits for it, and is queued if it waits for no other."""
        self._listed[slot] = False
        self._queue.discard(slot)
        parent = self._parent_of[slot]
        others = self._followers[parent] - 1
        if others:
            self._followers[parent] = others
            return
        del self._followers[parent]
        before = self._slot_of.get(parent)
        if before is None or not self._listed[before]:
            return
        if self._used_at[before] > self._used_at[slot]:
            self._queue.append(before)
        else:
            self._used_at[before] = self._used_at[slot]
            self._queue.push(before)

    def _next_to_go(self) -> int:
        """The slot to evict next. Some slot must be evictable."""
        while (slot := self._queue.first()) is not None:
            if self._is_evictable(slot):
                return slot
            self._unlist(slot)
        # These follow each other in a circle, which the keys of sound clients do not.
        return next(slot for slot in range(self.slots) if self._is_evictable(slot))

    def _evict(self, slot: int) -> None:
        if self._is_found(slot):
            del self._slot_of[self._key_of[slot]]
        if self._listed[slot]:
            self._unlist(slot)
        self._evictable -= 1
        self._key_of[slot] = self._parent_of[slot] = self._backing[slot] = None
        self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        if slot < self.slots:
            self._free.append(slot)
        else:
            self._behind.remove(slot)


def _nones(count: int) -> npt.NDArray[np.object_]:
    return np.full(count, None, object)


def _eager(region: mmap.mmap, slots: int, record_bytes: int) -> Record:
    """`rows`; the first touch of a record is a fault or two, not hundreds."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return rows(region, slots, record_bytes)
