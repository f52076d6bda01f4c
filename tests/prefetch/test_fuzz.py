"""Hostile frames at the prefetcher's socket, beside a client that must not notice.

Continuous integration sends a slice; `HCACHE_FUZZ_FRAMES=1000000` is the full count.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import endpoint_for
from tests.prefetch.clients import assert_nothing_held, fetched, figures, hello, save
from tests.prefetch.conftest import Join
from tests.storage.pages import OTHER_FINGERPRINT, key_of

FRAMES = int(os.environ.get("HCACHE_FUZZ_FRAMES", "20000"))
ROUND = 2000
WARM_UP = 4 * ROUND
GROWTH_BYTES = 8 << 20

Frames = list[bytes]


class Fuzzer:
    """Makes frames; those of the session `number` are understood up to their meaning."""

    def __init__(self, chance: random.Random, number: int) -> None:
        self.chance = chance
        self.number = number
        self.ways: list[Callable[[], Frames]] = [
            self.noise,
            self.bent,
            self.truncated,
            self.other_type,
            self.other_version,
            self.no_session,
            self.replayed,
            self.in_parts,
            self.early_hello,
        ]

    def next(self) -> Frames:
        return self.chance.choice(self.ways)()

    def message(self, seq: int = 1) -> m.Message:
        """Well formed; what it asks for is nonsense."""
        chance, keys = self.chance, [self.chance.randbytes(32) for _ in range(self.chance.randrange(4))]
        named = {"session": self.number, "seq": seq}
        ticket = chance.randrange(1 << 40)
        return chance.choice(
            [
                m.Lookup(keys=keys, **named),
                m.Prefetch(owner="x", ticket=ticket, keys=keys, priority=-1, deadline_s=0, **named),
                m.Commit(pages=[m.Page(key_of(1), key_of(0), chance.randrange(1 << 40))], **named),
                m.Abandon(slots=[chance.randrange(100)], **named),
                m.Release(owner=str(chance.random()), **named),
                m.Credit(pages=chance.randrange(1 << 40), **named),
            ]
        )

    def noise(self) -> Frames:
        return [self.chance.randbytes(self.chance.randrange(200))]

    def bent(self) -> Frames:
        frame = bytearray(m.encode(self.message()))
        for _ in range(self.chance.randint(1, 3)):
            frame[self.chance.randrange(len(frame))] ^= 1 << self.chance.randrange(8)
        return [bytes(frame)]

    def truncated(self) -> Frames:
        frame = m.encode(self.message())
        return [frame[: self.chance.randrange(len(frame))]]

    def other_type(self) -> Frames:
        strange = [None, 7, "text", {"a": 1}, [], ["Lookup"], ["Lookup", self.number, 1, "keys"], ["Nothing", 1, 1]]
        return [m.PREFIX + msgspec.msgpack.encode(self.chance.choice(strange))]

    def other_version(self) -> Frames:
        return [b"HC" + bytes((self.chance.randrange(2, 256), 0)) + m.encode(self.message())[4:]]

    def no_session(self) -> Frames:
        return [m.encode(msgspec.structs.replace(self.message(), session=self.chance.randrange(1 << 40)))]

    def replayed(self) -> Frames:
        return [m.encode(self.message(seq=0))]

    def in_parts(self) -> Frames:
        return [m.encode(self.message()) for _ in range(self.chance.randrange(2, 5))]

    def early_hello(self) -> Frames:
        return [m.encode(hello(pid=self.chance.randrange(1 << 30, 1 << 31), fingerprint=OTHER_FINGERPRINT))]


def dealer(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 500)
    socket.connect(address)
    return socket


def drain(socket: zmq.Socket[bytes]) -> int:
    count = 0
    while socket.poll(0):
        socket.recv_multipart()
        count += 1
    return count


def send_all(socket: zmq.Socket[bytes], fuzzer: Fuzzer, frames: int) -> None:
    for _ in range(frames):
        message = fuzzer.next()
        while True:
            drain(socket)
            try:
                socket.send_multipart(message, zmq.NOBLOCK)
                break
            except zmq.Again:
                time.sleep(0.001)


def test_hostile_frames_are_counted_and_change_nothing(directory: Path, join: Join) -> None:
    client = join()
    save(client, range(20))
    assert client.flush(10)
    before = figures(client)
    process = psutil.Process(client.prefetcher_pid)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = endpoint_for([str(directory)]).address
    stranger, insider = dealer(context, address), dealer(context, address)
    insider.send(m.encode(hello(fingerprint=OTHER_FINGERPRINT, name="insider")))
    welcome = m.decode_from_server(insider.recv())
    assert isinstance(welcome, m.Welcome)
    fuzzers = Fuzzer(random.Random(1), 1 << 30), Fuzzer(random.Random(2), welcome.session)
    sent, warm, slowest = 0, 0, 0.0
    while sent < FRAMES:
        for socket, fuzzer in zip((stranger, insider), fuzzers, strict=True):
            send_all(socket, fuzzer, ROUND // 2)
        sent += ROUND
        began = time.monotonic()
        assert fetched(client, range(20)) == 20
        slowest = max(slowest, time.monotonic() - began)
        assert client.alive
        if sent == WARM_UP:
            warm = process.memory_info().rss
    after = figures(client)
    assert client.prefetcher_pid == process.pid
    assert process.is_running()
    assert slowest < 2.0, "it waits behind a flood of one round, and no longer"
    assert process.memory_info().rss - warm < GROWTH_BYTES or not warm
    assert after["messages_refused"] - before["messages_refused"] > 0.9 * sent
    assert after["pages_file"] == before["pages_file"], "nothing of it was taken for a page"
    print(f"{sent} frames, {after['messages_refused']} refused, slowest answer {1000 * slowest:.0f} ms")
    insider.send(m.encode(m.Bye(session=welcome.session, seq=1 << 50)))
    assert insider.poll(5000)
    while not isinstance(m.decode_from_server(insider.recv()), m.Alive):
        assert insider.poll(5000), "its goodbye is not answered"
    for socket in (stranger, insider):
        socket.close()
    context.term()
    assert_nothing_held(client)


def test_each_refusal_has_its_reason(directory: Path, join: Join) -> None:
    join()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = dealer(context, endpoint_for([str(directory)]).address)

    def answer(*frames: bytes) -> m.FromServer:
        socket.send_multipart(frames)
        while isinstance(reply := m.decode_from_server(socket.recv()), m.Granted | m.Ready):
            pass
        return reply

    def refusal(*frames: bytes) -> str:
        reply = answer(*frames)
        assert isinstance(reply, m.Refused), reply
        return reply.reason

    assert refusal(b"noise") == "malformed"
    assert refusal(b"HC\x09\x00") == "unknown_version"
    assert refusal(m.PREFIX + bytes(m.MAX_MESSAGE_BYTES)) == "oversized"
    assert refusal(m.encode(m.Health(session=1 << 30, seq=1))) == "unknown_session"
    assert refusal(m.encode(hello(pid=1 << 30))) == "bad_hello"
    welcome = answer(m.encode(hello()))
    assert isinstance(welcome, m.Welcome)
    assert isinstance(answer(m.encode(m.Health(session=welcome.session, seq=1))), m.Alive)
    assert refusal(m.encode(m.Health(session=welcome.session, seq=1))) == "replayed"
    assert refusal(m.encode(hello())) == "out_of_order"
    commit = m.Commit(pages=[m.Page(key_of(1), key_of(0), 1 << 40)], session=welcome.session, seq=2)
    assert refusal(m.encode(commit)) == "not_granted"
    assert refusal(m.encode(m.Health(session=welcome.session, seq=3))) == "session_over"
    assert isinstance(answer(m.encode(m.Bye(session=welcome.session, seq=4))), m.Alive)
    socket.close()
    context.term()
