"""An SGLang plugin for `bench.ttft` alone: nothing is prefetched; the scheduler waits for the disk in its lookup."""

from __future__ import annotations

import sys


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang_hcache.queueing import prefetch_queue, step_waits

        prefetch_queue.PrefetchQueue.queued = lambda *_, **__: None  # type: ignore[method-assign]
        prefetch_queue.LOOKUP_WAIT_S = step_waits.STEP_WAIT_S = 60.0
