"""What a held request waits for, or the engine does meanwhile: plans that know what is done for others before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sglang_hcache.queueing.load_planner import Planner
from sglang_hcache.queueing.read_meter import MEASURED_PAGES
from sglang_hcache.queueing.request import Request, Wait


class Ahead:
    """The work ahead of a request: that for the requests before it, which are added in order, anew in each step.

    The pages that they await are counted by their changes from step to step, as a long queue awaits many.
    """

    def __init__(self) -> None:
        self.pass_s = 0.0  # of the engine
        self._added: list[Request] = []  # in this step, and not counted yet
        # By identity: request and first page counted as awaited: in this step, or so far only in a former one.
        self._counted: dict[int, tuple[Request, int]] = {}
        self._counted_before: dict[int, tuple[Request, int]] = {}
        self._awaited: dict[bytes, int] = {}  # page → by how many of these

    def new_step(self) -> None:
        self.pass_s = 0.0
        self._added.clear()
        self._counted_before |= self._counted
        self._counted.clear()

    def add(self, request: Request, *, held: bool) -> None:
        if request.wait is not None:
            self.pass_s += request.wait.beside_s if self.pass_s else request.wait.pass_s
            if held:
                self._added.append(request)

    def pages_read_before(self, keys: Sequence[bytes]) -> int:
        """How many pages the requests ahead await that are not among `keys`."""
        for request in self._added:
            enough = _enough(request)
            first = min(request.there, enough)
            _, first_before = self._counted_before.pop(id(request), (request, enough))
            self._count(request.keys[first:first_before], 1)
            self._count(request.keys[first_before:first], -1)
            self._counted[id(request)] = request, first
        self._added.clear()
        for request, first in self._counted_before.values():
            self._count(request.keys[first : _enough(request)], -1)
        self._counted_before.clear()
        return len(self._awaited) - sum(map(self._awaited.__contains__, keys))

    def _count(self, keys: Sequence[bytes], step: int) -> None:
        for key in keys:
            count = self._awaited.get(key, 0) + step
            if count:
                self._awaited[key] = count
            else:
                del self._awaited[key]


def _enough(request: Request) -> int:
    assert request.wait is not None
    return request.wait.enough


def plan_wait(planner: Planner, request: Request, ahead: Ahead, *, done: bool, in_whole: bool) -> Wait:
    """How many pages to wait for, of those that can be read by the end of its time or of the engine's work ahead.

    done: no more of its pages will come, so reads for other requests do not matter. in_whole: a part of a hit may be
    of no use; if more than half is worth waiting for, all is waited for.
    """
    pages, there, findable = len(request.keys), request.there, request.findable
    queued_pages = lower_pages = 0
    if not done:
        queued_pages = ahead.pages_read_before(request.keys)
        left_s = max(request.waits_until - time.monotonic(), ahead.pass_s)
        lower_pages = min(findable - there, max(0, planner.pages_read_within(left_s) - queued_pages))
    enough = planner.worth_waiting_for(
        there,
        lower_pages,
        request.prompt,
        missing_pages=pages - there - lower_pages,
        start_s=ahead.pass_s,
        queued_pages=queued_pages,
    )
    if in_whole and 2 * enough > findable:
        enough = findable
    tries = not done and findable - there >= MEASURED_PAGES and enough < findable and planner.tries_drives()
    pass_s, beside_s = planner.pass_s(enough, request.prompt, missing_pages=pages - enough)
    return Wait(enough, pass_s, beside_s, tries)


def head_start_pages(planner: Planner, request: Request, ahead: Ahead, *, reads_at_once: int) -> int:
    """How many of its pages an idle engine should prefill while the others are read."""
    on_the_way = request.findable - request.there
    return planner.head_start(
        request.there,
        on_the_way,
        request.prompt,
        missing_pages=len(request.keys) - request.findable,
        queued_pages=ahead.pages_read_before(request.keys),
        begun_pages=min(on_the_way, reads_at_once),
    )
