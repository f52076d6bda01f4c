"""A client without manners: it sends what it is given, and shows what comes back."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Self, TypeVar

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import endpoint_for
from tests.prefetch.clients import PATIENCE_S, hello

QUESTIONS = 100

T = TypeVar("T", bound=m.Message)


def is_unasked(message: m.FromServer) -> bool:
    return isinstance(message, m.Alive) and not message.answers


class Raw:
    def __init__(self, directory: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 200)
        self.socket.connect(endpoint_for([str(directory)]).address)
        self.session = self.seq = 0
        self._unheard: list[m.FromServer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        bye = self.say(m.Bye())
        while self.session and not failed and self.hear(m.Alive).answers != bye:
            pass  # a socket that is closed with something left to read loses what it sent
        self.close()

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def open(self, **changes: object) -> m.Welcome:
        self.send(m.encode(hello(**changes)))
        welcome = self.hear(m.Welcome)
        self.session = welcome.session
        return welcome

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def say(self, message: m.Message) -> int:
        """Send it as the next of the session."""
        self.seq += 1
        self.send(m.encode(msgspec.structs.replace(message, session=self.session, seq=self.seq)))
        return self.seq

    def hear(self, kind: type[T], timeout_s: float = PATIENCE_S, *, unasked: bool = False) -> T:
        """The next message of a kind; others can be heard later. unasked: a sign of life that was not asked for."""
        for message in self._unheard:
            if isinstance(message, kind) and is_unasked(message) is unasked:
                self._unheard.remove(message)
                return message
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and self.socket.poll(int(1000 * left)):
            message = m.decode_from_server(self.socket.recv())
            if isinstance(message, kind) and is_unasked(message) is unasked:
                return message
            self._unheard.append(message)
        raise TimeoutError(f"no {kind.__name__} in {timeout_s} s (process {os.getpid()})")


def refused_while_one_waits(raw: Raw) -> float:
    """How many messages of others are refused while a question of an open session waits: the median."""
    counts = []
    for _ in range(QUESTIONS):
        raw.say(m.Stats())
        figures = raw.hear(m.Figures).figures
        counts.append(int(str(figures["messages_refused"])))
    return median(after - before for before, after in pairwise(counts))
