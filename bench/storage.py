"""Storage against fio: chunk reads and writes, look-ups in a large index, and SGLang's one-file-a-page layout.

    python -m bench.storage [--json] [--dir D] [--size-gb N] [--index-pages N] [--rounds N] [--quick] [--save]

Method: pages of 16 layers of 64 KiB are written through Directory.write, 64 at a time, each batch made durable and
indexed. fio writes as much beside it, with the same block size (a record), queue depth, direct I/O if ours is
direct, and fdatasync after as many blocks. Then our reader and fio (libaio) take turns on the same segment files:
every record from first to last; the same blocks, the same queue depth, and as many buffers as I/Os are in flight, as
fio has them; `read_spread` and what is compared with the file backend go to 64 records of memory, which costs cache
misses. Our bytes over the wall-clock time around all of it, in Python; fio's as fio reports them. Reads through
Directory.read, with every checksum verified, are stated apart. SGLang's file backend is played by files of one
record, opened and read into memory one after another as HiCacheFile.get does, after fsync and POSIX_FADV_DONTNEED;
ours are direct, or dropped from the page cache in the same way. Medians over the rounds, after one that warms up. The
index is measured by itself: keys in random order, 128 a call, through Directory.locate; `reopen_s` is the opening of
that directory, check included, by a process that has it alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import about, arguments_of, emit, progress
from sglang_hcache.storage.arena import Arena
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.direct import refusal, run_parallel
from sglang_hcache.storage.directory import WRITES_IN_FLIGHT, Contents, Directory
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_check import Entry
from sglang_hcache.storage.layout import ROOT, ChunkLayout, seal
from sglang_hcache.storage.segment import SegmentReader

LAYOUT = ChunkLayout(page_tokens=64, layer_bytes=(64 << 10,) * 16)
INDEX_LAYOUT = ChunkLayout(page_tokens=64, layer_bytes=(4096,))
FINGERPRINT = b"bench of storage"
SEGMENT_BYTES = 4 << 30  # one file: fio's jobs would otherwise be too short to be timed
BATCH = 64  # records written at once
READS_IN_FLIGHT = 8
KEYS_A_CALL = 128
LOOKUPS = 500_000


@dataclass
class Rates:
    """GB/s of each measurement, by name, a value a round."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, n_bytes: int, seconds: float) -> None:
        self.of.setdefault(name, []).append(n_bytes / seconds / 1e9)

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    def ratio(self, ours: str, other: str) -> float:
        return self.median(ours) / self.median(other)


def key_of(page: int) -> bytes:
    return hashlib.sha256(b"%d" % page).digest()


