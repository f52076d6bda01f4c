"""Copies from the device and the host work that follows them, in order; the scheduler never waits for them."""

from __future__ import annotations

import logging
import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from sglang_hcache.device.capture_mode import beside_captures
from sglang_hcache.device.pinning import PinnedMemory
from sglang_hcache.device.streams import COPY_BYTES, Event, ImmediateStream, Stream

logger = logging.getLogger(__name__)

_FORWARDS_PENDING = 3  # one is being copied, one is issued, and one may lie across the end of the memory
_LEAST_BYTES = 1 << 30  # a long answer is saved as a whole, and may be more than a forward's tokens
_ALIGNMENT = 64  # bytes
_COPYING_THREADS = 4

Job = Callable[[], None]
T = TypeVar("T")


def spread(copying: Executor | None, copy: Callable[[T], None], items: Sequence[T]) -> None:
    """Call `copy` for each item, shared among the threads of `copying` if given. Returns when all are done."""
    share = max(1, -(-len(items) // _COPYING_THREADS))

    def copy_some(first: int) -> None:
        for item in items[first : first + share]:
            copy(item)

    shares = range(0, len(items), share)
    for _ in map(copy_some, shares) if copying is None else copying.map(copy_some, shares):
        pass


class CopyOut(Protocol):
    """Called on the scheduler's thread; jobs run in the order in which they are submitted."""

    @property
    def copying(self) -> Executor | None:
        """Threads that jobs may use for copies."""

    def expect(self, forward_bytes: int) -> None:
        """Make room for several forwards of up to `forward_bytes` each."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a host copy of a small tensor; it is complete when the next job runs."""

    def rows_to_host(self, rows: torch.Tensor, made: Event | None = None) -> torch.Tensor | None:
        """Return a host copy of rows that only the next job may read; None if jobs lag so far that there is no room.

        made: the event at which the rows are complete; by default, the end of what the current stream has queued now.
        """

    def record(self) -> Event:
        """Return an event that passes once all that was given to `to_host` or `rows_to_host` may be overwritten."""

    def submit(self, job: Job) -> None:
        """Have the job run once all copies made so far are complete."""

    def drain(self) -> None:
        """Return when all submitted jobs are done."""

    def close(self) -> None:
        """Do what is left, then stop."""


class InlineCopyOut:
    """On the CPU there is no copy to wait for: a job is done when `submit` returns."""

    copying: Executor | None = None

    def expect(self, forward_bytes: int) -> None:
        pass

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def rows_to_host(self, rows: torch.Tensor, made: Event | None = None) -> torch.Tensor | None:
        return rows

    def record(self) -> Event:
        return ImmediateStream().record()

    def submit(self, job: Job) -> None:
        job()

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Ring:
    """Pinned host memory, of which pieces are taken, and given back in the same order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory = torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)
        self._pinned = PinnedMemory(self._memory[None])  # as a whole: copies go anywhere
        self._next = 0
        self._taken: deque[range] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor | None:
        with self._lock:
            begin = self._next if self._next + size <= self.size else 0
            piece = range(begin, begin + size)
            if size > self.size or any(a.start < piece.stop and piece.start < a.stop for a in self._taken):
                return None
            self._taken.append(piece)
            self._next = -(-piece.stop // _ALIGNMENT) * _ALIGNMENT
        return self._memory[begin : piece.stop]

    def give_back(self, pieces: int) -> None:
        with self._lock:
            for _ in range(pieces):
                self._taken.popleft()

    def release(self) -> None:
        self._pinned.release()


def _pieces(host: torch.Tensor, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield pairs of target and source, of at most COPY_BYTES each, to copy one after another.

    A tensor with gaps between its parts is split at them: torch would first make it contiguous on the device.
    """
    for target, source in [(host, tensor)] if tensor.is_contiguous() else zip(host, tensor, strict=True):
        together = max(1, COPY_BYTES // source.itemsize)
        yield from zip(target.view(-1).split(together), source.view(-1).split(together), strict=True)


class StreamCopyOut:
    """Runs copies on their own stream, and jobs on one thread, each after the copies issued before its submission.

    stream: the one for copies. current: the one on which the tensors are made.
    """

    def __init__(self, stream: Stream, current: Stream) -> None:
        self._stream = stream
        self._current = current
        self._ring = _Ring(0)
        self.copying = ThreadPoolExecutor(_COPYING_THREADS, thread_name_prefix="hcache-copying")
        self._jobs: queue.SimpleQueue[tuple[Event | None, Job, int] | None] = queue.SimpleQueue()
        self._taken = 0  # pieces of the ring since the last submission
        self._thread = threading.Thread(target=self._run, name="hcache-hostwork", daemon=True)
        self._thread.start()

    def expect(self, forward_bytes: int) -> None:
        """Allocate and keep pinned memory for three forwards of up to `forward_bytes` each, at least 1 GiB."""
        size = max(_LEAST_BYTES, _FORWARDS_PENDING * (forward_bytes + _ALIGNMENT))
        if size > self._ring.size:
            self.drain()
            self._ring.release()
            self._ring = _Ring(size)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return self._copy(tensor, host)

    def rows_to_host(self, rows: torch.Tensor, made: Event | None = None) -> torch.Tensor | None:
        if (piece := self._ring.take(rows.nbytes)) is None:
            return None
        self._taken += 1
        return self._copy(rows, piece.view(rows.dtype).view(rows.shape), made)

    def _copy(self, tensor: torch.Tensor, host: torch.Tensor, made: Event | None = None) -> torch.Tensor:
        self._stream.wait(self._current.record() if made is None else made)
        with self._stream.active():
            for number, (target, source) in enumerate(_pieces(host, tensor)):
                if number:
                    self._stream.end_copy()
                target.copy_(source, non_blocking=True)
        self._stream.keep(tensor)
        return host

    def record(self) -> Event:
        return self._stream.record()

    def submit(self, job: Job) -> None:
        taken, self._taken = self._taken, 0
        self._jobs.put((self._stream.record(), job, taken))

    def drain(self) -> None:
        done = threading.Event()
        self._jobs.put((None, done.set, 0))
        done.wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        self._ring.release()
        self.copying.shutdown()

    def _run(self) -> None:
        self._stream.adopt()
        with beside_captures():
            while item := self._jobs.get():
                event, job, taken = item
                try:
                    if event is not None:
                        event.synchronize()
                    job()
                except Exception:
                    # The thread must outlive a failed copy or job; what it held is simply not stored.
                    logger.exception("hcache: a page could not be kept")
                self._ring.give_back(taken)
