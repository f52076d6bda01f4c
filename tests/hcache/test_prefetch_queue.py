"""Prefetch ahead of scheduling on a real store, whose disk can be held up."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sglang_hcache import prefetch_queue
from sglang_hcache.load_planner import LoadPlanner, Prompt
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.rate_tracker import PROBE_EVERY, PROBE_PAGES
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch_queue import HoldRule, PrefetchPolicy, PrefetchQueue
from sglang_hcache.storage.contract import Progress
from sglang_hcache.storage.fetch import Fetches, Read
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.store import READ_THREADS, LocalStore
from sglang_hcache.storage.stripe import Files, Place
from tests.hcache.conftest import PATIENCE_S, Clock, until
from tests.storage.pages import LAYOUT, holds, key_of, keys_of, save

pytestmark = pytest.mark.usefixtures("clock")

TIMEOUT = HoldRule(PrefetchPolicy.TIMEOUT, base_s=0.3, per_ki_token_s=0.0)


def wait_until_admissible(requests: PrefetchQueue, rid: str) -> None:
    until(lambda: rid in requests.admissible())


def test_a_request_is_held_until_its_pages_are_there(store: LocalStore, disk: threading.Event) -> None:
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    requests.queued("a", keys_of(range(10)))
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


@pytest.mark.parametrize("store_says_so", [True, False])
def test_never_longer_than_the_timeout(store: LocalStore, clock: Clock, store_says_so: bool) -> None:
    if not store_says_so:
        clock.stop_deadlines()
    requests = PrefetchQueue(store, TIMEOUT, LAYOUT.page_tokens, alone=True)
    requests.queued("a", keys_of(range(10)))
    clock.advance(TIMEOUT.base_s + (0.0 if store_says_so else prefetch_queue.LATE_S) - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    assert requests.ready("a", keys_of(range(10))) == 0
    assert requests.stats()["requests_admitted_late"] == (not store_says_so)
    requests.forget("a")


@pytest.mark.parametrize("alone", [True, False])
def test_best_effort_waits_for_no_drive_and_takes_what_is_there(
    store: LocalStore, disk: threading.Event, alone: bool
) -> None:
    save(store, range(20, 25))
    requests = PrefetchQueue(store, HoldRule(PrefetchPolicy.BEST_EFFORT), LAYOUT.page_tokens, alone=alone)
    requests.queued("memory", keys_of(range(20, 25)))
    requests.queued("file", keys_of(range(10)))
    assert [*requests.held] == (["file"] if alone else ["memory", "file"])
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
    requests = PrefetchQueue(store, HoldRule(PrefetchPolicy.BEST_EFFORT), LAYOUT.page_tokens, alone=True)
    monkeypatch.setattr(store, "progress", lambda owner: Progress((), False, known=False))
    requests.queued("a", keys_of(range(10)))
    clock.advance(prefetch_queue.KNOWN_WAIT_S - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    requests.clear()


def test_what_is_in_memory_or_nowhere_is_not_held_for(store: LocalStore, disk: threading.Event) -> None:
    save(store, range(20, 25))
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    requests.queued("memory", keys_of(range(20, 25)))
    requests.queued("nowhere", keys_of(range(90, 95)))
    assert not requests.held
    assert requests.ready("memory", keys_of(range(20, 25))) == 5
    assert requests.ready("nowhere", keys_of(range(90, 95))) == 0
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
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    for number in range(50):
        requests.queued(str(number), keys_of(range(10)))
    assert waits == ["0"]
    assert len(requests.held) == 50
    requests.clear()


def test_that_pages_must_be_read_holds_no_other_request(store: LocalStore, waits: list[str]) -> None:
    """It is known at once, and no wait in vain."""
    save(store, range(20, 25))
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    for rid, pages in (("drive", range(10)), ("memory", range(20, 25)), ("nowhere", range(90, 95))):
        requests.queued(rid, keys_of(pages))
    assert waits == ["drive", "memory", "nowhere"]
    assert list(requests.held) == ["drive"]
    requests.clear()


def test_answers_to_many_requests_at_once_take_little_of_a_step(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come in time."""
    waits, step_s, answer_s = list[str](), prefetch_queue.STEP_WAIT_S, 0.003

    def answered(owner: str, timeout_s: float, *, until_known: bool) -> Progress:
        waits.append(owner)
        clock.advance(min(answer_s, timeout_s))
        return Progress((), timeout_s >= answer_s, known=timeout_s >= answer_s)

    monkeypatch.setattr(store, "wait", answered)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    for first in (0, 100):
        began_s = clock.monotonic()
        for number in range(first, first + 100):
            requests.queued(str(number), keys_of(range(90, 95)))
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
        requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=planner(1e10))
        Counted.uses = 0
        for number in range(count):
            requests.queued(Counted(number), keys_of(pages))
        requests.admissible()
        counted = Counted.uses
        requests.clear()
        return counted

    assert uses(200) < 3 * uses(100)


