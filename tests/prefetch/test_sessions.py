"""What a session survives, and how it ends, as its client sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.prefetch import connection
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.client import PrefetchClient
from tests.prefetch.clients import PATIENCE_S, assert_nothing_held, fetched, figures, save, supervisor_of, until
from tests.prefetch.conftest import Join
from tests.storage.pages import keys_of


@pytest.mark.parametrize("rid", ["x" * 300, "", "a\ud800"], ids=["long", "empty", "no text"])
def test_a_request_may_be_called_anything(join: Join, rid: str) -> None:
    client = join()
    save(client, range(5))
    assert fetched(client, range(5), rid) == 5
    client.prefetch(rid, keys_of(range(5)))
    client.cut(rid)
    assert client.wait(rid, PATIENCE_S).done
    client.release(rid)
    assert fetched(client, range(5), "another") == 5
    assert figures(client)["messages_refused"] == 0
    assert_nothing_held(client)


def test_answers_to_a_former_prefetch_of_a_request_are_not_taken_for_the_next_ones(join: Join) -> None:
    client = join()
    save(client, range(8))
    for _ in range(200):
        client.prefetch("a", keys_of(range(8)))
        client.prefetch("a", keys_of(range(3)))
        assert len(client.wait("a", PATIENCE_S).slots) == 3
    client.release("a")
    assert_nothing_held(client)


def test_a_defect_in_the_sessions_thread_ends_the_session(
    join: Join, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher, client = join(), join()

    def fail(*_: object) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(client.connection, "_receive", fail)
    client.prefetch("a", keys_of(range(3)))
    assert until(lambda: not client.alive)
    assert client.wait("a", PATIENCE_S).done
    assert "a defect" in caplog.text
    client.close()
    assert until(lambda: figures(watcher)["prefetcher_clients"] == 1), "it says goodbye all the same"


@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_a_session_that_is_left_amid_its_messages_ends_with_a_goodbye(join: Join, pause_s: float) -> None:
    watcher = join()
    for _ in range(8):
        client = join()
        for _ in range(50):
            client.connection.send(m.Lookup(keys=keys_of(range(20))))
        time.sleep(pause_s)
        client.give_up("the weights were changed")
        time.sleep(0.02)
        client.close()
        assert until(lambda: figures(watcher)["prefetcher_clients"] == 1)


def test_more_messages_than_fit_into_the_queues_cost_no_time(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the beat's second for each queue of them."""
    monkeypatch.setattr(connection, "BEAT_S", 3600.0)
    client = join()
    save(client, range(5))
    assert client.flush(PATIENCE_S)
    for _ in range(5000):
        client.connection.send(m.Cancel(prefetch=1 << 40))  # not answered
    assert fetched(client, range(5)) == 5


def test_a_closed_session_kills_nobody(join: Join) -> None:
    """The number of its descriptor may be that of another process by now."""
    client = join()
    number = client.connection._pidfd
    client.close()
    command = [sys.executable, "-c", "print(input())"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        watched = os.pidfd_open(other.pid)
        os.dup2(watched, number)
        client.connection.kill()
        assert other.communicate("alive\n", PATIENCE_S)[0] == "alive\n"
    for fd in {watched, number}:
        os.close(fd)


def test_a_prefetcher_that_hung_can_be_replaced_twice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when weights are changed before the first replacement was taken."""
    supervisor = supervisor_of(directory)
    hung = supervisor.open()
    os.kill(hung.prefetcher_pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "HUNG_S", 1.5)
        assert until(lambda: not hung.alive)
    supervisor.replace(hung)
    assert until(lambda: supervisor.restarts == 1)
    others = supervisor_of(directory).open()
    supervisor.stop_replacing()
    supervisor.replace(hung)
    found: list[PrefetchClient] = []

    def taken() -> Any:
        found.extend(store for store in [supervisor.take_next()] if store)
        return found

    assert until(taken)
    assert found[0].prefetcher_pid == others.prefetcher_pid
    assert others.alive
    for client in (found[0], others):
        client.close()
    supervisor.close()
