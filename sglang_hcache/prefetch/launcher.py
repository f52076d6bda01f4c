"""Starts a prefetcher and ends at once: `launcher.py PID COMMAND…`. Needs only the standard library.

So the prefetcher is nobody's child: SGLang kills all its children when it stops, before the prefetcher could have
written what is left. Its log goes where ours goes, to stderr, and to a file; whoever reads our stdout to its end must
not wait for it.

SGLang binds each scheduler to the CPUs of its GPU's NUMA node, and strictly to that node's memory. A prefetcher has
memory and threads for all ranks: it is bound as process PID is, which started the scheduler.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from subprocess import DEVNULL, Popen

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # the system call, which glibc has no function for
_DEFAULT = 0


def bind_as(pid: int) -> None:
    """Run on that process's CPUs, and take memory from any node if it does. Best effort."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
    call = _SET_MEMPOLICY.get(os.uname().machine)
    if call is not None and memory_policy(pid) == "default":
        ctypes.CDLL(None).syscall(call, _DEFAULT, None, 0)


def memory_policy(pid: int) -> str:
    """As the system writes it: `default`, `bind:0`, …; nothing where it does not say."""
    try:
        with Path(f"/proc/{pid}/numa_maps").open() as maps:
            return maps.readline().split()[1]
    except (OSError, IndexError):
        return ""


if __name__ == "__main__":
    bind_as(int(sys.argv[1]))
    os.environ.pop("NOTIFY_SOCKET", None)  # to systemd the server speaks for itself
    Popen(sys.argv[2:], stdin=DEVNULL, stdout=DEVNULL, start_new_session=True)
