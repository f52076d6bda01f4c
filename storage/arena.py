"""The host tier's memory, cut in slots of one record each."""

from __future__ import annotations

import itertools
import mmap
from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum

import numpy as np

from sglang_hcache.storage.layout import ROOT, Record

REFRESHES = 64  # while as many pages are evicted as there are slots


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
    Whoever uses a page uses all pages before it, so those go after it. Not thread-safe; no call blocks.

    `memory`: uint8 [slots or more, record_bytes], rows aligned to pages of memory. `slots`: how many of them are in
    use. Slots behind these, where there were more, are in no state but for those that are still open, or hold a page
    that is leased or dirty: such a page cannot be found any more, and is gone once it is neither.
    """

    def __init__(self, slots: int, record_bytes: int, region: mmap.mmap | None = None) -> None:
        """`region`: memory to use, of that size at least; private memory by default."""
        assert slots > 0
        assert record_bytes % mmap.PAGESIZE == 0
        if region is None:
            region = mmap.mmap(-1, slots * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = _eager(region, slots, record_bytes)
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self._open: set[int] = set()
        self._slot_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._parent_of: dict[int, bytes] = {}
        self._backing: dict[int, Backing] = {}
        self._leases: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._used: dict[int, None] = {}  # since the last refresh, the last of each run, in that order
        self._until_refresh = 0  # evictions
        self._dirty = 0

    def resize(self, slots: int, region: mmap.mmap) -> None:
        """Use so many slots from now on. `region`: the same memory, of that size at least."""
        assert slots > 0
        if slots > len(self.memory):
            self.memory = _eager(region, slots, self.memory.shape[1])
        former, self.slots = self.slots, slots
        self._free = [slot for slot in self._free if slot < slots]
        self._free += [slot for slot in range(former, slots) if slot not in self._open and slot not in self._key_of]
        for slot in [slot for slot in self._key_of if slot >= slots and self._is_found(slot)]:
            del self._slot_of[self._key_of[slot]]
            self._settle(slot)

    @property
    def used_behind(self) -> bool:
        """Whether a slot behind the last is not done with yet."""
        return any(slot >= self.slots for slots in (self._open, self._key_of) for slot in slots)

    def reserve(self) -> int | None:
        """A slot to fill, open until `cache` or `abandon`; None where nothing can be evicted."""
        if not self._free:
            if not self._evictable:
                return None
            self._refresh()
            self._evict(next(iter(self._evictable)))
        slot = self._free.pop()
        self._open.add(slot)
        return slot

    def abandon(self, slot: int) -> None:
        self._open.remove(slot)
        self._give_back(slot)

    def cache(self, key: bytes, slot: int, backing: Backing, parent: bytes = ROOT) -> None:
        """The open slot holds page `key` from now on, which follows page `parent`."""
        assert key not in self._slot_of
        assert slot < self.slots
        self._open.remove(slot)
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self._parent_of[slot] = parent
        self._backing[slot] = backing
        self._dirty += backing is Backing.DIRTY
        self._use(slot)
        self._settle(slot)

    def parent(self, slot: int) -> bytes:
        """Of the page in a cached slot."""
        return self._parent_of[slot]

    def slot_of(self, key: bytes) -> int | None:
        return self._slot_of.get(key)

    def mark(self, slot: int, backing: Backing) -> None:
        """Say what stands behind a cached slot now; it becomes the most recently used."""
        self._dirty += (backing is Backing.DIRTY) - (self._backing[slot] is Backing.DIRTY)
        self._backing[slot] = backing
        self._use(slot)  # again: while it was dirty a refresh did not move it
        self._settle(slot)

    def lease(self, slot: int) -> None:
        assert self._is_found(slot)
        self._leases[slot] = self._leases.get(slot, 0) + 1
        self._evictable.pop(slot, None)

    def release(self, slots: Iterable[int]) -> None:
        """End one lease of each of a run's pages, in their order."""
        run = list(slots)
        if run:
            self._use(run[-1])
        for slot in reversed(run):
            self._leases[slot] -= 1
            if not self._leases[slot]:
                del self._leases[slot]
                self._settle(slot)

    def evict_all(self) -> None:
        """Evict everything that can be."""
        for slot in list(self._evictable):
            self._evict(slot)

    @property
    def cached(self) -> int:
        return len(self._slot_of)

    @property
    def leased(self) -> int:
        return len(self._leases)

    @property
    def opened(self) -> int:
        return len(self._open)

    @property
    def dirty(self) -> int:
        return self._dirty

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Slots that `reserve` can give."""
        return len(self._free) + len(self._evictable)

    def backing(self, slot: int) -> Backing:
        return self._backing[slot]

    def backed_by(self, backing: Backing) -> list[tuple[int, bytes]]:
        """Slot and key of each page that has this behind it, in the order they came."""
        return [(slot, key) for slot, key in self._key_of.items() if self._backing[slot] is backing]

    def is_leased(self, slot: int) -> bool:
        return slot in self._leases

    def check(self) -> None:
        """Assert that each slot is in exactly one state, and that all maps agree."""
        cached = set(self._key_of)
        assert len(self._free) == len(set(self._free))
        assert all(slot < self.slots for slot in self._free)
        assert len({*self._free, *self._open, *cached}) == len(self._free) + len(self._open) + len(cached)
        assert {*self._free, *self._open, *cached} >= set(range(self.slots))
        assert all(self._key_of[slot] == key for key, slot in self._slot_of.items())
        assert all(slot < self.slots for slot in self._slot_of.values())
        assert set(self._backing) == set(self._parent_of) == cached
        assert set(self._used) <= cached
        assert set(self._leases) <= cached
        assert all(count > 0 for count in self._leases.values())
        assert self._dirty == sum(backing is Backing.DIRTY for backing in self._backing.values())
        held = {slot for slot in cached if self._backing[slot] is Backing.DIRTY or slot in self._leases}
        assert set(self._evictable) == cached - held
        assert held >= {slot for slot in cached if not self._is_found(slot)}

    def _use(self, slot: int) -> None:
        """Remember the page: those before it are used with it."""
        before = self._slot_of.get(self._parent_of[slot])
        if before is not None:
            self._used.pop(before, None)
        self._used.pop(slot, None)
        self._used[slot] = None

    def _refresh(self) -> None:
        """Now and then: pages that were used, and all before them, are the last to go, first pages last of all."""
        if self._until_refresh:
            self._until_refresh -= 1
            return
        self._until_refresh = self.slots // REFRESHES
        seen: set[int] = set()
        runs = []
        for last in reversed(self._used):
            run: list[int] = []
            slot: int | None = last
            while slot is not None and slot not in seen:
                seen.add(slot)
                run.append(slot)
                slot = self._slot_of.get(self._parent_of[slot])
            runs.append(run)
        for slot in itertools.chain.from_iterable(reversed(runs)):
            if slot in self._evictable:
                self._evictable.move_to_end(slot)
        self._used.clear()

    def _settle(self, slot: int) -> None:
        self._evictable.pop(slot, None)
        if self._backing[slot] is not Backing.DIRTY and slot not in self._leases:
            self._evictable[slot] = None
            if not self._is_found(slot):
                self._evict(slot)

    def _evict(self, slot: int) -> None:
        del self._evictable[slot]
        if self._is_found(slot):
            del self._slot_of[self._key_of[slot]]
        del self._key_of[slot]
        del self._parent_of[slot]
        del self._backing[slot]
        self._used.pop(slot, None)
        self._give_back(slot)

    def _is_found(self, slot: int) -> bool:
        """Whether the page in a cached slot can be found."""
        return self._slot_of.get(self._key_of[slot]) == slot

    def _give_back(self, slot: int) -> None:
        if slot < self.slots:
            self._free.append(slot)


def _eager(region: mmap.mmap, slots: int, record_bytes: int) -> Record:
    """`rows`; the first touch of a record is a fault or two, not hundreds."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return rows(region, slots, record_bytes)
