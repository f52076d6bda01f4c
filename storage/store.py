"""The store of pages that lives in its user's own process."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.contract import ChunkStore, Stats
from sglang_hcache.storage.layout import FINGERPRINT_BYTES, ROOT, ChunkLayout, Record, seal
from sglang_hcache.storage.stripe import Place, Stripe
from sglang_hcache.storage.volume import Volume

__all__ = ["ChunkStore", "LocalStore", "Stats"]

SEGMENT_BYTES = 256 << 20
RETRY_S = 30.0
BATCH_PAGES = 64
BATCH_BYTES = 64 << 20
CLOSE_WAIT_S = 5.0  # twice at most; SGLang gives a stopping scheduler 15 s
READ_THREADS = 8

log = logging.getLogger(__name__)


class LocalStore:
    """A ChunkStore in this process: an arena, volumes, one thread that writes and a few that read.

    `fingerprint`: 16 bytes. `host_bytes`: bound of the arena. `directories`: striped; none for host memory only.
    `writable`: False reads files, but writes none. `segment_bytes`: size of a segment file. `retry_s`: how often a
    failed directory is tried again. `lease_limit`: fraction of the slots that may be leased in all. Raises
    ValueError for bad values; a directory that cannot be opened is skipped until it can.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        fingerprint: bytes,
        host_bytes: int,
        directories: Sequence[Path],
        *,
        writable: bool = True,
        segment_bytes: int = SEGMENT_BYTES,
        retry_s: float = RETRY_S,
        lease_limit: float = 0.5,
    ) -> None:
        if len(fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, not {len(fingerprint)}")
        if host_bytes < layout.record_bytes:
            raise ValueError(f"{host_bytes} bytes of host memory do not hold a page of {layout.record_bytes}")
        if not 0 < lease_limit <= 1:
            raise ValueError(f"lease_limit is {lease_limit}, not in (0, 1]")
        self.layout = layout
        self._fingerprint = fingerprint
        self._arena = Arena(host_bytes // layout.record_bytes, layout.record_bytes)
        self._lease_limit = max(1, int(self._arena.slots * lease_limit))
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._dirty: deque[tuple[bytes, int]] = deque()
        self._committed = self._settled = 0
        self._leases: dict[str, dict[bytes, int]] = {}
        self._reading = 0
        self._closing = False
        self._hits_host = self._hits_file = 0
        self._written = self._write_failed = self._reserve_failed = 0
        self._files = Stripe(
            [
                Volume(
                    Path(directory),
                    layout,
                    fingerprint,
                    writable=writable,
                    segment_bytes=segment_bytes,
                    retry_s=retry_s,
                )
                for directory in directories
            ]
        )
        self._new_page = Backing.DIRTY if writable and directories else Backing.UNBACKED
        self._tick_s = min(1.0, retry_s)
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="hcache-read")
        self._writer = threading.Thread(target=self._write_forever, name="hcache-write", daemon=True)
        self._writer.start()

    @property
    def memory(self) -> Record:
        return self._arena.memory

    def reserve(self) -> int | None:
        with self._lock:
            slot = self._arena.reserve()
            self._reserve_failed += slot is None
            return slot

    def abandon(self, slot: int) -> None:
        with self._lock:
            self._arena.abandon(slot)

    def commit(self, key: bytes, slot: int) -> None:
        with self._lock:
            if self._arena.slot_of(key) is not None:
                self._arena.abandon(slot)
                return
            self._arena.cache(key, slot, self._new_page)
            if self._new_page is Backing.DIRTY:
                self._dirty.append((key, slot))
                self._committed += 1
                self._changed.notify_all()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        with self._lock:
            held = {key for key in keys if self._arena.slot_of(key) is not None}
        held |= self._files.locate(key for key in keys if key not in held).keys()
        return [key in held for key in keys]

    def lease(self, owner: str, keys: Sequence[bytes]) -> list[int]:
        with self._lock:
            wanted, pins = self._pin_cached(owner, keys)
        places = self._files.locate(key for key in wanted if key not in pins)
        run = _leading(wanted, pins.keys() | places.keys())
        with self._lock:
            opened = self._open_missing(run, pins)
        sound = self._read([(key, slot, places[key]) for key, slot in opened.items()])
        with self._lock:
            self._cache_read(opened, sound, pins)
            kept = {key: pins[key] for key in _leading(run, pins.keys())}
            self._arena.release(slot for key, slot in pins.items() if key not in kept)
            self._leases[owner] = kept
        return list(kept.values())

    def release(self, owner: str) -> None:
        with self._lock:
            self._arena.release(self._leases.pop(owner, {}).values())

    def flush(self, timeout_s: float) -> bool:
        with self._lock:
            goal = self._committed
            return self._changed.wait_for(lambda: self._settled >= goal, timeout_s)

    def drop_host(self) -> None:
        with self._lock:
            self._arena.evict_all()

    def check(self) -> None:
        """Assert that the arena's maps, the leases and the queue agree."""
        with self._lock:
            self._arena.check()
            leased = {slot for lease in self._leases.values() for slot in lease.values()}
            assert all(self._arena.is_leased(slot) for slot in leased)
            assert self._arena.leased + self._reading <= self._lease_limit
            assert self._arena.dirty == self._committed - self._settled

    def stats(self) -> Stats:
        volumes = self._files.volumes
        with self._lock:
            arena = self._arena
            stats: Stats = {
                "pages_total": arena.slots,
                "pages_host": arena.cached,
                "pages_dirty": arena.dirty,
                "pages_leased": arena.leased,
                "pages_open": arena.opened,
                "hits_host": self._hits_host,
                "hits_file": self._hits_file,
                "bytes_read": self._hits_file * self.layout.record_bytes,
                "pages_written": self._written,
                "bytes_written": self._written * self.layout.record_bytes,
                "pages_write_failed": self._write_failed,
                "reserve_failed": self._reserve_failed,
            }
        stats["pages_file"] = sum(volume.pages for volume in volumes)
        stats["pages_damaged"] = sum(volume.damage.pages for volume in volumes)
        stats["files_damaged"] = sum(volume.damage.files for volume in volumes)
        stats["index_rebuilt"] = sum(volume.damage.index_rebuilt for volume in volumes)
        stats["volumes"] = [
            {"path": str(v.path), "state": v.state, "pages": v.pages, "bytes": v.bytes_on_disk()} for v in volumes
        ]
        return stats

    def close(self) -> None:
        if self._closing:
            return
        flushed = self.flush(CLOSE_WAIT_S)
        with self._lock:
            self._closing = True
            given_up = len(self._dirty)
            self._dirty.clear()
            self._changed.notify_all()
        if not flushed:
            log.warning("hcache: %d pages were not written in %g s and are given up.", given_up, CLOSE_WAIT_S)
        self._readers.shutdown()
        self._writer.join(CLOSE_WAIT_S)
        if self._writer.is_alive():
            log.warning("hcache: a write hangs; files are left as they are, and tidied up by the next opening.")
            return
        self._files.close()

    def _pin_cached(self, owner: str, keys: Sequence[bytes]) -> tuple[list[bytes], dict[bytes, int]]:
        """Lease what is in memory of as many leading keys as may be leased; those keys, and the slots by key.

        Room is counted for pages that are still to be read, so that later ones in memory do not take it from them.
        """
        former = self._leases.pop(owner, {})
        wanted = dict.fromkeys(keys)
        self._arena.release(slot for key, slot in former.items() if key not in wanted)
        pins = {key: slot for key, slot in former.items() if key in wanted}
        room = self._lease_limit - self._arena.leased - self._reading
        run = []
        for key in wanted:
            slot = self._arena.slot_of(key)
            if slot is None or not self._arena.is_leased(slot):
                if room <= 0:
                    break
                room -= 1
            run.append(key)
            if slot is not None and key not in pins:
                self._pin(key, slot, pins)
        return run, pins

    def _pin(self, key: bytes, slot: int, pins: dict[bytes, int]) -> None:
        self._arena.lease(slot)
        self._hits_host += 1
        pins[key] = slot

    def _open_missing(self, run: Sequence[bytes], pins: dict[bytes, int]) -> dict[bytes, int]:
        """Slots, by key, to read the missing pages of the run into, as far as there are any."""
        opened: dict[bytes, int] = {}
        for key in run:
            if key in pins:
                continue
            cached = self._arena.slot_of(key)
            full = self._arena.leased + self._reading >= self._lease_limit
            if cached is not None and (not full or self._arena.is_leased(cached)):
                self._pin(key, cached, pins)
                continue
            slot = None if full or cached is not None else self._arena.reserve()
            if slot is None:
                break
            opened[key] = slot
            self._reading += 1
        return opened

    def _read(self, pages: Sequence[tuple[bytes, int, Place]]) -> list[bool]:
        """Read each page into its open slot; whether it is whole."""
        futures = [self._readers.submit(place.read, key, self.memory[slot]) for key, slot, place in pages]
        wait(futures)
        return [future.result() for future in futures]

    def _cache_read(self, opened: dict[bytes, int], sound: Sequence[bool], pins: dict[bytes, int]) -> None:
        for (key, slot), is_sound in zip(opened.items(), sound, strict=True):
            self._reading -= 1
            self._hits_file += is_sound
            cached = self._arena.slot_of(key)
            if cached is not None:  # another call was faster
                self._arena.abandon(slot)
            elif is_sound:
                self._arena.cache(key, slot, Backing.CLEAN)
                cached = slot
            else:
                self._arena.abandon(slot)
            if cached is not None:
                self._arena.lease(cached)
                pins[key] = cached

    def _write_forever(self) -> None:
        at_once = max(1, min(BATCH_PAGES, BATCH_BYTES // self.layout.record_bytes))
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._dirty or self._closing, self._tick_s)
                if self._closing:
                    return
                batch = [self._dirty.popleft() for _ in range(min(at_once, len(self._dirty)))]
            self._files.retry()
            if batch:
                self._write(batch)

    def _write(self, batch: Sequence[tuple[bytes, int]]) -> None:
        on_file = self._files.locate(key for key, _ in batch)
        pages = [(key, self.memory[slot]) for key, slot in batch if key not in on_file]
        try:
            for key, record in pages:
                seal(record, self.layout, self._fingerprint, key, ROOT)
            refused = self._files.write(pages)
        except Exception:  # a bug of ours must not end the thread: memory would fill with pages that wait for it
            log.exception("hcache: %d pages could not be written.", len(pages))
            refused = {key for key, _ in pages}
        with self._lock:
            for key, slot in reversed(batch):  # later pages are worth nothing without the earlier: evict them first
                self._arena.mark(slot, Backing.UNBACKED if key in refused else Backing.CLEAN)
            self._written += len(pages) - len(refused)
            self._write_failed += len(refused)
            self._settled += len(batch)
            self._changed.notify_all()


def _leading(keys: Sequence[bytes], there: Collection[bytes]) -> list[bytes]:
    return list(itertools.takewhile(lambda key: key in there, keys))
