from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from sglang_hcache.prefetch import connection, launcher, process
from sglang_hcache.prefetch import supervisor as supervision
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.connection import Hopeless, Unavailable
from sglang_hcache.prefetch.endpoint import InstanceLock, endpoint_for, is_running
from sglang_hcache.prefetch.launcher import memory_policy
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from tests.prefetch.clients import (
    SLOTS,
    assert_nothing_held,
    child,
    fetched,
    figures,
    hello,
    line_of,
    prefetchers,
    save,
    sums,
    supervisor_of,
    until,
)
from tests.prefetch.conftest import Join
from tests.storage.pages import LAYOUT, OTHER_FINGERPRINT, holds, keys_of


def awoken(supervisor: LocalSupervisor) -> bool:
    """Whether a sleeper on the news was woken, as the scheduler is: the word comes just after the fact."""
    select.select([supervisor.news], [], [], 5.0)
    return os.eventfd_read(supervisor.news) > 0


def replaced(supervisor: LocalSupervisor) -> PrefetchClient:
    """The store that follows the one that is gone."""
    found: list[PrefetchClient] = []

    def taken() -> bool:
        if (store := supervisor.taken()) is not None:
            found.append(store)
        return bool(found)

    assert until(taken)
    return found[0]


def try_hello(directory: Path, *, timeout_s: float = 5.0, **changes: Any) -> None:
    address = endpoint_for([str(directory)]).address
    PrefetchClient(address, hello(**changes), news=-1, timeout_s=timeout_s).close()


def kill(client: PrefetchClient, number: int = signal.SIGKILL) -> None:
    os.kill(client.prefetcher_pid, number)


def test_clients_that_start_at_once_share_one_prefetcher(directory: Path) -> None:
    at = time.time() + 1.5  # all have been imported by then
    clients = [child("join", directory, at) for _ in range(4)]
    pids = {line_of(client) for client in clients}
    running = [process.pid for process in prefetchers(directory)]
    assert len(pids) == 1
    assert until(lambda: [process.pid for process in prefetchers(directory)] == [int(next(iter(pids)))]), running
    for client in clients:
        client.communicate("\n", timeout=5)
        assert client.returncode == 0, "nor does its stdout stay open as long as others use the prefetcher"


