"""Doing something about many things, each at its own time, in one thread."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Deadlines(Generic[Thing]):
    """`due` is called with each thing once its time has come, on a thread of its own. Thread-safe."""

    def __init__(self, due: Callable[[Thing], None]) -> None:
        self._due = due
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Thing]] = []
        self._order = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="hcache-deadline", daemon=True)
        self._thread.start()

    def add(self, thing: Thing, in_s: float) -> None:
        with self._changed:
            heapq.heappush(self._heap, (time.monotonic() + in_s, next(self._order), thing))
            self._changed.notify()

    def close(self) -> None:
        """Nothing is due any more. Not to be called with a lock held that `due` takes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (thing := self._next()) is not None:
            self._due(thing)

    def _next(self) -> Thing | None:
        with self._changed:
            while not self._closed:
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is not None and left <= 0:
                    return heapq.heappop(self._heap)[2]
                self._changed.wait(left)
        return None
