"""What several modules do with files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

_POLL_S = 0.01
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def make_private(path: Path) -> None:
    """Make a directory, and those above it, that only this user can enter; one that is there stays as it is."""
    if not path.is_dir():
        make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def remove(path: Path) -> bool:
    """Remove whatever is there, file or directory with all it holds; whether there was anything."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except (IsADirectoryError, PermissionError):
        if path.is_symlink() or not path.is_dir():
            raise
        shutil.rmtree(path)
    return True


def device_of(path: Path) -> int:
    """Number of the file system that a path is on, or will be once it is made. Raises OSError."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_still(path: Path, fd: int) -> bool:
    """Whether an open file is what lies there now. Raises OSError where that cannot be seen."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(there, os.fstat(fd))
    except OSError:  # its file system is gone, and another one lies there
        return False


def try_lock(fd: int, exclusive: bool) -> bool:
    """Lock an open file, if nobody who minds has it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(fd: int, exclusive: bool, timeout_s: float) -> None:
    """Lock an open file; raises TimeoutError where another process keeps it for that long."""
    deadline = time.monotonic() + timeout_s
    while not try_lock(fd, exclusive):
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has kept a lock in this directory for {timeout_s:g} s")
        time.sleep(_POLL_S)


def allocate(fd: int, length: int) -> bool:
    """Take the disk space of a file's first bytes and make it as long; False where the file system has no such call.

    Not os.posix_fallocate: it would then write a byte to each block, which fails with O_DIRECT. Raises OSError.
    """
    return _fallocate(fd, 0, 0, length)


def punch(fd: int, offset: int, length: int) -> None:
    """Give a part of a file back to the disk, where the file system can; it reads as zeros then. Raises OSError."""
    _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    while _libc.fallocate(ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Readers find what was there before, or all of `data`; only this user can read it. Raises OSError."""
    make_private(path.parent)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
