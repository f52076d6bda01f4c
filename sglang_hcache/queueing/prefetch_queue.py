"""Prefetch ahead of scheduling: what each queued request needs is on its way before the scheduler asks for it."""

from __future__ import annotations

import math
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from sglang_hcache.metrics import Durations
from sglang_hcache.queueing.head_start import HeadStart
from sglang_hcache.queueing.hold_rule import LONGEST_WAIT_S, HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import Planner, Prompt
from sglang_hcache.queueing.read_meter import ReadMeter
from sglang_hcache.queueing.request import HeadStartState, Request
from sglang_hcache.queueing.step_waits import StepWaits
from sglang_hcache.queueing.wait_plan import Ahead, head_start_pages, plan_wait
from sglang_hcache.storage.contract import ChunkStore, Progress, as_priority
from sglang_hcache.storage.store import READ_THREADS

ANSWER_WAIT_S = 0.01  # for the answer that all is in memory or nowhere; a hold would last a step, which is longer
KNOWN_WAIT_S = 0.1  # pages that are not known by then to be in memory are taken to be on drives
ASK_AGAIN_S = 0.02  # between two questions for what another rank saves
OTHERS_WAIT_S = 0.1  # at least, for ranks that are slower; as long again as this one has waited, if that is more
LOOKUP_WAIT_S = 0.02  # a lookup may wait this long for pages that nobody asked for before


@dataclass(frozen=True)
class Admit:
    """These requests are held no more, from this step on, if all ranks have as many of their pages."""

    pages: dict[str, int]  # by request
    late: frozenset[str]  # of these, those that go in any case; their pages are read until they are scheduled


