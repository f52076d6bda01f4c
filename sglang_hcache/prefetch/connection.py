"""A client's side of a session: one thread that owns the socket, for callers on any other."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.keys import KeyFileError, client_keys
from sglang_hcache.prefetch.sockets import set_limits

LOOK_S = 0.1  # between two looks whether a prefetcher that has not answered yet is still there
FAREWELL_S = 1.0  # for the answer to a goodbye
LOG_EVERY_S = 10.0  # between two log lines that it is not ready
LINGER_MS = 200  # for a goodbye
MARGIN_BYTES = 1 << 20  # a record's message may be larger than the record
BEAT_S = 1.0  # how often the prefetcher is asked whether it is there
HUNG_S = 10.0  # without an answer for this long, it counts as hung; the end of its process is seen at once

logger = logging.getLogger(__name__)

Payload = Sequence[zmq.Frame]
Answer = TypeVar("Answer", bound=m.Message)


class Unavailable(Exception):
    """No session with a prefetcher can be had, or the session is over."""


class Hopeless(Unavailable):
    """No session can be had, and trying again does not help."""


class Ending(Enum):
    """What ended a session."""

    DIED = "the prefetcher's process has ended"
    SILENT = "it did not answer, and hangs"
    REFUSED = "it refused to go on, or could not be understood"
    GIVEN_UP = "we have no more use for it"
    FAILED = "a defect of ours"


class Connection:
    """An open session, with a prefetcher that has taken `hello`; its thread runs from `start` on.

    `keys`: the folder with this client's keys; None for a prefetcher on this host, or on loopback without keys. To
    another host (`hello.pid` is 0) messages carry the records.

    The constructor raises Unavailable if the prefetcher refuses `hello`, if it sends nothing for `timeout_s`, not
    even that it is not ready yet, or if `go_on` returns False; Hopeless if the keys cannot be used. Each time the
    prefetcher says that it is not ready yet, `waiting` is called with the number of pages that it must write first;
    it may raise Unavailable.
    """

    def __init__(
        self,
        address: str,
        hello: m.Hello,
        *,
        timeout_s: float,
        keys: Path | None = None,
        go_on: Callable[[], bool] = lambda: True,
        waiting: Callable[[int], None] = lambda pages: None,
    ) -> None:
        self.hello = hello
        self._remote = hello.pid == 0
        largest_frame = hello.layout.record_bytes + MARGIN_BYTES if self._remote else 0
        self._receive: Callable[[m.FromServer, Sequence[memoryview]], None] = lambda message, payload: None
        self._ended: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._asked: set[int] = set()
        self._answers: dict[int, m.FromServer] = {}
        self._outbox: deque[tuple[m.Message, Payload]] = deque()
        self._enqueued = 0
        self._silent_s: float | None = None  # since the oldest question without an answer; None where there is none
        self._closing = self._farewell = False
        self.alive = True
        self.why_ended = ""
        self.ending: Ending | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, LINGER_MS)
        set_limits(self._socket, remote=self._remote, from_client=zmq.SNDHWM, largest_frame=largest_frame)
        try:
            self._connect(address, keys)
            self.welcome = self._introduce(hello, timeout_s, go_on, waiting)
            self._pidfd = -1 if self._remote else os.pidfd_open(self.welcome.pid)
        except (Unavailable, OSError, zmq.ZMQError) as error:
            with contextlib.suppress(zmq.ZMQError):  # a hello that is read late would be welcomed
                self._socket.send(m.encode(m.Bye()), zmq.NOBLOCK)
            self._socket.close()
            self._context.term()
            raise (Hopeless if isinstance(error, KeyFileError) else Unavailable)(str(error)) from None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="hcache-prefetch", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether it ended while it was still needed."""
        return not self.alive and self.ending is not Ending.GIVEN_UP

    @property
    def hangs(self) -> bool:
        """Whether it ended because the prefetcher runs but does not answer."""
        return self.ending is Ending.SILENT

    def start(self, receive: Callable[[m.FromServer, Sequence[memoryview]], None], ended: Callable[[], None]) -> None:
        """Begin to receive; what has arrived since the welcome comes first.

        `receive` is called on the session's thread with what is no answer to `ask`; `ended` once, at its end.
        """
        self._receive, self._ended = receive, ended
        self._thread.start()

    def send(self, message: m.Message, payload: Payload = ()) -> int:
        """Queue a message. Returns its `seq`, or 0 if it is dropped, as the session is over or being closed."""
        with self._lock:
            return self._enqueue(message, payload)

    def ask(self, message: m.Message, kind: type[Answer], timeout_s: float) -> Answer:
        """Send, and wait for the answer. Raises Unavailable where there is none in time."""
        with self._lock:
            seq = self._enqueue(message)
            self._asked.add(seq)
            self._changed.wait_for(lambda: seq in self._answers or not self.alive, timeout_s)
            self._asked.discard(seq)
            answer = self._answers.pop(seq, None)
        if not isinstance(answer, kind):
            raise Unavailable(self.why_ended or f"no answer in {timeout_s:g} s")
        return answer

    def give_up(self, why: str) -> None:
        """The session is over for us; what it held stays as it is until `close`."""
        self._end(Ending.GIVEN_UP, why)

    def kill(self) -> None:
        """Kill the prefetcher that this session was with, on this host; does nothing after `close`."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._closing:  # its number may name another process by now
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Say goodbye, started or not. What the session held must not be used any more."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
            os.eventfd_write(self._wake, 1)
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join()
        if not self._remote:
            os.close(self._pidfd)
        os.close(self._wake)

    def _connect(self, address: str, keys: Path | None) -> None:
        if keys is not None:
            (self._socket.curve_publickey, self._socket.curve_secretkey), server = client_keys(keys)
            self._socket.curve_serverkey = server
        self._socket.connect(address)

    def _introduce(
        self, hello: m.Hello, timeout_s: float, go_on: Callable[[], bool], waiting: Callable[[int], None]
    ) -> m.Welcome:
        self._socket.send(m.encode(hello))
        said_at = 0.0
        while isinstance(answer := self._answer_to_hello(timeout_s, go_on), m.Waiting):
            if time.monotonic() > said_at + LOG_EVERY_S:
                said_at = time.monotonic()
                first = f"{answer.pages} pages must be written first" if answer.pages else "it opens its directories"
                logger.info("hcache: the prefetcher is not ready yet: %s.", first)
            waiting(answer.pages)
        if not isinstance(answer, m.Welcome):
            raise Unavailable(answer.text if isinstance(answer, m.Refused) else f"unexpected answer {answer!r}")
        return answer

    def _answer_to_hello(self, timeout_s: float, go_on: Callable[[], bool]) -> m.FromServer:
        deadline = time.monotonic() + timeout_s
        while not self._socket.poll(int(1000 * LOOK_S)):
            if not go_on():  # it was about to end, and has not read what we sent
                raise Unavailable("the prefetcher has ended")
            if time.monotonic() > deadline:
                raise Unavailable(f"the prefetcher did not answer in {timeout_s:g} s")
        try:
            return m.decode_from_server(self._socket.recv())
        except m.Malformed as error:
            advice = "update both sides, end it and all servers that use it, or use other directories"
            raise Unavailable(f"the prefetcher speaks another protocol ({error}): {advice}") from None

    def _enqueue(self, message: m.Message, payload: Payload = ()) -> int:
        if self._closing or not self.alive:
            return 0
        os.eventfd_write(self._wake, 1)
        return self._append(message, payload)

    def _append(self, message: m.Message, payload: Payload = ()) -> int:
        self._enqueued += 1
        numbered = msgspec.structs.replace(message, session=self.welcome.session, seq=self._enqueued)
        self._outbox.append((numbered, payload))
        return self._enqueued

    def _run(self) -> None:
        try:
            try:
                self._talk()
            except Exception:
                logger.exception("hcache: a session with the prefetcher failed.")
                self._end(Ending.FAILED, "a defect: see the log")
            self._say_goodbye()
        finally:
            self._end(Ending.GIVEN_UP, "it was closed")
            self._socket.close()
            self._context.term()

    def _talk(self) -> None:
        """Send, receive and watch the prefetcher until the session is over or is to be closed."""
        poller = zmq.Poller()
        for source in (self._socket, self._wake, *([] if self._remote else [self._pidfd])):
            poller.register(source, zmq.POLLIN)
        beat_at, looked_at = 0.0, time.monotonic()
        while self.alive and not self._closing:
            ready = dict(poller.poll(int(1000 * BEAT_S)))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if ready.get(self._socket, 0) & zmq.POLLIN:
                self._drain_socket()
            if self._pidfd in ready:
                self._end(Ending.DIED, "its process has ended")
            now = time.monotonic()
            if self._silent_s is not None:
                self._silent_s += min(now - looked_at, BEAT_S)  # more is a pause of our own process
            looked_at = now
            if (self._silent_s or 0.0) > HUNG_S:
                self._end(Ending.SILENT, f"it has not answered for {HUNG_S:g} s")
            if now >= beat_at:
                beat_at = now + BEAT_S
                self.send(m.Health())
                self._silent_s = self._silent_s or 0.0
            full = not self._send_queued()
            poller.modify(self._socket, zmq.POLLIN | (zmq.POLLOUT if full else 0))

    def _say_goodbye(self) -> None:
        """Once `close` is called, send a Bye and await its answer: a socket closed with unread data would lose it."""
        with self._lock:
            self._changed.wait_for(lambda: self._closing)
            self._append(m.Bye())
        unheard = self.ending in (Ending.DIED, Ending.SILENT)
        deadline = time.monotonic() + (0.0 if unheard else FAREWELL_S)
        self._send_queued()
        while not self._farewell and (left := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(1000 * min(left, LOOK_S))):
                self._drain_socket()
            self._send_queued()

    def _drain_socket(self) -> None:
        while True:
            try:
                frame, *payload = self._next_frames()
            except zmq.Again:
                return
            self._silent_s = None
            try:
                message = m.decode_from_server(frame)
            except m.Malformed as error:
                self._end(Ending.REFUSED, f"it sent what cannot be read: {error}")
                return
            if isinstance(message, m.Refused):
                logger.warning("hcache: the prefetcher refused a message: %s (%s)", message.text, message.reason)
                if message.fatal:
                    self._end(Ending.REFUSED, message.text)
            elif isinstance(message, m.Found | m.Flushed | m.Figures):
                with self._lock:
                    if message.answers in self._asked:
                        self._answers[message.answers] = message
                        self._changed.notify_all()
            elif isinstance(message, m.Alive):
                self._farewell = self._closing and message.answers == self._enqueued
            elif self.alive:
                self._receive(message, payload)

    def _next_frames(self) -> list[memoryview]:
        if self._remote:
            return [frame.buffer for frame in self._socket.recv_multipart(zmq.NOBLOCK, copy=False)]
        return [memoryview(frame) for frame in self._socket.recv_multipart(zmq.NOBLOCK)]

    def _send_queued(self) -> bool:
        """False where ZeroMQ's queue is full."""
        while True:
            with self._lock:  # the end of the session, from any thread, empties the queue
                if not self._outbox:
                    return True
                message, payload = self._outbox[0]
                try:
                    self._socket.send_multipart([m.encode(message), *payload], zmq.NOBLOCK, copy=not payload)
                except zmq.Again:
                    return False
                self._outbox.popleft()

    def _end(self, ending: Ending, why: str) -> None:
        with self._lock:
            if not self.alive:
                return
            self.alive = False
            self.ending, self.why_ended = ending, why
            self._outbox.clear()
            self._changed.notify_all()
        self._ended()
