"""Prefetch ahead of scheduling on a real store, whose disk can be held up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.queueing import prefetch_queue, step_waits
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import Planner, RestoreAll
from sglang_hcache.queueing.prefetch_queue import ASK_AGAIN_S
from sglang_hcache.storage.contract import Progress
from sglang_hcache.storage.store import LocalStore
from tests.hcache.conftest import Clock
from tests.hcache.queues import TIMEOUT, agree, ask, late_of, planner, queue_of, unplanned, wait_until_admissible
from tests.prefetch.clients import PATIENCE_S
from tests.storage.pages import FINGERPRINT, LAYOUT, holds, key_of, keys_of, save

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def in_memory() -> Iterator[LocalStore]:
    """The same ten pages."""
    store = LocalStore(LAYOUT, FINGERPRINT, 40 * LAYOUT.record_bytes, [])
    save(store, range(10))
    yield store
    store.check()
    store.close()


def test_a_request_is_held_until_its_pages_are_there(store: LocalStore, disk: threading.Event) -> None:
    requests = unplanned(store, HoldRule(), one_rank=True)
    ask(requests, "a", keys_of(range(10)))
    assert "a" in requests.held
    assert requests.admissible() == []
    disk.set()
    wait_until_admissible(requests, "a")
    requests.admit(["a"])
    assert "a" not in requests.held
    assert requests.ready("a", keys_of(range(10))) == 10
    slots = requests.leased("a", keys_of(range(10)))
    assert [holds(store.memory[slot], page) for page, slot in enumerate(slots)] == [True] * 10
    assert requests.stats()["lookups_not_ahead"] == 0
    requests.forget("a")
    assert store.stats()["pages_leased"] == 0


@pytest.mark.parametrize("plans", [True, False])
def test_never_longer_than_the_timeout(
    store: LocalStore, disk: threading.Event, clock: Clock, monkeypatch: pytest.MonkeyPatch, plans: bool
) -> None:
    """But what is being read may be there when it is scheduled: the queue may be long."""
    believes: Planner = planner(ssd_bytes_per_s=1e10) if plans else RestoreAll(LAYOUT.page_tokens)
    requests = queue_of(store, TIMEOUT, believes, one_rank=True)
    ask(requests, "a", keys_of(range(10)))
    clock.advance(TIMEOUT.base_s - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    requests.admit(["a"], late=late_of(requests))
    assert requests.ready("a", keys_of(range(10))) == 0
    assert requests.stats()["requests_admitted_late"] == 1
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(10))) == 10
    requests.forget("a")
    assert store.stats()["pages_leased"] == 0


@pytest.mark.parametrize(("base_s", "longest_s"), [(1.0, [1.0, 17.0, 60.0]), (90.0, [90.0, 90.0, 90.0])])
def test_long_prompts_are_not_held_for_minutes(base_s: float, longest_s: list[float]) -> None:
    rule = HoldRule(PrefetchPolicy.TIMEOUT, base_s=base_s, per_ki_token_s=0.25)
    assert [rule.longest_s(tokens) for tokens in (0, 1 << 16, 1 << 20)] == longest_s


def test_a_long_queue_of_requests_that_are_not_held_costs_nothing(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each step of the scheduler."""
    requests = queue_of(store, TIMEOUT, planner(ssd_bytes_per_s=1e10), one_rank=False)
    for first in range(20, 40):
        ask(requests, str(first), keys_of([first]))
    clock.advance(TIMEOUT.base_s + 0.01)
    late = late_of(requests)
    assert len(late) == 20
    requests.admit(late, late=late)
    monkeypatch.setattr(requests._ahead, "add", lambda *_, **__: pytest.fail("it looks at each"))
    assert requests.propose() is None
    assert requests.propose(idle=True) is None
    requests.clear()


