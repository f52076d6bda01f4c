"""Writing pages to files in the background, when the policy says so."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.stripe import Stripe

BATCH_PAGES = 64
BATCH_BYTES = 64 << 20
SELECTIVE_USES = 2  # SGLang's threshold for the policy of that name
SHORT_OF_SLOTS = 0.25  # write_back begins when fewer slots than this fraction can be reserved
TOUCH_EVERY_S = 5.0

log = logging.getLogger(__name__)

Seal = Callable[[Record, bytes, bytes], None]  # record, key, parent


class Writer:
    """One thread, and the queue of pages it writes. `lock` guards everything but the writing itself.

    `seal` completes a record before it is written; `settled` is called, without the lock, once pages can be evicted.
    """

    def __init__(
        self,
        arena: Arena,
        files: Stripe,
        lock: threading.Lock,
        seal: Seal,
        *,
        policy: WritePolicy,
        tick_s: float,
        settled: Callable[[], None],
    ) -> None:
        self._arena = arena
        self._files = files
        self._lock = lock
        self._changed = threading.Condition(lock)
        self._seal = seal
        self._policy = policy
        self._tick_s = tick_s
        self._settled = settled
        self._queue: OrderedDict[int, bytes] = OrderedDict()  # slot → key, to be written now
        self._backlog: OrderedDict[int, bytes] = OrderedDict()  # to be written when slots get short
        self._refused: OrderedDict[int, bytes] = OrderedDict()  # to be written when a directory works again
        self._parents: dict[int, bytes] = {}  # by slot, as of its last commit
        self._uses: dict[int, int] = {}
        self._touched: Counter[bytes] = Counter()
        self._touch_at = 0.0
        self._draining = 0
        self._room_wanted = False
        self._closing = False
        self.written = self.failed = 0
        self.writing = 0
        self._thread = threading.Thread(target=self._run, name="hcache-write", daemon=True)
        self._thread.start()

    # ---- under the lock ----

    def committed(self, key: bytes, slot: int, parent: bytes) -> None:
        """A page that is in no file yet has been put into an open slot."""
        self._parents[slot] = parent
        self._uses[slot] = 1
        at_once, later = self._policy is WritePolicy.WRITE_THROUGH, self._policy is WritePolicy.WRITE_BACK
        self._arena.cache(key, slot, Backing.DIRTY if at_once or later else Backing.UNBACKED)
        if at_once:
            self._queue[slot] = key
        elif later:
            self._backlog[slot] = key
        self._changed.notify_all()

    def used(self, key: bytes, slot: int) -> None:
        """A page has been asked for, or computed, once more."""
        self._touched[key] += 1
        if self._policy is WritePolicy.SELECTIVE and self._arena.backing(slot) is Backing.UNBACKED:
            self._uses[slot] += 1
            if self._uses[slot] >= SELECTIVE_USES and slot not in self._refused:
                self._arena.mark(slot, Backing.DIRTY)
                self._queue[slot] = key
                self._changed.notify_all()

    def reserved(self) -> None:
        """A slot has been taken: there may be too few left."""
        if self._backlog and self._arena.available < SHORT_OF_SLOTS * self._arena.slots:
            self._changed.notify_all()

    def follow(self, policy: WritePolicy) -> None:
        """Another policy from now on; what was put off is written."""
        self._policy = policy
        self.drain()

    def make_room(self) -> None:
        """Somebody waits for slots: write the backlog."""
        self._room_wanted = True
        self._changed.notify_all()

    @property
    def waiting(self) -> int:
        return len(self._queue) + self.writing

    def drain(self) -> int:
        """Write the backlog, too; how many pages are to be written yet."""
        if self._backlog:
            self.make_room()
        return self.waiting + len(self._backlog)

    def flush(self, timeout_s: float) -> bool:
        """Write the backlog, too, and wait; False where that takes longer. Releases the lock meanwhile."""
        self._draining += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(lambda: not (self._queue or self._backlog or self.writing), timeout_s)
        finally:
            self._draining -= 1

    def stop(self) -> int:
        """Write no more; how many pages are given up."""
        given_up = len(self._queue) + len(self._backlog)
        self._queue.clear()
        self._backlog.clear()
        self._closing = True
        self._changed.notify_all()
        return given_up

    # ---- without it ----

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        at_once = max(1, min(BATCH_PAGES, BATCH_BYTES // self._arena.memory.shape[1]))
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._queue or self._closing or self._must_write_back(), self._tick_s)
                if self._closing:
                    break
                batch = self._next_batch(at_once)
                self.writing = len(batch)
            failed = [volume for volume in self._files.volumes if not volume.healthy]
            self._files.retry()
            if any(volume.healthy for volume in failed):
                self._requeue()
            if batch:
                self._write(batch)
            self._touch()
        self._touch(now=True)

    def _must_write_back(self) -> bool:
        short = self._arena.available < SHORT_OF_SLOTS * self._arena.slots
        self._room_wanted &= bool(self._backlog)
        return bool(self._backlog) and (short or self._room_wanted or self._draining > 0)

    def _next_batch(self, at_most: int) -> list[tuple[bytes, int, bytes]]:
        """(key, slot, parent) of the pages to write next."""
        source = self._queue or (self._backlog if self._must_write_back() else None)
        batch: list[tuple[bytes, int, bytes]] = []
        while source and len(batch) < at_most:
            slot, key = source.popitem(last=False)
            batch.append((key, slot, self._parents[slot]))
        return batch

    def _write(self, batch: Sequence[tuple[bytes, int, bytes]]) -> None:
        on_file = self._files.locate(key for key, _, _ in batch)
        pages = [(key, self._arena.memory[slot], parent) for key, slot, parent in batch if key not in on_file]
        try:
            for key, record, parent in pages:
                self._seal(record, key, parent)
            refused = self._files.write([(key, record) for key, record, _ in pages])
        except Exception:  # a bug of ours must not end the thread: memory would fill with pages that wait for it
            log.exception("hcache: %d pages could not be written.", len(pages))
            refused = {key for key, _, _ in pages}
        with self._lock:
            for key, slot, _ in reversed(batch):  # later pages are worth nothing without the earlier: they go first
                self._arena.mark(slot, Backing.UNBACKED if key in refused else Backing.CLEAN)
                if key in refused:
                    self._refused[slot] = key
            self.written += len(pages) - len(refused)
            self.failed += len(refused)
            self.writing = 0
            self._changed.notify_all()
        self._settled()

    def _requeue(self) -> None:
        """Pages that no directory could take, and that are still in memory, get another chance."""
        with self._lock:
            while self._refused:
                slot, key = self._refused.popitem(last=False)
                if self._arena.slot_of(key) == slot and self._arena.backing(slot) is Backing.UNBACKED:
                    self._arena.mark(slot, Backing.DIRTY)
                    self._queue[slot] = key

    def _touch(self, *, now: bool = False) -> None:
        if not now and time.monotonic() < self._touch_at:
            return
        self._touch_at = time.monotonic() + TOUCH_EVERY_S
        with self._lock:
            touched, self._touched = self._touched, Counter()
        if touched:
            self._files.touch(touched)
