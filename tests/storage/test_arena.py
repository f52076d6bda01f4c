from __future__ import annotations

import mmap

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.layout import ROOT

SLOTS = 4
MOST = 2 * SLOTS


class ArenaMachine(RuleBasedStateMachine):
    """Knows who must still be there: what is dirty or leased."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SLOTS, mmap.PAGESIZE)
        self.slots = SLOTS
        self.region = mmap.mmap(-1, MOST * mmap.PAGESIZE)
        self.open: list[int] = []
        self.behind: set[bytes] = set()  # pages that cannot be found any more
        self.dirty: dict[bytes, int] = {}
        self.leases: list[tuple[bytes, int]] = []
        self.parents: dict[bytes, bytes] = {}
        self.next_key = 0

    @rule()
    def reserve(self) -> None:
        held = set(self.open) | set(self.dirty.values()) | {slot for _, slot in self.leases}
        there = {key: slot for key in self.parents if (slot := self.arena.slot_of(key)) is not None}
        slot = self.arena.reserve()
        for gone in [key for key in there if self.arena.slot_of(key) is None]:
            followers = [key for key in there if self.parents[key] == gone and key != gone]
            assert all(there[key] in held for key in followers), "a page goes after those that follow it"
        assert (slot is None) == (held >= set(range(self.slots)))
        if slot is not None:
            assert slot not in held
            assert slot < self.slots
            self.open.append(slot)

    @rule(slots=st.integers(1, MOST))
    def resize(self, slots: int) -> None:
        self.arena.resize(slots, self.region)
        self.slots = slots
        self.behind |= {key for key, slot in [*self.dirty.items(), *self.leases] if slot >= slots}

    @precondition(lambda self: any(slot < self.slots for slot in self.open))
    @rule(backing=st.sampled_from(Backing), back=st.integers(0, SLOTS), again=st.booleans())
    def cache(self, backing: Backing, back: int, again: bool) -> None:
        """A new page, or one that had gone: those that follow it may be there already."""
        held = {*self.dirty, *(key for key, _ in self.leases)}
        gone = [key for key in self.parents if self.arena.slot_of(key) is None and key not in held]
        key = gone[-1] if again and gone else b"%d" % self.next_key
        slot = next(slot for slot in self.open if slot < self.slots)
        self.open.remove(slot)
        self.next_key += 1
        self.behind.discard(key)
        parent = self.parents.setdefault(key, b"%d" % (self.next_key - 1 - back) if back else ROOT)
        self.arena.cache(key, slot, backing, parent)
        if backing is Backing.DIRTY:
            self.dirty[key] = slot

    @precondition(lambda self: self.open)
    @rule()
    def abandon(self) -> None:
        self.arena.abandon(self.open.pop())

    @precondition(lambda self: self.dirty)
    @rule(backing=st.sampled_from([Backing.CLEAN, Backing.UNBACKED]))
    def written(self, backing: Backing) -> None:
        self.arena.mark(self.dirty.popitem()[1], backing)

    @rule(back=st.integers(1, SLOTS))
    def lease(self, back: int) -> None:
        key = b"%d" % (self.next_key - back)
        slot = self.arena.slot_of(key)
        if slot is not None:
            self.arena.lease(slot)
            self.leases.append((key, slot))

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.arena.release([self.leases.pop(0)[1]])

    @rule()
    def evict_all(self) -> None:
        self.arena.evict_all()
        held = set(self.dirty) | {key for key, _ in self.leases}
        assert self.arena.cached == len(held - self.behind)

    @invariant()
    def holds(self) -> None:
        self.arena.check()
        for key, slot in [*self.dirty.items(), *self.leases]:
            assert self.arena.slot_of(key) == (None if key in self.behind else slot)
        held = [*self.open, *self.dirty.values(), *(slot for _, slot in self.leases)]
        assert self.arena.used_behind == any(slot >= self.slots for slot in held)
        assert self.arena.opened == len(self.open)


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_page_goes_first() -> None:
    arena = Arena(3, mmap.PAGESIZE)
    slots = {}
    for key in (b"a", b"b", b"c"):
        slot = arena.reserve()
        assert slot is not None
        slots[key] = slot
        arena.cache(key, slot, Backing.CLEAN)
    arena.lease(slots[b"a"])
    arena.release([slots[b"a"]])
    order = []
    for _ in range(3):
        there = {key for key in slots if arena.slot_of(key) is not None}
        arena.reserve()
        order += [key for key in there if arena.slot_of(key) is None]
    assert order == [b"b", b"c", b"a"]


def test_of_a_released_run_the_last_page_goes_first() -> None:
    arena = Arena(2, mmap.PAGESIZE)
    slots = [arena.reserve(), arena.reserve()]
    for key, parent, slot in zip((b"root", b"leaf"), (ROOT, b"root"), slots, strict=True):
        assert slot is not None
        arena.cache(key, slot, Backing.CLEAN, parent)
        arena.lease(slot)
    arena.release(slot for slot in slots if slot is not None)
    arena.reserve()
    assert arena.slot_of(b"root") is not None
    assert arena.slot_of(b"leaf") is None


def filled(slots: int, *pages: tuple[bytes, bytes]) -> Arena:
    """With pages by key and parent, cached in this order."""
    arena = Arena(slots, mmap.PAGESIZE)
    for key, parent in pages:
        slot = arena.reserve()
        assert slot is not None
        arena.cache(key, slot, Backing.CLEAN, parent)
    return arena


def evicted(arena: Arena, keys: str) -> str:
    """In which order the pages of these letters go."""
    there, order = set(keys), ""
    while there:
        assert arena.reserve() is not None
        (gone,) = {key for key in there if arena.slot_of(key.encode()) is None}
        there.remove(gone)
        order += gone
    return order


def test_pages_go_after_those_that_follow_them() -> None:
    arena = filled(6, (b"a", ROOT), (b"b", b"a"), (b"x", ROOT), (b"c", b"b"), (b"y", b"x"), (b"d", b"b"))
    assert evicted(arena, "abcdxy") == "cyxdba"


def test_whoever_uses_the_end_of_a_run_uses_its_begin() -> None:
    """Which lies on the device, and is not asked for: a conversation that goes on keeps its first pages."""
    arena = filled(5, (b"a", ROOT), (b"b", b"a"), (b"x", ROOT), (b"y", b"x"), (b"z", b"y"))
    slot = arena.slot_of(b"b")
    assert slot is not None
    arena.lease(slot)
    arena.release([slot])
    assert evicted(arena, "abxyz") == "zyxba"


def test_pages_that_follow_each_other_in_a_circle_do_no_harm() -> None:
    arena = filled(3, (b"a", b"b"), (b"b", b"a"), (b"c", b"c"))
    assert sorted(evicted(arena, "abc")) == ["a", "b", "c"]


def test_of_pages_that_are_written_in_part_the_last_go_first() -> None:
    """As long as no others can be evicted: what follows them cannot."""
    arena = filled(6, (b"a", ROOT), (b"b", b"a"), (b"c", b"b"), (b"d", b"c"), (b"e", b"d"), (b"f", b"e"))
    slots = [slot for key in (b"a", b"b", b"c", b"d", b"e", b"f") if (slot := arena.slot_of(key)) is not None]
    for slot in slots:
        arena.mark(slot, Backing.DIRTY)
    for part in (slots[:2], slots[2:4]):
        for slot in reversed(part):
            arena.mark(slot, Backing.CLEAN)
    assert evicted(arena, "abcd") == "dcba"
    arena.check()


def test_what_a_leased_page_follows_is_used_with_it() -> None:
    arena = filled(4, (b"a", ROOT), (b"b", b"a"), (b"x", ROOT), (b"y", b"x"))
    slot = arena.slot_of(b"b")
    assert slot is not None
    arena.lease(slot)
    assert evicted(arena, "xya") == "yxa"
    arena.check()


def test_pages_that_were_being_written_go_after_those_that_follow_them() -> None:
    """An eviction comes before they are on file, which they are in two parts."""
    arena = filled(6, (b"x", ROOT), (b"y", ROOT), (b"a", ROOT), (b"b", b"a"), (b"c", b"b"), (b"d", b"c"))
    slots = [slot for key in (b"a", b"b", b"c", b"d") if (slot := arena.slot_of(key)) is not None]
    for slot in slots:
        arena.mark(slot, Backing.DIRTY)
    assert arena.reserve() is not None
    for part in (slots[:2], slots[2:]):
        for slot in reversed(part):
            arena.mark(slot, Backing.CLEAN)
    assert evicted(arena, "yabcd") == "ydcba"
