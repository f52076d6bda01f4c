"""How long a restoration takes: copies and compute of successive layers, as a two-stage pipeline.

Layer l can be computed when its copy and the layer before are done, so the last layer is done after

    max over l of (copies of layers 1 … l) + (compute of layers l … L)

Layers that are stored alike follow each other, so only the first and the last of each group can be that maximum.
Every term is a polynomial of the restored tokens: the same code gives its values, or its coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sglang_hcache.planner.cost import Costs, Vector
from sglang_hcache.planner.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """Number of layers stored in each way, in layer order; only the first can be left out (HCache, §4)."""

    none: int  # recomputed from tokens
    hidden: int
    kv: int

    @property
    def layers(self) -> int:
        return self.none + self.hidden + self.kv

    def bytes_per_token(self, shape: ModelShape, ranks: int = 1) -> int:
        return self.hidden * shape.hidden_bytes + self.kv * shape.kv_bytes * shape.kv_copies(ranks)

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Representation, first layer, last layer."""
        first = 0
        for name, layers in (("none", self.none), ("hidden", self.hidden), ("kv", self.kv)):
            if layers:
                yield name, first, first + layers - 1
            first += layers


@dataclass(frozen=True)
class Hit:
    """Pages of a prefix that can be restored, first those in host memory, and what has to be waited for."""

    page_tokens: int
    host_pages: int  # in host memory, by now
    ssd_pages: int = 0
    remote_pages: int = 0
    new_tokens: int = 1  # of the prompt after the hit: prefilled in any case
    device_tokens: int = 0  # before the hit, in the KV pool
    start_s: float = 0.0  # until the engine could start this request
    bus_queue_s: float = 0.0  # of copies ahead of this one
    ssd_queue_s: float = 0.0
    remote_queue_s: float = 0.0

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.new_tokens < 1:
            raise ValueError("page_tokens and new_tokens must be positive")

    @property
    def pages(self) -> int:
        return self.host_pages + self.ssd_pages + self.remote_pages

    @property
    def prefill_tokens(self) -> int:
        """What is prefilled if nothing is restored."""
        return self.pages * self.page_tokens + self.new_tokens


class Basis(NamedTuple):
    """Functions of the restored tokens: their values, or unit vectors to get coefficients."""

    one: Vector
    tokens: Vector
    squared: Vector
    ssd_tokens: Vector  # of them, from SSD
    remote_tokens: Vector

    @classmethod
    def of(cls, hit: Hit, tokens: Vector) -> Basis:
        host = hit.host_pages * hit.page_tokens
        ssd = hit.ssd_pages * hit.page_tokens
        beyond = np.maximum(tokens - host, 0)
        return cls(1.0 + 0 * tokens, tokens, tokens * tokens, np.minimum(beyond, ssd), np.maximum(beyond - ssd, 0))


COEFFICIENTS = Basis(*np.eye(5))


class Stages(NamedTuple):
    """Lower bounds of the time from the start of the pass to the last layer's end, per tier that feeds it."""

    bus: list[Vector]
    ssd: list[Vector]  # hold where tokens come from SSD; empty where that is read before the pass
    remote: list[Vector]