def test_threads_that_start_at_once_share_one_prefetcher(directory: Path, join: Join) -> None:
    clients: list[PrefetchClient] = []
    threads = [threading.Thread(target=lambda: clients.append(join())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({client.prefetcher_pid for client in clients}) == 1
    assert figures(clients[0])["prefetcher_clients"] == 4
    assert until(lambda: len(prefetchers(directory)) == 1), "the others see that they are not needed"


def test_the_prefetcher_is_nobodys_child(join: Join) -> None:
    client = join()
    process = psutil.Process(client.prefetcher_pid)
    assert os.getpid() not in [parent.pid for parent in process.parents()]
    assert os.getsid(process.pid) == process.pid


def test_a_killed_clients_slots_come_back(directory: Path, join: Join) -> None:
    client = join(grant=4)
    save(client, range(20))
    assert client.flush(30)
    other = child("hold", directory, 20)
    assert line_of(other) == f"{client.prefetcher_pid} 20"
    held = figures(client)
    assert held["pages_leased"] == 20
    assert held["pages_open"] > 4
    other.kill()
    other.wait()
    killed_at = time.monotonic()
    assert_nothing_held(client)
    assert time.monotonic() - killed_at < 1
    assert figures(client)["prefetcher_clients"] == 1
    other.communicate()


def test_a_killed_prefetcher_is_noticed_and_replaced(directory: Path) -> None:
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    save(client, range(20))
    assert client.flush(30)
    client.prefetch("reader", keys_of(range(20)))
    slots = client.wait("reader", 10).slots
    assert awoken(supervisor)

    kill(client)
    killed_at = time.monotonic()
    assert until(lambda: not client.alive, 1.0)
    assert awoken(supervisor), "whoever sleeps on the news hears of it"
    assert client.contains(keys_of(range(3))) == [False] * 3
    assert client.reserve() is None
    client.prefetch("late", keys_of(range(3)))
    assert client.wait("late", 5) == ((), True, True)
    client.cut("late")
    client.release("late")
    client.commit(keys_of([90])[0], slots[0], bytes(32))
    client.drop_host()
    assert not client.flush(5)
    assert str(client.stats()["prefetcher"]).startswith("gone: ")
    assert time.monotonic() - killed_at < 2, "no call waits for what is gone"
    assert all(holds(client.memory[slot], page) for page, slot in enumerate(slots)), "its memory stays"

    before = client.prefetcher_pid
    supervisor.replace(client)
    after = replaced(supervisor)
    assert awoken(supervisor)
    assert after.prefetcher_pid != before
    assert supervisor.restarts == 1
    assert fetched(after, range(25)) == 20
    after.close()
    supervisor.close()


def test_memory_of_a_replaced_prefetcher_is_given_back_first(directory: Path) -> None:
    """There may be no room for another beside it."""
    supervisor = supervisor_of(directory)
    client = supervisor.open()

    def mapped() -> int:
        return sum("memfd:hcache" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = mapped()
    assert before
    kill(client)
    assert until(lambda: not client.alive, 1.0)
    assert mapped() == before, "somebody may still read it"
    client.close()
    assert mapped() == before - 1
    supervisor.close()


class Memories:
    """What an owner does with a store's memory: for as long as it is mapped, and not while requests wait."""

    def __init__(self) -> None:
        self.taken: list[int] = []  # addresses
        self.threads: list[threading.Thread] = []

    def opened(self, store: PrefetchClient) -> None:
        assert len(store.memory)
        self.threads.append(threading.current_thread())
        self.taken.append(store.memory.ctypes.data)

    def closing(self, store: PrefetchClient) -> None:
        self.threads.append(threading.current_thread())
        if len(store.memory):
            self.taken.remove(store.memory.ctypes.data)


def test_memory_is_made_ready_and_given_up_while_requests_go_on(directory: Path) -> None:
    memories = Memories()
    supervisor = LocalSupervisor((str(directory),), None, hello, opened=memories.opened, closing=memories.closing)
    first = supervisor.start()
    assert isinstance(first, PrefetchClient)
    assert memories.taken == [first.memory.ctypes.data]
    assert memories.threads == [threading.current_thread()]
    kill(first)
    assert until(lambda: not first.alive, 1.0)
    assert len(memories.taken) == 1, "somebody may still read it"
    supervisor.replace(first)
    second = replaced(supervisor)
    assert memories.taken == [second.memory.ctypes.data]
    assert threading.current_thread() not in memories.threads[1:]
    kill(second)
    assert until(lambda: not second.alive, 1.0)
    supervisor.replace(second)
    assert until(lambda: supervisor.restarts == 2, 20)
    supervisor.close()
    assert not memories.taken, "the one that nobody has fetched"


def test_what_fails_unexpectedly_is_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session for which no socket can be had; then one that its owner cannot use, and that is not left behind."""
    failures = iter([zmq.ZMQError(errno.EMFILE), None, RuntimeError("a bug"), None, None])

    def opened(_store: PrefetchClient) -> None:
        if (failure := next(failures)) is not None:
            raise failure

    supervisor = LocalSupervisor((str(directory),), None, hello, opened=lambda _store: None)
    client = supervisor.start()
    assert isinstance(client, PrefetchClient)
    make = zmq.Context.socket

    def socket(context: Any, *arguments: Any) -> Any:
        opened(client)
        return make(context, *arguments)

    monkeypatch.setattr(zmq.Context, "socket", socket)
    monkeypatch.setattr(supervisor, "_opened", opened)
    kill(client)
    assert until(lambda: not client.alive, 1.0)
    supervisor.replace(client)
    second = replaced(supervisor)
    assert until(lambda: figures(second)["prefetcher_clients"] == 1)
    second.close()
    supervisor.close()


@pytest.mark.parametrize("found", [False, True])
def test_a_replacement_that_is_not_wanted_any_more(directory: Path, found: bool) -> None:
    """Its session would be for what the client was before."""
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    kill(client)
    assert until(lambda: not client.alive, 1.0)
    supervisor.replace(client)
    search = supervisor._thread
    assert search is not None
    if found:
        assert until(lambda: supervisor.restarts == 1, 20)
    supervisor.stop_replacing()
    other = supervisor.open()
    search.join(20)
    assert not search.is_alive(), "else it may yet start a prefetcher"
    assert until(lambda: figures(other)["prefetcher_clients"] == 1, 20), "no session is left behind"
    assert supervisor.taken() is None
    assert until(lambda: len(prefetchers(directory)) == 1), "what was started beside it sees that it is not needed"
    supervisor.replace(other)
    next_one = replaced(supervisor)
    assert next_one.alive
    next_one.close()
    supervisor.close()


def test_a_prefetcher_that_hangs_is_given_up_killed_and_replaced(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HUNG_S", 1.5)
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    save(client, range(5))
    assert client.flush(30)
    kill(client, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert client.contains(keys_of(range(3))) == [False] * 3
    assert time.monotonic() - stopped_at < 1, "a scheduler does not wait for it"
    assert until(lambda: not client.alive, 5.0)
    hung = psutil.Process(client.prefetcher_pid)
    supervisor.replace(client)
    found = replaced(supervisor)
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE
    assert fetched(found, range(10)) == 5
    found.close()
    supervisor.close()


def test_a_prefetcher_that_hangs_is_killed_once(
    directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long it takes to get a session with the next one, which may run already."""
    monkeypatch.setattr(connection, "HUNG_S", 1.5)
    supervisor, tries = supervisor_of(directory), list[None]()
    hung, follow = supervisor.open(), supervisor.open
    kill(hung, signal.SIGSTOP)
    assert until(lambda: not hung.alive, 5.0)

    def refused(*_: object) -> PrefetchClient:
        tries.append(None)
        if len(tries) == 1:
            join()
        if len(tries) < 4:
            raise Unavailable("it has no memory")
        return follow()

    monkeypatch.setattr(supervisor, "open", refused)
    supervisor.replace(hung)
    found = replaced(supervisor)
    assert [record.message for record in caplog.records if "is killed" in record.message] == [
        f"hcache: the prefetcher (process {hung.prefetcher_pid}) hangs and is killed"
    ]
    found.close()
    supervisor.close()


def test_a_paused_clients_prefetcher_lives_on(directory: Path, join: Join) -> None:
    """As under `docker pause`: nobody was asked anything meanwhile, so nobody was silent."""
    hung_s = 3.0
    client = join()
    save(client, range(5))
    paused = child("watch", directory, hung_s)
    assert line_of(paused) == "ready"
    time.sleep(0.5)
    for _ in range(2):
        paused.send_signal(signal.SIGSTOP)
        time.sleep(hung_s + 1)
        paused.send_signal(signal.SIGCONT)
        time.sleep(1.5)
    assert client.alive
    assert paused.communicate("stop\n", timeout=20)[0].split() == [str(client.prefetcher_pid), "0"]
    assert fetched(client, range(10)) == 5


def test_nothing_is_left_behind(directory: Path, runtime: Path) -> None:
    first = supervisor_of(directory).open()
    (process,) = prefetchers(directory)
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "memfd:" in maps
    assert "/dev/shm" not in maps, "what lies there stays when a process is killed"
    assert sorted(path.suffix for path in runtime.iterdir()) == [".lock", ".sock"]
    assert [oct(path.stat().st_mode & 0o777) for path in [runtime, *runtime.glob("*.lock")]] == ["0o700", "0o600"]
    kill(first)
    assert until(lambda: not first.alive)
    second = supervisor_of(directory).open()
    assert sorted(path.suffix for path in runtime.iterdir()) == [".lock", ".sock"]
    first.close()
    second.close()
    assert until(lambda: not prefetchers(directory))
    assert list(runtime.iterdir()) == []


def test_it_ends_on_sigterm_with_everything_written(directory: Path, runtime: Path) -> None:
    client = supervisor_of(directory, write_policy="write_back").open()
    save(client, range(10))
    assert until(lambda: figures(client)["pages_host"] == 10)
    assert figures(client)["pages_file"] == 0
    kill(client, signal.SIGTERM)
    assert until(lambda: not client.alive)
    assert list(runtime.iterdir()) == []
    client.close()
    again = supervisor_of(directory).open()
    assert fetched(again, range(10)) == 10
    again.close()


def leave_unwritten(directory: Path, pages: range, batch_s: float) -> subprocess.Popen[str]:
    """A prefetcher on a slow disk whose last client has gone before anything was written."""
    process = child("write_slowly", directory, batch_s)
    assert until(lambda: is_running(endpoint_for([str(directory)])))
    client = supervisor_of(directory, write_policy="write_back").open()
    assert client.prefetcher_pid == process.pid
    save(client, pages)
    assert until(lambda: figures(client)["pages_host"] == len(pages))
    assert figures(client)["pages_file"] == 0
    client.close()
    return process


def test_all_is_written_however_long_it_takes_once_the_last_client_has_gone(directory: Path) -> None:
    process = leave_unwritten(directory, range(30), 0.2)
    left_at = time.monotonic()
    assert process.wait(30) == 0
    assert time.monotonic() - left_at > 1.5
    again = supervisor_of(directory).open()
    assert again.prefetcher_pid != process.pid
    assert fetched(again, range(32)) == 30
    again.close()


def test_a_server_that_comes_back_meanwhile_finds_memory_as_it_was(directory: Path) -> None:
    process = leave_unwritten(directory, range(30), 0.2)
    again = supervisor_of(directory, write_policy="write_back").open()
    assert again.prefetcher_pid == process.pid
    assert figures(again)["pages_file"] < 30
    assert fetched(again, range(32)) == 30
    assert figures(again)["hits_file"] == 0
    save(again, range(100, 110))
    again.close()
    assert process.wait(30) == 0
    after = supervisor_of(directory).open()
    assert fetched(after, range(32)) == 30
    assert fetched(after, range(100, 110)) == 10
    after.close()


@pytest.mark.parametrize("slots", [SLOTS // 2, SLOTS, 2 * SLOTS])
def test_a_server_that_comes_back_with_another_size_is_served_at_once(directory: Path, slots: int) -> None:
    """Pages behind the last slot of a smaller memory are misses until they are written."""
    process = leave_unwritten(directory, range(40), 0.4)
    asked_at = time.monotonic()
    again = supervisor_of(directory, host_bytes=slots * LAYOUT.record_bytes).open()
    assert time.monotonic() - asked_at < 2
    assert again.prefetcher_pid == process.pid
    assert len(again.memory) == figures(again)["pages_total"] == slots
    assert figures(again)["pages_file"] < 20
    assert fetched(again, range(slots // 4)) == slots // 4
    assert figures(again)["hits_file"] == 0
    assert again.flush(30)
    save(again, range(100, 110))
    assert again.flush(30)
    again.close()
    assert process.wait(30) == 0
    after = supervisor_of(directory).open()
    assert fetched(after, range(25)) == 25
    assert fetched(after, range(25, 42)) == 15
    assert fetched(after, range(100, 112)) == 10
    after.close()


def test_on_sigterm_it_says_how_many_pages_it_gives_up(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = leave_unwritten(directory, range(30), 0.5)
    process.terminate()
    stopped_at = time.monotonic()
    assert process.wait(10) == 0
    assert time.monotonic() - stopped_at < 3
    given_up = re.search(r"(\d+) pages were not written in 0.5 s and are given up", capfd.readouterr().err)
    assert given_up
    again = supervisor_of(directory).open()
    assert figures(again)["pages_file"] == 30 - int(given_up[1]) < 30
    again.close()


def test_its_log_outlives_whoever_started_it(directory: Path) -> None:
    starter = child("join", directory, 0)
    pid = int(line_of(starter))
    client = supervisor_of(directory).open()
    assert client.prefetcher_pid == pid
    starter.communicate("\n", timeout=10)
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
    monkeypatch.setattr(process, "LOG_BYTES", 20_000)
    log, path = logging.getLogger("sglang_hcache.test"), tmp_path / "new" / "prefetcher.log"
    with process.logging_to(path):
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


def test_a_session_is_had_at_once_while_another_prefetcher_ends(directory: Path) -> None:
    for _ in range(10):
        supervisor = supervisor_of(directory)
        started = time.monotonic()
        client = supervisor.open(20)
        assert time.monotonic() - started < 3
        client.close()
        supervisor.close()


def test_a_client_that_gives_up_waiting_leaves_no_session(directory: Path, join: Join) -> None:
    client = join()
    kill(client, signal.SIGSTOP)
    with pytest.raises(Unavailable):
        try_hello(directory, timeout_s=0.3)
    kill(client, signal.SIGCONT)
    time.sleep(0.5)
    assert figures(client)["prefetcher_clients"] == 1
    assert_nothing_held(client)


def test_two_fingerprints_have_pages_and_memory_of_their_own(join: Join) -> None:
    one, other = join(), join(fingerprint=OTHER_FINGERPRINT)
    assert one.prefetcher_pid == other.prefetcher_pid
    save(one, range(10))
    assert one.flush(30)
    assert other.contains(keys_of(range(10))) == [False] * 10
    save(other, range(5, 15))
    assert other.flush(30)
    before = sums(one)
    assert fetched(other, range(5, 20)) == 10
    assert sums(one) == before
    assert fetched(one, range(20)) == 10


def test_a_fingerprint_has_one_layout(directory: Path, join: Join) -> None:
    client = join()
    with pytest.raises(Unavailable, match="another layout"):
        try_hello(directory, page_tokens=LAYOUT.page_tokens + 1)
    assert figures(client)["messages_refused"] >= 1
    save(client, range(3))
    assert fetched(client, range(3)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"host_bytes": LAYOUT.record_bytes},
        {"host_bytes": 1 << 50},
        {"write_policy": "sometimes"},
        {"page_tokens": 1 << 20},
        {"fingerprint": b"short"},
        {"pid": 1 << 40},
        {"pid": 0},
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    directory: Path, join: Join, wrong: dict[str, Any]
) -> None:
    client = join()
    process = psutil.Process(client.prefetcher_pid)
    files = process.num_fds()
    with pytest.raises(Unavailable):
        try_hello(directory, **({"fingerprint": OTHER_FINGERPRINT} | wrong))
    assert until(lambda: process.num_fds() <= files, 3.0), "a refused client leaves no file open"
    save(client, range(3))
    assert fetched(client, range(3)) == 3


def test_a_prefetcher_that_is_busy_keeps_no_server_from_starting(
    directory: Path, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    client = join()
    save(client, range(5))
    assert client.flush(30)
    kill(client, signal.SIGSTOP)
    supervisor = supervisor_of(directory)
    nothing = supervisor.start(0.5)
    assert isinstance(nothing, NoStore)
    assert not nothing.alive
    assert nothing.layout == LAYOUT
    assert [record.message for record in caplog.records] == [
        f"hcache: cannot reach or start a prefetcher ({nothing.why_ended}): this server starts without the tier."
    ]
    kill(client, signal.SIGCONT)
    found = replaced(supervisor)
    assert found.prefetcher_pid == client.prefetcher_pid
    assert supervisor.restarts == 0
    assert fetched(found, range(10)) == 5
    found.close()
    supervisor.close()


def test_a_prefetcher_that_cannot_be_started_is_said_loudly(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, program = supervisor_of(directory), tmp_path / "launcher.py"
    program.touch()
    with monkeypatch.context() as patch:
        patch.setattr(supervision, "LOCKED_S", 0.1)
        patch.setattr(supervision, "_LAUNCHER", program)
        with pytest.raises(Unavailable):
            supervisor.start(0.5)
        program.write_text("raise SystemExit(1)")
        began = time.monotonic()
        with pytest.raises(Hopeless, match="cannot be started"):
            supervisor.start()
        assert time.monotonic() - began < 10
    supervisor.close()


@contextlib.contextmanager
def bound_to(cpu: int) -> Iterator[None]:
    """This thread, as SGLang binds a rank to a NUMA node: strictly, if a container lets it."""
    cpus, set_policy = os.sched_getaffinity(0), launcher._SET_MEMPOLICY[os.uname().machine]
    libc, nodes = ctypes.CDLL(None), ctypes.c_ulong(1)
    os.sched_setaffinity(0, {cpu})
    libc.syscall(set_policy, 2, ctypes.byref(nodes), 64)
    try:
        yield
    finally:
        libc.syscall(set_policy, 0, None, 0)
        os.sched_setaffinity(0, cpus)


def test_it_is_not_bound_as_the_rank_that_starts_it_is(directory: Path) -> None:
    parent = os.getppid()
    cpus = os.sched_getaffinity(parent)
    supervisor = supervisor_of(directory)
    with bound_to(min(cpus)):
        client = supervisor.open()
    assert os.sched_getaffinity(client.prefetcher_pid) == cpus
    assert memory_policy(client.prefetcher_pid) == memory_policy(parent)
    client.close()
    supervisor.close()


def test_a_search_is_ended_at_once(directory: Path, join: Join) -> None:
    """Also amid a hello that is not answered."""
    client = join()
    supervisor = supervisor_of(directory)
    store = supervisor.open()
    kill(client, signal.SIGSTOP)
    store.give_up("the weights were changed")
    supervisor.replace(store)
    time.sleep(2.0)
    began = time.monotonic()
    supervisor.close()
    assert time.monotonic() - began < 1.0
    kill(client, signal.SIGCONT)


def test_a_prefetcher_whose_lock_was_removed_takes_nothing_from_the_next_one(directory: Path, runtime: Path) -> None:
    """As when /run/user is removed at logout, or /tmp tidied up."""
    first = supervisor_of(directory).open()
    endpoint = endpoint_for([str(directory)])
    former = endpoint.socket.stat().st_ino
    endpoint.lock.unlink()
    supervisor = supervisor_of(directory)
    supervisor._launch()
    assert until(lambda: endpoint.socket.exists() and endpoint.socket.stat().st_ino != former)
    second = supervisor.open()
    assert second.prefetcher_pid != first.prefetcher_pid
    save(first, range(5))
    assert first.flush(30)
    assert fetched(second, range(10)) == 5
    first.close()
    assert until(lambda: [process.pid for process in prefetchers(directory)] == [second.prefetcher_pid])
    assert endpoint.socket.exists()
    assert is_running(endpoint)
    third = supervisor_of(directory).open()
    assert third.prefetcher_pid == second.prefetcher_pid
    second.close()
    third.close()
    assert until(lambda: not prefetchers(directory))
    assert list(runtime.iterdir()) == []


def test_the_lock_of_a_running_prefetcher_does_not_look_forgotten(
    directory: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = endpoint_for([str(directory)])
    lock = InstanceLock.acquire(endpoint)
    assert lock is not None
    endpoint.socket.touch()
    for path in (endpoint.lock, endpoint.socket):
        os.utime(path, (0, 0))
    monkeypatch.setattr(process, "TOUCH_S", 0.05)
    with process._kept_fresh(lock):
        assert until(lambda: all(path.stat().st_mtime > 0 for path in (endpoint.lock, endpoint.socket)))
    lock.release()
    assert list(runtime.iterdir()) == []
