"""An SGLang plugin for tests alone: schedulers wait for all answers of their stores, and for slower ranks."""

from __future__ import annotations

import sys


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang_hcache.queueing import prefetch_queue, step_waits
        from sglang_hcache.queueing.hold_rule import LONGEST_WAIT_S

        prefetch_queue.ANSWER_WAIT_S = prefetch_queue.KNOWN_WAIT_S = LONGEST_WAIT_S
        prefetch_queue.OTHERS_WAIT_S = prefetch_queue.LOOKUP_WAIT_S = LONGEST_WAIT_S
        step_waits.STEP_WAIT_S = LONGEST_WAIT_S
