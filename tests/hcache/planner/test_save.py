from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_load
from sglang_hcache.planner.machine import Machine, machine_of
from sglang_hcache.planner.save import WORTH_A_CHANGE, plan_save
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B, LLAMA_3_8B, costs, hits, machines, plain_restore_s, shapes

DRIVE = 7e9


def streamed(gpu: str, drives: int) -> Machine:
    return machine_of(gpu, drives=drives, drive_bytes_per_s=DRIVE, streams=True)


def copies_and_compute_s(found: Costs, layout: Layout, tokens: int) -> tuple[float, float]:
    copies = tokens * (layout.hidden * found.hidden_lower_s_per_token + layout.kv * found.kv_lower_s_per_token)
    compute = layout.hidden * found.project_s(tokens) + layout.none * found.layer_s(tokens, 0)
    return copies, float(compute)


@pytest.mark.parametrize(
    ("gpu", "drives", "kept"),
    [("H100", 2, {"none", "hidden"}), ("A10G", 4, {"hidden", "kv"})],
    ids=["fast compute", "fast I/O"],
)
def test_copies_and_compute_end_together(gpu: str, drives: int, kept: set[str]) -> None:
    found = costs_of(LLAMA_2_7B, streamed(gpu, drives))
    found = replace(found, layer_pass_s=0.0, head_s=0.0)
    layout = plan_save(found, Hit(64, 0, 128), splits=False).layout
    assert {kind for kind, _, _ in layout.ranges()} == kept
    copies_s, compute_s = copies_and_compute_s(found, layout, 8192)
    one_layer_s = found.layer_s(8192, 0) + 8192 * found.kv_lower_s_per_token
    assert abs(copies_s - compute_s) <= one_layer_s


def test_grouped_heads_are_stored_as_kv() -> None:
    for gpu, drives in itertools.product(("A10G", "A100-80", "H200"), (1, 4)):
        layout = plan_save(costs_of(LLAMA_3_8B, streamed(gpu, drives)), Hit(64, 0, 128)).layout
        assert layout.hidden == 0


def test_of_layouts_that_are_equally_fast_the_smallest_is_stored() -> None:
    slow_drive = replace(streamed("H200", 1), ssd_bytes_per_s=1e6)
    plan = plan_save(costs_of(LLAMA_2_7B, slow_drive), Hit(64, 0, 128))
    assert plan.layout == Layout(LLAMA_2_7B.layers, 0, 0)


def test_without_layerwise_recompute_all_layers_are_stored_or_none() -> None:
    for gpu in ("A10G", "H200"):
        layout = plan_save(costs_of(LLAMA_2_7B, streamed(gpu, 1)), Hit(64, 0, 128), layerwise=False).layout
        assert layout.none in (0, LLAMA_2_7B.layers)


def test_weights_in_host_memory_shift_the_balance_to_hidden_states() -> None:
    """HybridServe: what the bus cannot carry while weights come in is made again from half the bytes."""
    machine = machine_of("A10G")
    resident, offloaded = (
        plan_save(costs_of(LLAMA_2_7B, machine, offloaded=part), Hit(64, 64), splits=False).layout for part in (0, 1)
    )
    assert offloaded.hidden > resident.hidden > 0


