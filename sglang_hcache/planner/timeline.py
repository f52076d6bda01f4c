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
    lower_pages: int = 0  # in the lower tier
    new_tokens: int = 1  # of the prompt after the hit: prefilled in any case
    device_tokens: int = 0  # before the hit, in the KV pool
    start_s: float = 0.0  # until the engine could start this request
    bus_queue_s: float = 0.0  # of other loads' copies, of which the pass waits for a layer's before it computes it
    beside_layer_s: float = 0.0  # of a layer's compute for other requests in the same pass
    lower_queue_s: float = 0.0  # of reads ahead of this one's

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.new_tokens < 1:
            raise ValueError("page_tokens and new_tokens must be positive")

    @property
    def pages(self) -> int:
        return self.host_pages + self.lower_pages

    @property
    def prefill_tokens(self) -> int:
        """What is prefilled if nothing is restored."""
        return self.pages * self.page_tokens + self.new_tokens


class Basis(NamedTuple):
    """Functions of the restored tokens: their values, or unit vectors to get coefficients."""

    one: Vector
    tokens: Vector
    squared: Vector
    lower_tokens: Vector  # of them, from the lower tier

    @classmethod
    def of(cls, hit: Hit, tokens: Vector) -> Basis:
        lower_tokens = np.maximum(tokens - hit.host_pages * hit.page_tokens, 0)
        return cls(1.0 + 0 * tokens, tokens, tokens * tokens, lower_tokens)


COEFFICIENTS = Basis(*np.eye(4))


class Stages(NamedTuple):
    """Lower bounds of the time from the start of the pass to the last layer's end, per tier that feeds it."""

    bus: list[Vector]
    lower: list[Vector]  # apply if tokens come from the lower tier; empty if it is read before the pass


def stages(costs: Costs, counts: tuple[Any, Any, Any], hit: Hit, basis: Basis) -> Stages:
    """`counts`: layers stored as nothing, hidden states, KV; integers or arrays of them."""
    one, tokens = basis.one, basis.tokens
    whole = one * (costs.layer_s(hit.prefill_tokens, hit.device_tokens) + hit.beside_layer_s)
    saved_s = costs.linear_s_per_token + hit.device_tokens * costs.attention_s_per_pair
    tail = whole - tokens * saved_s - basis.squared * (costs.attention_s_per_pair / 2)
    project = one * costs.projection_pass_s + tokens * costs.projection_s_per_token
    compute = (whole, tail + project, tail + tokens * costs.scatter_s_per_token)

    weights = one * (costs.weights_bus_s + hit.bus_queue_s / costs.layers)  # and others' copies
    latency = one * costs.bus_latency_s
    copies = (
        weights,
        weights + latency + tokens * costs.hidden_bus_s_per_token,
        weights + latency + tokens * costs.kv_bus_s_per_token,
    )
    bus = _bounds(copies, compute, counts, 0 * one)
    if not costs.streams:
        return Stages(bus, [])
    reads = (
        0 * one,
        basis.lower_tokens * costs.hidden_lower_s_per_token,
        basis.lower_tokens * costs.kv_lower_s_per_token,
    )
    return Stages(bus, _bounds(reads, compute, counts, one * (hit.lower_queue_s + costs.lower_latency_s)))


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
    """Seconds until the pass can start: the engine, and the lower tier where it does not stream."""
    wait = hit.start_s + 0 * basis.one
    if costs.streams or not hit.lower_pages:
        return wait
    _, hidden, kv = counts
    per_token = hidden * costs.hidden_lower_s_per_token + kv * costs.kv_lower_s_per_token
    read = hit.lower_queue_s + costs.lower_latency_s + basis.lower_tokens * per_token
    return np.maximum(wait, np.where(basis.lower_tokens > 0, read, 0.0))


def restore_s(costs: Costs, counts: tuple[Any, Any, Any], hit: Hit, tokens: Vector) -> Vector:
    """Seconds to the first token when the hit's first `tokens` (at least one) are restored and the rest is prefilled.

    Arrays of `counts` and `tokens` broadcast.
    """
    basis = Basis.of(hit, tokens)
    found = stages(costs, counts, hit, basis)
    busy = maximum(found.bus)
    if found.lower:
        busy = np.maximum(busy, np.where(basis.lower_tokens > 0, maximum(found.lower), 0.0))
    return waits(costs, counts, hit, basis) + busy + costs.head_s


def recompute_s(costs: Costs, hit: Hit) -> float:
    """Seconds to the first token when nothing is restored; the pass has others' copies and compute in it as well."""
    compute_s = float(costs.layer_s(hit.prefill_tokens, hit.device_tokens)) + hit.beside_layer_s
    return hit.start_s + costs.pass_s(compute_s, costs.weights_bus_s + hit.bus_queue_s / costs.layers)


def maximum(sums: list[Vector]) -> Vector:
    highest = sums[0]
    for other in sums[1:]:
        highest = np.maximum(highest, other)
    return highest
