"""An SGLang plugin for `bench.together` alone: each request loads for itself what it has in common with others."""

from __future__ import annotations

import sys


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang_hcache.queueing import shared_loads

        shared_loads.SharedLoads._waits = lambda *_: False  # type: ignore[method-assign]
