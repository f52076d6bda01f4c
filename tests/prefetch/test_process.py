"""The process of a prefetcher. As a program: one that waits for its log, but not for its stderr, when it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sglang_hcache.prefetch import endpoint, logs, process
from sglang_hcache.prefetch.endpoint import InstanceLock, endpoint_for, is_running
from sglang_hcache.prefetch.process import raise_process_limits
from sglang_hcache.prefetch.server import ServerConfig
from tests.prefetch.clients import (
    PATIENCE_S,
    REPOSITORY,
    child,
    fetched,
    figures,
    line_of,
    prefetchers,
    save,
    supervisor_of,
    until,
)
from tests.prefetch.conftest import Join
from tests.prefetch.test_supervisor import replaced


@pytest.fixture
def systemd(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where a unit's processes tell systemd how they are."""
    path = str(runtime.with_name("notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ears:
        ears.bind(path)
        ears.settimeout(PATIENCE_S)
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
        raise_process_limits()
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
    supervisor_of(directory).open().close()


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
    where = endpoint_for([str(directory)])
    command = [sys.executable, "-m", "tests.prefetch.test_process", str(directory)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=theirs) as mute:
        try:
            assert until(lambda: is_running(where))
            client = supervisor_of(directory).open()
            assert client.prefetcher_pid == mute.pid
            save(client, range(5))
            assert client.flush(PATIENCE_S)
            assert fetched(client, range(10)) == 5
            client.close()
            assert mute.wait(PATIENCE_S) == 0, "it ends as ever"
        finally:
            mute.kill()
    assert "the prefetcher has ended" in (directory / "prefetcher.log").read_text()
    os.close(theirs)
    os.close(ours)


@pytest.fixture
def by_hand(directory: Path) -> list[str]:
    return [sys.executable, "-m", "sglang_hcache.cli.main", "prefetcher", "--dir", str(directory)]


@pytest.fixture
def started_by_hand(
    by_hand: list[str], systemd: socket.socket
) -> Iterator[Callable[[bool], subprocess.Popen[bytes]]]:
    """Starts `hcache prefetcher`, under `nohup` or not; it is serving."""
    started = []

    def start(nohup: bool) -> subprocess.Popen[bytes]:
        former = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        started.append(subprocess.Popen(by_hand))
        signal.signal(signal.SIGHUP, former)
        assert systemd.recv(100) == b"READY=1"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_a_terminal_that_is_closed_stops_it_with_everything_written(
    directory: Path, systemd: socket.socket, started_by_hand: Callable[[bool], subprocess.Popen[bytes]]
) -> None:
    by_hand = started_by_hand(False)
    client = supervisor_of(directory, write_policy="write_back").open()
    assert client.prefetcher_pid == by_hand.pid
    save(client, range(10))
    assert until(lambda: figures(client)["pages_host"] == 10)
    assert figures(client)["pages_file"] == 0
    by_hand.send_signal(signal.SIGHUP)
    assert by_hand.wait(PATIENCE_S) == 0
    assert systemd.recv(100) == b"STOPPING=1"
    assert until(lambda: not client.alive)
    client.close()
    again = supervisor_of(directory).open()
    assert fetched(again, range(15)) == 10
    again.close()


def test_under_nohup_it_stays(
    directory: Path, systemd: socket.socket, started_by_hand: Callable[[bool], subprocess.Popen[bytes]]
) -> None:
    by_hand = started_by_hand(True)
    by_hand.send_signal(signal.SIGHUP)
    for _ in range(2):  # a loop that was to stop would have ended before the second
        client = supervisor_of(directory).open()
        assert client.prefetcher_pid == by_hand.pid
        save(client, range(5))
        assert fetched(client, range(10)) == 5
        client.close()
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)
    systemd.settimeout(PATIENCE_S)
    by_hand.terminate()
    assert systemd.recv(100) == b"STOPPING=1"
    assert by_hand.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_is_run_by_hand_again_is_waited_for(
    directory: Path,
    started_by_hand: Callable[[bool], subprocess.Popen[bytes]],
    systemd: socket.socket,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As systemd does after a crash, and with `systemctl restart`."""
    by_hand, supervisor = started_by_hand(False), supervisor_of(directory)
    client = supervisor.open()
    assert client.prefetcher_pid == by_hand.pid
    by_hand.send_signal(number)
    by_hand.wait(PATIENCE_S)
    if number == signal.SIGTERM:
        assert systemd.recv(100) == b"STOPPING=1"
    assert until(lambda: not client.alive)
    supervisor.replace(client)
    assert until(lambda: "run by hand has ended; waiting" in caplog.text)
    by_hand = started_by_hand(False)
    client = replaced(supervisor)
    assert client.prefetcher_pid == by_hand.pid
    client.close()
    supervisor.close()
    by_hand.send_signal(signal.SIGINT)
    assert by_hand.wait(PATIENCE_S) == 0
    assert not endpoint_for([str(directory)]).by_hand.exists(), "who runs it in a terminal has had enough of it"


def test_one_that_does_not_come_back_is_not_waited_for_for_ever(
    directory: Path,
    started_by_hand: Callable[[bool], subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_hand = started_by_hand(False)
    by_hand.kill()
    by_hand.wait(PATIENCE_S)
    left = endpoint_for([str(directory)]).by_hand
    os.utime(left, (time.time() + 3600,) * 2)
    monkeypatch.setattr(endpoint, "RETURN_S", 0.5)
    client = supervisor_of(directory).open()
    assert [client.prefetcher_pid] == [one.pid for one in prefetchers(directory)]
    assert "not for other hosts" in caplog.text
    assert not left.exists()
    client.close()
    caplog.clear()
    left.touch()
    os.utime(left, (time.time() - 3600,) * 2)
    supervisor_of(directory).open().close()
    assert not caplog.records, "that was long ago"
    assert until(lambda: not prefetchers(directory))
    monkeypatch.setattr(endpoint, "RETURN_S", 10 * PATIENCE_S)
    left.touch()
    supervisor = supervisor_of(directory)
    supervisor.replace(client)
    assert until(lambda: "run by hand has ended; waiting" in caplog.text)
    left.unlink()
    replaced(supervisor).close()
    supervisor.close()


def test_by_hand_it_waits_for_one_that_a_server_started(
    directory: Path, systemd: socket.socket, by_hand: list[str]
) -> None:
    """And says so, as it is not what its user wants; beside another that runs by hand it ends."""
    client = supervisor_of(directory).open()
    with subprocess.Popen(by_hand, stderr=subprocess.PIPE, text=True) as waits:
        try:
            assert waits.stderr is not None
            assert "waiting until it ends. Stop all servers" in waits.stderr.readline()
            client.close()
            assert systemd.recv(100) == b"READY=1"
            client = supervisor_of(directory).open()
            assert client.prefetcher_pid == waits.pid
            again = subprocess.run(by_hand, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
            assert again.returncode == 1
            assert "another prefetcher serves" in again.stderr
            client.close()
        finally:
            waits.terminate()


def test_its_log_outlives_whoever_started_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = f"from sglang_hcache.prefetch import logs; logs.LOG_WAIT_S = {PATIENCE_S}"
    (tmp_path / "sitecustomize.py").write_text(patience)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    starter = child("join", directory, 0)
    pid = int(line_of(starter))
    client = supervisor_of(directory).open()
    assert client.prefetcher_pid == pid
    starter.communicate("\n", timeout=PATIENCE_S)
    client.close()
    assert until(lambda: not prefetchers(directory))
    log = directory / "prefetcher.log"
    assert f"{pid}] hcache: serving {directory}" in log.read_text()
    assert f"{pid}] hcache: the prefetcher has ended" in log.read_text()
    assert oct(log.stat().st_mode & 0o777) == "0o600"
    other = supervisor_of(directory).open()
    other.close()
    assert until(lambda: f"{other.prefetcher_pid}] hcache: serving" in log.read_text())
    assert f"{pid}] hcache: serving" in log.read_text(), "it is appended to"


def test_its_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES", 20_000)
    monkeypatch.setattr(logs, "LOG_WAIT_S", PATIENCE_S)
    log, path = logging.getLogger("sglang_hcache.test"), tmp_path / "new" / "prefetcher.log"
    with logs.logging_to(path):
        for line in range(1000):
            log.warning("line %d, with what fills a line", line)
    files = sorted(file.name for file in path.parent.iterdir())
    assert files == ["prefetcher.log", "prefetcher.log.1"]
    assert all(file.stat().st_size <= 20_000 for file in path.parent.iterdir())
    assert "line 999," in path.read_text()
    assert "line 0," not in path.with_suffix(".log.1").read_text()


def test_without_a_place_for_its_log_it_serves_all_the_same(directory: Path) -> None:
    (directory / "prefetcher.log").mkdir(parents=True)
    client = supervisor_of(directory).open()
    save(client, range(3))
    assert fetched(client, range(5)) == 3
    client.close()


def wait_for_the_log_only(directory: str) -> None:
    release = InstanceLock.release

    def released(lock: InstanceLock) -> None:  # between the end of the one and that of the other
        logs.LOG_WAIT_S = 0.1
        release(lock)

    logs.LOG_WAIT_S = PATIENCE_S
    InstanceLock.release = released  # type: ignore[method-assign, assignment]
    sys.exit(process.serve(ServerConfig(endpoint_for([directory]).address, (directory,))))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    wait_for_the_log_only(sys.argv[1])