def test_of_many_lookups_in_one_step_one_is_waited_for(
    store: LocalStore, disk: threading.Event, waits: list[str]
) -> None:
    """Those that ask without a wait find their pages at the next lookup."""
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False)
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
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False)
    requests.queued("nowhere", keys_of(range(90, 95)))
    assert list(requests.held) == ["nowhere"]
    assert requests.admissible() == ["nowhere"]
    requests.clear()


def test_ranks_hold_the_same_whichever_of_them_has_lost_its_store(store: LocalStore) -> None:
    """A rank that lets go for itself builds other batches than the rest: they wait for each other for good."""

    def step() -> list[str]:
        admissible = ranks[0].admissible()
        for rank in ranks:
            rank.admit(admissible)
        assert list(ranks[0].held) == list(ranks[1].held)
        return admissible

    for loser in (0, 1):
        other = LocalStore(LAYOUT, bytes(16), 8 * LAYOUT.record_bytes, [])
        ranks = [PrefetchQueue(mine, HoldRule(), LAYOUT.page_tokens, alone=False) for mine in (store, store)]
        ranks[loser] = PrefetchQueue(other, HoldRule(), LAYOUT.page_tokens, alone=False)
        for rank in ranks:
            rank.queued("before", keys_of(range(10)))
        ranks[loser].clear()
        for rank in ranks:
            rank.queued("behind", keys_of(range(10)))
        assert list(ranks[0].held) == list(ranks[1].held) == ["before", "behind"]
        if loser == 0:
            assert step() == ["before", "behind"], "there is nothing to wait for"
        else:
            assert step() == []
            for rank in ranks:
                rank.forget("before")
            step()
        ranks[loser].attach(other)
        for rank in ranks:
            rank.clear()
        step()
        assert not ranks[0].held
        other.close()


def test_a_lookup_may_begin_behind_or_before_what_was_asked_for(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    requests.queued("a", keys_of(range(4, 10)))
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(6, 10))) == 4, "the device has more by now"
    assert requests.stats()["lookups_not_ahead"] == 0
    requests.ready("a", keys_of(range(10)))  # the device has lost some
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(10))) == 10
    assert requests.stats()["lookups_not_ahead"] == 1
    requests.forget("a")
    assert store.stats()["pages_leased"] == 0


def test_what_is_asked_for_again_is_planned_for_the_same_prompt(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, believes = set[Prompt](), planner(ssd_bytes_per_s=1e10)

    def planned(pages: int, prompt: Prompt, **_: object) -> int:
        prompts.add(prompt)
        return pages

    monkeypatch.setattr(believes, "pages", planned)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=believes)
    requests.queued("a", keys_of(range(4, 10)), Prompt(new_tokens=999, device_tokens=4 * LAYOUT.page_tokens))
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    requests.ready("a", keys_of(range(10)))  # the device has lost some
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(10))) == 10
    assert prompts == {Prompt(new_tokens=999, device_tokens=0)}
    requests.clear()


def planner(ssd_bytes_per_s: float, bus_bytes_per_s: float = 1e10) -> LoadPlanner:
    shape = ModelShape("m", 4, 512, 8, 8, 64, 1408, 32000)
    machine = Machine("m", 1e11, 1e11, 1e11, 1e11, bus_bytes_per_s, ssd_bytes_per_s=ssd_bytes_per_s)
    return LoadPlanner(shape, machine, Layout(0, 4, 0), LAYOUT.page_tokens)


