"""Host work that must follow device copies, done in order and never waited for by the scheduler."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

_MAX_PENDING = 16  # jobs, each of which may hold one forward's rows in pinned memory

Job = Callable[[], None]


class InlineWork:
    """On the CPU there is no copy to wait for: a job is done when `submit` returns."""

    crowded = False

    def submit(self, job: Job) -> None:
        job()

    def drain(self) -> None:
        """Return when all submitted jobs are done."""

    def close(self) -> None:
        """Do what is left, then stop."""


class StreamWork:
    """Jobs run on one thread, each once the device has come as far as the stream was at its submission."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[torch.cuda.Event, Job] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hcache-hostwork", daemon=True)
        self._thread.start()

    @property
    def crowded(self) -> bool:
        """Whether more jobs wait than may hold pinned memory; the caller then leaves its rows uncaptured."""
        return self._jobs.qsize() > _MAX_PENDING

    def submit(self, job: Job) -> None:
        event = torch.cuda.Event()
        event.record()
        self._jobs.put((event, job))

    def drain(self) -> None:
        done = threading.Event()
        self.submit(done.set)
        done.wait()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while item := self._jobs.get():
            event, job = item
            event.synchronize()
            try:
                job()
            except Exception:
                # The thread must outlive a failed job; what it held is simply not stored.
                logger.exception("hcache: a page could not be kept")


HostWork = InlineWork | StreamWork


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, valid in a job submitted from now on; on the CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    # Copied as a whole, a tensor with gaps would be made contiguous on the device first.
    for target, source in [(host, tensor)] if tensor.is_contiguous() else zip(host, tensor, strict=True):
        target.copy_(source, non_blocking=True)
    return host
