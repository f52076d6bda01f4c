"""How long prefills take on the device, for the planner."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_hcache.device.streams import Event, Stream
from sglang_hcache.queueing.load_planner import Planner

_MOST_UNREAD = 16  # forwards whose end has not been looked at


class _Begun(NamedTuple):
    tokens: Sequence[int]  # of each request
    contexts: Sequence[int]  # tokens before them
    waits: bool  # for loads
    at: Event


class _Ended(NamedTuple):
    begun: _Begun
    at: Event


class ForwardTimer:
    """Tells a planner how long prefills take; for the scheduler's thread, which never waits."""

    def __init__(self, planner: Planner, stream: Stream) -> None:
        self._planner = planner
        self._stream = stream
        self._begun: _Begun | None = None
        self._ended: deque[_Ended] = deque(maxlen=_MOST_UNREAD)

    def begin(self, batch: Any, *, waits: bool) -> None:
        """A forward is about to be issued; `waits`: for loads."""
        self._begun = None
        tokens, contexts = batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu
        known = batch.forward_mode.is_extend_without_speculative() and tokens is not None and contexts is not None
        if known and not self._planner.restores_all:
            self._begun = _Begun(tokens, contexts, waits, self._stream.record(timed=True))

    def end(self) -> None:
        if self._begun is not None:
            self._ended.append(_Ended(self._begun, self._stream.record(timed=True)))
        while self._ended and self._ended[0].at.query():
            begun, at = self._ended.popleft()
            seconds = begun.at.elapsed_time(at) / 1000
            self._planner.prefilled(begun.tokens, begun.contexts, seconds, waited=begun.waits)