class PrefetchQueue:
    """What requests have asked for, by request id; for the scheduler's thread.

    One rank proposes whom to hold no longer (`propose`); all agree on it (`has`) and carry it out (`admit`), so that
    all build the same batches. `queued` holds the same requests everywhere, as all ranks queue the same ones,
    whatever their stores answer; only what all ranks do at once (`admit`, `forget`) ends a hold, never the loss of a
    store.
    """

    def __init__(
        self,
        store: ChunkStore,
        rule: HoldRule,
        page_tokens: int,
        *,
        one_rank: bool,
        planner: Planner,
        others_save: bool = False,
        reads_at_once: int = READ_THREADS,
        in_whole: bool = False,
    ) -> None:
        """`one_rank`: there is no other to agree with. `others_save`: another rank saves the pages of this one.

        `reads_at_once`: pages that are read at the same time, on all drives. `in_whole`: a part of a hit may be of no
        use, as a load must end where pages have their windowed layers.
        """
        self._store = store
        self._planner = planner
        self._one_rank = one_rank
        self._others_save = others_save
        self._rule = rule
        self._page_tokens = page_tokens
        self._reads_at_once = reads_at_once
        self._in_whole = in_whole
        self._takes_what_is_there = rule.policy is PrefetchPolicy.BEST_EFFORT
        self._requests: dict[str, Request] = {}
        self._held: dict[str, float] = {}  # request id → when its pages were asked for
        self._start: HeadStart | None = None  # to begin in the next step
        self.head_starts = self.pages_ahead = 0
        self.requests_held = self.requests_admitted_late = 0
        self.lookups_not_ahead = self.pages_looked_up = self.pages_found = 0
        self.requests_held_s = 0.0
        self.holds = Durations()
        self._meter = ReadMeter(store, reads_at_once)
        self._waits = StepWaits()
        self._ahead = Ahead()

    def attach(self, store: ChunkStore) -> None:
        """The store has been replaced: what was asked of the former one is void, and not waited for."""
        self._store = store
        self._meter = ReadMeter(store, self._reads_at_once)
        self._ahead = Ahead()
        self._requests.clear()

    def new_step(self) -> None:
        """The scheduler looks for new requests."""
        self._waits.new_step()

    def queued(
        self, rid: str, keys: Sequence[bytes], prompt: Prompt, *, saved: threading.Event | None = None
    ) -> None:
        """A request has been queued whose pages from some point on, `keys`, are not on the device.

        saved: given for a request that was retracted and whose pages are being saved; set once those that this rank
        saves are in the store.
        """
        if self._one_rank and saved is not None and saved.is_set():
            saved = None
        request = self._ask(rid, keys, prompt)
        request.saved = saved
        if self._one_rank and saved is None and self._wait_until_known(rid):
            request.there = len(self._store.progress(rid).slots)
            self._plan_wait(request, Ahead(), done=True)
            return
        self._held[rid] = request.asked_at
        self._measure(rid, request)
        self.requests_held += 1

    @property
    def held(self) -> Collection[str]:
        return self._held.keys()

    def propose(self, *, idle: bool = False) -> Admit | None:
        """Whom to hold no longer, as far as this rank knows; to be asked in each step.

        idle: the engine has nothing to do but to wait for them.
        """
        if not (rids := self.admissible(idle=idle)):
            return None
        return Admit({rid: self._pages_to_have(rid) for rid in rids}, frozenset(filter(self._goes_in_any_case, rids)))

    def admissible(self, *, idle: bool = False) -> list[str]:
        """Held requests that need not wait any longer. It also times reads, and may plan a head start."""
        if not self._held:
            self._meter.look(self._planner)
            return []
        now = time.monotonic()
        free = [rid for rid in self._held if rid not in self._requests]
        leaving, ahead = free.copy(), self._ahead
        ahead.new_step()
        for rid, request in sorted(self._requests.items(), key=lambda item: item[1].prompt.turn):
            held = rid in self._held
            request.late = held and now > min(request.waits_until, request.others_until)
            has_enough = held and self._has_enough(rid, request, ahead, idle=idle and not (free or request.late))
            if has_enough or request.late:
                held = False
                free.append(rid)
                if request.others_until == math.inf:
                    request.others_until = now + max(OTHERS_WAIT_S, now - request.asked_at)
                    leaving.append(rid)
            ahead.add(request, held=held)
        for rid in leaving:
            waited = self._requests.get(rid)
            tries = waited is not None and waited.wait is not None and waited.wait.tries
            if waited is not None and tries and self._store.progress(rid).known:  # else it may all be in memory
                self._meter.try_reading(waited.keys[waited.there :])
        self._meter.look(self._planner, leaving=leaving)
        return free

    def has(self, rid: str, pages: int, *, late: bool = False) -> bool:
        """Whether this rank has so many pages of a held request, or all that it will get.

        Pages of a retracted one are asked for again once they are saved, and again while other ranks may save more.
        late: it is admitted whatever the answer; asking again would give back the pages that it has.
        """
        request = self._requests.get(rid)
        if request is None:
            return True
        if not late and self._was_being_saved(rid, request):
            return False
        slots, done, known, _ = self._progress(rid, request)
        enough = len(slots) >= pages
        if done and request.retracted and self._others_save and not (enough or late):
            if time.monotonic() - request.asked_at > ASK_AGAIN_S:
                self._ask_again(rid, request)
            return False
        return request.saved is None and (done or (known and enough))

    def take_head_start(self) -> HeadStart | None:
        """What the engine, if it is idle, should do for a request that is not admissible yet."""
        start, self._start = self._start, None
        return start

    def begin_head_start(self, start: HeadStart, keys: Sequence[bytes], prompt: Prompt) -> None:
        """On all ranks. `keys` and `prompt`: of the request that is made for it, and takes what is in memory."""
        self.head_starts += 1
        self.pages_ahead += start.pages
        if keys:
            self._ask(start.head_rid, keys, prompt)
            self._store.cut(start.head_rid)
        if (request := self._requests.get(start.rid)) is not None:
            keys_behind, behind = request.keys[start.pages :], replace(request.prompt, device_tokens=start.tokens)
            rest = self._ask(start.rid, keys_behind, behind, arrived_at=request.arrived_at)
            rest.head_start, rest.waits_until = HeadStartState.UNDER_WAY, rest.asked_at + LONGEST_WAIT_S
            self._measure(start.rid, rest, none_there=True)
        if keys:
            self._store.wait(start.head_rid, ANSWER_WAIT_S)

    def head_start_over(self, rid: str) -> None:
        """On all ranks, any number of times. From now on it is held for its pages, as any other request."""
        request = self._requests.get(rid)
        if request is None or request.head_start is not HeadStartState.UNDER_WAY:
            return
        request.head_start = HeadStartState.NO_MORE
        request.waits_until = time.monotonic() + self._longest_s(len(request.keys))

    def admit(self, rids: Iterable[str], *, late: Collection[str] = ()) -> None:
        """Hold these no more. What is still being read for late ones may be there when it is their turn."""
        for rid in rids:
            request = self._requests.get(rid)
            self.requests_admitted_late += request is not None and rid in late
            if request is not None and request.saved is not None and request.saved.is_set():
                request = self._ask_again(rid, request)
            if request is not None and request.retracted:
                self._wait_until_known(rid)  # it may have been asked for just now
            goes_on = request is None or rid in late or self._takes_what_is_there
            if self._end_hold(rid) and not goes_on:
                self._meter.end(rid)
                self._store.cut(rid)  # what is missing was not worth waiting for

    def ready(self, rid: str, keys: Sequence[bytes], *, queued_pages: int = 0, least_pages: int = 0) -> int:
        """How many leading pages of `keys` to load, all in memory, and `leased` until `forget`.

        queued_pages: of loads that the bus carries first. least_pages: to be loaded, be it worth it or not.
        """
        former, found = self._requests.get(rid), len(self.leased(rid, keys))
        if not found and (former is None or former.worth_asking_again(keys[0])):
            self.lookups_not_ahead += 1
            if former is None:
                self._ask(rid, keys, Prompt(self._page_tokens, 0))
            else:
                prompt = former.prompt_before(keys, self._page_tokens)
                self._ask(rid, keys, prompt, arrived_at=former.arrived_at)
            self._waits.there_within(self._store, rid, LOOKUP_WAIT_S)
            found = len(self.leased(rid, keys))
        request = self._requests[rid]
        request.looked_up, request.found = len(keys), found
        if not found:
            return 0
        to_try = self._planner.trial_pages(found, again=request.planned_before)
        request.planned_before, request.tries_bus = True, to_try > 0
        request.planned = self._planner.pages(
            found,
            request.prompt_before(keys, self._page_tokens),
            missing_pages=len(keys) - found,
            queued_pages=queued_pages,
            least_pages=max(to_try, min(least_pages, found)),
        )
        return request.planned

    def batch_begins(self) -> None:
        """Hits are looked up to be restored in another batch."""
        self._planner.batch_begins()

    def batched(self, tokens: int, context_tokens: int) -> None:
        """The batch also prefills so many tokens of a request."""
        self._planner.batched(tokens, context_tokens)

    def put_off(self, rid: str) -> None:
        """The request's load is put off, and all may be on the device by its next lookup: do not count this one."""
        if (request := self._requests.get(rid)) is not None:
            request.looked_up = request.found = request.planned = 0

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
        self._end_hold(rid)
        self._meter.end(rid)
        if (request := self._requests.pop(rid, None)) is not None:
            self.pages_looked_up += request.looked_up
            self.pages_found += request.found
            if request.found:
                self._planner.served(left_out=request.found - request.planned)
            self._store.release(rid)

    def clear(self) -> None:
        """Give back all that is leased; what is held is admissible for want of something to wait for."""
        for rid in self._requests:
            self._store.release(rid)
        self._requests.clear()
        self._meter.end_trial()

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

    def _goes_in_any_case(self, rid: str) -> bool:
        """Whether it waits for no rank: its time is up, or it was not asked of the present store."""
        request = self._requests.get(rid)
        return request is None or request.late

    def _pages_to_have(self, rid: str) -> int:
        """How many pages of an admissible request each rank should have before it goes."""
        request = self._requests.get(rid)
        if self._takes_what_is_there:
            return 0
        if request is None or request.wait is None:
            return sys.maxsize
        return request.wait.enough if request.late else min(request.there, request.wait.enough)

    def _wait_until_known(self, rid: str) -> bool:
        """Wait a moment for the answer; whether all of it is in memory or nowhere, so that no drive reads for it."""
        return self._waits.there_within(self._store, rid, ANSWER_WAIT_S, until_known=True)

    def _end_hold(self, rid: str) -> bool:
        """Whether there was one."""
        if (since := self._held.pop(rid, None)) is None:
            return False
        held_s = time.monotonic() - since
        self.requests_held_s += held_s
        self.holds.append(held_s)
        return True

    def _has_enough(self, rid: str, request: Request, ahead: Ahead, *, idle: bool) -> bool:
        """Whether it need not wait longer: no more pages will come, it has enough, or the policy waits for none."""
        if request.head_start is HeadStartState.UNDER_WAY or self._was_being_saved(rid, request):
            return False
        slots, done, known, total = self._progress(rid, request)
        if self._takes_what_is_there:
            return known
        request.there = len(slots)
        request.findable = len(request.keys) if total is None else total
        if request.wait is None and known:
            self._plan_wait(request, ahead, done=done)
        if (wait := request.wait) is None:
            return False
        if idle and not done and self._plan_head_start(rid, request, ahead):
            return False
        return done or request.there >= wait.enough

    def _progress(self, rid: str, request: Request) -> Progress:
        """After a while all is taken to be known that is in memory."""
        slots, done, known, total = self._store.progress(rid)
        return Progress(slots, done, done or known or time.monotonic() - request.asked_at > KNOWN_WAIT_S, total)

    def _plan_wait(self, request: Request, ahead: Ahead, *, done: bool) -> None:
        request.wait = plan_wait(self._planner, request, ahead, done=done, in_whole=self._in_whole)

    def _plan_head_start(self, rid: str, request: Request, ahead: Ahead) -> bool:
        """Whether this one is to be begun in the next step. Each request is thought of once: later there is less."""
        thought_of = request.head_start is not HeadStartState.NOT_THOUGHT_OF
        if thought_of or self._start is not None or not request.prompt.divisible:
            return False
        request.head_start = HeadStartState.NO_MORE
        pages = head_start_pages(self._planner, request, ahead, reads_at_once=self._reads_at_once)
        if pages:
            tokens = request.prompt.device_tokens + pages * self._page_tokens
            self._start = HeadStart(rid, f"{rid} head start {uuid.uuid4()}", pages, tokens)
        return pages > 0

    def _measure(self, rid: str, request: Request, *, none_there: bool = False) -> None:
        if not self._planner.restores_all:  # else nobody wants to know
            asked_at, waits_until = request.asked_at, request.waits_until
            self._meter.begin(rid, request.keys, asked_at=asked_at, waits_until=waits_until, none_there=none_there)

    def _ask(self, rid: str, keys: Sequence[bytes], prompt: Prompt, *, arrived_at: float | None = None) -> Request:
        now = time.monotonic()
        request = self._requests[rid] = Request(
            tuple(keys),
            prompt,
            arrived_at=time.time() if arrived_at is None else arrived_at,
            asked_at=now,
            waits_until=now + self._longest_s(len(keys)),
        )
        self._store.prefetch(
            rid,
            keys,
            priority=as_priority(arrived_at=request.arrived_at, turn=request.prompt.turn),
            page_priority=as_priority(self._planner.read_s(1)),
        )
        return request

    def _was_being_saved(self, rid: str, request: Request) -> bool:
        """Whether pages it was retracted with were being saved until now; once they are stored, ask for all again."""
        if request.saved is not None and request.saved.is_set():
            self._ask_again(rid, request)
        return request.saved is not None

    def _ask_again(self, rid: str, request: Request) -> Request:
        """Ask for the pages of a retracted request again, as more of them may be in the store by now."""
        again = self._ask(rid, request.keys, request.prompt, arrived_at=request.arrived_at)
        again.retracted = True
        self._measure(rid, again)
        return again

    def _longest_s(self, pages: int) -> float:
        return self._rule.longest_s(pages * self._page_tokens)
