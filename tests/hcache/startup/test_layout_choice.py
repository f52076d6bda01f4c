"""What is stored of each layer: by flag, by size, by plan; and what an earlier start has stored stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_hcache import ranks
from sglang_hcache.config import HCacheConfig
from sglang_hcache.model import Unsupported
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.startup.kept import LAYOUTS
from sglang_hcache.startup.layout_choice import choose_by_flag, choose_by_plan
from sglang_hcache.startup.representation import Formats, LayerFormat, Stored

SHAPE = ModelShape("m", 8, 1024, 16, 16, 64, 2816, 32000)
BALANCED = Machine("m", 40e12, 4e12, 30e12, 1e12, 10e9, ssd_bytes_per_s=5e9)
FAST_IO = replace(BALANCED, projection_flop_per_s=1e11)
FAST_COMPUTE = replace(BALANCED, projection_flop_per_s=1e14)


class NoProjector:
    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        raise AssertionError("nothing is restored here")


def formats(*, hidden: bool = True, kv_bytes: int = SHAPE.kv_bytes) -> Formats:
    of_hidden = LayerFormat(SHAPE.hidden_bytes, torch.bfloat16, NoProjector(), "kernels")
    kv = LayerFormat(kv_bytes, torch.uint8, NoProjector(), "copy")
    of_model: Any = SimpleNamespace(
        numbers=tuple(range(SHAPE.layers)), row_bytes=kv_bytes, windowed=False, draft=False
    )
    obstacle = "" if hidden else "the self-test failed"
    return Formats(of_hidden if hidden else None, obstacle, kv, kv_bytes, False, (of_model,))


def planned(folder: Path, machine: Machine, **options: Any) -> Stored:
    config = HCacheConfig((str(folder),))
    usual = {"page_tokens": 64, "most_tokens": 20000, "mixed": True}
    return choose_by_plan(config, formats(), SHAPE, machine, **(usual | options))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_size=1))


@pytest.mark.parametrize(("wanted", "name"), [("auto", "hidden"), ("hidden", "hidden"), ("kv", "kv")])
def test_a_flag_is_obeyed(wanted: str, name: str) -> None:
    stored = choose_by_flag(wanted, formats(), 8)
    assert stored.name == name
    assert stored.row_bytes == ((SHAPE.hidden_bytes if name == "hidden" else SHAPE.kv_bytes),) * 8


def test_by_itself_the_smaller_one_that_works() -> None:
    assert choose_by_flag("auto", formats(kv_bytes=100), 8).name == "kv"
    failed = choose_by_flag("auto", formats(hidden=False), 8)
    assert (failed.name, failed.reason) == ("kv", "the self-test failed")
    with pytest.raises(Unsupported, match="--hcache-representation hidden: the self-test failed"):
        choose_by_flag("hidden", formats(hidden=False), 8)
    with pytest.raises(Unsupported, match="--hcache-codec packed needs hidden states: the self-test failed; drop it"):
        choose_by_flag("hidden", formats(hidden=False), 8, codec="packed")


def test_the_machine_decides(tmp_path: Path) -> None:
    assert planned(tmp_path / "a", FAST_IO).name == "kv"
    assert planned(tmp_path / "b", FAST_COMPUTE).name == "hidden"
    mixed = planned(tmp_path / "c", BALANCED)
    assert mixed.name == "hidden+kv"
    assert mixed.layout.layers == 8
    assert mixed.row_bytes == (SHAPE.hidden_bytes,) * mixed.layout.hidden + (SHAPE.kv_bytes,) * mixed.layout.kv
    assert mixed.projector_names == "kernels and copy"


@pytest.mark.parametrize(("count", "name"), [(2, "hidden"), (8, "kv")])
def test_ranks_store_all_layers_alike(count: int, name: str, tmp_path: Path) -> None:
    """From memory each rank copies all of the hidden states, but only its own heads' K and V."""
    machine = replace(FAST_COMPUTE, ranks=count, bus_bytes_per_s=2e9, ssd_bytes_per_s=0.0)
    assert planned(tmp_path, machine, mixed=False).name == name
    assert planned(tmp_path / "mixed", replace(BALANCED, ranks=count), mixed=False).name in ("hidden", "kv")


def test_the_first_ranks_choice_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(tmp_path / "a", FAST_IO, mixed=False).name == "kv"
    group = SimpleNamespace(all_gather_object=lambda mine: [Layout(0, 8, 0), mine])
    monkeypatch.setattr(ranks, "get_parallel", lambda: SimpleNamespace(tp_size=2, tp_group=group))
    assert planned(tmp_path / "b", FAST_IO, mixed=False).name == "hidden"


def test_what_is_stored_already_stays_if_it_is_not_much_slower(tmp_path: Path) -> None:
    first = planned(tmp_path, BALANCED).layout
    little = replace(BALANCED, projection_flop_per_s=1.3 * BALANCED.projection_flop_per_s)
    assert planned(tmp_path / "another", little).layout != first
    assert planned(tmp_path, little).layout == first
    assert planned(tmp_path, FAST_IO).name == "kv"


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden": 99, "kv": 0}', '{"hidden": -1, "kv": 9}'])
def test_a_file_that_cannot_be_right_is_replaced(content: str, tmp_path: Path) -> None:
    expected = planned(tmp_path, BALANCED).layout
    (file,) = (tmp_path / LAYOUTS).glob("*.json")
    about = json.loads(file.read_text())["about"]
    found = json.loads(content) if content != "{" else None
    file.write_text(json.dumps(found | {"about": about}) if isinstance(found, dict) else content)
    assert planned(tmp_path, BALANCED).layout == expected
    assert json.loads(file.read_text())["hidden"] == expected.hidden


def test_other_pages_have_a_layout_of_their_own(tmp_path: Path) -> None:
    planned(tmp_path, BALANCED)
    planned(tmp_path, BALANCED, page_tokens=32)
    assert len(list((tmp_path / LAYOUTS).glob("*.json"))) == 2


def test_where_restoring_does_not_pay_the_smaller_one_is_stored(tmp_path: Path) -> None:
    hopeless = replace(BALANCED, bus_bytes_per_s=1e6, ssd_bytes_per_s=1e6)
    stored = planned(tmp_path, hopeless)
    assert stored.name == "hidden"
    assert "not expected to pay" in stored.reason


def test_a_small_pool_and_no_place_to_keep_the_layout(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert planned(tmp_path / "file", FAST_IO, most_tokens=500).name == "kv"
