"""One segment file: records of one size, back to back."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from sglang_hcache.storage.direct import DirectIO, File
from sglang_hcache.storage.files import allocate, punch, try_lock
from sglang_hcache.storage.layout import ChunkDamaged, Record

RUN_BYTES = 1 << 20  # of records written at once: enough for a disk's full speed with a few in flight


class SegmentWriter:
    """The one process that may write a segment; others see its lock and leave it alone.

    `write` may be called from several threads at once, for different records; the rest is for one. Every method
    raises OSError where the disk says so.
    """

    def __init__(self, fd: int, path: Path, record_bytes: int, io: DirectIO | None) -> None:
        self.path = path
        self.name = path.stem
        self._fd = fd
        self._file = File(fd, io)
        self._record_bytes = record_bytes
        self.records = os.fstat(fd).st_size // record_bytes

    @classmethod
    def create(cls, path: Path, record_bytes: int, io: DirectIO | None = None) -> SegmentWriter:
        """A new, empty file; raises FileExistsError where there is one."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        locked = try_lock(fd, exclusive=True)
        assert locked, "somebody locked a file that did not exist"
        return cls(fd, path, record_bytes, io)

    @classmethod
    def adopt(cls, path: Path, record_bytes: int, io: DirectIO | None = None) -> SegmentWriter | None:
        """A file that is there; None where another process is writing it, or it is missing or no file."""
        try:
            fd = _open_regular(path, os.O_RDWR)
        except ChunkDamaged:
            return None
        if not try_lock(fd, exclusive=True):
            os.close(fd)
            return None
        return cls(fd, path, record_bytes, io)

    def punch_all_but(self, used: Iterable[int]) -> int:
        """Give the disk space of all other records back, where the file system can; how many bytes that were."""
        before = self.disk_bytes()
        for last, end in pairwise([-1, *sorted(used), self.records]):
            if last + 1 < end:
                punch(self._fd, (last + 1) * self._record_bytes, (end - last - 1) * self._record_bytes)
        return before - self.disk_bytes()

    def disk_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def is_sparse(self) -> bool:
        """Whether some of it has no disk space of its own."""
        return self.disk_bytes() < os.fstat(self._fd).st_size

    def grow_to(self, records: int) -> None:
        """Take the disk space of so many records now, so that no later write can lack it."""
        if not allocate(self._fd, records * self._record_bytes):
            os.ftruncate(self._fd, records * self._record_bytes)
        self.records = records

    def truncate_to(self, records: int) -> None:
        os.ftruncate(self._fd, records * self._record_bytes)
        self.records = records

    def write(self, slot: int, records: Sequence[Record]) -> None:
        """Write records, uint8 [record_bytes] each, to consecutive slots; durable only after `sync`."""
        assert 0 <= slot <= self.records - len(records)
        self._file.write(slot * self._record_bytes, records)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class SegmentReader:
    """Reads records of a segment, from any thread; the file is closed when nobody refers to the reader any more."""

    def __init__(self, path: Path, record_bytes: int, io: DirectIO | None = None) -> None:
        """Raises ChunkDamaged where there is no such file, or no file but something else; OSError otherwise."""
        fd = _open_regular(path, os.O_RDONLY)
        weakref.finalize(self, os.close, fd)
        self._file = File(fd, io)
        self._record_bytes = record_bytes

    def read(self, slot: int, out: Record) -> None:
        """Fill `out`, uint8 [at most record_bytes], with a record from its start.

        Raises ChunkDamaged where the file ends before that; OSError where the disk says so, which proves nothing
        about the record.
        """
        assert out.size <= self._record_bytes
        if self._file.read(slot * self._record_bytes, out) < out.size:
            raise ChunkDamaged("the file is too short")


def runs(placed: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, list[Record]]]:
    """Join records, with their slots in one segment, that lie back to back: the first slot, the records.

    No run has more than RUN_BYTES, unless one record has.
    """
    start, run, size = 0, list[Record](), 0
    for slot, record in placed:
        if run and (slot != start + len(run) or size + record.size > RUN_BYTES):
            yield start, run
            run, size = [], 0
        if not run:
            start = slot
        run.append(record)
        size += record.size
    if run:
        yield start, run


def _open_regular(path: Path, mode: int) -> int:
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ChunkDamaged("the file is missing") from error
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise ChunkDamaged("it is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ChunkDamaged("it is not a regular file")
    return fd
