"""What a planner makes of queued requests: how long each waits, and what is learned of drives meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sglang_hcache.planner.rate_tracker import PROBE_EVERY, PROBE_PAGES
from sglang_hcache.queueing import prefetch_queue
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.storage.contract import Progress
from sglang_hcache.storage.fetch import Fetches, Read
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.store import READ_THREADS, LocalStore
from sglang_hcache.storage.stripe import PageFiles, Place
from tests.hcache.conftest import Clock, until
from tests.hcache.queues import TIMEOUT, ask, planner, queue_of, timed, wait_until_admissible
from tests.prefetch.clients import PATIENCE_S
from tests.storage.pages import LAYOUT, key_of, keys_of, save

pytestmark = pytest.mark.usefixtures("clock")


def test_what_is_asked_for_again_is_planned_for_the_same_prompt(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, believes = set[Prompt](), planner(ssd_bytes_per_s=1e10)

    def planned(pages: int, prompt: Prompt, **_: object) -> int:
        prompts.add(prompt)
        return pages

    monkeypatch.setattr(believes, "pages", planned)
    requests = queue_of(store, HoldRule(), believes, one_rank=True)
    requests.queued("a", keys_of(range(4, 10)), Prompt(new_tokens=999, device_tokens=4 * LAYOUT.page_tokens))
    disk.set()
    assert store.wait("a", PATIENCE_S).done
    requests.ready("a", keys_of(range(10)))  # the device has lost some
    assert store.wait("a", PATIENCE_S).done
    assert requests.ready("a", keys_of(range(10))) == 10
    assert prompts == {Prompt(new_tokens=999, device_tokens=0)}
    requests.clear()


def test_pages_that_are_not_worth_it_are_not_waited_for(store: LocalStore) -> None:
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e3), one_rank=True)
    ask(requests, "a", keys_of(range(10)))
    assert requests.admissible() == ["a"]
    requests.admit(["a"])
    assert store.progress("a").done, "the rest is not read"
    assert requests.stats()["requests_admitted_late"] == 0


def test_a_drive_that_seems_too_slow_is_tried_while_nobody_waits(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    believes = planner(ssd_bytes_per_s=1e3)
    requests = queue_of(store, HoldRule(), believes, one_rank=False)
    for _ in range(PROBE_EVERY):
        assert believes.stats()["slower_ssd"] == 1.0
        ask(requests, "a", keys_of(range(10)))
        assert requests.admissible() == ["a"]
        requests.admit(["a"])
        requests.forget("a")
    clock.advance(0.1)
    disk.set()
    assert store.wait(requests._meter.trial, PATIENCE_S).done
    assert requests.admissible() == []
    assert float(str(believes.stats()["slower_ssd"])) < 0.1
    assert store.stats()["pages_leased"] == 0


def test_pages_that_are_worth_it_are_waited_for(store: LocalStore, disk: threading.Event) -> None:
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e10), one_rank=True)
    ask(requests, "a", keys_of(range(10)))
    assert requests.admissible() == []
    disk.set()
    wait_until_admissible(requests, "a")
    assert requests.ready("a", keys_of(range(10))) == 10


def test_pages_that_nobody_has_stored_are_not_waited_for(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are prefilled, whatever is read; and the drives are not busy with them for those behind."""
    asked, believes = list[tuple[int, int, dict[str, Any]]](), planner(ssd_bytes_per_s=1e10)

    def no_head_start(host_pages: int, lower_pages: int, _prompt: Prompt, **others: Any) -> int:
        asked.append((host_pages, lower_pages, others))
        return 0

    monkeypatch.setattr(believes, "head_start", no_head_start)
    requests = queue_of(store, HoldRule(), believes, one_rank=True)
    requests.queued("a", keys_of(range(30)), Prompt(new_tokens=1, device_tokens=0, divisible=True))
    requests.queued("b", keys_of(range(8)), Prompt(new_tokens=1, device_tokens=0, divisible=True))
    assert requests.admissible(idle=True) == []
    assert [(lower, others["missing_pages"], others["queued_pages"]) for _, lower, others in asked] == [
        (10, 20, 0),
        (8, 0, 2),
    ]
    disk.set()
    wait_until_admissible(requests, "a")
    assert requests.ready("a", keys_of(range(30))) == 10
    requests.clear()


