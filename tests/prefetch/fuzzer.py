"""A hostile client: frames of every wrong kind, as fast as they are taken, among right ones.

Usage: `python -m tests.prefetch.fuzzer DIRECTORY SEED FRAMES` in the repository; goes on until a line comes, too, and
prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from tests.prefetch.child import told_to_stop
from tests.prefetch.clients import PATIENCE_S, hello
from tests.prefetch.raw import Raw
from tests.storage.pages import key_of

SOCKETS = 4
TURN = 25  # frames
AHEAD = 8  # turns whose answers may still be on their way: fewer than ZeroMQ drops without a word
MARK = b"HC" + bytes((255 - m.VERSION, 0))  # ends a turn; a version that no other frame has: eight bits are flipped
RENEW_EVERY = 3000  # frames of a socket, after which it starts a new session
MOST_HOST_BYTES = 64 << 20  # a flipped hello may ask for as much as is free
KEYS = [key_of(page) for page in range(200)]
TYPES = [kind.__name__ for kind in (*m.FromClient.__args__, *m.FromServer.__args__)]


class Fuzzer(Raw):
    def __init__(self, directory: Path, chance: random.Random) -> None:
        super().__init__(directory)
        self.chance = chance
        self.refused: Counter[str] = Counter()
        self.granted: list[int] = []
        self.former: list[bytes] = [m.encode(m.Health(session=1, seq=1))]
        self.lost = True
        self.turns = self.turns_answered = 0
        kinds: dict[Callable[[], list[bytes]], float] = {
            self.noise: 10,
            self.prefixed_noise: 10,
            self.flipped: 30,
            self.truncated: 10,
            self.wrong_types: 15,
            self.other_version: 5,
            self.replayed: 8,
            self.other_session: 0.5,
            self.out_of_order: 0.5,
            self.several_frames: 4,
            self.not_granted: 0.5,
            self.giant: 0.05,
            self.oversized: 0.1,
            self.second_hello: 1,
            self.gives_back: 3,
            self.valid: 30,
        }
        self.kinds, self.weights = list(kinds), list(kinds.values())

    def next_frames(self, count: int) -> list[list[bytes]]:
        return [kind() for kind in self.chance.choices(self.kinds, self.weights, k=count)]

    def begin(self) -> None:
        """Start a session anew, whatever became of the last one."""
        if self.session:
            self.seq = 1 << 40
            self.say(m.Bye())
        self.session = self.seq = 0
        self.lost = False
        self.send(m.encode(hello(name="fuzz", grant=4)))
        while not self.session:
            self.listen()

    def end_turn(self, ahead: int = AHEAD) -> None:
        self.put([MARK])
        self.turns += 1
        self.drain()
        while self.turns_answered < self.turns - ahead:
            self.listen()

    def put(self, frames: list[bytes]) -> None:
        while True:
            try:
                self.socket.send_multipart(frames, zmq.NOBLOCK)
                return
            except zmq.Again:
                self.drain()
                self.socket.poll(10, zmq.POLLOUT | zmq.POLLIN)

    def listen(self) -> None:
        assert self.socket.poll(int(1000 * PATIENCE_S)), "a message is not answered"
        self.drain()

    def drain(self) -> None:
        while self.socket.poll(0):
            message = m.decode_from_server(self.socket.recv())
            if isinstance(message, m.Refused):
                self.refused[message.reason] += 1
                self.turns_answered += message.text.startswith(f"version {MARK[2]},")
                self.lost |= message.fatal and message.session == self.session
            elif isinstance(message, m.Welcome):
                self.session, self.seq, self.granted = message.session, 0, []
            elif isinstance(message, m.Granted) and message.session == self.session:
                self.granted += message.slots

    # ---- frames ----

    def message(self) -> m.Message:
        former = max(0, self.seq - self.chance.randrange(40))
        some = self.chance.sample(KEYS, self.chance.randrange(6))
        return self.chance.choice(
            [
                m.Lookup(keys=some),
                m.Prefetch(
                    keys=some,
                    priority=self.chance.randrange(-5, 5),
                    page_priority=self.chance.randrange(-5, 5),
                ),
                m.Cancel(prefetch=former),
                m.Release(prefetch=former),
                m.Want(slots=self.chance.randrange(10)),
                m.Credit(pages=self.chance.randrange(10)),
                m.Health(),
                m.Stats() if self.chance.random() < 0.05 else m.Health(),
                m.Flush() if self.chance.random() < 0.05 else m.Health(),
                m.DropHost() if self.chance.random() < 0.05 else m.Health(),
                m.Release(prefetch=1 << 60),
            ]
        )

    def numbered(self, message: m.Message, **changes: int) -> bytes:
        values = {"session": self.session, "seq": self.seq + 1} | changes
        return m.encode(msgspec.structs.replace(message, **values))

    def valid(self) -> list[bytes]:
        frame = self.numbered(self.message())
        self.seq += 1
        if self.chance.random() < 0.01:
            self.former = [*self.former[-20:], frame]
        return [frame]

    def noise(self) -> list[bytes]:
        return [self.chance.randbytes(self.chance.randrange(200))]

    def prefixed_noise(self) -> list[bytes]:
        return [m.PREFIX + self.chance.randbytes(self.chance.randrange(100))]

    def flipped(self) -> list[bytes]:
        message = self.message()
        frame = bytearray(self.numbered(message))
        body = (
            len(m.PREFIX) + 1 + sum(map(len, map(msgspec.msgpack.encode, (type(message).__name__, self.session, 1))))
        )
        first = 0 if body >= len(frame) or self.chance.random() < 0.05 else body  # another session's number ends it
        for _ in range(self.chance.randrange(1, 4)):
            frame[self.chance.randrange(first, len(frame))] ^= 1 << self.chance.randrange(8)
        return [bytes(frame)] if self.harmless(frame) else self.noise()

    def harmless(self, frame: bytes | bytearray) -> bool:
        """Whether it is no hello that takes what others need, and is not taken for a message in order."""
        try:
            message = m.decode_from_client(bytes(frame))
        except m.Malformed:
            return True
        if isinstance(message, m.Hello):
            return message.host_bytes <= MOST_HOST_BYTES
        in_order = message.session == self.session and message.seq == self.seq + 1
        self.seq += in_order
        if in_order and isinstance(message, m.Bye):
            self.lost = True
        return True

    def truncated(self) -> list[bytes]:
        frame = self.numbered(self.message())
        return [frame[: self.chance.randrange(len(frame))]]

    def wrong_types(self) -> list[bytes]:
        kind = self.chance.choice([*TYPES, "Nonsense", 7, None])
        values: list[Any] = [kind, self.session, self.seq + 1]
        values += [self.value(3) for _ in range(self.chance.randrange(8))]
        frame = m.PREFIX + msgspec.msgpack.encode(values)
        return [frame] if self.harmless(frame) else self.noise()

    def value(self, depth: int) -> Any:
        chance = self.chance
        plain = [
            None,
            True,
            -1,
            1 << 63,
            -1.5,
            float("nan"),
            "text",
            b"\xff" * 32,
            "\U0001f600" * 70,
            chance.random(),
        ]
        if depth and chance.random() < 0.4:
            inner = [self.value(depth - 1) for _ in range(chance.randrange(4))]
            return inner if chance.random() < 0.7 else dict(enumerate(inner))
        return chance.choice(plain)

    def other_version(self) -> list[bytes]:
        return [b"HC" + bytes((self.chance.randrange(m.VERSION + 1, MARK[2]), 0)) + b"\x91\xa6Health"]

    def replayed(self) -> list[bytes]:
        return [self.numbered(m.Health(), seq=max(0, self.seq - self.chance.randrange(10)))]

    def other_session(self) -> list[bytes]:
        return (
            [self.chance.choice(self.former)] if self.chance.random() < 0.5 else [self.numbered(m.Stats(), session=1)]
        )

    def out_of_order(self) -> list[bytes]:
        return [self.numbered(m.Health(), seq=self.seq + self.chance.randrange(2, 1000))]

    def several_frames(self) -> list[bytes]:
        self.seq += 1
        return [self.numbered(m.Health(), seq=self.seq), *(b"more" for _ in range(self.chance.randrange(1, 5)))]

    def not_granted(self) -> list[bytes]:
        slot = self.chance.choice([0, 1, 63, 64, 1 << 40])
        page = m.Page(self.chance.choice(KEYS), KEYS[0], slot)
        message = self.chance.choice([m.Commit(pages=[page] * 3), m.GiveBack(slots=[*self.granted, slot])])
        return [self.numbered(message)] if slot not in self.granted else self.noise()

    def gives_back(self) -> list[bytes]:
        some, self.granted = self.granted[:2], self.granted[2:]
        self.seq += 1
        return [self.numbered(m.GiveBack(slots=some), seq=self.seq)]

    def giant(self) -> list[bytes]:
        count = self.chance.choice([m.MAX_KEYS // 8, m.MAX_KEYS + 1])
        frame = self.numbered(m.Lookup(keys=[KEYS[-1]] * count))
        self.seq += count <= m.MAX_KEYS
        return [frame]

    def oversized(self) -> list[bytes]:
        return [m.PREFIX + bytes(m.MAX_MESSAGE_BYTES)]

    def second_hello(self) -> list[bytes]:
        return [m.encode(hello(name="again", fingerprint=self.chance.randbytes(16)))]


def main(directory: Path, seed: int, frames: int) -> None:
    chance = random.Random(seed)
    fuzzers = [Fuzzer(directory, chance) for _ in range(SOCKETS)]
    sent = 0
    for fuzzer in fuzzers:
        fuzzer.begin()
    while sent < frames or not told_to_stop():
        for fuzzer in fuzzers:
            for message in fuzzer.next_frames(TURN):
                fuzzer.put(message)
                sent += 1
            fuzzer.end_turn()
            if fuzzer.lost or chance.random() < TURN / RENEW_EVERY:
                fuzzer.begin()
    for fuzzer in fuzzers:
        fuzzer.begin()  # now no hello waits for memory, to be answered after what came later
        fuzzer.end_turn(ahead=0)
    refused = sum((fuzzer.refused for fuzzer in fuzzers), Counter[str]())
    print(json.dumps({"sent": sent, "refused": refused}), flush=True)
    os._exit(0)  # without goodbyes


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
