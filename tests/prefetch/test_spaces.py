"""Stores that a prefetcher keeps open for nobody in particular."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq

from sglang_hcache.prefetch import connection, spaces
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch import server as server_module
from sglang_hcache.prefetch import supervisor as supervision
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.connection import Unavailable
from sglang_hcache.prefetch.endpoint import InstanceLock, endpoint_for
from sglang_hcache.prefetch.host_memory import available_bytes
from sglang_hcache.prefetch.listeners import Put
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch.server import Server, ServerConfig
from sglang_hcache.prefetch.spaces import Space, Spaces
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from sglang_hcache.storage import store
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.layout import ChunkLayout
from sglang_hcache.storage.region import Region
from sglang_hcache.storage.segment import SegmentWriter
from sglang_hcache.storage.store import LocalStore
from tests.prefetch.clients import PATIENCE_S, SLOTS, client_of, figures, hello, until
from tests.storage.pages import (
    FINGERPRINT,
    LAYOUT,
    OTHER_FINGERPRINT,
    counters,
    holds,
    keys_of,
    lease,
    open_store,
    save,
    served,
)


class Keeper:
    """Spaces, and the loop that they have their jobs done by."""

    def __init__(self, directory: Path) -> None:
        self.jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.spaces = Spaces([directory], None, None, self.jobs.put, lambda _fingerprint, _owner: None)

    def open(self, hello: Hello) -> Space | str:
        found: list[Space | str] = []
        self.spaces.open(hello, found.append)
        while not found:
            self.jobs.get(timeout=PATIENCE_S)()
        return found[0]

    def opened(self, hello: Hello) -> Space:
        space = self.open(hello)
        assert isinstance(space, Space)
        return space


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(tmp_path)
    yield keeper
    keeper.spaces.close_all()


def sized(slots: int, **changes: object) -> Hello:
    return hello(host_bytes=slots * LAYOUT.record_bytes, **changes)


def is_taken(space: Space) -> bool:
    return until(lambda: space.region.taken == space.region.size)


def slots_of(space: Space) -> int:
    return counters(space.store)["pages_total"]


@pytest.mark.parametrize("slots", [SLOTS // 2, SLOTS, 2 * SLOTS, 5])
@pytest.mark.parametrize("policy", list(WritePolicy))
def test_a_space_that_nobody_uses_gets_the_next_clients_size_and_policy(
    keeper: Keeper, slots: int, policy: str
) -> None:
    kept = keeper.opened(hello())
    save(kept.store, range(10))
    kept.sessions.add(1)
    assert keeper.opened(sized(slots, write_policy=policy)) is kept
    assert slots_of(kept) == SLOTS, "while somebody uses it, it stays as it is"
    kept.sessions.clear()
    assert keeper.opened(sized(slots, write_policy=policy)) is kept
    assert slots_of(kept) == slots
    assert len(kept.store.memory) == slots
    assert served(kept.store, range(min(10, slots))) == list(range(min(10, slots)))
    assert counters(kept.store)["hits_file"] == 0
    assert until(lambda: not kept.store.drain())
    before = counters(kept.store)
    assert before["pages_file"] == 10
    save(kept.store, range(20, 24))
    if policy == WritePolicy.WRITE_THROUGH:
        assert until(lambda: counters(kept.store)["pages_file"] == 14)
    elif slots > 5:  # else it is short of slots
        assert not until(lambda: counters(kept.store)["pages_file"] > 10, 0.2)
    kept.store.check()


def test_memory_of_a_space_follows_its_size(keeper: Keeper) -> None:
    mib = (1 << 20) // LAYOUT.record_bytes
    space = keeper.opened(sized(64 * mib))

    def takes(slots: int) -> bool:
        return until(lambda: space.region.taken == slots * LAYOUT.record_bytes)

    assert takes(64 * mib)
    for slots in (16 * mib, 32 * mib, 8 * mib, 100 * mib):
        keeper.opened(sized(slots))
        assert takes(slots), slots
    save(space.store, range(50))
    assert served(space.store, range(50)) == list(range(50))


def test_memory_that_was_promised_is_not_free(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it is taken only some time after it was."""
    regions: list[Region] = []
    create = Region.create

    def created(name: str, size: int) -> Region:
        regions.append(create(name, size))
        return regions[-1]

    monkeypatch.setattr(Region, "create", created)
    limit = 400 << 20
    monkeypatch.setattr(spaces, "available_bytes", lambda: limit - sum(region.taken for region in regions))
    opened: list[Space | str] = []
    for fingerprint in (b"1" * 16, b"2" * 16):
        keeper.spaces.open(hello(fingerprint=fingerprint, host_bytes=256 << 20), opened.append)
    while len(opened) < 2:
        keeper.jobs.get(timeout=PATIENCE_S)()
    refused, served = sorted(opened, key=lambda one: isinstance(one, Space))
    assert "are free" in str(refused)
    assert isinstance(served, Space)


