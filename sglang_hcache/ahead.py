"""Prefetch ahead of scheduling: what each queued request needs is on its way before the scheduler asks for it."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sglang_hcache.load_planner import LoadPlanner, Prompt
from sglang_hcache.planner.load import AGEING
from sglang_hcache.storage.contract import ChunkStore
from sglang_hcache.storage.store import READ_THREADS

LATE_S = 0.25  # past its deadline a request is let go even if the prefetcher has not said so
ANSWER_WAIT_S = 0.002  # for pages in memory, or nowhere, the prefetcher answers within this; then nothing is held
NO_WAIT_S = 0.02  # after a wait in vain: of many that come at once, the others are held until the next step
LOOKUP_WAIT_S = 0.02  # a lookup may wait this long for pages that nobody asked for before
RETRY_S = 0.5  # a lookup that found nothing may be tried again after this
MEASURED_PAGES = 4  # read for one request: fewer say little about the drives
MEASURED_WITHIN = 0.1  # of the time a read took: if it was last looked at longer before its end, that says little
NO_DEADLINE_S = 60.0  # of `wait_complete`: a disk that hangs must not hang a request


class PrefetchPolicy(StrEnum):
    """How long a request is held while its pages are on the way; the names are SGLang's."""

    BEST_EFFORT = "best_effort"  # not at all: it takes what is there
    WAIT_COMPLETE = "wait_complete"  # until they are there
    TIMEOUT = "timeout"  # until they are there, or for a time that grows with their number


@dataclass(frozen=True)
class HoldRule:
    """When a request is let go."""

    policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    base_s: float = 1.0
    per_ki_token_s: float = 0.25  # for each 1,024 tokens on the way

    def deadline_s(self, tokens: int) -> float:
        """How long the pages of so many tokens may take; the request is never held longer."""
        if self.policy is PrefetchPolicy.TIMEOUT:
            return self.base_s + self.per_ki_token_s * tokens / 1024
        return NO_DEADLINE_S


@dataclass(frozen=True)
class _Wait:
    """What a held request waits for; planned when it is first looked at."""

    there: int  # pages, at that time
    since: float  # that time; monotonic
    enough: int  # pages
    pass_s: float  # of the engine, from then on
    to_try: int  # of the last pages, which it does not wait for: to be read to see how fast that is


@dataclass
class _Request:
    keys: tuple[bytes, ...]
    place: dict[bytes, int]  # of each key in `keys`
    prompt: Prompt
    asked_at: float
    let_go_at: float  # monotonic
    wait: _Wait | None = None


