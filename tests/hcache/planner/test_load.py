from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import LEAST_GAIN, plan_head_start, plan_load, split_seconds
from sglang_hcache.planner.machine import Machine, machine_of
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B, LLAMA_3_8B, costs, hits, machines, shapes

HIDDEN = Layout(0, 32, 0)


def layouts(layers: int) -> st.SearchStrategy[Layout]:
    def build(pair: tuple[int, int]) -> Layout:
        none, hidden = min(pair), max(pair) - min(pair)
        return Layout(none, hidden, layers - none - hidden)

    return st.tuples(st.integers(0, layers), st.integers(0, layers)).map(build)


@given(costs(), hits(), st.data())
@settings(max_examples=200, deadline=None)
def test_every_split_is_looked_at_and_the_best_taken(found: Costs, hit: Hit, data: st.DataObject) -> None:
    layout = data.draw(layouts(found.layers))
    counts = (layout.none, layout.hidden, layout.kv)
    tokens = hit.page_tokens * np.arange(1.0, hit.pages + 1)
    expected = restore_s(found, counts, hit, tokens)
    plan, alone_s = plan_load(found, layout, hit), recompute_s(found, hit)
    if layout.hidden + layout.kv == 0:
        assert (plan.pages, plan.seconds) == (0, alone_s)
        return
    np.testing.assert_allclose(split_seconds(found, layout, hit), expected, rtol=1e-7)
    assert plan.seconds <= min(expected.min(), alone_s) * (1 + 1e-7)
    taken = expected[plan.pages - 1] if plan.pages else alone_s
    assert plan.seconds == pytest.approx(taken, rel=1e-7)


