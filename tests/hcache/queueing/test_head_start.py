"""The request that is made for the beginning of another, and what becomes of both; the scheduler is a stand-in."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_hcache import scheduler_hooks
from sglang_hcache.queueing import admission
from sglang_hcache.queueing.admission import Admission
from sglang_hcache.queueing.head_start import HeadStart, HeadStarts, divisible
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.prefetch_queue import Admit
from sglang_hcache.queueing.shared_loads import SharedLoads

START = HeadStart("a", "a head start", pages=2, tokens=8)


def request(rid: str = "a", **options: Any) -> Any:
    req = Req(rid, "", array("q", range(20)), SamplingParams(max_new_tokens=50, temperature=0.7), **options)
    req.arrival_processed_tokens = 77
    return req


def scheduler(*requests: Any, is_generation: bool = True, is_eagle: bool = False) -> Any:
    return SimpleNamespace(
        waiting_queue=list(requests),
        max_queued_requests=None,
        is_generation=is_generation,
        tree_cache=SimpleNamespace(tree_core=SimpleNamespace(is_eagle=is_eagle)),
        init_req_max_new_tokens=lambda _req: None,
    )


def test_it_is_the_beginning_of_the_same_prompt_in_the_same_namespace() -> None:
    req = request(extra_key="key", cache_salt="salt", priority=3, return_logprob=True, stream=True)
    req.output_ids.extend([100, 101])  # it was retracted
    head = HeadStarts().begin(scheduler(request("b"), req), HeadStart("a", "head", 5, 21))
    assert head is not None
    assert list(head.origin_input_ids) == [*range(20), 100]
    assert (head.extra_key, head.cache_salt) == ("key", "salt")
    assert (head.priority, head.arrival_processed_tokens) == (3, 77)
    assert (head.sampling_params.max_new_tokens, head.stream, head.return_logprob) == (1, False, False)
    assert head.sampling_params.stop_strs == []
    head.output_ids.append(1)
    head.update_finish_state()
    assert head.finished()
    assert head.finished_output, "SGLang sends it to nobody"
    told = Mock()
    for one in (head, req):
        scheduler_hooks.around_abort_output(told, scheduler(), AbortReq(rid=one.rid), one)
    assert [call.args[2] for call in told.call_args_list] == [req], "nor does anybody hear that it was aborted"
    assert req.sampling_params.max_new_tokens == 50


def test_it_takes_no_place_in_the_queue_that_a_client_could_have() -> None:
    one = scheduler(request("a"), request("b"))
    for most, begun in ((3, False), (4, True)):
        one.max_queued_requests = most
        assert (HeadStarts().begin(one, START) is not None) == begun


def test_who_is_gone_gets_none() -> None:
    starts = HeadStarts()
    assert starts.begin(scheduler(request("b")), START) is None
    assert list(starts.over()) == []


@pytest.mark.parametrize(
    "more",
    [
        {"multimodal_inputs": object()},
        {"input_embeds": [[0.0]]},
        {"token_type_ids": [0]},
        {"session": object()},
        {"lora_id": "adapter"},
        {"skip_radix_cache_insert": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_only_tokens_are_divisible(more: dict[str, Any]) -> None:
    req = request()
    assert divisible(scheduler(), req, drafts=False)
    for name, value in more.items():
        setattr(req, name, value)
    assert not divisible(scheduler(), req, drafts=False)


@pytest.mark.parametrize(
    ("options", "drafts"),
    [({"is_generation": False}, False), ({"is_eagle": True}, False), ({}, True)],
    ids=["no tokens are wanted", "bigrams", "a draft model"],
)
def test_where_no_request_is_divisible(options: dict[str, bool], drafts: bool) -> None:
    assert not divisible(scheduler(**options), request(), drafts=drafts)


def test_it_is_over_when_it_has_its_token_or_is_aborted() -> None:
    starts, queue = HeadStarts(), scheduler(request("a"), request("b"))
    done = starts.begin(queue, START)
    gone = starts.begin(queue, HeadStart("b", "b head start", 2, 8))
    assert done is not None
    assert gone is not None
    assert list(starts.over()) == []
    done.finished_reason = FINISH_LENGTH(1)
    assert list(starts.over()) == ["a"]
    starts.aborted(gone.rid)
    starts.aborted("c")
    assert list(starts.over()) == ["a", "b"]
    starts.aborted("b")
    starts.scheduled([queue.waiting_queue[0]])
    assert list(starts.over()) == []
    assert not starts._aborted


def test_what_was_prefilled_for_a_request_is_no_hit_of_it() -> None:
    """Of 12 tokens on the device 3 were there before, 4 came from host memory and 5 were prefilled ahead."""
    starts, req = HeadStarts(), request()
    head = starts.begin(scheduler(req), HeadStart("a", "head", 3, 12))
    assert head is not None
    head.cached_tokens, head.cached_tokens_device, head.cached_tokens_host = 7, 3, 4
    head.finished_reason = FINISH_LENGTH(1)
    req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host = 18, 12, 6
    starts.scheduled([req, request("b")])
    assert (req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host) == (13, 3, 10)
    starts.scheduled([req])
    assert req.cached_tokens == 13, "once"


def test_what_was_evicted_meanwhile_leaves_no_negative_hits() -> None:
    starts, req = HeadStarts(), request()
    head = starts.begin(scheduler(req), HeadStart("a", "head", 3, 12))
    assert head is not None
    head.cached_tokens = head.cached_tokens_host = 4
    head.finished_reason = FINISH_LENGTH(1)
    req.cached_tokens = req.cached_tokens_device = 5
    starts.scheduled([req])
    assert (req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host) == (0, 0, 0)


class Tier:
    """Has a head start in mind for request `a`, which it holds, as soon as the engine is idle.

    Linker and prefetch queue in one.
    """

    def __init__(self) -> None:
        self.held = ["a"]
        self.idle = list[bool]()
        self.begun = list[HeadStart]()
        self.ended = list[str]()

    def new_step(self) -> None: ...

    def batch_begins(self) -> None: ...

    def propose(self, *, idle: bool) -> Admit | None:
        self.idle.append(idle)
        return None

    def take_head_start(self) -> HeadStart | None:
        return START if self.idle[-1] and not self.begun else None

    def begin_head_start(self, start: HeadStart, keys: list[bytes], prompt: Prompt) -> None:
        assert (keys, prompt) == ([b"key"], Prompt(1, 0))
        self.begun.append(start)

    def head_start_over(self, rid: str) -> None:
        self.ended.append(rid)

    def renew_store(self) -> None: ...

    def wait_for_news(self, _timeout_s: float) -> None: ...

    def forget_request(self, _rid: str) -> None: ...

    def has(self, _rid: str, _pages: int, *, late: bool) -> bool:
        return late

    def admit(self, _rids: object, *, late: object) -> None: ...


@pytest.mark.parametrize("first_rank", [True, False])
def test_an_idle_engine_is_given_something_to_do_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, first_rank: bool
) -> None:
    tier: Any = Tier()
    steps = Admission(tier, tier, SharedLoads(0), true_on_all=list, others_wait_for_us=False, drafts=False)
    req = request()
    monkeypatch.setattr(admission, "missing_pages", lambda _tree, _req: ([b"key"], Prompt(1, 0)))
    queue = scheduler(req)
    queue.chunked_req = None
    queue.tree_cache = SimpleNamespace(linker=SimpleNamespace(hit_markers={}))
    saw = list[list[str]]()

    def step(*, busy: bool, news: tuple[object, ...] = (), said: tuple[object, ...] = ()) -> list[object]:
        """`said`: by the first rank, where this is another one."""

        def broadcast(messages: list[object] | None, local: list[object]) -> list[object]:
            return [*said] if messages is None else [*messages, *local]

        def new_batch() -> tuple[Any, None]:
            saw.append([req.rid for req in queue.waiting_queue])
            batch, queue.waiting_queue = queue.waiting_queue, []
            return SimpleNamespace(reqs=batch) if batch else None, None

        passed: list[object] = steps.broadcast(broadcast, [*news] if first_rank else None, [])
        steps.make_batch(new_batch, queue, SimpleNamespace(is_empty=lambda: not busy))
        return passed

    step(busy=True)
    step(busy=False)
    step(busy=False, news=("another request",))
    assert not tier.begun
    assert step(busy=False, said=(START,)) == []
    if first_rank:
        assert tier.idle == [False, False, False, True], "not in the step after a busy one, nor beside a request"
    assert tier.begun == [START]
    assert saw[-1] == ["a head start"]
    assert [waiting.rid for waiting in queue.waiting_queue] == ["a"]
    assert step(busy=False, said=(Admit({"x": 1}, frozenset({"x"})),)) == []
    assert not tier.ended
    steps._head_starts._heads["a"].finished_reason = FINISH_LENGTH(1)
    step(busy=False)
    assert tier.ended == ["a"]
    tier.held = []
    step(busy=False)
    assert saw[-1] == ["a"]
    step(busy=False)
    assert tier.ended == ["a", "a"], "it is in a batch"