def test_reads_are_timed_however_late_their_end_is_seen(
    store: LocalStore, disk: threading.Event, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that looks again long after the pages came must not take its own time for the drive's."""
    believes = planner(ssd_bytes_per_s=1e10)
    told = timed(believes, monkeypatch)
    requests = queue_of(store, HoldRule(), believes, one_rank=False)
    ask(requests, "a", keys_of(range(10)))
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
    requests = queue_of(store, HoldRule(), believes, one_rank=False)
    for _ in range(PROBE_EVERY):
        store.drop_host()
        disk.clear()
        ask(requests, "a", keys_of(range(pages)))
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
    requests = queue_of(store, HoldRule(), believes, one_rank=False)
    for _ in range(PROBE_EVERY):
        ask(requests, "a", keys_of(range(30)))
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

    def recorded(fetches: Fetches, volume: PageFiles) -> Read | None:
        if read := take(fetches, volume):
            begun.append(read.key)
        return read

    save(store, range(10, 30))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    monkeypatch.setattr(Fetches, "take_read", recorded)
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e5), one_rank=False)
    ask(requests, "long", keys_of(range(20)))
    ask(requests, "short", keys_of([20, 21]))
    disk.set()
    assert store.wait("long", PATIENCE_S).done
    assert store.wait("short", PATIENCE_S).done
    assert begun.index(key_of(21)) <= READ_THREADS + 1, "as soon as readers were free"
    assert len(begun) == 22
    requests.clear()


def test_a_request_waits_while_the_engine_works_for_others(store: LocalStore, disk: threading.Event) -> None:
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e5), one_rank=False)
    ask(requests, "alone", keys_of(range(5)))
    assert requests.admissible() == ["alone"], "the drive is not worth it"
    requests.admit(["alone"])
    requests.forget("alone")
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    ask(requests, "behind", keys_of(range(5)))
    assert requests.admissible() == ["before"]
    assert requests.admissible() == ["before"]
    requests.clear()


def test_who_comes_first_by_priority_waits_for_nobody(store: LocalStore, disk: threading.Event) -> None:
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e5), one_rank=False)
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    requests.queued("first", keys_of(range(5)), Prompt(new_tokens=1, device_tokens=0, turn=-1))
    assert requests.admissible() == ["first", "before"], "the drive is not worth it"
    requests.clear()


def test_so_it_does_where_what_is_before_it_was_not_held(store: LocalStore, disk: threading.Event) -> None:
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e5), one_rank=True)
    requests.queued("before", keys_of([90]), Prompt(new_tokens=100_000, device_tokens=0))
    ask(requests, "behind", keys_of(range(5)))
    assert requests.admissible() == []
    assert list(requests.held) == ["behind"]
    requests.clear()


