"""A process that is a client, for tests that kill it.

Usage: `python -m tests.prefetch.child ROLE DIRECTORY [ARGUMENT]` in the repository.
"""

from __future__ import annotations

import faulthandler
import random
import select
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from sglang_hcache.prefetch import client as client_module
from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch import process
from sglang_hcache.prefetch.endpoint import endpoint_for
from sglang_hcache.prefetch.server import ServerConfig
from sglang_hcache.storage.fetch import Fetches, Read
from sglang_hcache.storage.layout import ROOT, Record
from sglang_hcache.storage.rate_limit import RateLimit
from sglang_hcache.storage.segment import SegmentReader, SegmentWriter
from sglang_hcache.storage.stripe import PageFiles, Place, Stripe
from tests.prefetch.clients import PATIENCE_S, Gone, fetched, figures, save, supervisor_of
from tests.prefetch.raw import Raw
from tests.storage.pages import keys_of


def hold(directory: Path, pages: str) -> None:
    """Open a session, lease pages 0.., keep grants, report the prefetcher's process, and stay."""
    client = supervisor_of(directory).open()
    client.prefetch("held", keys_of(range(int(pages))))
    slots = client.wait("held", PATIENCE_S).slots
    print(client.prefetcher_pid, len(slots), flush=True)
    sys.stdin.readline()
    client.close()


def join(directory: Path, at: str) -> None:
    """Open a session at a point in time, report the prefetcher's process, and stay."""
    time.sleep(max(0.0, float(at) - time.time()))
    client = supervisor_of(directory).open()
    print(client.prefetcher_pid, flush=True)
    sys.stdin.readline()
    client.close()


def read_when_told(directory: Path, _: str) -> None:
    """Be a prefetcher whose drive hangs until a line comes."""
    told = line_comes()

    def read(reader: SegmentReader, slot: int, out: Record, read: Any = SegmentReader.read) -> None:
        told.wait()
        read(reader, slot, out)

    SegmentReader.read = read  # type: ignore[method-assign, assignment]
    process.serve(ServerConfig(endpoint_for([str(directory)]).address, (str(directory),)))


def fail_to_look_up(directory: Path, page: str) -> None:
    """Be a prefetcher with a bug in each prefetch of a page."""

    def locate(files: Stripe, keys: Iterable[bytes], locate: Any = Stripe.locate) -> dict[bytes, Place]:
        if keys_of([int(page)])[0] in (wanted := list(keys)):
            raise ZeroDivisionError
        found: dict[bytes, Place] = locate(files, wanted)
        return found

    Stripe.locate = locate  # type: ignore[method-assign, assignment]
    process.serve(ServerConfig(endpoint_for([str(directory)]).address, (str(directory),)))


def write_when_told(directory: Path, _: str) -> None:
    """Be a prefetcher whose disk takes nothing until a line comes."""
    told = line_comes()

    def sync(writer: SegmentWriter, sync: Any = SegmentWriter.sync) -> None:
        told.wait()
        sync(writer)

    SegmentWriter.sync = sync  # type: ignore[method-assign, assignment]
    process.serve(ServerConfig(endpoint_for([str(directory)]).address, (str(directory),)))


def read_in_turn(_: Path, config: str) -> None:
    """Be a prefetcher that says which page it reads next, and whose first read lasts until a line comes."""
    told = line_comes()

    def take_read(fetches: Fetches, volume: PageFiles, take: Any = Fetches.take_read) -> Read | None:
        read: Read | None = take(fetches, volume)
        if read is not None:
            print(read.key.hex(), flush=True)
        return read

    Fetches.take_read = take_read  # type: ignore[method-assign, assignment]
    RateLimit.take = lambda *_: told.wait() and None  # type: ignore[method-assign, assignment]
    process.serve(msgspec.json.decode(config, type=ServerConfig))


def look_often(directory: Path, touch_s: str) -> None:
    """Be a prefetcher that looks every `touch_s` whether it can still be found."""
    process.TOUCH_S = float(touch_s)
    process.serve(ServerConfig(endpoint_for([str(directory)]).address, (str(directory),)))


