"""What a prefetcher does before it ends. As a program: one whose disk takes nothing until a line comes."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import pytest

from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.endpoint import endpoint_for, is_running
from sglang_hcache.storage import store, writer
from tests.prefetch.child import write_when_told
from tests.prefetch.clients import (
    PATIENCE_S,
    REPOSITORY,
    SLOTS,
    children,
    fetched,
    figures,
    save,
    supervisor_of,
    until,
)
from tests.storage.pages import LAYOUT


def test_it_ends_on_sigterm_with_everything_written(directory: Path, runtime: Path) -> None:
    client = supervisor_of(directory, write_policy="write_back").open()
    save(client, range(10))
    assert until(lambda: figures(client)["pages_host"] == 10)
    assert figures(client)["pages_file"] == 0
    os.kill(client.prefetcher_pid, signal.SIGTERM)
    assert until(lambda: not client.alive)
    assert list(runtime.iterdir()) == []
    client.close()
    again = supervisor_of(directory).open()
    assert fetched(again, range(10)) == 10
    again.close()


def leave_unwritten(directory: Path, pages: range) -> subprocess.Popen[str]:
    """A prefetcher whose last client has gone before anything was written."""
    command = [sys.executable, "-m", "tests.prefetch.test_ending", str(directory)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, text=True)
    children.append(process)
    assert until(lambda: is_running(endpoint_for([str(directory)])))
    client = supervisor_of(directory, write_policy="write_back").open()
    assert client.prefetcher_pid == process.pid
    save(client, pages)
    assert until(lambda: figures(client)["pages_host"] == len(pages))
    assert figures(client)["pages_file"] == 0
    client.close()
    return process


def let_write(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    print(file=process.stdin, flush=True)


def come_back(directory: Path, **changes: Any) -> PrefetchClient:
    waiting = mock.Mock(side_effect=AssertionError("it waits for pages to be written"))
    return supervisor_of(directory, **changes).open(waiting=waiting)


def test_all_is_written_however_long_it_takes_once_the_last_client_has_gone(directory: Path) -> None:
    process = leave_unwritten(directory, range(30))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    let_write(process)
    assert process.wait(PATIENCE_S) == 0
    again = supervisor_of(directory).open()
    assert again.prefetcher_pid != process.pid
    assert fetched(again, range(32)) == 30
    again.close()


def test_a_server_that_comes_back_meanwhile_finds_memory_as_it_was(directory: Path) -> None:
    process = leave_unwritten(directory, range(30))
    again = come_back(directory, write_policy="write_back")
    assert again.prefetcher_pid == process.pid
    assert figures(again)["pages_file"] == 0
    assert fetched(again, range(32)) == 30
    assert figures(again)["hits_file"] == 0
    save(again, range(100, 110))
    again.close()
    let_write(process)
    assert process.wait(PATIENCE_S) == 0
    after = supervisor_of(directory).open()
    assert fetched(after, range(32)) == 30
    assert fetched(after, range(100, 110)) == 10
    after.close()


@pytest.mark.parametrize("slots", [SLOTS // 2, SLOTS, 2 * SLOTS])
def test_a_server_that_comes_back_with_another_size_is_served_at_once(directory: Path, slots: int) -> None:
    """Pages behind the last slot of a smaller memory are misses until they are written."""
    process = leave_unwritten(directory, range(40))
    again = come_back(directory, host_bytes=slots * LAYOUT.record_bytes)
    assert again.prefetcher_pid == process.pid
    assert len(again.memory) == figures(again)["pages_total"] == slots
    assert figures(again)["pages_file"] == 0
    assert fetched(again, range(slots // 4)) == slots // 4
    assert figures(again)["hits_file"] == 0
    let_write(process)
    assert again.flush(PATIENCE_S)
    save(again, range(100, 110))
    assert again.flush(PATIENCE_S)
    again.close()
    assert process.wait(PATIENCE_S) == 0
    after = supervisor_of(directory).open()
    assert fetched(after, range(25)) == 25
    assert fetched(after, range(25, 42)) == 15
    assert fetched(after, range(100, 112)) == 10
    after.close()


def test_on_sigterm_it_says_how_many_pages_it_gives_up(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process, said = leave_unwritten(directory, range(30)), ""
    process.terminate()

    def given_up() -> re.Match[str] | None:
        nonlocal said
        said += capfd.readouterr().err
        return re.search(r"(\d+) pages were not written in 0.5 s and are given up", said)

    assert until(given_up)
    let_write(process)
    assert process.wait(PATIENCE_S) == 0
    found = given_up()
    assert found
    again = supervisor_of(directory).open()
    assert figures(again)["pages_file"] == 30 - int(found[1]) < 30
    again.close()


def test_a_session_is_had_at_once_while_another_prefetcher_ends(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            supervisor = supervisor_of(directory)
            client = supervisor.open(PATIENCE_S)
            client.close()
            supervisor.close()
    assert "did not answer" not in caplog.text


def close_in_a_hurry(directory: Path) -> None:
    """Pages that wait to be written are soon given up; what is being written is waited for, however long it takes."""
    writer.BATCH_PAGES, store.CLOSE_WAIT_S = 4, 0.5

    def join(threads: Sequence[Thread], timeout_s: float) -> bool:
        for thread in threads:
            thread.join()
        return True

    store._join = join
    write_when_told(directory, "")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    close_in_a_hurry(Path(sys.argv[1]))
