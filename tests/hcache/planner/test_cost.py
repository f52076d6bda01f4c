from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.machine import GPUS, Machine, machine_of
from sglang_hcache.planner.rate_tracker import Resource
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s
from tests.hcache.planners import LLAMA_2_7B, LLAMA_3_8B, costs, hits, plain_restore_s

REPOSITORY = Path(__file__).parents[3]


def test_it_needs_neither_torch_nor_sglang_nor_zmq() -> None:
    program = (
        "import sys\n"
        "from sglang_hcache.planner import cost, load, rate_tracker, save\n"
        "assert not {'torch', 'sglang', 'zmq', 'lmdb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def test_shapes_give_the_known_sizes() -> None:
    assert LLAMA_2_7B.hidden_bytes == 8192
    assert LLAMA_2_7B.kv_bytes == 16384
    assert LLAMA_3_8B.kv_bytes == 4096
    assert LLAMA_2_7B.projection_flop == 2 * 4096 * 8192
    assert LLAMA_2_7B.layers * LLAMA_2_7B.layer_weight_bytes + 2 * LLAMA_2_7B.head_weight_bytes == pytest.approx(
        6.738e9 * 2, rel=0.001
    )
    mixtral = ModelShape("Mixtral-8x7B", 32, 4096, 32, 8, 128, 14336, 32000, experts=8, active_experts=2)
    total = mixtral.layers * mixtral.layer_weight_bytes / 2 + 2 * 32000 * 4096
    active = mixtral.layers * mixtral.linear_flop / 2 + 2 * 32000 * 4096
    assert total == pytest.approx(46.7e9, rel=0.002)
    assert active == pytest.approx(12.9e9, rel=0.005)


def test_prefilling_and_reading_take_what_was_measured_of_an_h200() -> None:
    """An 8K prefix of a 7B model: about 160 ms to prefill; one drive of 7 GB/s takes 300 ms for its hidden states."""
    found = costs_of(LLAMA_2_7B, machine_of("H200", drives=1, drive_bytes_per_s=7e9))
    assert found.prefill_s(8192) == pytest.approx(0.160, rel=0.25)
    assert 32 * 8192 * found.hidden_lower_s_per_token == pytest.approx(0.300, rel=0.05)


def test_attention_is_counted_once_a_pair() -> None:
    found = costs_of(LLAMA_2_7B, machine_of("A100-80"))
    whole = found.layer_s(3000, 500)
    parts = found.layer_s(1000, 500) + found.layer_s(2000, 1500) - found.layer_pass_s
    assert whole == pytest.approx(parts)


def test_ranks_share_the_work_but_not_every_copy() -> None:
    one, four = (costs_of(LLAMA_2_7B, machine_of("A100-80", ranks=ranks)) for ranks in (1, 4))
    assert four.layer_pass_s == pytest.approx(one.layer_pass_s / 4)
    assert one.linear_s_per_token / 4 < four.linear_s_per_token < one.linear_s_per_token / 2
    assert four.hidden_bus_s_per_token == one.hidden_bus_s_per_token
    assert four.kv_bus_s_per_token == pytest.approx(one.kv_bus_s_per_token / 4)
    sixteen = costs_of(LLAMA_3_8B, machine_of("A100-80", ranks=16, drives=1, drive_bytes_per_s=7e9))
    eight = costs_of(LLAMA_3_8B, machine_of("A100-80", ranks=8, drives=1, drive_bytes_per_s=7e9))
    assert sixteen.kv_bus_s_per_token == eight.kv_bus_s_per_token, "8 heads cannot be cut in 16"
    assert sixteen.kv_lower_s_per_token == 2 * eight.kv_lower_s_per_token, "each rank stores the one it has"


def test_a_remote_store_costs_what_drives_of_its_rate_do() -> None:
    machine = machine_of("A100-80")
    drives = replace(machine, ssd_bytes_per_s=7e9, ssd_latency_s=5e-3)
    store = replace(machine, remote_bytes_per_s=7e9, remote_latency_s=5e-3)
    assert costs_of(LLAMA_2_7B, store) == costs_of(LLAMA_2_7B, drives) != costs_of(LLAMA_2_7B, machine)
    assert (store.lower_tier.name, drives.lower_tier.name) == (Resource.REMOTE, Resource.SSD)
    assert machine.lower_tier.bytes_per_s == 0


def test_a_latent_is_small_and_every_rank_has_all_of_it() -> None:
    """DeepSeek-V3: 576 elements a token and layer, and 187.1 million parameters in an attention."""
    shape = ARCHITECTURES["DeepSeek-V3"]
    experts = 257 * 3 * 7168 * 2048
    assert shape.kv_bytes == 2 * 576
    assert shape.layer_weight_bytes - experts == pytest.approx(187.1e6, rel=1e-3)
    one, eight = (costs_of(shape, machine_of("H200", ranks=ranks)) for ranks in (1, 8))
    assert eight.kv_bus_s_per_token == one.kv_bus_s_per_token
    assert eight.kv_lower_s_per_token == one.kv_lower_s_per_token, "it is stored once"
    assert one.attention_s_per_pair == pytest.approx(2 * 128 * (192 + 128) / machine_of("H200").attention_flop_per_s)


def test_a_layer_that_sees_a_window_attends_to_no_more() -> None:
    """Gemma-3-27B: 10 of 62 layers see all tokens, each of the others 1,024."""
    shape = ARCHITECTURES["Gemma-3-27B"]
    found = costs_of(shape, machine_of("H200"))
    everywhere = costs_of(replace(shape, windowed_layers=0), machine_of("H200"))
    tokens, context = 512, 8192
    pairs = 10 * tokens * (context + tokens / 2) + 52 * tokens * 1024
    attention_s = 62 * found.layer_s(tokens, context) - 62 * (
        found.layer_pass_s + tokens * everywhere.linear_s_per_token
    )
    assert attention_s == pytest.approx(pairs * everywhere.attention_s_per_pair)
    with pytest.raises(ValueError, match="see 0 tokens"):
        replace(shape, window=0)


def test_weights_in_host_memory_take_their_share_of_the_bus() -> None:
    machine = machine_of("A100-80")
    resident, offloaded = (costs_of(LLAMA_2_7B, machine, offloaded=part) for part in (0.0, 1.0))
    weights_s = LLAMA_2_7B.layers * LLAMA_2_7B.layer_weight_bytes / machine.bus_bytes_per_s
    assert offloaded.prefill_s(1) == pytest.approx(weights_s, rel=0.01)
    assert resident.prefill_s(1) < weights_s / 10
    hit = Hit(64, 128)
    counts = (0, 0, LLAMA_2_7B.layers)
    added_s = restore_s(offloaded, counts, hit, 8192) - restore_s(resident, counts, hit, 8192)
    assert added_s == pytest.approx(weights_s, rel=0.01)
    with pytest.raises(ValueError, match="offloaded"):
        costs_of(LLAMA_2_7B, machine, offloaded=1.5)


@pytest.mark.parametrize("field", ["bus_bytes_per_s", "gemm_flop_per_s", "ranks"])
def test_a_rate_that_is_not_positive_is_refused(field: str) -> None:
    nothing: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=field):
        replace(machine_of("A10G"), **nothing)


