"""An SGLang plugin for tests alone: whatever a scheduler asks its store, it waits for the answer."""

from __future__ import annotations

import sys


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang_hcache.queueing import prefetch_queue, step_waits

        prefetch_queue.ANSWER_WAIT_S = prefetch_queue.KNOWN_WAIT_S = prefetch_queue.LONGEST_WAIT_S
        step_waits.STEP_WAIT_S = prefetch_queue.LONGEST_WAIT_S
