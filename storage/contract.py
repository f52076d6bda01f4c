"""The store of pages: what its users may count on, whichever process it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from sglang_hcache.storage.layout import ChunkLayout, Record

Stats = dict[str, int | float | str | list[dict[str, int | str]]]

AGEING = 0.5  # waiting requests are served by ascending read_s + AGEING · arrival_s, so that none starves
TURN = 10**13  # of microseconds: outweighs arrivals that are months apart
MOST_TURNS = 10**5  # either way, so that a priority fits in 64 bits


def as_priority(read_s: float = 0.0, *, arrived_at: float = 0.0, turn: int = 0) -> int:
    """A priority for `prefetch`, lower is earlier, on one scale for all who share a store.

    read_s: seconds of reading. arrived_at: Unix time of the request. turn: a lower one comes first in any case.
    """
    return int(1e6 * (read_s + AGEING * arrived_at)) + TURN * max(-MOST_TURNS, min(turn, MOST_TURNS))


class WritePolicy(StrEnum):
    """When a page goes to a file; the names are SGLang's."""

    WRITE_THROUGH = "write_through"  # at once
    SELECTIVE = "write_through_selective"  # when it is used a second time
    WRITE_BACK = "write_back"  # when memory gets short, and on closing


class Progress(NamedTuple):
    """How far a `prefetch` has come."""

    slots: tuple[int, ...]  # of the leading pages that are there; leased until `release`
    done: bool  # no more will come
    known: bool = True  # whether `slots` counts all leading pages in memory: the others must be read
    total: int | None = None  # pages that will be there in the end, if each can be read; None: not known yet

    def ends_wait(self, *, until_known: bool) -> bool:
        """Of a `wait` for all that was asked for or, if `until_known`, for all that need not be read."""
        return self.known if until_known else self.done


class ChunkStore(Protocol):
    """Pages by key (32 bytes), as records in slots of host memory, with files behind it.

    Users: savers (`reserve`, `abandon`, `commit`), the prefetch queue (`prefetch` to `release`), and restore, which
    reads leased slots. Every method may be called from any thread, but all calls that name one owner must come from
    a single thread. No method raises for what a disk or another process does; a page that cannot be had whole counts
    as missing. None may be called after `close`.
    """

    @property
    def alive(self) -> bool:
        """False once the store has gone for good: it still holds its memory, and answers everything with nothing."""
        ...

    @property
    def layout(self) -> ChunkLayout:
        """Where everything lies in a record."""
        ...

    @property
    def memory(self) -> Record:
        """The slots, uint8 [slots, record_bytes]; the same memory as long as the store lives.

        A slot may be written between `reserve` and `commit` or `abandon`, and read while it is leased.
        """
        ...

    def reserve(self) -> int | None:
        """A slot to fill: the payloads, and `layout.positions`. Only its reserver touches it.

        None where every slot is open, leased or not yet written to a file: do without, or ask again later. Does not
        block on I/O.
        """
        ...

    def abandon(self, slot: int) -> None:
        """Give a reserved slot back. Does not block on I/O."""
        ...

    def commit(self, key: bytes, slot: int, parent: bytes) -> None:
        """The reserved slot, filled, becomes page `key`; from now on it can be found, and must not be written.

        `parent`: key of the page before it, `ROOT` for the first of a prefix. Where the page is there already, the
        slot is given back and the page stays as it is. It is written to a file as the policy says, in the
        background. Does not block on I/O.
        """
        ...

    def prefetch(
        self,
        owner: str,
        keys: Sequence[bytes],
        *,
        priority: int = 0,
        page_priority: int = 0,
    ) -> None:
        """Get the longest leading run of `keys` that can be had into memory, and lease it to `owner`.

        Pages that are only on file are read and verified in the background, lowest priority value first: `priority`
        plus `page_priority` for each page to read. If too much is leased already, the prefetch waits for its turn, as
        do later ones that need slots and are no more urgent. A new prefetch replaces the owner's former one; pages in
        both stay in place. Does not block on I/O.
        """
        ...

    def progress(self, owner: str) -> Progress:
        """How far the owner's prefetch has come; `Progress((), True)` where it has none."""
        ...

    def wait(self, owner: str, timeout_s: float, *, until_known: bool = False) -> Progress:
        """Wait until the prefetch is done (`until_known`: known) or the time is up; returns its progress."""
        ...

    def took_s(self, owner: str) -> float:
        """Seconds from the owner's prefetch to its end; 0 while it goes on, or where it has none."""
        ...

    def cut(self, owner: str) -> None:
        """Leave out what is not in memory yet; what is, stays leased."""
        ...

    def release(self, owner: str) -> None:
        """End the owner's prefetch and its lease, if it has one. Does not block on I/O."""
        ...

    def flush(self, timeout_s: float) -> bool:
        """Wait until each page committed so far is in a file or given up; False where that takes longer."""
        ...

    def drop_host(self) -> None:
        """Forget the pages in memory that are neither leased nor waiting to be written. Files stay."""
        ...

    def stats(self) -> Stats:
        """Counters since the start, gauges of now, and `volumes`: path, state, pages and bytes of each directory."""
        ...

    def close(self) -> bool | None:
        """Write what is waiting, and close everything, within a bounded time. A second call does nothing.

        False if something hangs that may still access `memory`: whoever provided the memory must not free it.
        """
        ...
