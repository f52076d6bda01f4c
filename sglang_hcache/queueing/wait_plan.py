"""What a held request waits for, or the engine does meanwhile: plans that know what is done for others before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sglang_hcache.queueing.load_planner import Planner
from sglang_hcache.queueing.read_meter import MEASURED_PAGES
from sglang_hcache.queueing.request import Request, Wait


class Ahead:
    """What is done for the requests before one, which are added in that order."""

    def __init__(self) -> None:
        self.pass_s = 0.0  # of the engine
        self._awaited: set[bytes] = set()
        self._added: list[Request] = []

    def add(self, request: Request, *, held: bool) -> None:
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


def plan_wait(planner: Planner, request: Request, ahead: Ahead, *, done: bool, in_whole: bool) -> Wait:
    """What to wait for, of what can be read while it may wait, or the engine works for those ahead of it.

    done: no more of its pages will come; then what is ahead changes nothing. in_whole: of a part of a hit it may be
    that nothing can be loaded.
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
    if in_whole and 2 * enough > pages:
        enough = pages
    tries = not done and pages - there >= MEASURED_PAGES and enough < pages and planner.tries_drives()
    pass_s = planner.pass_s(enough, request.prompt, missing_pages=pages - enough)
    return Wait(enough, pass_s, tries)


def plan_head_start(planner: Planner, request: Request, ahead: Ahead, *, reads_at_once: int) -> int:
    """How many of its pages an idle engine should prefill while the others are read."""
    missing = len(request.keys) - request.there
    return planner.head_start(
        request.there,
        missing,
        request.prompt,
        queued_pages=ahead.pages_read_before(request.keys),
        begun_pages=min(missing, reads_at_once),
    )