@pytest.mark.parametrize("ranks", [4, 8])
def test_ranks_share_what_those_leave_that_are_closed_for_them(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """All come at once; the arenas of another model's ranks, which nobody uses, have all of the memory."""
    free = 1000 * LAYOUT.record_bytes
    monkeypatch.setattr(
        spaces,
        "available_bytes",
        lambda: free - sum(promise.taken for promise in keeper.spaces._promised.values()),
    )

    def all_of(model: str) -> list[Hello]:
        share = {"host_share": 0.8 / ranks, "about": {"model": model}}
        return [sized(900, fingerprint=f"{model} {rank:010}".encode(), **share) for rank in range(ranks)]

    for asked in all_of("other"):
        former = keeper.opened(asked)
        former.sessions.add(1)
        assert is_taken(former)
    for former in keeper.spaces.opened:
        former.sessions.clear()
    monkeypatch.setattr(Region, "settle", lambda *_: None)
    opened: list[Space | str] = []

    def use(space: Space | str) -> None:
        opened.append(space)
        if isinstance(space, Space):
            space.sessions.add(1)

    for asked in all_of("model"):
        keeper.spaces.open(asked, use)
    while len(opened) < ranks:
        keeper.jobs.get(timeout=PATIENCE_S)()
    sizes = [slots_of(space) for space in opened if isinstance(space, Space)]
    assert len(sizes) == ranks
    assert min(sizes) >= 800 // ranks - 1


def test_memory_that_is_taken_amid_a_look_counts_once(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000 * LAYOUT.record_bytes
    settle = Region.settle
    monkeypatch.setattr(Region, "settle", lambda *_: None)
    first = keeper.opened(sized(300))
    first.sessions.add(1)

    def available_bytes() -> int:
        settle(first.region, lambda: False)
        assert is_taken(first)
        return free - first.region.taken

    monkeypatch.setattr(spaces, "available_bytes", available_bytes)
    assert isinstance(keeper.open(sized(700, fingerprint=OTHER_FINGERPRINT)), Space)


@pytest.mark.parametrize("taken", [False, True])
def test_ranks_with_pages_of_their_own_share_what_is_free(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """By default: the same for each, whether others have `taken` theirs or not; and again at the next start."""
    if not taken:
        monkeypatch.setattr(Region, "settle", lambda *_: None)
    free = 1000 * LAYOUT.record_bytes
    monkeypatch.setattr(
        spaces,
        "available_bytes",
        lambda: free - sum(promise.taken for promise in keeper.spaces._promised.values()),
    )

    for share, slots in ((0.2, 200), (0.2, 200), (0.1, 100), (0.2, 200)):
        ranks = []
        for rank in range(4):
            asked = sized(900, fingerprint=b"%016d" % rank, host_share=share, about={"model": "m"})
            space = keeper.opened(asked)
            space.sessions.add(1)
            ranks.append(space)
            assert not taken or is_taken(space)
        assert [slots_of(space) for space in ranks] == [slots] * 4
        for space in ranks:
            space.sessions.clear()
    assert slots_of(keeper.opened(sized(5, host_share=0.8))) == 5, "no more than is asked for"


def test_a_space_that_cannot_grow_keeps_its_size(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    space = keeper.opened(hello())
    save(space.store, range(10))
    assert is_taken(space)
    monkeypatch.setattr(spaces, "available_bytes", lambda: 0)
    for changes in ({}, {"host_share": 0.8}):
        assert keeper.opened(hello(**changes)) is space, "what it takes itself is there for it"
    assert slots_of(space) == int(0.8 * SLOTS)
    assert is_taken(space)
    monkeypatch.setattr(spaces, "available_bytes", lambda: (SLOTS + 5 - slots_of(space)) * LAYOUT.record_bytes + 1)
    assert keeper.opened(sized(10 * SLOTS)) is space
    assert slots_of(space) == SLOTS + 5
    assert "and gets" in caplog.text
    assert served(space.store, range(10)) == list(range(10))
    assert counters(space.store)["hits_file"] == 0


def test_spaces_that_nobody_uses_make_room_for_others(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused = keeper.opened(hello(fingerprint=b"u" * 16)), keeper.opened(hello())
    used.sessions.add(1)
    save(unused.store, range(10))
    assert is_taken(used)
    assert is_taken(unused)
    available = [psutil.virtual_memory().available]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available[0]))
    free, available[0] = available[0], 0
    close = unused.region.close

    def closed() -> None:
        close()
        available[0] = free

    monkeypatch.setattr(unused.region, "close", closed)
    third = keeper.opened(hello(fingerprint=OTHER_FINGERPRINT))
    assert not unused.store.alive
    assert used.store.alive
    available[0] = 0
    third.sessions.add(2)
    assert "are free" in str(keeper.open(hello())), "what is used is not taken away"
    available[0] = free
    assert served(keeper.opened(hello()).store, range(10)) == list(range(10))


def test_those_that_wait_for_their_disks_hold_up_nobody_else(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStore, "drain", lambda _store: 1)
    for number in range(8):
        keeper.spaces.close(keeper.opened(hello(fingerprint=b"%016d" % number)))
    assert keeper.opened(hello()).store.alive


def test_whoever_needs_the_memory_of_another_waits_until_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is told so: only silence makes it give up."""
    left, news = [7], os.eventfd(0)
    monkeypatch.setattr(LocalStore, "drain", lambda _store: left[0])
    monkeypatch.setattr(server_module, "WAITING_S", 0.0)
    monkeypatch.setattr(connection, "LOG_EVERY_S", 0.0)
    now, told = [1000.0], list[int]()
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: now[0]))
    address = f"ipc://{tmp_path}/socket"
    server = Server(ServerConfig(address, (str(tmp_path),)))
    thread = threading.Thread(target=server.run)
    thread.start()
    client_of(address, hello(), news=news).close()
    former = server._spaces._promised[FINGERPRINT]
    assert until(lambda: former.taken == former.size)
    monkeypatch.setattr(spaces, "available_bytes", lambda: 0)

    def waiting(pages: int) -> None:
        told.append(pages)
        now[0] += 0.9
        if len(told) == 5:
            left[0] = 0

    with caplog.at_level(logging.INFO):
        asked = hello(fingerprint=OTHER_FINGERPRINT)
        client = client_of(address, asked, news=news, timeout_s=1.0, waiting=waiting)
    assert told[:5] == [7] * 5
    assert "7 pages must be written first" in caplog.text
    client.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    os.close(news)


def hanging(go_on: threading.Event) -> Callable[..., LocalStore]:
    """Opens stores; those of FINGERPRINT once it may."""

    def opened(layout: ChunkLayout, fingerprint: bytes, *arguments: Any, **options: Any) -> LocalStore:
        assert fingerprint != FINGERPRINT or go_on.wait(PATIENCE_S)
        return LocalStore(layout, fingerprint, *arguments, **options)

    return opened


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Server]:
    server = Server(ServerConfig(f"ipc://{directory}/socket", (str(directory),), ends_when_unused=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[LocalSupervisor]:
    """Of a prefetcher in this process, whose memory is that of a model that nobody uses."""
    endpoint = endpoint_for([str(tmp_path)])
    lock = InstanceLock.acquire(endpoint)
    assert lock is not None
    server = Server(ServerConfig(endpoint.address, (str(tmp_path),), ends_when_unused=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    supervisor = LocalSupervisor((str(tmp_path),), None, lambda: hello(fingerprint=OTHER_FINGERPRINT))
    client_of(endpoint.address, hello(), news=supervisor.news).close()
    former = server._spaces._promised[FINGERPRINT]
    assert until(lambda: former.taken == former.size)
    yield supervisor
    supervisor.close()
    os.close(supervisor.news)
    server.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    lock.release()


def joined(supervisor: LocalSupervisor) -> PrefetchClient:
    """The store that follows, once it is there."""
    found: list[PrefetchClient] = []

    def taken() -> bool:
        found.extend(store for store in [supervisor.take_next()] if store)
        return bool(found)

    assert until(taken)
    return found[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Of those that wait for a prefetcher and are told so all the time: each look at it takes 5 s."""
    monkeypatch.setattr(server_module, "WAITING_S", 0.0)
    monkeypatch.setattr(server_module, "TICK_MS", 10)
    looks = itertools.count()

    def monotonic() -> float:
        return 5.0 * next(looks)

    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=monotonic))
    return monotonic


def test_a_server_starts_although_what_is_in_its_way_cannot_be_written(
    supervisor: LocalSupervisor, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [7]
    monkeypatch.setattr(LocalStore, "drain", lambda _store: left[0])
    free, available = available_bytes, [0]
    monkeypatch.setattr(spaces, "available_bytes", lambda: available[0])
    began = clock()
    nothing = supervisor.start()
    assert isinstance(nothing, NoStore)
    assert nothing.why_ended == "it is not ready: of 7 pages it has written none in 60 s"
    assert 60 < clock() - began < 120
    left[0], available[0] = 0, free()
    joined(supervisor).close()


def test_a_server_starts_although_a_directory_hangs_while_it_is_opened(
    supervisor: LocalSupervisor, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, opened = threading.Event(), LocalStore

    def hang(*arguments: Any, **options: Any) -> LocalStore:
        assert go_on.wait(PATIENCE_S)
        return opened(*arguments, **options)

    monkeypatch.setattr(spaces, "LocalStore", hang)
    began = clock()
    nothing = supervisor.start()
    assert isinstance(nothing, NoStore)
    assert nothing.why_ended == "it is not ready: it has not opened its directories in 300 s"
    assert 300 < clock() - began < 360
    go_on.set()
    joined(supervisor).close()


def test_pages_that_are_written_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time; and not for ever, whatever comes and goes."""
    now = [0.0]
    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: now[0]))
    patience = supervision._Patience(60.0)
    for pages in (0, *range(5, -1, -1), 7, 6):
        patience.look(pages)
        now[0] += 59.0
    patience.look(9)
    now[0] += 2.0
    with pytest.raises(Unavailable, match="of 8 pages"):
        patience.look(8)


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_asked_for_as_the_prefetcher_ends_is_not_opened_or_closed_again(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking an index may take minutes; what is open when the process ends is checked by the next one."""
    keeper, made, go_on = Keeper(tmp_path), list[LocalStore](), threading.Event()
    if not begun:  # it waits for memory
        in_the_way = keeper.opened(hello())
        assert is_taken(in_the_way)
        monkeypatch.setattr(LocalStore, "drain", lambda _store: 1)
        monkeypatch.setattr(spaces, "available_bytes", lambda: 0)

    def make(*arguments: Any, **options: Any) -> LocalStore:
        made.append(LocalStore(*arguments, **options))
        assert go_on.wait(PATIENCE_S)
        return made[-1]

    monkeypatch.setattr(spaces, "LocalStore", make)
    keeper.spaces.open(hello(fingerprint=OTHER_FINGERPRINT), lambda _: None)
    assert not begun or until(lambda: bool(made))
    ending = threading.Thread(target=keeper.spaces.close_all)
    ending.start()
    assert until(keeper.spaces._hurry.is_set)
    go_on.set()
    ending.join(PATIENCE_S)
    assert not ending.is_alive()
    assert [store.alive for store in made] == ([False] if begun else [])


def test_a_client_for_whose_pages_no_thread_can_be_had_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one with the same pages is served: nothing of the former is left."""
    start, files = threading.Thread.start, Path("/proc/self/fd")

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("hcache-space"):
            raise RuntimeError("can't start new thread")
        start(thread)

    news = os.eventfd(0)
    with serving(tmp_path) as server:
        ask = partial(client_of, server.config.address, news=news)
        before = len(list(files.iterdir()))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(Unavailable, match="can't start new thread"):
                ask(hello())
        assert until(lambda: len(list(files.iterdir())) <= before), "its process is not watched any more"
        assert not server._unwelcomed
        go_on = threading.Event()
        monkeypatch.setattr(spaces, "LocalStore", hanging(go_on))
        with ThreadPoolExecutor(1) as pool:
            hangs = pool.submit(ask, hello())
            assert until(lambda: bool(server._spaces._busy))
            ask(hello(fingerprint=OTHER_FINGERPRINT)).close()
            assert FINGERPRINT in server._spaces._busy, "it waits for no thread of another"
            go_on.set()
            hangs.result().close()
    os.close(news)


@pytest.mark.parametrize("killed", [False, True], ids=["it says so", "it is killed"])
def test_a_client_that_gives_up_waiting_leaves_no_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    go_on, news = threading.Event(), os.eventfd(0)
    monkeypatch.setattr(spaces, "LocalStore", hanging(go_on))
    with serving(tmp_path) as server:
        ask = partial(client_of, server.config.address, hello(), news=news)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.connect(server.config.address)
            socket.send(m.encode(hello()))
            assert until(lambda: bool(server._unwelcomed))
            (peer,) = server._unwelcomed
            if not killed:
                socket.send(m.encode(m.Bye()))
                assert until(lambda: not server._unwelcomed)

        def has_left() -> bool:
            puts = queue.SimpleQueue[Put]()
            server._later(lambda: puts.put(peer.put([b""])))
            return puts.get(timeout=PATIENCE_S) is Put.GONE

        assert until(has_left)
        go_on.set()
        client = ask()
        assert figures(client)["prefetcher_clients"] == 1
        assert not server._unwelcomed
        client.close()
    os.close(news)


@pytest.mark.parametrize("welcomed", [True, False], ids=["with its welcome on the way", "with its hello unread"])
def test_a_client_that_gives_up_leaves_no_session_however_late_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, welcomed: bool
) -> None:
    go_on, news = threading.Event(), os.eventfd(0)

    def hang() -> None:
        assert go_on.wait(PATIENCE_S)

    with serving(tmp_path) as server:
        ask = partial(client_of, server.config.address, news=news)
        first = ask(hello())
        if not welcomed:
            server._later(hang)
        with monkeypatch.context() as patch:
            patch.setattr(connection, "LOOK_S", 0.0)
            with pytest.raises(Unavailable):
                ask(hello(), go_on=lambda: False)
        go_on.set()
        second = ask(hello())
        assert until(lambda: figures(second)["prefetcher_clients"] == 2)
        first.close()
        second.close()
    os.close(news)


def test_memory_of_a_closed_space_is_given_back_at_once(keeper: Keeper) -> None:
    space = keeper.opened(hello())
    save(space.store, range(10))
    memory = space.store.memory
    assert until(lambda: space.store.drain() == 0)
    keeper.spaces.close(space)
    assert keeper.opened(hello()) is not space
    assert not memory.any(), "although somebody still refers to it"


def test_what_is_leased_stays_as_it_is_when_the_prefetcher_ends(tmp_path: Path) -> None:
    """Its clients may be restoring from it, and only later hear of the end."""
    keeper = Keeper(tmp_path)
    space = keeper.opened(hello())
    save(space.store, range(10))
    slots = lease(space.store, "a client's", keys_of(range(10)))
    memory = space.store.memory
    keeper.spaces.close_all()
    assert all(holds(memory[slot], page) for page, slot in enumerate(slots))


def test_memory_that_a_write_may_still_use_is_not_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that hangs, and goes on, would store zeros under pages that the index then calls good."""
    monkeypatch.setattr(store, "CLOSE_WAIT_S", 0.2)
    go_on, write = threading.Event(), SegmentWriter.write

    def hang(*arguments: Any) -> None:
        assert go_on.wait(PATIENCE_S)
        write(*arguments)

    monkeypatch.setattr(SegmentWriter, "write", hang)
    keeper = Keeper(tmp_path)
    space = keeper.opened(hello())
    save(space.store, range(3))
    keeper.spaces.close(space)
    keeper.spaces.close_all()
    go_on.set()
    assert until(space.store.close), "the write has ended"
    again = open_store(tmp_path)
    found = served(again, range(3))
    assert found == list(range(len(found)))
    assert len(found) == counters(again)["pages_file"] > 0
    assert counters(again)["pages_damaged"] == 0
    again.close()
