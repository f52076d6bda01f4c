"""An SGLang plugin for tests alone: the planner's rates are those of `HCACHE_RATES`, and stay so."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        HookRegistry.register("sglang_hcache.startup.calibration._measure", _known, HookType.REPLACE)
        target = "sglang_hcache.planner.rate_tracker.RateTracker.observe"
        HookRegistry.register(target, _ignored, HookType.REPLACE)


def _known(*_: Any, **__: Any) -> Any:
    from sglang_hcache.planner.machine import Machine

    return Machine(name="known", **json.loads(os.environ["HCACHE_RATES"]))


def _ignored(*_: Any, **__: Any) -> None:
    pass
