"""Stands in for a store while there is none: between a prefetcher's end and the next session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_hcache.storage.contract import Progress, Stats
from sglang_hcache.storage.layout import ChunkLayout, Record


class NoStore:
    """A ChunkStore that holds nothing, and answers everything with nothing, at once.

    `lost`: whether the prefetcher of the store before it is lost, as a client's `lost`.
    """

    alive = False

    def __init__(self, layout: ChunkLayout, why_ended: str, *, lost: bool) -> None:
        self.layout = layout
        self.why_ended = why_ended
        self.lost = lost
        self.memory: Record = np.empty((0, layout.record_bytes), np.uint8)

    def reserve(self) -> int | None:
        return None

    def abandon(self, slot: int) -> None:
        """It was another store's."""

    def commit(self, key: bytes, slot: int, parent: bytes) -> None:
        """It was another store's."""

    def prefetch(
        self,
        owner: str,
        keys: Sequence[bytes],
        *,
        priority: int = 0,
        page_priority: int = 0,
    ) -> None:
        """Done, with nothing."""

    def progress(self, owner: str) -> Progress:
        return Progress((), True)

    def wait(self, owner: str, timeout_s: float, *, until_known: bool = False) -> Progress:
        return Progress((), True)

    def took_s(self, owner: str) -> float:
        return 0.0

    def cut(self, owner: str) -> None:
        """There is nothing."""

    def release(self, owner: str) -> None:
        """There is nothing."""

    def flush(self, timeout_s: float) -> bool:
        return False

    def drop_host(self) -> None:
        """There is nothing."""

    def stats(self) -> Stats:
        return {"prefetcher": f"gone: {self.why_ended}"}

    def give_up(self, why: str) -> None:
        self.why_ended = why

    def close(self) -> None:
        """There is nothing."""
