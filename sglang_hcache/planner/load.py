"""What of a hit is restored: its first pages, so many that the copies and the prefill of the rest end together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sglang_hcache.planner.cost import Costs
from sglang_hcache.planner.timeline import COEFFICIENTS, Basis, Hit, Layout, recompute_s, stages, waits

AGEING = 0.5  # waiting requests are read for by ascending restore_s + AGEING · arrival_s: none waits for ever

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LoadPlan:
    pages: int  # to restore, from the first on; prefill takes over after them
    seconds: float  # expected, to the first token
    recompute_s: float  # if nothing were restored


def plan_load(costs: Costs, layout: Layout, hit: Hit, *, least_pages: int = 0) -> LoadPlan:
    """The fastest split of the hit, found by trying every page.

    `least_pages` are restored whether it pays or not, so that rates nobody uses are measured again (`rate_tracker`).
    """
    alone_s = recompute_s(costs, hit)
    if not hit.pages or not layout.hidden + layout.kv:
        return LoadPlan(0, alone_s, alone_s)
    seconds = split_seconds(costs, layout, hit)
    least = min(least_pages, hit.pages)
    skipped = max(0, least - 1)
    best = skipped + int(seconds[skipped:].argmin())
    if seconds[best] < alone_s or least:
        return LoadPlan(best + 1, float(seconds[best]), alone_s)
    return LoadPlan(0, alone_s, alone_s)


def split_seconds(costs: Costs, layout: Layout, hit: Hit) -> Floats:
    """Seconds to the first token when 1, 2, … all pages are restored."""
    counts = (layout.none, layout.hidden, layout.kv)
    table = _basis(hit.page_tokens, hit.host_pages, hit.ssd_pages, hit.remote_pages)
    found = stages(costs, counts, hit, COEFFICIENTS)
    busy = _highest(found.bus, table)
    for sums, pages_before, pages in (
        (found.ssd, hit.host_pages, hit.ssd_pages),
        (found.remote, hit.host_pages + hit.ssd_pages, hit.remote_pages),
    ):
        if sums and pages:
            np.maximum(busy[pages_before:], _highest(sums, table[:, pages_before:]), out=busy[pages_before:])
    return np.asarray(busy + (waits(costs, counts, hit, Basis(*table)) + costs.head_s))


def _highest(sums: list[Floats], table: Floats) -> Floats:
    highest: Floats = (np.asarray(sums) @ table).max(axis=0)
    return highest


@lru_cache(maxsize=8)
def _basis(page_tokens: int, host_pages: int, ssd_pages: int, remote_pages: int) -> Floats:
    """`Basis` for 1, 2, … all pages, one row each."""
    hit = Hit(page_tokens, host_pages, ssd_pages, remote_pages)
    table = np.array(Basis.of(hit, page_tokens * np.arange(1.0, hit.pages + 1)))
    table.setflags(write=False)
    return table
