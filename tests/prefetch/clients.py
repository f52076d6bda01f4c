"""Clients of real prefetchers, and processes that are clients."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.connection import Connection
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.remote import RemoteClient
from sglang_hcache.prefetch.supervisor import LocalSupervisor
from sglang_hcache.storage.layout import ROOT
from tests.storage.pages import FINGERPRINT, LAYOUT, fill, holds, key_of, keys_of

REPOSITORY = Path(__file__).parents[2]
SLOTS = 64
PATIENCE_S = 60.0  # with what comes in the background
children: list[subprocess.Popen[str]] = []  # the fixture `directory` ends those that are left


def hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "pid": os.getpid(),
        "name": "test",
        "fingerprint": FINGERPRINT,
        "page_tokens": LAYOUT.page_tokens,
        "layer_bytes": list(LAYOUT.layer_bytes),
        "host_bytes": SLOTS * LAYOUT.record_bytes,
        "grant": 8,
    }
    return Hello(**(values | changes))


def supervisor_of(directory: Path, **changes: Any) -> LocalSupervisor:
    return LocalSupervisor((str(directory),), None, lambda: hello(**changes))


def client_of(address: str, greeting: Hello, *, news: int = -1, **options: Any) -> PrefetchClient:
    return PrefetchClient(connection_to(address, greeting, **options), news=news)


def connection_to(address: str, greeting: Hello, *, timeout_s: float = PATIENCE_S, **options: Any) -> Connection:
    """As a supervisor makes it."""
    return Connection(address, greeting, timeout_s=timeout_s, **options)


def parent_of(page: int) -> bytes:
    return key_of(page - 1) if page else ROOT


def until(holds_: Callable[[], Any], timeout_s: float = PATIENCE_S) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not holds_():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def reserved(client: PrefetchClient | RemoteClient, timeout_s: float = PATIENCE_S) -> int:
    slots: list[int] = []

    def got() -> bool:
        slot = client.reserve()
        if slot is not None:
            slots.append(slot)
        return bool(slots) or not client.alive

    assert until(got, timeout_s), "no slot was granted"
    if not slots:
        raise Gone
    return slots[0]


class Gone(Exception):
    """The prefetcher died."""


def save(client: PrefetchClient, pages: Iterable[int]) -> None:
    for page in pages:
        slot = reserved(client)
        fill(client.memory[slot], page)
        client.commit(key_of(page), slot, parent_of(page))


def fetched(
    client: PrefetchClient, pages: Sequence[int], owner: str = "fetched", timeout_s: float = PATIENCE_S
) -> int:
    """How many of the pages can be had in a run; asserts that they are right."""
    client.prefetch(owner, keys_of(pages))
    slots, done, *_ = client.wait(owner, timeout_s)
    assert done, "a prefetch hangs"
    for slot, page in zip(slots, pages, strict=False):
        assert holds(client.memory[slot], page), f"a wrong page was served for {page}"
    client.release(owner)
    return len(slots)


def figures(client: PrefetchClient) -> dict[str, int]:
    return {name: value for name, value in client.stats().items() if isinstance(value, int)}


def settle(*clients: PrefetchClient) -> None:
    """The prefetcher has handled what they have sent and granted what it could, and they have what it has sent.

    It grants before it answers a flush; twice, as those who hear of a smaller share give slots back.
    """
    for client in clients * 2:
        assert client.flush(PATIENCE_S)


def assert_nothing_held(client: PrefetchClient, timeout_s: float = PATIENCE_S) -> None:
    """Nothing is leased or on its way, and no slots are open but those this client may fill."""
    last: dict[str, int] = {}

    def free() -> bool:
        last.update(figures(client))
        held = ("pages_leased", "pages_reading", "prefetches_waiting")
        return not any(last[name] for name in held) and last["pages_open"] == last["pages_granted"]

    assert until(free, timeout_s), last


def child(role: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.prefetch.child", role, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(process)
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the process has ended"
    return line.strip()


def tell(process: subprocess.Popen[str]) -> None:
    """What it waits for: a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def prefetchers(directory: Path) -> list[psutil.Process]:
    """The running prefetchers of a directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if "sglang_hcache.prefetch" in command and f'"{directory}"' in command[-1]:
            found.append(process)
    return [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]


def sums(client: PrefetchClient) -> int:
    return int(np.asarray(client.memory).sum(dtype=np.uint64))
