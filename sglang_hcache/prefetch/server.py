"""The prefetcher's loop: one thread that serves all clients and never waits for a disk or for one of them."""

from __future__ import annotations

import itertools
import logging
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.grants import grant, share_of
from sglang_hcache.prefetch.listeners import Frames, Listener, Listeners, Peer, Put
from sglang_hcache.prefetch.payload import BadPayload, Parting, frames_of, take_pages
from sglang_hcache.prefetch.session import Refusal, Session, split_owner
from sglang_hcache.prefetch.sockets import MAX_PAYLOAD_BYTES
from sglang_hcache.prefetch.spaces import Space, Spaces
from sglang_hcache.storage.contract import as_priority
from sglang_hcache.storage.rate_limit import RateLimit
from sglang_hcache.version import VERSION

TICK_MS = 200  # grants that memory could not give at once are tried again so often
SOON_MS = 5  # while records are on their way, pages being written for those who wait for that, or a session ends
LAST_WORDS_S = 0.2  # after the end of a client's process: what it has sent before that may still be on its way
WAITING_S = 1.0  # between two messages to a client whose pages cannot be served yet
TAKE_S = 0.01  # spent on messages before progress is announced again; a prefetch of 2,000 pages takes about 5 ms
QUIET_S = 2.0  # a client that has been sent nothing for so long is told that the prefetcher lives
EXPIRE_S = 10.0  # a client that is not heard of: it says something every second. On another host its session ends
UNUSED_S = 30.0  # a prefetcher that nobody has spoken to ends after this
FLUSH_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """What a prefetcher is started with."""

    address: str  # ZeroMQ's, ipc://, for clients on this host
    directories: tuple[str, ...]
    quota_bytes: int | None = None  # of each directory
    listen: str = ""  # tcp://HOST:PORT, for clients on other hosts
    keys: str = ""  # directory of CURVE keys for `listen`
    host_bytes: int | None = None  # the most memory one model's pages get, whatever a client asks for
    read_bytes_per_s: float | None = None  # the most that is read from files, of all models together
    ends_when_unused: bool = True  # when the last client is gone, and all is written


