"""A prefetcher's process: one an endpoint, until it is stopped or nobody needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys

import zmq

from sglang_hcache.prefetch.endpoint import InstanceLock, endpoint_for
from sglang_hcache.prefetch.server import Server, ServerConfig

log = logging.getLogger(__name__)

FAILED = 1


def serve(config: ServerConfig) -> int:
    """Run until stopped; the process's exit status. Where another one serves the endpoint there is nothing to do."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="[%(asctime)s prefetcher] %(message)s", datefmt="%F %T"
    )
    logging.raiseExceptions = False  # whoever started us may be gone, and our log with him
    try:
        endpoint = endpoint_for(config.directories)
        lock = InstanceLock.acquire(endpoint.lock)
    except OSError as error:
        log.error("hcache: no prefetcher can run: %s", error)
        return FAILED
    if lock is None:
        log.info("hcache: another prefetcher serves %s", ", ".join(config.directories))
        return 0 if config.ends_when_unused else FAILED
    try:
        server = Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        log.info("hcache: serving %s at %s %s", ", ".join(config.directories), config.address, config.listen)
        notify("READY=1")
        server.run()
        notify("STOPPING=1")
    except (OSError, ValueError, zmq.ZMQError) as error:
        log.error("hcache: no prefetcher can serve %s: %s", config.listen or config.address, error)
        return FAILED
    finally:
        endpoint.socket.unlink(missing_ok=True)
        lock.release()
    return 0


def notify(state: str) -> None:
    """Tell systemd, where it started us (`Type=notify`)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