class Transfers:
    """Our directory, fio and plain files in one folder, with as many records each."""

    def __init__(self, folder: Path, records: int) -> None:
        self.folder = folder
        self.keys = [key_of(page) for page in range(records)]
        self.size = records * LAYOUT.record_bytes
        self.memory = Arena(BATCH, LAYOUT.record_bytes).memory
        self.memory[:] = np.random.default_rng(0).integers(0, 256, self.memory.shape, np.uint8)
        self.direct = refusal(folder) is None
        self.rates = Rates()

    def write_ours(self) -> None:
        """A fresh directory; sealing is not counted, as a store seals whichever way it writes."""
        path = self.folder / "ours"
        shutil.rmtree(path, ignore_errors=True)
        directory, seconds = _open(path, LAYOUT), 0.0
        for start in range(0, len(self.keys), BATCH):
            pages = list(zip(self.keys[start : start + BATCH], self.memory, strict=False))
            for key, record in pages:
                seal(record, LAYOUT, FINGERPRINT, key, ROOT)
            seconds += _timed(lambda pages=pages: directory.write(pages))  # type: ignore[misc]
        directory.close()
        self.rates.add("write", self.size, seconds)

    def write_fio(self) -> None:
        path = self.folder / "fio"
        path.mkdir(exist_ok=True)
        options = ["--rw=write", f"--fdatasync={BATCH}", f"--directory={path}", f"--size={self.size}"]
        self._fio("fio_write", WRITES_IN_FLIGHT, ["--name=w", f"--bs={LAYOUT.record_bytes}", *options])
        shutil.rmtree(path)

    def read_ours(self) -> None:
        directory = _open(self.folder / "ours", LAYOUT)
        places = directory.locate(self.keys)
        assert len(places) == len(self.keys), "not every page that was written is in the index"
        io = directory._segments.io
        readers = {name: SegmentReader(self._segment(name), LAYOUT.record_bytes, io) for name in self._names()}
        records = [(readers[entry.segment], entry.slot) for entry in places.values()]
        self._drop(readers)
        for name, buffers in (("read", READS_IN_FLIGHT), ("read_spread", BATCH)):
            whole = [partial(reader.read, slot, self.memory[i % buffers]) for i, (reader, slot) in enumerate(records)]
            self._measure(name, self.size, whole)
            self._drop(readers)
        checked = [
            partial(_read_sound, directory, key, entry, self.memory[i % BATCH])
            for i, (key, entry) in enumerate(places.items())
        ]
        self._measure("verified", self.size, checked)
        directory.close()

    def read_fio(self) -> None:
        names = ":".join(str(self._segment(name)) for name in self._names())
        options = [f"--filename={names}", "--file_service_type=sequential", "--rw=read", "--readonly"]
        self._fio("fio_read", READS_IN_FLIGHT, ["--name=r", f"--bs={LAYOUT.record_bytes}", *options])

    def read_files(self) -> None:
        path = self.folder / "files"
        if not path.exists():
            path.mkdir()
            for i, key in enumerate(self.keys):
                self.memory[i % BATCH].tofile(path / f"{key.hex()}.bin")
        for file in path.iterdir():
            drop_from_cache(file)

        def read() -> None:
            for i, key in enumerate(self.keys):
                with open(path / f"{key.hex()}.bin", "rb", buffering=0) as file:
                    assert file.readinto(self.memory[i % BATCH].data) == LAYOUT.record_bytes

        self.rates.add("file_backend", self.size, _timed(read))

    def _measure(self, name: str, n_bytes: int, jobs: Sequence[Callable[[], object]]) -> None:
        self.rates.add(name, n_bytes, _timed(lambda: run_parallel(jobs, READS_IN_FLIGHT)))

    def _fio(self, name: str, depth: int, job: Sequence[str]) -> None:
        common = ["--ioengine=libaio", f"--iodepth={depth}", f"--direct={int(self.direct)}", "--invalidate=1"]
        command = ["fio", "--output-format=json", job[0], *common, *job[1:]]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        kind = "write" if "write" in name else "read"
        done = report["jobs"][0][kind]
        self.rates.add(name, done["io_bytes"], done["runtime"] / 1e3)

    def _segment(self, name: str) -> Path:
        return self.folder / "ours" / "segments" / FINGERPRINT.hex() / f"{name}.seg"

    def _names(self) -> list[str]:
        folder = self.folder / "ours" / "segments" / FINGERPRINT.hex()
        return sorted(path.stem for path in folder.glob("*.seg"))

    def _drop(self, names: Iterator[str] | dict[str, SegmentReader]) -> None:
        for name in names:
            drop_from_cache(self._segment(name))


def measure_transfers(folder: Path, records: int, rounds: int) -> dict[str, Any]:
    transfers = Transfers(folder, records)
    steps = (transfers.write_ours, transfers.write_fio, transfers.read_ours, transfers.read_fio, transfers.read_files)
    for round_ in range(rounds + 1):
        for step in steps if round_ % 2 == 0 else (steps[1], steps[0], steps[3], steps[2], steps[4]):
            progress(f"round {round_} of {rounds}: {step.__name__}")
            step()
        if round_ == 0:
            transfers.rates = Rates()
    rates = transfers.rates
    return {
        "direct": transfers.direct,
        "read_ratio": rates.ratio("read", "fio_read"),
        "write_ratio": rates.ratio("write", "fio_write"),
        "file_backend_ratio": rates.ratio("read_spread", "file_backend"),
        "file_backend_verified_ratio": rates.ratio("verified", "file_backend"),
        "verified_read_gb_s": rates.median("verified"),
        "gb_s": {name: rates.median(name) for name in rates.of},
        "gb_s_rounds": rates.of,
        "record_bytes": LAYOUT.record_bytes,
        "file_bytes": transfers.size,
        "reads_in_flight": READS_IN_FLIGHT,
        "writes_in_flight": WRITES_IN_FLIGHT,
    }