def test_pages_that_are_not_worth_it_are_not_waited_for(store: LocalStore) -> None:
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=planner(ssd_bytes_per_s=1e3))
    requests.queued("a", keys_of(range(10)))
    assert requests.admissible() == ["a"]
    requests.admit(["a"])
    assert store.progress("a").done, "the rest is not read"
    assert requests.stats()["requests_admitted_late"] == 0


def test_a_drive_that_seems_too_slow_is_tried_while_nobody_waits(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    believes = planner(ssd_bytes_per_s=1e3)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=believes)
    for _ in range(PROBE_EVERY):
        assert believes.stats()["slower_ssd"] == 1.0
        requests.queued("a", keys_of(range(10)))
        assert requests.admissible() == ["a"]
        requests.admit(["a"])
        requests.forget("a")
    clock.advance(0.1)
    disk.set()
    assert store.wait(requests._trial, PATIENCE_S).done
    assert requests.admissible() == []
    assert float(str(believes.stats()["slower_ssd"])) < 0.1
    assert store.stats()["pages_leased"] == 0


def test_pages_that_are_worth_it_are_waited_for(store: LocalStore, disk: threading.Event) -> None:
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=planner(ssd_bytes_per_s=1e10))
    requests.queued("a", keys_of(range(10)))
    assert requests.admissible() == []
    disk.set()
    wait_until_admissible(requests, "a")
    assert requests.ready("a", keys_of(range(10))) == 10


def timed(believes: LoadPlanner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Pages and seconds that it is told of."""
    told = list[tuple[int, float]]()
    monkeypatch.setattr(believes, "read", lambda pages, seconds, **_: told.append((pages, seconds)))
    return told


def test_reads_are_timed_however_late_their_end_is_seen(
    store: LocalStore, disk: threading.Event, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that looks again long after the pages came must not take its own time for the drive's."""
    believes = planner(ssd_bytes_per_s=1e10)
    told = timed(believes, monkeypatch)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=believes)
    requests.queued("a", keys_of(range(10)))
    clock.advance(0.1)
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    clock.advance(0.5)
    assert requests.admissible() == ["a"]
    (what,) = told
    assert what == pytest.approx((10, 0.1))
    requests.clear()


@pytest.mark.parametrize("pages", [6, 30])
def test_a_trial_takes_as_long_as_its_reads(
    store: LocalStore, disk: threading.Event, clock: Clock, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """What is being read already when it begins is part of it, so it is of hits that are short."""
    begun, turn, read, page_s = threading.Semaphore(0), threading.Lock(), Place.read, 0.02
    at_once = min(pages, READ_THREADS)

    def slow(place: Place, key: bytes, out: Record) -> bool:
        begun.release()
        sound = read(place, key, out)
        with turn:  # threads share what a drive delivers
            clock.advance(page_s)
        return sound

    save(store, range(10, pages))
    assert store.flush(PATIENCE_S)
    monkeypatch.setattr(Place, "read", slow)
    believes = planner(ssd_bytes_per_s=1e3)
    told = timed(believes, monkeypatch)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=believes)
    for _ in range(PROBE_EVERY):
        store.drop_host()
        disk.clear()
        requests.queued("a", keys_of(range(pages)))
        for _ in range(at_once):
            assert begun.acquire(timeout=PATIENCE_S)
        assert requests.admissible() == ["a"]
        requests.admit(["a"])
        requests.forget("a")
        disk.set()
        until(lambda: store.stats()["pages_reading"] == 0)
        requests.admissible()
    (what,) = told
    assert what == pytest.approx((at_once, at_once * page_s))


def test_what_is_tried_is_not_in_memory(store: LocalStore, disk: threading.Event) -> None:
    """The last pages of a prefix are there more often than the first: they were stored last."""
    save(store, range(10, 30))
    believes = planner(ssd_bytes_per_s=1e3)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=believes)
    for _ in range(PROBE_EVERY):
        requests.queued("a", keys_of(range(30)))
        assert requests.admissible() == ["a"]
        requests.admit(["a"])
        requests.forget("a")
    requests.admissible()
    assert believes.stats()["slower_ssd"] == 1.0, "nothing has been read"
    requests.clear()


