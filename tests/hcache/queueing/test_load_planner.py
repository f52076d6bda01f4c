"""What is restored of a hit, and waited for, and how that follows what loads really took."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.machine import Machine, machine_of
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.queueing.load_planner import LoadPlanner, Prompt, RestoreAll

PAGE = 64
SHAPE = ModelShape("m", 8, 1024, 16, 16, 64, 2816, 32000, dtype_bytes=4)
CPU = Machine("cpu", 100e9, 100e9, 30e9, 20e9, 3e9, ssd_bytes_per_s=1e9)
HIDDEN = Layout(0, 8, 0)
PROMPT = Prompt(new_tokens=64, device_tokens=0)


def planner(machine: Machine = CPU, layout: Layout = HIDDEN) -> LoadPlanner:
    return LoadPlanner(SHAPE, machine, layout, PAGE)


def test_a_hit_in_memory_is_restored_whole_where_that_is_fast() -> None:
    assert planner().pages(64, PROMPT) == 64


def test_a_hit_is_prefilled_where_the_bus_is_slow() -> None:
    slow = planner(replace(CPU, bus_bytes_per_s=1e6))
    assert slow.pages(64, PROMPT) == 0
    assert slow.pages(64, PROMPT, least_pages=4) == 4


@pytest.mark.parametrize(("ssd_bytes_per_s", "waits"), [(1e9, True), (1e6, False)])
def test_a_request_waits_for_drives_that_are_fast(ssd_bytes_per_s: float, *, waits: bool) -> None:
    found = planner(replace(CPU, ssd_bytes_per_s=ssd_bytes_per_s)).worth_waiting_for(4, 60, PROMPT)
    assert found == (64 if waits else 4)


def test_waiting_costs_nothing_while_the_engine_is_busy() -> None:
    slow = planner(replace(CPU, ssd_bytes_per_s=5e6))
    assert slow.worth_waiting_for(4, 60, PROMPT) == 4
    assert slow.worth_waiting_for(4, 60, PROMPT, start_s=50.0) == 64


def test_waiting_behind_others_reads_costs_their_time() -> None:
    fast = planner(replace(CPU, ssd_bytes_per_s=1e9))
    assert fast.worth_waiting_for(4, 60, PROMPT, queued_pages=60) == 64
    assert fast.worth_waiting_for(4, 60, PROMPT, queued_pages=60_000) == 4


def test_other_loads_on_the_bus_count() -> None:
    """The pass waits for them in any case: what is prefilled meanwhile costs nothing, if it ends before they do."""
    slow = planner(replace(CPU, bus_bytes_per_s=3e7))
    assert [slow.pages(8, PROMPT, queued_pages=queued) for queued in (0, 8, 64)] == [7, 5, 0]
    assert planner().pages(8, PROMPT, queued_pages=10_000) == 8, "their copies end sooner than the last layer would"


def test_to_wait_for_another_load_pays_where_that_takes_longer_than_a_forward() -> None:
    """Of a token: a quarter of the pages, where they take four times as long."""
    least = planner().least_shared_pages()
    costs = costs_of(SHAPE, CPU)
    page_s = PAGE * 8 * max(costs.hidden_bus_s_per_token, costs.projection_s_per_token)
    assert (least - 1) * page_s < costs.prefill_s(1) <= least * page_s
    slower = planner(replace(CPU, bus_bytes_per_s=CPU.bus_bytes_per_s / 100))
    assert 1 <= slower.least_shared_pages() < least
    assert RestoreAll(PAGE).least_shared_pages() == 8


def test_a_plan_restores_what_others_would_load_however_busy_the_bus_is() -> None:
    assert planner(replace(CPU, bus_bytes_per_s=3e7)).pages(8, PROMPT, queued_pages=64, least_pages=3) >= 3


def test_before_pages_that_are_missing_there_is_time_to_restore_more() -> None:
    slow = planner(replace(CPU, bus_bytes_per_s=1e7))
    assert slow.pages(8, PROMPT) < 8
    assert slow.pages(8, PROMPT, missing_pages=64) == 8


def test_the_engine_is_expected_to_be_busy_with_what_is_missing() -> None:
    fast = planner()
    costs = costs_of(SHAPE, CPU)
    assert fast.pass_s(64, PROMPT, missing_pages=0) < fast.pass_s(32, PROMPT, missing_pages=32)
    alone_s, beside_s = fast.pass_s(0, PROMPT, missing_pages=64)
    assert alone_s == pytest.approx(costs.prefill_s(65 * PAGE))
    assert alone_s - beside_s == pytest.approx(costs.layers * costs.layer_pass_s + costs.head_s), "read once for all"


def test_beside_much_compute_for_others_more_is_restored() -> None:
    slow = planner(replace(CPU, bus_bytes_per_s=1e7))
    alone = slow.pages(8, PROMPT)
    slow.batched(64 * PAGE, 0)
    assert slow.pages(8, PROMPT) == 8 > alone
    slow.batch_begins()
    assert slow.pages(8, PROMPT) == alone


def test_a_remote_store_is_the_lower_tier_where_there_is_one() -> None:
    near = planner(replace(CPU, ssd_bytes_per_s=0.0, remote_bytes_per_s=1e9))
    far = planner(replace(CPU, ssd_bytes_per_s=0.0, remote_bytes_per_s=1e6))
    assert near.worth_waiting_for(0, 64, PROMPT) == 64
    assert far.worth_waiting_for(0, 64, PROMPT) == 0


def test_drives_that_turn_out_slow_are_waited_for_no_more_and_tried_again() -> None:
    follows = planner(replace(CPU, ssd_bytes_per_s=10e9))
    seconds = 64 * PAGE * 8 * SHAPE.hidden_bytes / 2e6
    waited, probes = list[int](), list[int]()
    for _ in range(120):
        wanted = follows.worth_waiting_for(0, 64, PROMPT)
        waited.append(wanted)
        follows._costs_at = 0.0  # as if time had passed
        if wanted:
            follows.read(wanted, seconds * wanted / 64)
        elif follows.tries_drives():
            follows.read(4, seconds * 4 / 64)
            probes.append(len(waited))
    assert waited[0] == 64
    assert set(waited[3:]) == {0}, "nobody waits"
    gaps = [later - sooner for sooner, later in pairwise(probes)]
    assert gaps == sorted(gaps), "a tier that stays slow is tried less and less often"
    assert gaps[-1] > gaps[0]


@pytest.mark.parametrize(
    ("machine", "tier", "other"),
    [(CPU, "ssd", "remote"), (replace(CPU, ssd_bytes_per_s=0.0, remote_bytes_per_s=1e9), "remote", "ssd")],
)
def test_reads_tell_the_rate_of_the_lower_tier_that_is_there(machine: Machine, tier: str, other: str) -> None:
    follows = planner(machine)
    for _ in range(20):
        follows.read(64, 10 * 64 * PAGE * 8 * SHAPE.hidden_bytes / 1e9)
    assert follows.stats()[f"slower_{tier}"] == pytest.approx(10, rel=0.1)
    assert follows.stats()[f"slower_{other}"] == 1.0


def test_what_was_given_up_says_only_that_it_is_slower() -> None:
    follows = planner()
    seconds = 4 * PAGE * 8 * SHAPE.hidden_bytes / 1e9
    for _ in range(20):
        follows.read(4, seconds / 10, at_least=True)
    assert follows.stats()["slower_ssd"] == 1.0
    for _ in range(20):
        follows.read(4, seconds * 10, at_least=True)
    assert follows.stats()["slower_ssd"] == pytest.approx(10, rel=0.1)


def test_a_slower_machine_restores_more() -> None:
    """Forwards that take five times what was measured make restoring worth more, and the other way round."""
    tight = replace(CPU, projection_flop_per_s=9e9)
    for times, more in ((5.0, True), (0.2, False)):
        follows = planner(tight)
        before = follows.pages(64, PROMPT)
        costs = costs_of(SHAPE, tight)
        for _ in range(20):
            follows.prefilled([512], [0], times * costs.prefill_s(512))
        follows._costs_at = 0.0
        after = follows.pages(64, PROMPT)
        assert (after >= before and after == 64) if more else after < 64


@pytest.mark.parametrize("times", [1 / 3, 3.0])
def test_many_short_forwards_do_not_hide_what_long_ones_take(times: float) -> None:
    """Behind a long hit a forward is little more than the reading of the weights."""
    gpu = machine_of("H100")
    slower = {name: getattr(gpu, name) / times for name in ("gemm_flop_per_s", "attention_flop_per_s")}
    really = costs_of(SHAPE, replace(gpu, **slower))
    follows = planner(gpu)
    for tokens in [32, 48, 64, 32, 48, 64, 32, 4096] * 20:
        follows.prefilled([tokens], [0], really.prefill_s(tokens))
    assert follows.stats()["slower_prefill"] == pytest.approx(times, rel=0.2)


def test_restoring_that_takes_longer_than_measured_is_seen() -> None:
    for layout in (HIDDEN, Layout(0, 3, 5), Layout(0, 0, 8)):
        follows = planner(layout=layout)
        for _ in range(20):
            follows.restored(1024, 100.0)
        follows._costs_at = 0.0
        assert follows.pages(64, PROMPT) == 0


def test_prefill_that_is_believed_slow_is_seen_to_be_fast_beside_loads() -> None:
    """Else all is restored for ever, and no forward is ever without a load."""
    follows = planner()
    expected_s = costs_of(SHAPE, CPU).prefill_s(512)
    for _ in range(20):
        follows.prefilled([512], [0], 3 * expected_s, waited=True)
    assert follows.stats()["slower_prefill"] == 1.0, "it may have waited for the load"
    for _ in range(20):
        follows.prefilled([512], [0], expected_s / 10, waited=True)
    assert follows.stats()["slower_prefill"] == pytest.approx(0.1, rel=0.2)


def test_the_noise_of_forwards_beside_loads_does_not_make_prefill_seem_faster() -> None:
    """Where a server restores part of every hit, there are no others."""
    follows, noise = planner(), random.Random(1)
    expected_s = costs_of(SHAPE, CPU).prefill_s(512)
    for _ in range(3000):
        follows.prefilled([512], [0], expected_s * math.exp(noise.gauss(0, 0.1)), waited=True)
    assert follows.stats()["slower_prefill"] > 0.9


def test_prefill_that_is_believed_fast_is_seen_to_be_slow_in_what_restoring_leaves() -> None:
    """Once a long forward has told half of it, most of a hit is restored, and forwards are short."""
    believed = replace(
        CPU, gemm_flop_per_s=10 * CPU.gemm_flop_per_s, attention_flop_per_s=10 * CPU.attention_flop_per_s
    )
    costs, follows = costs_of(SHAPE, CPU), planner(believed)
    follows.prefilled([4096], [0], costs.prefill_s(4096))
    assert 2 < follows.stats()["slower_prefill"] < 5
    for _ in range(20):
        follows.prefilled([64], [0], costs.prefill_s(64))
    assert follows.stats()["slower_prefill"] == pytest.approx(10, rel=0.2)


def test_short_work_says_nothing() -> None:
    follows = planner()
    follows.prefilled([3], [0], 100.0)
    follows.restored(5, 100.0)
    assert all(value == 1.0 for name, value in follows.stats().items() if name.startswith("slower_"))
