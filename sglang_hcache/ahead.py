"""Prefetch ahead of scheduling: what each queued request needs is on its way before the scheduler asks for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sglang_hcache.load_planner import LoadPlanner, Prompt
from sglang_hcache.planner.load import AGEING
from sglang_hcache.storage.contract import ChunkStore
from sglang_hcache.storage.store import READ_THREADS

LATE_S = 0.25  # past its deadline a request is let go even if the prefetcher has not said so
ANSWER_WAIT_S = 0.002  # for pages in memory, or nowhere, the prefetcher answers within this; then nothing is held
LOOKUP_WAIT_S = 0.02  # a lookup may wait this long for pages that nobody asked for before
RETRY_S = 0.5  # a lookup that found nothing may be tried again after this
MEASURED_PAGES = 4  # read for one request: fewer say little about the drives
MEASURED_WITHIN = 0.1  # of the time a read took: if it was last looked at longer before its end, that says little
_TRIAL = "hcache-trial"  # owner of what is read to see how fast that is
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


@dataclass
class _Request:
    keys: tuple[bytes, ...]
    place: dict[bytes, int]  # of each key in `keys`
    prompt: Prompt
    asked_at: float
    let_go_at: float  # monotonic
    at_first: tuple[int, float] | None = None  # pages that were there when it was first looked at, and when that was
    enough: int = 0  # pages, from then on
    to_try: int = 0  # pages that nobody waits for, to be read to see how fast that is
    pass_s: float = 0.0  # of the engine, from then on; 0 where it is not planned


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
        self._tried = 0  # pages that are being read to see how fast
        self._looked_at = 0.0  # at held requests, before this time; monotonic

    def attach(self, store: ChunkStore) -> None:
        """The store has been replaced: everything asked of the former one is void, and nothing is waited for."""
        self._store = store
        self._requests.clear()
        self._tried = 0

    def queued(self, rid: str, keys: Sequence[bytes], prompt: Prompt | None = None) -> None:
        """A request has been queued whose pages from some point on, `keys`, are not on the device."""
        self._ask(rid, keys, prompt)
        if self._rule.policy is PrefetchPolicy.BEST_EFFORT:
            return
        if self._alone and self._store.wait(rid, ANSWER_WAIT_S).done:
            return
        self._held[rid] = time.monotonic()
        self.requests_held += 1

    @property
    def held(self) -> Collection[str]:
        return self._held.keys()

    def let_go(self) -> list[str]:
        """Held requests that need not wait any longer."""
        self._look_at_trial()
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
                    self._try_reading(rid)

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
        if self._tried:
            self._tried = 0
            self._store.release(_TRIAL)

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
        if request.at_first is None:
            request.at_first = len(slots), time.monotonic()
            before = list(itertools.takewhile(lambda other: other is not request, self._requests.values()))
            request.enough = self._planner.worth_waiting_for(
                len(slots),
                len(request.keys) - len(slots),
                request.prompt,
                start_s=sum(other.pass_s for other in before),
                queued_pages=sum(max(0, other.enough - other.at_first[0]) for other in before if other.at_first),
            )
            missing = len(request.keys) - request.enough
            # The first are being read already when the request is let go.
            room = len(request.keys) - len(slots) - READ_THREADS
            if request.enough <= len(slots) and room > 0:
                request.to_try = min(room, self._planner.pages_to_try())
            request.pass_s = self._planner.pass_s(request.enough, request.prompt, missing_pages=missing)
        enough = done or len(slots) >= request.enough
        pages, since = request.at_first
        now = time.monotonic()
        timed = now - self._looked_at <= MEASURED_WITHIN * (now - since)
        if enough and timed and len(self._held) == 1 and len(slots) - pages >= MEASURED_PAGES:
            self._planner.read(len(slots) - pages, now - since)
        return enough

    def _try_reading(self, rid: str) -> None:
        """A few of the pages that the request did not wait for; one trial at a time, and none beside other reads."""
        request = self._requests.get(rid)
        if request is None or not request.to_try or self._held or self._tried:
            return
        keys = request.keys[-request.to_try :]
        self._tried = len(keys)
        self._store.prefetch(_TRIAL, keys, deadline_s=NO_DEADLINE_S)

    def _look_at_trial(self) -> None:
        if not self._tried or not (found := self._store.progress(_TRIAL)).done:
            return
        if self._planner is not None and len(found.slots) == self._tried:
            self._planner.read(self._tried, self._store.took_s(_TRIAL))
        self._tried = 0
        self._store.release(_TRIAL)

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
