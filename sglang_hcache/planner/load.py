"""Plans how many of a hit's first pages to restore, so that their copies and the rest's prefill end together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from sglang_hcache.planner.cost import Costs
from sglang_hcache.planner.timeline import COEFFICIENTS, Basis, Hit, Layout, recompute_s, stages, waits

LEAST_GAIN = 0.1  # of the time to the first token: a head start that gains less is within the error of a plan

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LoadPlan:
    pages: int  # the hit's first: to restore, or to prefill as a head start
    seconds: float  # expected, to the first token


def plan_load(costs: Costs, layout: Layout, hit: Hit, *, least_pages: int = 0) -> LoadPlan:
    """The fastest split of the hit, found by trying every page.

    `least_pages` are restored whether it pays or not, so that rates nobody uses are measured again (`rate_tracker`).
    """
    alone_s = recompute_s(costs, hit)
    if not hit.pages or not layout.hidden + layout.kv:
        return LoadPlan(0, alone_s)
    seconds = split_seconds(costs, layout, hit)
    least = min(least_pages, hit.pages)
    skipped = max(0, least - 1)
    best = skipped + int(seconds[skipped:].argmin())
    if seconds[best] < alone_s or least:
        return LoadPlan(best + 1, float(seconds[best]))
    return LoadPlan(0, alone_s)


def plan_head_start(costs: Costs, layout: Layout, hit: Hit, *, in_vain_s: float = 0.0) -> LoadPlan | None:
    """Which leading pages of a hit to prefill while drives read the pages behind them; None where that gains nothing.

    The engine prefills from the first page on while the drives read the rest, such that both end at the same time
    (Cake, arXiv 2410.03065); then the rest is restored, as far as that pays. Leading pages in host memory are
    restored instead of prefilled. `hit.start_s` must cover all work that the engine does first. `in_vain_s`: the time
    that drives still spend on the first pages, because reading them has begun and goes on.
    """
    behind = replace(hit, lower_queue_s=hit.lower_queue_s + in_vain_s)
    first, last = hit.host_pages + 1, hit.pages - 1
    if costs.streams or first > last:
        return None
    while first < last:
        middle = (first + last) // 2
        if _head_s(costs, layout, behind, middle) < _read_behind_s(costs, layout, behind, middle):
            first = middle + 1
        else:
            last = middle
    nearest = range(max(hit.host_pages + 1, first - 1), first + 1)
    seconds, pages = min((_head_start_s(costs, layout, behind, pages), pages) for pages in nearest)
    pays = seconds < (1 - LEAST_GAIN) * plan_load(costs, layout, hit).seconds
    return LoadPlan(pages, seconds) if pays else None


def _head_start_s(costs: Costs, layout: Layout, hit: Hit, pages: int) -> float:
    """Seconds to the first token with a head start of `pages` pages."""
    tokens = pages * hit.page_tokens
    rest = Hit(
        hit.page_tokens,
        hit.pages - pages,
        new_tokens=hit.new_tokens,
        device_tokens=hit.device_tokens + tokens,
    )
    both_s = max(_head_s(costs, layout, hit, pages), _read_behind_s(costs, layout, hit, pages))
    return both_s + plan_load(costs, layout, rest).seconds


def _head_s(costs: Costs, layout: Layout, hit: Hit, pages: int) -> float:
    """Seconds until the first `pages` are on the device; those in host memory are restored as far as that pays."""
    new_tokens = (pages - hit.host_pages) * hit.page_tokens
    head = Hit(hit.page_tokens, hit.host_pages, new_tokens=new_tokens, device_tokens=hit.device_tokens)
    return hit.start_s + plan_load(costs, layout, head).seconds


def _read_behind_s(costs: Costs, layout: Layout, hit: Hit, pages: int) -> float:
    """Seconds until the pages after the first `pages` are in host memory."""
    tail = Hit(hit.page_tokens, 0, hit.pages - pages, lower_queue_s=hit.lower_queue_s)
    counts = (layout.none, layout.hidden, layout.kv)
    return float(waits(costs, counts, tail, Basis.of(tail, tail.pages * hit.page_tokens)))


def split_seconds(costs: Costs, layout: Layout, hit: Hit) -> Floats:
    """Seconds to the first token when 1, 2, … all pages are restored."""
    counts = (layout.none, layout.hidden, layout.kv)
    table = _basis(hit.page_tokens, hit.host_pages, hit.lower_pages)
    found = stages(costs, counts, hit, COEFFICIENTS)
    busy = _highest(found.bus, table)
    if found.lower and hit.lower_pages:
        beyond = busy[hit.host_pages :]
        np.maximum(beyond, _highest(found.lower, table[:, hit.host_pages :]), out=beyond)
    return np.asarray(busy + (waits(costs, counts, hit, Basis(*table)) + costs.head_s))


def _highest(sums: list[Floats], table: Floats) -> Floats:
    highest: Floats = (np.asarray(sums) @ table).max(axis=0)
    return highest


@lru_cache(maxsize=256)
def _basis(page_tokens: int, host_pages: int, lower_pages: int) -> Floats:
    """`Basis` for 1, 2, … all pages, one row each."""
    hit = Hit(page_tokens, host_pages, lower_pages)
    table = np.array(Basis.of(hit, page_tokens * np.arange(1.0, hit.pages + 1)))
    table.setflags(write=False)
    return table
