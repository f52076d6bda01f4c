from __future__ import annotations

import threading

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.fetch import Fetch, Fetches, Read
from sglang_hcache.storage.stripe import Place
from tests.storage.pages import key_of

SLOTS, LIMIT = 8, 5
PAGES = range(12)
NOWHERE = Place(None, None)  # type: ignore[arg-type]


def held_lock() -> threading.Lock:
    """As the store holds it: the machine has one thread."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def fetch_of(owner: str, pages: list[int], priority: int = 0) -> Fetch:
    keys = [key_of(page) for page in dict.fromkeys(pages)]
    return Fetch(owner, keys, dict.fromkeys(keys, NOWHERE), priority)


def readable(fetches: Fetches) -> Read | None:
    """The next read, where there is one."""
    return fetches.take_read(NOWHERE.volume)


def test_urgent_reads_come_first_and_a_run_in_its_order() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), SLOTS, held_lock())
    fetches.start(fetch_of("later", [0, 1, 2], priority=5))
    fetches.start(fetch_of("sooner", [3, 4], priority=1))
    fetches.start(fetch_of("also sooner", [5], priority=1))
    order = []
    while read := readable(fetches):
        order.append(read.key)
    assert order == [key_of(page) for page in (3, 4, 5, 0, 1, 2)]


def test_a_read_that_somebody_urgent_waits_for_is_urgent() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), SLOTS, held_lock())
    fetches.start(fetch_of("later", [0, 1, 2, 3], priority=5))
    fetches.start(fetch_of("sooner", [2, 3], priority=1))
    order = []
    while read := readable(fetches):
        order.append(read.key)
    assert order == [key_of(page) for page in (2, 3, 0, 1)], "each of them is read once"


def test_who_comes_later_does_not_take_what_somebody_waits_for() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), LIMIT, held_lock())
    fetches.start(fetch_of("first", [0, 1, 2]))
    fetches.start(fetch_of("large", [3, 4, 5, 6], priority=1))
    for owner, pages, priority in (("small", [7], 1), ("smaller", [8], 5)):
        fetches.start(fetch_of(owner, pages, priority))
    assert fetches.waiting == 3, "there is room for either of them, but not for all"
    fetches.release("first")
    assert fetches.reading == 5, "the large one and the small one"
    assert fetches.waiting == 1


def test_who_is_more_urgent_passes_those_who_wait_and_so_does_who_takes_nothing_from_them() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), LIMIT, held_lock())
    fetches.start(fetch_of("first", [0, 1, 2]))
    fetches.start(fetch_of("large", [3, 4, 5, 6], priority=1))
    fetches.start(fetch_of("urgent", [7], priority=0))
    fetches.start(fetch_of("the same", [0, 1], priority=5))
    assert fetches.waiting == 1
    assert fetches.reading == 4


def test_nobody_waits_behind_one_who_has_given_up() -> None:
    for give_up in (Fetches.release, Fetches.cut):
        fetches = Fetches(Arena(SLOTS, 4096), LIMIT, held_lock())
        fetches.start(fetch_of("first", [0, 1, 2]))
        fetches.start(fetch_of("large", [3, 4, 5, 6]))
        fetches.start(fetch_of("small", [7]))
        give_up(fetches, "large")
        assert fetches.waiting == 0


def test_one_that_is_cut_while_it_waits_keeps_what_is_in_memory_as_far_as_there_is_room() -> None:
    arena = Arena(SLOTS, 4096)
    for page in (0, 1, 2, 4):
        slot = arena.reserve()
        assert slot is not None
        arena.cache(key_of(page), slot, Backing.CLEAN)
    fetches = Fetches(arena, LIMIT, held_lock())
    fetches.start(fetch_of("first", [0, 7, 8]))
    for owner, pages, there in (("a", [0, 1, 2, 3, 4], 3), ("b", [4, 5, 6, 7], 0), ("c", [0, 9, 1, 2, 4], 1)):
        fetches.start(fetch_of(owner, pages))
        assert not fetches.progress(owner).known
        fetches.cut(owner)
        slots, *is_over = fetches.progress(owner)
        assert slots == tuple(arena.slot_of(key_of(page)) for page in pages[:there])
        assert is_over == [True, True, there]
        fetches.check()


def test_one_that_waits_needs_more_once_others_leave_what_it_shares_with_them() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), LIMIT, held_lock())
    fetches.start(fetch_of("first", [0, 1]))
    fetches.start(fetch_of("shares", [2, 3]))
    fetches.start(fetch_of("large", [2, 3, 4, 5, 6]))
    fetches.release("shares")
    assert fetches.waiting == 1, "for three pages there would be room"
    fetches.release("first")
    assert fetches.reading == 5


class CountingArena(Arena):
    looked_up = 0

    def slot_of(self, key: bytes) -> int | None:
        self.looked_up += 1
        return super().slot_of(key)


def test_what_others_do_costs_the_same_however_large_the_one_is_that_waits() -> None:
    arena, pages = CountingArena(1000, 4096), 400
    fetches = Fetches(arena, 450, held_lock())
    fetches.start(fetch_of("first", list(range(100))))
    fetches.start(fetch_of("large", list(range(100, 100 + pages))))
    assert fetches.waiting == 1
    arena.looked_up = 0
    for page in range(50):
        fetches.finish_read(readable(fetches), sound=True)  # type: ignore[arg-type]
        fetches.start(fetch_of("the same", [page]))
        fetches.release("the same")
        slot = arena.reserve()
        assert slot is not None
        arena.cache(key_of(1000 + page), slot, Backing.DIRTY)
        fetches.committed(key_of(1000 + page))
    assert fetches.waiting == 1
    assert arena.looked_up <= 50 * 10


def test_one_that_waits_for_slots_needs_none_for_pages_that_are_saved_meanwhile() -> None:
    """Though the disk hangs, and what it waits for never comes."""
    arena = Arena(SLOTS, 4096)
    fetches = Fetches(arena, SLOTS, held_lock())
    slots = [arena.reserve() for _ in range(SLOTS)]
    assert None not in slots
    for page in range(3):
        if page == 1:
            fetches.start(fetch_of("waits", [1, 2]))
        arena.cache(key_of(page), slots.pop(), Backing.DIRTY)  # type: ignore[arg-type]
        fetches.committed(key_of(page))
        assert fetches.waiting == (page == 1)
    assert len(fetches.progress("waits").slots) == 2


class Sharing(RuleBasedStateMachine):
    """Owners that fetch, cut and release, readers that fail or not, a writer that commits: in any order."""

    owners = st.sampled_from("abcd")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(SLOTS, 4096)
        self.fetches = Fetches(self.arena, LIMIT, held_lock())
        self.under_way: list[Read] = []
        self.open: list[int] = []
        self.missing: set[bytes] = set()

    @rule(owner=owners, pages=st.lists(st.sampled_from(PAGES), max_size=8), priority=st.integers(0, 2))
    def fetch(self, owner: str, pages: list[int], priority: int) -> None:
        self.fetches.start(fetch_of(owner, pages, priority))

    @rule(owner=owners)
    def cut(self, owner: str) -> None:
        self.fetches.cut(owner)
        assert self.fetches.progress(owner).done

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        self.fetches.release(owner)
        assert self.fetches.progress(owner)[:3] == ((), True, True)

    @rule()
    def begin_read(self) -> None:
        if read := readable(self.fetches):
            self.under_way.append(read)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), sound=st.booleans())
    def end_read(self, data: st.DataObject, sound: bool) -> None:
        read = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        self.fetches.finish_read(read, sound=sound)

    @rule()
    def reserve(self) -> None:
        if (slot := self.arena.reserve()) is not None:
            self.open.append(slot)

    @precondition(lambda self: self.open)
    @rule(page=st.sampled_from(PAGES), backing=st.sampled_from(Backing))
    def commit(self, page: int, backing: Backing) -> None:
        slot = self.open.pop()
        if self.arena.slot_of(key_of(page)) is None:
            self.arena.cache(key_of(page), slot, backing)
        else:
            self.arena.abandon(slot)
        self.fetches.committed(key_of(page))

    @precondition(lambda self: self.open)
    @rule()
    def abandon(self) -> None:
        self.arena.abandon(self.open.pop())

    @rule()
    def write_all(self) -> None:
        for page in PAGES:
            slot = self.arena.slot_of(key_of(page))
            if slot is not None and self.arena.backing(slot) is Backing.DIRTY:
                self.arena.mark(slot, Backing.CLEAN)
        self.fetches.admit_waiting()

    @rule()
    def drop(self) -> None:
        self.arena.evict_all()

    @invariant()
    def all_agree(self) -> None:
        self.arena.check()
        self.fetches.check()
        assert self.arena.opened == len(self.open) + self.fetches.reading

    @invariant()
    def slots_hold_what_was_asked_for(self) -> None:
        for fetch in self.fetches._by_owner.values():
            for index, slot in enumerate(fetch.progress().slots):
                assert self.arena.slot_of(fetch.keys[index]) == slot

    def teardown(self) -> None:
        """Whoever waits gets its turn once the others let go: nobody waits for ever."""
        for round_ in range(100):
            while self.under_way or (read := readable(self.fetches)):
                self.fetches.finish_read(self.under_way.pop() if self.under_way else read, sound=True)  # type: ignore[arg-type]
            self.write_all()
            done = [owner for owner in "abcd" if self.fetches.progress(owner).done]
            for owner in done:
                self.fetches.release(owner)
            self.all_agree()
            if len(done) == 4 and not self.fetches.waiting:
                break
            assert round_ < 20, "those who wait are not admitted"
        assert self.fetches.leased == 0


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
