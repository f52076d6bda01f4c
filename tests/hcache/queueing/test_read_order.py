"""For which of several waiting requests drives read first: what queue and store make of it, by a clock of its own."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.queueing import prefetch_queue
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.prefetch_queue import PrefetchQueue
from sglang_hcache.storage import store as stores
from sglang_hcache.storage.contract import AGEING
from sglang_hcache.storage.eviction import Keep
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.store import LocalStore
from tests.storage.pages import FINGERPRINT, LAYOUT, key_of

PAGE_S = 0.1  # to read one; nothing else takes time


class Asked(NamedTuple):
    pages: int  # that nobody else asks for
    arrival_s: float
    turn: int = 0


class Drive:
    """Has every page."""

    healthy = True

    def locate(self, keys: Sequence[bytes]) -> Mapping[bytes, Entry]:
        return dict.fromkeys(keys, Entry("0" * 16, 0))

    def read(self, key: bytes, entry: Entry, out: Record) -> bool:
        return True

    def write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep = list) -> bool:
        return False

    def touch(self, hits: Mapping[bytes, int]) -> None: ...

    def retry(self) -> bool:
        return False

    def close(self) -> None: ...


class Prefetcher:
    """One drive, one reader, and requests that are gone as soon as their pages are there."""

    def __init__(self, slots: int) -> None:
        self.now_s = 0.0
        self._drive = Drive()
        with mock.patch.object(stores, "READ_THREADS", 0):  # the reader is `read`
            self._store = LocalStore(
                LAYOUT,
                FINGERPRINT,
                slots * LAYOUT.record_bytes,
                [],
                files=self._drive,
                lease_limit=1.0,
            )
        planner: Any = SimpleNamespace(read_s=lambda pages: pages * PAGE_S, restores_all=False)
        rule = HoldRule(PrefetchPolicy.WAIT_COMPLETE)
        self._queue = PrefetchQueue(self._store, rule, LAYOUT.page_tokens, one_rank=False, planner=planner)
        self._owners: dict[bytes, int] = {}

    def ask(self, number: int, asked: Asked) -> None:
        keys = [key_of(1000 * number + page) for page in range(asked.pages)]
        self._owners |= dict.fromkeys(keys, number)
        self.now_s = asked.arrival_s
        self._queue.queued(str(number), keys, Prompt(1, 0, turn=asked.turn))

    def read(self, coming: list[tuple[int, Asked]]) -> int | None:
        """A page, while others come, the last of `coming` first; whose it was. None where nobody waits for any."""
        with self._store._lock:
            read = self._store._fetches.take_read(self._drive)
        if read is None:
            return None
        ends_s = self.now_s + PAGE_S
        while coming and coming[-1][1].arrival_s <= ends_s:
            self.ask(*coming.pop())
        self.now_s = ends_s
        with self._store._lock:
            self._store._fetches.finish_read(read, sound=True)
        owner = self._owners[read.key]
        if self._store.progress(str(owner)).done:
            self._queue.forget(str(owner))
        self._store.check()
        return owner

    def close(self) -> None:
        self._store.close()


def order_of(asked: Sequence[Asked], slots: int) -> list[int]:
    """Whose page was read, one after the other."""
    coming = sorted(enumerate(asked), key=lambda item: item[1].arrival_s, reverse=True)
    prefetcher, order = Prefetcher(slots), list[int]()
    clock = SimpleNamespace(time=lambda: prefetcher.now_s, monotonic=lambda: prefetcher.now_s)
    with mock.patch.object(prefetch_queue, "time", clock):
        while True:
            owner = prefetcher.read(coming)
            if owner is not None:
                order.append(owner)
            elif coming:
                prefetcher.ask(*coming.pop())
            else:
                break
    prefetcher.close()
    return order


@given(
    st.lists(st.builds(Asked, st.integers(1, 20), st.floats(0, 20), st.just(0)), min_size=1, max_size=30),
    st.sampled_from([20, 50, 600]),
)
@settings(max_examples=100, deadline=None)
def test_none_is_overtaken_by_those_that_come_too_late(asked: list[Asked], slots: int) -> None:
    """Whether there is room for all of them, or for few at a time."""
    order = order_of(asked, slots)
    assert Counter(order) == {number: one.pages for number, one in enumerate(asked)}, "none starves"
    for number, one in enumerate(asked):
        last = len(order) - 1 - order[::-1].index(number)
        latest_s = max(asked[other].arrival_s for other in order[: last + 1])
        assert latest_s <= one.arrival_s + one.pages * PAGE_S / AGEING + 1e-5, "which is a microsecond, by AGEING"


def test_the_shortest_is_read_first_of_those_that_wait() -> None:
    asked = [Asked(1, 0.0), Asked(4, 0.01), Asked(1, 0.02), Asked(2, 0.03)]
    assert order_of(asked, 20) == [0, 2, 3, 3, 1, 1, 1, 1]


def test_a_turn_is_more_than_any_wait() -> None:
    asked = [Asked(2, 0.0, 1), Asked(3, 0.01), Asked(1, 0.02, 1), Asked(2, 0.15, -sys.maxsize), Asked(1, 90.0, 1)]
    assert order_of(asked, 20) == [0, 1, 3, 3, 1, 1, 2, 0, 4], "what is being read comes to its end"


def test_a_long_restoration_is_served_amid_a_flood_of_short_ones() -> None:
    """The short ones come twice as fast as they can be served, for ever."""
    order = order_of([Asked(20, PAGE_S / 2), *(Asked(1, PAGE_S / 2 * index) for index in range(600))], 50)
    assert order.index(0) > 5, "it does not go first"
    assert len(order) - 1 - order[::-1].index(0) < 300
