"""Clients that share no memory with the prefetcher: a real one, over TCP on loopback, with CURVE keys."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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
from sglang_hcache.prefetch.server import EXPIRE_S
from sglang_hcache.prefetch.supervisor import RemoteSupervisor
from sglang_hcache.storage.contract import as_priority
from sglang_hcache.storage.layout import ROOT, ChunkLayout, seal
from tests.prefetch.clients import until
from tests.prefetch.raw import Raw
from tests.storage.pages import FINGERPRINT, LAYOUT, fill, holds, key_of, keys_of

SLOTS = 64


class Prefetcher:
    """A prefetcher's process that listens on TCP; `keys`: made for the clients `a` and `b`."""

    def __init__(self, folder: Path, *, secure: bool = True, address: str = "", **limits: float) -> None:
        self.directory, self.keys = folder / "pages", folder / "keys"
        self.directory.mkdir()
        make_keys(self.keys, ("a", "b"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = address or f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self.local = endpoint_for([str(self.directory)]).address
        config = {"address": self.local, "directories": [str(self.directory)], "ends_when_unused": False}
        config |= {"listen": self.address, "keys": str(self.keys) if secure else "", **limits}
        command = [sys.executable, "-m", "sglang_hcache.prefetch", json.dumps(config)]
        self.log_path = folder / "log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)
        self.news = os.eventfd(0, os.EFD_NONBLOCK)
        self.secure = secure

    def remote(self, name: str = "a", layout: ChunkLayout = LAYOUT, slots: int = SLOTS) -> RemoteClient:
        keys = self.keys / name if self.secure else None
        return RemoteClient(self.address, hello(0, layout, slots), news=self.news, timeout_s=10, keys=keys)

    def log(self) -> str:
        return self.log_path.read_text()

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(15) == 0
        os.close(self.news)


def hello(pid: int = 0, layout: ChunkLayout = LAYOUT, slots: int = SLOTS) -> m.Hello:
    return m.Hello(
        pid=pid,
        name="test",
        fingerprint=FINGERPRINT,
        page_tokens=layout.page_tokens,
        layer_bytes=list(layout.layer_bytes),
        host_bytes=slots * layout.record_bytes,
        grant=16,
    )


@pytest.fixture
def prefetcher(tmp_path: Path) -> Iterator[Prefetcher]:
    running = Prefetcher(tmp_path)
    yield running
    running.close()


@pytest.fixture
def open_prefetcher(tmp_path: Path) -> Iterator[Prefetcher]:
    """Without keys, as loopback allows."""
    running = Prefetcher(tmp_path, secure=False)
    yield running
    running.close()


def save(client: RemoteClient | PrefetchClient, pages: range) -> None:
    for page in pages:
        slot = reserve(client)
        fill(client.memory[slot], page)
        client.commit(key_of(page), slot, key_of(page - 1) if page else ROOT)
    assert client.flush(30)


def reserve(client: RemoteClient | PrefetchClient) -> int:
    deadline = time.monotonic() + 10
    while (slot := client.reserve()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return slot


def fetch(client: RemoteClient | PrefetchClient, pages: range) -> int:
    """How many of the pages come; asserts that they are right."""
    client.prefetch("o", keys_of(pages))
    progress = client.wait("o", 10)
    assert progress.done
    for page, slot in zip(pages, progress.slots, strict=False):
        assert holds(client.memory[slot], page)
    client.release("o")
    return len(progress.slots)


def test_memory_of_pages_that_nobody_can_ask_for_again_is_given_back(prefetcher: Prefetcher) -> None:
    """What is on no file is one process's alone; a prefetcher that was started by hand keeps the rest."""
    for number in range(3):
        own = structs.replace(hello(os.getpid()), fingerprint=b"%016d" % number, on_file=False)
        PrefetchClient(prefetcher.local, own, news=prefetcher.news, timeout_s=10).close()
    PrefetchClient(prefetcher.local, hello(os.getpid()), news=prefetcher.news, timeout_s=10).close()
    with Raw(prefetcher.directory) as raw:

        def left() -> list[object]:
            raw.send(m.encode(m.Overview()))
            return [model["fingerprint"] for model in raw.hear(m.Overviewed).models]

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

    def receive(self, timeout_s: float = 10) -> tuple[m.FromServer, list[bytes]]:
        assert self.socket.poll(int(1000 * timeout_s)), "no answer"
        head, *payload = self.socket.recv_multipart()
        return m.decode_from_server(head), payload

    def pages(self, timeout_s: float) -> int:
        """How many come within a time."""
        count, deadline = 0, time.monotonic() + timeout_s
        while self.socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            count += len(self.receive()[1])
        return count


def test_started_by_hand_it_keeps_its_memory_for_the_next_client(prefetcher: Prefetcher) -> None:
    client = prefetcher.remote()
    save(client, range(20))
    pid = client.prefetcher_pid
    client.close()
    time.sleep(1)
    client = prefetcher.remote()
    assert client.prefetcher_pid == pid
    assert fetch(client, range(25)) == 20
    figures = client._files.connection.ask(m.Stats(), m.Figures, 5).figures
    assert (figures["hits_file"], figures["hits_host"]) == (0, 20)
    client.close()


def test_pages_are_shared_by_remote_and_local_clients(prefetcher: Prefetcher) -> None:
    a, b = prefetcher.remote("a"), prefetcher.remote("b")
    save(a, range(20))
    assert b.contains(keys_of([0, 19, 20])) == [True, True, False]
    assert fetch(b, range(25)) == 20
    local = PrefetchClient(prefetcher.local, hello(os.getpid()), news=prefetcher.news, timeout_s=10)
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


def test_only_those_with_a_key_get_in(prefetcher: Prefetcher, tmp_path: Path) -> None:
    prefetcher.remote("a").close()
    make_keys(tmp_path / "others", ("a",))
    strange = tmp_path / "strange"
    make_keys(strange, ("c",))
    (strange / "c" / "server.key").write_bytes((prefetcher.keys / "server.key").read_bytes())
    for keys in (None, tmp_path / "others" / "a", strange / "c"):
        with pytest.raises(Unavailable):
            RemoteClient(prefetcher.address, hello(), news=prefetcher.news, timeout_s=1, keys=keys)
    client = prefetcher.remote("b")
    stats = client.stats()
    assert int(str(stats["refused_unauthorised"])) >= 1
    assert int(str(stats["refused_no_handshake"])) >= 1
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
    assert prefetcher.process.wait(15) == 0
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
        timeout=30,
    )
    assert done.returncode == 2
    assert "give keys" in done.stderr
    assert done.stderr.count("\n") == 1


def test_who_gives_no_credit_gets_no_pages_and_holds_up_nobody(open_prefetcher: Prefetcher) -> None:
    a = open_prefetcher.remote()
    save(a, range(20))
    a.drop_host()
    raw = RawClient(open_prefetcher.address)
    raw.send(m.Prefetch(keys=keys_of(range(20)), priority=0, page_priority=0, deadline_s=0))
    assert raw.pages(0.5) == 0
    raw.send(m.Credit(pages=3))
    assert raw.pages(0.5) == 3
    assert fetch(a, range(20)) == 20
    raw.send(m.Credit(pages=1000))
    assert raw.pages(0.5) == 17
    a.close()


def test_a_silent_client_expires(open_prefetcher: Prefetcher) -> None:
    a = open_prefetcher.remote()
    save(a, range(20))
    raw = RawClient(open_prefetcher.address)
    raw.send(m.Prefetch(keys=keys_of(range(20)), priority=0, page_priority=0, deadline_s=0))
    raw.send(m.Credit(pages=2))
    assert raw.pages(0.5) == 2
    assert a.stats()["prefetcher_clients"] == 2
    time.sleep(EXPIRE_S + 1)
    assert a.stats()["prefetcher_clients"] == 1
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


def test_pages_for_other_hosts_are_read_in_turn_with_those_for_this_one(tmp_path: Path) -> None:
    prefetcher = Prefetcher(tmp_path, secure=False, read_bytes_per_s=20 * LAYOUT.record_bytes)
    local = PrefetchClient(prefetcher.local, hello(os.getpid()), news=prefetcher.news, timeout_s=10)
    save(local, range(30))
    local.drop_host()
    raw = RawClient(prefetcher.address)
    raw.send(m.Credit(pages=SLOTS))

    def ask(pages: range) -> None:
        for page in pages:
            raw.send(m.Prefetch(keys=[key_of(page)], priority=0, page_priority=0, deadline_s=0))

    ask(range(3))
    time.sleep(0.05)
    local.prefetch("local", [key_of(3)], priority=as_priority(arrived_at=time.time()), page_priority=1000)
    while not local.progress("local").known:
        time.sleep(0.001)
    ask(range(4, 30))
    assert len(local.wait("local", 10).slots) == 1
    assert raw.pages(0.0) <= 10
    assert raw.pages(5.0) >= 19
    local.close()
    prefetcher.close()


class HungDrive(threading.Thread):
    """Serves one client, and never says what becomes of some pages: they lie on a drive that hangs."""

    def __init__(self, hung: range, takes_s: float = 0.0) -> None:
        """takes_s: any other page."""
        super().__init__()
        self.takes_s = takes_s
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
                time.sleep(self.takes_s)
                ready = m.Ready(answers=message.seq, first=0, slots=[0], done=True)
                return ready, self.records[message.keys[0]]
        if isinstance(message, m.Release):
            self.released.append(message.prefetch)
        return (m.Alive(answers=message.seq),) if isinstance(message, m.Health | m.Bye) else None


def test_a_drive_that_hangs_there_blocks_no_reads_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "AGAIN_S", 3.0)
    there, news = HungDrive(range(8)), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(there.address, hello(), news=news, timeout_s=5)
    client.prefetch("hangs", keys_of(range(8)))
    assert until(lambda: len(there.asked) == 8)
    began = time.monotonic()
    client.cut("hangs")
    client.prefetch("good", keys_of([9]))
    progress = client.wait("good", 5)
    assert time.monotonic() - began < 2
    assert holds(client.memory[progress.slots[0]], 9)
    assert until(lambda: len(there.released) >= 8), "its prefetcher waits for them no more, either"
    assert until(lambda: client._store.stats()["pages_reading"] == 0)
    client.prefetch("hangs", keys_of([3, 10]))
    assert client.wait("hangs", 0.5) == ((), True, True), "no other request waits for them"
    assert client.contains(keys_of([3, 10])) == [False, True]
    assert until(lambda: client.contains(keys_of([3])) == [True])
    client.close()
    there.join(5)
    os.close(news)


def test_on_a_slow_link_pages_come_though_nobody_waits_for_them_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LATE_S", 0.1)
    there, news = HungDrive(range(0), takes_s=0.5), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(there.address, hello(), news=news, timeout_s=5)
    client.prefetch("first", keys_of([0]))
    assert len(client.wait("first", 10).slots) == 1
    client.prefetch("next", keys_of([1]))
    assert until(lambda: len(there.asked) == 2)
    client.cut("next")
    assert until(lambda: client._store.stats()["pages_host"] == 2)
    assert client.contains(keys_of([1])) == [True]
    client.close()
    there.join(5)
    os.close(news)


def test_a_page_that_is_waited_for_may_take_its_time() -> None:
    there, news = HungDrive(range(1)), os.eventfd(0, os.EFD_NONBLOCK)
    client = RemoteClient(there.address, hello(), news=news, timeout_s=5)
    client.prefetch("first", keys_of([0]))
    assert until(lambda: bool(there.asked))
    client.prefetch("second", keys_of([0]))
    client.cut("first")
    time.sleep(1.5)
    assert not there.released
    assert not client.progress("second").done
    client.close()
    there.join(5)
    os.close(news)


def test_large_records(prefetcher: Prefetcher, capsys: pytest.CaptureFixture[str]) -> None:
    layout, pages = ChunkLayout(64, (1 << 20,) * 16), 8
    a, b = (prefetcher.remote(name, layout=layout, slots=16) for name in "ab")
    data = np.random.default_rng(1).integers(0, 256, layout.record_bytes - layout.header_bytes, np.uint8)
    start = time.monotonic()
    for page in range(pages):
        slot = reserve(a)
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


def test_a_server_starts_before_its_prefetcher_and_finds_it_later(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    early = RemoteSupervisor(address, None, hello)
    assert isinstance(early.start(0.5), NoStore)
    running = Prefetcher(tmp_path, secure=False, address=address)
    deadline = time.monotonic() + 20
    while (found := early.taken()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    save(found, range(3))
    found.close()
    early.close()
    running.close()


def test_keys_that_cannot_be_read_end_the_start_at_once(tmp_path: Path) -> None:
    supervisor = RemoteSupervisor("tcp://127.0.0.1:9", str(tmp_path / "nowhere"), hello)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="hcache keygen"):
        supervisor.start()
    assert time.monotonic() - began < 5
    supervisor.close()
