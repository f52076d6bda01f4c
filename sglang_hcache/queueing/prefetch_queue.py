"""Prefetch ahead of scheduling: what each queued request needs is on its way before the scheduler asks for it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from sglang_hcache.config import PREFETCH_TIMEOUT_S
from sglang_hcache.metrics import Durations
from sglang_hcache.queueing.head_start import HeadStart
from sglang_hcache.queueing.load_planner import LoadPlanner, Prompt
from sglang_hcache.queueing.read_meter import MEASURED_PAGES, ReadMeter
from sglang_hcache.storage.contract import ChunkStore, as_priority
from sglang_hcache.storage.store import READ_THREADS

ANSWER_WAIT_S = 0.01  # for what is in memory, or nowhere, before the request is held for a step, which takes longer
KNOWN_WAIT_S = 0.1  # what is not known after this to be in memory is taken to be on drives
LOOKUP_WAIT_S = 0.02  # a lookup may wait this long for pages that nobody asked for before
STEP_WAIT_S = 0.02  # all waits of a step together: requests that run are not kept waiting by many that come at once
NO_WAIT_S = 0.02  # after a wait in vain
RETRY_S = 0.5  # a lookup that found nothing may be tried again after this, and after half of the time waited
LONGEST_WAIT_S = 60.0  # a disk that hangs must not hang a request


class PrefetchPolicy(StrEnum):
    """How long a request is held while its pages are on the way; the names are SGLang's."""

    BEST_EFFORT = "best_effort"  # until it is known which are in memory: it takes these
    WAIT_COMPLETE = "wait_complete"  # until those are there that the planner finds worth it, or all without a planner
    TIMEOUT = "timeout"  # the same, for a time that grows with their number at most


@dataclass(frozen=True)
class HoldRule:
    """When a held request is admitted."""

    policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    base_s: float = PREFETCH_TIMEOUT_S[0]
    per_ki_token_s: float = PREFETCH_TIMEOUT_S[1]  # for each 1,024 tokens on the way

    def longest_s(self, tokens: int) -> float:
        """How long a request may be held for the pages of so many tokens."""
        if self.policy is PrefetchPolicy.TIMEOUT:
            return min(self.base_s + self.per_ki_token_s * tokens / 1024, max(self.base_s, LONGEST_WAIT_S))
        return LONGEST_WAIT_S


@dataclass(frozen=True)
class _Wait:
    """What a held request waits for; planned when it is first looked at."""

    enough: int  # pages
    pass_s: float  # of the engine, from then on
    tries: bool  # to see how fast drives are: what is being read when it waits no more is timed


class _HeadStartOf(Enum):
    """A held request has one at most."""

    NOT_THOUGHT_OF = auto()
    UNDER_WAY = auto()
    NO_MORE = auto()


@dataclass
class _Request:
    keys: tuple[bytes, ...]
    place: dict[bytes, int]  # of each key in `keys`
    prompt: Prompt
    arrived_at: float  # by the clock that is the same for all who share a prefetcher
    asked_at: float  # monotonic
    waits_until: float  # monotonic; reading goes on as long as the request is queued
    late: bool = False  # its time was up when it was admissible, on the rank that decides
    saved: threading.Event | None = None  # retracted: when its pages are there; to be asked for again by then
    there: int = 0  # pages, when it was last looked at
    wait: _Wait | None = None
    head_start: _HeadStartOf = _HeadStartOf.NOT_THOUGHT_OF
    looked_up: int = 0  # pages, by the last lookup
    found: int = 0  # of these
    planned: int | None = None  # of these, to be restored
    counted: bool = False  # as a plan that could use host memory
    tries_bus: bool = False


class _Ahead:
    """What is done for the requests before one, which are added in that order."""

    def __init__(self) -> None:
        self.pass_s = 0.0  # of the engine
        self._awaited: set[bytes] = set()
        self._added: list[_Request] = []

    def add(self, request: _Request, *, held: bool) -> None:
        if request.wait is not None:
            self.pass_s += request.wait.pass_s
            if held:
                self._added.append(request)

    def pages_read_before(self, keys: Sequence[bytes]) -> int:
        """Those that are awaited, and are not among `keys` themselves."""
        for request in self._added:
            assert request.wait is not None
            self._awaited.update(request.keys[request.there : request.wait.enough])
        self._added.clear()
        return len(self._awaited) - sum(map(self._awaited.__contains__, keys))