def measure_index(folder: Path, pages: int, rounds: int) -> dict[str, Any]:
    """An index of as many pages; their records are a hole in one segment file."""
    path = folder / "index"
    segment = "0123456789abcdef"
    directory = _open(path, INDEX_LAYOUT)
    directory.close()
    hole = path / "segments" / FINGERPRINT.hex() / f"{segment}.seg"
    hole.touch(mode=0o600)
    os.truncate(hole, pages * INDEX_LAYOUT.record_bytes)
    keys = [key_of(page) for page in range(pages)]
    index = Index(path / "index", FINGERPRINT)
    index.put_many(sorted((key, Entry(segment, slot)) for slot, key in enumerate(keys)))
    index.close()
    progress(f"an index of {pages} pages: opening, looking up")
    opened: list[Directory] = []
    reopen_s = []
    for _ in range(rounds):
        reopen_s.append(_timed(lambda: opened.append(_open(path, INDEX_LAYOUT))))
        if len(reopen_s) < rounds:
            opened.pop().close()
    asked = random.Random(1).choices(keys, k=min(pages, LOOKUPS))
    mixed = [key if i % 2 else hashlib.sha256(key).digest() for i, key in enumerate(asked)]
    hits, misses = ([_lookups_per_s(opened[0], keys) for _ in range(rounds + 1)][1:] for keys in (asked, mixed))
    opened[0].close()
    return {
        "index_pages": pages,
        "lookup_pages_per_s": statistics.median(hits),
        "lookup_half_misses_pages_per_s": statistics.median(misses),
        "reopen_s": statistics.median(reopen_s),
    }


def _lookups_per_s(directory: Directory, keys: list[bytes]) -> float:
    calls = [keys[start : start + KEYS_A_CALL] for start in range(0, len(keys), KEYS_A_CALL)]
    return len(keys) / _timed(lambda: [directory.locate(call) for call in calls])


def _open(path: Path, layout: ChunkLayout) -> Directory:
    return Directory(path, Contents(layout, FINGERPRINT, SEGMENT_BYTES), damage=Damage())


def _read_sound(directory: Directory, key: bytes, entry: Entry, out: Any) -> None:
    if not directory.read(key, entry, out):
        raise RuntimeError("a page came back damaged")


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _require_fio() -> str:
    """fio's version."""
    if shutil.which("fio") is None:
        sys.exit("bench.storage compares with fio, which is not here: install it (Debian: apt-get install fio).")
    return subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout.strip()


def _file_system(path: Path) -> str:
    return subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], check=True, capture_output=True, text=True
    ).stdout.strip()


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hcache-storage-", dir=parent) as folder:
        yield Path(folder)


def lines(report: dict[str, Any]) -> Iterator[str]:
    for name, rate in report["gb_s"].items():
        yield f"{name:>14}: {rate:6.2f} GB/s"
    yield f"look-ups: {report['lookup_pages_per_s']:,.0f} pages/s; opening: {report['reopen_s']:.1f} s"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--dir", type=Path, help="folder on the disk to measure; default: that of temporary files")
    parser.add_argument("--size-gb", type=float, default=1.0, help="data each of ours, fio's and the plain files")
    parser.add_argument("--index-pages", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small slice: 64 MB, 20,000 pages, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size_gb, arguments.index_pages, arguments.rounds = 0.064, 20_000, 1
    fio = _require_fio()
    records = max(BATCH, int(arguments.size_gb * 1e9) // LAYOUT.record_bytes // BATCH * BATCH)
    with _folder(arguments.dir) as folder:
        report = measure_transfers(folder, records, arguments.rounds)
        report |= measure_index(folder, arguments.index_pages, arguments.rounds)
        file_system = _file_system(folder)
    report |= {
        "rounds": arguments.rounds,
        **about(__doc__, machine={"file_system": file_system}, versions={"fio": fio, "kernel": platform.release()}),
    }
    emit(arguments, "storage", report, lines(report))


if __name__ == "__main__":
    main()
