"""Memory that several processes map, and that is gone with the last of them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator

from sglang_hcache.storage.files import punch

LOOK_S = 0.2  # between two looks whether what lies behind is still used
_POLL_S = 0.02
_STEP_BYTES = 32 << 20
_HUGE_BYTES = 2 << 20
_MADV_COLLAPSE = 25  # since Linux 6.1; needs no huge pages to be reserved or enabled
_MAP_FIXED = 0x10
_MAP_FAILED = 2**64 - 1

logger = logging.getLogger(__name__)


class Region:
    """An anonymous file in memory (memfd), reached by other processes of the same user through `path`.

    Unlike a name in /dev/shm it leaves nothing behind, whatever kills its users, and a container's small /dev/shm
    does not bound it. `memory`: its bytes; valid as long as somebody refers to them. `size`: how many of them count.
    Raises OSError.
    """

    def __init__(self, fd: int, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.memory = mmap.mmap(fd, size)
        self._fd = fd
        self._stop = threading.Event()
        self._settling: threading.Thread | None = None

    @classmethod
    def create(cls, name: str, size: int) -> Region:
        """A region of zeroes. The system's memory is taken in the background, `size` bytes in all."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            region = cls(fd, f"/proc/{os.getpid()}/fd/{fd}", size)
        except (OSError, ValueError):
            os.close(fd)
            raise
        region.settle(lambda: False)
        return region

    @classmethod
    def attach(cls, path: str, size: int) -> Region:
        """The first `size` bytes of the region that another process created.

        Raises OSError where it cannot be reached or has less.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < size:
                raise OSError(errno.EINVAL, f"{path} has {os.fstat(fd).st_size} bytes, not {size}")
            return cls(fd, path, size)
        except OSError:
            os.close(fd)
            raise

    @property
    def taken(self) -> int:
        """Bytes of the system's memory that it takes by now."""
        return os.fstat(self._fd).st_blocks * 512

    def resize(self, size: int) -> None:
        """Have more bytes, or fewer that count. `memory` may be another mapping then; the former one stays valid."""
        self._end_settling()
        if size > len(self.memory):
            os.ftruncate(self._fd, size)
            self.memory = mmap.mmap(self._fd, size)
        self.size = size

    def settle(self, used_behind: Callable[[], bool]) -> None:
        """Start a thread that allocates the bytes that count, then frees those behind them; call it after `resize`.

        The thread frees them once `used_behind`, which it polls, returns False. `create` calls `settle` itself.
        """
        self._end_settling()
        self._stop.clear()
        self._settling = threading.Thread(
            target=self._settle, args=(used_behind,), name="hcache-populate", daemon=True
        )
        self._settling.start()

    def free(self) -> None:
        """Give its memory back now; whoever still refers to it finds zeroes. Raises OSError."""
        self._end_settling()
        punch(self._fd, 0, len(self.memory))

    def close(self) -> None:
        """No process can attach through this one any more; those that have keep their memory."""
        self._end_settling()
        os.close(self._fd)

    def _end_settling(self) -> None:
        """Waits for a step at most."""
        self._stop.set()
        if self._settling is not None:
            self._settling.join()

    def _settle(self, used_behind: Callable[[], bool]) -> None:
        """Touching a page for the first time costs a fault; take them ahead of use. Without memory, leave it."""
        try:
            for start, step in _steps(0, self.size):
                if self._stop.is_set():
                    return
                _make_contiguous(self._fd, start, step // _HUGE_BYTES)
                os.posix_fallocate(self._fd, start, step)
        except OSError as error:
            logger.warning(
                "hcache: the system gives %d bytes of host memory, not %d (%s): whoever uses more may be killed.",
                self.taken,
                self.size,
                error.strerror,
            )
        if self.size == len(self.memory):
            return
        while used_behind():
            if self._stop.wait(LOOK_S):
                return
        for start, step in _steps(self.size, len(self.memory)):
            if self._stop.is_set():
                return
            punch(self._fd, start, step)


def wait_until_taken(path: str, size: int, *, patience_s: float = 5.0) -> None:
    """Return once the region at `path` takes `size` bytes of the system's memory, or takes no more for so long."""
    most, since = 0, time.monotonic()
    with contextlib.suppress(OSError):  # whoever created it is gone
        while (taken := os.stat(path).st_blocks * 512) < size and time.monotonic() - since < patience_s:
            if taken > most:
                most, since = taken, time.monotonic()
            time.sleep(_POLL_S)


def _steps(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where each begins, and its length."""
    return ((at, min(_STEP_BYTES, end - at)) for at in range(start, end, _STEP_BYTES))


def _make_contiguous(fd: int, start: int, count: int) -> None:
    """Have `count` huge pages back an anonymous file from `start`, a multiple of their size, where the system can.

    A disk or a GPU transfers contiguous memory in fewer, larger pieces. Raises OSError without memory.
    """
    for page in range(count):
        os.posix_fallocate(fd, start + page * _HUGE_BYTES, mmap.PAGESIZE)  # the kernel collapses no empty range
    length = count * _HUGE_BYTES
    room = _libc.mmap(None, length + _HUGE_BYTES, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if room == _MAP_FAILED:
        return
    address = -(-room // _HUGE_BYTES) * _HUGE_BYTES
    if (
        _libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, start)
        == address
    ):
        _libc.madvise(address, length, _MADV_COLLAPSE)
    _libc.munmap(room, length + _HUGE_BYTES)


def _bind_libc() -> ctypes.CDLL:
    """With calls that release the GIL, as those of Python's mmap module do not."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, address = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.restype = address
    libc.mmap.argtypes = (address, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.madvise.argtypes = (address, size, ctypes.c_int)
    libc.munmap.argtypes = (address, size)
    return libc


_libc = _bind_libc()