def test_nothing_is_planned_before_it_is_known_what_is_in_memory(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be let go, as if all of its pages were on a drive that is not worth it."""
    save(store, range(20, 30))
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e3), one_rank=False)
    ask(requests, "a", keys_of(range(20, 30)))
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
    requests = queue_of(store, HoldRule(), planner(ssd_bytes_per_s=1e3), one_rank=False)
    ask(requests, "a", keys_of(range(10)))
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
    requests = queue_of(store, HoldRule(), plans, in_whole=in_whole, one_rank=False)
    ask(requests, "a", keys_of(range(10)))
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
    requests = queue_of(store, HoldRule(), plans, one_rank=False)
    prompt = Prompt(new_tokens=8, device_tokens=0)
    requests.queued("nowhere", keys_of(range(90, 95)), prompt)
    wait_until_admissible(requests, "nowhere")
    requests.admit(["nowhere"])

    def behind(rid: str, first: int) -> int:
        ask(requests, rid, keys_of(range(first, first + 10)))
        assert requests.admissible() == []
        return queued[-1]

    assert behind("read", 0) == 0, "what is nowhere is not read"
    assert start_s[-1] == pytest.approx(plans.pass_s(0, prompt, missing_pages=5)[0]), "it is prefilled"
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


@pytest.mark.parametrize(
    ("tokens_before", "expected"), [(100, [0, 10, 5, 4]), (100_000, [0, 10, 10, 10])], ids=["short", "long"]
)
def test_what_cannot_be_read_in_time_is_not_waited_for(
    store: LocalStore, tokens_before: int, expected: list[int]
) -> None:
    """Nor taken to be restored, by those behind it. The time is its own, or that of the engine for those ahead."""
    plans = planner(ssd_bytes_per_s=1e7)
    rule = HoldRule(PrefetchPolicy.TIMEOUT, base_s=(plans.read_s(15) + plans.read_s(16)) / 2, per_ki_token_s=0.0)
    save(store, range(10, 30))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    requests = queue_of(store, rule, plans, one_rank=False)
    requests.queued("before", keys_of([90]), Prompt(new_tokens=tokens_before, device_tokens=0))
    for rid, first in (("first", 0), ("second", 10), ("third", 20)):
        ask(requests, rid, keys_of(range(first, first + 10)))
        assert store.progress(rid).known
    assert requests.admissible() == ["before"]
    enough = [request.wait.enough for request in requests._requests.values() if request.wait is not None]
    assert enough == expected
    requests.clear()


def test_a_slow_drive_is_noticed_where_several_wait_for_it(
    store: LocalStore, disk: threading.Event, clock: Clock
) -> None:
    """It is what makes them wait together."""
    believes = planner(ssd_bytes_per_s=1e10)
    requests = queue_of(store, HoldRule(), believes, one_rank=False)
    ask(requests, "a", keys_of(range(5)))
    ask(requests, "b", keys_of(range(5, 10)))
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
    requests = queue_of(store, TIMEOUT, believes, one_rank=False)
    waits = []
    for _ in range(4):
        ask(requests, "a", keys_of(range(10)))
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
    requests = queue_of(store, HoldRule(), plans, one_rank=True)
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
    requests = queue_of(store, HoldRule(), believes, one_rank=True)
    ask(requests, "a", keys_of(range(12)))
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
    ask(requests, "never looked up", keys_of(range(12)))
    requests.forget("never looked up")
    ask(requests, "left out", keys_of(range(12)))
    requests.ready("left out", keys_of(range(12)))
    requests.put_off("left out")
    requests.forget("left out")
    assert believes.stats()["plans"] == 1
    assert requests.stats()["tokens_looked_up"] == stats["tokens_looked_up"]


def test_a_bus_that_seems_slow_is_tried_by_some_requests_however_often_each_is_looked_up(
    store: LocalStore, disk: threading.Event
) -> None:
    disk.set()
    believes = planner(ssd_bytes_per_s=1e10, bus_bytes_per_s=1e3)
    requests, keys = (
        queue_of(store, HoldRule(), believes, one_rank=True),
        keys_of(range(10)),
    )
    restored = []
    for number in range(PROBE_EVERY):
        ask(requests, str(number), keys)
        store.wait(str(number), PATIENCE_S)
        restored.append({requests.ready(str(number), keys) for _ in range(3 * PROBE_EVERY)})
        assert requests.tries_bus(str(number)) == (number == PROBE_EVERY - 1)
        requests.forget(str(number))
    assert restored == [{0}] * (PROBE_EVERY - 1) + [{PROBE_PAGES}]
    for rid in ("a", "b"):
        ask(requests, rid, keys)
        store.wait(rid, PATIENCE_S)
        assert requests.ready(rid, keys) == PROBE_PAGES
    believes.restored(1024, 1e3)
    assert [requests.ready(rid, keys) for rid in ("a", "b")] == [0, 0], "it has been tried"
    requests.clear()


def test_no_more_is_promised_than_is_worth_restoring(store: LocalStore, disk: threading.Event) -> None:
    disk.set()
    store.prefetch("warm", keys_of(range(10)))
    store.wait("warm", PATIENCE_S)
    for bus, expected in ((1e10, 10), (1e3, 0)):
        requests = queue_of(store, HoldRule(), planner(1e10, bus), one_rank=True)
        requests.queued("a", keys_of(range(10)), Prompt(new_tokens=8, device_tokens=0))
        assert requests.ready("a", keys_of(range(10))) == expected
        requests.clear()
    store.release("warm")