@given(costs(), hits(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_plan_is_never_slower_than_a_single_method(found: Costs, reference: Hit, layerwise: bool) -> None:
    plan = plan_save(found, reference, layerwise=layerwise)
    loaded = plan_load(found, plan.layout, reference)
    tokens = reference.pages * reference.page_tokens
    single = {
        "recompute": recompute_s(found, reference),
        "hidden": float(restore_s(found, (0, found.layers, 0), reference, tokens)),
        "kv": float(restore_s(found, (0, 0, found.layers), reference, tokens)),
    }
    assert loaded.seconds <= min(single.values()) * (1 + 1e-9)
    assert plan.seconds <= min(single.values()) * (1 + 1e-9)
    assert loaded.seconds <= plan.seconds * (1 + 1e-9)


@given(costs(layers=st.integers(1, 5)), hits(most_pages=4))
@settings(max_examples=60, deadline=None)
def test_the_plan_is_near_the_best_of_all(found: Costs, reference: Hit) -> None:
    """Against every order of representations that can be restored, and every split of the pages."""
    best = recompute_s(found, reference)
    for none in range(found.layers):
        for rest in itertools.product(("hidden", "kv"), repeat=found.layers - none):
            kinds = ["none"] * none + list(rest)
            best = min(
                best, *(plain_restore_s(found, kinds, reference, pages) for pages in range(1, reference.pages + 1))
            )
    loaded = plan_load(found, plan_save(found, reference).layout, reference)
    assert loaded.seconds <= 1.03 * best
    assert loaded.seconds >= best * (1 - 1e-9)


def test_a_layout_for_several_lengths_is_the_best_for_all_of_them() -> None:
    found = costs_of(LLAMA_2_7B, streamed("A10G", 4))
    short, long = Hit(64, 0, 16, new_tokens=64), Hit(64, 0, 1024, new_tokens=64)
    both, of_short, of_long = plan_save(found, short, long), plan_save(found, short), plan_save(found, long)
    assert of_short.layout != of_long.layout
    assert of_short.slowdown == of_long.slowdown == 1

    def slowdown(layout: Layout) -> float:
        pairs = ((short, of_short), (long, of_long))
        return sum(plan_load(found, layout, hit).seconds / alone.seconds for hit, alone in pairs) / 2

    every = [slowdown(Layout(0, hidden, 32 - hidden)) for hidden in range(33)]
    assert 1 < both.slowdown < slowdown(of_long.layout)
    assert slowdown(both.layout) <= min(every) * 1.01
    assert slowdown(both.layout) == pytest.approx(both.slowdown, rel=0.01)


def test_a_layout_that_is_hardly_slower_and_smaller_is_an_equal() -> None:
    found, reference = costs_of(LLAMA_2_7B, streamed("A10G", 4)), Hit(64, 0, 128)
    best, smaller = plan_save(found, reference), plan_save(found, reference, tolerance=0.1)
    assert 1 < smaller.slowdown <= 1.1
    assert smaller.layout.bytes_per_token(LLAMA_2_7B) < best.layout.bytes_per_token(LLAMA_2_7B)
    one_more = Layout(0, smaller.layout.hidden + 1, smaller.layout.kv - 1)
    assert plan_load(found, one_more, reference).seconds > 1.1 * best.seconds


@pytest.mark.parametrize(("drives", "stays"), [(3, True), (1, False)])
def test_what_is_in_use_stays_until_another_is_much_faster(drives: int, *, stays: bool) -> None:
    reference = Hit(64, 0, 128)
    in_use = plan_save(costs_of(LLAMA_2_7B, streamed("A10G", 4)), reference, layerwise=False).layout
    now = costs_of(LLAMA_2_7B, streamed("A10G", drives))
    fresh = plan_save(now, reference, layerwise=False)
    kept = plan_save(now, reference, layerwise=False, in_use=in_use)
    assert fresh.layout != in_use
    assert kept.layout == (in_use if stays else fresh.layout)
    assert kept.slowdown <= 1 + WORTH_A_CHANGE


FASTER = (
    "bus_bytes_per_s",
    "scatter_bytes_per_s",
    "ssd_bytes_per_s",
    "remote_bytes_per_s",
    "gemm_flop_per_s",
    "projection_flop_per_s",
)


@given(shapes(), machines(), hits(), st.sampled_from([*FASTER, "attention_flop_per_s"]), st.floats(1, 10))
@settings(max_examples=150, deadline=None)
def test_a_faster_machine_never_restores_later(
    shape: ModelShape, machine: Machine, reference: Hit, rate: str, factor: float
) -> None:
    faster = replace(machine, **{rate: factor * getattr(machine, rate)})
    before, after = (plan_save(costs_of(shape, one), reference).seconds for one in (machine, faster))
    assert after <= before * (1 + 1e-9)
