"""The store of pages, in the process that owns its memory and its files."""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sglang_hcache.storage.arena import Arena
from sglang_hcache.storage.contract import Progress, Stats, WritePolicy
from sglang_hcache.storage.directory import Contents
from sglang_hcache.storage.fetch import Fetch, Fetches, Read
from sglang_hcache.storage.layout import FINGERPRINT_BYTES, ChunkLayout, Record, seal
from sglang_hcache.storage.rate_limit import RateLimit
from sglang_hcache.storage.stripe import PageFiles, Place, Stripe
from sglang_hcache.storage.volumes import figures, open_volumes
from sglang_hcache.storage.writer import Writer

SEGMENT_BYTES = 256 << 20
RETRY_S = 30.0
CLOSE_WAIT_S = 5.0  # twice at most: who stops a prefetcher, or a scheduler, gives it 15 s
READ_THREADS = 8  # for each volume
FIRST_LOOKUP = 64  # pages of a prompt that are looked up on file at first
BUG_PAUSE_S = 1.0  # of a thread that failed: it may fail again at once

logger = logging.getLogger(__name__)


class LocalStore:
    """A ChunkStore in this process: an arena, and volumes, each with a thread that writes and a few that read.

    `fingerprint`: 16 bytes. `host_bytes`: bound of the arena. `region`: memory for it, private memory by default.
    `directories`: striped; none for host memory only. `files`: used instead of these. `read_limit`: bounds how fast
    files are read. `segment_bytes`: size of a segment file. `quota_bytes`: bound of what each directory takes; by
    default as `Quota` has it. `about`: what the pages are of, for people. `retry_s`: how often a failed directory is
    tried again. `lease_limit`: fraction of the slots that may be leased in all. `on_progress`: called with an owner
    whose prefetch has come further, from any thread. Raises ValueError for bad values; a directory that cannot be
    opened is skipped until it can.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        fingerprint: bytes,
        host_bytes: int,
        directories: Sequence[Path],
        *,
        files: PageFiles | None = None,
        region: mmap.mmap | None = None,
        write_policy: WritePolicy = WritePolicy.WRITE_THROUGH,
        segment_bytes: int = SEGMENT_BYTES,
        quota_bytes: int | None = None,
        read_limit: RateLimit | None = None,
        about: Mapping[str, str] | None = None,
        retry_s: float = RETRY_S,
        lease_limit: float = 0.5,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        if len(fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, not {len(fingerprint)}")
        if host_bytes < layout.record_bytes:
            raise ValueError(f"{host_bytes} bytes of host memory do not hold a page of {layout.record_bytes}")
        if not 0 < lease_limit <= 1:
            raise ValueError(f"lease_limit is {lease_limit}, not in (0, 1]")
        self.layout = layout
        self._lease_limit = lease_limit
        self._fingerprint = fingerprint
        self._on_progress = on_progress
        self._read_limit = read_limit
        self._arena = Arena(host_bytes // layout.record_bytes, layout.record_bytes, region)
        self._lock = threading.Lock()
        self._progressed = threading.Condition(self._lock)
        self._fetches = Fetches(self._arena, self._most_leased, self._lock)
        self._closed = False
        self._hits_file = self._reserve_failed = 0
        contents = Contents(layout, fingerprint, segment_bytes, dict(about or {}))
        self._volumes = [] if files is not None else open_volumes(directories, contents, quota_bytes, retry_s)
        self._files = Stripe(self._volumes if files is None else [files])
        self._writer = Writer(
            self._arena,
            self._files,
            self._lock,
            self._seal,
            policy=write_policy,
            tick_s=min(1.0, retry_s),
            evictable=self._admit_waiting,
        )
        self._readers = [
            threading.Thread(target=self._read_forever, args=(volume,), name=f"hcache-read-{i}", daemon=True)
            for volume in self._files.volumes
            for i in range(READ_THREADS)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def alive(self) -> bool:
        return not self._closed

    @property
    def memory(self) -> Record:
        return self._arena.memory[: self._arena.slots]

    def parent(self, slot: int) -> bytes:
        """Of the page in a leased slot."""
        with self._lock:
            return self._arena.parent(slot)

    @property
    def _most_leased(self) -> int:
        """Slots that may be leased in all."""
        return max(1, int(self._arena.slots * self._lease_limit))

    def resize(self, slots: int, region: mmap.mmap) -> None:
        """Have so many slots from now on; what is in them stays. `region`: the same memory, of that size at least.

        Nobody may hold a slot, or use `memory` as it was. A page behind the last slot is a miss until it is on file.
        """
        with self._lock:
            self._arena.resize(slots, region)
            self._fetches.limit = self._most_leased

    def used_behind(self) -> bool:
        """Whether memory behind the last slot is still needed, for pages that are not on file yet."""
        with self._lock:
            return self._arena.used_behind

    def follow(self, policy: WritePolicy) -> None:
        """Write by this policy from now on."""
        with self._lock:
            self._writer.follow(policy)

    def reserve(self) -> int | None:
        with self._lock:
            slot = self._arena.reserve()
            self._reserve_failed += slot is None
            self._writer.reserved()
            return slot

    @property
    def available(self) -> int:
        """Slots that `reserve` can give now."""
        with self._lock:
            return self._arena.available

    def abandon(self, slot: int) -> None:
        with self._lock:
            self._arena.abandon(slot)

    def commit(self, key: bytes, slot: int, parent: bytes) -> None:
        with self._lock:
            cached = self._arena.slot_of(key)
            if cached is not None:
                self._arena.abandon(slot)
                self._writer.used(key, cached)
            else:
                self._writer.committed(key, slot, parent)
            self._fetches.committed(key)
            if self._fetches.waiting:
                self._writer.make_room()  # it may be put off until somebody does
        self._tell_progress()

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of the pages are in memory or named by an index. No promise: a file may turn out to be damaged.

        Looks up a memory-mapped index, reads no payloads.
        """
        with self._lock:
            held = {key for key in keys if self._arena.slot_of(key) is not None}
        held |= self._files.locate(key for key in keys if key not in held).keys()
        return [key in held for key in keys]

    def prefetch(
        self,
        owner: str,
        keys: Sequence[bytes],
        *,
        priority: int = 0,
        page_priority: int = 0,
    ) -> None:
        wanted, places, looked_up = self._look_up(list(dict.fromkeys(keys)))
        begun = False
        while not begun:
            with self._lock:
                missing = [key for key in wanted if self._arena.slot_of(key) is None and key not in looked_up]
            places |= self._files.locate(missing)
            looked_up.update(missing)
            with self._lock:
                slots = [self._arena.slot_of(key) for key in wanted]
                nowhere = (i for i, key in enumerate(wanted) if slots[i] is None and key not in places)
                end = next(nowhere, len(wanted))
                # Else that page has left memory meanwhile, and may be on file.
                if begun := end == len(wanted) or wanted[end] in looked_up:
                    run, to_read = wanted[:end], slots[:end].count(None)
                    fetch = Fetch(owner, run, places, priority + page_priority * to_read)
                    waits = self._begin(fetch, slots)
        if waits:  # what is in memory now may be on file only when there is room
            places |= self._files.locate(key for key in run if key not in places)
        self._tell_progress()

    def _look_up(self, keys: list[bytes]) -> tuple[list[bytes], dict[bytes, Place], set[bytes]]:
        """The keys up to the first that is nowhere, or some more; where they are on file; which were looked up there.

        More and more at a time: of a prompt that was never seen only a few are looked up.
        """
        places, looked_up = dict[bytes, Place](), set[bytes]()
        first, count = 0, FIRST_LOOKUP
        while first < len(keys):
            with self._lock:
                missing = [key for key in keys[first : first + count] if self._arena.slot_of(key) is None]
            found = self._files.locate(missing)
            places |= found
            looked_up.update(missing)
            first, count = first + count, 4 * count
            if len(found) < len(missing):
                break
        return keys[:first], places, looked_up

    def _begin(self, fetch: Fetch, slots: Sequence[int | None]) -> bool:
        """Whether it waits for room. `slots`: of its pages, where they are in memory."""
        for key, slot in zip(fetch.keys, slots, strict=False):
            if slot is not None:
                self._writer.used(key, slot)
        self._fetches.start(fetch)
        if self._fetches.waiting:
            self._writer.make_room()
        return not fetch.admitted

    def is_awaited(self, key: bytes) -> bool:
        """Whether somebody waits for a page that is being read."""
        with self._lock:
            return self._fetches.is_awaited(key)

    def progress(self, owner: str, first: int = 0) -> Progress:
        """Of the pages from `first` on."""
        with self._lock:
            return self._fetches.progress(owner, first)

    def wait(self, owner: str, timeout_s: float, *, until_known: bool = False) -> Progress:
        with self._lock:
            self._progressed.wait_for(
                lambda: self._fetches.progress(owner).ends_wait(until_known=until_known), timeout_s
            )
            return self._fetches.progress(owner)

    def took_s(self, owner: str) -> float:
        with self._lock:
            return self._fetches.took_s(owner)

    def cut(self, owner: str) -> None:
        with self._lock:
            self._fetches.cut(owner)
        self._tell_progress()

    def release(self, owner: str) -> None:
        with self._lock:
            self._fetches.release(owner)
        self._tell_progress()

    def flush(self, timeout_s: float) -> bool:
        with self._lock:
            return self._writer.flush(timeout_s)

    def drain(self) -> int:
        """Start writing the backlog, whatever the policy; returns how many pages are unwritten. Does not block."""
        with self._lock:
            return self._writer.drain()

    def drop_host(self) -> None:
        with self._lock:
            self._arena.evict_all()

    def check(self) -> None:
        """Assert that the arena's maps, the leases and the queue agree."""
        with self._lock:
            self._arena.check()
            self._fetches.check()
            assert self._arena.opened >= self._fetches.reading

    def stats(self) -> Stats:
        with self._lock:
            arena, writer, fetches = self._arena, self._writer, self._fetches
            stats: Stats = {
                "pages_total": arena.slots,
                "pages_free": arena.free,
                "pages_host": arena.cached,
                "pages_dirty": arena.dirty,
                "pages_leased": arena.leased,
                "pages_open": arena.opened,
                "pages_reading": fetches.reading,
                "prefetches_waiting": fetches.waiting,
                "hits_host": fetches.hits_host,
                "hits_file": self._hits_file,
                "bytes_read": self._hits_file * self.layout.record_bytes,
                "pages_written": writer.written,
                "bytes_written": writer.written * self.layout.record_bytes,
                "pages_write_failed": writer.failed,
                "pages_write_skipped": writer.skipped,
                "reserve_failed": self._reserve_failed,
            }
        return stats | figures(self._volumes)

    def close(self) -> bool:
        """False where a drive hangs: then a thread of ours may still come to write to `memory`, or read from it."""
        threads = [*self._writer.threads, *self._readers]
        if self._closed:
            return not any(thread.is_alive() for thread in threads)
        flushed = self.flush(CLOSE_WAIT_S)
        with self._lock:
            self._closed = True
            given_up = self._writer.stop()
            self._fetches.close()
        if not flushed:
            logger.warning("hcache: %d pages were not written in %g s and are given up.", given_up, CLOSE_WAIT_S)
        ended = _join(threads, CLOSE_WAIT_S)
        if not ended:
            logger.warning("hcache: a drive hangs; its files are left as they are: the next opening tidies up.")
        return ended

    def _seal(self, record: Record, key: bytes, parent: bytes) -> None:
        seal(record, self.layout, self._fingerprint, key, parent)

    def _admit_waiting(self) -> None:
        with self._lock:
            self._fetches.admit_waiting()
        self._tell_progress()

    def _read_forever(self, volume: PageFiles) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._read_next(volume)
            except Exception:  # a bug of ours must not end the thread: those who wait for pages would hang
                logger.exception("hcache: a reader failed, and goes on.")
                time.sleep(BUG_PAUSE_S)

    def _read_next(self, volume: PageFiles) -> bool:
        """Read the page that is next of a volume, as soon as there is one; False once closed."""
        with self._lock:
            if not self._fetches.wait_for_read(volume):
                return False
        read: Read | None = None
        sound, limit = False, self._read_limit
        try:
            with limit.turn if limit is not None else contextlib.nullcontext():
                with self._lock:
                    read = self._fetches.take_read(volume)
                if read is not None and limit is not None:
                    limit.take(self.layout.record_bytes)
            if read is not None:
                sound = read.place.read(read.key, self._arena.memory[read.slot])
        except Exception:
            if read is None:
                raise
            logger.exception("hcache: a page could not be read.")
        if read is not None:
            self._finish(read, sound=sound)
        return True

    def _finish(self, read: Read, *, sound: bool) -> None:
        with self._lock:
            self._hits_file += sound
            self._fetches.finish_read(read, sound=sound)
            if sound and (slot := self._arena.slot_of(read.key)) is not None:
                self._writer.used(read.key, slot)
        self._tell_progress()

    def _tell_progress(self) -> None:
        with self._lock:
            changed, self._fetches.changed = self._fetches.changed, set()
            if changed:
                self._progressed.notify_all()
        if self._on_progress is not None:
            for owner in changed:
                self._on_progress(owner)


def _join(threads: Sequence[threading.Thread], timeout_s: float) -> bool:
    """Wait for all, so long in all; whether they have ended."""
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
