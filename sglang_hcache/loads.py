"""Loads of a scheduler: queued, started with the forward that needs them, and landing behind it."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence

from sglang_hcache.device.streams import Stream
from sglang_hcache.metrics import Durations
from sglang_hcache.queueing.load_planner import Planner
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import Load, Restorer

logger = logging.getLogger(__name__)


class Loads:
    """Queues, starts and finishes loads. A request's lease lasts until its load has landed, failed or been cancelled.

    release: called with the request's id then. planner: told how long each batch took.
    """

    def __init__(
        self, events: LayerEvents, page_tokens: int, planner: Planner, release: Callable[[str], None]
    ) -> None:
        self._events = events
        self._page_tokens = page_tokens
        self._planner = planner
        self._release = release
        self._queued: list[Load] = []
        self._started: dict[int, tuple[list[Load], bool]] = {}  # by batch; whether they were issued without an error
        self._landing: deque[tuple[int, list[Load]]] = deque()  # by batch; SGLang does not ask for these any more
        self._accepted = self._failed = self._tokens_restored = 0
        self.durations = Durations()  # of batches

    def __bool__(self) -> bool:
        """Whether any is under way."""
        return bool(self._queued or self._started or self._landing)

    def __contains__(self, rid: str) -> bool:
        """Whether one of this request is."""
        return any(load.rid == rid for load in self._under_way())

    @property
    def queued_pages(self) -> int:
        """Pages that the bus must carry for the next forward, as far as known; earlier loads land before these."""
        return sum(len(load.store_slots) for load in self._queued)

    def queue(self, load: Load) -> None:
        self._queued.append(load)
        self._accepted += 1

    def cancel(self, rid: str) -> bool:
        """A queued load, not one that is started."""
        cancelled = [load for load in self._queued if load.rid == rid]
        self._queued = [load for load in self._queued if load.rid != rid]
        self._end(cancelled)
        return bool(cancelled)

    def start(self, restorer: Restorer | None) -> int:
        """All that are queued, as one batch: its index, or -1 where none is."""
        if not self._queued:
            return -1
        loads, self._queued = self._queued, []
        try:
            assert restorer is not None, "what is promised is in a store"
            index, issued = restorer.run(loads), True
        except Exception:
            # SGLang aborts the requests of a failed load; the server must live on for all others.
            logger.exception("hcache: restoring failed; %d request(s) will be aborted by SGLang", len(loads))
            index, issued = self._events.new_batch(), False
            self._failed += len(loads)
        self._started[index] = loads, issued
        return index

    def finish(self, index: int, reader: Stream) -> bool:
        """Let later work of `reader` run after batch `index`, without waiting here; whether its loads were issued."""
        if index not in self._started:
            return self._drop_what_was_never_started()
        loads, issued = self._started.pop(index)
        self._events.follow(index, reader)
        self._tokens_restored += self._tokens_of(loads) * issued
        self._landing.append((index, loads))
        self.end_landed()
        return issued

    def _drop_what_was_never_started(self) -> bool:
        """A forward has run without these loads: SGLang aborts their requests, and frees the slots they are for."""
        loads, self._queued = self._queued, []
        logger.error("hcache: %d load(s) were not started before their forward", len(loads))
        self._failed += len(loads)
        self._end(loads)
        return False

    def end_landed(self, *, wait: bool = False) -> None:
        """wait: also for those of finished batches that have not landed yet."""
        while self._landing and (wait or self._events.is_restored(self._landing[0][0])):
            index, loads = self._landing.popleft()
            seconds = self._events.synchronize(index)
            self._end(loads)
            if seconds is not None:
                self.durations.append(seconds)
                self._planner.restored(self._tokens_of(loads), seconds)

    def all_landed(self) -> bool:
        """Whether no started batch still writes to the pool."""
        return all(map(self._events.is_restored, [*self._started, *(index for index, _ in self._landing)]))

    def wait_and_drop_queued(self) -> None:
        """Wait until all that was started has landed, then forget what is queued."""
        for index in self._started:
            self._events.synchronize(index)
        self.end_landed(wait=True)
        self._queued.clear()

    def drop_started(self) -> None:
        """SGLang will not ask for these any more."""
        self._started.clear()

    def stats(self) -> dict[str, int]:
        return {
            "loads_accepted": self._accepted,
            "loads_failed": self._failed,
            "tokens_restored": self._tokens_restored,
        }

    def _under_way(self) -> itertools.chain[Load]:
        started, landing = (loads for loads, _ in self._started.values()), (loads for _, loads in self._landing)
        return itertools.chain(self._queued, *started, *landing)

    def _end(self, loads: Sequence[Load]) -> None:
        for load in loads:
            if load.rid not in self:
                self._release(load.rid)

    def _tokens_of(self, loads: Sequence[Load]) -> int:
        return sum(len(load.store_slots) for load in loads) * self._page_tokens
