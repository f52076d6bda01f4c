"""Prefetcher and clients killed at random moments while clients store, look up, fetch and cancel.

Continuous integration kills a few times; `HCACHE_KILLS=50` is the full count. As a program: one of the clients.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from sglang_hcache.prefetch.client import PrefetchClient
from tests.prefetch import child as roles
from tests.prefetch.clients import (
    PATIENCE_S,
    REPOSITORY,
    assert_nothing_held,
    children,
    fetched,
    figures,
    supervisor_of,
    until,
)
from tests.storage.pages import keys_of

ROUNDS = int(os.environ.get("HCACHE_KILLS", "3"))
CLIENTS = 2


class Loaded:
    """A client under load, and what it says."""

    def __init__(self, directory: Path, seed: int) -> None:
        command = [sys.executable, "-m", "tests.prefetch.test_kills", str(directory), str(seed)]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append(self.process)
        self._first = 100_000 * seed
        self._words: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def session(self) -> int:
        """The prefetcher that it has found after its former one."""
        while (words := self._words.get(timeout=PATIENCE_S))[0] == "fetched":
            pass
        assert words[0] == "session"
        return int(words[1])

    def pages(self) -> int:
        """How many pages it knows to be on file, at least, as it has fetched once more."""
        word, last = self._words.get(timeout=PATIENCE_S)
        assert word == "fetched"
        return int(last) + 1 - self._first

    def report(self) -> list[str]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        while (words := self._words.get(timeout=PATIENCE_S))[0] == "fetched":
            pass
        assert self.process.wait(PATIENCE_S) == 0
        return words

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._words.put(line.split())


def test_a_prefetcher_killed_under_load_costs_nothing_that_was_on_file(directory: Path) -> None:
    chance = random.Random(1)
    first = supervisor_of(directory).open()
    pid = first.prefetcher_pid
    clients = [Loaded(directory, seed) for seed in range(1, CLIENTS + 1)]
    assert {client.session() for client in clients} == {pid}
    first.close()
    for round_ in range(ROUNDS):
        for client in clients:
            for _ in range(chance.randrange(1, 20)):
                client.pages()
        time.sleep(chance.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        found = {client.session() for client in clients}
        assert len(found) == 1, f"kill {round_ + 1}: the clients share a prefetcher"
        assert found != {pid}
        pid = found.pop()
    for client in clients:
        while client.pages() <= ROUNDS:
            pass

    reports = [client.report() for client in clients]
    durable = {}  # first page → how many
    for word, first_page, count, fetches, _, damaged in reports:
        assert word == "done"
        assert int(fetches) > 0
        assert damaged == "0"
        durable[int(first_page)] = int(count)
    print(
        f"\n{ROUNDS} kills, pages on file, fetches, of which cut short first: {[report[2:5] for report in reports]}"
    )

    last = supervisor_of(directory).open()
    for start, pages in durable.items():
        assert pages > ROUNDS
        assert all(last.contains(keys_of(range(start, start + pages))))
        for page in range(start, start + pages, 20):
            wanted = range(page, min(page + 20, start + pages))
            assert fetched(last, wanted) == len(wanted)
    assert figures(last)["pages_damaged"] == 0
    assert_nothing_held(last)
    last.close()


def test_a_client_killed_under_load_costs_the_others_nothing(directory: Path) -> None:
    chance = random.Random(2)
    watcher = supervisor_of(directory).open()
    steady = Loaded(directory, 1)
    steady.session()
    for round_ in range(ROUNDS):
        victim = Loaded(directory, 2 + round_)
        victim.session()
        for _ in range(chance.randrange(1, 20)):
            victim.pages()
        time.sleep(chance.random() * 0.1)
        victim.kill()
    report = steady.report()
    assert report[-1] == "0"
    assert until(lambda: figures(watcher)["prefetcher_clients"] == 1)
    assert_nothing_held(watcher)
    count = figures(watcher)
    assert count["pages_free"] + count["pages_open"] + count["pages_host"] == count["pages_total"]
    watcher.close()


def load(directory: Path, seed: str) -> None:
    """As the role of that name; after each fetch it says which page was the last."""

    def fetch(client: PrefetchClient, pages: Sequence[int], owner: str) -> int:
        found = fetched(client, pages, owner)
        if found == len(pages):
            print("fetched", pages[-1], flush=True)
        return found

    with mock.patch.object(roles, "fetched", fetch):
        roles.load(directory, seed)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    load(Path(sys.argv[1]), sys.argv[2])