class PrefetchQueue:
    """What requests have asked for, by request id; for the scheduler's thread.

    Which requests are held is decided by one rank (`admissible`) and carried out by all (`admit`), so that all ranks
    build the same batches. `queued` holds the same requests everywhere, as all ranks queue the same ones, whatever
    their stores answer; only what all ranks do at once (`admit`, `forget`) ends a hold, never the loss of a store.
    """

    def __init__(
        self,
        store: ChunkStore,
        rule: HoldRule,
        page_tokens: int,
        *,
        alone: bool,
        planner: LoadPlanner | None = None,
        reads_at_once: int = READ_THREADS,
        in_whole: bool = False,
    ) -> None:
        """`alone`: there is no other rank to agree with. Without a planner all of a hit is waited for, and loaded.

        `reads_at_once`: pages that are read at the same time, on all drives. `in_whole`: of a part of a hit it may be
        that nothing can be loaded.
        """
        self._store = store
        self._planner = planner
        self._alone = alone
        self._rule = rule
        self._page_tokens = page_tokens
        self._reads_at_once = reads_at_once
        self._in_whole = in_whole
        self._requests: dict[str, _Request] = {}
        self._held: dict[str, float] = {}  # request id → when its pages were asked for
        self._start: HeadStart | None = None  # to begin in the next step
        self.head_starts = self.pages_ahead = 0
        self.requests_held = self.requests_admitted_late = 0
        self.lookups_not_ahead = self.pages_looked_up = self.pages_found = 0
        self.requests_held_s = 0.0
        self.holds = Durations()
        self._trial = f"trial {uuid.uuid4()}"  # an owner beside requests, whose ids their senders may choose
        self._trying = False  # it has something read; one trial at a time
        self._trial_until = 0.0  # monotonic
        self._meter = ReadMeter(store, reads_at_once)
        self._next_wait_at = 0.0  # monotonic
        self._may_wait_s = STEP_WAIT_S  # in this step

    def attach(self, store: ChunkStore) -> None:
        """The store has been replaced: what was asked of the former one is void, and not waited for."""
        self._store, self._trying = store, False
        self._meter = ReadMeter(store, self._reads_at_once)
        self._requests.clear()

    def new_step(self) -> None:
        """The scheduler looks for new requests."""
        self._may_wait_s = STEP_WAIT_S

    def queued(
        self, rid: str, keys: Sequence[bytes], prompt: Prompt | None = None, *, saved: threading.Event | None = None
    ) -> None:
        """A request has been queued whose pages from some point on, `keys`, are not on the device.

        saved: it was retracted, and some of them are on their way into the store: set once they are there. Another
        rank may save them for this one, too; by the time that the request is admitted, that has been done.
        """
        if self._alone and saved is not None and saved.is_set():
            saved = None
        request = self._ask(rid, keys, prompt)
        request.saved = saved
        if self._alone and saved is None and self._there_within(rid, ANSWER_WAIT_S, until_known=True):
            if self._planner is not None:
                request.there = len(self._store.progress(rid).slots)
                request.wait = self._plan_wait(self._planner, request, _Ahead(), done=True)
            return
        self._held[rid] = request.asked_at
        self._measure(rid, request)
        self.requests_held += 1

    @property
    def held(self) -> Collection[str]:
        return self._held.keys()

    def admissible(self, *, idle: bool = False) -> list[str]:
        """Held requests that need not wait any longer; `idle`: the engine has nothing to do but to wait for them."""
        now = time.monotonic()
        free = [rid for rid in self._held if rid not in self._requests]
        ahead = _Ahead()
        for rid, request in sorted(self._requests.items(), key=lambda item: item[1].prompt.turn):
            held = rid in self._held
            has_enough = held and self._has_enough(rid, request, ahead, idle=idle and not free)
            request.late = held and now > request.waits_until
            if has_enough or request.late:
                held = False
                free.append(rid)
                self.requests_admitted_late += not has_enough
            ahead.add(request, held=held)
        if self._planner is not None:
            for rid in free:
                self._try_reading(self._requests.get(rid))
            self._meter.look(self._planner, leaving=free)
            if self._trying and (now > self._trial_until or self._store.progress(self._trial).done):
                self._end_trial()
        return free

    def still_read(self, rids: Iterable[str]) -> frozenset[str]:
        """Those of `admissible` of whom more pages may be worth it: it was not asked, or their time was up."""
        return frozenset(rid for rid in rids if (request := self._requests.get(rid)) is None or request.late)

    def head_start(self) -> HeadStart | None:
        """What the engine, if it is idle, should do for a request that is not admissible yet."""
        start, self._start = self._start, None
        return start

    def begin_head_start(self, start: HeadStart, keys: Sequence[bytes], prompt: Prompt) -> None:
        """On all ranks. `keys` and `prompt`: of the request that is made for it, and takes what is in memory."""
        self.head_starts += 1
        self.pages_ahead += start.pages
        if keys:
            self._ask(start.head, keys, prompt)
            self._store.cut(start.head)
        if (request := self._requests.get(start.rid)) is not None:
            behind = replace(request.prompt, device_tokens=start.tokens)
            rest = self._ask(
                start.rid,
                request.keys[start.pages :],
                behind,
                arrived_at=request.arrived_at,
                longest_s=LONGEST_WAIT_S,
            )
            rest.head_start = _HeadStartOf.UNDER_WAY
            self._measure(start.rid, rest, none_there=True)
        if keys:
            self._store.wait(start.head, ANSWER_WAIT_S)

    def head_start_over(self, rid: str) -> None:
        """On all ranks, any number of times. From now on it is held for its pages, as any other request."""
        request = self._requests.get(rid)
        if request is None or request.head_start is not _HeadStartOf.UNDER_WAY:
            return
        request.head_start = _HeadStartOf.NO_MORE
        request.waits_until = time.monotonic() + self._longest_s(len(request.keys))

    def admit(self, rids: Iterable[str], *, still_read: Collection[str] = ()) -> None:
        """Hold these no more. What is still being read for some of them may be there when it is their turn."""
        now = time.monotonic()
        for rid in rids:
            if (request := self._requests.get(rid)) is not None and request.saved is not None:
                self._ask_again(rid, request)
                self._there_within(rid, ANSWER_WAIT_S, until_known=True)
            if (since := self._held.pop(rid, None)) is not None:
                self.requests_held_s += now - since
                self.holds.append(now - since)
                has_enough = rid in self._requests and rid not in still_read
                if has_enough and self._planner is not None and not self._takes_what_is_there:
                    self._meter.end(rid)
                    self._store.cut(rid)  # what is missing was not worth waiting for

    def ready(self, rid: str, keys: Sequence[bytes], *, queued_pages: int = 0, least_pages: int = 0) -> int:
        """How many leading pages of `keys` to load, all in memory, and `leased` until `forget`.

        queued_pages: of loads that the bus carries first. least_pages: to be loaded, be it worth it or not.
        """
        if not (found := len(self.leased(rid, keys))) and self._worth_asking_again(rid, keys[0]):
            self.lookups_not_ahead += 1
            former = self._requests.get(rid)
            if former is None:
                self._ask(rid, keys)
            else:
                self._ask(rid, keys, self._prompt(former, keys), arrived_at=former.arrived_at)
            self._there_within(rid, LOOKUP_WAIT_S)
            found = len(self.leased(rid, keys))
        request = self._requests[rid]
        request.looked_up, request.found, request.planned = len(keys), found, None
        if not found or self._planner is None:
            return found
        to_try = self._planner.least_pages(found, again=request.counted)
        request.counted, request.tries_bus = True, to_try > 0
        request.planned = self._planner.pages(
            found,
            self._prompt(request, keys),
            missing_pages=len(keys) - found,
            queued_pages=queued_pages,
            least_pages=max(to_try, min(least_pages, found)),
        )
        return request.planned

    def tries_bus(self, rid: str) -> bool:
        """Whether what `ready` said is to be loaded to see how fast that is, be it worth it or not."""
        request = self._requests.get(rid)
        return request is not None and request.tries_bus

    def leased(self, rid: str, keys: Sequence[bytes]) -> list[int]:
        """Slots of the leading pages of `keys`; of no fewer than `ready` said, unless it was asked again since."""
        request = self._requests.get(rid)
        if request is None or (start := request.place.get(keys[0])) is None:
            return []
        return list(self._store.progress(rid).slots[start : start + len(keys)])

    def forget(self, rid: str) -> None:
        """The request has been served, or is gone."""
        self._held.pop(rid, None)
        self._meter.end(rid)
        if (request := self._requests.pop(rid, None)) is not None:
            self.pages_looked_up += request.looked_up
            self.pages_found += request.found
            if self._planner is not None and request.planned is not None:
                self._planner.served(left_out=request.found - request.planned)
            self._store.release(rid)

    def clear(self) -> None:
        """Give back all that is leased; what is held is admissible for want of something to wait for."""
        for rid in self._requests:
            self._store.release(rid)
        self._requests.clear()
        self._end_trial()

    def stats(self) -> dict[str, int | float]:
        return {
            "requests_held": self.requests_held,
            "requests_held_now": len(self._held),
            "requests_admitted_late": self.requests_admitted_late,
            "requests_held_s": round(self.requests_held_s, 3),
            "lookups_not_ahead": self.lookups_not_ahead,
            "head_starts": self.head_starts,
            "tokens_ahead": self.pages_ahead * self._page_tokens,
            "tokens_looked_up": self.pages_looked_up * self._page_tokens,
            "tokens_found": self.pages_found * self._page_tokens,
        }

    def _has_enough(self, rid: str, request: _Request, ahead: _Ahead, *, idle: bool) -> bool:
        """Whether all of its pages are there, or so many that it is not worth waiting for more, or it may not."""
        if request.head_start is _HeadStartOf.UNDER_WAY or self._is_saved_only_now(rid, request):
            return False
        slots, done, known = self._store.progress(rid)
        known = done or known or time.monotonic() - request.asked_at > KNOWN_WAIT_S
        if self._takes_what_is_there:
            return known
        if self._planner is None:
            return done
        request.there = len(slots)
        if request.wait is None and known:
            request.wait = self._plan_wait(self._planner, request, ahead, done=done)
        if (wait := request.wait) is None:
            return False
        if idle and not done and self._plan_head_start(self._planner, rid, request, ahead):
            return False
        return done or request.there >= wait.enough

    @property
    def _takes_what_is_there(self) -> bool:
        return self._rule.policy is PrefetchPolicy.BEST_EFFORT

    def _measure(self, rid: str, request: _Request, *, none_there: bool = False) -> None:
        self._meter.begin(
            rid, request.keys, asked_at=request.asked_at, waits_until=request.waits_until, none_there=none_there
        )

    def _plan_head_start(self, planner: LoadPlanner, rid: str, request: _Request, ahead: _Ahead) -> bool:
        """Whether this one is to be begun in the next step. Each request is thought of once: later there is less."""
        thought_of = request.head_start is not _HeadStartOf.NOT_THOUGHT_OF
        if thought_of or self._start is not None or not request.prompt.divisible:
            return False
        request.head_start = _HeadStartOf.NO_MORE
        missing = len(request.keys) - request.there
        pages = planner.head_start(
            request.there,
            missing,
            request.prompt,
            queued_pages=ahead.pages_read_before(request.keys),
            begun_pages=min(missing, self._reads_at_once),
        )
        if pages:
            tokens = request.prompt.device_tokens + pages * self._page_tokens
            self._start = HeadStart(rid, f"{rid} head start {uuid.uuid4()}", pages, tokens)
        return pages > 0

    def _plan_wait(self, planner: LoadPlanner, request: _Request, ahead: _Ahead, *, done: bool) -> _Wait:
        """What to wait for, of what can be read while it may wait, or the engine works for those ahead of it.

        done: no more of its pages will come; then what is ahead changes nothing.
        """
        pages, there = len(request.keys), request.there
        queued_pages = lower_pages = 0
        if not done:
            queued_pages = ahead.pages_read_before(request.keys)
            left_s = max(request.waits_until - time.monotonic(), ahead.pass_s)
            lower_pages = min(pages - there, max(0, planner.pages_read_within(left_s) - queued_pages))
        enough = planner.worth_waiting_for(
            there,
            lower_pages,
            request.prompt,
            missing_pages=pages - there - lower_pages,
            start_s=ahead.pass_s,
            queued_pages=queued_pages,
        )
        if self._in_whole and 2 * enough > pages:
            enough = pages
        tries = not done and pages - there >= MEASURED_PAGES and enough < pages and planner.tries_drives()
        pass_s = planner.pass_s(enough, request.prompt, missing_pages=pages - enough)
        return _Wait(enough, pass_s, tries)

    def _try_reading(self, request: _Request | None) -> None:
        """Time what is being read for one that waits no more: that goes on in any case."""
        if request is None or request.wait is None or not request.wait.tries or self._trying:
            return
        self._trying = True
        keys = request.keys[request.there : request.there + max(self._reads_at_once, MEASURED_PAGES)]
        self._store.prefetch(self._trial, keys)
        now = time.monotonic()
        self._trial_until = now + LONGEST_WAIT_S
        self._meter.begin(self._trial, keys, asked_at=now, waits_until=self._trial_until, none_there=True)

    def _end_trial(self) -> None:
        self._trying = False
        self._meter.end(self._trial)
        self._store.release(self._trial)

    def _ask(
        self,
        rid: str,
        keys: Sequence[bytes],
        prompt: Prompt | None = None,
        *,
        arrived_at: float | None = None,
        longest_s: float | None = None,
    ) -> _Request:
        now = time.monotonic()
        request = self._requests[rid] = _Request(
            tuple(keys),
            {key: i for i, key in enumerate(keys)},
            prompt or Prompt(self._page_tokens, 0),
            time.time() if arrived_at is None else arrived_at,
            now,
            now + (self._longest_s(len(keys)) if longest_s is None else longest_s),
        )
        read_s = self._planner.read_s(1) if self._planner is not None else 0.0
        self._store.prefetch(
            rid,
            keys,
            priority=as_priority(arrived_at=request.arrived_at, turn=request.prompt.turn),
            page_priority=as_priority(read_s),
        )
        return request

    def _is_saved_only_now(self, rid: str, request: _Request) -> bool:
        """Or not even yet: what it was retracted with. It is asked for as soon as it is there."""
        if request.saved is not None and request.saved.is_set():
            self._ask_again(rid, request)
        return request.saved is not None

    def _ask_again(self, rid: str, request: _Request) -> None:
        """The answer to the next question is the last one: all has been saved that will be."""
        again = self._ask(rid, request.keys, request.prompt, arrived_at=request.arrived_at)
        self._measure(rid, again)

    def _longest_s(self, pages: int) -> float:
        return self._rule.longest_s(pages * self._page_tokens)

    def _prompt(self, request: _Request, keys: Sequence[bytes]) -> Prompt:
        """With pages `keys`, which end where those asked for end: by now the device has more of them, or fewer."""
        covered = request.prompt.device_tokens + len(request.keys) * self._page_tokens
        return replace(request.prompt, device_tokens=max(0, covered - len(keys) * self._page_tokens))

    def _there_within(self, rid: str, timeout_s: float, *, until_known: bool = False) -> bool:
        """Whether all is there, or known not to come.

        until_known: what must be read is not waited for.
        """
        began = time.monotonic()
        timeout_s = min(timeout_s, self._may_wait_s)
        if timeout_s <= 0 or began < self._next_wait_at:
            return self._store.progress(rid).done
        progress = self._store.wait(rid, timeout_s, until_known=until_known)
        now = time.monotonic()
        self._may_wait_s -= now - began
        if not (progress.known if until_known else progress.done):
            self._next_wait_at = now + NO_WAIT_S
        return progress.done

    def _worth_asking_again(self, rid: str, first: bytes) -> bool:
        """For pages from `first` on, of which none is there: the more rarely, the longer it has been waiting.

        Where requests are sorted by what they find, each of a long queue is looked up in every step.
        """
        request = self._requests.get(rid)
        if request is None or first not in request.place:
            return True
        waiting_s = time.time() - request.arrived_at
        return time.monotonic() - request.asked_at > max(RETRY_S, waiting_s / 2)
