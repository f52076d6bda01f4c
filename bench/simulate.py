"""Many requests on one machine: an event simulation of drives, bus and GPU, fed by the planner's own decisions.

Each of the three serves one request after the other, layer by layer; the next request's copies go ahead while the
GPU still works on the one before. Decoding is not simulated: it slows all methods alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from sglang_hcache.planner.cost import Costs
from sglang_hcache.planner.load import plan_load
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from sglang_hcache.storage.contract import AGEING


class Restore(Enum):
    NOTHING = "nothing"
    ALL = "all"
    PLANNED = "planned"


@dataclass(frozen=True)
class Method:
    layout: Layout
    restore: Restore
    overlaps: bool = True  # the prompt is prefilled while upper layers are restored; else after the last


@dataclass(frozen=True)
class Arrival:
    at_s: float
    hit: Hit  # with no queues: the simulation knows them


@dataclass(frozen=True)
class _Waiting:
    index: int
    restore_s: float  # alone
    arrival_s: float

    @property
    def turn(self) -> tuple[float, float]:
        """The least goes first, as the server asks the prefetcher for it (docs/planner.md)."""
        return self.restore_s + AGEING * self.arrival_s, self.arrival_s


@dataclass
class _Busy:
    """When each stage is free again, in s."""

    drives_s: float = 0.0
    bus_s: float = 0.0
    gpu_s: float = 0.0


def simulate(costs: Costs, arrivals: Sequence[Arrival], method: Method) -> list[float]:
    """Seconds to the first token of each, in the order given."""
    pending = sorted(range(len(arrivals)), key=lambda index: arrivals[index].at_s, reverse=True)
    busy, waiting, first_token_s = _Busy(), list[_Waiting](), [0.0] * len(arrivals)
    while pending or waiting:
        now_s = max(busy.bus_s, busy.drives_s)
        if not waiting and pending:
            now_s = max(now_s, arrivals[pending[-1]].at_s)
        while pending and arrivals[pending[-1]].at_s <= now_s:
            index = pending.pop()
            waiting.append(_Waiting(index, _alone_s(costs, arrivals[index].hit, method), arrivals[index].at_s))
        chosen = min(waiting, key=lambda one: one.turn)
        waiting.remove(chosen)
        arrival = arrivals[chosen.index]
        first_token_s[chosen.index] = _serve(costs, arrival.hit, method, now_s, busy) - arrival.at_s
    return first_token_s


def _alone_s(costs: Costs, hit: Hit, method: Method) -> float:
    if method.restore is Restore.NOTHING or not hit.pages:
        return recompute_s(costs, hit)
    if method.restore is Restore.PLANNED:
        return plan_load(costs, method.layout, hit).seconds
    counts = (method.layout.none, method.layout.hidden, method.layout.kv)
    return float(restore_s(costs, counts, hit, hit.pages * hit.page_tokens))


def _serve(costs: Costs, hit: Hit, method: Method, now_s: float, busy: _Busy) -> float:
    """When the first token is there."""
    pages = hit.pages if method.restore is Restore.ALL else 0
    if method.restore is Restore.PLANNED:
        queued = replace(hit, start_s=max(0.0, busy.gpu_s - now_s))
        pages = plan_load(costs, method.layout, queued).pages
    tokens = pages * hit.page_tokens
    lower_tokens = tokens - min(pages, hit.host_pages) * hit.page_tokens
    ready_s, drives_s = now_s, max(busy.drives_s, now_s) + costs.lower_latency_s
    if lower_tokens and not costs.streams:
        layout = method.layout
        per_token = layout.hidden * costs.hidden_lower_s_per_token + layout.kv * costs.kv_lower_s_per_token
        ready_s = busy.drives_s = drives_s + lower_tokens * per_token
    bus_s, gpu_s = max(busy.bus_s, ready_s), max(busy.gpu_s, ready_s)
    for kind in _kinds(costs.layers, method.layout, tokens):
        copy_s, read_s = costs.weights_bus_s, 0.0
        if kind != "none":
            hidden = kind == "hidden"
            copy_s += costs.bus_latency_s
            copy_s += tokens * (costs.hidden_bus_s_per_token if hidden else costs.kv_bus_s_per_token)
            read_s = lower_tokens * (costs.hidden_lower_s_per_token if hidden else costs.kv_lower_s_per_token)
        if copy_s:
            bus_s += copy_s
            gpu_s = max(gpu_s, bus_s)
        if read_s and costs.streams:
            drives_s += read_s
            busy.drives_s = drives_s
            gpu_s = max(gpu_s, drives_s)
        gpu_s += _layer_s(costs, hit, kind, tokens, method.overlaps)
    busy.bus_s, busy.gpu_s = bus_s, gpu_s
    if tokens and not method.overlaps:
        busy.gpu_s += costs.prefill_s(hit.prefill_tokens - tokens, hit.device_tokens + tokens)
    else:
        busy.gpu_s += costs.head_s
    return busy.gpu_s


def _kinds(layers: int, layout: Layout, tokens: int) -> list[str]:
    if not tokens:
        return ["none"] * layers
    return ["none"] * layout.none + ["hidden"] * layout.hidden + ["kv"] * layout.kv


def _layer_s(costs: Costs, hit: Hit, kind: str, tokens: int, overlaps: bool) -> float:
    """The GPU's part of one layer."""
    if not tokens:
        return float(costs.layer_s(hit.prefill_tokens, hit.device_tokens))
    if kind == "none":
        return float(costs.layer_s(hit.prefill_tokens if overlaps else tokens, hit.device_tokens))
    seconds = costs.project_s(tokens) if kind == "hidden" else tokens * costs.scatter_s_per_token
    if overlaps:
        seconds += costs.layer_s(hit.prefill_tokens - tokens, hit.device_tokens + tokens)
    return float(seconds)
