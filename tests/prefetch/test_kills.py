from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from pathlib import Path

from tests.prefetch.clients import assert_nothing_held, child, fetched, figures, line_of, supervisor_of
from tests.storage.pages import keys_of

ROUNDS = int(os.environ.get("HCACHE_KILLS", "3"))
CLIENTS = 2


def next_session(process: subprocess.Popen[str], timeout_s: float = 30.0) -> int:
    """The prefetcher that the client has found after its former one."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], timeout_s)[0], "a client got no new session"
    word, pid = line_of(process).split()
    assert word == "session"
    return int(pid)


def test_a_prefetcher_killed_under_load_costs_nothing_that_was_on_file(directory: Path) -> None:
    chance = random.Random(1)
    first = supervisor_of(directory).open()
    pid = first.prefetcher_pid
    clients = [child("load", directory, seed) for seed in range(1, CLIENTS + 1)]
    assert [line_of(client) for client in clients] == ["ready"] * CLIENTS
    first.close()
    for round_ in range(ROUNDS):
        time.sleep(0.2 + chance.random() * 0.5)
        os.kill(pid, signal.SIGKILL)
        found = {next_session(client) for client in clients}
        assert len(found) == 1, f"kill {round_ + 1}: the clients share a prefetcher"
        assert found != {pid}
        pid = found.pop()
    time.sleep(0.5)

    reports = [client.communicate("stop\n", timeout=60)[0].split() for client in clients]
    assert [client.returncode for client in clients] == [0] * CLIENTS
    durable: dict[int, int] = {}
    for word, start, pages, fetches, damaged in reports:
        assert word == "done"
        assert int(fetches) > 0
        assert damaged == "0"
        durable[int(start)] = int(pages)
    print(f"\n{ROUNDS} kills, pages on file and number of fetches: {[report[2:4] for report in reports]}")

    last = supervisor_of(directory).open()
    for first_page, count in durable.items():
        assert count > ROUNDS
        assert all(last.contains(keys_of(range(first_page, first_page + count))))
        for page in range(first_page, first_page + count, 20):
            wanted = range(page, min(page + 20, first_page + count))
            assert fetched(last, wanted) == len(wanted)
    assert figures(last)["pages_damaged"] == 0
    assert_nothing_held(last)
    last.close()


def test_a_client_killed_under_load_costs_the_others_nothing(directory: Path) -> None:
    chance = random.Random(2)
    watcher = supervisor_of(directory).open()
    steady = child("load", directory, 1)
    assert line_of(steady) == "ready"
    for round_ in range(ROUNDS):
        victim = child("load", directory, 2 + round_)
        assert line_of(victim) == "ready"
        time.sleep(0.1 + chance.random() * 0.4)
        victim.kill()
        victim.communicate()
    report = steady.communicate("stop\n", timeout=60)[0].split()
    assert steady.returncode == 0
    assert report[-1] == "0"
    assert_nothing_held(watcher)
    count = figures(watcher)
    assert count["prefetcher_clients"] == 1
    assert count["pages_free"] + count["pages_open"] + count["pages_host"] == count["pages_total"]
    watcher.close()
