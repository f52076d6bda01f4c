"""Memory that several processes map, and that is gone with the last of them."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading

_STEP_BYTES = 32 << 20


class Region:
    """An anonymous file in memory (memfd), reached by other processes of the same user through `path`.

    Unlike a name in /dev/shm it leaves nothing behind, whatever kills its users, and a container's small /dev/shm
    does not bound it. `memory`: its bytes; valid as long as somebody refers to them. Raises OSError.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self._fd = fd

    @classmethod
    def create(cls, name: str, size: int) -> Region:
        """A region of zeroes. The system's memory is taken in the background, `size` bytes in all."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            region = cls(fd, f"/proc/{os.getpid()}/fd/{fd}")
        except (OSError, ValueError):
            os.close(fd)
            raise
        threading.Thread(target=_populate, args=(os.dup(fd), size), name="hcache-populate", daemon=True).start()
        return region

    @classmethod
    def attach(cls, path: str, size: int) -> Region:
        """The region that another process created. Raises OSError where it cannot be reached or has another size."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != size:
                raise OSError(errno.EINVAL, f"{path} has {os.fstat(fd).st_size} bytes, not {size}")
            return cls(fd, path)
        except OSError:
            os.close(fd)
            raise

    def close(self) -> None:
        """No process can attach through this one any more; those that have keep their memory."""
        os.close(self._fd)


def _populate(fd: int, size: int) -> None:
    """Touching a page for the first time costs a fault; take them ahead of use. Without memory, leave it."""
    with contextlib.suppress(OSError):
        for start in range(0, size, _STEP_BYTES):
            os.posix_fallocate(fd, start, min(_STEP_BYTES, size - start))
    os.close(fd)
