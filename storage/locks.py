"""Locks on a directory and its folders, by which processes that share it keep out of each other's way.

Whoever holds several takes them in this order: `opening`, `hcache.lock` (for as long as the directory is open),
`evicting`, `census`, then locks of segments, each held by whoever writes it (`SegmentWriter`). All are the system's
(`flock`): they end with the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import is_still, lock_within, make_private, remove, try_lock
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_file import prepare, seal_closed
from sglang_hcache.storage.paths import index_folder, lock_file
from sglang_hcache.storage.segment import SegmentWriter

LOCK_WAIT_S = 30.0
EVICTING_S = 300.0  # as above, where others may be evicting one after the other, each some ten seconds


def evicting(path: Path, timeout_s: float = LOCK_WAIT_S) -> AbstractContextManager[None]:
    """While it lasts nobody else who keeps the directory's quota grows or evicts there."""
    return _directory_lock(path / "segments", timeout_s)


def census(folder: Path) -> AbstractContextManager[None]:
    """While it lasts no process creates, adopts or deletes a segment in this folder of a fingerprint."""
    return _directory_lock(folder, LOCK_WAIT_S)


def opening(path: Path) -> AbstractContextManager[None]:
    """While it lasts nobody else locks `hcache.lock`. Who has locked it before knows that the index was checked."""
    return _directory_lock(path, LOCK_WAIT_S)


def is_busy(file: Path) -> bool:
    """Whether some process writes the segment, or the file is missing or not a regular one."""
    writer = SegmentWriter.adopt(file, 1)
    if writer is None:
        return True
    writer.close()
    return False


@contextmanager
def _directory_lock(folder: Path, timeout_s: float) -> Iterator[None]:
    make_private(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock_within(fd, exclusive=True, timeout_s=timeout_s)
        yield
    finally:
        os.close(fd)


# ---- hcache.lock ----


def open_shared(path: Path, damage: Damage) -> int:
    """Hold `hcache.lock` until it is closed; if nobody else does, check the index first."""
    with opening(path):
        while True:
            lock = _open_lock(lock_file(path), damage)
            try:
                if try_lock(lock, exclusive=True):
                    prepare(index_folder(path), damage)
                lock_within(lock, exclusive=False, timeout_s=LOCK_WAIT_S)
                if is_still(lock_file(path), lock):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def seal_if_last(path: Path, lock: int, index: Index) -> None:
    """If nobody else holds the directory's lock, seal a sound, closed index: the next opening need not check it."""
    if index.sound and is_still(lock_file(path), lock) and try_lock(lock, exclusive=True):
        seal_closed(index_folder(path))


def _open_lock(path: Path, damage: Damage) -> int:
    if os.path.lexists(path) and not path.is_file():
        damage.file(path, "it is not a regular file")
        remove(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold `hcache.lock` for a command, and yield whether exclusively: then no other process can open the directory.

    The index is not checked, and a lock file that is damaged not replaced.
    """
    with ExitStack() as gate:
        gate.enter_context(opening(path))
        fd = _open_or_create(path)
        try:
            exclusive = try_lock(fd, exclusive=True)
            if not exclusive:
                lock_within(fd, exclusive=False, timeout_s=LOCK_WAIT_S)
                gate.close()
            yield exclusive
        finally:
            os.close(fd)


def _open_or_create(path: Path) -> int:
    """Open the lock file; if there is none, create one that the server can open, too.

    It is opened for writing, which an exclusive lock needs on NFS, or for reading if the file system is read-only, as
    a failing drive leaves it.
    """
    name, flags = lock_file(path), os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        try:
            return os.open(name, flags | os.O_RDWR)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return os.open(name, flags | os.O_RDONLY)
    fd = os.open(name, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    if os.geteuid() == 0:
        owner = (path / "segments").stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
    return fd
