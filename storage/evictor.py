"""Makes room in a directory whose quota is used up, at the cost of its least valuable pages.

Order on disk: a page leaves the index, durably; only then is its record used again, or its space given back.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from sglang_hcache.storage.eviction import Ints, Mask, choose
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES
from sglang_hcache.storage.quota import Quota, census, give_back, is_busy
from sglang_hcache.storage.segments import Segments
from sglang_hcache.storage.table import Table

ROUNDS = 4  # of evicting, where another process gets in between

log = logging.getLogger(__name__)


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

    def make_room(self, records: int, keep: Collection[bytes] = ()) -> int:
        """See to it that so many pages can be placed within the quota; how many pages of the fingerprint that cost.

        `keep`: keys of pages that are not to be given up, as others are about to follow them. Raises OSError
        (EDQUOT) where there cannot be room.
        """
        lost = 0
        while self._segments.free_records() < records:
            with self._quota.locked():
                for _ in range(ROUNDS):
                    excess = self._quota.excess(self._segments.growth_bytes())
                    if excess <= 0 or self._segments.free_records() >= records:
                        break
                    lost += self._evict(max(excess, self._quota.batch), reuse=True, keep=keep)
                if self._segments.free_records() >= records:
                    break
                if self._quota.excess(self._segments.growth_bytes()) > 0:
                    raise OSError(errno.EDQUOT, "the quota of this directory holds nothing that could be evicted")
                self._quota.used += self._segments.growth_bytes()
                self._segments.grow()
        return lost

    def shrink(self) -> None:
        """Evict until the quota is kept, as far as other processes let it; before any segment is held."""
        with self._quota.locked():
            for _ in range(ROUNDS):
                excess = self._quota.excess(0)
                if excess <= 0:
                    return
                self._evict(excess, reuse=False)
        log.warning("hcache: %s takes more than its quota, and other processes use it.", self._path)

    def _evict(self, wanted: int, *, reuse: bool, keep: Collection[bytes] = ()) -> int:
        """Give up pages worth `wanted` bytes; how many of them were of this fingerprint and directory.

        `reuse`: their records in segments that can be had are kept, for the next pages.
        """
        wanted -= delete_unlisted(self._path, self._index)
        if wanted <= 0:
            return 0
        others = self._siblings()
        indexes = [self._index, *(others or [])]
        table = Table.read(indexes)
        forest = table.forest
        if others is None:
            forest = dataclasses.replace(forest, orphan=np.zeros(len(table.names), np.bool_))
        held = self._segments.held()
        freed = freeable(self._path, table, held=(self._segments.fingerprint, held))
        victims = choose(forest, table.worth(time.time(), forest, keep), freed, wanted)
        count = drop(indexes, table, victims)
        self._quota.evicted += count
        log.debug("%s: %d pages evicted", self._path, count)
        self._release(table, victims, reuse)
        return int((victims & (table.volume == 0) & table.of([self._segments.fingerprint])).sum())

    def _release(self, table: Table, victims: Mask, reuse: bool) -> None:
        """Reuse what the victims leave in our segments; give the rest back to the disk."""
        used = table.slots_in_use(~victims, volume=0)
        own = {name: slots for (owner, name), slots in used.items() if owner == self._segments.fingerprint}
        held = self._segments.held()
        self._segments.reuse({name: own.get(name, set()) for name in held})

        def adopt(fingerprint: bytes, name: str, in_use: set[int]) -> bool:
            mine = fingerprint == self._segments.fingerprint
            return mine and (name in held or (reuse and bool(in_use) and self._segments.adopt(name, in_use)))

        release(self._path, table, victims, used, adopt)


def freeable(path: Path, table: Table, held: tuple[bytes, set[str]] = (b"", set())) -> Ints:
    """Bytes that giving up each page returns: none in files that other processes write, or of other directories."""
    free = np.zeros(len(table.segment_example), np.bool_)
    for number, example in enumerate(table.segment_example.tolist()):
        fingerprint, name = table.segment(example)
        ours = fingerprint == held[0] and name in held[1]
        free[number] = table.volume[example] == 0 and (ours or not is_busy(segment_file(path, fingerprint, name)))
    return np.where(free[table.segment_number], table.record_bytes, 0) if len(free) else table.record_bytes


def drop(indexes: Sequence[Index], table: Table, victims: Mask) -> int:
    """Delete the victims in the indexes the table was read from; how many there were."""
    return sum(index.delete_names(table.places(victims, volume)) for volume, index in enumerate(indexes))


def release(
    path: Path,
    table: Table,
    victims: Mask,
    used: Mapping[tuple[bytes, str], set[int]],
    adopt: Callable[[bytes, str, set[int]], bool] = lambda _fingerprint, _name, _in_use: False,
    volume: int = 0,
) -> None:
    """Give the records of deleted pages of one index back to the disk; not those of segments that `adopt` takes."""
    numbers = np.unique(table.segment_number[victims & (table.volume == volume)])
    for example in table.segment_example[numbers].tolist():
        fingerprint, name = table.segment(example)
        in_use = used.get((fingerprint, name), set())
        file = segment_file(path, fingerprint, name)
        with census(file.parent):
            if not adopt(fingerprint, name, in_use):
                give_back(file, int(table.record_bytes[example]), in_use)


def delete_unlisted(path: Path, index: Index) -> int:
    """Delete the segments of fingerprints that the index does not list, if nobody writes them; bytes they took."""
    marks, total = index.marks(), 0
    for folder in (path / "segments").iterdir():
        try:
            fingerprint = bytes.fromhex(folder.name)
        except ValueError:
            continue
        if fingerprint in marks or len(fingerprint) != FINGERPRINT_BYTES:
            continue
        try:
            with census(folder):
                if fingerprint in index.marks():
                    continue
                for file in folder.glob("*.seg"):
                    size = os.lstat(file).st_blocks * 512
                    total += size if give_back(file, 1, ()) else 0
        except TimeoutError:
            log.debug("%s is being opened by another process", folder)
    return total


def segment_file(path: Path, fingerprint: bytes, name: str) -> Path:
    return path / "segments" / fingerprint.hex() / f"{name}.seg"