def test_the_shortest_is_read_first(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, take = list[bytes](), Fetches.take_read

    def recorded(fetches: Fetches, volume: Files) -> Read | None:
        if read := take(fetches, volume):
            begun.append(read.key)
        return read

    save(store, range(10, 30))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    monkeypatch.setattr(Fetches, "take_read", recorded)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=planner(ssd_bytes_per_s=1e5))
    requests.queued("long", keys_of(range(20)))
    requests.queued("short", keys_of([20, 21]))
    disk.set()
    assert store.wait("long", PATIENCE_S).done
    assert store.wait("short", PATIENCE_S).done
    assert begun.index(key_of(21)) <= READ_THREADS + 1, "as soon as readers were free"
    assert len(begun) == 22
    requests.clear()


def test_a_request_waits_while_the_engine_works_for_others(store: LocalStore, disk: threading.Event) -> None:
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=planner(ssd_bytes_per_s=1e5))
    requests.queued("alone", keys_of(range(5)))
    assert requests.admissible() == ["alone"], "the drive is not worth it"
    requests.admit(["alone"])
    requests.forget("alone")
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    requests.queued("behind", keys_of(range(5)))
    assert requests.admissible() == ["before"]
    assert requests.admissible() == ["before"]
    requests.clear()


def test_so_it_does_where_what_is_before_it_was_not_held(store: LocalStore, disk: threading.Event) -> None:
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=planner(ssd_bytes_per_s=1e5))
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    requests.queued("behind", keys_of(range(5)))
    assert requests.admissible() == []
    assert list(requests.held) == ["behind"]
    requests.clear()


def test_nothing_is_planned_before_it_is_known_what_is_in_memory(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be let go, as if all of its pages were on a drive that is not worth it."""
    save(store, range(20, 30))
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=planner(ssd_bytes_per_s=1e3))
    requests.queued("a", keys_of(range(20, 30)))
    with monkeypatch.context() as unanswered:
        unanswered.setattr(store, "progress", lambda owner: Progress((), False, known=False))
        assert requests.admissible() == []
    assert requests.admissible() == ["a"]
    assert requests.ready("a", keys_of(range(20, 30))) == 10
    requests.clear()


def test_what_is_never_known_to_be_in_memory_is_taken_to_be_on_drives(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the prefetcher hangs, or other requests occupy all of its memory."""
    monkeypatch.setattr(store, "progress", lambda owner: Progress((), False, known=False))
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=planner(ssd_bytes_per_s=1e3))
    requests.queued("a", keys_of(range(10)))
    clock.advance(prefetch_queue.KNOWN_WAIT_S - 0.01)
    assert requests.admissible() == []
    clock.advance(0.02)
    assert requests.admissible() == ["a"]
    requests.clear()


@pytest.mark.parametrize(("in_whole", "worth", "waits"), [(False, 6, False), (True, 6, True), (True, 5, False)])
def test_what_can_be_loaded_in_whole_only_is_waited_for_if_most_is_worth_it(
    store: LocalStore,
    disk: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    in_whole: bool,
    worth: int,
    waits: bool,
) -> None:
    disk.set()
    plans, rest, read = planner(ssd_bytes_per_s=1e10), threading.Event(), Place.read
    monkeypatch.setattr(plans, "worth_waiting_for", lambda *_, **__: worth)
    first = keys_of(range(6))
    monkeypatch.setattr(Place, "read", lambda *args: (args[1] in first or rest.wait(PATIENCE_S)) and read(*args))
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=plans, in_whole=in_whole)
    requests.queued("a", keys_of(range(10)))
    until(lambda: len(store.progress("a").slots) == len(first))
    assert requests.admissible() == ([] if waits else ["a"])
    rest.set()
    wait_until_admissible(requests, "a")
    requests.clear()


