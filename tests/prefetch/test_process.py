from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sglang_hcache.prefetch.endpoint import endpoint_for, is_running
from sglang_hcache.prefetch.process import settle
from sglang_hcache.prefetch.server import ServerConfig
from tests.prefetch.clients import fetched, figures, prefetchers, save, supervisor_of, until
from tests.prefetch.conftest import Join


@pytest.fixture
def systemd(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a unit's processes tell systemd how they are."""
    path = str(runtime.with_name("notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ears:
        ears.bind(path)
        ears.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield ears


def test_a_prefetcher_may_open_as_many_files_as_the_system_lets_it(join: Join) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # as most systems have it
    try:
        client = join()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert psutil.Process(client.prefetcher_pid).rlimit(psutil.RLIMIT_NOFILE) == (hard, hard)


def test_its_loop_waits_shortly_for_threads_that_compute() -> None:
    interval, limits = sys.getswitchinterval(), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        settle()
        assert sys.getswitchinterval() <= 0.001
    finally:
        sys.setswitchinterval(interval)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_it_does_not_speak_for_the_unit_of_the_server_that_started_it(
    directory: Path, systemd: socket.socket
) -> None:
    supervisor_of(directory).open().close()
    assert until(lambda: not prefetchers(directory))
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


def test_no_module_in_a_servers_directory_is_taken_for_another(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    supervisor_of(directory).open(10).close()


def full_pipe() -> tuple[int, int]:
    """As stderr is where nobody reads it, or somebody has stopped the terminal."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, bytes(1 << 16))
    os.set_blocking(theirs, True)
    return ours, theirs


def test_nobody_waits_for_its_stderr(directory: Path) -> None:
    ours, theirs = full_pipe()
    endpoint = endpoint_for([str(directory)])
    config = json.dumps(dataclasses.asdict(ServerConfig(endpoint.address, (str(directory),))))
    command = [sys.executable, "-m", "sglang_hcache.prefetch", config]
    with subprocess.Popen(command, stderr=theirs) as process:
        try:
            assert until(lambda: is_running(endpoint))
            client = supervisor_of(directory).open(10)
            assert client.prefetcher_pid == process.pid
            save(client, range(5))
            assert client.flush(10)
            assert fetched(client, range(10)) == 5
            client.close()
            assert process.wait(10) == 0, "it ends as ever"
        finally:
            process.kill()
    assert "the prefetcher has ended" in (directory / "prefetcher.log").read_text()
    os.close(theirs)
    os.close(ours)


@pytest.fixture
def started_by_hand(directory: Path, systemd: socket.socket) -> Iterator[Callable[[bool], subprocess.Popen[bytes]]]:
    """Starts `hcache prefetcher`, under `nohup` or not; it is serving."""
    command = [sys.executable, "-m", "sglang_hcache.cli.main", "prefetcher", "--dir", str(directory)]
    processes = []

    def start(nohup: bool) -> subprocess.Popen[bytes]:
        former = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        processes.append(subprocess.Popen(command))
        signal.signal(signal.SIGHUP, former)
        assert systemd.recv(100) == b"READY=1"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_terminal_that_is_closed_stops_it_with_everything_written(
    directory: Path, systemd: socket.socket, started_by_hand: Callable[[bool], subprocess.Popen[bytes]]
) -> None:
    process = started_by_hand(False)
    client = supervisor_of(directory, write_policy="write_back").open()
    assert client.prefetcher_pid == process.pid
    save(client, range(10))
    assert until(lambda: figures(client)["pages_host"] == 10)
    assert figures(client)["pages_file"] == 0
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 0
    assert systemd.recv(100) == b"STOPPING=1"
    client.close()
    again = supervisor_of(directory).open()
    assert fetched(again, range(15)) == 10
    again.close()


def test_under_nohup_it_stays(directory: Path, started_by_hand: Callable[[bool], subprocess.Popen[bytes]]) -> None:
    process = started_by_hand(True)
    client = supervisor_of(directory).open()
    process.send_signal(signal.SIGHUP)
    save(client, range(5))
    assert fetched(client, range(10)) == 5
    client.close()
    process.terminate()
    assert process.wait(20) == 0
