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
    """The next read, where there is one: asking where there is none would wait for it."""
    return fetches.next_read(NOWHERE.volume) if any(not read.started for read in fetches._reads.values()) else None


def test_urgent_reads_come_first_and_a_run_in_its_order() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), SLOTS, held_lock())
    fetches.start(fetch_of("later", [0, 1, 2], priority=5), wait_for_room=True)
    fetches.start(fetch_of("sooner", [3, 4], priority=1), wait_for_room=True)
    fetches.start(fetch_of("also sooner", [5], priority=1), wait_for_room=True)
    order = []
    while read := readable(fetches):
        order.append(read.key)
    assert order == [key_of(page) for page in (3, 4, 5, 0, 1, 2)]


def test_a_read_that_somebody_urgent_waits_for_is_urgent() -> None:
    fetches = Fetches(Arena(SLOTS, 4096), SLOTS, held_lock())
    fetches.start(fetch_of("later", [0, 1, 2, 3], priority=5), wait_for_room=True)
    fetches.start(fetch_of("sooner", [2, 3], priority=1), wait_for_room=True)
    order = []
    while read := readable(fetches):
        order.append(read.key)
    assert order == [key_of(page) for page in (2, 3, 0, 1)], "each of them is read once"


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

    @rule(
        owner=owners,
        pages=st.lists(st.sampled_from(PAGES), max_size=8),
        priority=st.integers(0, 2),
        wait=st.booleans(),
    )
    def fetch(self, owner: str, pages: list[int], priority: int, wait: bool) -> None:
        self.fetches.start(fetch_of(owner, pages, priority), wait_for_room=wait)

    @rule(owner=owners)
    def cut(self, owner: str) -> None:
        self.fetches.cut(owner)
        assert self.fetches.progress(owner).done

    @rule(owner=owners)
    def release(self, owner: str) -> None:
        self.fetches.release(owner)
        assert self.fetches.progress(owner) == ((), True)

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
        self.fetches.admit_waiting()

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
