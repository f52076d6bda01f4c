"""An SGLang plugin for tests alone: spoils restorations, in the way that the file `HCACHE_SPOIL` names.

The comparison of outputs must notice every one of them; if it does not, it proves nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

PAGE = 64


def register() -> None:
    if "sglang.srt.managers.scheduler" in sys.modules:
        for target, hook in (("ReplayProjector._replay", _spoilt), ("KVProjector.project", _spoilt_drafts)):
            HookRegistry.register(f"sglang_hcache.restoring.projector.{target}", hook, HookType.AROUND)


def _spoilt(
    original: Callable[..., None],
    projector: Any,
    layer: int,
    rows: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    way = Path(os.environ["HCACHE_SPOIL"]).read_text()
    rows, positions = rows.clone(), positions.clone()
    if way == "skip a layer" and layer == 1:
        return
    if way == "zero a page":
        rows[PAGE : 2 * PAGE] = 0
    if way == "swap two pages":
        rows[: 2 * PAGE] = rows[: 2 * PAGE].roll(PAGE, dims=0)
    if way == "shift positions":
        positions += 1
    original(projector, layer, rows, positions, slots)


def _spoilt_drafts(
    original: Callable[..., None], projector: Any, layer: int, rows: torch.Tensor, *places: Any
) -> None:
    """Of these models nothing else is stored as K and V."""
    if Path(os.environ["HCACHE_SPOIL"]).read_text() == "zero what is the draft model's":
        rows = torch.zeros_like(rows)
    original(projector, layer, rows, *places)
