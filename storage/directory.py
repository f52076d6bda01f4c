"""One directory, open for one fingerprint: its lock, its index, its segments.

    hcache.lock                      shared while open; exclusive while the first to open it checks the index
    index/{data.mdb, lock.mdb}       of all fingerprints
    segments/<fingerprint>/*.seg     of one
    segments/<fingerprint>/about.json    what the fingerprint stands for, for people and tools

Several processes may have it open, for the same or other fingerprints. What the index names was whole and
durable when it was named; records the index does not name are free.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sglang_hcache.storage.about import write_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.direct import run_parallel
from sglang_hcache.storage.eviction import Keep
from sglang_hcache.storage.evictor import Evictor
from sglang_hcache.storage.files import is_still, make_private
from sglang_hcache.storage.index import Index, Size, Used
from sglang_hcache.storage.index_check import PARENT_BYTES, Entry
from sglang_hcache.storage.layout import ChunkDamaged, ChunkLayout, Record, read_header, verify
from sglang_hcache.storage.locks import census, open_shared, seal_if_last
from sglang_hcache.storage.paths import folder_of, index_folder, lock_file
from sglang_hcache.storage.quota import Quota
from sglang_hcache.storage.segment import SegmentReader, SegmentWriter, runs
from sglang_hcache.storage.segments import Segments
from sglang_hcache.storage.sweep import sweep_folder

IDLE_S = 300.0  # without a write, until others may evict what lies in the segments that were written
WRITES_IN_FLIGHT = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What is kept in a directory, and how."""

    layout: ChunkLayout
    fingerprint: bytes
    segment_bytes: int  # of a segment file, at most
    about: Mapping[str, str] = field(default_factory=dict)  # what the fingerprint stands for, for people


