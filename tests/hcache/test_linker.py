"""The linker as SGLang calls it, with a real pool and a real prefetcher; K and V are stored: no model has to run."""

from __future__ import annotations

import fcntl
import os
import resource
from array import array
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hcache import __version__, linker, ranks, scheduler_hooks
from sglang_hcache.config import HCacheConfig
from sglang_hcache.device.streams import Event, ImmediateStream, _Passed
from sglang_hcache.linker import HCacheLinker
from sglang_hcache.model import OnePool, Pool, kv_buffers, layer_groups
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.queueing import admission
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.restoring.projector import KVProjector
from sglang_hcache.saving.copy_out import InlineCopyOut
from sglang_hcache.startup import registration, representation, start
from sglang_hcache.storage.contract import Progress
from tests.hcache.conftest import PAGE, slots_of, until
from tests.hcache.startup.test_registration import SERVER
from tests.prefetch.clients import PATIENCE_S
from tests.storage.pages import key_of, keys_of

PAGES = 8  # of the pool


def buffers_of(*pools: Pool) -> list[torch.Tensor]:
    groups = [group for pool in pools for group in layer_groups(pool)]
    return [
        buffer for group in groups for place in range(len(group.numbers)) for buffer in kv_buffers(group.pool, place)
    ]


@pytest.fixture(params=["K and V", "latent"])
def pool(request: pytest.FixtureRequest) -> OnePool:
    common = {"size": PAGES * PAGE, "page_size": PAGE, "dtype": torch.float32, "layer_num": 2, "device": "cpu"}
    pool: OnePool
    if request.param == "latent":
        pool = MLATokenToKVPool(kv_lora_rank=8, qk_rope_head_dim=4, enable_memory_saver=False, **common)
    else:
        pool = MHATokenToKVPool(head_num=2, head_dim=4, enable_memory_saver=False, **common)
    for buffer in buffers_of(pool):
        buffer.normal_()
    return pool


@pytest.fixture
def make(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HCacheLinker]:
    context = {
        "get_spec": SimpleNamespace(
            speculative_eagle_topk=None,
            enable_multi_layer_eagle=False,
            speculative_draft_load_format=None,
            speculative_algorithm="STANDALONE",
        ),
        "get_parallel": SimpleNamespace(
            tp_rank=0, tp_size=1, attn_tp_rank=0, attn_tp_size=1, dp_size=1, nnodes=1, attn_dp_enabled=False
        ),
        "get_schedule": SimpleNamespace(
            max_running_requests=2,
            chunked_prefill_size=4 * PAGE,
            disable_overlap_schedule=False,
            prefill_decode_interval=None,
            enable_prefill_delayer=False,
            min_free_slots_delay=None,
        ),
        "get_model": SimpleNamespace(load_format="dummy", weight_cache_mode="off", download_dir=None),
        "get_lora": SimpleNamespace(enable_lora=False, lora_paths=None),
        "get_memory": SimpleNamespace(
            hicache_size=0.01, hicache_write_policy="write_through", hicache_storage_prefetch_policy="timeout"
        ),
    }
    for name, value in context.items():
        for module in (registration, linker, ranks, representation, start):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, partial(copy, value))
    model = SimpleNamespace(
        model_path="m",
        model_config_parser="auto",
        model_impl="auto",
        dtype=torch.float32,
        quantization=None,
        is_encoder_decoder=False,
    )
    monkeypatch.setattr(scheduler_hooks, "runner", SimpleNamespace(model_config=model))
    monkeypatch.setattr(scheduler_hooks, "most_rows_of_a_forward", lambda: 4 * PAGE)
    monkeypatch.setattr(scheduler_hooks, "linker", None)
    monkeypatch.setattr(scheduler_hooks, "admission", None)
    config = HCacheConfig((str(tmp_path),), representation="kv", plan="always", prefetch_timeout_base_s=600.0)
    allocator = SimpleNamespace(get_kvcache=lambda: pool)

    def make(
        *, radix_cache: bool = True, drafts: Sequence[Pool] = (), windowed: SWAKVPool | None = None
    ) -> HCacheLinker:
        return HCacheLinker(
            SimpleNamespace(**SERVER),
            SimpleNamespace(
                disable=not radix_cache,
                page_size=PAGE,
                token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: windowed) if windowed else allocator,
                attn_tp_cache_group=None,
                mtp_draft_device_pools=(),
                sidecar_draft_device_pools=drafts,
                swa_retain_window=PAGE,
            ),
            components={ComponentType.FULL, ComponentType.SWA} if windowed else {ComponentType.FULL},
            extra_config=config.to_linker_config()["linker_extra_config"],
        )

    return make


