"""How fast drives read: the pages that come for all waiting requests, over the time in which any request waits.

A page or a moment that several requests share counts once: on a slow drive, many wait together.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sglang_hcache.queueing.load_planner import Planner
from sglang_hcache.storage.contract import ChunkStore

MEASURED_PAGES = 4  # fewer say little about the drives
MEASURED_S = 0.25  # while some are waited for all the time, what came is told so often
LONGEST_TRIAL_S = 60.0


@dataclass
class _Reading:
    keys: Sequence[bytes]
    asked_at: float  # monotonic
    waits_until: float  # monotonic
    known_at: float | None = None  # when it was seen what of it is in memory; monotonic
    there: int = 0  # pages, when it was last looked at


class ReadMeter:
    """Measures the prefetches that requests wait for, by their owner, and trials, which nobody waits for."""

    def __init__(self, store: ChunkStore, reads_at_once: int) -> None:
        self._store = store
        self._reads_at_once = reads_at_once
        self._readings: dict[str, _Reading] = {}  # by owner
        self._since = 0.0  # the planner was told last, or nobody waited; monotonic
        self._came: set[bytes] = set()
        self._busy_s = 0.0  # in which these came
        self._busy_until = 0.0  # that is counted; monotonic
        self.trial = f"trial {uuid.uuid4()}"  # an owner beside requests, whose ids their senders may choose
        self._trial_until: float | None = None  # monotonic; one at a time

    def begin(
        self, owner: str, keys: Sequence[bytes], *, asked_at: float, waits_until: float, none_there: bool = False
    ) -> None:
        """Measure the owner's prefetch. Call it at once: pages read by then count as having been in memory.

        none_there: none was in memory, so all pages that come have been read.
        """
        self._readings[owner] = _Reading(keys, asked_at, waits_until, asked_at if none_there else None)
        self._look_at(owner)

    def end(self, owner: str) -> None:
        self._readings.pop(owner, None)

    def try_reading(self, keys: Sequence[bytes]) -> None:
        """Time what is being read for one that waits no more, the first of `keys`: that goes on in any case."""
        if self._trial_until is not None:
            return
        keys = keys[: max(self._reads_at_once, MEASURED_PAGES)]
        self._store.prefetch(self.trial, keys)
        now = time.monotonic()
        self._trial_until = now + LONGEST_TRIAL_S
        self.begin(self.trial, keys, asked_at=now, waits_until=self._trial_until, none_there=True)

    def end_trial(self) -> None:
        self._trial_until = None
        self.end(self.trial)
        self._store.release(self.trial)

    def look(self, planner: Planner, leaving: Collection[str] = ()) -> None:
        """Tell the planner, if there is enough to tell. `leaving`: owners that will not be waited for any more."""
        self._tell(planner, leaving)
        until = self._trial_until
        if until is not None and (time.monotonic() > until or self._store.progress(self.trial).done):
            self.end_trial()

    def _tell(self, planner: Planner, leaving: Collection[str]) -> None:
        now, spans = time.monotonic(), list[tuple[float, float]]()
        reads = goes_on = late = False  # for any of them; for any that stays; any that had to go without
        for owner, reading in self._readings.items():
            done = self._look_at(owner)
            if reading.known_at is None:
                continue
            until = reading.asked_at + self._store.took_s(owner) if done else now
            spans.append((reading.known_at, until))
            in_vain = until >= reading.waits_until
            late |= in_vain and reading.asked_at >= self._since
            reads |= in_vain or not done
            goes_on |= not done and owner not in leaving
        for since, until in sorted(spans):
            self._busy_s += max(0.0, until - max(since, self._busy_until))
            self._busy_until = max(self._busy_until, until)
        # What is under way counts for nothing, until it is there.
        enough = len(self._came) >= (max(MEASURED_PAGES, self._reads_at_once) if reads else MEASURED_PAGES)
        if enough and (self._busy_s >= MEASURED_S or not goes_on):
            planner.read(len(self._came), self._busy_s)
        elif late:
            planner.read(max(1, len(self._came)), self._busy_s, at_least=True)
        elif goes_on:
            return
        self._since, self._came, self._busy_s = now, set(), 0.0

    def _look_at(self, owner: str) -> bool:
        """Whether all that will come is there."""
        reading = self._readings[owner]
        slots, done, known, _ = self._store.progress(owner)
        if known and reading.known_at is None:
            reading.known_at, reading.there = time.monotonic(), len(slots)
        self._came.update(reading.keys[reading.there : len(slots)])
        reading.there = len(slots)
        return done
