"""When a request that is held gets a head start, and what becomes of its hold."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.queueing import hold_rule
from sglang_hcache.queueing.head_start import HeadStart
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import Prompt, RestoreAll
from sglang_hcache.queueing.prefetch_queue import PrefetchQueue
from sglang_hcache.storage.store import LocalStore
from tests.hcache.conftest import Clock
from tests.hcache.queues import late_of, planner, timed
from tests.prefetch.clients import PATIENCE_S
from tests.storage.pages import LAYOUT, holds, key_of, keys_of

pytestmark = pytest.mark.usefixtures("clock")

SHORT = HoldRule(PrefetchPolicy.TIMEOUT, base_s=0.1, per_ki_token_s=0.0)
FASTER = 3e7  # bytes a second: such a drive is worth waiting for after a head start, too
LONG = Prompt(new_tokens=1, device_tokens=0, divisible=True)


def evenly_matched(store: LocalStore, **options: Any) -> PrefetchQueue:
    """The drive reads about as fast as the engine prefills."""
    even: dict[str, Any] = {"rule": HoldRule(), "planner": planner(ssd_bytes_per_s=1.6e7), "reads_at_once": 1}
    return PrefetchQueue(store, page_tokens=LAYOUT.page_tokens, one_rank=False, **even | options)


def head_start_of(requests: PrefetchQueue, *, idle: bool = True) -> HeadStart | None:
    requests.admissible(idle=idle)
    return requests.take_head_start()


def test_an_idle_engine_begins_while_the_drive_reads_the_end(store: LocalStore, disk: threading.Event) -> None:
    requests = evenly_matched(store)
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    assert start.rid == "a" != start.head_rid
    assert 3 <= start.pages <= 7
    assert start.tokens == start.pages * LAYOUT.page_tokens
    assert requests.take_head_start() is None
    head, rest = keys_of(range(start.pages)), keys_of(range(start.pages, 10))
    requests.begin_head_start(start, head, Prompt(1, 0))
    assert requests.ready(start.head_rid, head) == 0, "none of it is in memory, and none is waited for"
    requests.forget(start.head_rid)
    disk.set()
    assert store.wait("a", PATIENCE_S).slots, "the end of it is read"
    assert requests.admissible(idle=True) == []
    assert list(requests.held) == ["a"], "as long as its beginning is not there"
    requests.head_start_over("a")
    assert requests.admissible(idle=True) == ["a"]
    assert requests.take_head_start() is None, "a request has one"
    requests.admit(["a"])
    assert requests.ready("a", rest) == len(rest)
    slots = requests.leased("a", rest)
    assert all(holds(store.memory[slot], start.pages + i) for i, slot in enumerate(slots))
    requests.forget("a")
    stats = requests.stats()
    assert (stats["head_starts"], stats["tokens_ahead"]) == (1, start.tokens)
    assert store.stats()["pages_leased"] == 0


def test_a_request_whose_time_is_up_gets_none(store: LocalStore, clock: Clock) -> None:
    """It is admitted in the same step."""
    requests = evenly_matched(store, rule=SHORT)
    requests.queued("a", keys_of(range(10)), LONG)
    clock.advance(SHORT.base_s + 0.01)
    assert requests.admissible(idle=True) == ["a"]
    assert requests.take_head_start() is None
    requests.clear()


def test_what_of_its_beginning_is_in_memory_is_restored(store: LocalStore) -> None:
    for page in range(3):  # these stay
        slot = store.reserve()
        assert slot is not None
        store.commit(key_of(20 + page), slot, b"r" * 32)
    requests = evenly_matched(store)
    keys = [*keys_of(range(20, 23)), *keys_of(range(10))]
    requests.queued("a", keys, LONG)
    start = head_start_of(requests)
    assert start is not None
    assert start.pages > 3 + 2
    requests.begin_head_start(start, keys[: start.pages], Prompt(1, 0))
    assert requests.ready(start.head_rid, keys[: start.pages]) == 3
    requests.clear()


@pytest.mark.parametrize(
    ("prompt", "idle", "options"),
    [
        (LONG, False, {}),
        (Prompt(1, 0), True, {}),
        (LONG, True, {"planner": RestoreAll(LAYOUT.page_tokens)}),
        (LONG, True, {"rule": HoldRule(PrefetchPolicy.BEST_EFFORT)}),
        (LONG, True, {"planner": planner(ssd_bytes_per_s=1e10)}),
        (LONG, True, {"planner": planner(ssd_bytes_per_s=1e3)}),
    ],
    ids=["busy", "more than tokens", "all is restored", "not held", "fast drive", "slow drive"],
)
def test_no_head_start(store: LocalStore, prompt: Prompt, idle: bool, options: dict[str, Any]) -> None:
    requests = evenly_matched(store, **options)
    requests.queued("a", keys_of(range(10)), prompt)
    assert head_start_of(requests, idle=idle) is None
    requests.clear()


def test_one_head_start_at_a_time_and_one_a_request(store: LocalStore) -> None:
    requests = evenly_matched(store, planner=planner(ssd_bytes_per_s=FASTER))
    for rid in ("a", "b"):
        requests.queued(rid, keys_of(range(10)), LONG)
    first = head_start_of(requests)
    assert first is not None
    assert first.rid == "a"
    requests.begin_head_start(first, keys_of(range(first.pages)), Prompt(1, 0))
    requests.admissible(idle=False)
    assert requests.take_head_start() is None, "it is at work"
    requests.head_start_over("a")
    second = head_start_of(requests)
    assert second is not None
    assert second.rid == "b"
    requests.begin_head_start(second, keys_of(range(second.pages)), Prompt(1, 0))
    requests.head_start_over("b")
    assert head_start_of(requests) is None, "both have had theirs"
    requests.clear()


def test_a_head_start_takes_time_of_no_hold(store: LocalStore, clock: Clock) -> None:
    """Its own is not the drive's; but one that never ends is given up."""
    requests = evenly_matched(store, rule=SHORT)
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    requests.begin_head_start(start, [], Prompt(1, 0))
    clock.advance(hold_rule.LONGEST_WAIT_S - 0.01)
    assert requests.admissible(idle=True) == []
    clock.advance(0.02)
    assert requests.admissible(idle=True) == ["a"]
    assert late_of(requests) == {"a"}
    requests.clear()


