"""Copies from the device and the host work that follows them, in order; the scheduler never waits for them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from sglang_hcache.streams import Event, ImmediateStream, Stream

logger = logging.getLogger(__name__)

_LEAST_PENDING_BYTES = 2 << 30
_FORWARDS_PENDING = 3  # one runs, the next is issued, one is being copied: a fourth has to wait, and may
_COPYING_THREADS = 4

Job = Callable[[], None]


class InlineCopyOut:
    """On the CPU there is no copy to wait for: a job is done when `submit` returns."""

    crowded = False
    copying: Executor | None = None

    def expect(self, forward_bytes: int) -> None:
        """Nothing is held."""

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as the next job finds it."""
        return tensor

    def record(self) -> Event:
        """Passed once everything given to `to_host` may be overwritten."""
        return ImmediateStream().record()

    def submit(self, job: Job) -> None:
        job()

    def drain(self) -> None:
        """Return when all submitted jobs are done."""

    def close(self) -> None:
        """Do what is left, then stop."""


class StreamCopyOut:
    """Copies run on their own stream; jobs on one thread, each after the copies issued before its submission.

    current: the stream on which the tensors are made. copying: threads that jobs may use for copies.
    """

    def __init__(self, stream: Stream, current: Stream) -> None:
        self._stream = stream
        self._current = current
        self._most_pending = _LEAST_PENDING_BYTES
        self.copying: Executor | None = ThreadPoolExecutor(_COPYING_THREADS, thread_name_prefix="hcache-copying")
        self._jobs: queue.SimpleQueue[tuple[Event | None, Job, int] | None] = queue.SimpleQueue()
        self._copied = 0  # bytes since the last submission
        self._pending = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="hcache-hostwork", daemon=True)
        self._thread.start()

    @property
    def crowded(self) -> bool:
        """Whether waiting jobs hold more than they should; the caller then leaves its rows uncaptured."""
        return self._pending > self._most_pending

    def expect(self, forward_bytes: int) -> None:
        """One forward hands over so much at most; pinned memory of four such is held where jobs lag behind.

        torch takes and keeps pinned memory in powers of two: each of the four may be nearly twice as large.
        """
        self._most_pending = max(_LEAST_PENDING_BYTES, _FORWARDS_PENDING * forward_bytes)
        if torch.cuda.is_available():
            pinned = [
                torch.empty(forward_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(_FORWARDS_PENDING)
            ]
            del pinned  # torch keeps it for the first forwards, which would wait a second for each

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self._stream.wait(self._current.record())
        with self._stream.active():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            # Copied as a whole, a tensor with gaps would be made contiguous on the device first.
            for target, source in [(host, tensor)] if tensor.is_contiguous() else zip(host, tensor, strict=True):
                target.copy_(source, non_blocking=True)
        self._stream.keep(tensor)
        self._copied += host.nbytes
        return host

    def record(self) -> Event:
        return self._stream.record()

    def submit(self, job: Job) -> None:
        held, self._copied = self._copied, 0
        with self._lock:
            self._pending += held
        self._jobs.put((self._stream.record(), job, held))

    def drain(self) -> None:
        done = threading.Event()
        self._jobs.put((None, done.set, 0))
        done.wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        if self.copying is not None:
            self.copying.shutdown()

    def _run(self) -> None:
        self._stream.adopt()
        while item := self._jobs.get():
            event, job, held = item
            try:
                if event is not None:
                    event.synchronize()
                job()
            except Exception:
                # The thread must outlive a failed copy or job; what it held is simply not stored.
                logger.exception("hcache: a page could not be kept")
            with self._lock:
                self._pending -= held


CopyOut = InlineCopyOut | StreamCopyOut
