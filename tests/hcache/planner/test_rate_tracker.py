"""Calibration that is wrong, a machine that changes, loads that stall."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_load
from sglang_hcache.planner.machine import Machine, machine_of
from sglang_hcache.planner.rate_tracker import OUTLIER, PROBE_EVERY, PROBE_PAGES, RateTracker, Resource
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B

LOADS = 20
NOISE = 0.15  # of the logarithm of each time
STALLS = 0.08  # of the loads take much longer
RATES = {
    "bus": ("bus_bytes_per_s",),
    "ssd": ("ssd_bytes_per_s",),
    "projection": ("projection_flop_per_s",),
    "prefill": ("gemm_flop_per_s", "attention_flop_per_s"),
}


class Server:
    """The true machine: it tells what loads took, with noise and stalls."""

    def __init__(self, true: Machine, calibrated: Machine, seed: int) -> None:
        self.true, self.calibrated = costs_of(LLAMA_2_7B, true), costs_of(LLAMA_2_7B, calibrated)
        self.random = random.Random(seed)

    def load(self, follower: RateTracker, layout: Layout, hit: Hit, pages: int) -> None:
        tokens = pages * hit.page_tokens
        lower_tokens = max(0, pages - hit.host_pages) * hit.page_tokens
        new = hit.prefill_tokens - tokens
        for resource, work_s in (
            (Resource.BUS, lambda c: tokens * per_token(c, layout, "bus")),
            (Resource.SSD, lambda c: lower_tokens * per_token(c, layout, "lower")),
            (Resource.PROJECTION, lambda c: layout.hidden * tokens * c.projection_s_per_token),
            (Resource.PREFILL, lambda c: c.layers * (c.layer_s(new, tokens) - c.layer_pass_s)),
        ):
            noise = math.exp(self.random.gauss(0, NOISE)) * (8 if self.random.random() < STALLS else 1)
            follower.observe(resource, work_s(self.calibrated), work_s(self.true) * noise)

    def read(self, follower: RateTracker, layout: Layout, tokens: int) -> None:
        calibrated_s, true_s = (tokens * per_token(costs, layout, "lower") for costs in (self.calibrated, self.true))
        follower.observe(Resource.SSD, calibrated_s, true_s * math.exp(self.random.gauss(0, NOISE)))


def per_token(costs: Costs, layout: Layout, tier: str) -> float:
    hidden: float = getattr(costs, f"hidden_{tier}_s_per_token")
    kv: float = getattr(costs, f"kv_{tier}_s_per_token")
    return layout.hidden * hidden + layout.kv * kv


def some_hit(chance: random.Random) -> Hit:
    return Hit(64, chance.randint(10, 150), chance.randint(10, 150), new_tokens=chance.randint(50, 500))


def true_s(costs: Costs, layout: Layout, hit: Hit, pages: int) -> float:
    if not pages:
        return recompute_s(costs, hit)
    return float(restore_s(costs, (layout.none, layout.hidden, layout.kv), hit, pages * hit.page_tokens))


def calibrated_wrongly(true: Machine, wrong: dict[str, float]) -> Machine:
    fields = {field: getattr(true, field) * factor for name, factor in wrong.items() for field in RATES[name]}
    return replace(true, **fields)


WRONG = [{name: factor} for name, factor in itertools.product(RATES, (0.1, 10.0))] + [
    dict(zip(RATES, factors, strict=True)) for factors in itertools.product((0.1, 10.0), repeat=4)
]


@pytest.mark.parametrize("gpu", ["A10G", "A100-80", "H200"])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_ten_times_wrong_is_right_within_20_loads(wrong: dict[str, float], gpu: str) -> None:
    true = machine_of(gpu, drives=2, drive_bytes_per_s=7e9)
    calibrated = calibrated_wrongly(true, wrong)
    layout = Layout(0, LLAMA_2_7B.layers, 0)
    for seed in range(3):
        chance = random.Random(seed)
        follower, server = RateTracker(calibrated), Server(true, calibrated, seed)
        for _ in range(LOADS):
            hit = some_hit(chance)
            believed = costs_of(LLAMA_2_7B, follower.machine())
            plan = plan_load(believed, layout, hit, least_pages=follower.trial_pages(hit.host_pages))
            server.load(follower, layout, hit, plan.pages)
            if plan.pages <= hit.host_pages and follower.due(Resource.SSD):
                server.read(follower, layout, PROBE_PAGES * hit.page_tokens)
        believed = costs_of(LLAMA_2_7B, follower.machine())
        for _ in range(5):
            hit = some_hit(chance)
            right_s = plan_load(server.true, layout, hit).seconds
            assert true_s(server.true, layout, hit, plan_load(believed, layout, hit).pages) <= 1.2 * right_s
        reference = Hit(64, 0, 128)
        saved = plan_save(believed, reference).layout
        assert plan_load(server.true, saved, reference).seconds <= 1.2 * plan_save(server.true, reference).seconds


def test_without_following_such_a_calibration_does_harm() -> None:
    """So that the test above shows something."""
    true = machine_of("A10G", drives=2, drive_bytes_per_s=7e9)
    layout, hit = Layout(0, 32, 0), Hit(64, 100, 0, new_tokens=100)
    believed = costs_of(LLAMA_2_7B, calibrated_wrongly(true, {"bus": 0.1, "prefill": 10.0}))
    truth = costs_of(LLAMA_2_7B, true)
    taken_s = true_s(truth, layout, hit, plan_load(believed, layout, hit).pages)
    assert taken_s > 2 * plan_load(truth, layout, hit).seconds


def test_stalls_do_not_move_a_rate_and_a_change_does() -> None:
    follower = RateTracker(machine_of("A100-80"))
    chance = random.Random(1)
    for step in range(60):
        stalled = step % 10 == 9
        follower.observe(Resource.BUS, 1.0, math.exp(chance.gauss(0, 0.1)) * (20 if stalled else 1))
        assert 1 / 1.3 < follower.factor(Resource.BUS) < 1.3
    for _ in range(8):
        follower.observe(Resource.BUS, 1.0, 5 * math.exp(chance.gauss(0, 0.1)))
    assert follower.factor(Resource.BUS) == pytest.approx(5, rel=0.2)
    assert follower.factor(Resource.SSD) == 1.0


def test_a_slow_drift_is_followed() -> None:
    follower = RateTracker(machine_of("A100-80"))
    for step in range(100):
        follower.observe(Resource.PREFILL, 1.0, 1.02**step)
    assert follower.factor(Resource.PREFILL) == pytest.approx(1.02**99, rel=0.1)
    assert OUTLIER < 1.02**99


def test_what_cannot_be_a_time_is_ignored() -> None:
    follower = RateTracker(machine_of("A100-80"))
    for expected_s, actual_s in ((0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.inf, 1.0)):
        follower.observe(Resource.BUS, expected_s, actual_s)
    assert follower.factor(Resource.BUS) == 1.0
    assert follower.machine() == machine_of("A100-80")


def test_a_load_whose_projection_was_slower_has_tried_host_memory() -> None:
    follower = RateTracker(machine_of("A100-80"))
    for _ in range(3 * PROBE_EVERY):
        assert follower.trial_pages(50) == 0
        follower.observe(Resource.PROJECTION, 1.0, 1.0)


def test_a_tier_is_tried_after_some_plans_without_a_load() -> None:
    follower = RateTracker(machine_of("A100-80"))
    for _ in range(PROBE_EVERY - 1):
        follower.observe(Resource.BUS, 1.0, 1.0)
        assert follower.trial_pages(50) == 0
        assert not follower.due(Resource.SSD)
    assert follower.due(Resource.SSD)
    follower.observe(Resource.SSD, 1.0, 1.0)
    assert not follower.due(Resource.SSD)
    asked = [follower.trial_pages(50) for _ in range(PROBE_EVERY)]
    assert asked[0] == 0
    assert asked[-1] == PROBE_PAGES
    assert follower.trial_pages(2) == 2
