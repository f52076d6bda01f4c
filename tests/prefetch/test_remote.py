"""Clients that share no memory with the prefetcher: a real one, over TCP on loopback, with CURVE keys."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import zmq
from msgspec import structs

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch import remote
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.connection import Unavailable
from sglang_hcache.prefetch.endpoint import endpoint_for
from sglang_hcache.prefetch.keys import KeyFileError, client_keys, make_keys
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch.remote import RemoteClient
from sglang_hcache.prefetch.supervisor import RemoteSupervisor
from sglang_hcache.storage.contract import AGEING, as_priority
from sglang_hcache.storage.layout import ROOT, ChunkLayout, seal
from tests.prefetch.clients import PATIENCE_S, REPOSITORY, client_of, connection_to, line_of, reserved, tell, until
from tests.prefetch.raw import Raw, is_unasked
from tests.storage.pages import FINGERPRINT, LAYOUT, fill, holds, key_of, keys_of

SLOTS = 64
PORTS = itertools.count(20_000)


class Prefetcher:
    """A prefetcher's process that listens on TCP; `keys`: made for the clients `a` and `b`; `role`: as a child."""

    def __init__(
        self, folder: Path, *, secure: bool = True, address: str = "", role: str = "", **limits: float
    ) -> None:
        self.directory, self.keys = folder / "pages", folder / "keys"
        self.directory.mkdir()
        make_keys(self.keys, ("a", "b"))
        self.address = address or free_address()
        self.local = endpoint_for([str(self.directory)]).address
        config = {"address": self.local, "directories": [str(self.directory)], "ends_when_unused": False}
        config |= {"listen": self.address, "keys": str(self.keys) if secure else "", **limits}
        program = ["tests.prefetch.child", role, str(self.directory)] if role else ["sglang_hcache.prefetch"]
        command = [sys.executable, "-m", *program, json.dumps(config)]
        self.log_path = folder / "log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.news = os.eventfd(0, os.EFD_NONBLOCK)
        self.secure = secure

    def remote(self, name: str = "a", layout: ChunkLayout = LAYOUT, slots: int = SLOTS) -> RemoteClient:
        keys = self.keys / name if self.secure else None
        return RemoteClient(connection_to(self.address, hello(0, layout, slots), keys=keys), news=self.news)

    def joined(self, greeting: m.Hello | None = None) -> PrefetchClient:
        """On its own host."""
        return client_of(self.local, greeting or hello(os.getpid()), news=self.news)

    def log(self) -> str:
        return self.log_path.read_text()

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0
        os.close(self.news)


Start = Callable[..., Prefetcher]


def free_address() -> str:
    """No other process uses its host, and no other test its port."""
    return f"tcp://{ip_address('127.64.0.0') + os.getpid()}:{next(PORTS)}"


