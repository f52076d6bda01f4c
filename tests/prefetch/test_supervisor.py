from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
import zmq

from sglang_hcache.prefetch import client as client_module
from sglang_hcache.prefetch import connection, launcher, process
from sglang_hcache.prefetch import supervisor as supervision
from sglang_hcache.prefetch.client import ASK_S, PrefetchClient
from sglang_hcache.prefetch.connection import Connection, Hopeless, Unavailable
from sglang_hcache.prefetch.endpoint import InstanceLock, endpoint_for, is_running
from sglang_hcache.prefetch.launcher import memory_policy
from sglang_hcache.prefetch.messages import FromServer
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from sglang_hcache.storage.region import Region
from tests.prefetch.clients import (
    PATIENCE_S,
    assert_nothing_held,
    child,
    client_of,
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
    select.select([supervisor.news], [], [], PATIENCE_S)
    return os.eventfd_read(supervisor.news) > 0


def replaced(supervisor: LocalSupervisor) -> PrefetchClient:
    """The store that follows the one that is gone."""
    found: list[PrefetchClient] = []

    def taken() -> bool:
        if (store := supervisor.take_next()) is not None:
            found.append(store)
        return bool(found)

    assert until(taken)
    return found[0]


def try_hello(directory: Path, **changes: Any) -> None:
    address = endpoint_for([str(directory)]).address
    client_of(address, hello(**changes)).close()


def kill(client: PrefetchClient, number: int = signal.SIGKILL) -> None:
    os.kill(client.prefetcher_pid, number)


def stop(client: PrefetchClient) -> None:
    """Its prefetcher, whose threads stop one by one; what has arrived before may yet be answered."""

    def has_stopped() -> bool:
        try:
            threads = Path(f"/proc/{client.prefetcher_pid}/task").iterdir()
            return all("State:\tT" in (thread / "status").read_text() for thread in threads)
        except (FileNotFoundError, ProcessLookupError):  # one of them has just ended
            return False

    kill(client, signal.SIGSTOP)
    assert until(has_stopped)


def test_clients_that_start_at_once_share_one_prefetcher(directory: Path) -> None:
    at = time.time() + 1.5  # all have been imported by then
    clients = [child("join", directory, at) for _ in range(4)]
    pids = {line_of(client) for client in clients}
    running = [process.pid for process in prefetchers(directory)]
    assert len(pids) == 1
    assert until(lambda: [process.pid for process in prefetchers(directory)] == [int(next(iter(pids)))]), running
    for client in clients:
        client.communicate("\n", timeout=PATIENCE_S)
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
    assert_nothing_held(client)
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
    assert until(lambda: not client.alive)
    assert client.why_ended == "its process has ended", "it is not taken for one that hangs"
    assert awoken(supervisor), "whoever sleeps on the news hears of it"
    called_at = time.monotonic()
    assert client.contains(keys_of(range(3))) == [False] * 3
    assert client.reserve() is None
    client.prefetch("late", keys_of(range(3)))
    assert client.wait("late", PATIENCE_S)[:3] == ((), True, True)
    client.cut("late")
    client.release("late")
    client.commit(keys_of([90])[0], slots[0], bytes(32))
    client.drop_host()
    assert not client.flush(PATIENCE_S)
    assert str(client.stats()["prefetcher"]).startswith("gone: ")
    assert time.monotonic() - called_at < PATIENCE_S, "no call waits for what is gone"
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


@pytest.fixture
def collected() -> Iterator[None]:
    """Nothing of former tests is given back meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collected")
def test_memory_of_a_replaced_prefetcher_is_given_back_first(directory: Path) -> None:
    """There may be no room for another beside it."""
    supervisor = supervisor_of(directory)
    client = supervisor.open()

    def mapped() -> int:
        return sum("memfd:hcache" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = mapped()
    assert before
    kill(client)
    assert until(lambda: not client.alive)
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
    assert until(lambda: not first.alive)
    assert len(memories.taken) == 1, "somebody may still read it"
    supervisor.replace(first)
    second = replaced(supervisor)
    assert memories.taken == [second.memory.ctypes.data]
    assert threading.current_thread() not in memories.threads[1:]
    kill(second)
    assert until(lambda: not second.alive)
    supervisor.replace(second)
    assert until(lambda: supervisor.restarts == 2)
    supervisor.close()
    assert not memories.taken, "the one that nobody has fetched"


def test_what_fails_unexpectedly_is_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session for which no socket can be had; then one that its owner cannot use, and that is not left behind."""
    supervisor = LocalSupervisor((str(directory),), None, hello, opened=lambda _store: None)
    client = supervisor.start()
    assert isinstance(client, PrefetchClient)
    no_files, bugs = [zmq.ZMQError(errno.EMFILE)], [RuntimeError("a bug")]
    make = zmq.Context.socket

    def socket(context: Any, *arguments: Any) -> Any:
        if no_files:
            raise no_files.pop()
        return make(context, *arguments)

    def opened(_store: PrefetchClient) -> None:
        if bugs:
            raise bugs.pop()

    monkeypatch.setattr(zmq.Context, "socket", socket)
    monkeypatch.setattr(supervisor, "_opened", opened)
    kill(client)
    assert until(lambda: not client.alive)
    supervisor.replace(client)
    second = replaced(supervisor)
    assert not no_files
    assert not bugs
    assert until(lambda: figures(second)["prefetcher_clients"] == 1)
    second.close()
    supervisor.close()


def test_what_is_gone_is_closed_though_no_other_is_wanted(directory: Path) -> None:
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    client.give_up("the weights were changed")
    unwanted = threading.Event()
    unwanted.set()
    supervisor._reopen(client, unwanted)
    assert client.memory.size == 0
    assert until(lambda: not prefetchers(directory))
    supervisor.close()


@pytest.mark.parametrize("found", [False, True])
def test_a_replacement_that_is_not_wanted_any_more(directory: Path, found: bool) -> None:
    """Its session would be for what the client was before."""
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    kill(client)
    assert until(lambda: not client.alive)
    supervisor.replace(client)
    search = supervisor._thread
    assert search is not None
    if found:
        assert until(lambda: supervisor.restarts == 1)
    supervisor.stop_replacing()
    other = supervisor.open()
    search.join(PATIENCE_S)
    assert not search.is_alive(), "else it may yet start a prefetcher"
    assert until(lambda: figures(other)["prefetcher_clients"] == 1), "no session is left behind"
    assert supervisor.take_next() is None
    assert until(lambda: len(prefetchers(directory)) == 1), "what was started beside it sees that it is not needed"
    supervisor.replace(other)
    next_one = replaced(supervisor)
    assert next_one.alive
    next_one.close()
    supervisor.close()


def test_a_client_that_cannot_share_the_memory_leaves_no_session(
    directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher, tries = join(), list[int]()
    supervisor = supervisor_of(directory)

    def refused(*_: object) -> Region:
        tries.append(figures(watcher)["prefetcher_clients"])
        raise OSError("it has no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Region, "attach", refused)
        with pytest.raises(Unavailable, match="its memory cannot be shared: it has no memory"):
            supervisor.open(0.0)
    assert tries == [2]
    assert until(lambda: figures(watcher)["prefetcher_clients"] == 1), "its goodbye came without a start"
    supervisor.close()


def hang(client: PrefetchClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prefetcher, until it is given up."""
    stop(client)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "HUNG_S", 0.5)
        assert until(lambda: not client.alive)


def test_a_prefetcher_that_hangs_is_given_up_killed_and_replaced(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    save(client, range(5))
    assert client.flush(30)
    stop(client)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "HUNG_S", PATIENCE_S)
        patch.setattr(client_module, "ASK_S", ASK_S)
        assert client.contains(keys_of(range(3))) == [False] * 3
        assert client.alive
    hang(client, monkeypatch)
    hung = psutil.Process(client.prefetcher_pid)
    supervisor.replace(client)
    found = replaced(supervisor)
    assert until(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)
    assert fetched(found, range(10)) == 5
    found.close()
    supervisor.close()


def test_a_prefetcher_that_hangs_is_killed_once(
    directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long it takes to get a session with the next one, which may run already."""
    supervisor, tries = supervisor_of(directory), list[None]()
    hung, follow = supervisor.open(), supervisor.open
    hang(hung, monkeypatch)

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


def test_a_paused_clients_prefetcher_lives_on(directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `docker pause`: nobody was asked anything meanwhile, so nobody was silent."""
    client = join()
    save(client, range(5))
    assert client.flush(30)
    paused_s, looks = 0.0, list[None]()

    def monotonic() -> float:
        looks.append(None)
        return time.monotonic() + paused_s

    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(connection, "HUNG_S", 10 * PATIENCE_S)
    monkeypatch.setattr(connection, "BEAT_S", 0.1)
    stop(client)  # so that it is asked, and has not answered, as the pause begins
    for _ in range(3):
        paused_s += 20 * PATIENCE_S
        looks.clear()
        assert until(lambda: len(looks) > 2)
    assert client.alive
    kill(client, signal.SIGCONT)
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
    client, log = join(), directory / "prefetcher.log"
    process = psutil.Process(client.prefetcher_pid)
    assert until(log.exists), "it is opened by a thread, for the first line"
    files = process.num_fds()
    with pytest.raises(Unavailable):
        try_hello(directory, **({"fingerprint": OTHER_FINGERPRINT} | wrong))
    assert until(lambda: process.num_fds() <= files), "a refused client leaves no file open"
    save(client, range(3))
    assert fetched(client, range(3)) == 3


def test_a_prefetcher_that_is_busy_keeps_no_server_from_starting(
    directory: Path, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    client = join()
    save(client, range(5))
    assert client.flush(30)
    stop(client)
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
        launch = mock.Mock(wraps=supervisor._launch)
        patch.setattr(supervisor, "_launch", launch)
        with pytest.raises(Hopeless, match="cannot be started"):
            supervisor.start()
        launch.assert_called_once()
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
    memory = memory_policy(client.prefetcher_pid)
    client.close()
    supervisor.close()
    if not memory_policy(parent):
        pytest.skip("the system does not say where the parent's memory may be")
    assert memory == memory_policy(parent)


def test_a_search_is_ended_at_once(directory: Path, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also amid a hello that is not answered."""
    client = join()
    supervisor = supervisor_of(directory)
    store, connect = supervisor.open(), supervisor._connect
    asked, said = threading.Event(), list[str]()
    answer = Connection._answer_to_hello

    def unanswered(*arguments: Any) -> Connection:
        stop(client)
        return connect(*arguments)

    def waiting(*arguments: Any) -> FromServer:
        asked.set()
        try:
            return answer(*arguments)
        except Unavailable as error:
            said.append(str(error))
            raise

    monkeypatch.setattr(supervisor, "_connect", unanswered)
    monkeypatch.setattr(Connection, "_answer_to_hello", waiting)
    store.give_up("the weights were changed")
    supervisor.replace(store)
    assert asked.wait(PATIENCE_S)
    supervisor.close()
    assert said == ["the prefetcher has ended"], "it did not wait in vain"
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
