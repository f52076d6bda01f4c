"""The prefetcher's loop: one thread that serves all clients and never waits for a disk or for one of them."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.session import Asked, Session, split_owner
from sglang_hcache.prefetch.spaces import Space, Spaces

# ZeroMQ's limits, chosen so that no client can fill memory or hold up another. A local client has at most a few
# messages a request under way; beyond HIGH_WATER they wait in the client, in its own memory.
HIGH_WATER = 1000  # messages queued by ZeroMQ for or from one client
OUTBOX = 10_000  # messages kept for a client whose queue is full, before it is given up
LINGER_MS = 500  # for what is still queued when the prefetcher ends
TICK_MS = 200  # grants that memory could not give at once are tried again so often
AT_ONCE = 256  # messages taken from the socket before progress is announced again
UNUSED_S = 30.0  # a prefetcher that nobody has spoken to ends after this
FLUSH_S = 60.0
MAX_GRANT = 0.25  # of an arena's slots, for one session's new pages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """What a prefetcher is started with."""

    address: str  # ZeroMQ's, ipc:// or tcp://
    directories: tuple[str, ...]
    quota_bytes: int | None = None  # of each directory
    ends_when_unused: bool = True  # when the last client is gone


class Refusal(Exception):
    """A message that is counted, answered and otherwise ignored."""

    def __init__(self, reason: str, text: str, *, fatal: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.fatal = fatal


class Server:
    """`run` returns once `stop` was called (from any thread or a signal handler), or nobody needs it any more."""

    def __init__(self, config: ServerConfig, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> None:
        self.config = config
        self.refused: Counter[str] = Counter()
        self._context = context or zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.SNDHWM, HIGH_WATER)
        self._socket.set(zmq.RCVHWM, HIGH_WATER)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.MAXMSGSIZE, 4 * m.MAX_MESSAGE_BYTES)  # beyond, ZeroMQ drops the connection
        self._socket.bind(config.address)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: deque[Callable[[], None]] = deque()
        self._progress: deque[tuple[bytes, str]] = deque()
        self._spaces = Spaces(
            [Path(d) for d in config.directories], config.quota_bytes, self._later, self._progressed
        )
        self._numbers = itertools.count(1)
        self._by_identity: dict[bytes, Session] = {}
        self._by_number: dict[int, Session] = {}
        self._by_pidfd: dict[int, Session] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._served = 0
        self._stopping = False
        self._idle_since = time.monotonic()
        self._handlers: dict[type[m.Message], Callable[[Session, Any], None]] = {
            m.Lookup: self._lookup,
            m.Prefetch: self._prefetch,
            m.Cancel: self._cancel,
            m.Release: self._release,
            m.Commit: self._commit,
            m.Abandon: self._abandon,
            m.Flush: self._flush,
            m.DropHost: self._drop_host,
            m.Stats: self._stats,
            m.Health: self._health,
            m.Bye: self._bye,
        }

    def run(self) -> None:
        try:
            while not self._stopping and not self._unused():
                for ready, _ in self._poller.poll(TICK_MS):
                    if ready in self._by_pidfd:
                        self._end(self._by_pidfd[ready], "its process has ended")
                    elif ready == self._wake:
                        os.eventfd_read(self._wake)
                    else:
                        self._receive()
                self._run_jobs()
                self._announce_progress()
                self._serve_waiting()
        finally:
            self._close()

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    # ---- the loop's parts ----

    def _unused(self) -> bool:
        if self._by_number or len(self._spaces):
            self._idle_since = time.monotonic()
            return False
        patience = 0.0 if self._served else UNUSED_S
        return self.config.ends_when_unused and time.monotonic() - self._idle_since > patience

    def _receive(self) -> None:
        for _ in range(AT_ONCE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames[0], frames[1:])

    def _take(self, identity: bytes, frames: Sequence[bytes]) -> None:
        session = self._by_identity.get(identity)
        try:
            if len(frames) != 1:
                raise Refusal("malformed", f"{len(frames)} frames instead of one")
            self._dispatch(identity, session, m.decode_from_client(frames[0]))
        except (Refusal, m.Malformed) as refusal:
            self.refused[refusal.reason] += 1
            fatal = getattr(refusal, "fatal", False)
            if session is not None and fatal:
                session.broken = True
            self._reply(identity, session, m.Refused(reason=refusal.reason, text=str(refusal), fatal=fatal))
        except Exception:  # a bug of ours costs this message, not everybody's prefetcher
            self.refused["failed"] += 1
            log.exception("hcache: a message could not be handled.")
            self._reply(identity, session, m.Refused(reason="failed", text="see the prefetcher's log", fatal=False))

    def _dispatch(self, identity: bytes, session: Session | None, message: m.FromClient) -> None:
        if isinstance(message, m.Hello):
            if session is not None:
                raise Refusal("out_of_order", "there is a session already")
            self._hello(identity, message)
            return
        if session is None or message.session != session.number:
            raise Refusal("unknown_session", f"no session {message.session} of this client", fatal=True)
        if not session.broken or isinstance(message, m.Bye):
            self._in_order(session, message)
            session.heard_at = time.monotonic()
            self._handlers[type(message)](session, message)

    def _in_order(self, session: Session, message: m.FromClient) -> None:
        if message.seq <= session.received:
            raise Refusal("replayed", f"message {message.seq} came twice")
        if message.seq != session.received + 1 and not isinstance(message, m.Bye):
            text = f"message {message.seq} came after message {session.received}"
            raise Refusal("out_of_order", text, fatal=True)
        session.received = message.seq

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _announce_progress(self) -> None:
        seen = set()
        while self._progress:
            seen.add(self._progress.popleft())
        for fingerprint, store_owner in seen:
            number, owner = split_owner(store_owner)
            session = self._by_number.get(number)
            if session is not None and session.space.fingerprint == fingerprint:
                self._announce(session, owner)

    def _announce(self, session: Session, owner: str) -> None:
        asked = session.asked.get(owner)
        if asked is None or asked.done:
            return
        slots, done = session.space.store.progress(session.store_owner(owner))
        if len(slots) > asked.announced or done:
            news = m.Ready(
                owner=owner,
                ticket=asked.ticket,
                first=asked.announced,
                slots=list(slots[asked.announced :]),
                done=done,
            )
            asked.announced, asked.done = len(slots), done
            self._send(session, news)

    def _serve_waiting(self) -> None:
        """What memory, or a full queue, did not allow before."""
        for session in list(self._by_number.values()):
            self._grant(session)
            while session.outbox and self._put(session, session.outbox[0]):
                session.outbox.popleft()

    # ---- messages ----

    def _hello(self, identity: bytes, hello: m.Hello) -> None:
        try:
            pidfd = os.pidfd_open(hello.pid)
        except (OSError, OverflowError) as error:
            raise Refusal("bad_hello", f"process {hello.pid} cannot be watched: {error}", fatal=True) from None
        self._served += 1

        def opened(space: Space | str) -> None:
            if isinstance(space, str):
                os.close(pidfd)
                self.refused["bad_hello"] += 1
                self._reply(identity, None, m.Refused(reason="bad_hello", text=space, fatal=True))
            else:
                self._welcome(identity, hello, space, pidfd)

        self._spaces.open(hello, opened)

    def _welcome(self, identity: bytes, hello: m.Hello, space: Space, pidfd: int) -> None:
        if stale := self._by_identity.get(identity):
            self._end(stale, "it started anew")
        session = Session(next(self._numbers), identity, hello, space, pidfd, time.monotonic())
        space.sessions.add(session.number)
        self._by_identity[identity] = self._by_number[session.number] = session
        self._by_pidfd[pidfd] = session
        self._poller.register(pidfd, zmq.POLLIN)
        store = space.store
        self._send(
            session,
            m.Welcome(
                pid=os.getpid(),
                region=space.region.path,
                slots=store.memory.shape[0],
                lease_limit=store.lease_limit,
            ),
        )
        self._grant(session)

    def _lookup(self, session: Session, message: m.Lookup) -> None:
        present = session.space.store.contains(message.keys)
        self._send(session, m.Found(answers=message.seq, present=present))

    def _prefetch(self, session: Session, message: m.Prefetch) -> None:
        session.asked[message.owner] = Asked(message.ticket)
        session.space.store.prefetch(
            session.store_owner(message.owner),
            message.keys,
            priority=message.priority,
            deadline_s=message.deadline_s,
        )

    def _cancel(self, session: Session, message: m.Cancel) -> None:
        session.space.store.cut(session.store_owner(message.owner))

    def _release(self, session: Session, message: m.Release) -> None:
        if session.asked.pop(message.owner, None):
            session.space.store.release(session.store_owner(message.owner))

    def _commit(self, session: Session, message: m.Commit) -> None:
        for page in message.pages:
            self._take_back(session, page.slot)
            session.space.store.commit(page.key, page.slot, page.parent)

    def _abandon(self, session: Session, message: m.Abandon) -> None:
        for slot in message.slots:
            self._take_back(session, slot)
            session.space.store.abandon(slot)

    def _take_back(self, session: Session, slot: int) -> None:
        if slot not in session.granted:
            raise Refusal("not_granted", f"slot {slot} was not granted to this client", fatal=True)
        session.granted.remove(slot)

    def _flush(self, session: Session, message: m.Flush) -> None:
        store, number, seq = session.space.store, session.number, message.seq

        def answer(complete: bool) -> None:
            if waiting := self._by_number.get(number):
                self._send(waiting, m.Flushed(answers=seq, complete=complete))

        self._spaces.in_background(lambda: store.flush(FLUSH_S), answer)

    def _drop_host(self, session: Session, message: m.DropHost) -> None:
        session.space.store.drop_host()

    def _stats(self, session: Session, message: m.Stats) -> None:
        figures = session.space.store.stats()
        figures["prefetcher_pid"] = os.getpid()
        figures["prefetcher_clients"] = len(self._by_number)
        figures["messages_refused"] = sum(self.refused.values())
        self._send(session, m.Figures(answers=message.seq, figures=figures))

    def _health(self, session: Session, message: m.Health) -> None:
        self._send(session, m.Alive(answers=message.seq))

    def _bye(self, session: Session, message: m.Bye) -> None:
        self._end(session, "it said goodbye")

    # ---- towards clients ----

    def _grant(self, session: Session) -> None:
        store = session.space.store
        wanted = min(session.hello.grant, int(store.memory.shape[0] * MAX_GRANT))
        if len(session.granted) > wanted // 2 or session.broken:
            return
        slots = []
        while len(session.granted) < wanted and store.available and (slot := store.reserve()) is not None:
            session.granted.add(slot)
            slots.append(slot)
        if slots:
            self._send(session, m.Granted(slots=slots))

    def _send(self, session: Session, message: m.Message) -> None:
        session.sent += 1
        frames = [m.encode(msgspec.structs.replace(message, session=session.number, seq=session.sent))]
        if session.outbox or not self._put(session, frames):
            session.outbox.append(frames)
            if len(session.outbox) > OUTBOX and not session.broken:
                session.broken = True
                log.warning("hcache: %s does not take its messages and is given up.", session.name)

    def _put(self, session: Session, frames: Sequence[bytes]) -> bool:
        """False where the client's queue is full: it is slow, and nobody waits for it."""
        return self._put_to(session.identity, frames)

    def _put_to(self, identity: bytes, frames: Sequence[bytes]) -> bool:
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            # It has gone; the end of its process ends its session.
        return True

    def _reply(self, identity: bytes, session: Session | None, message: m.Message) -> None:
        if session is not None:
            self._send(session, message)
        else:
            self._put_to(identity, [m.encode(message)])

    # ---- ends ----

    def _end(self, session: Session, why: str) -> None:
        log.debug("hcache: %s ends: %s", session.name, why)
        if session.pidfd >= 0:
            self._poller.unregister(session.pidfd)
            del self._by_pidfd[session.pidfd]
        del self._by_identity[session.identity], self._by_number[session.number]
        session.end()
        if not session.space.sessions:
            self._spaces.close(session.space)

    def _close(self) -> None:
        for session in list(self._by_number.values()):
            self._end(session, "the prefetcher ends")
        self._spaces.close_all()
        self._socket.close()
        self._context.term()
        os.close(self._wake)

    def _later(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._ring()

    def _progressed(self, fingerprint: bytes, owner: str) -> None:
        self._progress.append((fingerprint, owner))
        self._ring()

    def _ring(self) -> None:
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            log.debug("hcache: the loop has ended")
