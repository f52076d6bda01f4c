"""A client without manners: it sends what it is given, and shows what comes back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Self, TypeVar

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.endpoint import endpoint_for
from tests.prefetch.clients import hello

T = TypeVar("T", bound=m.Message)


class Raw:
    def __init__(self, directory: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 200)
        self.socket.connect(endpoint_for([str(directory)]).address)
        self.session = self.seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.say(m.Bye())
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

    def hear(self, kind: type[T], timeout_s: float = 5.0) -> T:
        """The next message of a kind; others are dropped."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and self.socket.poll(int(1000 * left)):
            message = m.decode_from_server(self.socket.recv())
            if isinstance(message, kind):
                return message
        raise TimeoutError(f"no {kind.__name__} in {timeout_s} s (process {os.getpid()})")
