from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.order import Waiting, in_order
from bench.simulate import Arrival, Method, Restore, simulate
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import AGEING, plan_load
from sglang_hcache.planner.machine import machine_of
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B, costs, hits


def served(waiting: list[Waiting]) -> list[Waiting]:
    """One server, that picks the next whenever it is free."""
    pending, done, now_s = sorted(waiting, key=lambda one: one.arrival_s), list[Waiting](), 0.0
    while pending:
        now_s = max(now_s, pending[0].arrival_s)
        chosen = in_order([one for one in pending if one.arrival_s <= now_s])[0]
        pending.remove(chosen)
        done.append(chosen)
        now_s += chosen.restore_s
    return done


def test_the_shortest_goes_first() -> None:
    waiting = [Waiting("long", 0.4, 0.0), Waiting("short", 0.1, 0.01), Waiting("middle", 0.2, 0.02)]
    assert [one.request for one in in_order(waiting)] == ["short", "middle", "long"]


@given(st.lists(st.tuples(st.floats(0.001, 2), st.floats(0, 20)), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_none_is_overtaken_by_those_that_come_too_late(drawn: list[tuple[float, float]]) -> None:
    waiting = [Waiting(index, restore_s, arrival_s) for index, (restore_s, arrival_s) in enumerate(drawn)]
    order = served(waiting)
    assert sorted(one.request for one in order) == list(range(len(waiting)))
    for place, one in enumerate(order):
        for earlier in order[:place]:
            assert earlier.arrival_s <= one.arrival_s + one.restore_s / AGEING + 1e-9


def test_a_long_restoration_is_served_amid_a_flood_of_short_ones() -> None:
    """The short ones come twice as fast as they can be served, for ever."""
    long = Waiting("long", 2.0, 0.05)
    flood = [Waiting(index, 0.1, 0.05 * index) for index in range(600)]
    order = [one.request for one in served([long, *flood])]
    assert order.index("long") < 600 / 2
    assert order.index("long") > 5, "nor does it go first"


def test_ageing_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="starve"):
        in_order([], ageing=0.0)


@given(costs(), hits(), st.sampled_from([Restore.ALL, Restore.PLANNED, Restore.NOTHING]))
@settings(max_examples=150, deadline=None)
def test_alone_a_simulated_request_takes_what_the_planner_expects(found: Costs, hit: Hit, restore: Restore) -> None:
    hit = replace(hit, remote_pages=0, start_s=0.0, bus_queue_s=0.0, ssd_queue_s=0.0)
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
