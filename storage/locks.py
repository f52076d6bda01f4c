"""Locks on a directory's folders, by which processes that share it keep out of each other's way.

Whoever holds several takes them in this order: `opening`, `evicting`, `census`, then locks of segments, each held by
whoever writes it (`SegmentWriter`). All are the system's (`flock`): they end with the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sglang_hcache.storage.files import lock_within, make_private
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
