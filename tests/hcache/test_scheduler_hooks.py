"""Which requests the scheduler gets to see; it, its queue and its requests are stand-ins."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ReqKvInfo
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.session.streaming_session import SessionSlot, StreamingSession

from sglang_hcache import scheduler_hooks
from sglang_hcache.linker import HCacheLinker
from sglang_hcache.queueing import admission
from sglang_hcache.queueing.admission import Admission, missing_pages
from sglang_hcache.queueing.head_start import HeadStart
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.prefetch_queue import Admit
from sglang_hcache.queueing.shared_loads import SharedLoads
from sglang_hcache.storage.layout import ROOT

PROMPT = Prompt(1, 0)


def test_ranks_exchange_nothing_about_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in each step, as SGLang would: the same is offloaded on all, at once."""
    pending, committed = [1, 2, 3], list[bool]()
    wrapper = SimpleNamespace(
        num_completed_offloads=lambda: len(pending),
        take_completed_offloads=lambda count: [bool(pending.pop()) for _ in range(count)],
        commit_completed_offloads=committed.extend,
    )
    cache, asked = SimpleNamespace(linker=wrapper), list[Any]()
    scheduler_hooks.around_check_events(asked.append, cache)
    assert (asked, committed) == ([cache], []), "SGLang's own way, without our linker"
    monkeypatch.setattr(scheduler_hooks, "linker", object())
    for _ in range(2):
        scheduler_hooks.around_check_events(asked.append, cache)
    assert (asked, committed) == ([cache], [True] * 3)


def test_memory_is_released_once_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler_hooks.before_memory_released(None, None)
    settled = list[str]()
    loads = SimpleNamespace(end_landed=lambda *, wait: settled.append(f"loads, {wait=}"))
    attachment = SimpleNamespace(drain=lambda: settled.append("saves"))
    linker: Any = SimpleNamespace(_loads=loads, _attachment=attachment)
    linker.drain = partial(HCacheLinker.drain, linker)
    monkeypatch.setattr(scheduler_hooks, "linker", linker)
    scheduler_hooks.before_memory_released(None, None)
    assert settled == ["loads, wait=True", "saves"]


class Tier:
    """Holds requests whose id begins with `h`. Linker and prefetch queue in one."""

    def __init__(self) -> None:
        self.held = dict[str, None]()
        self.batch = list[tuple[int, int]]()
        self.waited = 0

    def queued(self, rid: str, _keys: object, _prompt: object) -> None:
        if rid.startswith("h"):
            self.held[rid] = None

    def wait_for_news(self, _timeout_s: float) -> None:
        self.waited += 1

    def new_step(self) -> None:
        pass

    def propose(self, *, idle: bool) -> Admit | None:
        return None

    def batch_begins(self) -> None:
        self.batch.clear()

    def batched(self, tokens: int, context_tokens: int) -> None:
        self.batch.append((tokens, context_tokens))

    def take_head_start(self) -> None:
        return None

    def renew_store(self) -> None:
        pass

    def forget_request(self, _rid: str) -> None:
        pass


class Queued:
    def __init__(self, rid: str) -> None:
        self.rid = rid


class Scheduler:
    """Runs all it sees but the first one, and queues `late` on its way, as SGLang does with grammars."""

    is_generation = enable_priority_scheduling = schedule_low_priority_values_first = False

    def __init__(self, *rids: str) -> None:
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(is_empty=lambda: True)
        self.chunked_req = None
        self.tree_cache = SimpleNamespace(linker=SimpleNamespace(hit_markers={}))
        self.late = list[str]()
        self.saw = list[str]()
        for rid in rids:
            self.add(rid)

    def add(self, rid: str) -> None:
        req = Queued(rid)
        self.waiting_queue.append(req)
        scheduler_hooks.after_request_queued(None, self, req)

    def make_batch(self, **_: object) -> tuple[Any, None]:
        for rid in self.late:
            self.add(rid)
        self.late = []
        self.saw = self.queue
        batch, self.waiting_queue = self.waiting_queue[1:], self.waiting_queue[:1]
        return SimpleNamespace(reqs=batch) if batch else None, None

    def step(self, running: Any = None, *, looks: bool = True) -> None:
        """looks: at what has been received; --scheduler-recv-interval leaves that out of most steps."""
        if looks:
            scheduler_hooks.around_broadcast(lambda _receiver, received, _local: received, None, [])
        scheduler_hooks.around_new_batch(Scheduler.make_batch, self, running_batch=running or self.running_batch)

    @property
    def queue(self) -> list[str]:
        return [req.rid for req in self.waiting_queue]


