"""Makes room in a directory whose quota is used up, at the cost of its least valuable pages.

Order on disk: a page leaves the index, durably; only then is its record used again, or its space given back.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np

from sglang_hcache.storage.eviction import Ints, Keep, choose
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.locks import EVICTING_S, evicting, is_busy
from sglang_hcache.storage.paths import bytes_below, folder_of, index_folder, is_segment_name, segment_file
from sglang_hcache.storage.quota import Quota
from sglang_hcache.storage.segments import Segments
from sglang_hcache.storage.sweep import size_described, sweep
from sglang_hcache.storage.table import Places, Table

ROUNDS = 4  # of evicting, where another process gets in between
TURN_S = 60.0  # waited for others of this process that choose, too; one of them may hang

_turn = threading.Lock()

logger = logging.getLogger(__name__)


class Evictor:
    """For one thread. Methods raise OSError or lmdb.Error."""

    def __init__(
        self,
        path: Path,
        index: Index,
        segments: Segments,
        quota: Quota,
        siblings: Callable[[], Sequence[Index] | None],
    ) -> None:
        self._path = path
        self._index = index
        self._segments = segments
        self._quota = quota
        self._siblings = siblings

    def make_room(self, records: int, keep: Keep = list) -> None:
        """See to it that so many pages can be placed within the quota.

        `keep`: pages that are not to be given up, as others are about to follow them. Raises OSError (EDQUOT) where
        there cannot be room.
        """
        while self._segments.free_records() < records:
            with evicting(self._path, EVICTING_S):
                for _ in range(ROUNDS):
                    excess = self._quota.excess(self._segments.growth_bytes())
                    if excess <= 0 or self._segments.free_records() >= records:
                        break
                    self._free(max(excess, self._quota.batch), self._segments, keep)
                if self._segments.free_records() >= records:
                    break
                if self._quota.excess(self._segments.growth_bytes()) > 0:
                    raise OSError(errno.EDQUOT, "the quota of this directory holds nothing that could be evicted")
                self._quota.used += self._segments.growth_bytes()
                self._segments.grow()

    def shrink(self) -> None:
        """Evict until the quota is kept, as far as other processes allow; call it before any segment is held.

        If another process evicts for long, give up rather than delay reads: `make_room` enforces the quota later.
        """
        try:
            with evicting(self._path):
                for _ in range(ROUNDS):
                    excess = self._quota.excess(0)
                    if excess <= 0:
                        return
                    self._free(excess)
        except TimeoutError:
            logger.info("hcache: another process has been evicting in %s for long.", self._path)
        else:
            logger.warning("hcache: %s takes more than its quota, and other processes use it.", self._path)

    def _free(self, wanted: int, reuse: Segments | None = None, keep: Keep = list) -> None:
        """Free so many bytes.

        `reuse`: where records are kept for the next pages. What evicting in other directories has left here is swept
        up before any page is given up.
        """
        others = self._siblings()
        own = Table.read(self._index)
        for fingerprint in own.fingerprints:
            if fingerprint not in own.sizes and (size := size_described(folder_of(self._path, fingerprint))):
                own.sizes[fingerprint] = size
        if self._unaccounted(own) >= wanted // 2:
            wanted -= self._sweep(reuse)
        if wanted <= 0:
            return
        with _in_turn():
            places = self._choose(own, others, wanted, keep)
        count, elsewhere = drop([self._index], places[:1]), places[1:]
        try:
            count += drop(others if others and elsewhere else [], elsewhere)
        except lmdb.Error as error:  # pages without their parents, which go as orphans
            logger.info("hcache: pages elsewhere that follow on evicted ones stay for now: %s", error)
        self._quota.evicted += count
        logger.debug("%s: %d pages evicted", self._path, count)
        self._sweep(reuse)

    def _choose(self, own: Table, others: Sequence[Index] | None, wanted: int, keep: Keep) -> list[Places]:
        """Choose what to evict to free `wanted` bytes: names and places, of this directory, then of each sibling.

        Only of this directory if the siblings are unknown or cannot be read.
        """
        tables: list[Table] | None = None
        try:
            tables = None if others is None else [Table.read(index) for index in others]
        except lmdb.Error as error:  # its volume's to tell; this one can do without
            logger.info("hcache: evicting in %s without a look at other directories: %s", self._path, error)
        table = Table.join([own, *(tables or [])])
        forest = table.forest
        if tables is None:
            forest = dataclasses.replace(forest, orphan=np.zeros(len(table.names), np.bool_))
        freed = freeable(self._path, table, held=(self._segments.fingerprint, self._segments.held()))
        now = time.time()
        victims = choose(forest, table.worth(now, forest, keep()), freed, wanted)
        if victims.any():
            self._quota.evicted_idle_s = max(0.0, now - float(np.median(table.value["last_use"][victims])))
        return table.places(victims)

    def _unaccounted(self, own: Table) -> int:
        """Bytes that the segments take beyond what the pages in them do."""
        return self._quota.used - bytes_below(index_folder(self._path)) - int(own.record_bytes.sum())

    def _sweep(self, reuse: Segments | None) -> int:
        return sweep(self._path, self._index, reuse, unlisted=True)


@contextmanager
def _in_turn() -> Iterator[None]:
    """Let one full directory choose at a time: the tables of all pages, which are large, exist only once."""
    mine = _turn.acquire(timeout=TURN_S)
    try:
        yield
    finally:
        if mine:
            _turn.release()


def freeable(path: Path, table: Table, held: tuple[bytes, set[str]] = (b"", set())) -> Ints:
    """Bytes that giving up each page returns: none in files that other processes write, or of other directories."""
    free = np.zeros(len(table.segment_example), np.bool_)
    for number, example in enumerate(table.segment_example.tolist()):
        fingerprint, name = table.segment(example)
        here = table.volume[example] == 0 and is_segment_name(name)
        ours = fingerprint == held[0] and name in held[1]
        free[number] = here and (ours or not is_busy(segment_file(folder_of(path, fingerprint), name)))
    return np.where(free[table.segment_number], table.record_bytes, 0) if len(free) else table.record_bytes


def drop(indexes: Sequence[Index], places: Sequence[Places]) -> int:
    """Delete these pages, of each index some; how many there were."""
    return sum(index.delete_names(some) for index, some in zip(indexes, places, strict=True))
