"""A prefetcher's process: one an endpoint, until it is stopped or nobody needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from sglang_hcache.prefetch.endpoint import Endpoint, InstanceLock
from sglang_hcache.prefetch.logs import logging_to, logging_to_stderr
from sglang_hcache.prefetch.server import Server, ServerConfig
from sglang_hcache.version import VERSION

logger = logging.getLogger(__name__)

FAILED = 1
SWITCH_S = 0.0005  # an index lookup may wait this long for other threads; with Python's 5 ms many take seconds
TOUCH_S = 30.0  # how often lock and socket are touched; a server waits twice as long for a prefetcher run by hand
ASIDE_S = 1.0  # between two looks whether a prefetcher that servers started has ended
LOG_NAME = "prefetcher.log"  # in the first directory


def serve(config: ServerConfig) -> int:
    """Run until stopped; the process's exit status. Where another one serves the endpoint there is nothing to do."""
    logging.getLogger().setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written is not for stderr, which may hang
    with logging_to_stderr():
        return _serve(config)


def _serve(config: ServerConfig) -> int:
    raise_process_limits()
    try:
        lock = _lock(config)
    except OSError as error:
        logger.error("hcache: no prefetcher can run: %s", error)
        return FAILED
    if lock is None:
        level = logging.INFO if config.ends_when_unused else logging.ERROR
        logger.log(level, "hcache: another prefetcher serves %s", ", ".join(config.directories))
        return 0 if config.ends_when_unused else FAILED
    try:
        with logging_to(Path(config.directories[0]) / LOG_NAME):
            return _run(config, lock)
    finally:
        lock.release()


def _lock(config: ServerConfig) -> InstanceLock | None:
    """The lock, or None if another prefetcher has it. Run by hand, wait for the end of one a server started."""
    endpoint, by_hand = Endpoint.at(config.address), not config.ends_when_unused
    said = False
    while (lock := InstanceLock.acquire(endpoint, by_hand=by_hand)) is None:
        if not by_hand or endpoint.by_hand.exists():
            return None
        if not said:
            said = True
            logger.error(
                "hcache: a prefetcher that a server started serves %s, with that server's limits: waiting until it "
                "ends. Stop all servers of these directories, and start them once this one serves.",
                ", ".join(config.directories),
            )
        time.sleep(ASIDE_S)
    return lock


def raise_process_limits() -> None:
    """What a process with many threads and files needs: each directory has up to 450 open, for each model."""
    sys.setswitchinterval(SWITCH_S)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _run(config: ServerConfig, lock: InstanceLock) -> int:
    def stop(number: int, _frame: object) -> None:
        lock.returns &= number == signal.SIGTERM  # systemd's, which may start it again; others are a person's
        server.stop()

    try:
        server = Server(config)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, stop)
        where = " ".join(filter(None, (config.address, config.listen)))
        logger.info("hcache: serving %s at %s; version %s", ", ".join(config.directories), where, VERSION)
        notify("READY=1")
        with _kept_fresh(lock):
            server.run()
        logger.info("hcache: the prefetcher has ended")
        notify("STOPPING=1")
    except (OSError, ValueError, zmq.ZMQError) as error:
        lock.returns = False  # it would fail again
        logger.error("hcache: no prefetcher can serve %s: %s", config.listen or config.address, error)
        return FAILED
    except Exception:
        logger.exception("hcache: the prefetcher failed.")
        return FAILED
    return 0


@contextlib.contextmanager
def _kept_fresh(lock: InstanceLock) -> Iterator[None]:
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(TOUCH_S):
            lock.touch()

    thread = threading.Thread(target=keep, name="hcache-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def notify(state: str) -> None:
    """Tell systemd, where it started us (`Type=notify`)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
