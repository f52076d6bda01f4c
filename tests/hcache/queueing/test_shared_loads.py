"""Which batches are closed before a request that wants what another one loads, and what the next one finds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import ExternalCacheHitMarker

from sglang_hcache.queueing.shared_loads import SharedLoads

PAGE, LEAST = 4, 2
PREFIX = ("a", "ab", "abc")  # names of pages, each of which stands for those before it


class Batches:
    """SGLang making batches; `refuses`: loads."""

    def __init__(self) -> None:
        self.put_off = list[str]()
        self.shared = SharedLoads(LEAST, self.put_off.append)
        self.refuses = False
        self.linker = SimpleNamespace(hit_markers=dict[str, Any](), private_load_indices=dict[str, Any]())
        self.tree = Mock(linker=self.linker)
        self.adder: Any = SimpleNamespace(tree_cache=self.tree, preempt_list=[])

    def published(self) -> list[tuple[str, int]]:
        """Requests of the last batch, and up to where."""
        self.tree.checkpoint.reset_mock()
        self.shared.publish(self.tree)
        return [(call.args[0].rid, call.kwargs["up_to"]) for call in self.tree.checkpoint.call_args_list]

    def add(self, req: Any, names: tuple[str, ...] = PREFIX, on_device: int = 0) -> bool:
        """Whether it is in the batch, with a hit of these pages behind those on the device."""
        self.linker.hit_markers[req.rid] = ExternalCacheHitMarker([*names], on_device)

        def add() -> AddReqResult:
            if self.linker.hit_markers.pop(req.rid, None) is not None and not self.refuses:
                self.linker.private_load_indices[req.rid] = range(len(names) * PAGE)
            return AddReqResult.CONTINUE

        result = self.shared.add(add, self.adder, req)
        assert req.rid not in self.linker.hit_markers, "it would be taken for one of the next lookup"
        return bool(result is AddReqResult.CONTINUE)


@pytest.fixture
def batches() -> Batches:
    return Batches()


def request(rid: str, **others: object) -> Any:
    kv = SimpleNamespace(holds_kv=True, cache_protected_len=0)
    usual = {"host_hit_length": 1, "session": None, "skip_radix_cache_insert": False, "kv": kv}
    return SimpleNamespace(**{"rid": rid, **usual, **others})


def test_the_second_of_two_waits_for_what_the_first_loads(batches: Batches) -> None:
    assert batches.add(request("first"))
    assert not batches.add(request("second", origin_input_ids=[]), (*PREFIX, "abcd"))
    assert batches.shared.requests == 1
    assert batches.put_off == ["second"]
    assert batches.published() == [("first", len(PREFIX) * PAGE + 1)]
    assert batches.published() == [], "once"
    assert batches.add(request("second"), ("abcd",), on_device=len(PREFIX) * PAGE)


def test_where_the_device_has_the_beginning(batches: Batches) -> None:
    assert batches.add(request("first"), on_device=8)
    assert batches.published() == [("first", 8 + len(PREFIX) * PAGE + 1)]


@pytest.mark.parametrize("names", [("a",), ("a", "ax", "axy"), ("b", "bb", "bbb")])
def test_little_in_common_is_loaded_by_each(batches: Batches, names: tuple[str, ...]) -> None:
    assert batches.add(request("first"))
    assert batches.add(request("second"), names)


def test_nobody_waits_twice(batches: Batches) -> None:
    second = request("second")
    for rid in ("first", "another"):
        assert batches.add(request(rid))
        assert batches.add(second) is (rid == "another")
        batches.linker.hit_markers.clear()
        batches.published()
    batches.shared.forget("second")
    assert batches.add(request("third"))
    assert not batches.add(second), "it was in a batch, and is queued again"


def test_nobody_waits_for_what_is_not_loaded_or_is_barred_from_the_tree(batches: Batches) -> None:
    batches.refuses = True
    assert batches.add(request("refused"))
    batches.refuses = False
    assert batches.add(request("session", session="s"))
    assert batches.add(request("barred", skip_radix_cache_insert=True))
    assert batches.add(request("first"))
    assert not batches.add(request("second"))


def test_nor_where_another_was_preempted_for_it(batches: Batches) -> None:
    assert batches.add(request("first"))
    batches.adder.preempt_list.append("preempted")
    assert batches.add(request("second"))


def test_what_has_failed_or_is_there_already_is_not_put_into_the_tree(batches: Batches) -> None:
    there, failed, gone = (request(rid) for rid in ("there", "failed", "gone"))
    for number, req in enumerate((there, failed, gone)):
        assert batches.add(req, tuple(f"{number}{name}" for name in PREFIX))
    there.kv.cache_protected_len = len(PREFIX) * PAGE  # a chunk of it was stashed
    failed.skip_radix_cache_insert = True
    gone.kv.holds_kv = False
    assert batches.published() == []


def test_a_lookup_of_one_that_will_wait_finds_what_it_waits_for(batches: Batches) -> None:
    """However many loads the bus has before it: else it would be prefilled beside them."""
    assert batches.shared.least("second", PREFIX) == 0
    assert batches.add(request("first"))
    assert batches.shared.least("second", PREFIX) == LEAST
    assert batches.shared.least("second", PREFIX[:1]) == 0
    assert not batches.add(request("second"))
    assert batches.shared.least("second", PREFIX) == 0
    batches.published()
    assert batches.shared.least("third", PREFIX) == 0


def test_a_hit_that_the_last_lookup_did_not_find_again_closes_nothing(batches: Batches) -> None:
    assert batches.add(request("first"))
    batches.linker.hit_markers["second"] = ExternalCacheHitMarker([*PREFIX], 0)
    added = batches.shared.add(lambda: AddReqResult.CONTINUE, batches.adder, request("second", host_hit_length=0))
    assert added is AddReqResult.CONTINUE


def test_it_can_be_off(batches: Batches) -> None:
    batches.shared = SharedLoads(0)
    assert batches.add(request("first"))
    assert batches.add(request("second"))
    assert batches.published() == []
