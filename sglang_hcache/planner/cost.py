"""Costs of a model on a machine, in seconds per token and layer. docs/planner.md derives the formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape

Vector = Any  # a float, or a numpy array of them: the formulas are the same


@dataclass(frozen=True)
class Costs:
    """All layers cost the same: their mean, where some see a window only. A pass is one forward over all layers."""

    layers: int
    hidden_bytes_per_token: int  # of a layer
    kv_bytes_per_token: int
    linear_s_per_token: float  # matrix products of a layer, and attention where it sees a window only
    attention_s_per_pair: float  # a query and a key it sees
    layer_pass_s: float  # reading a layer's weights from device memory, whatever the tokens
    projection_s_per_token: float
    projection_pass_s: float  # reading W_k and W_v
    scatter_s_per_token: float  # K and V that have been copied, to their slots
    head_s: float  # logits, once a pass
    weights_bus_s: float  # of a layer's weights that lie in host memory, every pass
    bus_latency_s: float  # a layer's copy
    hidden_bus_s_per_token: float
    kv_bus_s_per_token: float
    hidden_lower_s_per_token: float  # from `Machine.lower_tier` into host memory
    kv_lower_s_per_token: float
    lower_latency_s: float
    streams: bool  # see `Machine.streams`

    def layer_s(self, tokens: Vector, context_tokens: Vector) -> Vector:
        """A layer's forward of `tokens` after `context_tokens`: each attends to those and half of the new ones."""
        pairs = tokens * (context_tokens + tokens / 2)
        return self.layer_pass_s + tokens * self.linear_s_per_token + pairs * self.attention_s_per_pair

    def project_s(self, tokens: Vector) -> Vector:
        """A layer's K and V from `tokens` hidden states (at least one)."""
        return self.projection_pass_s + tokens * self.projection_s_per_token

    def prefill_s(self, tokens: float, context_tokens: float = 0) -> float:
        """A whole pass with no I/O but the weights', the first logits included."""
        return self.pass_s(float(self.layer_s(tokens, context_tokens)), self.weights_bus_s)

    def pass_s(self, compute_s: float, copies_s: float) -> float:
        """A whole pass, the first logits included, of which each layer takes so long to copy and then to compute."""
        return self.layers * max(compute_s, copies_s) + min(compute_s, copies_s) + self.head_s


def costs_of(shape: ModelShape, machine: Machine, *, offloaded: float = 0.0) -> Costs:
    """`offloaded`: the part, 0 to 1, of every layer's weights that lies in host memory."""
    if not 0 <= offloaded <= 1:
        raise ValueError(f"offloaded must be between 0 and 1, not {offloaded}")
    ranks = machine.ranks
    # A ring reduces in two halves, each of which moves (ranks - 1) / ranks of the data; twice a layer.
    half_s = shape.activation_bytes * (ranks - 1) / ranks / machine.peer_bytes_per_s
    kv_shares, kv_bytes = shape.kv_shares(ranks), shape.kv_bytes * shape.kv_copies(ranks)
    lower_tier = machine.lower_tier
    # A tier that is absent must never be chosen, and must not make NaN of 0 bytes from it.
    lower_s = 1 / lower_tier.bytes_per_s if lower_tier.bytes_per_s > 0 else 1.0
    weight_bytes = shape.layer_weight_bytes / ranks
    windowed = shape.windowed_layers / shape.layers
    pair_s = shape.attention_flop_per_pair / ranks / machine.attention_flop_per_s
    return Costs(
        layers=shape.layers,
        hidden_bytes_per_token=shape.hidden_bytes,
        kv_bytes_per_token=kv_bytes,
        linear_s_per_token=shape.linear_flop / ranks / machine.gemm_flop_per_s
        + 4 * half_s
        + windowed * shape.window * pair_s,
        attention_s_per_pair=(1 - windowed) * pair_s,
        layer_pass_s=weight_bytes / machine.memory_bytes_per_s,
        projection_s_per_token=shape.projection_flop / kv_shares / machine.projection_flop_per_s,
        projection_pass_s=shape.projection_weight_bytes / kv_shares / machine.memory_bytes_per_s,
        scatter_s_per_token=shape.kv_bytes / kv_shares / machine.scatter_bytes_per_s,
        head_s=shape.head_weight_bytes / ranks / machine.memory_bytes_per_s,
        weights_bus_s=offloaded * weight_bytes / machine.bus_bytes_per_s,
        bus_latency_s=machine.bus_latency_s,
        hidden_bus_s_per_token=shape.hidden_bytes / machine.bus_bytes_per_s,
        kv_bus_s_per_token=shape.kv_bytes / kv_shares / machine.bus_bytes_per_s,
        hidden_lower_s_per_token=shape.hidden_bytes * lower_s,
        kv_lower_s_per_token=kv_bytes * lower_s,
        lower_latency_s=lower_tier.latency_s,
        streams=machine.streams,
    )