class Server:
    """`run` returns once `stop` was called (from any thread or a signal handler), or nobody needs it any more."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.refused: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.counts: Counter[str] = Counter()
        self._poller = zmq.Poller()
        self._listeners = Listeners(
            self._context, self._poller, config.address, config.listen, config.keys, self.refused
        )
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake).atexit = False  # a signal or a thread may ring after the end
        self._jobs: deque[Callable[[], None]] = deque()
        self._progress: deque[tuple[bytes, str]] = deque()
        self._spaces = Spaces(
            [Path(d) for d in config.directories],
            config.quota_bytes,
            RateLimit(config.read_bytes_per_s) if config.read_bytes_per_s else None,
            self._later,
            self._progressed,
        )
        self._numbers = itertools.count(1)
        self._unwelcomed: set[Peer] = set()  # have said hello; their space is being opened
        self._told_at = 0.0  # when they were last told so; monotonic
        self._by_peer: dict[Peer, Session] = {}
        self._by_number: dict[int, Session] = {}
        self._by_pidfd: dict[int, Session] = {}
        self._partings: list[Parting] = []
        self._poller.register(self._wake, zmq.POLLIN)
        self._served = 0
        self._stopping = False
        self._began = self._idle_since = time.monotonic()
        self._handlers: dict[type[m.Message], Callable[[Session, Any], None]] = {
            m.Lookup: self._lookup,
            m.Prefetch: self._prefetch,
            m.Cancel: self._cancel,
            m.Release: self._release,
            m.Commit: self._commit,
            m.Want: self._want,
            m.GiveBack: self._give_back,
            m.Credit: self._credit,
            m.Flush: self._flush,
            m.DropHost: self._drop_host,
            m.Stats: self._stats,
            m.Overview: self._overview,
            m.Health: self._health,
            m.Bye: self._bye,
        }

    def run(self) -> None:
        try:
            while not self._stopping and not self._unused():
                soon = self._partings or any(one.flushes or one.has_ended for one in self._by_number.values())
                events = self._poller.poll(SOON_MS if soon else TICK_MS)
                # Pidfds first: a goodbye closes its client's pidfd, whose number another client may get meanwhile.
                for ready, _ in sorted(events, key=lambda event: not isinstance(event[0], int)):
                    self._attend(ready)
                self._run_jobs()
                self._announce_progress()
                self._serve_waiting()
                self._expire()
                self._close_unused()
        finally:
            self._close()

    def stop(self) -> None:
        self._stopping = True
        self._notify()

    # ---- the loop's parts ----

    def _unused(self) -> bool:
        if self._by_number or len(self._spaces):
            self._idle_since = time.monotonic()
            return False
        patience = 0.0 if self._served else UNUSED_S
        return self.config.ends_when_unused and time.monotonic() - self._idle_since > patience

    def _attend(self, ready: object) -> None:
        if ready == self._wake:
            os.eventfd_read(self._wake)
        elif isinstance(ready, int):
            self._note_end_of_process(self._by_pidfd[ready])
        elif listener := self._listeners.attend(ready):
            self._receive(listener)

    def _note_end_of_process(self, session: Session) -> None:
        """The client has ended; what it has sent is still received, for `LAST_WORDS_S`."""
        session.ended_at = time.monotonic()
        self._poller.unregister(session.pidfd)

    def _receive(self, listener: Listener) -> None:
        until = time.monotonic() + TAKE_S
        for _ in range(listener.at_once):
            if (frames := listener.receive()) is None:
                return
            self._take(Peer(listener, frames[0]), frames[1])
            if time.monotonic() > until:
                return

    def _take(self, peer: Peer, frames: Sequence[memoryview]) -> None:
        session = self._by_peer.get(peer)
        try:
            if not frames:
                raise Refusal("malformed", "no frame")
            self._dispatch(peer, session, m.decode_from_client(frames[0]), frames[1:])
        except (Refusal, m.Malformed) as refusal:
            self.refused[refusal.reason] += 1
            if session is not None and refusal.fatal:
                session.broken = True
            self._reply(peer, session, m.Refused(reason=refusal.reason, text=str(refusal), fatal=refusal.fatal))
        except Exception:  # a bug of ours costs this message, not everybody's prefetcher
            self.refused["failed"] += 1
            logger.exception("hcache: a message could not be handled.")
            self._reply(peer, session, m.Refused(reason="failed", text="see the prefetcher's log", fatal=False))

    def _dispatch(
        self, peer: Peer, session: Session | None, message: m.FromClient, payload: Sequence[memoryview]
    ) -> None:
        if isinstance(message, m.Hello):
            if session is not None or peer in self._unwelcomed:
                raise Refusal("out_of_order", "there is a session already")
            self._hello(peer, message)
            return
        if isinstance(message, m.Overview) and session is None and not peer.listener.remote:
            self._reply(peer, None, self._overviewed())
            return
        if isinstance(message, m.Bye) and not message.session:
            self._unwelcomed.discard(peer)
            if session is not None:
                self._end(session, "it has not waited for its welcome")
            return
        if session is None or message.session != session.number:
            raise Refusal("unknown_session", f"no session {message.session} of this client", fatal=True)
        if session.broken and not isinstance(message, m.Bye):
            raise Refusal("session_over", "the session cannot be followed any more: start another", fatal=True)
        session.in_order(message)
        session.heard_at = time.monotonic()
        if isinstance(message, m.Commit) and session.remote:
            self._commit_remote(session, message, payload)
        elif payload:
            raise Refusal("malformed", f"{len(payload)} frames too many")
        else:
            self._handlers[type(message)](session, message)

    def _run_jobs(self) -> None:
        while self._jobs:
            self._jobs.popleft()()

    def _announce_progress(self) -> None:
        seen = set()
        while self._progress:
            seen.add(self._progress.popleft())
        for fingerprint, store_owner in seen:
            number, prefetch = split_owner(store_owner)
            session = self._by_number.get(number)
            if session is not None and session.space.fingerprint == fingerprint:
                self._announce(session, prefetch)

    def _announce(self, session: Session, prefetch: int) -> None:
        asked = session.asked.get(prefetch)
        if asked is None or asked.done:
            return
        first = asked.announced
        fresh, done, known, total = session.space.store.progress(asked.store_owner, first)
        if session.remote and session.credit < len(fresh):
            fresh, done = fresh[: session.credit], False
        if not fresh and not done and (asked.known or not known or session.remote):
            return
        upto = first + len(fresh)
        asked.announced, asked.done, asked.known = upto, done, True
        payload: list[zmq.Frame] = []
        if session.remote:
            payload = frames_of(session.space, asked.keys[first:upto], fresh)
            asked.sending += [frame.tracker for frame in payload]
            session.credit -= len(payload)
            self.counts["pages_sent"] += len(payload)
        places = range(len(fresh)) if session.remote else fresh
        ready = m.Ready(answers=prefetch, first=first, slots=list(places), done=done, total=total or 0)
        self._send(session, ready, payload)

    def _serve_waiting(self) -> None:
        """Retry grants, flushes and messages that had to wait; tell clients that have heard nothing that all is well.

        Those without a welcome are told `Waiting`.
        """
        for session in list(self._by_number.values()):
            if not session.has_ended:
                self._grant(session)
            self._answer_flushes(session)
            session.send_kept()
            if not session.outbox and time.monotonic() - session.sent_at > QUIET_S:
                self._send(session, m.Alive(answers=0))  # its questions may be far back in the queue
        if self._unwelcomed and time.monotonic() >= self._told_at + WAITING_S:
            self._told_at = time.monotonic()
            waiting = m.encode(m.Waiting(pages=self._spaces.unwritten))
            for peer in self._unwelcomed:
                peer.put([waiting])

    def _answer_flushes(self, session: Session) -> None:
        complete = bool(session.flushes) and not session.space.store.drain()
        while session.flushes and (complete or session.flushes[0][1] < time.monotonic()):
            self._send(session, m.Flushed(answers=session.flushes.popleft()[0], complete=complete))

    # ---- messages ----

    def _hello(self, peer: Peer, hello: m.Hello) -> None:
        if peer.listener.remote != (hello.pid == 0):
            raise Refusal("bad_hello", "a client has a process id if, and only if, it is on this host", fatal=True)
        if peer.listener.remote and sum(hello.layer_bytes) > MAX_PAYLOAD_BYTES:
            raise Refusal("bad_hello", f"a page has more than {MAX_PAYLOAD_BYTES} bytes", fatal=True)
        if self.config.host_bytes is not None:
            hello = msgspec.structs.replace(hello, host_bytes=min(hello.host_bytes, self.config.host_bytes))
        try:
            pidfd = -1 if peer.listener.remote else os.pidfd_open(hello.pid)
        except (OSError, OverflowError) as error:
            raise Refusal("bad_hello", f"process {hello.pid} cannot be watched: {error}", fatal=True) from None
        self._served += 1
        if not self._unwelcomed:
            self._told_at = time.monotonic()
        self._unwelcomed.add(peer)

        def opened(space: Space | str) -> None:
            waits = peer in self._unwelcomed
            self._unwelcomed.discard(peer)
            if waits and isinstance(space, Space):
                self._welcome(peer, hello, space, pidfd)
                return
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(space, str):
                self.refused["bad_hello"] += 1
                self._reply(peer, None, m.Refused(reason="bad_hello", text=space, fatal=True))

        for session in [one for one in self._by_number.values() if one.has_ended]:
            self._end(session, "its process has ended")  # at once: the new client may want what that has held
        self._spaces.open(hello, opened)

    def _welcome(self, peer: Peer, hello: m.Hello, space: Space, pidfd: int) -> None:
        now = time.monotonic()
        session = Session(next(self._numbers), peer, hello, space, pidfd, heard_at=now, sent_at=now)
        space.sessions.add(session.number)
        self._by_peer[peer] = self._by_number[session.number] = session
        if pidfd >= 0:
            self._by_pidfd[pidfd] = session
            self._poller.register(pidfd, zmq.POLLIN)
        welcome = m.Welcome(
            pid=os.getpid(),
            region="" if session.remote else space.region.path,
            slots=space.store.memory.shape[0],
            quota_bytes=self.config.quota_bytes,
            read_bytes_per_s=self.config.read_bytes_per_s,
        )
        if self._send(session, welcome):
            if session.saves:
                self._share_out(space)
            self._want(session, m.Want(slots=hello.grant))
        else:
            self._end(session, "it has not waited for its welcome")

    def _lookup(self, session: Session, message: m.Lookup) -> None:
        present = session.space.store.contains(message.keys)
        self._send(session, m.Found(answers=message.seq, present=present))

    def _prefetch(self, session: Session, message: m.Prefetch) -> None:
        by_arrival = as_priority(arrived_at=time.time())  # another host asks page by page, and has a clock of its own
        asked = session.ask(message)
        try:
            session.space.store.prefetch(
                asked.store_owner,
                message.keys,
                priority=by_arrival if session.remote else message.priority,
                page_priority=message.page_priority,
            )
        except Exception:
            asked.done, upto = True, asked.announced
            self._send(session, m.Ready(answers=message.seq, first=upto, slots=[], done=True, total=upto))
            raise

    def _cancel(self, session: Session, message: m.Cancel) -> None:
        if asked := session.asked.get(message.prefetch):
            session.space.store.cut(asked.store_owner)

    def _release(self, session: Session, message: m.Release) -> None:
        if parting := session.release(message.prefetch):
            self._partings.append(parting)

    def _commit(self, session: Session, message: m.Commit) -> None:
        for page in message.pages:
            session.take_back(page.slot)
            session.space.store.commit(page.key, page.slot, page.parent)

    def _commit_remote(self, session: Session, message: m.Commit, payload: Sequence[memoryview]) -> None:
        try:
            take_pages(session.space, message, payload, self.counts)
        except BadPayload as error:
            raise Refusal("bad_payload", str(error)) from None

    def _credit(self, session: Session, message: m.Credit) -> None:
        session.credit = min(session.credit + message.pages, session.space.store.memory.shape[0])
        for prefetch in list(session.asked):
            self._announce(session, prefetch)

    def _want(self, session: Session, message: m.Want) -> None:
        session.wanted = min(session.wanted + message.slots, session.hello.grant)
        self._grant(session)

    def _give_back(self, session: Session, message: m.GiveBack) -> None:
        for slot in message.slots:
            session.take_back(slot)
            session.space.store.abandon(slot)

    def _flush(self, session: Session, message: m.Flush) -> None:
        session.flushes.append((message.seq, time.monotonic() + FLUSH_S))

    def _drop_host(self, session: Session, message: m.DropHost) -> None:
        session.space.store.drop_host()

    def _stats(self, session: Session, message: m.Stats) -> None:
        figures = session.space.store.stats()
        figures["prefetcher_pid"] = os.getpid()
        figures["prefetcher_version"] = VERSION
        figures["prefetcher_uptime_s"] = time.monotonic() - self._began
        figures["pages_dropped"] = 0  # unless it has dropped any
        figures["prefetcher_clients"] = len(self._by_number)
        figures["messages_refused"] = sum(self.refused.values())
        figures |= self.counts | {f"refused_{reason}": count for reason, count in self.refused.items()}
        self._send(session, m.Figures(answers=message.seq, figures=figures))

    def _overview(self, session: Session, message: m.Overview) -> None:
        self._send(session, self._overviewed())

    def _overviewed(self) -> m.Overviewed:
        models = []
        for space in self._spaces.opened:
            models.append(space.store.stats())
            models[-1]["about"] = ", ".join(space.made_for.about.values())
            models[-1]["fingerprint"] = space.fingerprint.hex()
            models[-1]["memory_bytes"] = space.store.memory.nbytes
            models[-1]["clients"] = len(space.sessions)
        return m.Overviewed(
            pid=os.getpid(),
            version=VERSION,
            uptime_s=time.monotonic() - self._began,
            clients=len(self._by_number),
            pages_closing=self._spaces.unwritten,
            quota_bytes=self.config.quota_bytes,
            read_bytes_per_s=self.config.read_bytes_per_s,
            host_bytes=self.config.host_bytes,
            models=models,
        )

    def _health(self, session: Session, message: m.Health) -> None:
        self._send(session, m.Alive(answers=message.seq))

    def _bye(self, session: Session, message: m.Bye) -> None:
        self._send(session, m.Alive(answers=message.seq))
        self._end(session, "it said goodbye")

    # ---- towards clients ----

    def _share_out(self, space: Space) -> None:
        """A saver has come or gone: tell each its new share, so that it gives back slots or may get more."""
        savers = self._savers(space)
        for session in savers:
            self._send(session, m.Share(slots=share_of(space, savers)))

    def _savers(self, space: Space) -> list[Session]:
        return [session for number in space.sessions if (session := self._by_number[number]).saves]

    def _grant(self, session: Session) -> None:
        savers = self._savers(session.space)
        if slots := grant(session, savers, heard_since=time.monotonic() - EXPIRE_S):
            self._send(session, m.Granted(slots=slots))

    def _send(self, session: Session, message: m.Message, payload: Frames = ()) -> bool:
        """False where nobody is there to hear it."""
        head = m.encode(msgspec.structs.replace(message, session=session.number))
        frames = [head, *payload]
        session.sent_at = time.monotonic()
        put = Put.FULL if session.outbox else session.peer.put(frames)
        if put is Put.FULL and not session.keep(frames) and not session.broken:
            session.broken = True
            logger.warning("hcache: %s does not take its messages: session closed.", session.name)
        return put is not Put.GONE

    def _reply(self, peer: Peer, session: Session | None, message: m.Message) -> None:
        if session is not None:
            self._send(session, message)
        else:
            peer.put([m.encode(message)])

    # ---- ends ----

    def _expire(self) -> None:
        self._partings = [parting for parting in self._partings if not parting.end()]
        now = time.monotonic()
        long_ago = now - EXPIRE_S
        for session in list(self._by_number.values()):
            if session.has_ended and max(session.ended_at, session.heard_at) < now - LAST_WORDS_S:
                self._end(session, "its process has ended")
            elif session.remote and session.heard_at < long_ago:
                logger.info("hcache: %s has not been heard of for %g s: session closed.", session.name, EXPIRE_S)
                self._end(session, "it was not heard of")

    def _close_unused(self) -> None:
        """Close spaces without a client once they are written; if the prefetcher stays, so do those with files.

        A space without files serves one process only, under a fingerprint that nobody will ask for again.
        """
        for space in self._spaces.unused():
            ends = self.config.ends_when_unused or not space.made_for.on_file
            if not space.store.drain() and ends:
                self._spaces.close(space)

    def _end(self, session: Session, why: str) -> None:
        logger.debug("hcache: %s ends: %s", session.name, why)
        if session.pidfd >= 0:
            if not session.has_ended:
                self._poller.unregister(session.pidfd)
            del self._by_pidfd[session.pidfd]
        del self._by_peer[session.peer], self._by_number[session.number]
        self._partings += session.end()
        if session.saves:
            self._share_out(session.space)
        unwritten = 0 if session.space.sessions else session.space.store.drain()
        if unwritten:
            logger.info("hcache: the last client of its pages has gone; %d are still to be written.", unwritten)

    def _close(self) -> None:
        """What sessions have leased stays as it is: their clients may be restoring from it."""
        for pidfd in self._by_pidfd:
            os.close(pidfd)
        self._spaces.close_all()
        self._listeners.close()
        self._context.term()

    def _later(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._notify()

    def _progressed(self, fingerprint: bytes, owner: str) -> None:
        self._progress.append((fingerprint, owner))
        self._notify()

    def _notify(self) -> None:
        os.eventfd_write(self._wake, 1)
