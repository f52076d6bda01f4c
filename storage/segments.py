"""The segment files of one fingerprint in one directory: where the next record goes, and reading any."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from sglang_hcache.storage.direct import DirectIO
from sglang_hcache.storage.files import make_private, sync_directory
from sglang_hcache.storage.index import Used
from sglang_hcache.storage.locks import census
from sglang_hcache.storage.paths import segment_file, segment_files
from sglang_hcache.storage.segment import SegmentReader, SegmentWriter

OPEN_READERS = 128  # files kept open for reading
ADOPT_AT_MOST = 64  # files with free records kept open for writing


@dataclass
class _Held:
    """A segment this process writes, and its unused records, lowest last.

    `sparse`: some of it has lost its disk space; nothing is written to it until it has that again, and what else
    becomes unused loses it, too.
    """

    writer: SegmentWriter
    unused: list[int]
    sparse: bool = False

    def look_up(self, used: set[int]) -> int:
        self.unused = [slot for slot in range(self.writer.records - 1, -1, -1) if slot not in used]
        self.sparse = self.writer.is_sparse()
        return self.writer.punch_all_but(used) if self.sparse else 0

    @property
    def free(self) -> int:
        """How many pages can be placed in it."""
        return 0 if self.sparse else len(self.unused)

    @property
    def end(self) -> int:
        """Where its last used record ends."""
        end = self.writer.records
        for slot in self.unused:
            if slot < end - 1:
                break
            end = slot
        return end


class Segments:
    """Readers may be used from any thread, everything else from one. Methods raise OSError where the disk says so."""

    def __init__(self, path: Path, record_bytes: int, segment_bytes: int) -> None:
        self.path = path
        self.fingerprint = bytes.fromhex(path.name)
        self._record_bytes = record_bytes
        self.limit_to(segment_bytes)
        self._held: list[_Held] = []
        self._retired: set[str] = set()
        self._readers: OrderedDict[str, SegmentReader] = OrderedDict()
        self._readers_lock = threading.Lock()
        make_private(path)
        self.io = DirectIO(path)

    def limit_to(self, segment_bytes: int) -> None:
        """Segments grow no further than this, or one record."""
        self.segment_records = max(1, segment_bytes // self._record_bytes)

    def file(self, name: str) -> Path:
        return segment_file(self.path, name)

    def lengths(self) -> dict[str, int]:
        """How many whole records each segment has room for, by name."""
        return {name: status.st_size // self._record_bytes for name, status in segment_files(self.path)}

    def lock_unfilled(self, used: Used) -> None:
        """Under `census`: take the segments that may have room and that no other process writes; then `look_up`."""
        for name, records in self.lengths().items():
            if len(self._held) >= ADOPT_AT_MOST:
                return
            if 0 < used.count(name) < max(records, self.segment_records):
                writer = SegmentWriter.adopt(self.file(name), self._record_bytes, self.io)
                if writer is not None:
                    self.take(writer)

    def take(self, writer: SegmentWriter) -> bool:
        """Take a segment that the caller has locked, unless there are enough of them; then `look_up`."""
        if len(self._held) >= ADOPT_AT_MOST:
            return False
        self._held.append(_Held(writer, []))
        return True

    def look_up(self, used: Used) -> int:
        """Find the free records of all held segments; returns the bytes that this frees on disk, in sparse ones.

        `used` must have been read after the segments were taken, and no page may have been placed since.
        """
        return sum(held.look_up(used.of(held.writer.name)) for held in self._held)

    def held(self) -> set[str]:
        """The segments this process writes."""
        return {held.writer.name for held in self._held}

    def free_records(self) -> int:
        """How many pages can be placed without taking more of the disk."""
        return sum(held.free for held in self._held if held.writer.name not in self._retired)

    def growth_bytes(self) -> int:
        """What the next `grow` takes of the disk."""
        held = self._growable()
        full = self.segment_records * self._record_bytes
        return (
            full if held is None else max(full, held.writer.records * self._record_bytes) - held.writer.disk_bytes()
        )

    def grow(self) -> None:
        """Take more of the disk, for the next pages."""
        held = self._growable()
        if held is None:
            self._held.append(self._create())
        else:
            self._grow(held)

    def place(self) -> tuple[SegmentWriter, int]:
        """A segment and an unused record in it, for one page; makes room where there is none."""
        held = self._with_room()
        return held.writer, held.unused.pop()

    def make_room(self) -> None:
        """See to it that the next `place` needs nothing of the disk."""
        self._with_room()

    def give_up_full(self) -> None:
        """Close segments that can take no more; only after their records are committed."""
        for held in list(self._held):
            full = not held.unused and held.writer.records >= self.segment_records
            if full or held.writer.name in self._retired:
                self._held.remove(held)
                held.writer.close()

    def retire(self, name: str) -> None:
        """The file is not what it was: nothing more is written to it, and it is opened anew to read. Any thread."""
        self._retired.add(name)
        self.forget_reader(name)

    def forget_reader(self, name: str) -> None:
        """The next read opens the file anew. Any thread."""
        with self._readers_lock:
            self._readers.pop(name, None)

    def reader(self, name: str) -> SegmentReader:
        """Raises ChunkDamaged where the segment is missing or no file. Any thread."""
        with self._readers_lock:
            reader = self._readers.get(name)
            if reader is None:
                reader = self._readers[name] = SegmentReader(self.file(name), self._record_bytes, self.io)
            self._readers.move_to_end(name)
            if len(self._readers) > OPEN_READERS:
                self._readers.popitem(last=False)
        return reader

    def close(self) -> None:
        with self._readers_lock:
            self._readers.clear()
        self.give_up_writing()

    def give_up_writing(self) -> None:
        """Write no segment any more, and give preallocated space back. A segment without a record is deleted."""
        taken, self._held = self._held, []
        try:
            if taken:
                with census(self.path):
                    for held in taken:
                        if held.end:
                            held.writer.truncate_to(held.end)
                        else:
                            held.writer.truncate_to(0)  # this process, or another, may have it open, to read
                            held.writer.path.unlink(missing_ok=True)
        finally:
            for held in taken:
                held.writer.close()

    def _with_room(self) -> _Held:
        while True:
            for held in self._held:
                if held.free and held.writer.name not in self._retired:
                    return held
            self.grow()

    def _growable(self) -> _Held | None:
        for held in self._held:
            may_grow = held.writer.records < self.segment_records or (held.sparse and held.unused)
            if may_grow and held.writer.name not in self._retired:
                return held
        return None

    def _grow(self, held: _Held) -> None:
        start = held.writer.records
        held.writer.grow_to(max(self.segment_records, start))
        held.unused = [*range(held.writer.records - 1, start - 1, -1), *held.unused]
        held.sparse = False

    def _create(self) -> _Held:
        with census(self.path):
            writer = SegmentWriter.create(self.file(secrets.token_hex(8)), self._record_bytes, self.io)
        held = _Held(writer, [])
        try:
            self._grow(held)
            sync_directory(self.path)
        except OSError:
            writer.path.unlink(missing_ok=True)
            writer.close()
            raise
        return held