class _Trial:
    """Pages that are read though nobody waits for them, to see how fast that is; one trial at a time."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._owner = f"trial {uuid.uuid4()}"  # beside requests, whose ids their senders may choose
        self.pages = 0  # that are being read

    def begin(self, keys: Sequence[bytes]) -> None:
        self.pages = len(keys)
        self._store.prefetch(self._owner, keys, deadline_s=NO_DEADLINE_S)

    def look(self, planner: LoadPlanner) -> None:
        """Tell the planner, if it is over."""
        if not self.pages or not (found := self._store.progress(self._owner)).done:
            return
        if len(found.slots) == self.pages:
            planner.read(self.pages, self._store.took_s(self._owner))
        self.end()

    def end(self) -> None:
        if self.pages:
            self.pages = 0
            self._store.release(self._owner)


class Ahead:
    """What requests have asked for, by request id; for the scheduler's thread.

    Which requests are held is decided by one rank (`let_go`) and carried out by all (`admit`), so that all ranks
    build the same batches; `queued` holds the same requests everywhere, as all ranks queue the same ones.
    """

    def __init__(
        self,
        store: ChunkStore,
        rule: HoldRule,
        page_tokens: int,
        *,
        alone: bool,
        planner: LoadPlanner | None = None,
    ) -> None:
        """`alone`: there is no other rank to agree with. Without a planner all of a hit is waited for, and loaded."""
        self._store = store
        self._planner = planner
        self._alone = alone
        self._rule = rule
        self._page_tokens = page_tokens
        self._requests: dict[str, _Request] = {}
        self._held: dict[str, float] = {}  # request id → when it was queued
        self.requests_held = self.requests_late = self.lookups_late = 0
        self.held_s = 0.0
        self._trial = _Trial(store)
        self._looked_at = 0.0  # at held requests, before this time; monotonic
        self._next_wait_at = 0.0  # monotonic

    def attach(self, store: ChunkStore) -> None:
        """The store has been replaced: everything asked of the former one is void, and nothing is waited for."""
        self._store, self._trial = store, _Trial(store)
        self._requests.clear()

    def queued(self, rid: str, keys: Sequence[bytes], prompt: Prompt | None = None) -> None:
        """A request has been queued whose pages from some point on, `keys`, are not on the device."""
        self._ask(rid, keys, prompt)
        if self._rule.policy is PrefetchPolicy.BEST_EFFORT:
            return
        if self._alone and time.monotonic() >= self._next_wait_at:
            if self._store.wait(rid, ANSWER_WAIT_S).done:
                return
            self._next_wait_at = time.monotonic() + NO_WAIT_S
        self._held[rid] = time.monotonic()
        self.requests_held += 1

    @property
    def held(self) -> Collection[str]:
        return self._held.keys()

    def let_go(self) -> list[str]:
        """Held requests that need not wait any longer."""
        if self._planner is not None:
            self._trial.look(self._planner)
        if not self._held:
            return []
        now = time.monotonic()
        free = []
        for rid in self._held:
            request = self._requests.get(rid)
            if request is None or self._has_enough(rid, request):
                free.append(rid)
            elif now > request.let_go_at:
                free.append(rid)
                self.requests_late += 1
        self._looked_at = now
        return free

    def admit(self, rids: Iterable[str]) -> None:
        """Hold these no more."""
        for rid in rids:
            if (since := self._held.pop(rid, None)) is not None:
                self.held_s += time.monotonic() - since
                if self._planner is not None:  # what is missing was not worth waiting for
                    self._store.cut(rid)
                    self._try_reading(self._requests.get(rid))

    def ready(self, rid: str, keys: Sequence[bytes], *, queued_pages: int = 0) -> list[int]:
        """Slots of the leading pages of `keys` to load, all in memory, and leased until `forget`.

        queued_pages: of loads that the bus carries first.
        """
        request = self._requests.get(rid)
        slots = self._known(request, rid, keys) if request is not None else []
        stale = request is None or time.monotonic() - request.asked_at > RETRY_S
        if not slots and (stale or (request is not None and keys[0] not in request.place)):
            self.lookups_late += 1
            request = self._ask(rid, keys)
            self._store.wait(rid, LOOKUP_WAIT_S)
            slots = self._known(request, rid, keys)
        if slots and request is not None and self._planner is not None:
            return slots[: self._planner.pages(len(slots), request.prompt, queued_pages=queued_pages)]
        return slots

    def forget(self, rid: str) -> None:
        """The request has been served, or is gone."""
        self._held.pop(rid, None)
        if self._requests.pop(rid, None) is not None:
            self._store.release(rid)

    def clear(self) -> None:
        for rid in list(self._requests):
            self.forget(rid)
        self._trial.end()

    def stats(self) -> dict[str, int | float]:
        return {
            "requests_held": self.requests_held,
            "requests_held_now": len(self._held),
            "requests_let_go_late": self.requests_late,
            "requests_held_s": round(self.held_s, 3),
            "lookups_not_ahead": self.lookups_late,
        }

    def _has_enough(self, rid: str, request: _Request) -> bool:
        """Whether all of its pages are there, or so many that it is not worth waiting for more."""
        slots, done = self._store.progress(rid)
        if self._planner is None:
            return done
        if (wait := request.wait) is None:
            wait = request.wait = self._plan_wait(self._planner, request, len(slots))
        enough, read = done or len(slots) >= wait.enough, len(slots) - wait.there
        now = time.monotonic()
        timed = now - self._looked_at <= MEASURED_WITHIN * (now - wait.since)
        if enough and timed and len(self._held) == 1 and read >= MEASURED_PAGES:
            self._planner.read(read, now - wait.since)
        return enough

    def _plan_wait(self, planner: LoadPlanner, request: _Request, there: int) -> _Wait:
        """Behind the requests that were queued before it, and what is read for them."""
        before = itertools.takewhile(lambda other: other is not request, self._requests.values())
        waits = [other.wait for other in before if other.wait is not None]
        pages = len(request.keys)
        enough = planner.worth_waiting_for(
            there,
            pages - there,
            request.prompt,
            start_s=sum(wait.pass_s for wait in waits),
            queued_pages=sum(max(0, wait.enough - wait.there) for wait in waits),
        )
        # The first pages are being read already when the request is let go: they would say nothing.
        room = pages - there - READ_THREADS
        to_try = min(room, planner.pages_to_try()) if enough <= there and room > 0 else 0
        pass_s = planner.pass_s(enough, request.prompt, missing_pages=pages - enough)
        return _Wait(there, time.monotonic(), enough, pass_s, to_try)

    def _try_reading(self, request: _Request | None) -> None:
        """None beside other reads."""
        if request is None or request.wait is None or self._held or self._trial.pages:
            return
        if pages := request.wait.to_try:
            self._trial.begin(request.keys[-pages:])

    def _ask(self, rid: str, keys: Sequence[bytes], prompt: Prompt | None = None) -> _Request:
        now, deadline_s = time.monotonic(), self._rule.deadline_s(len(keys) * self._page_tokens)
        request = self._requests[rid] = _Request(
            tuple(keys),
            {key: i for i, key in enumerate(keys)},
            prompt or Prompt(self._page_tokens, 0),
            now,
            now + deadline_s + LATE_S,
        )
        read_s = self._planner.read_s(1) if self._planner is not None else 0.0
        # The clock is the same for all who share a prefetcher.
        arrival, page = (int(1e6 * seconds) for seconds in (AGEING * time.time(), read_s))
        self._store.prefetch(rid, keys, priority=arrival, page_priority=page, deadline_s=deadline_s)
        return request

    def _known(self, request: _Request, rid: str, keys: Sequence[bytes]) -> list[int]:
        start = request.place.get(keys[0])
        if start is None:
            return []
        return list(self._store.progress(rid).slots[start : start + len(keys)])
