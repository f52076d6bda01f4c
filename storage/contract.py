"""The store of pages: what its users may count on, whichever process it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sglang_hcache.storage.layout import ChunkLayout, Record

Stats = dict[str, int | float | str | list[dict[str, int | str]]]


class ChunkStore(Protocol):
    """Pages by key (32 bytes), as records in slots of host memory, with files behind it.

    Users: capture (`reserve`, `abandon`, `commit`), the linker (`contains`) and restore (`lease`, `release`). Every
    method may be called from any thread, but `lease` and `release` of one owner not at the same time. No method
    raises for what a disk does; a page that cannot be had whole is not there. None may be called after `close`.
    """

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

    def commit(self, key: bytes, slot: int) -> None:
        """The reserved slot, filled, becomes page `key`; from now on it can be found, and must not be written.

        Where the page is there already, the slot is given back and the page stays as it is. Writing it to a file
        starts in the background. Does not block on I/O.
        """
        ...

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the pages are in memory or named by an index. No promise: a file may turn out to be damaged.

        Looks up a memory-mapped index, reads no payloads.
        """
        ...

    def lease(self, owner: str, keys: Sequence[bytes]) -> list[int]:
        """Slots of the longest leading run of `keys` that can be had; they stay, unchanged, until `release(owner)`.

        Pages that are only on file are read into memory and verified. A new lease of an owner replaces its former
        one; what is in both stays in place. The run is also cut where too much is leased, or memory lacks a slot.
        Blocks while it reads; meanwhile other calls go on.
        """
        ...

    def release(self, owner: str) -> None:
        """End the owner's lease, if it has one. Does not block on I/O."""
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

    def close(self) -> None:
        """Write what is waiting, within a bounded time, and close everything. A second call does nothing."""
        ...
