"""The prefetcher killed at random moments while two clients store, look up, fetch and cancel.

Continuous integration kills it a few times; `HCACHE_KILLS=50` is the full count.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from tests.prefetch.clients import assert_nothing_held, child, fetched, line_of
from tests.prefetch.conftest import Join

KILLS = int(os.environ.get("HCACHE_KILLS", "3"))


def session_of(client: subprocess.Popen[str]) -> int:
    """The process of the prefetcher that the client has a new session with."""
    name, pid = line_of(client).split()
    assert name == "session"
    return int(pid)


def test_nothing_durable_is_lost_and_nothing_wrong_is_served(directory: Path, join: Join) -> None:
    chance = random.Random(3)
    clients = [child("load", directory, seed) for seed in (1, 2)]
    for _ in range(KILLS):
        pids = {session_of(client) for client in clients}
        assert len(pids) == 1, "both go on with the same prefetcher"
        time.sleep(chance.uniform(0.05, 1.0))
        os.kill(pids.pop(), signal.SIGKILL)
    for client in clients:
        session_of(client)
    reports = [client.communicate("\n", timeout=60)[0].split() for client in clients]
    assert [client.returncode for client in clients] == [0, 0]
    checker = join()
    for report in reports:
        assert report[-5] == "done", report
        first, durable, fetches, damaged = map(int, report[-4:])
        print(f"{durable} pages durable, {fetches} fetches")
        assert damaged == 0
        assert durable > 0
        assert fetches > 0
        for start in range(first, first + durable, 20):
            pages = range(start, min(start + 20, first + durable))
            assert fetched(checker, pages) == len(pages), "a page that was durable is lost"
    assert_nothing_held(checker)
