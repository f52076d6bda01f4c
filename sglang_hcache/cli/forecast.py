"""How long a prefix takes to restore on a machine, and what would make that faster, by the planner's cost model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_hcache.config import DEFAULT_PAGE_SIZE
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_head_start, plan_load
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s

NOTICED = 0.99  # of the time to recompute: faster than that is worth a word
MOST_DRIVES = 16
_STORED_AS = {"none": "nothing", "hidden": "hidden states", "kv": "KV"}


def hit_of(tokens: int, tier: str, new_tokens: int, page_tokens: int = DEFAULT_PAGE_SIZE) -> Hit:
    """A prefix that is all in one tier: host memory, or the machine's lower tier, whichever that is."""
    pages = tokens // page_tokens
    host, lower = (pages, 0) if tier == "host" else (0, pages)
    return Hit(page_tokens, host, lower, new_tokens=new_tokens)


@dataclass(frozen=True)
class Upgrade:
    name: str  # what is made faster
    text: str
    machine: Machine


def upgrades(machine: Machine, tier: str, drives: int) -> Iterator[Upgrade]:
    if tier == "remote":
        text = "twice the link to the prefetcher's host"
        yield Upgrade("link", text, replace(machine, remote_bytes_per_s=2 * machine.remote_bytes_per_s))
    elif tier == "ssd":
        text = "a second drive" if drives == 1 else f"one drive more than the {drives}"
        yield Upgrade("SSD", text, _more(machine, (drives + 1) / drives))
    yield Upgrade("bus", "twice the bus", replace(machine, bus_bytes_per_s=2 * machine.bus_bytes_per_s))
    faster = replace(
        machine,
        gemm_flop_per_s=2 * machine.gemm_flop_per_s,
        projection_flop_per_s=2 * machine.projection_flop_per_s,
        attention_flop_per_s=2 * machine.attention_flop_per_s,
        memory_bytes_per_s=2 * machine.memory_bytes_per_s,
    )
    yield Upgrade("compute", "a GPU twice as fast", faster)


def times(costs: Costs, layout: Layout, hit: Hit) -> dict[str, float]:
    """Of one length by each method; `restored_tokens` of the plan. `idle`: with nothing else to do for the engine."""
    tokens = hit.pages * hit.page_tokens
    plan = plan_load(costs, layout, hit)
    ahead = plan_head_start(costs, layout, hit)
    return {
        "tokens": tokens,
        "recompute_s": recompute_s(costs, hit),
        "kv_s": float(restore_s(costs, (0, 0, costs.layers), hit, tokens)),
        "hidden_s": float(restore_s(costs, (0, costs.layers, 0), hit, tokens)),
        "plan_s": plan.seconds,
        "idle_s": plan.seconds if ahead is None else ahead.seconds,
        "restored_tokens": plan.pages * hit.page_tokens,
    }


def limit(
    shape: ModelShape,
    machine: Machine,
    hits: Sequence[Hit],
    *,
    tier: str,
    drives: int,
    offloaded: float = 0.0,
    hidden: bool = True,
) -> dict[str, Any]:
    """What a plan for a faster machine would gain for hits that are all in this tier; `drives`: of the machine."""

    def planned_s(machine: Machine) -> float:
        costs = costs_of(shape, machine, offloaded=offloaded)
        layout = plan_save(costs, *hits, layerwise=False, mixed=machine.ranks == 1, hidden=hidden).layout
        return sum(plan_load(costs, layout, hit).seconds for hit in hits)

    now_s = planned_s(machine)
    found = [(now_s / planned_s(one.machine), one) for one in upgrades(machine, tier, drives)]
    best, upgrade = max(found, key=lambda pair: pair[0])
    costs = costs_of(shape, machine, offloaded=offloaded)
    alone_s = sum(recompute_s(costs, hit) for hit in hits)
    restores = now_s < NOTICED * alone_s
    what = f"restoring is {upgrade.name}-bound" if restores else "recomputing is faster than restoring"
    text = f"{what}: {upgrade.text} would give {best:.1f}×"
    needed = None
    if tier == "ssd" and not restores:
        needed = next(
            (
                n
                for n in range(drives + 1, MOST_DRIVES + 1)
                if planned_s(_more(machine, n / drives)) < NOTICED * alone_s
            ),
            None,
        )
        text += (
            f"; restoring pays from {needed} drives on" if needed else f"; no {MOST_DRIVES} drives would change that"
        )
    return {
        "limit": upgrade.name if restores else "recompute",
        "text": text,
        "drives_needed": needed,
        "speedups": {one.text: gain for gain, one in found},
    }


def _more(machine: Machine, drives: float) -> Machine:
    return replace(machine, ssd_bytes_per_s=drives * machine.ssd_bytes_per_s)


def stored_line(representation: str, first: int, last: int) -> str:
    layers = f"layer {first}" if first == last else f"layers {first}–{last}"
    return f"  {layers}: {_STORED_AS[representation]}"
