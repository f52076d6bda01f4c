"""Random models, machines and loads for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit

LLAMA_2_7B = ModelShape("Llama-2-7B", 32, 4096, 32, 32, 128, 11008, 32000)
LLAMA_3_8B = ModelShape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256)


def decades(low: float, high: float) -> st.SearchStrategy[float]:
    """Log-uniform powers of ten."""
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


@st.composite
def shapes(draw: st.DrawFn, layers: st.SearchStrategy[int] | None = None) -> ModelShape:
    heads = draw(st.sampled_from([4, 8, 16, 32, 64]))
    experts = draw(st.sampled_from([(1, 1), (8, 2), (64, 6)]))
    return ModelShape(
        name="random",
        layers=draw(st.integers(1, 48) if layers is None else layers),
        hidden_size=draw(st.sampled_from([256, 1024, 4096, 8192])),
        query_heads=heads,
        kv_heads=heads // draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([64, 128, 256])),
        intermediate_size=draw(st.sampled_from([512, 4096, 16384])),
        vocabulary=32000,
        gated_mlp=draw(st.booleans()),
        experts=experts[0],
        active_experts=experts[1],
        weight_bits=draw(st.sampled_from([0.0, 4.25, 8.0])),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    gemm = draw(decades(12, 15.5))
    tier = draw(st.sampled_from(["ssd", "remote"]))
    lower: dict[str, Any] = {
        f"{tier}_bytes_per_s": draw(decades(8, 10.7)),
        f"{tier}_latency_s": draw(st.floats(0, 1e-3)),
    }
    return Machine(
        name="random",
        gemm_flop_per_s=gemm,
        projection_flop_per_s=gemm * draw(st.floats(0.3, 1.2)),
        attention_flop_per_s=gemm * draw(st.floats(0.2, 1)),
        memory_bytes_per_s=draw(decades(11, 13)),
        bus_bytes_per_s=draw(decades(9, 11.3)),
        ranks=draw(st.sampled_from([1, 2, 4])),
        scatter_bytes_per_s=draw(decades(9, 13)),
        bus_latency_s=draw(st.floats(0, 1e-4)),
        peer_bytes_per_s=draw(decades(10, 12)),
        streams=draw(st.booleans()),
        **lower,
    )


@st.composite
def costs(draw: st.DrawFn, layers: st.SearchStrategy[int] | None = None) -> Costs:
    offloaded = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    return costs_of(draw(shapes(layers)), draw(machines()), offloaded=offloaded)


@st.composite
def hits(draw: st.DrawFn, most_pages: int = 200) -> Hit:
    pages = st.integers(0, most_pages)
    hit = Hit(
        page_tokens=draw(st.sampled_from([1, 16, 64])),
        host_pages=draw(pages),
        lower_pages=draw(pages),
        new_tokens=draw(st.integers(1, 2000)),
        device_tokens=draw(st.integers(0, 5000)),
        start_s=draw(st.floats(0, 0.2)),
        bus_queue_s=draw(st.floats(0, 0.2)),
        lower_queue_s=draw(st.floats(0, 0.2)),
        beside_layer_s=draw(st.floats(0, 0.02)),
    )
    return hit if hit.pages else replace(hit, host_pages=1)


def plain_restore_s(costs: Costs, kinds: list[str], hit: Hit, pages: int) -> float:
    """`timeline.restore_s`, said again layer by layer as two machines in a row, for any order of representations."""
    tokens = pages * hit.page_tokens
    lower = max(0, pages - hit.host_pages) * hit.page_tokens
    read_s = {"none": 0.0, "hidden": lower * costs.hidden_lower_s_per_token, "kv": lower * costs.kv_lower_s_per_token}
    begin_s, read_done_s = hit.start_s, hit.lower_queue_s + costs.lower_latency_s
    if lower and not costs.streams:
        begin_s = max(begin_s, read_done_s + sum(read_s[kind] for kind in kinds))
    gpu_s = bus_s = 0.0
    for kind in kinds:
        bus_s += costs.weights_bus_s + hit.bus_queue_s / len(kinds)
        if kind == "none":
            gpu_s = max(gpu_s, bus_s) + costs.layer_s(hit.prefill_tokens, hit.device_tokens) + hit.beside_layer_s
            continue
        bus_s += costs.bus_latency_s
        bus_s += tokens * (costs.hidden_bus_s_per_token if kind == "hidden" else costs.kv_bus_s_per_token)
        ready_s = bus_s
        if costs.streams and lower:
            read_done_s += read_s[kind]
            ready_s = max(ready_s, read_done_s)
        gpu_s = max(gpu_s, ready_s)
        if kind == "hidden":
            gpu_s += costs.project_s(tokens)
        if kind == "kv":
            gpu_s += tokens * costs.scatter_s_per_token
        gpu_s += costs.layer_s(hit.prefill_tokens - tokens, hit.device_tokens + tokens) + hit.beside_layer_s
    return begin_s + gpu_s + costs.head_s