def test_after_a_head_start_drives_have_the_time_of_a_hold(store: LocalStore, clock: Clock) -> None:
    requests = evenly_matched(store, rule=SHORT, planner=planner(ssd_bytes_per_s=FASTER))
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    requests.begin_head_start(start, [], Prompt(1, 0))
    clock.advance(0.3)
    assert requests.admissible() == []
    requests.head_start_over("a")
    clock.advance(SHORT.base_s - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    assert late_of(requests) == {"a"}
    requests.clear()


def test_a_store_that_is_lost_ends_the_hold_of_a_head_start(store: LocalStore) -> None:
    requests = evenly_matched(store)
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    requests.attach(NoStore(store.layout, "lost", lost=True))
    requests.begin_head_start(start, keys_of(range(start.pages)), Prompt(1, 0))
    requests.head_start_over("a")
    assert requests.admissible(idle=True) == ["a"]
    store.release("a")


def test_a_drive_that_reads_beside_a_head_start_is_timed(
    store: LocalStore, disk: threading.Event, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own time, not that of the head start."""
    believes = planner(ssd_bytes_per_s=1.6e7)
    told = timed(believes, monkeypatch)
    requests = evenly_matched(store, planner=believes)
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    requests.begin_head_start(start, keys_of(range(start.pages)), Prompt(1, 0))
    clock.advance(0.1)
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    clock.advance(0.5)
    requests.head_start_over("a")
    assert requests.admissible() == ["a"]
    (what,) = told
    assert what == pytest.approx((10 - start.pages, 0.1))
    requests.clear()


def test_the_end_of_a_prefix_is_read_in_the_turn_of_its_request(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the pages of others that wait for the same prefix, from its first on, would come before."""
    asked, prefetch = list[tuple[list[bytes], int]](), store.prefetch

    def recorded(owner: str, keys: Sequence[bytes], **options: Any) -> None:
        if owner == "a":
            asked.append((list(keys), options["priority"]))
        prefetch(owner, keys, **options)

    monkeypatch.setattr(store, "prefetch", recorded)
    requests = evenly_matched(store)
    requests.queued("a", keys_of(range(10)), LONG)
    start = head_start_of(requests)
    assert start is not None
    requests.begin_head_start(start, [], Prompt(1, 0))
    (_, first), (rest, second) = asked
    assert rest == keys_of(range(start.pages, 10))
    assert first == second
    requests.clear()
