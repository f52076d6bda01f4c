"""Where a node's prefetcher is found: a socket and a lock named after the directories it serves, and its protocol."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_hcache.prefetch import messages
from sglang_hcache.storage.files import is_still, try_lock

LOOK_S = 0.1  # `is_running` has the lock for an instant; who has it for longer is a prefetcher
RETURN_S = 60.0  # how long after its last `touch` to wait for a prefetcher run by hand: systemd may restart it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Socket and lock of the one prefetcher for a set of directories, on this node and for this user.

    One for each version of the protocol: servers of two versions have one each, which share the directories' files.
    """

    socket: Path

    @classmethod
    def at(cls, address: str) -> Endpoint:
        return cls(Path(address.removeprefix("ipc://")))

    @property
    def address(self) -> str:
        return f"ipc://{self.socket}"

    @property
    def lock(self) -> Path:
        return self.socket.with_suffix(".lock")

    @property
    def by_hand(self) -> Path:
        """A file that a prefetcher run by hand creates, and touches for as long as it holds the lock."""
        return self.socket.with_suffix(".by-hand")

    def returns_within_s(self) -> float:
        """How long a prefetcher that was run by hand, and has ended, is waited for; 0 where there was none."""
        try:
            left = self.by_hand.stat().st_mtime + RETURN_S - time.time()
        except FileNotFoundError:
            return 0.0
        return min(max(0.0, left), RETURN_S)


def endpoint_for(directories: Sequence[str]) -> Endpoint:
    """Raises OSError where the directory for sockets cannot be made, or is not this user's alone."""
    return endpoint_named(name_for(directories))


def name_for(directories: Sequence[str]) -> str:
    """The name of these directories' endpoint. Resolves their paths, which may hang if one of their drives does."""
    names = "\0".join(sorted(os.path.realpath(directory) for directory in directories))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def endpoint_named(name: str) -> Endpoint:
    """Raises OSError, as `endpoint_for`."""
    return Endpoint(_runtime_directory() / f"{name}.{messages.VERSION}.sock")


def running(name: str) -> list[Endpoint]:
    """The endpoints of this name that this user's prefetchers serve, of any protocol version; ours comes first.

    Looks also where processes with another environment would put theirs. Raises OSError, as `endpoint_for`.
    """
    ours = endpoint_named(name)
    folders = (ours.socket.parent, Path(f"/run/user/{os.getuid()}/sglang-hcache"), _without_environment())
    locks = [
        lock for folder in dict.fromkeys(folders) if _is_private(folder) for lock in folder.glob(f"{name}.*.lock")
    ]
    found = [endpoint for lock in locks if is_running(endpoint := Endpoint(lock.with_suffix(".sock")))]
    return sorted(found, key=lambda one: (one.socket.name != ours.socket.name, one != ours))


def _runtime_directory() -> Path:
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    path = base / "sglang-hcache" if _is_for_us(base) else _without_environment()
    path.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(path):
        raise OSError(f"{path} must be a directory that only this user can enter; remove it")
    return path


def _without_environment() -> Path:
    return Path(f"/tmp/sglang-hcache-{os.getuid()}")


def _is_private(path: Path) -> bool:
    """Whether it is a directory that only this user can enter."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _is_for_us(base: Path) -> bool:
    """Whether the directory exists, is writable, and belongs to this user or to root, as a container's volume may.

    After `su`, or in Slurm or `docker -e`, XDG_RUNTIME_DIR may name a directory of another user or machine.
    """
    try:
        owner = base.stat().st_uid
    except OSError:
        return False
    return base.is_absolute() and base.is_dir() and owner in (os.getuid(), 0) and os.access(base, os.W_OK)


class InstanceLock:
    """Held by the one prefetcher of an endpoint, as long as it lives; the system releases it, whatever ends it.

    `returns`: whoever runs the prefetcher will start it again, so servers wait for that before they start their own.
    """

    def __init__(self, endpoint: Endpoint, fd: int, *, by_hand: bool = False) -> None:
        self._endpoint = endpoint
        self._fd = fd
        self.returns = by_hand
        if by_hand:
            endpoint.by_hand.touch()
        else:
            endpoint.by_hand.unlink(missing_ok=True)

    @classmethod
    def acquire(cls, endpoint: Endpoint, *, by_hand: bool = False) -> InstanceLock | None:
        """None where another process has it."""
        deadline = time.monotonic() + LOOK_S
        while True:
            fd = os.open(endpoint.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if not try_lock(fd, exclusive=True):
                os.close(fd)
                if time.monotonic() > deadline:
                    return None
                time.sleep(LOOK_S / 10)
                continue
            if is_still(endpoint.lock, fd):
                return cls(endpoint, fd, by_hand=by_hand)
            os.close(fd)  # its former owner has just removed it

    def touch(self) -> None:
        """Keep programs that clean /tmp by age from removing lock and socket.

        Without the socket nobody can join: then the lock goes, too, and the next server starts another prefetcher.
        """
        if not is_still(self._endpoint.lock, self._fd):
            return
        os.utime(self._fd)
        if self.returns:
            self._endpoint.by_hand.touch()
        try:
            os.utime(self._endpoint.socket)
        except FileNotFoundError:
            socket = self._endpoint.socket
            logger.warning("hcache: %s was removed: the next server starts another prefetcher.", socket)
            self._endpoint.lock.unlink(missing_ok=True)

    def release(self) -> None:
        """Remove socket and lock, unless the lock's file was removed already: then they are another prefetcher's."""
        if is_still(self._endpoint.lock, self._fd):
            self._endpoint.socket.unlink(missing_ok=True)
            if not self.returns:
                self._endpoint.by_hand.unlink(missing_ok=True)
            self._endpoint.lock.unlink(missing_ok=True)
        os.close(self._fd)


def is_running(endpoint: Endpoint) -> bool:
    """Whether some process holds the endpoint's lock."""
    try:
        fd = os.open(endpoint.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(fd, exclusive=False)
    finally:
        os.close(fd)