def stages(costs: Costs, counts: tuple[Any, Any, Any], hit: Hit, basis: Basis) -> Stages:
    """`counts`: layers stored as nothing, hidden states, KV; integers or arrays of them."""
    one, tokens = basis.one, basis.tokens
    whole = one * costs.layer_s(hit.prefill_tokens, hit.device_tokens)
    saved_s = costs.linear_s_per_token + hit.device_tokens * costs.attention_s_per_pair
    tail = whole - tokens * saved_s - basis.squared * (costs.attention_s_per_pair / 2)
    project = one * costs.projection_pass_s + tokens * costs.projection_s_per_token
    compute = (whole, tail + project, tail + tokens * costs.scatter_s_per_token)

    weights, latency = one * costs.weights_bus_s, one * costs.bus_latency_s
    copies = (
        weights,
        weights + latency + tokens * costs.hidden_bus_s_per_token,
        weights + latency + tokens * costs.kv_bus_s_per_token,
    )
    bus = _bounds(copies, compute, counts, one * hit.bus_queue_s)
    if not costs.streams:
        return Stages(bus, [], [])
    ssd = (basis.ssd_tokens * costs.hidden_ssd_s_per_token, basis.ssd_tokens * costs.kv_ssd_s_per_token)
    remote = (
        basis.remote_tokens * costs.hidden_remote_s_per_token,
        basis.remote_tokens * costs.kv_remote_s_per_token,
    )
    nothing = 0 * one
    return Stages(
        bus,
        _bounds((nothing, *ssd), compute, counts, one * (hit.ssd_queue_s + costs.ssd_latency_s)),
        _bounds((nothing, *remote), compute, counts, one * (hit.remote_queue_s + costs.remote_latency_s)),
    )


def _bounds(
    copies: tuple[Vector, ...], compute: tuple[Vector, ...], counts: tuple[Any, Any, Any], queue: Vector
) -> list[Vector]:
    """The sums of the module's formula at the ends of each group; a group without layers adds none of its own."""
    after = [0 * queue, 0 * queue, 0 * queue, 0 * queue]
    for group in (2, 1, 0):
        after[group] = after[group + 1] + counts[group] * compute[group]
    sums, before = [], 0 * queue
    for group, count in enumerate(counts):
        if isinstance(count, int) and count == 0:
            continue
        if group:
            before, queue = before + queue, 0 * queue
        first = np.minimum(count, 1)
        sums.append(before + first * copies[group] + after[group])
        before = before + count * copies[group]
        sums.append(before + first * compute[group] + after[group + 1])
    return sums


def waits(costs: Costs, counts: tuple[Any, Any, Any], hit: Hit, basis: Basis) -> Vector:
    """Seconds until the pass can start: the engine, and lower tiers where they do not stream."""
    wait = hit.start_s + 0 * basis.one
    if costs.streams:
        return wait
    _, hidden, kv = counts
    if hit.ssd_pages:
        per_token = hidden * costs.hidden_ssd_s_per_token + kv * costs.kv_ssd_s_per_token
        read = hit.ssd_queue_s + costs.ssd_latency_s + basis.ssd_tokens * per_token
        wait = np.maximum(wait, np.where(basis.ssd_tokens > 0, read, 0.0))
    if hit.remote_pages:
        per_token = hidden * costs.hidden_remote_s_per_token + kv * costs.kv_remote_s_per_token
        read = hit.remote_queue_s + costs.remote_latency_s + basis.remote_tokens * per_token
        wait = np.maximum(wait, np.where(basis.remote_tokens > 0, read, 0.0))
    return wait


def restore_s(costs: Costs, counts: tuple[Any, Any, Any], hit: Hit, tokens: Vector) -> Vector:
    """Seconds to the first token when the hit's first `tokens` (at least one) are restored and the rest is prefilled.

    Arrays of `counts` and `tokens` broadcast.
    """
    basis = Basis.of(hit, tokens)
    found = stages(costs, counts, hit, basis)
    busy = maximum(found.bus)
    for sums, there in ((found.ssd, basis.ssd_tokens), (found.remote, basis.remote_tokens)):
        if sums:
            busy = np.maximum(busy, np.where(there > 0, maximum(sums), 0.0))
    return waits(costs, counts, hit, basis) + busy + costs.head_s


def recompute_s(costs: Costs, hit: Hit) -> float:
    """Seconds to the first token when nothing is restored."""
    return hit.start_s + costs.prefill_s(hit.prefill_tokens, hit.device_tokens)


def maximum(sums: list[Vector]) -> Vector:
    highest = sums[0]
    for other in sums[1:]:
        highest = np.maximum(highest, other)
    return highest