def admission_of(tier: Any, **options: Any) -> Admission:
    usual: dict[str, Any] = {"true_on_all": list, "others_wait_for_us": False, "drafts": False}
    return Admission(tier, tier, SharedLoads(0), **usual | options)


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    tier = Tier()
    monkeypatch.setattr(scheduler_hooks, "linker", tier)
    monkeypatch.setattr(scheduler_hooks, "admission", admission_of(tier))
    monkeypatch.setattr(admission, "missing_pages", lambda _tree, _req: ([b"key"], PROMPT))
    return tier


@pytest.mark.parametrize(
    ("enabled", "low_first", "turns"), [(False, False, [0, 0]), (True, False, [-3, 4]), (True, True, [3, -4])]
)
def test_what_comes_first_by_priority_is_read_first(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, enabled: bool, low_first: bool, turns: list[int]
) -> None:
    found = list[int]()
    monkeypatch.setattr(tier, "queued", lambda _rid, _keys, prompt: found.append(prompt.turn))
    scheduler = Scheduler()
    scheduler.enable_priority_scheduling, scheduler.schedule_low_priority_values_first = enabled, low_first
    for priority in (3, -4):
        scheduler.waiting_queue.append(SimpleNamespace(rid=str(priority), priority=priority))
        scheduler_hooks.after_request_queued(None, scheduler, scheduler.waiting_queue[-1])
    assert found == turns


def test_held_requests_keep_their_place_out_of_sight(tier: Tier) -> None:
    scheduler = Scheduler("a", "h1", "b", "h2", "c")
    scheduler.step()
    assert scheduler.saw == ["a", "b", "c"]
    assert scheduler.queue == ["a", "h1", "h2"]
    tier.held.clear()
    scheduler.step()
    assert scheduler.saw == ["a", "h1", "h2"]
    assert scheduler.queue == ["a"]
    assert tier.waited == 0


@pytest.mark.parametrize("before", [(), ("a",), ("h1",), ("a", "h1")])
def test_what_is_queued_while_a_batch_is_made_is_held_for_the_next(tier: Tier, before: tuple[str, ...]) -> None:
    scheduler = Scheduler(*before)
    scheduler.late = ["late", "h late"]
    scheduler.step()
    assert scheduler.saw == [rid for rid in (*before, "late") if not rid.startswith("h")]
    assert scheduler.queue[-1] == "h late"
    assert [rid for rid in scheduler.queue if rid.startswith("h")] == [*tier.held]
    tier.held.clear()
    scheduler.step()
    assert "h late" in scheduler.saw
    scheduler.add("h again")
    assert scheduler.queue[-1] == "h again", "outside of a step it is queued as usual"


def test_with_nothing_to_do_but_to_hold_it_waits_for_news(tier: Tier) -> None:
    scheduler = Scheduler("h1")
    scheduler.step()
    assert tier.waited == 1
    for _ in range(3):
        scheduler.step(looks=False)
    assert tier.waited == 1, "nothing is admitted in a step that does not look"
    scheduler.step()
    assert tier.waited == 2


