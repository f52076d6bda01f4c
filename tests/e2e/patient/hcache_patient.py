"""An SGLang plugin for tests alone: a request is held until it is known what of it is in memory."""

from __future__ import annotations

import sys


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang_hcache.queueing import prefetch_queue

        prefetch_queue.KNOWN_WAIT_S = prefetch_queue.LONGEST_WAIT_S
