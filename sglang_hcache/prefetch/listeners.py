"""Where clients connect: one socket for those on this host, one for those on others, each with its own limits."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.utils.monitor
from zmq.utils import z85

from sglang_hcache.prefetch.keys import is_authorized, server_keys
from sglang_hcache.prefetch.sockets import MAX_FRAME_BYTES, set_limits

LINGER_MS = 500  # for what is still queued when the prefetcher ends
AT_ONCE = 256  # messages taken from a socket before progress is announced again
REMOTE_AT_ONCE = 8
HANDSHAKE_MS = 5000
ZAP = "inproc://zeromq.zap.01"  # where libzmq asks who may connect; one a context
ZAP_DOMAIN = b"hcache"
AGAIN_S = 60.0  # between two log lines on what is refused for one reason: a liveness probe comes every few seconds

logger = logging.getLogger(__name__)

Frames = Sequence[bytes | zmq.Frame]


def check_listen(address: str, keys: str) -> None:
    """Raises ValueError unless a prefetcher may listen there, with or without keys."""
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not host or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{address!r} is not an address to listen at: give tcp://HOST:PORT")
    if not keys and not is_loopback(host):
        raise ValueError(f"{address} can be reached from other hosts: give keys (`hcache keygen` makes them)")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Listener:
    """A ROUTER socket. `remote`: its clients share no memory with us. Raises ZMQError, OSError, ValueError."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, *, remote: bool, keys: str = ""
    ) -> None:
        self.remote = remote
        self.at_once = REMOTE_AT_ONCE if remote else AT_ONCE
        if remote:
            check_listen(address, keys)
        pair = server_keys(Path(keys)) if remote and keys else None
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.LINGER, LINGER_MS)
        largest = MAX_FRAME_BYTES if remote else 0
        set_limits(self.socket, remote=remote, from_client=zmq.RCVHWM, largest_frame=largest)
        if remote:
            self.socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        if pair is not None:
            self.socket.curve_publickey, self.socket.curve_secretkey = pair
            self.socket.curve_server = True
            self.socket.zap_domain = ZAP_DOMAIN
            self.socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            if not remote:
                self.socket.set(zmq.USE_FD, _listening_socket(address.removeprefix("ipc://")))
            self.socket.bind(address)
        except (OSError, zmq.ZMQError):
            self.socket.close(0)
            raise

    def receive(self) -> tuple[bytes, list[memoryview]] | None:
        """The sender's identity, and the frames of its message; None where none waits."""
        try:
            if self.remote:
                identity, *rest = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
                return identity.bytes, [frame.buffer for frame in rest]
            sender, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            return sender, [memoryview(frame) for frame in frames]
        except zmq.Again:
            return None

    def close(self) -> None:
        self.socket.close()


def _listening_socket(path: str) -> int:
    """A socket that listens at `path`. One of ZeroMQ's own would, closed, remove whatever is there by then."""
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen()
        return listener.detach()


class Put(Enum):
    """What became of a message."""

    SENT = "on its way"
    FULL = "the client's queue is full: it is slow, and nobody waits for it"
    GONE = "the client has gone; the end of its process, or its silence, ends its session"


class Peer(NamedTuple):
    """A client's end of a connection."""

    listener: Listener
    identity: bytes

    def put(self, frames: Frames) -> Put:
        """Send without waiting."""
        try:
            self.listener.socket.send_multipart([self.identity, *frames], zmq.NOBLOCK, copy=not self.listener.remote)
        except zmq.Again:
            return Put.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return Put.GONE
        return Put.SENT


class Authenticator:
    """Tells libzmq which clients may connect (ZAP 1.0), and counts those who may not.

    Made before its listener: libzmq looks for it when that is opened.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: str, refused: Counter[str]) -> None:
        self._keys = Path(keys)
        self._refused = refused
        self._logged_at: dict[str, float] = {}
        self.questions = context.socket(zmq.REP)
        self.questions.set(zmq.LINGER, 0)
        self.questions.bind(ZAP)
        self.failures: zmq.Socket[bytes] | None = None

    def watch(self, listener: Listener) -> zmq.Socket[bytes]:
        """The socket that reports failed handshakes."""
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self.failures = listener.socket.get_monitor_socket(events)
        return self.failures

    def answer(self) -> None:
        """The request that waits."""
        frames = self.questions.recv_multipart()
        version, request, domain, address = [*frames, b"", b"", b"", b""][:4]
        public = z85.encode(frames[6]) if frames[5:6] == [b"CURVE"] and len(frames) == 7 else b""
        welcome = bool(public) and domain == ZAP_DOMAIN and is_authorized(self._keys, public)
        if not welcome:
            name = address.decode(errors="replace")
            self._refuse("unauthorised", f"{name} was refused: its key is not in clients/")
        status = (b"200", b"OK") if welcome else (b"400", b"unauthorised")
        self.questions.send_multipart([version, request, *status, public, b""])

    def note_failure(self) -> None:
        """A client had no key, or expected another server's."""
        assert self.failures is not None
        self.failures.recv_multipart()
        self._refuse("no_handshake", "a connection was dropped: it had no key, or expected another server's")

    def _refuse(self, reason: str, what: str) -> None:
        self._refused[reason] += 1
        now = time.monotonic()
        if now - self._logged_at.get(reason, -AGAIN_S) >= AGAIN_S:
            self._logged_at[reason] = now
            logger.warning("hcache: %s (%d so far).", what, self._refused[reason])

    def close(self, listener: Listener) -> None:
        listener.socket.disable_monitor()
        if self.failures is not None:
            self.failures.close(0)
        self.questions.close(0)


class Listeners:
    """All of a prefetcher's, and the authenticator where one is needed.

    Raises as Listener does, with everything closed.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        address: str,
        listen: str,
        keys: str,
        refused: Counter[str],
    ) -> None:
        self._by_socket: dict[object, Listener] = {}
        self._authenticator: Authenticator | None = None
        try:
            self._add(Listener(context, address, remote=False))
            if listen:
                self._authenticator = Authenticator(context, keys, refused) if keys else None
                remote = Listener(context, listen, remote=True, keys=keys)
                self._add(remote)
                if self._authenticator is not None:
                    poller.register(self._authenticator.questions, zmq.POLLIN)
                    poller.register(self._authenticator.watch(remote), zmq.POLLIN)
        except (OSError, ValueError, zmq.ZMQError):
            context.destroy(linger=0)
            raise
        for listener in self._by_socket.values():
            poller.register(listener.socket, zmq.POLLIN)

    def attend(self, ready: object) -> Listener | None:
        """The listener that has a message; other sockets of the poller's are served here."""
        if listener := self._by_socket.get(ready):
            return listener
        assert self._authenticator is not None
        if ready is self._authenticator.questions:
            self._authenticator.answer()
        else:
            self._authenticator.note_failure()
        return None

    def close(self) -> None:
        for listener in self._by_socket.values():
            if listener.remote and self._authenticator is not None:
                self._authenticator.close(listener)
            listener.close()

    def _add(self, listener: Listener) -> None:
        self._by_socket[listener.socket] = listener