def test_plans_know_what_the_batch_computes_by_now(tier: Tier) -> None:
    """A prompt that goes on in it, and each that is added, from its hit on; not one for which there is no room."""
    chunk, other, third = (SimpleNamespace(extend_len=n, prefix_len=10 * n, rid=str(n)) for n in (5, 7, 9))
    adder = SimpleNamespace(can_run_list=[chunk])
    other.host_hit_length = third.host_hit_length = 0

    def add(_adder: Any, req: Any) -> None:
        if req is other:
            adder.can_run_list.append(req)

    scheduler_hooks.after_chunk_added(None, adder, chunk)
    assert tier.batch == [(5, 50)]
    adder.tree_cache = SimpleNamespace(linker=None)
    for req in (other, third):
        scheduler_hooks.around_add(add, adder, req)
    assert tier.batch == [(5, 50), (7, 70)]
    Scheduler("a").step()
    assert tier.batch == [], "another batch"


def test_hits_of_requests_that_run_are_forgotten(tier: Tier) -> None:
    """SGLang leaves a hit behind that the request did not load after all."""
    scheduler = Scheduler("waits", "runs")
    hits = scheduler.tree_cache.linker.hit_markers
    hits.update(dict.fromkeys(["waits", "runs"]))
    scheduler.step()
    assert list(hits) == ["waits"]


@pytest.mark.parametrize(("logprobs_from", "overridden", "usable"), [(-1, False, 9), (4, False, 4), (-1, True, 0)])
def test_no_more_is_looked_up_than_a_request_may_use(logprobs_from: int, overridden: bool, usable: int) -> None:
    req: Any = Req("a", "", array("q", range(8)), SamplingParams(), return_logprob=logprobs_from >= 0)
    req.output_ids.extend([8, 9])
    req.logprob_start_len = logprobs_from
    req.positional_embed_overrides = object() if overridden else None
    key = RadixKey(req.origin_input_ids + req.output_ids, cache_salt="salt")
    found = scheduler_hooks.around_match(lambda _wrapper, key, _req, _result: key, None, key, req, None)
    assert (list(found.token_ids), found.cache_salt) == (list(range(usable)), "salt")