def test_every_named_gpu_makes_a_machine() -> None:
    for name in GPUS:
        machine = machine_of(name, drives=2, drive_bytes_per_s=7e9)
        assert isinstance(machine, Machine)
        assert machine.ssd_bytes_per_s == 14e9


@given(costs(), hits(), st.data())
@settings(max_examples=300, deadline=None)
def test_the_closed_form_is_the_pipeline(found: Costs, hit: Hit, data: st.DataObject) -> None:
    pages = data.draw(st.integers(1, hit.pages))
    none = data.draw(st.integers(0, found.layers - 1))
    hidden = data.draw(st.integers(0, found.layers - none))
    layout = Layout(none, hidden, found.layers - none - hidden)
    kinds = [kind for kind, first, last in layout.ranges() for _ in range(first, last + 1)]
    counts = (layout.none, layout.hidden, layout.kv)
    expected = plain_restore_s(found, kinds, hit, pages)
    assert restore_s(found, counts, hit, float(pages * hit.page_tokens)) == pytest.approx(expected, rel=1e-9)


@given(costs(), hits())
@settings(max_examples=100, deadline=None)
def test_recomputing_is_the_pipeline_too(found: Costs, hit: Hit) -> None:
    none = replace(found, bus_latency_s=0.0)
    expected = plain_restore_s(none, ["none"] * found.layers, hit, 0)
    assert recompute_s(found, hit) == pytest.approx(expected, rel=1e-9)