def test_what_is_read_for_others_is_what_they_still_wait_for(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, reads, read = (
        planner(ssd_bytes_per_s=1e10),
        {key: threading.Event() for key in keys_of(range(30))},
        Place.read,
    )
    save(store, range(10, 30))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    worth, start_s, queued = plans.worth_waiting_for, list[float](), list[int]()

    def recorded(*args: Any, **kwargs: Any) -> int:
        start_s.append(kwargs["start_s"])
        queued.append(kwargs["queued_pages"])
        return worth(*args, **kwargs)

    monkeypatch.setattr(plans, "worth_waiting_for", recorded)
    monkeypatch.setattr(Place, "read", lambda *args: reads[args[1]].wait(PATIENCE_S) and read(*args))
    disk.set()
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=plans)
    prompt = Prompt(new_tokens=8, device_tokens=0)
    requests.queued("nowhere", keys_of(range(90, 95)), prompt)
    wait_until_admissible(requests, "nowhere")
    requests.admit(["nowhere"])

    def behind(rid: str, first: int) -> int:
        requests.queued(rid, keys_of(range(first, first + 10)))
        assert requests.admissible() == []
        return queued[-1]

    assert behind("read", 0) == 0, "what is nowhere is not read"
    assert start_s[-1] == pytest.approx(plans.pass_s(0, prompt, missing_pages=5)), "it is prefilled"
    assert behind("also read", 10) == 10
    for key in keys_of(range(READ_THREADS)):
        reads[key].set()
    until(lambda: len(store.progress("read").slots) == READ_THREADS)
    assert requests.admissible() == []
    assert behind("read at last", 20) == (10 - READ_THREADS) + 10
    assert behind("read with it", 20) == (10 - READ_THREADS) + 10, "its own pages are read for both"
    requests.admit(["read", "also read", "read at last", "read with it"])
    assert behind("later", 0) == 0, "they are still queued, but wait no more"
    for may_be_read in reads.values():
        may_be_read.set()
    requests.clear()


def test_what_cannot_be_read_before_the_deadline_is_not_waited_for(store: LocalStore) -> None:
    """Nor taken to be restored, by those behind it."""
    plans = planner(ssd_bytes_per_s=1e7)
    rule = HoldRule(PrefetchPolicy.TIMEOUT, base_s=(plans.read_s(15) + plans.read_s(16)) / 2, per_ki_token_s=0.0)
    save(store, range(10, 30))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    requests = PrefetchQueue(store, rule, LAYOUT.page_tokens, alone=False, planner=plans)
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    for rid, first in (("first", 0), ("second", 10), ("third", 20)):
        requests.queued(rid, keys_of(range(first, first + 10)))
        assert store.progress(rid).known
    assert requests.admissible() == ["before", "third"]
    enough = [request.wait.enough for request in requests._requests.values() if request.wait is not None]
    assert enough == [0, 10, 5, 0]
    requests.clear()


def test_a_slow_drive_is_noticed_where_several_wait_for_it(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """It is what makes them wait together."""
    believes = planner(ssd_bytes_per_s=1e10)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False, planner=believes)
    requests.queued("a", keys_of(range(5)))
    requests.queued("b", keys_of(range(5, 10)))
    assert requests.admissible() == []
    clock.advance(0.1)
    disk.set()
    for rid in ("a", "b"):
        assert store.wait(rid, PATIENCE_S).done
    assert requests.admissible() == ["a", "b"]
    assert float(str(believes.stats()["slower_ssd"])) > 1
    requests.clear()


def test_a_drive_that_hangs_is_not_waited_for_again_and_again(store: LocalStore, clock: Clock) -> None:
    """Even if nothing comes from it before the deadline."""
    believes = planner(ssd_bytes_per_s=1e10)
    requests = PrefetchQueue(store, TIMEOUT, LAYOUT.page_tokens, alone=False, planner=believes)
    waits = []
    for _ in range(4):
        requests.queued("a", keys_of(range(10)))
        waits.append(requests.admissible() == [])
        clock.advance(TIMEOUT.base_s + 0.01)
        assert requests.admissible() == ["a"]
        requests.admit(["a"])
        requests.forget("a")
        clock.advance(1.0)
    assert waits[0]
    assert not waits[-1]


def test_what_follows_the_pages_in_memory_is_prefilled_in_any_case(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, range(20, 25))
    plans, planned = planner(ssd_bytes_per_s=1e10), list[tuple[int, Prompt, int]]()

    def pages(host_pages: int, prompt: Prompt, *, missing_pages: int, **_: int) -> int:
        planned.append((host_pages, prompt, missing_pages))
        return host_pages

    monkeypatch.setattr(plans, "pages", pages)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=plans)
    tokens = LAYOUT.page_tokens
    requests.queued("a", keys_of(range(21, 30)), Prompt(new_tokens=8, device_tokens=100 * tokens))
    for first, device_pages in ((21, 100), (23, 102), (20, 99), (21, 100)):  # the device has more by now, or fewer
        requests.ready("a", keys_of(range(first, 30)))
        assert planned[-1] == (25 - first, Prompt(8, device_pages * tokens), 5)
    requests.clear()