def test_in_a_long_queue_what_did_not_fit_in_memory_is_read_when_others_have_left(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """However long ago their time was up."""
    disk.set()
    save(store, range(10, 40))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    requests = queue_of(store, TIMEOUT, planner(ssd_bytes_per_s=1e10), one_rank=False)
    rids = {str(first): keys_of(range(first, first + 10)) for first in (0, 10, 20, 30)}
    for rid, keys in rids.items():
        ask(requests, rid, keys)
    clock.advance(TIMEOUT.base_s + 0.01)
    late = late_of(requests)
    requests.admit(late, late=late)
    assert not requests.held
    for rid, keys in rids.items():
        assert store.wait(rid, PATIENCE_S).done
        assert requests.ready(rid, keys) == 10
        requests.forget(rid)


def test_ranks_read_on_for_the_same_requests_whatever_their_clocks_say(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """One of them tells those whose time is up."""
    ranks = [queue_of(store, TIMEOUT, planner(ssd_bytes_per_s=1e10), one_rank=False) for _ in range(2)]
    for rank, name in zip(ranks, ("first", "other"), strict=True):
        ask(rank, name, keys_of(range(10)))
        clock.advance(0.02)
    clock.advance(TIMEOUT.base_s - 0.03)
    assert late_of(ranks[0]) == {"first"}
    ranks[1].admit(["other"], late=["other"])
    disk.set()
    assert store.wait("other", PATIENCE_S).done
    assert ranks[1].ready("other", keys_of(range(10))) == 10
    for rank in ranks:
        rank.clear()


@pytest.mark.parametrize("plans", [True, False])
def test_a_request_waits_for_the_rank_that_reads_slowest(
    store: LocalStore, in_memory: LocalStore, disk: threading.Event, plans: bool
) -> None:
    """Its drive is its own; what one rank has not read, none can load."""
    believes: Planner = planner(ssd_bytes_per_s=1e10) if plans else RestoreAll(LAYOUT.page_tokens)
    ranks = [queue_of(mine, HoldRule(), believes, one_rank=False) for mine in (in_memory, store)]
    for rank in ranks:
        ask(rank, "a", keys_of(range(10)))
    assert ranks[0].admissible() == ["a"]
    for _ in range(3):
        assert agree(ranks) == []
    assert [*ranks[0].held] == [*ranks[1].held] == ["a"]
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    assert agree(ranks) == ["a"]
    for rank in ranks:
        assert rank.ready("a", keys_of(range(10))) == 10
        assert rank.stats()["requests_admitted_late"] == 0
        rank.clear()


def test_only_for_as_long_again_as_the_faster_rank_took(
    store: LocalStore, in_memory: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """But its pages are read on, and may be there when it is the request's turn."""
    ranks = [unplanned(mine, HoldRule(), one_rank=False) for mine in (in_memory, store)]
    for rank in ranks:
        ask(rank, "a", keys_of(range(10)))
    clock.advance(0.5)
    assert agree(ranks) == []
    clock.advance(0.49)
    assert agree(ranks) == []
    clock.advance(0.02)
    assert agree(ranks) == ["a"]
    assert [rank.ready("a", keys_of(range(10))) for rank in ranks] == [10, 0]
    assert ranks[0].stats()["requests_admitted_late"] == 1
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    assert ranks[1].ready("a", keys_of(range(10))) == 10
    for rank in ranks:
        rank.clear()


def test_a_rank_that_will_get_no_more_is_not_waited_for(in_memory: LocalStore) -> None:
    """It has none of them, and what one rank lacks is of no use to any."""
    lost = LocalStore(LAYOUT, bytes(16), 8 * LAYOUT.record_bytes, [])
    ranks = [unplanned(mine, HoldRule(), one_rank=False) for mine in (in_memory, lost)]
    for rank in ranks:
        ask(rank, "a", keys_of(range(10)))
    assert agree(ranks) == ["a"]
    for rank in ranks:
        rank.clear()
    lost.close()


@pytest.mark.parametrize("aborted", [True, False])
def test_a_hold_is_as_long_as_the_request_was_held_however_that_ends(
    store: LocalStore, clock: Clock, aborted: bool
) -> None:
    requests = unplanned(store, HoldRule(), one_rank=False)
    ask(requests, "a", keys_of(range(10)))
    clock.advance(0.25)
    if not aborted:
        requests.admit(["a"])
        clock.advance(1.0)
    requests.forget("a")
    requests.forget("a")
    assert list(requests.holds) == [pytest.approx(0.25)]
    assert requests.stats()["requests_held_s"] == 0.25
    assert requests.stats()["requests_held_now"] == 0


@pytest.mark.parametrize("one_rank", [True, False])
def test_best_effort_waits_for_no_drive_and_takes_what_is_there(
    store: LocalStore, disk: threading.Event, one_rank: bool
) -> None:
    save(store, range(20, 25))
    requests = unplanned(store, HoldRule(PrefetchPolicy.BEST_EFFORT), one_rank=one_rank)
    ask(requests, "memory", keys_of(range(20, 25)))
    ask(requests, "file", keys_of(range(10)))
    assert [*requests.held] == (["file"] if one_rank else ["memory", "file"])
    assert requests.admissible() == [*requests.held], "in the next step"
    requests.admit(["memory", "file"])
    assert requests.ready("memory", keys_of(range(20, 25))) == 5
    assert requests.ready("file", keys_of(range(10))) == 0
    disk.set()
    assert store.wait("file", PATIENCE_S).done, "reading goes on"
    assert requests.ready("file", keys_of(range(10))) == 10
    requests.clear()


def test_best_effort_is_not_held_up_by_a_store_that_says_nothing(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = unplanned(store, HoldRule(PrefetchPolicy.BEST_EFFORT), one_rank=True)
    monkeypatch.setattr(store, "progress", lambda owner: Progress((), False, known=False))
    ask(requests, "a", keys_of(range(10)))
    clock.advance(prefetch_queue.KNOWN_WAIT_S - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    requests.clear()


def test_what_is_in_memory_or_nowhere_is_not_held_for(store: LocalStore, disk: threading.Event) -> None:
    save(store, range(20, 25))
    requests = unplanned(store, HoldRule(), one_rank=True)
    ask(requests, "memory", keys_of(range(20, 25)))
    ask(requests, "nowhere", keys_of(range(90, 95)))
    assert not requests.held
    assert requests.ready("memory", keys_of(range(20, 25))) == 5
    assert requests.ready("nowhere", keys_of(range(90, 95))) == 0
    requests.clear()


@pytest.mark.parametrize("proposes", [False, True])
def test_what_another_rank_saves_of_a_retracted_request_is_asked_for_before_it_is_admitted(
    store: LocalStore, proposes: bool
) -> None:
    """It has nothing to save itself: who proposes has waited for that."""
    saved = threading.Event()
    requests = unplanned(store, HoldRule(), one_rank=False)
    ask(requests, "a", keys_of(range(20, 25)), saved=saved)
    assert requests.admissible() == []
    save(store, range(20, 25))
    saved.set()
    if proposes:
        wait_until_admissible(requests, "a")
    else:
        assert not requests.has("a", 5), "it asks for it now"
    assert requests.has("a", 5)
    requests.admit(["a"])
    assert requests.ready("a", keys_of(range(20, 25))) == 5
    assert requests.stats()["lookups_not_ahead"] == 0
    requests.clear()


def test_what_it_saves_itself_is_there_once_it_is_saved(store: LocalStore) -> None:
    """On the CPU it is saved at once."""
    saved = threading.Event()
    saved.set()
    save(store, range(20, 23))
    requests = unplanned(store, HoldRule(), one_rank=False)
    ask(requests, "a", keys_of(range(20, 25)), saved=saved)
    assert not requests.has("a", 5), "it asks for it now"
    assert requests.has("a", 5), "no more will come"
    requests.clear()


@pytest.mark.parametrize("late", [True, False])
def test_what_other_ranks_save_later_is_asked_for_again(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The rank that saves a node's pages may be slower than the one that proposes."""
    spied: Any = store
    monkeypatch.setattr(store, "prefetch", Mock(wraps=store.prefetch))
    nothing_to_save = threading.Event()
    nothing_to_save.set()
    requests = unplanned(store, HoldRule(), one_rank=False, others_save=True)
    ask(requests, "a", keys_of(range(20, 25)), saved=nothing_to_save)
    for pages in range(4):
        save(store, range(20, 20 + pages))
        for _ in range(3):
            assert not requests.has("a", 5)
        clock.advance(ASK_AGAIN_S + 0.001)
    assert spied.prefetch.call_count == 2 + 3, "not in every step"
    save(store, range(20, 25))
    assert not requests.has("a", 5)
    if late:  # and not answered yet
        with monkeypatch.context() as silent:
            silent.setattr(store, "progress", lambda _owner: Progress((), False, known=False))
            assert not requests.has("a", 5, late=True)
            silent.setattr(store, "wait", Mock(wraps=store.wait))
            requests.admit(["a"], late=["a"])
            assert spied.wait.call_count == 1
    else:
        assert requests.has("a", 5)
        requests.admit(["a"])
    assert requests.ready("a", keys_of(range(20, 25))) == 5
    requests.clear()


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_retracted_request_whose_time_is_up_keeps_what_it_has(
    store: LocalStore, in_memory: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    """Its pages are asked for again only once more of them are saved, and then waited for."""
    saved = threading.Event()
    requests = unplanned(in_memory, TIMEOUT, one_rank=False)
    ask(requests, "a", keys_of(range(10)), saved=saved)
    for name in ("prefetch", "wait"):
        monkeypatch.setattr(in_memory, name, Mock(wraps=getattr(in_memory, name)))
    clock.advance(TIMEOUT.base_s + 0.01)
    assert requests.admissible() == ["a"]
    if is_saved:
        saved.set()
    assert not requests.has("a", 10, late=True)
    requests.admit(["a"], late=["a"])
    assert requests.ready("a", keys_of(range(10))) == 10
    spied: Any = in_memory
    assert spied.prefetch.call_count == spied.wait.call_count == is_saved
    requests.clear()


@pytest.mark.parametrize("policy", PrefetchPolicy)
def test_a_rank_that_has_not_heard_from_its_store_yet_is_waited_for(
    store: LocalStore, in_memory: LocalStore, policy: PrefetchPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it found nothing, no rank could load anything."""
    save(store, range(10))
    ranks = [unplanned(mine, HoldRule(policy), one_rank=False) for mine in (in_memory, store)]
    for rank in ranks:
        ask(rank, "a", keys_of(range(10)))
    with monkeypatch.context() as silent:
        silent.setattr(store, "progress", lambda _owner: Progress((), False, known=False))
        assert agree(ranks) == []
    assert agree(ranks) == ["a"]
    for rank in ranks:
        assert rank.ready("a", keys_of(range(10))) == 10
        rank.clear()


def test_what_is_never_saved_is_not_waited_for_longer_than_the_timeout(store: LocalStore, clock: Clock) -> None:
    requests = unplanned(store, TIMEOUT, one_rank=True)
    ask(requests, "a", keys_of(range(20, 25)), saved=threading.Event())
    clock.advance(TIMEOUT.base_s)
    assert requests.admissible() == []
    clock.advance(0.01)
    assert requests.admissible() == ["a"]
    requests.clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Owners that were waited for; after one wait in vain comes no other."""
    waits, wait = list[str](), LocalStore.wait

    def counted(store: LocalStore, owner: str, timeout_s: float, **until: bool) -> Any:
        waits.append(owner)
        return wait(store, owner, timeout_s, **until)

    monkeypatch.setattr(LocalStore, "wait", counted)
    return waits


def test_of_many_requests_at_once_one_is_waited_for_in_vain(
    store: LocalStore, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler goes on, and decides on the others in its next step."""
    monkeypatch.setattr(store, "progress", lambda owner: Progress((), False, known=False))

    def in_vain(owner: str, _timeout_s: float, *, until_known: bool) -> Progress:
        waits.append(owner)
        return store.progress(owner)

    monkeypatch.setattr(store, "wait", in_vain)
    requests = unplanned(store, HoldRule(), one_rank=True)
    for number in range(50):
        ask(requests, str(number), keys_of(range(10)))
    assert waits == ["0"]
    assert len(requests.held) == 50
    requests.clear()


def test_that_pages_must_be_read_holds_no_other_request(store: LocalStore, waits: list[str]) -> None:
    """It is known at once, and no wait in vain."""
    save(store, range(20, 25))
    requests = unplanned(store, HoldRule(), one_rank=True)
    for rid, pages in (("drive", range(10)), ("memory", range(20, 25)), ("nowhere", range(90, 95))):
        ask(requests, rid, keys_of(pages))
    assert waits == ["drive", "memory", "nowhere"]
    assert list(requests.held) == ["drive"]
    requests.clear()


def test_answers_to_many_requests_at_once_take_little_of_a_step(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come in time."""
    waits, step_s, answer_s = list[str](), step_waits.STEP_WAIT_S, 0.003

    def answered(owner: str, timeout_s: float, *, until_known: bool) -> Progress:
        waits.append(owner)
        clock.advance(min(answer_s, timeout_s))
        return Progress((), timeout_s >= answer_s, known=timeout_s >= answer_s)

    monkeypatch.setattr(store, "wait", answered)
    requests = unplanned(store, HoldRule(), one_rank=True)
    for first in (0, 100):
        began_s = clock.monotonic()
        for number in range(first, first + 100):
            ask(requests, str(number), keys_of(range(90, 95)))
        assert clock.monotonic() - began_s == pytest.approx(step_s)
        clock.advance(1.0)
        requests.new_step()
    assert len(waits) == 2 * -(-step_s // answer_s)
    requests.clear()


class Counted(str):
    """Counts its own uses as a key."""

    uses = 0

    def __hash__(self) -> int:
        Counted.uses += 1
        return super().__hash__()


@pytest.mark.parametrize("pages", [range(90, 95), range(10)])
def test_a_request_costs_the_same_however_many_are_queued(store: LocalStore, pages: range) -> None:
    def uses(count: int) -> int:
        requests = queue_of(store, HoldRule(), planner(1e10), one_rank=True)
        Counted.uses = 0
        for number in range(count):
            ask(requests, Counted(number), keys_of(pages))
        requests.admissible()
        counted = Counted.uses
        requests.clear()
        return counted

    assert uses(200) < 3 * uses(100)


def test_of_many_lookups_in_one_step_one_is_waited_for(
    store: LocalStore, disk: threading.Event, waits: list[str]
) -> None:
    """Those that ask without a wait find their pages at the next lookup."""
    requests = unplanned(store, HoldRule(), one_rank=False)
    rids = list(map(str, range(5)))
    assert [requests.ready(rid, keys_of(range(10))) for rid in rids] == [0] * len(rids)
    assert waits == ["0"]
    disk.set()
    for rid in rids:
        assert store.wait(rid, PATIENCE_S).done
    assert [requests.ready(rid, keys_of(range(10))) for rid in rids] == [10] * len(rids)
    assert requests.stats()["lookups_not_ahead"] == len(rids)
    requests.clear()


def test_with_other_ranks_even_that_waits_for_the_common_decision(store: LocalStore, disk: threading.Event) -> None:
    requests = unplanned(store, HoldRule(), one_rank=False)
    ask(requests, "nowhere", keys_of(range(90, 95)))
    assert list(requests.held) == ["nowhere"]
    assert requests.admissible() == ["nowhere"]
    requests.clear()


def test_ranks_hold_the_same_whichever_of_them_has_lost_its_store(store: LocalStore) -> None:
    """A rank that lets go for itself builds other batches than the rest: they wait for each other for good."""
    for loser in (0, 1):
        other = LocalStore(LAYOUT, bytes(16), 8 * LAYOUT.record_bytes, [])
        ranks = [unplanned(mine, HoldRule(), one_rank=False) for mine in (store, store)]
        ranks[loser] = unplanned(other, HoldRule(), one_rank=False)
        for rank in ranks:
            ask(rank, "before", keys_of(range(10)))
        ranks[loser].clear()
        for rank in ranks:
            ask(rank, "behind", keys_of(range(10)))
        assert list(ranks[0].held) == list(ranks[1].held) == ["before", "behind"]
        if loser == 0:
            assert agree(ranks) == ["before", "behind"], "there is nothing to wait for"
        else:
            assert agree(ranks) == []
            for rank in ranks:
                rank.forget("before")
            agree(ranks)
        assert list(ranks[0].held) == list(ranks[1].held)
        ranks[loser].attach(other)
        for rank in ranks:
            rank.clear()
        agree(ranks)
        assert not ranks[0].held
        assert not ranks[1].held
        other.close()


def test_a_lookup_may_begin_behind_or_before_what_was_asked_for(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    requests = unplanned(store, HoldRule(), one_rank=True)
    ask(requests, "a", keys_of(range(4, 10)))
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(6, 10))) == 4, "the device has more by now"
    assert requests.stats()["lookups_not_ahead"] == 0
    requests.ready("a", keys_of(range(10)))  # the device has lost some
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(10))) == 10
    assert requests.stats()["lookups_not_ahead"] == 1
    requests.forget("a")
    assert store.stats()["pages_leased"] == 0


def test_what_was_not_found_is_asked_for_more_and_more_rarely(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """Policies that sort by prefix look up all that wait, in every step."""
    disk.set()
    requests = unplanned(store, HoldRule(), one_rank=True)
    ask(requests, "a", keys_of(range(90, 95)))
    asked_at = []
    for step in range(1, 2001):
        clock.advance(0.01)
        before = requests.lookups_not_ahead
        assert requests.ready("a", keys_of(range(90, 95))) == 0
        if requests.lookups_not_ahead > before:
            asked_at.append(step / 100)
    assert asked_at == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], rel=0.05)
    save(store, range(90, 95))
    clock.advance(20.0)
    assert requests.ready("a", keys_of(range(90, 95))) == 5
    requests.clear()


def test_no_request_is_called_as_what_is_read_for_a_trial(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    requests = unplanned(store, HoldRule(), one_rank=False)
    ask(requests, "hcache-synthetic", keys_of(range(5)))
    wait_until_admissible(requests, "hcache-synthetic")
    slots = requests.ready("hcache-synthetic", keys_of(range(5)))
    store.prefetch(requests._meter.trial, [key_of(7)])
    assert int(str(store.stats()["pages_leased"])) >= slots == 5
    requests.clear()


def test_nothing_is_held_while_there_is_no_store() -> None:
    requests = unplanned(NoStore(LAYOUT, "its process has ended", lost=True), HoldRule(), one_rank=True)
    ask(requests, "a", keys_of(range(3)))
    assert not requests.held
    assert requests.ready("a", keys_of(range(3))) == 0
    requests.forget("a")