@pytest.mark.parametrize(("logprobs_from", "usable"), [(4, 3), (1, 0), (0, 0)])
def test_of_bigrams_a_token_fewer_is_looked_up(logprobs_from: int, usable: int) -> None:
    """Each takes the next token, too, of which a request may want the log-probability."""
    req: Any = Req("a", "", array("q", range(8)), SamplingParams(), return_logprob=True)
    req.logprob_start_len = logprobs_from
    req.positional_embed_overrides = None
    key, _ = RadixKey(req.origin_input_ids).maybe_to_bigram_view(is_eagle=True)
    found = scheduler_hooks.around_match(lambda _wrapper, key, _req, _result: key, None, key, req, None)
    assert list(found) == [(token, token + 1) for token in range(usable)]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_admitted_goes_to_the_ranks_with_the_same_requests(
    first: bool, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data-parallel attention, the other messages come from the first of all ranks, whatever is given here."""
    from_all = ["a message to all ranks"]

    def broadcast(_receiver: object, recv_reqs: list[Any] | None, local_reqs: list[Any]) -> list[Any]:
        return [*local_reqs, *(recv_reqs if first and recv_reqs is not None else from_all)]

    admitted: list[tuple[list[str], set[str]]] = []
    monkeypatch.setattr(tier, "propose", lambda *, idle: Admit({"h1": 2, "h2": 2}, frozenset({"h2"})))
    monkeypatch.setattr(tier, "has", lambda rid, _pages, *, late: rid == "h1", raising=False)
    monkeypatch.setattr(tier, "admit", lambda rids, *, late: admitted.append(([*rids], {*late})), raising=False)
    received = scheduler_hooks.around_broadcast(broadcast, None, list(from_all), ["an abort"])
    assert received == ["an abort", *from_all]
    assert admitted == [(["h1", "h2"], {"h2"})]


def test_ranks_agree_on_each_request_unless_its_time_is_up(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[bool]]()

    def true_on_all(conditions: Sequence[bool]) -> list[bool]:
        asked.append([*conditions])
        return [here and rid != "another has less" for here, rid in zip(conditions, pages, strict=True)]

    pages = {"all have it": 2, "late": 9, "late, but there": 4, "another has less": 3, "this has less": 1}
    here = {"all have it": 2, "late": 8, "late, but there": 4, "another has less": 3, "this has less": 0}
    admitted = list[tuple[list[str], set[str]]]()
    monkeypatch.setattr(tier, "has", lambda rid, pages, *, late: here[rid] >= pages, raising=False)
    monkeypatch.setattr(tier, "admit", lambda rids, *, late: admitted.append(([*rids], {*late})), raising=False)
    monkeypatch.setattr(scheduler_hooks, "admission", admission_of(tier, true_on_all=true_on_all))
    proposal = Admit(pages, frozenset({"late", "late, but there"}))
    scheduler_hooks.around_broadcast(lambda *_: [proposal], None, None)
    assert asked == [[True, False, True, True, False]]
    assert admitted == [(["all have it", "late", "late, but there"], {"late"})]


def test_news_of_other_ranks_is_looked_for_often(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes them, and not this one."""
    waited = list[float]()
    monkeypatch.setattr(tier, "wait_for_news", waited.append)
    monkeypatch.setattr(tier, "has", lambda _rid, _pages, *, late: True, raising=False)
    monkeypatch.setattr(tier, "admit", lambda rids, *, late: None, raising=False)
    lacks = admission_of(tier, true_on_all=lambda conditions: [False for _ in conditions])
    monkeypatch.setattr(scheduler_hooks, "admission", lacks)
    scheduler = Scheduler("h1")
    for proposed in (None, Admit({"h1": 2}, frozenset()), None):
        monkeypatch.setattr(tier, "propose", lambda *, idle, proposed=proposed: proposed)
        scheduler_hooks.around_broadcast(lambda _receiver, _received, local: local, None, [])
        scheduler.step(looks=False)
    assert waited[0] == waited[2] > waited[1]


def test_no_head_start_is_begun_for_a_request_that_has_been_admitted(tier: Tier) -> None:
    scheduler = Scheduler("first", "admitted")
    started = HeadStart("admitted", "its head start", 2, 8)
    scheduler_hooks.around_broadcast(lambda *_: [started], None, None)
    scheduler.step(looks=False)
    assert scheduler.saw == ["first", "admitted"]
    assert scheduler.queue == ["first"]


def test_it_does_not_wait_while_other_schedulers_wait_for_it(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_hooks, "admission", admission_of(tier, others_wait_for_us=True))
    Scheduler("h1").step()
    assert tier.waited == 0


@pytest.mark.parametrize(("others", "common"), [(7, 3), (2, 2), (0, 0)])
def test_ranks_agree_on_the_shortest_of_what_each_can_load(others: int, common: int) -> None:
    """As SGLang's own intersection says, which windowed layers need."""

    def all_reduce(tensor: torch.Tensor, op: object) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        if len(tensor) == 1:
            tensor.clamp_(max=others)
        else:
            tensor[others + 1 :] = 0

    wrapper: Any = SimpleNamespace(cache=SimpleNamespace(_all_reduce_attn_groups=all_reduce))
    own = UnifiedCacheLinkerWrapper._sync_restorable_prefix
    for lengths in (range(1, 4), [1, 2, 3]):
        found = scheduler_hooks.around_sync(own, wrapper, lengths, num_pages=9, device_hit_pages=0)
        assert found == common


def test_a_batch_that_has_just_been_prefilled_is_something_to_do(tier: Tier) -> None:
    """SGLang merges it into the batch that it passes on; into the scheduler's own only after the step."""
    scheduler = Scheduler("h1")
    scheduler.step(running=SimpleNamespace(is_empty=lambda: False))
    assert tier.waited == 0


def tree_with(on_device: int, *, is_eagle: bool = False) -> Any:
    """Pages of two tokens, whose keys are their numbers."""

    def tail_hashes(key: RadixKey, _match: object, _on_device: int) -> list[str]:
        return [bytes([page]).hex() for page in range(on_device // 2, len(key) // 2)]

    return SimpleNamespace(
        session=StreamingSession(None),
        page_size=2,
        swa_reprefill_tail_tokens=lambda _req: 0,
        match_prefix=lambda _params: SimpleNamespace(device_prefix_len=on_device, last_device_node="node"),
        get_last_hash_value=lambda _node: bytes([on_device // 2 - 1]).hex(),
        linker=SimpleNamespace(_tail_hashes=tail_hashes),
        tree_core=SimpleNamespace(is_eagle=is_eagle),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.arange(100, 140, dtype=torch.int32).reshape(2, 20)),
    )


Retracted = tuple[list[bytes], bytes, list[int], int]


@pytest.fixture
def retracted(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> list[Retracted]:
    """What the linker was told to save."""
    told = list[Retracted]()

    def save(_rid: str, keys: list[bytes], parent: bytes, slots: torch.Tensor, windowed: int) -> None:
        told.append((keys, parent, slots.tolist(), windowed))

    monkeypatch.setattr(tier, "retracted", save, raising=False)
    return told


def running(*, committed: int, protected: int) -> Any:
    """Of eight tokens and one that has just been sampled; in the second row."""
    req: Any = Req("a", "", array("q", range(6)), SamplingParams())
    req.output_ids.extend([6, 7, 8])
    req.positional_embed_overrides = None
    req.kv = ReqKvInfo(req_pool_idx=1, cache_protected_len=protected, kv_committed_len=committed)
    return req


@pytest.mark.parametrize(
    ("on_device", "protected", "committed", "is_eagle", "pages"),
    [
        (0, 0, 8, False, range(4)),
        (2, 2, 8, False, range(1, 4)),
        (2, 2, 7, False, range(1, 3)),  # the last page is not whole
        (2, 2, 8, True, range(1, 3)),  # nor is its last bigram
        (4, 2, 8, False, range(2, 4)),  # another request has inserted the same
        (0, 4, 8, False, range(2, 4)),  # of its window the tree has nothing left
        (8, 8, 8, False, range(0)),
    ],
)
def test_of_what_is_retracted_the_tier_saves_what_the_tree_lacks(
    on_device: int, protected: int, committed: int, is_eagle: bool, pages: range, retracted: list[Retracted]
) -> None:
    req, tree = running(committed=committed, protected=protected), tree_with(on_device, is_eagle=is_eagle)
    scheduler_hooks.before_release_req(req=req, remaing_req_count=0, tree_cache=tree)
    slots = [120 + 2 * page + token for page in pages for token in range(2)]
    parent = bytes([pages[0] - 1]) if pages and pages[0] else ROOT
    assert retracted == ([([bytes([page]) for page in pages], parent, slots, len(slots))] if pages else [])


def test_windowed_layers_have_the_last_pages_of_what_is_retracted(retracted: list[Retracted]) -> None:
    req = running(committed=8, protected=2)
    req.kv.set_evicted_seqlen(ComponentType.SWA, 6)
    scheduler_hooks.before_release_req(req=req, tree_cache=tree_with(2))
    assert [(len(slots), windowed) for _, _, slots, windowed in retracted] == [(6, 2)]


@pytest.mark.parametrize("why", ["aborted", "its load has failed", "its session keeps it"])
def test_what_does_not_come_back_is_not_saved(why: str, retracted: list[Retracted]) -> None:
    """Nor what SGLang keeps out of its tree, as it was computed from pages that never came."""
    req, tree = running(committed=8, protected=0), tree_with(0)
    if why == "aborted":
        req.to_finish = FINISH_ABORT()
    elif why == "its load has failed":
        req.skip_radix_cache_insert = True
    else:
        req.session = SimpleNamespace(session_id="s", streaming=True)
        tree.session.slots["s"] = SessionSlot(kv=req.kv)
    scheduler_hooks.before_release_req(req=req, tree_cache=tree)
    assert not retracted


@pytest.mark.parametrize("turn", [1, 2])
def test_a_turn_whose_session_has_the_prefix_asks_for_nothing(turn: int) -> None:
    tree = tree_with(0)
    if turn == 2:
        tree.session.slots["s"] = SessionSlot(kv=ReqKvInfo(req_pool_idx=0))
    req = SimpleNamespace(
        origin_input_ids=array("q", [1, 2]),
        output_ids=array("q"),
        positional_embed_overrides=None,
        multimodal_inputs=None,
        input_embeds=None,
        token_type_ids=None,
        to_finish=None,
        session=SimpleNamespace(session_id="s", streaming=True),
        extra_key=None,
        cache_salt=None,
        _compute_max_prefix_len=lambda tokens: tokens,
    )
    keys, _ = missing_pages(tree, req)
    assert keys == ([b"\x00"] if turn == 1 else [])


@pytest.mark.parametrize("captures", [True, False])
def test_what_is_freed_without_being_inserted_is_not_kept(
    captures: bool, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tokens of a request fill no page."""
    never: list[int] = []
    monkeypatch.setattr(tier, "not_inserted", lambda slots: never.extend(slots.tolist()), raising=False)
    monkeypatch.setattr(scheduler_hooks, "capture", SimpleNamespace(sink=object() if captures else None))
    rows = torch.arange(20).reshape(2, 10)
    cache: Any = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=rows))
    scheduler_hooks.before_rows_freed(cache, ReqKvInfo(req_pool_idx=1), [(4, 6), (8, 8), (9, 10)])
    assert never == ([14, 15, 19] if captures else [])


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_streaming_session_keeps_is_never_inserted(
    kept: bool, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its first prompt, which the tree has."""
    never: list[int] = []
    monkeypatch.setattr(tier, "not_inserted", lambda slots: never.extend(slots.tolist()), raising=False)
    rows = torch.arange(20).reshape(2, 10)
    cache: Any = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=rows))
    sessions = StreamingSession(cache)
    sessions.slots["s"] = SessionSlot(kv=ReqKvInfo(req_pool_idx=1, cache_protected_len=4, kv_committed_len=8))
    req = SimpleNamespace(session=SimpleNamespace(session_id="s", streaming=True), kv=sessions.slots["s"].kv)

    def finish(_sessions: object, req: Any) -> bool:
        req.session = None  # as for a turn that has been retracted before
        return kept

    assert scheduler_hooks.around_turn(finish, sessions, req) is kept
    assert never == ([14, 15, 16, 17] if kept else [])


@pytest.mark.parametrize(
    ("result", "changes"),
    [
        ((True, "Succeeded to update model weights."), 1),
        ((False, "Failed to update weights: CUDA out of memory.\nRolling back to original weights."), 1),
        ((False, "Failed to get weights iterator: no such file."), 0),
    ],
)
def test_weights_that_may_have_been_replaced_have_changed(
    result: tuple[bool, str], changes: int, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What SGLang rolls back to is what it failed to load."""
    changed: list[None] = []
    monkeypatch.setattr(tier, "weights_changed", lambda: changed.append(None), raising=False)
    scheduler_hooks.after_weights_from_disk(result, None)
    assert len(changed) == changes


@pytest.mark.parametrize(("action", "changes"), [("reset_tensors", 1), ("compare", 0)])
def test_weights_that_are_reset_to_be_checked_have_changed(
    action: str, changes: int, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[None] = []
    monkeypatch.setattr(tier, "weights_changed", lambda: changed.append(None), raising=False)
    scheduler_hooks.after_check_weights(None, None, action=action, role="target")
    assert len(changed) == changes
