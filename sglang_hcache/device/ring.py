"""A ring of device memory: pieces of it are written one after another, and again once they have been read."""

from __future__ import annotations

from collections import deque

import torch

from sglang_hcache.device.streams import Event, Stream

ALIGNMENT = 256  # bytes; each piece begins at a multiple of it


class Ring:
    """`memory`, uint8, shared out to work that is queued on `stream`; what reads a piece may run elsewhere.

    When it is full, a new piece is written once the oldest ones have been read. The stream waits for that, not the
    caller. One piece is taken at a time: `take`, then `sent`.
    """

    def __init__(self, memory: torch.Tensor, stream: Stream) -> None:
        self.memory = memory
        self._stream = stream
        self._next = 0
        self._taken = range(0)  # last
        self._away: deque[tuple[range, Event]] = deque()  # the oldest first

    def take(self, size: int) -> torch.Tensor:
        """A piece of `size` bytes for work queued on the stream from now on."""
        if self._away and self._away[-1][1].query():  # all has been read; the beginning may still be in a cache
            self._away.clear()
            self._next = 0
        begin = -(-self._next // ALIGNMENT) * ALIGNMENT
        wraps = begin + size > len(self.memory)
        if wraps:
            begin = 0
        self._next = begin + size
        if (read := self._last_within(range(begin, self._next), wraps=wraps)) is not None and not read.query():
            self._stream.wait(read)
        self._taken = range(begin, self._next)
        return self.memory[begin : self._next]

    def sent(self, event: Event) -> None:
        """The piece taken last, and all before it, may be overwritten once the event has passed."""
        self._away.append((self._taken, event))

    def _last_within(self, wanted: range, *, wraps: bool) -> Event | None:
        """The event of the last piece that overlaps with `wanted`; it and all before it are forgotten."""
        count = 0
        for number, (place, _) in enumerate(self._away, 1):
            if place.start < wanted.stop and wanted.start < place.stop:
                count = number
            elif not wraps:  # the others lie further on
                break
        event = None
        for _ in range(count):
            _, event = self._away.popleft()
        return event
