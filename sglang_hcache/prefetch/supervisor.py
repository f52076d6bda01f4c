"""Makes sure that a prefetcher runs and that there is a session with it; replaces one that has died."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.connection import Connection, Hopeless, Unavailable
from sglang_hcache.prefetch.endpoint import Endpoint, endpoint_named, is_running, name_for
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.no_store import NoStore
from sglang_hcache.prefetch.remote import RemoteClient
from sglang_hcache.prefetch.server import ServerConfig

START_S = 60.0  # for a prefetcher to answer, and between two pages that it writes before it serves
OPENING_S = 300.0  # at start, while it opens its directories; after a crash 100 million pages take so long
LOCKED_S = 10.0  # for it to start, up to the point where it holds its lock
BACK_OFF_S = (0.1, 30.0)  # first pause before another try, and longest
REMOTE_OPEN_S = 10.0  # for one attempt
POLL_S = 0.02

_LAUNCHER = Path(__file__).with_name("launcher.py")

Client = TypeVar("Client", PrefetchClient, RemoteClient)

logger = logging.getLogger(__name__)


class _Patience:
    """Bounds the wait for a prefetcher that says it is not ready yet, as it may say so for ever.

    `stalled_s`: how long the number of pages that it must write first may stay without falling.
    """

    def __init__(self, stalled_s: float) -> None:
        self._stalled_s = stalled_s
        self._fewest: int | None = None  # pages, so far
        self._since = 0.0  # monotonic

    def look(self, pages: int) -> None:
        """Raises Unavailable."""
        now = time.monotonic()
        if self._fewest is None or pages < self._fewest or (pages and not self._fewest):
            self._fewest, self._since = pages, now
        if pages and now > self._since + self._stalled_s:
            raise Unavailable(f"it is not ready: of {pages} pages it has written none in {self._stalled_s:g} s")
        if not pages and now > self._since + OPENING_S:
            raise Unavailable(f"it is not ready: it has not opened its directories in {OPENING_S:g} s")


class SessionSupervisor(ABC, Generic[Client]):
    """One a client process: opens a store and replaces it when it is gone.

    A store that is gone is replaced in two steps, as somebody may still be reading its memory: the owner of the
    store calls `replace` once that has ended, and gets the next store from `take_next` some time later.

    `hello` is asked for anew for each session. `opened` is called before its owner gets a store, and `closing`,
    perhaps more than once, before a store is closed: by the thread that looks for stores, except at start and end.
    """

    _client: type[Client]

    def __init__(
        self,
        hello: Callable[[], Hello],
        *,
        opened: Callable[[Client], None] = lambda store: None,
        closing: Callable[[Client], None] = lambda store: None,
    ) -> None:
        self._hello = hello
        self._opened: Callable[[Client], None] = opened
        self._closing: Callable[[Client], None] = closing
        self.news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.restarts = 0
        self._next: Client | None = None
        self._lock = threading.Lock()
        self._unwanted = threading.Event()  # set: nobody wants what the thread looks for
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout_s: float = START_S) -> Client | NoStore:
        """Open a session; if none can be had now, return a NoStore and keep looking, as after `replace`.

        timeout_s: for an answer, and between two pages that the prefetcher writes before it serves. Raises
        Unavailable where only a person can help: keys cannot be read, or a prefetcher cannot be started.
        """
        try:
            store = self.open(timeout_s, waiting=_Patience(timeout_s).look)
        except Unavailable as error:
            if isinstance(error, Hopeless) or not self._may_answer():
                raise
            logger.warning(
                "hcache: cannot reach or start a prefetcher (%s): this server starts without the tier.", error
            )
            nothing = NoStore(self._hello().layout, str(error), lost=False)
            self._look_for_another(nothing)
            return nothing
        self._opened(store)
        return store

    def open(self, timeout_s: float = START_S, *, waiting: Callable[[int], None] = lambda pages: None) -> Client:
        """A session. `waiting`: as for Connection. Raises Unavailable."""
        deadline = time.monotonic() + timeout_s
        pause = BACK_OFF_S[0]
        while True:
            try:
                return self._use(self._connect(max(POLL_S, deadline - time.monotonic()), waiting))
            except Unavailable as error:
                hopeless = isinstance(error, Hopeless) or time.monotonic() + pause > deadline
                if hopeless or self._closed.wait(pause):
                    raise
                logger.info("hcache: no session with the prefetcher yet: %s", error)
                pause = min(2 * pause, BACK_OFF_S[1])

    def replace(self, gone: Client | NoStore) -> None:
        """A store is gone and nobody uses it any more: close it and get another, in the background."""
        what = "the prefetcher is gone" if gone.lost else "the prefetcher's session is over"
        logger.warning("hcache: %s (%s); opening another. Requests go on without it.", what, gone.why_ended)
        self._look_for_another(gone)

    def _look_for_another(self, gone: Client | NoStore) -> None:
        self._unwanted = threading.Event()
        arguments = (gone, self._unwanted)
        self._thread = threading.Thread(target=self._reopen, args=arguments, name="hcache-supervisor", daemon=True)
        self._thread.start()

    def take_next(self) -> Client | None:
        """The store that follows a replaced one, once."""
        with self._lock:
            store, self._next = self._next, None
        return store

    def stop_replacing(self) -> None:
        """No store follows the one that was given to `replace`; one that has been found is closed."""
        with self._lock:
            self._unwanted.set()
        if store := self.take_next():
            self.close_store(store)

    def close_store(self, store: Client) -> None:
        """Nobody uses it any more."""
        self._closing(store)
        store.close()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        self.stop_replacing()

    @abstractmethod
    def _connect(self, timeout_s: float, waiting: Callable[[int], None]) -> Connection:
        """One attempt. Raises Unavailable."""

    def _use(self, connection: Connection) -> Client:
        try:
            return self._client(connection, news=self.news)
        except BaseException:
            connection.close()
            raise

    @abstractmethod
    def _may_answer(self) -> bool:
        """Whether there may be a prefetcher, that has only not answered."""

    def _give_up(self, gone: Client) -> None:
        """Before a store that is gone is closed."""

    def _reopen(self, gone: Client | NoStore, unwanted: threading.Event) -> None:
        pause = BACK_OFF_S[0]
        former = None if isinstance(gone, NoStore) else gone
        while not self._closed.is_set():
            try:
                if former is not None:
                    self._give_up(former)
                    self.close_store(former)
                    former = None
                if unwanted.is_set():
                    return
                store = self._open_for_use()
            except Exception as error:
                if self._closed.is_set():
                    return
                expected = isinstance(error, Unavailable | OSError | zmq.ZMQError)
                logger.warning(
                    "hcache: cannot reach or start a prefetcher (%s); trying again in %g s",
                    error,
                    pause,
                    exc_info=not expected,  # a bug of ours must not end the thread: no store would ever follow
                )
                self._closed.wait(pause)
                pause = min(2 * pause, BACK_OFF_S[1])
                continue
            with self._lock:
                if wanted := not unwanted.is_set():
                    self._next = store
            if not wanted:
                self.close_store(store)
                return
            self.restarts += gone.lost
            os.eventfd_write(self.news, 1)
            logger.info("hcache: the prefetcher is back (process %d)", store.prefetcher_pid)
            return

    def _open_for_use(self) -> Client:
        store = self.open()
        try:
            self._opened(store)
        except BaseException:
            self.close_store(store)
            raise
        return store


class LocalSupervisor(SessionSupervisor[PrefetchClient]):
    """With the prefetcher on this host; it is started where none runs."""

    _client = PrefetchClient

    def __init__(
        self,
        directories: tuple[str, ...],
        quota_bytes: int | None,
        hello: Callable[[], Hello],
        *,
        read_bytes_per_s: float | None = None,
        opened: Callable[[PrefetchClient], None] = lambda store: None,
        closing: Callable[[PrefetchClient], None] = lambda store: None,
    ) -> None:
        super().__init__(hello, opened=opened, closing=closing)
        self._name = name_for(directories)
        self._endpoint: Endpoint = endpoint_named(self._name)
        self._config_at = partial(
            ServerConfig, directories=directories, quota_bytes=quota_bytes, read_bytes_per_s=read_bytes_per_s
        )

    def _connect(self, timeout_s: float, waiting: Callable[[int], None]) -> Connection:
        self._endpoint = endpoint_named(self._name)  # anew: at logout its folder may have gone
        if not is_running(self._endpoint) and not self._returns():
            self._launch()
        return Connection(
            self._endpoint.address,
            self._hello(),
            timeout_s=timeout_s,
            go_on=lambda: is_running(self._endpoint) and not self._closed.is_set(),
            waiting=waiting,
        )

    def _may_answer(self) -> bool:
        return is_running(self._endpoint)

    def _give_up(self, gone: PrefetchClient) -> None:
        """Kill the prefetcher if it hangs: it does not answer, and still holds the endpoint's lock."""
        if gone.connection.hangs and is_running(self._endpoint):
            logger.warning("hcache: the prefetcher (process %d) hangs and is killed", gone.prefetcher_pid)
            gone.connection.kill()

    def _returns(self) -> bool:
        """Wait for a prefetcher that was run by hand to be started again; returns whether it was."""
        if not (patience_s := self._endpoint.returns_within_s()):
            return False
        logger.warning("hcache: the prefetcher run by hand has ended; waiting %.0f s for the next.", patience_s)
        deadline = time.monotonic() + patience_s
        while not is_running(self._endpoint):
            if time.monotonic() > deadline or not self._endpoint.by_hand.exists():
                logger.warning(
                    "hcache: none has been run by hand again: this server starts one, with its own limits and not "
                    "for other hosts. To go back: stop all servers of these directories, run yours, and start them."
                )
                return False
            if self._closed.wait(POLL_S):
                raise Unavailable("it is not waited for any more")
        return True

    def _launch(self) -> None:
        config = json.dumps(dataclasses.asdict(self._config_at(self._endpoint.address)))
        launcher = [sys.executable, "-S", "-P", str(_LAUNCHER), str(os.getppid())]
        command = [*launcher, sys.executable, "-P", "-m", "sglang_hcache.prefetch", config]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise Hopeless(f"it cannot be started: {error}") from None
        deadline = time.monotonic() + LOCKED_S
        while not is_running(self._endpoint) and time.monotonic() < deadline:
            if self._closed.wait(POLL_S):
                return


class RemoteSupervisor(SessionSupervisor[RemoteClient]):
    """With a prefetcher on another host, at tcp://HOST:PORT, that somebody else starts.

    `keys`: the folder of this client.
    """

    _client = RemoteClient

    def __init__(
        self,
        address: str,
        keys: str | None,
        hello: Callable[[], Hello],
        *,
        opened: Callable[[RemoteClient], None] = lambda store: None,
        closing: Callable[[RemoteClient], None] = lambda store: None,
    ) -> None:
        super().__init__(hello, opened=opened, closing=closing)
        self._address = address
        self._keys = Path(keys) if keys else None

    def _connect(self, timeout_s: float, waiting: Callable[[int], None]) -> Connection:
        return Connection(
            self._address,
            msgspec.structs.replace(self._hello(), pid=0, grant=0),  # it needs no slots there
            timeout_s=min(timeout_s, REMOTE_OPEN_S),
            keys=self._keys,
            go_on=lambda: not self._closed.is_set(),
            waiting=waiting,
        )

    def _may_answer(self) -> bool:
        return True
