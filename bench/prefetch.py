"""The prefetcher against reading in one's own process, and what a message costs.

    python -m bench.prefetch [--json] [--dir D] [--pages N] [--rounds N] [--messages N] [--save]

Method: pages of 8 layers of 256 KiB (64 tokens of 2,048 bfloat16) are stored and flushed. Then a client of a
prefetcher process and a LocalStore in this process, with memory of the same kind (memfd), over directories of equal
content, take turns: ask for all pages as one prefetch, and copy each page, in order, out of its slot as soon as it
is announced, as a restore does. `warm`: the pages lie in the arena; `cold`: only in files, which are read past the
page cache where the file system allows it, and are dropped from it otherwise. Every checksum of a cold page is
verified by both. Medians over the rounds, after one that warms up. `stream_ratio` is the client's rate over that of
the own process. `first_chunk_ms`: from the call to the first page that may be copied. `control_*_ms`: round trips of
a question for one key, paced at 1,000 a second. `remote`: two clients over tcp:// on loopback with CURVE keys; one
stores the pages, the other fetches them from the prefetcher's memory into its own, verified, and copies them.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import about, arguments_of, emit, progress
from bench.storage import drop_from_cache, key_of
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.endpoint import endpoint_for, is_running
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.remote import RemoteClient
from sglang_hcache.prefetch.supervisor import LocalSupervisor, RemoteSupervisor
from sglang_hcache.storage.direct import refusal
from sglang_hcache.storage.layout import ROOT, ChunkLayout
from sglang_hcache.storage.region import Region
from sglang_hcache.storage.store import LocalStore

LAYOUT = ChunkLayout(page_tokens=64, layer_bytes=(256 << 10,) * 8)
FINGERPRINT = b"bench prefetcher"
RATE = 1000  # messages a second
POLL_S = 0.0002
TIMEOUT_S = 120.0

Store = PrefetchClient | RemoteClient | LocalStore


def fill(store: Store, pages: int) -> None:
    """Store random pages and wait until they are in files."""
    content = np.random.default_rng(0).integers(0, 256, LAYOUT.record_bytes, np.uint8)
    for page in range(pages):
        while (slot := store.reserve()) is None:
            time.sleep(0.001)
        store.memory[slot] = content
        store.memory[slot, LAYOUT.layer_offset(0)] = page % 256
        store.commit(key_of(page), slot, key_of(page - 1) if page else ROOT)
    if not store.flush(TIMEOUT_S):
        raise RuntimeError("the pages could not be written")


def stream(store: Store, keys: Sequence[bytes], target: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[float, float]:
    """Seconds until all pages are copied to `target`, uint8 [record_bytes], and until the first may be."""
    began = time.perf_counter()
    store.prefetch("bench", keys)
    copied, first_s = 0, 0.0
    while copied < len(keys):
        slots, done, *_ = store.progress("bench")
        if len(slots) == copied:
            if done:
                raise RuntimeError(f"only {copied} of {len(keys)} pages can be had")
            time.sleep(POLL_S)
            continue
        first_s = first_s or time.perf_counter() - began
        for slot in slots[copied:]:
            target[:] = store.memory[slot]
        copied = len(slots)
    total_s = time.perf_counter() - began
    store.release("bench")
    return total_s, first_s


def measure_streams(client: PrefetchClient, own: LocalStore, folder: Path, pages: int, rounds: int) -> dict[str, Any]:
    keys = [key_of(page) for page in range(pages)]
    target = np.empty(LAYOUT.record_bytes, np.uint8)
    report: dict[str, Any] = {"stream_ratio": {}, "gb_s": {}, "first_chunk_ms": {}}
    stores: dict[str, Store] = {"prefetcher": client, "own_process": own}
    for state in ("warm", "cold"):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in stores}
        for round_ in range(rounds + 1):
            for name, store in stores.items():
                if state == "cold":
                    _drop(store, folder)
                result = stream(store, keys, target)
                if round_:
                    times[name].append(result)
            progress(f"{state}: round {round_} of {rounds}")
        seconds = {name: statistics.median(total for total, _ in of) for name, of in times.items()}
        report["gb_s"][state] = {name: pages * LAYOUT.record_bytes / s / 1e9 for name, s in seconds.items()}
        report["stream_ratio"][state] = seconds["own_process"] / seconds["prefetcher"]
        report["first_chunk_ms"][state] = 1000 * statistics.median(first for _, first in times["prefetcher"])
    return report


def measure_control(client: PrefetchClient | RemoteClient, messages: int) -> dict[str, float]:
    """Round trips of a Lookup, in ms."""
    times = []
    due = time.perf_counter()
    for page in range(messages):
        due += 1 / RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter()
        if client.contains([key_of(page)]) and not client.alive:
            raise RuntimeError(client.why_ended)
        times.append(1000 * (time.perf_counter() - began))
    cut = statistics.quantiles(times, n=1000)
    return {"control_p50_ms": cut[499], "control_p99_ms": cut[989], "control_p999_ms": cut[998], "messages": messages}


def measure_remote(folder: Path, pages: int, rounds: int, messages: int) -> dict[str, float]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    hcache = [sys.executable, "-m", "sglang_hcache.cli.main"]
    subprocess.run(
        [*hcache, "keygen", str(folder / "keys"), "--client", "one", "--client", "other"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    command = [*hcache, "prefetcher", "--dir", str(folder / "store"), "--listen", address]
    prefetcher = subprocess.Popen([*command, "--keys", str(folder / "keys")])
    greeting = hello(int(pages * 2.5) * LAYOUT.record_bytes)
    try:
        clients = [
            RemoteSupervisor(address, str(folder / "keys" / name), lambda: greeting).open(20)
            for name in ("one", "other")
        ]
        fill(clients[0], pages)
        target, times = np.empty(LAYOUT.record_bytes, np.uint8), []
        for _ in range(rounds + 1):
            clients[1].drop_host()
            times.append(stream(clients[1], [key_of(page) for page in range(pages)], target))
        control = measure_control(clients[1], messages)
        for client in clients:
            client.close()
    finally:
        prefetcher.terminate()
        prefetcher.wait()
    return {
        "gb_s": pages * LAYOUT.record_bytes / statistics.median(total for total, _ in times[1:]) / 1e9,
        "first_chunk_ms": 1000 * statistics.median(first for _, first in times[1:]),
        **control,
    }


def hello(host_bytes: int) -> Hello:
    return Hello(
        pid=os.getpid(),
        name="bench",
        fingerprint=FINGERPRINT,
        page_tokens=LAYOUT.page_tokens,
        layer_bytes=list(LAYOUT.layer_bytes),
        host_bytes=host_bytes,
        grant=64,
    )


def run(folder: Path, pages: int, rounds: int, messages: int) -> dict[str, Any]:
    """The report; its keys are what `--json` prints."""
    host_bytes = int(pages * 2.5) * LAYOUT.record_bytes
    theirs, ours = folder / "prefetcher", folder / "own-process"

    supervisor = LocalSupervisor((str(theirs),), None, lambda: hello(host_bytes))
    client = supervisor.open()
    region = Region.create("hcache-bench", host_bytes)
    own = LocalStore(LAYOUT, FINGERPRINT, host_bytes, [ours], region=region.memory)
    try:
        for store in (client, own):
            fill(store, pages)
        return {
            **measure_streams(client, own, folder, pages, rounds),
            **measure_control(client, messages),
            "remote": measure_remote(folder / "remote", min(pages, 64), rounds, messages),
            "pages": pages,
            "page_bytes": LAYOUT.record_bytes,
            "direct": refusal(folder) is None,
            "rounds": rounds,
            **about(__doc__),
        }
    finally:
        own.close()
        client.close()
        supervisor.close()
        while is_running(endpoint_for((str(theirs),))):
            time.sleep(0.01)


def _drop(store: Store, folder: Path) -> None:
    """Leave the pages in files alone."""
    store.drop_host()
    store.contains([key_of(0)])  # answered after what was sent before
    for path in folder.rglob("*.seg"):
        drop_from_cache(path)


def lines(report: dict[str, Any]) -> Iterator[str]:
    for state, ratio in report["stream_ratio"].items():
        rate, first = report["gb_s"][state]["prefetcher"], report["first_chunk_ms"][state]
        yield (
            f"{state}: {rate:.2f} GB/s, {ratio:.2f} of reading in one's own process; first page after {first:.1f} ms"
        )
    yield f"a round trip: {report['control_p50_ms']:.2f} ms, 99 % within {report['control_p99_ms']:.2f} ms"
    remote = report["remote"]
    yield f"over TCP with CURVE: {remote['gb_s']:.2f} GB/s; 99 % of round trips in {remote['control_p99_ms']:.2f} ms"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--dir", type=Path, help="where files go; default: a temporary folder")
    parser.add_argument("--pages", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hcache-prefetch-", dir=arguments.dir) as folder:
        report = run(Path(folder), arguments.pages, arguments.rounds, arguments.messages)
    emit(arguments, "prefetch", report, lines(report))


if __name__ == "__main__":
    main()
