"""One segment file: records of one size, back to back."""

from __future__ import annotations

import errno
import os
import stat
import weakref
from pathlib import Path

from sglang_hcache.storage.files import punch, try_lock
from sglang_hcache.storage.layout import ChunkDamaged, Record

_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS)


class SegmentWriter:
    """The one process that may write a segment; others see its lock and leave it alone. For one thread.

    Every method raises OSError where the disk says so.
    """

    def __init__(self, fd: int, path: Path, record_bytes: int) -> None:
        self.path = path
        self.name = path.stem
        self._fd = fd
        self._record_bytes = record_bytes
        self.records = os.fstat(fd).st_size // record_bytes

    @classmethod
    def create(cls, path: Path, record_bytes: int) -> SegmentWriter:
        """A new, empty file; raises FileExistsError where there is one."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        locked = try_lock(fd, exclusive=True)
        assert locked, "somebody locked a file that did not exist"
        return cls(fd, path, record_bytes)

    @classmethod
    def adopt(cls, path: Path, record_bytes: int) -> SegmentWriter | None:
        """A file that is there; None where another process is writing it."""
        fd = _open_regular(path, os.O_RDWR)
        if not try_lock(fd, exclusive=True):
            os.close(fd)
            return None
        return cls(fd, path, record_bytes)

    def punch(self, slot: int) -> None:
        """Give a record's disk space back, where the file system can."""
        punch(self._fd, slot * self._record_bytes, self._record_bytes)

    def disk_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def is_sparse(self) -> bool:
        """Whether some of it has no disk space of its own."""
        return self.disk_bytes() < os.fstat(self._fd).st_size

    def grow_to(self, records: int) -> None:
        """Take the disk space of so many records now, so that no later write can lack it."""
        try:
            os.posix_fallocate(self._fd, 0, records * self._record_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(self._fd, records * self._record_bytes)
        self.records = records

    def truncate_to(self, records: int) -> None:
        os.ftruncate(self._fd, records * self._record_bytes)
        self.records = records

    def write(self, slot: int, record: Record) -> None:
        """Write a record, uint8 [record_bytes]; durable only after `sync`."""
        assert 0 <= slot < self.records
        offset, rest = slot * self._record_bytes, record.data
        while rest:
            written = os.pwritev(self._fd, [rest], offset)
            offset, rest = offset + written, rest[written:]

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class SegmentReader:
    """Reads records of a segment, from any thread; the file is closed when nobody refers to the reader any more."""

    def __init__(self, path: Path, record_bytes: int) -> None:
        """Raises ChunkDamaged where there is no such file, or no file but something else; OSError otherwise."""
        fd = _open_regular(path, os.O_RDONLY)
        self._fd = fd
        self._record_bytes = record_bytes
        weakref.finalize(self, os.close, fd)

    def read(self, slot: int, out: Record) -> None:
        """Fill `out`, uint8 [at most record_bytes], from the start of a record.

        Raises ChunkDamaged where the file ends before that or cannot be read there.
        """
        offset, rest = slot * self._record_bytes, out.data
        while rest:
            try:
                done = os.preadv(self._fd, [rest], offset)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise ChunkDamaged("the disk cannot read it back") from error
                raise
            if not done:
                raise ChunkDamaged("the file is too short")
            offset, rest = offset + done, rest[done:]


def _open_regular(path: Path, mode: int) -> int:
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ChunkDamaged("the file is missing") from error
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise ChunkDamaged("it is not a regular file") from error
        if error.errno == errno.EIO:
            raise ChunkDamaged("the disk cannot open it") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ChunkDamaged("it is not a regular file")
    return fd