@pytest.fixture
def tier(make: Callable[..., HCacheLinker]) -> Iterator[HCacheLinker]:
    made = make()
    yield made
    made.close()


def transfer(pages: range, device_pages: tuple[int, ...] = ()) -> list[PoolTransfer]:
    slots = slots_of(*device_pages) if device_pages else None
    return [PoolTransfer(name=PoolName.KV, keys=[key.hex() for key in keys_of(pages)], device_indices=slots)]


@pytest.fixture
def stored(tier: HCacheLinker) -> HCacheLinker:
    """Pages 0 and 1 are in the store, from device pages 1 and 2."""
    return store_two(tier)


def store_two(tier: HCacheLinker) -> HCacheLinker:
    until(lambda: tier.stats()["pages_granted"] > 0)
    assert tier.offload(transfer(range(2), (1, 2)))
    until(lambda: tier.stats()["pages_host"] == 2)
    return tier


def promise(tier: HCacheLinker, rid: str = "a") -> None:
    tier.queued(rid, [key_of(0), key_of(1)], Prompt(PAGE, 0))
    until(lambda: tier.lookup(rid, transfer(range(2))) == range(1, 3))


def test_what_was_promised_is_loaded(stored: HCacheLinker, pool: Pool) -> None:
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    assert index >= 0
    assert stored.finish_layer_wise_loading(index)
    for buffer in buffers_of(pool):
        assert torch.equal(buffer[slots_of(5, 6)], buffer[slots_of(1, 2)])
    stats = stored.stats()
    assert (stats["tokens_restored"], stats["loads_accepted"], stats["pages_leased"]) == (2 * PAGE, 1, 0)
    assert stats["version"] == stats["prefetcher_version"] == __version__
    assert not {"plans", "pages_left_to_prefill", "slower_bus"} & stats.keys(), "nothing is planned"


def test_pools_of_draft_models_are_saved_and_restored_too(make: Callable[..., HCacheLinker], pool: Pool) -> None:
    drafts = [
        MHATokenToKVPool(PAGES * PAGE, PAGE, torch.bfloat16, heads, 8, layers, "cpu", enable_memory_saver=False)
        for heads, layers in ((3, 1), (1, 2))
    ]
    for buffer in buffers_of(*drafts):
        buffer.normal_()
    tier = store_two(make(drafts=drafts))
    assert tier.stats()["layers_draft"] == 3
    kept = [buffer[slots_of(1, 2)].clone() for buffer in buffers_of(pool, *drafts)]
    promise(tier)
    assert tier.load("a", transfer(range(2), (5, 6)))
    assert tier.finish_layer_wise_loading(tier.start_layer_wise_loading())
    assert all(map(torch.equal, kept, (buffer[slots_of(5, 6)] for buffer in buffers_of(pool, *drafts))))
    tier.close()