class Directory:
    """`locate`, `read` from any thread; everything else from one. Methods raise OSError or lmdb.Error."""

    def __init__(
        self,
        path: Path,
        contents: Contents,
        *,
        damage: Damage,
        quota: Quota | None = None,
        siblings: Callable[[], Sequence[Index] | None] = list,
    ) -> None:
        """`siblings`: indexes of the directories that hold other pages of the same prefixes; None where unknown."""
        self._path = path
        self._layout = layout = contents.layout
        self._fingerprint = contents.fingerprint
        self._segment_bytes = contents.segment_bytes
        self._damage = damage
        self._quota = quota
        self._size = Size(layout.record_bytes, layout.page_tokens)
        self._wrote_at: float | None = None  # monotonic; None: it holds no segments
        make_private(path)
        folder = folder_of(path, self._fingerprint)
        with ExitStack() as opened:
            self._lock = open_shared(path, damage)
            opened.callback(os.close, self._lock)
            self._index = Index(index_folder(path), self._fingerprint)
            opened.callback(seal_if_last, path, self._lock, self._index)
            opened.callback(self._index.close)
            self._segments = Segments(folder, layout.record_bytes, self._at_most())
            opened.callback(self._segments.close)
            try:
                write_about(folder, layout, contents.about)
            except OSError as error:  # on a full disk, which is about to be shrunk
                logger.info("hcache: it is not noted what the pages in %s are of (%s)", folder, error)
            self._evictor = Evictor(path, self._index, self._segments, quota, siblings) if quota is not None else None
            self._recover()
            self._opened = opened.pop_all()

    @property
    def index(self) -> Index:
        return self._index

    @property
    def pages(self) -> int:
        """Pages on file, as far as this process knows: what others write and delete is seen when it evicts."""
        return self._index.pages

    def locate(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """Where those of the pages lie that are here."""
        return self._index.get_many(keys)

    def read(self, key: bytes, entry: Entry, out: Record) -> bool:
        """Read a located page into `out`, uint8 [record_bytes], and verify it; False where it cannot be had whole.

        A damaged page is counted and leaves the index; one that the disk fails to read does not. One that was evicted
        since it was located is only missed.
        """
        damaged = self._try_read(key, entry, out)
        if damaged is None:
            return True
        if not self._is_at(key, entry):
            return False
        damaged = self._try_read(key, entry, out)  # it may have been evicted and stored there anew in the meantime
        if damaged is not None:
            self._damage.page(self._segments.file(entry.segment), damaged.reason)
            self._index.delete_many([(key, entry)])
        return damaged is None

    def write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep = list) -> None:
        """Write sealed records and name them in the index; durable on return. If it raises, none is named.

        With a quota, pages that are not in `keep` may be evicted, and if it raises, the first records may be named.
        """
        at_once = len(pages) if self._evictor is None else self._segments.segment_records
        for start in range(0, len(pages), max(1, at_once)):
            self._write(pages[start : start + at_once], keep)

    def _write(self, pages: Sequence[tuple[bytes, Record]], keep: Keep) -> None:
        if self._wrote_at is None:
            self._take_segments()
        self._wrote_at = time.monotonic()
        if self._evictor is not None:
            self._evictor.make_room(len(pages), keep)
        placed, writers = [], defaultdict[SegmentWriter, list[tuple[int, Record]]](list)
        for key, record in pages:
            writer, slot = self._segments.place()
            writers[writer].append((slot, record))
            parent = read_header(record, self._layout).parent
            placed.append((key, Entry(writer.name, slot, parent[:PARENT_BYTES], 0, int(time.time()))))
        writes = [partial(writer.write, *run) for writer, records in writers.items() for run in runs(records)]
        run_parallel(writes, WRITES_IN_FLIGHT)
        for writer in writers:
            writer.sync()
        self._index.put_many(placed)
        self._segments.give_up_full()

    def rest(self) -> None:
        """Call often: after IDLE_S without a write, release our segments: others may then write and evict there."""
        if self._wrote_at is not None and time.monotonic() - self._wrote_at > IDLE_S:
            self._wrote_at = None
            self._segments.give_up_writing()

    def touch(self, hits: Mapping[bytes, int]) -> None:
        """Note that pages were used now, so many times each."""
        self._index.touch(hits, int(time.time()))

    def is_lost(self) -> bool:
        """Whether it has to be opened anew: its index is broken, or other files lie there now. Raises OSError."""
        if not is_still(lock_file(self._path), self._lock):
            self._index.condemn()
        return self._index.condemned

    def recover(self) -> None:
        """Resume after a failure: use records that failed writes have left, and files that somebody has put back."""
        with suppress(OSError):  # whether the disk works is found out below
            self._segments.give_up_writing()
        make_private(self._segments.path)
        self._segments.limit_to(self._at_most())
        self._recover()

    def probe(self) -> None:
        """Raise unless the next write can be expected to succeed: there is room, and the index takes entries."""
        self._index.mark(self._size)
        if self._evictor is not None:
            self._evictor.make_room(1)
        else:
            self._segments.make_room()

    def close(self) -> None:
        """Everything is closed also where it raises OSError."""
        self._opened.close()

    def _at_most(self) -> int:
        """Bytes of a segment file, as the quota is now."""
        return self._segment_bytes if self._quota is None else self._quota.segment_bytes(self._segment_bytes)

    def _try_read(self, key: bytes, entry: Entry, out: Record) -> ChunkDamaged | None:
        try:
            self._segments.reader(entry.segment).read(entry.slot, out)
        except ChunkDamaged as damaged:
            if self._is_at(key, entry):
                self._segments.retire(entry.segment)
            else:
                self._segments.forget_reader(entry.segment)
            return damaged
        try:
            verify(out, self._layout, self._fingerprint, key)
        except ChunkDamaged as damaged:
            return damaged
        return None

    def _is_at(self, key: bytes, entry: Entry) -> bool:
        now = self._index.get_many([key]).get(key)
        return now is not None and now.place == entry.place

    def _recover(self) -> None:
        with census(self._segments.path):
            if not self._index.is_marked(self._size):
                self._rebuild()
                self._index.mark(self._size)
            used = self._drop_lost()
        if self._evictor is not None:
            self._evictor.shrink()
        self._take_segments(used)

    def _take_segments(self, former: Used | None = None) -> None:
        """Write those that have room from now on."""
        with census(self._segments.path):
            used = self._index.used(self._fingerprint, former)
            self._segments.lock_unfilled(used)
            sweep_folder(self._segments.path, self._index, self._segments, used)
        self._wrote_at = time.monotonic()

    def _drop_lost(self) -> Used:
        """Delete entries whose records are missing; returns the records that were named before."""
        # Read the index before the lengths: a writer extends a file before it names records in it.
        used = self._index.used(self._fingerprint)
        lengths = self._segments.lengths()
        if all(max(used.of(segment)) < lengths.get(segment, 0) for segment in used.slots):
            return used
        entries = self._index.entries()
        lengths = self._segments.lengths()
        lost = [(key, entry) for key, entry in entries if entry.slot >= lengths.get(entry.segment, 0)]
        lost = [(key, entry) for key, entry in lost if self._is_at(key, entry)]
        for _, entry in lost:
            reason = (
                "the file is too short" if entry.segment in lengths else "the file is missing or not a regular one"
            )
            self._damage.page(self._segments.file(entry.segment), reason)
        self._index.delete_many(lost)
        return used

    def _rebuild(self) -> None:
        """Add the pages with sound headers to the index. Their payloads are verified on reading, as always.

        A disk error ends the rebuild: records that are not listed count as free, and would be overwritten.
        """
        lengths = self._segments.lengths()
        found: dict[bytes, Entry] = {}
        record = np.empty(self._layout.header_bytes, np.uint8)
        for name, records in lengths.items():
            try:
                reader = SegmentReader(self._segments.file(name), self._layout.record_bytes)
            except ChunkDamaged as damaged:
                self._damage.file(self._segments.file(name), damaged.reason)
                continue
            last_use = int(self._segments.file(name).stat().st_mtime)
            for slot in range(records):
                try:
                    reader.read(slot, record)
                    header = read_header(record, self._layout)
                except ChunkDamaged as damaged:
                    logger.debug("record %d of %s is not listed: %s", slot, name, damaged)
                    continue
                if header.fingerprint == self._fingerprint:
                    found[header.key] = Entry(name, slot, header.parent[:PARENT_BYTES], 0, last_use)
        if lengths:
            known = self._index.get_many(list(found))
            lost = {key: entry for key, entry in found.items() if key not in known}
            self._index.put_many(lost.items())
            self._damage.rebuilt(self._index.path, len(lost))