@given(shapes(), machines(), hits(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_faster_machine_or_a_shorter_queue_never_makes_it_later(
    shape: ModelShape, machine: Machine, hit: Hit, data: st.DataObject
) -> None:
    layout = data.draw(layouts(shape.layers))
    before = plan_load(costs_of(shape, machine), layout, hit).seconds
    lower = f"{machine.lower_tier.name}_bytes_per_s"
    rate = data.draw(st.sampled_from(["bus_bytes_per_s", lower, "gemm_flop_per_s", "projection_flop_per_s"]))
    factor = data.draw(st.floats(1, 10))
    faster = replace(machine, **{rate: factor * getattr(machine, rate)})
    assert plan_load(costs_of(shape, faster), layout, hit).seconds <= before * (1 + 1e-9)
    queue = data.draw(st.sampled_from(["start_s", "bus_queue_s", "lower_queue_s"]))
    no_queue: dict[str, Any] = {queue: 0.0}
    sooner = replace(hit, **no_queue)
    assert plan_load(costs_of(shape, machine), layout, sooner).seconds <= before * (1 + 1e-9)
    fetched = replace(hit, host_pages=hit.pages, lower_pages=0)
    assert plan_load(costs_of(shape, machine), layout, fetched).seconds <= before * (1 + 1e-9)


def test_all_is_restored_where_io_is_fast_and_nothing_where_it_is_slow() -> None:
    machine = machine_of("A10G")
    hit = Hit(64, 128, new_tokens=50)
    fast = replace(machine, bus_bytes_per_s=1e12)
    slow = replace(machine, bus_bytes_per_s=1e8)
    assert plan_load(costs_of(LLAMA_2_7B, fast), HIDDEN, hit).pages == 128
    assert plan_load(costs_of(LLAMA_2_7B, slow), Layout(0, 0, 32), hit).pages < 16
    medium = costs_of(LLAMA_2_7B, replace(machine, bus_bytes_per_s=2.5e9))
    between = plan_load(medium, HIDDEN, hit)
    assert 32 < between.pages < 128
    assert between.seconds < 0.8 * recompute_s(medium, hit)


def test_below_break_even_nothing_is_restored() -> None:
    machine = replace(machine_of("H200"), bus_latency_s=2e-3)
    found = costs_of(LLAMA_2_7B, machine)
    hit = Hit(64, 1, new_tokens=16)
    restored = [plan_load(found, HIDDEN, replace(hit, host_pages=pages)).pages > 0 for pages in range(1, 512)]
    assert restored == sorted(restored), "and above it, something is"
    assert restored[-1]
    assert not restored[1]
    hopeless = costs_of(LLAMA_2_7B, replace(machine, bus_bytes_per_s=1e5))
    assert plan_load(hopeless, HIDDEN, replace(hit, host_pages=512)).pages == 0


def test_what_is_only_on_a_slow_drive_is_prefilled() -> None:
    machine = machine_of("H200", drives=1, drive_bytes_per_s=0.5e9)
    hit = Hit(64, host_pages=50, lower_pages=50, new_tokens=100)
    assert plan_load(costs_of(LLAMA_2_7B, machine), HIDDEN, hit).pages == 50


def test_a_queue_on_the_bus_is_waited_for_while_that_pays() -> None:
    found = costs_of(LLAMA_2_7B, machine_of("H200"))
    hit = Hit(64, 256, new_tokens=100)
    free = plan_load(found, HIDDEN, hit)
    queued = plan_load(found, HIDDEN, replace(hit, bus_queue_s=0.2))
    hopeless = plan_load(found, HIDDEN, long := replace(hit, bus_queue_s=10.0))
    assert free.pages >= queued.pages > hopeless.pages == 0
    assert free.seconds < queued.seconds < free.seconds + 0.2, "it is computed while the others' copies are made"
    assert hopeless.seconds == recompute_s(found, long) > 10, "the pass waits for what others restore"


@pytest.mark.parametrize(
    ("gpu", "shape", "layout", "pages"),
    [("A100-80", LLAMA_2_7B, HIDDEN, 32), ("H100", LLAMA_3_8B, Layout(0, 0, 32), 16)],
)
def test_hits_of_one_batch_share_the_bus_and_the_engine(
    gpu: str, shape: ModelShape, layout: Layout, pages: int
) -> None:
    """Each recomputed by itself would be faster than waiting for the copies of many, but the engine adds them up."""
    found = costs_of(shape, machine_of(gpu))
    copy_s = 64 * (layout.hidden * found.hidden_bus_s_per_token + layout.kv * found.kv_bus_s_per_token)
    make_s = 64 * (found.projection_s_per_token if layout.hidden else found.scatter_s_per_token)
    hit = Hit(64, pages, new_tokens=64)
    for _ in range(16):
        plan = plan_load(found, layout, hit)
        rest = hit.prefill_tokens - 64 * plan.pages
        hit = replace(
            hit,
            bus_queue_s=hit.bus_queue_s + plan.pages * copy_s,
            beside_layer_s=hit.beside_layer_s
            + (found.layer_s(rest, 64 * plan.pages) - found.layer_pass_s)
            + plan.pages * make_s,
        )
    new_s = found.layer_s(64, 64 * pages) - found.layer_pass_s
    compute_s = found.layer_pass_s + 16 * (new_s + pages * make_s)
    all_restored_s = found.pass_s(compute_s, 16 * pages * copy_s / layout.layers)
    assert plan.seconds < 1.05 * all_restored_s


def test_a_probe_restores_what_does_not_pay() -> None:
    found = costs_of(LLAMA_2_7B, replace(machine_of("H200"), bus_bytes_per_s=1e6))
    assert plan_load(found, HIDDEN, Hit(64, 100)).pages == 0
    assert plan_load(found, HIDDEN, Hit(64, 100), least_pages=4).pages == 4
    assert plan_load(found, HIDDEN, Hit(64, 3), least_pages=4).pages == 3


def instructions(call: Callable[[], object]) -> int:
    """Of the interpreter."""
    count, tracing = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    gc.disable()  # hypothesis is called at each collection, and would count
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(tracing)
        gc.enable()
    return count


def most_bytes(call: Callable[[], object]) -> int:
    """That it takes at a time."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("streams", [False, True])
def test_of_a_longer_hit_only_the_arrays_are_longer(streams: bool) -> None:
    """How long it takes is in bench/results; at the bound here, a hit of 128K tokens would take 200 µs."""
    found = costs_of(LLAMA_2_7B, machine_of("A100-80", drives=4, drive_bytes_per_s=7e9, streams=streams))
    counts, sizes = list[int](), list[int]()
    for pages in (50, 1000, 2000):
        hit = Hit(64, pages, pages + 48, new_tokens=100, start_s=1e-3)
        plan = partial(plan_load, found, Layout(0, 30, 2), hit)
        plan()  # what is kept of hits with as many pages is made
        counts.append(instructions(plan))
        sizes.append(most_bytes(plan))
    assert len(set(counts)) == 1
    assert counts[0] < 3000
    assert sizes[2] < 2.1 * sizes[1]


@settings(max_examples=150, deadline=None)
@given(costs(), hits(60), st.booleans())
def test_a_head_start_is_the_best_of_all(found: Costs, hit: Hit, kv: bool) -> None:
    """Of every number of pages, each as two things at a time and a third after them; or it gains too little."""
    found, hit = replace(found, streams=False), replace(hit, bus_queue_s=0.0, beside_layer_s=0.0)
    layout = Layout(0, 0, found.layers) if kv else Layout(0, found.layers, 0)
    row_s = found.kv_lower_s_per_token if kv else found.hidden_lower_s_per_token

    def seconds(pages: int) -> float:
        tokens = pages * hit.page_tokens
        computed = tokens - hit.host_pages * hit.page_tokens
        before, behind = hit.device_tokens, hit.pages - pages
        engine_s = plan_load(
            found, layout, Hit(hit.page_tokens, hit.host_pages, new_tokens=computed, device_tokens=before)
        ).seconds
        drives_s = hit.lower_queue_s + found.lower_latency_s + behind * hit.page_tokens * found.layers * row_s
        rest = Hit(hit.page_tokens, behind, new_tokens=hit.new_tokens, device_tokens=before + tokens)
        return max(hit.start_s + engine_s, drives_s) + plan_load(found, layout, rest).seconds

    without = plan_load(found, layout, hit).seconds
    best = min((seconds(pages) for pages in range(hit.host_pages + 1, hit.pages)), default=without)
    plan = plan_head_start(found, layout, hit)
    if plan is not None:
        assert hit.host_pages < plan.pages < hit.pages
        assert plan.seconds == pytest.approx(seconds(plan.pages))
        assert plan.seconds <= (1 - LEAST_GAIN) * without
        assert plan.seconds <= best * 1.02
    else:
        assert best > (1 - LEAST_GAIN) * without * 0.98


def test_a_head_start_meets_the_drive_half_way() -> None:
    """Where reading and prefilling take equally long, both together take half as long."""
    found = costs_of(LLAMA_2_7B, machine_of("A100-80", drives=1, drive_bytes_per_s=1e9))
    hit = Hit(64, 0, 64, new_tokens=64)
    even = replace(found, hidden_lower_s_per_token=found.prefill_s(4096) / 4096 / found.layers)

    def pages(costs: Costs, hit: Hit = hit) -> int:
        plan = plan_head_start(costs, HIDDEN, hit)
        return 0 if plan is None else plan.pages

    assert 28 <= pages(even) <= 36
    assert pages(replace(even, hidden_lower_s_per_token=1e-9)) == 0, "the drive needs no help"
    assert pages(replace(even, hidden_lower_s_per_token=1.0)) == 0, "nor the engine"
    assert 16 + 16 < pages(even, replace(hit, host_pages=16, lower_pages=48)) < 64
    assert pages(even, replace(hit, host_pages=64, lower_pages=0)) == 0
    assert pages(replace(even, streams=True)) == 0


def test_reads_that_go_on_in_vain_count_against_a_head_start_only() -> None:
    """Without one, they are the first that are needed."""
    found = costs_of(LLAMA_2_7B, machine_of("H100", drives=4, drive_bytes_per_s=7e9))
    hit = Hit(64, 0, 32, new_tokens=64)
    in_vain_s = 32 * 64 * 32 * found.hidden_lower_s_per_token
    free, late = (plan_head_start(found, HIDDEN, hit, in_vain_s=s) for s in (0.0, in_vain_s / 16))
    assert free is not None
    assert late is not None
    assert late.pages > free.pages
    assert free.seconds < late.seconds < plan_load(found, HIDDEN, hit).seconds
    assert plan_head_start(found, HIDDEN, hit, in_vain_s=in_vain_s) is None