def test_of_a_requests_lookups_the_last_one_counts(store: LocalStore, disk: threading.Event) -> None:
    """The scheduler looks again in each step in which the request waits."""
    disk.set()
    believes = planner(ssd_bytes_per_s=1e10, bus_bytes_per_s=1e3)
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=believes)
    requests.queued("a", keys_of(range(12)))
    store.wait("a", PATIENCE_S)
    for _ in range(3):
        assert requests.ready("a", keys_of(range(12))) == 0, "to restore them is not worth it"
    assert requests.stats()["tokens_looked_up"] == 0
    assert believes.stats()["plans"] == 0
    requests.forget("a")
    requests.forget("a")
    stats = requests.stats()
    assert (stats["tokens_looked_up"], stats["tokens_found"]) == (12 * LAYOUT.page_tokens, 10 * LAYOUT.page_tokens)
    assert (believes.stats()["plans"], believes.stats()["pages_left_to_prefill"]) == (1, 10)
    requests.queued("never looked up", keys_of(range(12)))
    requests.forget("never looked up")
    assert requests.stats()["tokens_looked_up"] == stats["tokens_looked_up"]


def test_a_bus_that_seems_slow_is_tried_by_some_requests_however_often_each_is_looked_up(
    store: LocalStore, disk: threading.Event
) -> None:
    disk.set()
    believes = planner(ssd_bytes_per_s=1e10, bus_bytes_per_s=1e3)
    requests, keys = (
        PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=believes),
        keys_of(range(10)),
    )
    restored = []
    for number in range(PROBE_EVERY):
        requests.queued(str(number), keys)
        store.wait(str(number), PATIENCE_S)
        restored.append({requests.ready(str(number), keys) for _ in range(3 * PROBE_EVERY)})
        assert requests.tries_bus(str(number)) == (number == PROBE_EVERY - 1)
        requests.forget(str(number))
    assert restored == [{0}] * (PROBE_EVERY - 1) + [{PROBE_PAGES}]
    for rid in ("a", "b"):
        requests.queued(rid, keys)
        store.wait(rid, PATIENCE_S)
        assert requests.ready(rid, keys) == PROBE_PAGES
    believes.restored(1024, 1e3)
    assert [requests.ready(rid, keys) for rid in ("a", "b")] == [0, 0], "it has been tried"
    requests.clear()


def test_what_was_not_found_is_asked_for_more_and_more_rarely(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """Policies that sort by prefix look up all that wait, in every step."""
    disk.set()
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True)
    requests.queued("a", keys_of(range(90, 95)))
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


def test_no_more_is_promised_than_is_worth_restoring(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    store.prefetch("warm", keys_of(range(10)))
    store.wait("warm", PATIENCE_S)
    for bus, expected in ((1e10, 10), (1e3, 0)):
        requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=True, planner=planner(1e10, bus))
        requests.queued("a", keys_of(range(10)), Prompt(new_tokens=8, device_tokens=0))
        assert requests.ready("a", keys_of(range(10))) == expected
        requests.clear()
    store.release("warm")


def test_no_request_is_called_as_what_is_read_for_a_trial(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    requests = PrefetchQueue(store, HoldRule(), LAYOUT.page_tokens, alone=False)
    requests.queued("hcache-synthetic", keys_of(range(5)))
    wait_until_admissible(requests, "hcache-synthetic")
    slots = requests.ready("hcache-synthetic", keys_of(range(5)))
    store.prefetch(requests._trial, [key_of(7)])
    assert int(str(store.stats()["pages_leased"])) >= slots == 5
    requests.clear()


def test_nothing_is_held_while_there_is_no_store() -> None:
    requests = PrefetchQueue(
        NoStore(LAYOUT, "its process has ended", lost=True), HoldRule(), LAYOUT.page_tokens, alone=True
    )
    requests.queued("a", keys_of(range(3)))
    assert not requests.held
    assert requests.ready("a", keys_of(range(3))) == 0
    requests.forget("a")
