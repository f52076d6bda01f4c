"""A process with a store of its own, for tests that kill or restrict it.

Usage: `python -m tests.storage.child ROLE DIRECTORY [ARGUMENT]` in the repository.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sglang_hcache.cli.main import main
from sglang_hcache.storage import store as store_module
from sglang_hcache.storage.store import LocalStore
from tests.storage.pages import LAYOUT, counters, open_store, save, served, states

PATIENCE_S = 60.0
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
REPOSITORY = Path(__file__).parents[2]


def start_child(role: str, directory: Path, *argument: object, within: Sequence[str] = ()) -> subprocess.Popen[str]:
    """For the test: the process, in that role. `within`: a command that runs another one."""
    command = [*within, sys.executable, "-m", "tests.storage.child", role, str(directory), *map(str, argument)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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


def open_on_full_disk(mounted: Path, _: str) -> None:
    """After a kill, on a file system of its own: whether it can be repaired, used, and made smaller."""
    directory, quota = mounted / "cache", 100 * LAYOUT.record_bytes
    store = open_store(directory, quota_bytes=quota)
    save(store, range(50))
    store.close()

    def kill_and_fill() -> None:
        (directory / "index" / "closed.xxh3").unlink(missing_ok=True)
        with suppress(OSError), open(mounted / f"{time.time_ns()}", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    kill_and_fill()
    repaired = main(["fsck", "--repair", "--dir", str(directory)])
    kill_and_fill()
    store = open_store(directory, quota_bytes=quota)
    found = len(served(store, range(50)))
    store.close()
    kill_and_fill()
    shrunk = main(["gc", "--to-size", "300kB", "--dir", str(directory)])
    print(repaired, found, shrunk, flush=True)


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


def write_without_fallocate(directory: Path, _: str) -> None:
    """As on a file system that cannot preallocate: a filter of system calls has that one fail."""
    number = {"x86_64": 285, "aarch64": 47}.get(platform.machine())
    refused, allowed = 0x00050000 | errno.EOPNOTSUPP, 0x7FFF0000
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refused), (0x06, 0, 0, allowed)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps) if number else b"")
    libc, address = ctypes.CDLL(None), ctypes.c_uint64(ctypes.addressof(program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), address.value))
    if not number or libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, 2, filter_):
        print("cannot filter system calls", flush=True)
        return
    store = open_store(directory, retry_s=0.2)
    save(store, range(20))
    assert store.flush(30)
    store.drop_host()
    print(states(store)[0], len(served(store, range(20))), flush=True)
    store.close()


def survive_errors(directory: Path, arguments: str) -> None:
    """With `io_errors.c` preloaded: use a store of two directories while transfers fail, then without, and report.

    Argument: operations at least, probability of an error. There are more, up to a hundred times as many, until there
    were errors of each kind, and what they lead to.
    """
    errors = ctypes.CDLL(None)
    errors.errors_set.argtypes = [ctypes.c_double]
    errors.errors_injected.restype = ctypes.c_ulong
    operations, probability = arguments.split()
    pages = range(300)  # and more with time: one that is on file is not written again
    chance = random.Random(1)
    store = open_store(directory / "a", directory / "b", retry_s=0.02)
    errors.errors_set(float(probability))
    os.environ["HCACHE_ERRORS_P"] = probability  # for the check of the index, a process of its own
    seen: set[str] = set()
    right = done = 0

    def complete() -> bool:
        count = counters(store)
        return (
            all(errors.errors_injected(kind) for kind in range(4))
            and any(state.startswith("failed: the disk") for state in seen)
            and bool(count["pages_write_failed"] and count["pages_unreadable"])
        )

    while done < int(operations) or (done < 100 * int(operations) and not complete()):
        done += 1
        pages = range(max(300, done // 4))
        seen.update(states(store))
        match chance.randrange(20):
            case 0:
                store.drop_host()
            case 1:
                assert store.flush(30)
            case 2:
                store.check()
            case case if case < 11:
                if not store.available:
                    assert store.flush(30)
                save(store, [chance.choice(pages)])
            case _:
                right += len(served(store, chance.sample(pages, 4)))
    errors.errors_set(0.0)
    del os.environ["HCACHE_ERRORS_P"]
    during = counters(store)
    recovered = recover(store, list(pages))
    files = [served_from_files(store, list(pages))]
    damaged, rebuilt = (counters(store)[name] for name in ("pages_damaged", "index_rebuilt"))
    store.check()
    store.close()
    for _ in range(2):
        store = open_store(directory / "a", directory / "b")
        files.append(served_from_files(store, list(pages)))
        store.check()
        after = counters(store)
        store.close()
    report = {
        "operations": done,
        "right": right,
        "injected": [errors.errors_injected(kind) for kind in range(5)],
        "states": sorted(seen),
        "during": during,
        "damaged": damaged,
        "rebuilt": rebuilt,
        "recovered": recovered,
        "missing": [len(pages) - found for found in files],
        "after": after,
    }
    print(json.dumps(report), flush=True)


def recover(store: LocalStore, pages: list[int]) -> list[str]:
    """Wait until all directories work again, and save what is not in files."""
    deadline = time.monotonic() + PATIENCE_S
    while set(states(store)) != {"ok"} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.flush(30)
    store.drop_host()
    for page in pages:
        if not served(store, [page]):
            save(store, [page])
            assert store.flush(30)
    return states(store)


def served_from_files(store: LocalStore, pages: list[int]) -> int:
    store.drop_host()
    return len(served(store, pages))


def report_failure_and_recovery(store, recover) -> None:  # type: ignore[no-untyped-def]
    save(store, range(4))
    assert store.flush(30)
    print(states(store)[0], flush=True)
    print(served(store, range(4)), store.stats()["pages_write_failed"], flush=True)
    recover()
    deadline = time.monotonic() + PATIENCE_S
    while states(store) != ["ok"] and time.monotonic() < deadline:
        time.sleep(0.05)
    save(store, range(10, 14))
    assert store.flush(30)
    store.drop_host()
    print(states(store)[0], served(store, range(10, 14)), flush=True)
    store.close()


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store_module.CLOSE_WAIT_S = PATIENCE_S
    role, directory, argument = [*sys.argv[1:], ""][:3]
    globals()[role](Path(directory), argument)
