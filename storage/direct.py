"""Reading and writing files past the page cache (O_DIRECT), with several operations in flight."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from sglang_hcache.storage.layout import ALIGNMENT, Record

_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_Transfer = Callable[[int, list[memoryview], int], int]

logger = logging.getLogger(__name__)


def aligned(n_bytes: int) -> Record:
    """Zeros, uint8 [n_bytes rounded up to ALIGNMENT], whose address direct I/O accepts."""
    return np.frombuffer(mmap.mmap(-1, max(1, -(-n_bytes // ALIGNMENT)) * ALIGNMENT), np.uint8)


def refusal(directory: Path) -> str | None:
    """Why files in a directory cannot be read and written directly; None where nothing is known against it.

    Tries it with a file of one block, which a full or read-only disk does not count against.
    """
    block, back = aligned(ALIGNMENT), aligned(ALIGNMENT)
    block[:] = np.arange(ALIGNMENT) % 251
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            _set_direct(file.fileno(), True)
            os.pwritev(file.fileno(), [block.data], 0)
            os.preadv(file.fileno(), [back.data], 0)
    except OSError as error:
        return f"the file system or its block size does not allow it ({error})" if error.errno in _REFUSED else None
    return None if np.array_equal(block, back) else "what was written did not come back"


class DirectIO:
    """Whether the files of one directory are accessed directly; says once where they are not. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._said = False
        reason = refusal(directory)
        self.allowed = reason is None
        if reason is not None:
            self.refused(reason)

    def refused(self, reason: str) -> None:
        with self._lock:
            said, self._said = self._said, True
        if not said:
            logger.warning(
                "hcache: files in %s go through the page cache, which costs memory and speed: %s.",
                self._directory,
                reason,
            )


class File:
    """An open file, from any thread. Direct where `io` allows it and until the system refuses; then buffered.

    The descriptor stays the caller's. Every method raises OSError where the disk says so.
    """

    def __init__(self, fd: int, io: DirectIO | None) -> None:
        self._fd = fd
        self._io = io
        self.direct = False
        if io is not None and io.allowed:
            try:
                _set_direct(fd, True)
                self.direct = True
            except OSError as error:
                io.refused(str(error))

    def read(self, offset: int, out: Record) -> int:
        """Fill `out`, uint8 [n], from a byte offset; how many bytes there were: fewer than n where the file ends."""
        skip = offset % ALIGNMENT
        if not self.direct or (not skip and _is_aligned(out)):
            return self._read(offset, out)
        scratch = aligned(skip + out.size)
        done = min(max(0, self._read(offset - skip, scratch) - skip), out.size)
        out[:done] = scratch[skip : skip + done]
        return done

    def write(self, offset: int, data: Sequence[Record]) -> None:
        """Write arrays, uint8, back to back from a byte offset; offset and sizes are multiples of ALIGNMENT."""
        if self.direct:
            data = [part if _is_aligned(part) else _aligned_copy(part) for part in data]
        rest = [part.data for part in data if part.size]
        while rest:
            written = self._try(os.pwritev, rest, offset)
            offset += written
            while rest and written >= rest[0].nbytes:
                written -= rest.pop(0).nbytes
            if rest:
                rest[0] = rest[0][written:]

    def _read(self, offset: int, out: Record) -> int:
        done = 0
        while done < out.size:
            got = self._try(os.preadv, [out.data[done:]], offset + done)
            done += got
            if not got or (self.direct and got % ALIGNMENT):  # only the end of the file cuts a block
                break
        return done

    def _try(self, operation: _Transfer, data: list[memoryview], offset: int) -> int:
        direct = self.direct
        try:
            return operation(self._fd, data, offset)
        except OSError as error:
            if not direct or self._io is None or error.errno not in _REFUSED:
                raise
            self.direct = False
            _set_direct(self._fd, False)
            self._io.refused(str(error))
        return operation(self._fd, data, offset)


def run_parallel(jobs: Sequence[Callable[[], object]], depth: int) -> None:
    """Run jobs, at most `depth` at a time; the calling thread takes part.

    Returns when none is under way any more. Raises the first error a job raised; after that none is started.
    """
    left = iter(jobs)
    errors: list[BaseException] = []

    def work() -> None:
        for job in left:  # taking the next one from a list's iterator is atomic
            if errors:
                return
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
                errors.append(error)

    threads = list[threading.Thread]()
    with suppress(RuntimeError):  # the limit of threads is reached: those that could be started do it all
        for _ in range(min(depth, len(jobs)) - 1):
            thread = threading.Thread(target=work, name="hcache-io", daemon=True)
            thread.start()
            threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _set_direct(fd: int, direct: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)


def _is_aligned(data: Record) -> bool:
    return not (data.__array_interface__["data"][0] | data.size) % ALIGNMENT


def _aligned_copy(data: Record) -> Record:
    copy = aligned(data.size)
    copy[:] = data
    return copy