def hello(pid: int = 0, layout: ChunkLayout = LAYOUT, slots: int = SLOTS) -> m.Hello:
    return m.Hello(
        pid=pid,
        name="test",
        fingerprint=FINGERPRINT,
        page_tokens=layout.page_tokens,
        layer_bytes=list(layout.layer_bytes),
        host_bytes=slots * layout.record_bytes,
        grant=16 if pid else 0,
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts one."""
    with ExitStack() as stack:

        def start_one(**options: Any) -> Prefetcher:
            running = Prefetcher(tmp_path, **options)
            stack.callback(running.close)
            return running

        yield start_one


@pytest.fixture
def prefetcher(start: Start) -> Prefetcher:
    return start()


@pytest.fixture
def open_prefetcher(start: Start) -> Prefetcher:
    """Without keys, as loopback allows."""
    return start(secure=False)


def save(client: RemoteClient | PrefetchClient, pages: range) -> None:
    for page in pages:
        slot = reserved(client)
        fill(client.memory[slot], page)
        client.commit(key_of(page), slot, key_of(page - 1) if page else ROOT)
    assert client.flush(PATIENCE_S)


def fetch(client: RemoteClient | PrefetchClient, pages: range) -> int:
    """How many of the pages come; asserts that they are right."""
    client.prefetch("o", keys_of(pages))
    progress = client.wait("o", PATIENCE_S)
    assert progress.done
    for page, slot in zip(pages, progress.slots, strict=False):
        assert holds(client.memory[slot], page)
    client.release("o")
    return len(progress.slots)


def overview(raw: Raw) -> m.Overviewed:
    raw.send(m.encode(m.Overview()))
    return raw.hear(m.Overviewed)


def test_memory_of_pages_that_nobody_can_ask_for_again_is_given_back(prefetcher: Prefetcher) -> None:
    """What is on no file is one process's alone; a prefetcher that was started by hand keeps the rest."""
    for number in range(3):
        own = structs.replace(hello(os.getpid()), fingerprint=b"%016d" % number, on_file=False)
        prefetcher.joined(own).close()
    prefetcher.joined().close()
    with Raw(prefetcher.directory) as raw:

        def left() -> list[object]:
            return [model["fingerprint"] for model in overview(raw).models]

        assert until(lambda: left() == [FINGERPRINT.hex()]), left()


class RawClient:
    """Speaks the messages one by one, over a connection without keys."""

    def __init__(self, address: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.connect(address)
        self.session = self.seq = 0
        self.socket.send(m.encode(hello()))
        while isinstance(welcome := self.receive()[0], m.Waiting):
            pass
        assert isinstance(welcome, m.Welcome)
        assert welcome.region == ""
        self.session = welcome.session

    def send(self, message: m.Message, *payload: bytes) -> None:
        self.seq += 1
        message.session, message.seq = self.session, self.seq
        self.socket.send_multipart([m.encode(message), *payload])

    def receive(self) -> tuple[m.FromServer, list[bytes]]:
        """What comes next, but for signs of life that nobody has asked for."""
        while True:
            assert self.socket.poll(int(1000 * PATIENCE_S)), "no answer"
            head, *payload = self.socket.recv_multipart()
            if not is_unasked(message := m.decode_from_server(head)):
                return message, payload

    def pages(self) -> int:
        """How many come of those that are in memory: before it answers a flush the prefetcher sends what it can."""
        self.send(m.Flush())
        count = 0
        while not isinstance((received := self.receive())[0], m.Flushed):
            count += len(received[1])
        return count


def test_started_by_hand_it_keeps_its_memory_for_the_next_client(prefetcher: Prefetcher) -> None:
    client = prefetcher.remote()
    save(client, range(20))
    pid = client.prefetcher_pid
    client.close()
    with Raw(prefetcher.directory) as raw:
        assert until(lambda: overview(raw).clients == 0)
        assert len(overview(raw).models) == 1
    client = prefetcher.remote()
    assert client.prefetcher_pid == pid
    assert fetch(client, range(25)) == 20
    figures = client.connection.ask(m.Stats(), m.Figures, PATIENCE_S).figures
    assert (figures["hits_file"], figures["hits_host"]) == (0, 20)
    client.close()


def test_pages_are_shared_by_remote_and_local_clients(prefetcher: Prefetcher) -> None:
    a, b = prefetcher.remote("a"), prefetcher.remote("b")
    save(a, range(20))
    assert b.contains(keys_of([0, 19, 20])) == [True, True, False]
    assert fetch(b, range(25)) == 20
    local = prefetcher.joined()
    assert fetch(local, range(25)) == 20
    save(local, range(20, 30))
    b.drop_host()
    assert fetch(b, range(35)) == 30
    assert a.stats()["pages_received"] == 20
    for client in (a, b, local):
        client.close()


def test_a_page_in_the_clients_memory_is_not_sent_again(prefetcher: Prefetcher) -> None:
    a, b = prefetcher.remote("a"), prefetcher.remote("b")
    save(a, range(8))
    assert [fetch(b, range(8)) for _ in range(3)] == [8, 8, 8]
    assert b.stats()["pages_sent"] == 8
    a.close()
    b.close()


def test_a_lookup_that_fails_costs_its_own_request_only(
    prefetcher: Prefetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = prefetcher.remote()
    save(client, range(8))
    client.prefetch("bad", keys_of(range(4)))
    assert len(client.wait("bad", PATIENCE_S).slots) == 4
    with monkeypatch.context() as broken:
        broken.setattr(client._store, "prefetch", Mock(side_effect=ZeroDivisionError))
        client.prefetch("bad", keys_of(range(4, 8)))
        assert client.wait("bad", PATIENCE_S)[:3] == ((), True, True), "nothing of what it asked for before"
    assert fetch(client, range(8)) == 8
    client.close()


def test_what_the_prefetcher_counts_of_files_is_what_its_clients_report(
    prefetcher: Prefetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what each of the two counts by itself is added up."""
    client = prefetcher.remote()
    ask = client.connection.ask
    counted = {"pages_evicted": 7, "pages_write_failed": 3, "pages_damaged_on_the_way": 2, "pages_dropped": 4}

    def asked(message: m.Stats, kind: type[m.Figures], timeout_s: float) -> m.Figures:
        answer = ask(message, kind, timeout_s)
        return m.Figures(answers=answer.answers, figures=answer.figures | counted)

    stats = client.stats()
    assert [stats[name] for name in counted] == [0, 0, 0, 0]
    monkeypatch.setattr(client.connection, "ask", asked)
    client._files.damaged = 1
    monkeypatch.setattr(client._store._writer, "failed", 10)
    stats = client.stats()
    assert [stats[name] for name in counted] == [7, 13, 3, 4]
    client.close()


def test_only_those_with_a_key_get_in(prefetcher: Prefetcher, tmp_path: Path) -> None:
    client = prefetcher.remote("b")
    make_keys(tmp_path / "others", ("a",))
    strange = tmp_path / "strange"
    make_keys(strange, ("c",))
    (strange / "c" / "server.key").write_bytes((prefetcher.keys / "server.key").read_bytes())

    def turned_away(keys: Path | None, counter: str) -> None:
        def count() -> object:
            return client.stats().get(counter, 0)

        before = count()
        with pytest.raises(Unavailable):
            connection_to(prefetcher.address, hello(), keys=keys, go_on=lambda: count() == before)
        assert count() != before

    turned_away(None, "refused_no_handshake")
    turned_away(strange / "c", "refused_unauthorised")
    turned_away(tmp_path / "others" / "a", "refused_no_handshake")
    assert until(lambda: "was refused" in prefetcher.log())
    client.close()


def test_a_probe_of_the_port_does_not_fill_the_log(prefetcher: Prefetcher) -> None:
    client = prefetcher.remote()
    host, _, port = prefetcher.address.removeprefix("tcp://").rpartition(":")
    for _ in range(5):
        socket.create_connection((host, int(port))).close()
    assert until(lambda: client.stats().get("refused_no_handshake") == 5), client.stats()
    client.close()
    prefetcher.process.terminate()
    assert prefetcher.process.wait(PATIENCE_S) == 0
    assert prefetcher.log().count("a connection was dropped") == 1


def test_a_key_that_cannot_be_read_keeps_nobody_else_out(prefetcher: Prefetcher) -> None:
    clients = prefetcher.keys / "clients"
    (clients / "Zero.key").write_text("")
    (clients / "0.key").symlink_to(clients / "nowhere")
    prefetcher.remote("a").close()
    assert until(lambda: "0.key cannot be read" in prefetcher.log())


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ("a",))
    secret = tmp_path / "keys" / "a" / "client.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    secret.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        client_keys(tmp_path / "keys" / "a")


def test_without_keys_only_loopback_is_served(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import argparse,sys;from sglang_hcache.cli import prefetcher as p;"]
    command[-1] += "a=argparse.ArgumentParser();p.add_arguments(a);sys.exit(p.run(a.parse_args()))"
    done = subprocess.run(
        [*command, "--dir", str(tmp_path / "d"), "--listen", "tcp://0.0.0.0:7777"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert "give keys" in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_gives_no_credit_gets_no_pages_and_holds_up_nobody(open_prefetcher: Prefetcher) -> None:
    a = open_prefetcher.remote()
    save(a, range(20))
    a.drop_host()
    raw = RawClient(open_prefetcher.address)
    raw.send(m.Prefetch(keys=keys_of(range(20)), priority=0, page_priority=0))
    assert raw.pages() == 0
    raw.send(m.Credit(pages=3))
    assert raw.pages() == 3
    assert fetch(a, range(20)) == 20
    raw.send(m.Credit(pages=1000))
    assert raw.pages() == 17
    a.close()


def test_a_silent_client_expires(open_prefetcher: Prefetcher) -> None:
    a = open_prefetcher.remote()
    save(a, range(20))
    raw = RawClient(open_prefetcher.address)
    raw.send(m.Prefetch(keys=keys_of(range(20)), priority=0, page_priority=0))
    raw.send(m.Credit(pages=2))
    assert raw.pages() == 2
    assert a.stats()["prefetcher_clients"] == 2
    assert until(lambda: a.stats()["prefetcher_clients"] == 1)
    raw.send(m.Health())
    refused, _ = raw.receive()
    assert isinstance(refused, m.Refused)
    assert refused.fatal
    a.close()


def test_payload_that_does_not_fit_is_refused(open_prefetcher: Prefetcher) -> None:
    raw = RawClient(open_prefetcher.address)
    page, whole = m.Page(key_of(1), ROOT, 0), bytes(LAYOUT.record_bytes)
    for payload in ([], [whole, whole], [whole[:-1]]):
        raw.send(m.Commit(pages=[page]), *payload)
        refused, _ = raw.receive()
        assert isinstance(refused, m.Refused)
        assert (refused.reason, refused.fatal) == ("bad_payload", False)
    raw.send(m.Commit(pages=[page]), whole)  # of the right size, but no record
    raw.send(m.Stats())
    answer, _ = raw.receive()
    assert isinstance(answer, m.Figures)
    assert answer.figures["refused_bad_payload"] == 3
    assert answer.figures["pages_damaged_on_the_way"] == 1
    raw.send(m.Lookup(keys=[key_of(1)]))
    found, _ = raw.receive()
    assert isinstance(found, m.Found)
    assert found.present == [False]


def test_pages_for_other_hosts_are_read_in_turn_with_those_for_this_one(start: Start) -> None:
    prefetcher = start(secure=False, role="read_in_turn", read_bytes_per_s=1)
    local = prefetcher.joined()
    save(local, range(30))
    local.drop_host()
    assert local.stats()["pages_host"] == 0
    raw = RawClient(prefetcher.address)
    raw.send(m.Credit(pages=SLOTS))

    def ask(pages: range) -> None:
        for page in pages:
            raw.send(m.Prefetch(keys=[key_of(page)], priority=0, page_priority=0))

    ask(range(3))
    assert raw.pages() == 0
    now, page_s = time.time(), 0.001
    priorities = {"priority": as_priority(arrived_at=now), "page_priority": as_priority(page_s)}
    local.prefetch("local", [key_of(3)], **priorities)
    assert local.wait("local", PATIENCE_S, until_known=True).known
    assert until(lambda: AGEING * (time.time() - now) > page_s)
    ask(range(4, 30))
    assert raw.pages() == 0
    tell(prefetcher.process)
    assert len(local.wait("local", PATIENCE_S).slots) == 1
    came = 0
    while came < 29:
        came += len(raw.receive()[1])
    read = [line_of(prefetcher.process) for _ in range(30)]
    assert read == [key.hex() for key in keys_of(range(30))]
    local.close()


class HungDrive(threading.Thread):
    """Serves one client, and never says what becomes of some pages: they lie on a drive that hangs.

    `reads`: cleared, any other page waits, and those who ask after it.
    """

    def __init__(self, hung: range) -> None:
        super().__init__(daemon=True)
        self.reads = threading.Event()
        self.reads.set()
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.hung = keys_of(hung)
        self.records = {}
        for page in range(20):
            record = np.zeros(LAYOUT.record_bytes, np.uint8)
            fill(record, page)
            seal(record, LAYOUT, FINGERPRINT, key_of(page), ROOT)
            self.records[key_of(page)] = record.tobytes()
        self.asked: list[m.Prefetch] = []
        self.released: list[int] = []
        self.start()

    def run(self) -> None:
        message: m.FromClient = m.Health()
        while not isinstance(message, m.Bye):
            client, frame, *_ = self.socket.recv_multipart()
            message = m.decode_from_client(frame)
            if answer := self.answer(message):
                head, *payload = answer
                self.socket.send_multipart([client, m.encode(structs.replace(head, session=1)), *payload])
        self.socket.close(500)

    def answer(self, message: m.FromClient) -> tuple[m.Message, *tuple[bytes, ...]] | None:
        if isinstance(message, m.Hello):
            return (m.Welcome(pid=1, region="", slots=SLOTS, quota_bytes=None, read_bytes_per_s=None),)
        if isinstance(message, m.Lookup):
            return (m.Found(answers=message.seq, present=[True] * len(message.keys)),)
        if isinstance(message, m.Prefetch):
            self.asked.append(message)
            if message.keys[0] not in self.hung:
                self.reads.wait()
                ready = m.Ready(answers=message.seq, first=0, slots=[0], done=True, total=1)
                return ready, self.records[message.keys[0]]
        if isinstance(message, m.Release):
            self.released.append(message.prefetch)
        return (m.Alive(answers=message.seq),) if isinstance(message, m.Health | m.Bye) else None


class Clock:
    """What a remote client takes for the time; it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    return clock


def test_a_drive_that_hangs_there_blocks_no_reads_from_others(clock: Clock) -> None:
    there, news = HungDrive(range(8)), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(connection_to(there.address, hello()), news=news)
    client.prefetch("hangs", keys_of(range(8)))
    assert until(lambda: len(there.asked) == 8)
    client.cut("hangs")
    client.prefetch("good", keys_of([9]))
    clock.passes(1.9)
    progress = client.wait("good", PATIENCE_S)
    assert holds(client.memory[progress.slots[0]], 9)
    assert until(lambda: len(there.released) >= 8), "its prefetcher waits for them no more, either"
    assert until(lambda: client._store.stats()["pages_reading"] == 0)
    client.prefetch("hangs", keys_of([3, 10]))
    assert client.wait("hangs", PATIENCE_S)[:3] == ((), True, True), "no other request waits for them"
    clock.passes(remote.AGAIN_S - 0.1)
    assert client.contains(keys_of([3, 10])) == [False, True]
    clock.passes(0.2)
    assert client.contains(keys_of([3])) == [True]
    client.close()
    there.join(PATIENCE_S)
    os.close(news)


def test_on_a_slow_link_pages_come_though_nobody_waits_for_them_any_more(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LATE_S", 0.1)
    there, news = HungDrive(range(0)), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(connection_to(there.address, hello()), news=news)
    there.reads.clear()
    client.prefetch("first", keys_of([0]))
    assert until(lambda: len(there.asked) == 1)
    clock.passes(0.5)
    there.reads.set()
    assert len(client.wait("first", PATIENCE_S).slots) == 1
    there.reads.clear()
    client.prefetch("next", keys_of([1]))
    assert until(lambda: len(there.asked) == 2)
    client.cut("next")
    clock.passes(0.5)
    looks = clock.looks
    assert until(lambda: clock.looks > looks + 5), "it is still waited for"
    there.reads.set()
    assert until(lambda: client._store.stats()["pages_host"] == 2)
    assert client.contains(keys_of([1])) == [True]
    client.close()
    there.join(PATIENCE_S)
    os.close(news)


def test_a_page_that_is_waited_for_may_take_its_time(clock: Clock) -> None:
    there, news = HungDrive(range(1)), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(connection_to(there.address, hello()), news=news)
    client.prefetch("first", keys_of([0]))
    assert until(lambda: bool(there.asked))
    client.prefetch("second", keys_of([0]))
    assert client.wait("second", PATIENCE_S, until_known=True).known
    client.cut("first")
    clock.passes(1.5)
    looks = clock.looks
    assert until(lambda: clock.looks > looks + 5), "it is still waited for"
    assert not there.released
    assert not client.progress("second").done
    client.close()
    there.join(PATIENCE_S)
    os.close(news)


def test_large_records(prefetcher: Prefetcher, capsys: pytest.CaptureFixture[str]) -> None:
    layout, pages = ChunkLayout(64, (1 << 20,) * 16), 8
    a, b = (prefetcher.remote(name, layout=layout, slots=16) for name in "ab")
    data = np.random.default_rng(1).integers(0, 256, layout.record_bytes - layout.header_bytes, np.uint8)
    start = time.monotonic()
    for page in range(pages):
        slot = reserved(a)
        a.memory[slot, layout.header_bytes :] = np.roll(data, page)
        a.commit(key_of(page), slot, ROOT)
    assert a.flush(60)
    stored = time.monotonic() - start
    start = time.monotonic()
    b.prefetch("o", keys_of(range(pages)))
    progress = b.wait("o", 60)
    fetched = time.monotonic() - start
    assert len(progress.slots) == pages
    for page, slot in enumerate(progress.slots):
        assert np.array_equal(b.memory[slot, layout.header_bytes :], np.roll(data, page))
    gigabytes = pages * layout.record_bytes / 1e9
    with capsys.disabled():
        print(
            f"\n{pages} pages of 16 MiB, CURVE on loopback: stored and on file {gigabytes / stored:.2f} GB/s,", end=""
        )
        print(f" fetched {gigabytes / fetched:.2f} GB/s")
    a.close()
    b.close()


def test_memory_of_a_closed_client_is_given_back_at_once(open_prefetcher: Prefetcher) -> None:
    client = open_prefetcher.remote()
    save(client, range(5))
    memory = client.memory
    assert memory.any()
    client.close()
    assert not memory.any(), "although somebody still refers to it"


def test_a_server_starts_before_its_prefetcher_and_finds_it_later(start: Start) -> None:
    address = free_address()
    early = RemoteSupervisor(address, None, hello)
    assert isinstance(early.start(0.5), NoStore)
    start(secure=False, address=address)
    found: list[RemoteClient] = []

    def taken() -> list[RemoteClient]:
        found.extend(client for client in [early.take_next()] if client)
        return found

    assert until(taken)
    save(found[0], range(3))
    found[0].close()
    early.close()


def test_keys_that_cannot_be_read_end_the_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = RemoteSupervisor("tcp://127.0.0.1:9", str(tmp_path / "nowhere"), hello)
    connect, tries = supervisor._connect, itertools.count(1)
    monkeypatch.setattr(supervisor, "_connect", lambda *arguments: next(tries) and connect(*arguments))
    with pytest.raises(Unavailable, match="hcache keygen"):
        supervisor.start()
    assert next(tries) == 2, "it has tried once"
    supervisor.close()
