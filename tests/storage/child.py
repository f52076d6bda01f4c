"""A process with a store of its own, for tests that kill or restrict it.

Usage: `python -m tests.storage.child ROLE DIRECTORY [ARGUMENT]` in the repository.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

from tests.storage.pages import LAYOUT, open_store, save, served, states

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def write_forever(directory: Path, start: str) -> None:
    """Report each page once it is flushed, until killed."""
    store = open_store(directory)
    for page in range(int(start), 1 << 30):
        save(store, [page])
        assert store.flush(30)
        print(page, flush=True)


def write_then_wait(directory: Path, pages: str) -> None:
    """Write pages 0.., report, and serve them again when asked by a line of input."""
    store = open_store(directory)
    save(store, range(int(pages)))
    assert store.flush(30)
    print("written", flush=True)
    sys.stdin.readline()
    store.drop_host()
    print(len(served(store, range(int(pages)))), flush=True)
    store.close()


def write_on_full_disk(directory: Path, _: str) -> None:
    """EFBIG stands for ENOSPC: the same path, and no disk has to be filled."""
    store = open_store(directory, retry_s=0.2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * LAYOUT.record_bytes, hard))
    report_failure_and_recovery(store, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))


def write_unwritable(directory: Path, _: str) -> None:
    if os.geteuid() == 0 and "CONFINED" not in os.environ:  # root ignores permissions; without this it does not
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                print("cannot drop capabilities", flush=True)
                return
        os.environ["CONFINED"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.storage.child", *sys.argv[1:]])
    directory.chmod(0o500)
    report_failure_and_recovery(open_store(directory, retry_s=0.2), lambda: directory.chmod(0o700))


def report_failure_and_recovery(store, recover) -> None:  # type: ignore[no-untyped-def]
    save(store, range(4))
    assert store.flush(30)
    print(states(store)[0], flush=True)
    print(served(store, range(4)), store.stats()["pages_write_failed"], flush=True)
    recover()
    deadline = time.monotonic() + 10
    while states(store) != ["ok"] and time.monotonic() < deadline:
        time.sleep(0.05)
    save(store, range(10, 14))
    assert store.flush(30)
    store.drop_host()
    print(states(store)[0], served(store, range(10, 14)), flush=True)
    store.close()


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    role, directory, argument = [*sys.argv[1:], ""][:3]
    globals()[role](Path(directory), argument)