@pytest.mark.parametrize("layers", [0, 1])
def test_beside_a_draft_model_no_prompt_is_begun_ahead(
    layers: int, make: Callable[..., HCacheLinker], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = MHATokenToKVPool(PAGES * PAGE, PAGE, torch.float32, 1, 8, 1, "cpu", enable_memory_saver=False)
    tier, asked = make(drafts=[draft] * layers), list[Prompt]()
    monkeypatch.setattr(tier.prefetch_queue, "queued", lambda _rid, _keys, prompt, **_: asked.append(prompt))
    monkeypatch.setattr(admission, "missing_pages", lambda *_: ([key_of(0)], Prompt(PAGE, 0)))
    tree = SimpleNamespace(tree_core=SimpleNamespace(is_eagle=False))
    scheduler = SimpleNamespace(tree_cache=tree, is_generation=True, enable_priority_scheduling=False)
    assert scheduler_hooks.admission is not None
    scheduler_hooks.admission.queued(scheduler, Req("a", "", array("q", [1]), SamplingParams()))
    assert asked == [Prompt(PAGE, 0, divisible=not layers)]
    tier.close()


@pytest.mark.parametrize("flag", ["prefill_decode_interval", "enable_prefill_delayer", "min_free_slots_delay"])
def test_loads_are_not_shared_where_the_next_batch_may_have_to_wait(
    flag: str, tier: HCacheLinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tier._least_shared_pages() > 0
    off = {"prefill_decode_interval": None, "enable_prefill_delayer": False, "min_free_slots_delay": None}
    schedule = SimpleNamespace(**{**off, flag: 4})
    monkeypatch.setattr(linker, "get_schedule", lambda: schedule)
    assert tier._least_shared_pages() == 0


def windowed_pool(pages: int) -> SWAKVPool:
    """The first and the third of four layers have so many pages of their own."""
    return SWAKVPool(
        PAGES * PAGE, pages * PAGE, PAGE, torch.float32, 2, 4,
        swa_attention_layer_ids=[0, 2], full_attention_layer_ids=[1, 3], device="cpu",
    )  # fmt: skip


def test_a_pool_in_which_a_hit_may_find_no_room_is_refused(make: Callable[..., HCacheLinker]) -> None:
    with pytest.raises(RuntimeError, match=r"has 96 tokens, and with less than 113 .* raise --swa-full-tokens-ratio"):
        make(windowed=windowed_pool(6))


def test_layers_with_slots_of_their_own(make: Callable[..., HCacheLinker], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two pages lack those with a window, and so end no prefix."""
    pool = windowed_pool(8)
    for buffer in buffers_of(pool):
        buffer.normal_()
    tier = make(windowed=pool)
    until(lambda: tier.stats()["pages_granted"] > 0)

    def both(pages: range, device_pages: tuple[int, ...] = (), window: tuple[int, ...] = ()) -> list[PoolTransfer]:
        full = transfer(pages, device_pages)
        slots = slots_of(*window) if window else None
        return [
            *full,
            PoolTransfer(name=PoolName.SWA, keys=full[0].keys[-len(window or (0,)) :], device_indices=slots),
        ]

    assert tier.offload(transfer(range(2), (1, 2)))
    tier.offload_follows(key_of(1))
    assert tier.offload(both(range(2, 4), (3, 4), (2, 1)))
    until(lambda: tier.stats()["pages_host"] == 4)
    tier.queued("a", keys_of(range(4)), Prompt(PAGE, 0))
    until(lambda: tier.lookup("a", both(range(4))) == [4])
    with monkeypatch.context() as planner:
        planner.setattr(tier.prefetch_queue, "ready", lambda *_, **__: 2)
        assert tier.lookup("a", both(range(4))) == [3], "what is planned is rounded to an end"
        planner.setattr(tier.prefetch_queue, "ready", lambda *_, **__: 1)
        assert tier.lookup("a", both(range(4))) == []
        planner.setattr(tier.prefetch_queue, "ready", lambda *_, **__: 0)
        assert tier.lookup("a", both(range(4))) == [], "of the same kind, as another rank may find some"
        planner.setattr(tier.prefetch_queue, "ready", lambda *_, **__: 1)
        planner.setattr(tier.prefetch_queue, "tries_bus", lambda rid: True)
        assert tier.lookup("a", both(range(4))) == [3], "else a bus that seems slow would never be tried"
    assert tier.load("a", both(range(4), (5, 6, 7, 8), (4,)))
    assert tier.finish_layer_wise_loading(tier.start_layer_wise_loading())
    for place in range(2):
        for buffer in kv_buffers(pool.full_kv_pool, place):
            assert torch.equal(buffer[slots_of(5, 6, 7, 8)], buffer[slots_of(1, 2, 3, 4)])
    for place in range(2):
        for buffer in kv_buffers(pool.swa_kv_pool, place):
            assert torch.equal(buffer[slots_of(4)], buffer[slots_of(1)])
    assert tier.stats()["layers_windowed"] == 2
    mapping = torch.arange(PAGES * PAGE + PAGE, dtype=torch.int32) - 4 * PAGE
    pool.register_mapping(mapping)
    tier.retracted("b", keys_of(range(4, 6)), key_of(3), slots_of(7, 8), PAGE + 1)
    tier.queued("b", keys_of(range(4, 6)), Prompt(PAGE, 4 * PAGE))
    until(lambda: tier.lookup("b", both(range(4, 6))) == [2])
    assert tier.load("b", both(range(4, 6), (1, 2), (7,)))
    assert tier.finish_layer_wise_loading(tier.start_layer_wise_loading())
    for place in range(2):
        for buffer in kv_buffers(pool.swa_kv_pool, place):
            assert torch.equal(buffer[slots_of(7)], buffer[slots_of(4)])
    tier.close()


def test_what_was_not_promised_is_refused(stored: HCacheLinker) -> None:
    assert not stored.load("a", transfer(range(2), (5, 6)))
    promise(stored)
    assert not stored.load("a", transfer(range(3), (5, 6, 7)))
    assert stored.start_layer_wise_loading() == -1
    assert stored.stats()["loads_refused"] == 2


def test_a_request_that_is_gone_before_its_load_begins(stored: HCacheLinker) -> None:
    promise(stored)
    stored.forget_request("a")
    assert stored.stats()["pages_leased"] == 0
    assert not stored.load("a", transfer(range(2), (5, 6)))
    promise(stored, "b")
    assert stored.load("b", transfer(range(2), (5, 6)))
    assert stored.cancel_queued_load("b")
    assert not stored.cancel_queued_load("b")
    assert stored.start_layer_wise_loading() == -1
    assert stored.stats()["pages_leased"] == 0


def test_what_is_being_loaded_stays_leased_until_it_has_landed(stored: HCacheLinker) -> None:
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    stored.forget_request("a")
    assert stored.stats()["pages_leased"] == 2
    assert stored.finish_layer_wise_loading(index)
    assert stored.stats()["pages_leased"] == 0


class Forward(ImmediateStream):
    def __init__(self) -> None:
        self.waits_for: list[object] = []

    def wait(self, event: Event) -> None:
        self.waits_for.append(event)


class Ahead(_Passed):
    """A place that the device has not come to yet."""

    passed = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


@pytest.mark.parametrize("waits", [False, True], ids=["next step", "reset"])
def test_the_scheduler_goes_on_while_a_load_lands(
    waits: bool, stored: HCacheLinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards wait for it, and what it reads stays leased."""
    forward, event = Forward(), Ahead()
    monkeypatch.setattr(linker, "current_stream", lambda *_: forward)
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    stored.layer_done_counter.restored(index, event)
    assert stored.finish_layer_wise_loading(index)
    assert forward.waits_for == [event]
    stored.forget_request("a")
    stored.renew_store()
    assert stored.stats()["pages_leased"] == 2
    assert "a" in stored._loads
    if waits:
        stored.reset()
        assert event.passed
    event.passed = True
    stored.renew_store()
    stats = stored.stats()
    assert (stats["pages_leased"], stats["tokens_restored"]) == (0, 2 * PAGE)
    assert not stored._loads


def test_the_pool_waits_for_a_load_though_sglang_does_not_say_which(
    stored: HCacheLinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for embeddings: nobody but the linker says which batch the next forward is."""
    forward, events = Forward(), [Ahead(), Ahead()]
    monkeypatch.setattr(stored.layer_done_counter, "_reader", forward)
    monkeypatch.setattr(stored._restorer, "run", lambda _: stored.layer_done_counter.new_batch())
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    for event in events:
        stored.layer_done_counter.restored(index, event)
    stored.layer_done_counter.wait_until(0)
    stored.layer_done_counter.wait_until(1)
    assert forward.waits_for == events
    assert stored.finish_layer_wise_loading(index)
    assert stored.start_layer_wise_loading() == -1
    stored.layer_done_counter.wait_until(0)
    assert forward.waits_for == events, "the next forward loads nothing"


def test_a_request_that_is_queued_again_while_its_load_lands(
    stored: HCacheLinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was retracted, or preempted: with its load ends what it had asked for before, and not what it does now."""
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    event = Ahead()
    stored.layer_done_counter.restored(index, event)
    assert stored.finish_layer_wise_loading(index)
    monkeypatch.setattr(PrefetchClient, "wait", lambda *_, **__: Progress((), False))
    stored.queued("a", [key_of(0), key_of(1)], Prompt(PAGE, 0))
    event.passed = True
    stored.renew_store()
    assert list(stored.prefetch_queue.held) == ["a"]
    until(lambda: stored.prefetch_queue.admissible() == ["a"])
    assert stored.lookup("a", transfer(range(2))) == range(1, 3)
    stored.forget_request("a")
    assert stored.stats()["pages_leased"] == 0


class Later(InlineCopyOut):
    """Jobs wait, as behind a forward, until they are told to go on."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def go_on(self) -> None:
        for job in self.jobs:
            job()


@pytest.mark.parametrize("later", [False, True])
def test_a_retracted_request_finds_what_it_had_computed(
    later: bool, stored: HCacheLinker, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Later()
    if later:
        monkeypatch.setattr(stored._saver, "_copy_out", copies)
    kept = [buffer[slots_of(3, 4)].clone() for buffer in buffers_of(pool)]
    stored.retracted("a", keys_of(range(2, 4)), key_of(1), slots_of(3, 4).int(), 2 * PAGE)
    stored.queued("a", keys_of(range(2, 4)), Prompt(PAGE, 2 * PAGE))
    if later:
        assert list(stored.prefetch_queue.held) == ["a"]
        assert stored.prefetch_queue.admissible() == []
        copies.go_on()
    if stored.prefetch_queue.held:  # also where the prefetcher is not quick to answer
        until(lambda: stored.prefetch_queue.admissible() == ["a"])
        stored.prefetch_queue.admit(["a"])
    assert stored.lookup("a", transfer(range(2, 4))) == range(1, 3)
    assert stored.load("a", transfer(range(2, 4), (5, 6)))
    assert stored.finish_layer_wise_loading(stored.start_layer_wise_loading())
    assert all(map(torch.equal, kept, (buffer[slots_of(5, 6)] for buffer in buffers_of(pool))))
    stored.retracted("a", keys_of(range(2, 4)), key_of(1), slots_of(5, 6).int(), 2 * PAGE)
    assert stored.stats()["pages_saved"] == 4, "what has been restored is there"


def test_what_is_retracted_before_its_load_has_landed_is_not_saved(stored: HCacheLinker) -> None:
    """If it fails, what SGLang computes from it may be anything."""
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    stored.retracted("a", keys_of(range(2, 4)), key_of(1), slots_of(3, 4), 2 * PAGE)
    assert stored.finish_layer_wise_loading(index)
    assert stored.stats()["pages_saved"] == 2


def test_news_come_from_any_descriptor(tier: HCacheLinker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has many files and sockets open; `select` takes 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    high = fcntl.fcntl(tier._supervisor.news, fcntl.F_DUPFD_CLOEXEC, 1024)
    with monkeypatch.context() as patch:
        patch.setattr(tier._supervisor, "news", high)
        os.eventfd_write(high, 1)
        tier.wait_for_news(PATIENCE_S)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(high)
    os.close(high)


def test_a_forward_that_started_no_load_has_none_that_landed(stored: HCacheLinker, pool: Pool) -> None:
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    before = buffers_of(pool)[0].clone()
    assert not stored.finish_layer_wise_loading(-1)
    assert stored.start_layer_wise_loading() == -1, "the slots are somebody else's by now"
    assert torch.equal(buffers_of(pool)[0], before)
    assert not stored.finish_layer_wise_loading(7)
    stats = stored.stats()
    assert (stats["loads_failed"], stats["tokens_restored"], stats["pages_leased"]) == (1, 0, 0)


def test_loads_under_way_land_though_the_weights_are_changed(stored: HCacheLinker) -> None:
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    assert stored._restorer is not None
    staging = stored._restorer.buffer
    stored.weights_changed()
    stored.renew_store()
    assert stored.finish_layer_wise_loading(index)

    def served_again() -> bool:
        stored.renew_store()
        return bool(stored.stats()["prefetcher"] == "ok")

    until(served_again)
    assert stored.lookup("b", transfer(range(2))) == range(1, 1)
    assert stored._restorer.buffer is staging, "the device may have no memory left"


def test_requests_are_held_on_where_the_store_is_lost(tier: HCacheLinker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks hold them, too, and may not have lost theirs."""
    monkeypatch.setattr(PrefetchClient, "wait", lambda *_, **__: Progress((), False))
    tier.queued("a", [key_of(90)], Prompt(PAGE, 0))
    tier._store.give_up("a test")
    tier.renew_store()
    assert list(tier.prefetch_queue.held) == ["a"]
    assert tier.prefetch_queue.admissible() == ["a"]
    tier.prefetch_queue.admit(["a"])
    assert not tier.prefetch_queue.held


def test_kernels_have_run_before_the_first_request_and_left_no_trace(
    make: Callable[..., HCacheLinker], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ran = [buffer.clone() for buffer in buffers_of(pool)], list[int]()
    project = KVProjector.project

    def noted(self: KVProjector, layer: int, rows: torch.Tensor, *places: torch.Tensor) -> None:
        ran.append(len(rows))
        project(self, layer, rows, *places)

    monkeypatch.setattr(KVProjector, "project", noted)
    made = make()
    assert set(ran) == {PAGE}
    assert all(torch.equal(buffer, was) for buffer, was in zip(buffers_of(pool), before, strict=True))
    made.close()


def test_a_model_without_a_radix_cache_is_refused(make: Callable[..., HCacheLinker]) -> None:
    """SGLang switches it off for some, such as encoders, when the flags have been checked."""
    with pytest.raises(RuntimeError, match="cannot serve this model: SGLang serves it without a radix cache"):
        make(radix_cache=False)


def test_a_model_that_attends_to_an_encoder_is_refused(make: Callable[..., HCacheLinker]) -> None:
    """As Llama 3.2 Vision does: SGLang asserts that no hit ends in the midst of an image's tokens."""
    scheduler_hooks.runner.model_config.is_encoder_decoder = True
    with pytest.raises(RuntimeError, match="cannot serve this model: its forward takes all of an encoder's"):
        make()


class NotYet:
    """An event that the device has not reached."""

    def query(self) -> bool:
        return False


def test_a_forward_that_waits_for_no_load_tells_how_fast_prefill_is(
    stored: HCacheLinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it restores: on a CPU a load is done before its forward begins."""
    told: list[bool] = []
    timer = SimpleNamespace(begin=lambda batch, *, waits: told.append(waits))
    monkeypatch.setattr(stored, "_forwards", timer)
    promise(stored)
    assert stored.load("a", transfer(range(2), (5, 6)))
    index = stored.start_layer_wise_loading()
    stored.forward_begins(None)
    with monkeypatch.context() as changed:
        changed.setitem(stored.layer_done_counter._recorded, index, [NotYet()])
        stored.forward_begins(None)
    assert stored.finish_layer_wise_loading(index)
    stored.forward_begins(None)
    assert told == [False, True, False]