def be_the_next_versions(directory: Path, _: str) -> None:
    """Be a prefetcher where the next version of the protocol looks for one."""
    m.VERSION += 1
    sys.exit(process.serve(ServerConfig(endpoint_for([str(directory)]).address, (str(directory),))))


def leave(directory: Path, _: str) -> None:
    """Say goodbye and end at the same moment."""
    raw = Raw(directory)
    raw.open(grant=1)
    print("ready", flush=True)
    sys.stdin.readline()
    raw.say(m.Bye())
    raw.close()


def commit(directory: Path, pages: str) -> None:
    """Commit pages 0.., and end at the same moment, without a goodbye."""
    raw = Raw(directory)
    raw.open(grant=int(pages))
    slots = raw.hear(m.Granted).slots
    print("ready", flush=True)
    sys.stdin.readline()
    for key, slot in zip(keys_of(range(int(pages))), slots, strict=True):
        raw.say(m.Commit(pages=[m.Page(key, ROOT, slot)]))
    raw.close()


def never_read(directory: Path, _: str) -> None:
    """Ask and ask, and say nonsense, without ever reading an answer."""
    raw = Raw(directory)
    raw.open()
    for _number in range(30_000):
        raw.say(m.Lookup(keys=keys_of(range(20))))
    while True:
        raw.send(m.PREFIX + b"nonsense")


def load(directory: Path, seed: str) -> None:
    """Store, look up, fetch and cancel until told to stop; sessions are replaced as a scheduler does it.

    Each page that was flushed must be there in all sessions to come, and right. Reports what it did.
    """
    client_module.ASK_S = PATIENCE_S  # `contains` calls missing whatever is not answered in time
    chance = random.Random(seed)
    first = 100_000 * int(seed)
    supervisor = supervisor_of(directory)
    client = supervisor.open()
    durable = written = fetches = short = 0
    print("session", client.prefetcher_pid, flush=True)
    stop_at = float("inf")
    while time.monotonic() < stop_at:
        if not client.alive:
            gone = client
            supervisor.replace(gone)
            while (taken := supervisor.take_next()) is None:
                time.sleep(0.002)
            client, written = taken, durable
            print("session", client.prefetcher_pid, flush=True)
        try:
            batch = chance.randrange(1, 6)
            save(client, range(first + written, first + written + batch))
            written += batch
            if chance.random() < 0.5 and client.flush(PATIENCE_S):
                durable = written
        except Gone:
            continue
        start = chance.randrange(max(1, durable - 20)) if durable else 0
        wanted = range(first + start, first + min(durable, start + chance.randrange(1, 20)))
        if wanted:
            all_there = client.contains(keys_of(wanted))
            owner = f"request {fetches % 7}"
            if chance.random() < 0.2:
                client.prefetch(owner, keys_of(wanted), priority=chance.randrange(3))
                (client.cut if chance.random() < 0.5 else client.release)(owner)
            else:
                deadline = time.monotonic() + PATIENCE_S
                while (found := fetched(client, wanted, owner)) < len(wanted) and client.alive:
                    short += 1  # memory is full of what others lease, or of pages still to be written
                    assert time.monotonic() < deadline, f"{found} of {len(wanted)} pages"
                fetches += 1
                if client.alive:
                    assert all(all_there), "a page that was on file is not found"
        if chance.random() < 0.1:
            client.drop_host()
        if client.alive and stop_at == float("inf") and told_to_stop():
            stop_at = 0.0
    save(client, range(first + written, first + written + 1))
    assert client.flush(PATIENCE_S)
    print("done", first, durable, fetches, short, figures(client)["pages_damaged"], flush=True)
    client.close()
    supervisor.close()


def line_comes() -> threading.Event:
    came = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        came.set()

    threading.Thread(target=listen, daemon=True).start()
    return came


def told_to_stop() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(900, exit=True)
    role, directory, argument = [*sys.argv[1:], ""][:3]
    globals()[role](Path(directory), argument)
