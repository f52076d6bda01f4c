"""Writing pages to files in the background, when the policy says so."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from sglang_hcache.storage.arena import Arena, Backing
from sglang_hcache.storage.contract import WritePolicy
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.stripe import PageFiles, Stripe

BATCH_PAGES = 64
BATCH_BYTES = 64 << 20
MOST_A_HOLD = 1000  # pages that are looked at without letting go of the lock
MOST_KEPT = 1 << 17  # pages that are not evicted while a batch is written
MOST_BEHIND = 2  # batches that one volume may have waiting more than another
SELECTIVE_USES = 2  # SGLang's threshold for the policy of that name
SHORT_OF_SLOTS = 0.25  # write_back begins when fewer slots than this fraction can be reserved
MOST_DIRTY = 0.5  # of the slots, with pages that wait to be written; more with write_back, which writes late
BATCHES_DIRTY = 4  # of each volume that may wait in any case
TOUCH_EVERY_S = 5.0
MOST_TOUCHED = 1 << 18  # pages whose use a volume has still to note: one that hangs notes none

logger = logging.getLogger(__name__)

Seal = Callable[[Record, bytes, bytes], None]  # record, key, parent


@dataclass(eq=False)
class _VolumeQueue:
    """What is to be written to one volume."""

    work: threading.Condition
    queue: deque[tuple[int, bytes, bytes]] = field(default_factory=deque)  # slot, key, parent
    batch: dict[int, bytes] = field(default_factory=dict)  # being written; slot → key
    former: dict[int, bytes] = field(default_factory=dict)  # the batch before it
    # Not to be evicted, though in no queue: pages written just now, and those that pages being written follow; grows.
    keep: list[bytes] = field(default_factory=list)
    touched: Counter[bytes] = field(default_factory=Counter)
    touch_at: float = 0.0

    @property
    def waiting(self) -> int:
        return len(self.queue) + len(self.batch)


class Writer:
    """A thread for each volume, and the queue of pages it writes. `lock` guards everything but the writing itself.

    `seal` completes a record before it is written; `evictable` is called, without the lock, once pages are.
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
        evictable: Callable[[], None],
    ) -> None:
        self._arena = arena
        self._files = files
        self._lock = lock
        self._written = threading.Condition(lock)
        self._seal = seal
        self._policy = policy
        self._tick_s = tick_s
        self._evictable = evictable
        self._at_once: int = max(1, min(BATCH_PAGES, BATCH_BYTES // arena.memory.shape[1]))
        self._by_volume = {volume: _VolumeQueue(threading.Condition(lock)) for volume in files.volumes}
        self._backlog = deque[tuple[int, bytes]]()  # slot, key; to be written when slots get short
        self._uses = bytearray(len(arena.memory))  # of the page in each slot, as far as they count
        self._draining = 0
        self._room_wanted = False
        self._closing = False
        self.written = self.failed = 0
        self.skipped = 0  # pages that were to be written, and are in memory only until they are used again
        self.threads = [
            threading.Thread(target=self._run, args=(volume, todo), name="hcache-write", daemon=True)
            for volume, todo in self._by_volume.items()
        ]
        for thread in self.threads:
            thread.start()

    # ---- under the lock ----

    def _most_behind(self) -> int:
        """Pages that may wait for one volume, of which others have none."""
        return min(MOST_BEHIND * self._at_once, self._arena.slots // (2 * max(1, len(self._by_volume))))

    def committed(self, key: bytes, slot: int, parent: bytes) -> None:
        """A page has been put into an open slot."""
        self._uses.extend(bytes(max(0, slot + 1 - len(self._uses))))
        self._uses[slot] = 1
        self._arena.cache(key, slot, Backing.UNBACKED, parent)
        if self._is_to_be_written(slot):
            if self._behind:
                self.skipped += 1
            else:
                self._put(slot, key)

    def used(self, key: bytes, slot: int) -> None:
        """A page has been asked for, or computed, once more."""
        for todo in self._by_volume.values():
            if len(todo.touched) < MOST_TOUCHED:
                todo.touched[key] += 1
        if self._arena.backing(slot) is Backing.UNBACKED:
            self._uses[slot] = min(self._uses[slot] + 1, SELECTIVE_USES)
            if self._is_to_be_written(slot) and not self._behind and self._files.healthy:
                self._put(slot, key)

    def reserved(self) -> None:
        """A slot has been taken: there may be too few left."""
        if self._must_write_back():
            self._wake()

    def follow(self, policy: WritePolicy) -> None:
        """Another policy from now on; what was put off is written."""
        self._policy = policy
        self.drain()

    def make_room(self) -> None:
        """Somebody waits for slots: write the backlog."""
        self._room_wanted = True
        self._wake()

    @property
    def waiting(self) -> int:
        return sum(todo.waiting for todo in self._by_volume.values())

    def drain(self) -> int:
        """Write the backlog, too; how many pages are to be written yet."""
        if self._backlog:
            self.make_room()
        return self.waiting + len(self._backlog)

    def flush(self, timeout_s: float) -> bool:
        """Write the backlog, too, and wait; False where that takes longer. Releases the lock meanwhile."""
        self._draining += 1
        self._wake()
        try:
            return self._written.wait_for(lambda: not (self._backlog or self.waiting), timeout_s)
        finally:
            self._draining -= 1

    def stop(self) -> int:
        """Write no more, and close the volumes; how many pages are given up."""
        given_up = len(self._backlog) + sum(len(todo.queue) for todo in self._by_volume.values())
        self._backlog.clear()
        for todo in self._by_volume.values():
            todo.queue.clear()
        self._closing = True
        self._wake()
        self._written.notify_all()
        return given_up

    def _wake(self) -> None:
        for todo in self._by_volume.values():
            todo.work.notify()

    def _is_to_be_written(self, slot: int) -> bool:
        enough_uses = self._policy is not WritePolicy.SELECTIVE or self._uses[slot] >= SELECTIVE_USES
        return enough_uses and bool(self._by_volume)

    @property
    def _behind(self) -> bool:
        """Whether pages come faster than files take them: more would fill the memory with what waits."""
        share = 1 - SHORT_OF_SLOTS / 2 if self._policy is WritePolicy.WRITE_BACK else MOST_DIRTY
        at_least = BATCHES_DIRTY * self._at_once * len(self._by_volume)
        return self._arena.dirty >= max(share * self._arena.slots, at_least)

    def _put(self, slot: int, key: bytes) -> None:
        """Have a cached page written when the policy says so."""
        if self._policy is WritePolicy.WRITE_BACK:
            self._arena.mark(slot, Backing.DIRTY)
            self._backlog.append((slot, key))
        else:
            self._enqueue(slot, key)

    def _enqueue(self, slot: int, key: bytes) -> None:
        """Have a cached page written by the volume whose turn it is."""
        volume = self._files.next(lambda volume: self._by_volume[volume].waiting, self._most_behind())
        if volume is None:
            self._give_up(slot, key)
        else:
            self._arena.mark(slot, Backing.DIRTY)
            self._by_volume[volume].queue.append((slot, key, self._arena.parent(slot)))
            self._by_volume[volume].work.notify()

    def _give_up(self, slot: int, key: bytes) -> None:
        """For now the page is in memory only, and may be lost."""
        self._arena.mark(slot, Backing.UNBACKED)
        self.failed += 1

    def _pass_on(self, todo: _VolumeQueue) -> None:
        """Have others write what waits for a volume that takes no pages."""
        pages, todo.queue = todo.queue, deque()
        for slot, key, _ in pages:
            self._enqueue(slot, key)
        self._written.notify_all()

    def _with_parents(self, pages: Mapping[int, bytes]) -> list[bytes]:
        return [*pages.values(), *map(self._arena.parent, pages)]

    def _begin_batch(self, todo: _VolumeQueue) -> None:
        """Take pages off the queue. What was written last is kept, too: what is committed next may follow it."""
        while todo.queue and len(todo.batch) < self._at_once:
            slot, key, _ = todo.queue.popleft()
            todo.batch[slot] = key
        begun = self._with_parents(todo.batch)
        todo.keep = []
        for other in self._by_volume.values():
            if other is not todo and other.batch and len(other.keep) < MOST_KEPT:
                other.keep += begun
            todo.keep += [*other.former.values(), *self._with_parents(other.batch)]

    def _must_write_back(self) -> bool:
        short = self._arena.available < SHORT_OF_SLOTS * self._arena.slots
        self._room_wanted &= bool(self._backlog)
        return bool(self._backlog) and (short or self._room_wanted or self._draining > 0)

    def _has_work(self, volume: PageFiles, todo: _VolumeQueue) -> bool:
        takes_backlog = volume.healthy or not self._files.healthy
        return bool(todo.queue) or (takes_backlog and self._must_write_back())

    def _write_back(self) -> None:
        """Queue a batch of the backlog, for all volumes."""
        for _ in range(min(self._at_once, len(self._backlog))):
            self._enqueue(*self._backlog.popleft())
        self._written.notify_all()

    # ---- without it ----

    def _run(self, volume: PageFiles, todo: _VolumeQueue) -> None:
        goes_on = True
        while goes_on:
            try:
                goes_on = self._write_next(volume, todo)
            except Exception:  # a bug of ours must not end the thread: nothing would be written any more
                logger.exception("hcache: a writer failed, and goes on.")
                time.sleep(self._tick_s)
        self._touch(volume, todo, now=True)
        volume.close()

    def _write_next(self, volume: PageFiles, todo: _VolumeQueue) -> bool:
        """Write a batch, as soon as there is one, and do what is due at times; False once closed."""
        with self._lock:
            todo.work.wait_for(lambda: self._closing or self._has_work(volume, todo), self._tick_s)
            if self._closing:
                return False
            if not todo.queue and self._has_work(volume, todo):
                self._write_back()
            if not volume.healthy:
                self._pass_on(todo)
            self._begin_batch(todo)
        if todo.batch:
            self._write(volume, todo)
        self._evictable()
        self._touch(volume, todo)
        if volume.retry():
            self._requeue()
        return True

    def _write(self, volume: PageFiles, todo: _VolumeQueue) -> None:
        batch = todo.batch
        on_file = self._files.locate(batch.values())
        pages = {slot: key for slot, key in batch.items() if key not in on_file}
        memory = self._arena.memory
        otherwise: Callable[[int, bytes], None] = self._enqueue
        try:
            for slot, key in pages.items():
                self._seal(memory[slot], key, self._arena.parent(slot))
            written = volume.write([(key, memory[slot]) for slot, key in pages.items()], partial(self._kept, todo))
        except Exception:  # a bug of ours must not end the thread: memory would fill with pages that wait for it
            logger.exception("hcache: %d pages could not be written.", len(pages))
            written, otherwise = False, self._give_up
        with self._lock:
            todo.batch, todo.former = {}, batch
            for slot, key in reversed(batch.items()):  # later pages are worth nothing without the earlier: go first
                if written or key in on_file:
                    self._arena.mark(slot, Backing.CLEAN)
            if written:
                self.written += len(pages)
            else:
                for slot, key in pages.items():
                    otherwise(slot, key)
            self._written.notify_all()

    def _kept(self, todo: _VolumeQueue) -> list[bytes]:
        """Keys to keep: pages queued or in writing, their parents, and pages written since just before the batch."""
        with self._lock:
            keep = todo.keep.copy()
            queued = [page for other in self._by_volume.values() for page in other.queue]
        return keep + [key for _, *keys in queued for key in keys]

    def _requeue(self) -> None:
        """Pages that no volume could take, and that are still in memory, get another chance."""
        found = []
        for first in range(0, self._arena.slots, MOST_A_HOLD):
            with self._lock:
                found += self._arena.backed_by(Backing.UNBACKED, first, first + MOST_A_HOLD)
        found.sort()
        for first in range(0, len(found), MOST_A_HOLD):
            with self._lock:
                for _, slot, key in found[first : first + MOST_A_HOLD]:
                    unbacked = self._arena.slot_of(key) == slot and self._arena.backing(slot) is Backing.UNBACKED
                    if unbacked and self._is_to_be_written(slot) and not self._behind:
                        self._enqueue(slot, key)

    def _touch(self, volume: PageFiles, todo: _VolumeQueue, *, now: bool = False) -> None:
        if not now and time.monotonic() < todo.touch_at:
            return
        todo.touch_at = time.monotonic() + TOUCH_EVERY_S
        with self._lock:
            touched, todo.touched = todo.touched, Counter()
        if touched:
            volume.touch(touched)
