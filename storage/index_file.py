"""The file of an index, while nobody has it open: whether it is as it was closed, and what of it can be trusted."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import xxhash

from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import make_private, remove, sync_directory
from sglang_hcache.storage.index_check import UNWRITABLE, last_transaction

CHECK_TIMEOUT_S = 20.0  # and a second more for every CHECK_RATE bytes
CHECK_RATE = 16 << 20

_SEAL = "closed.xxh3"
_SEALED = struct.Struct("<16sQ")  # digest of the file, number of its last transaction
_CHECK_PROGRAM = Path(__file__).with_name("index_check.py")


def prepare(path: Path, damage: Damage) -> None:
    """Make the index in a directory safe to open, for a caller who alone uses it.

    Keeps every sound entry of an index that can be read, in a fresh file, or on a full disk in the same one; removes
    one that cannot. Starts a process and waits for it. Raises OSError where the disk does not let it.
    """
    if os.path.lexists(path) and not path.is_dir():
        damage.file(path, "it is not a directory")
        remove(path)
    make_private(path)
    remove(path / "lock.mdb")
    for leftover in path.glob("check-*"):
        remove(leftover)
    data, seal = path / "data.mdb", path / _SEAL
    if is_sealed(path) or not os.path.lexists(data):
        return
    fresh = path / "check-data.mdb"
    try:
        reason = copy_checked(data, fresh, damage)
        remove(seal)
        if reason is None:
            os.replace(fresh, data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        reason = _write_over(data, seal, damage)
    finally:
        remove(fresh)
    if reason is not None:
        damage.file(data, reason)
        remove(data)
    sync_directory(path)


def _write_over(data: Path, seal: Path, damage: Damage) -> str | None:
    """Replace the index by a checked copy that is made in memory, so that it needs no more space on disk.

    If this is interrupted, the next check finds it unreadable. The file keeps its length, for the index to grow.
    """
    with open(os.memfd_create("hcache-index"), "rb") as copy:
        reason = copy_checked(data, Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}"), damage)
        remove(seal)
        if reason is None:
            with open(data, "r+b") as file:
                shutil.copyfileobj(copy, file)
                os.fsync(file.fileno())
    return reason


def seal_closed(path: Path) -> None:
    """Note what the index holds, for a caller who alone uses it and has closed it; it then opens without a check.

    Where the disk is full the next opening does check it.
    """
    data = path / "data.mdb"
    content = _SEALED.pack(_digest(data), last_transaction(path))
    temporary = path / f"{_SEAL}.new"
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
        os.replace(temporary, path / _SEAL)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def unseal(path: Path) -> None:
    """From now on the index may change."""
    if remove(path / _SEAL):
        sync_directory(path)


def is_sealed(path: Path) -> bool:
    """Whether the index is, byte for byte, as it was when it was closed."""
    sealed = _read_seal(path)
    try:
        return sealed is not None and sealed[0] == _digest(path / "data.mdb")
    except OSError:
        return False


def _read_seal(path: Path) -> tuple[bytes, int] | None:
    """The digest of the index when it was closed, and the number of its last transaction."""
    try:
        content = (path / _SEAL).read_bytes()
    except OSError:
        return None
    return _SEALED.unpack(content) if len(content) == _SEALED.size else None


def _digest(data: Path) -> bytes:
    """Of a regular file's content; raises OSError for anything else."""
    with open(data, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).digest()


def copy_checked(data: Path, fresh: Path, damage: Damage) -> str | None:
    """Copy what is sound of the index to a file `fresh`; why there is nothing to keep, or None."""
    if not data.is_file():
        return "it is not a regular file"
    timeout_s = CHECK_TIMEOUT_S + data.stat().st_size / CHECK_RATE
    command = [sys.executable, "-P", str(_CHECK_PROGRAM), str(data.parent), str(fresh)]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {timeout_s:.0f} s"
    if child.returncode == UNWRITABLE:
        raise OSError(errno.ENOSPC, f"no fresh copy of the index can be written ({child.stderr.strip()})")
    if child.returncode == -signal.SIGKILL:  # the kernel's doing, for want of memory; no damage is known to do that
        raise OSError(errno.ENOMEM, "the check of the index was killed")
    if child.returncode:
        return f"reading it failed (status {child.returncode}: {child.stderr.strip() or 'no message'})"
    dropped, last = map(int, child.stdout.split())
    sealed = _read_seal(data.parent)
    if sealed is not None and sealed[1] != last:
        return "it is not as of the last transaction"
    if dropped:
        damage.file(data, f"{dropped} of its entries were changed and are dropped")
        damage.count_pages(dropped)
    return None
