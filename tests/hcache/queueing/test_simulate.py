from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulate import Arrival, Method, Restore, simulate
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_load
from sglang_hcache.planner.machine import machine_of
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B, costs, hits


def test_of_those_that_wait_the_shortest_goes_first() -> None:
    found = costs_of(LLAMA_2_7B, machine_of("A100-80"))
    arrivals = [Arrival(0.001 * index, Hit(64, pages)) for index, pages in enumerate((64, 200, 16, 100))]
    seconds = simulate(found, arrivals, Method(Layout(0, 32, 0), Restore.ALL))
    ends = [arrival.at_s + after for arrival, after in zip(arrivals, seconds, strict=True)]
    assert sorted(range(4), key=ends.__getitem__) == [0, 2, 3, 1], "the first, which found nobody, aside"


@given(costs(), hits(), st.sampled_from([Restore.ALL, Restore.PLANNED, Restore.NOTHING]))
@settings(max_examples=150, deadline=None)
def test_alone_a_simulated_request_takes_what_the_planner_expects(found: Costs, hit: Hit, restore: Restore) -> None:
    hit = replace(hit, start_s=0.0, bus_queue_s=0.0, lower_queue_s=0.0, beside_layer_s=0.0)
    hit = replace(hit, host_pages=max(1, hit.host_pages))
    layout = Layout(0, found.layers // 2, found.layers - found.layers // 2)
    counts = (layout.none, layout.hidden, layout.kv)
    expected = {
        Restore.ALL: float(restore_s(found, counts, hit, hit.pages * hit.page_tokens)),
        Restore.PLANNED: plan_load(found, layout, hit).seconds,
        Restore.NOTHING: recompute_s(found, hit),
    }[restore]
    assert simulate(found, [Arrival(3.0, hit)], Method(layout, restore))[0] == pytest.approx(expected, rel=1e-7)


def test_under_load_the_plan_serves_sooner_than_any_single_method() -> None:
    found = costs_of(LLAMA_2_7B, machine_of("A100-80"))
    hits_ = [Hit(64, pages, new_tokens=100) for pages in (16, 240, 32, 128, 64, 200, 16, 90)] * 5
    arrivals = [Arrival(0.12 * index, hit) for index, hit in enumerate(hits_)]
    hidden, kv = Layout(0, 32, 0), Layout(0, 0, 32)

    def mean_s(method: Method) -> float:
        return sum(simulate(found, arrivals, method)) / len(arrivals)

    planned_s = mean_s(Method(hidden, Restore.PLANNED))
    others = [Method(hidden, Restore.NOTHING), Method(hidden, Restore.ALL), Method(kv, Restore.ALL)]
    assert planned_s <= 1.01 * min(map(mean_s, others))
    assert planned_s < mean_s(others[0]) / 2
