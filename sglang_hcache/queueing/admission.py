"""From the queue to a batch: requests are held, out of the scheduler's sight, while their pages are on the way.

What one rank would admit rides on SGLang's own broadcast of requests; all ranks agree on it in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from sglang_hcache.queueing.head_start import HeadStart, HeadStarts, divisible
from sglang_hcache.queueing.load_planner import Prompt
from sglang_hcache.queueing.page_names import PageNames
from sglang_hcache.queueing.prefetch_queue import Admit, PrefetchQueue
from sglang_hcache.queueing.shared_loads import SharedLoads
from sglang_hcache.storage.layout import ROOT

_IDLE_WAIT_S = 0.005  # with nothing to do but to wait for pages; new requests are looked for as often
_RANKS_WAIT_S = 0.001  # the same, where what is waited for may be news of another rank


class Tier(Protocol):
    """What holds, saves and restores pages; its methods are called by the scheduler's thread."""

    def queued(self, rid: str, keys: Sequence[bytes], prompt: Prompt) -> None: ...
    def retracted(
        self, rid: str, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, windowed_tokens: int
    ) -> None: ...
    def forget_request(self, rid: str) -> None: ...
    def renew_store(self) -> None: ...
    def wait_for_news(self, timeout_s: float) -> None: ...


class Admission:
    """One a scheduler process; called in each of the scheduler's steps."""

    def __init__(
        self,
        tier: Tier,
        prefetches: PrefetchQueue,
        shared: SharedLoads,
        *,
        true_on_all: Callable[[Sequence[bool]], Sequence[bool]],
        others_wait_for_us: bool,
        drafts: bool,
    ) -> None:
        """true_on_all: which of the conditions hold on all ranks with the same requests; a collective of these.

        others_wait_for_us: schedulers with requests of their own take each step together with this one.

        drafts: there is a draft model, whose pools are stored, too.
        """
        self._tier = tier
        self._prefetches = prefetches
        self._shared = shared
        self._true_on_all = true_on_all
        self._others_wait_for_us = others_wait_for_us
        self._drafts = drafts
        self._head_starts = HeadStarts()
        self.names = PageNames()
        self._to_begin: list[HeadStart] = []  # in this step
        self._idle = False  # the last batch, if any since `broadcast`, could only have been of held requests
        self._ranks_lack = False  # when ranks last agreed, some lacked pages of a proposed request
        self._looked = False  # `broadcast` has run in this step; with --scheduler-recv-interval it does not in each
        # Requests that were queued, and are held, while a batch is made.
        self._held_meanwhile: list[Any] | None = None

    def broadcast(
        self, send: Callable[[list[Any] | None, list[Any]], list[Any]], recv_reqs: list[Any] | None, local: list[Any]
    ) -> list[Any]:
        """Send this rank's proposals with the requests that SGLang broadcasts, and carry out what arrives.

        recv_reqs: None where another rank receives requests and proposes. Returns the requests.
        """
        self._looked = True
        self._prefetches.new_step()
        for rid in self._head_starts.over():
            self._prefetches.head_start_over(rid)
        if recv_reqs is not None:
            if admit := self._prefetches.propose(idle=self._idle and not recv_reqs):
                local = [*local, admit]
            if start := self._prefetches.take_head_start():
                local = [*local, start]
        self._idle = self._ranks_lack = False  # a paused engine makes no batches, but looks
        requests = []
        for message in send(recv_reqs, local):
            if isinstance(message, Admit):
                self._admit(message)
            elif isinstance(message, HeadStart):
                self._to_begin.append(message)
            else:
                requests.append(message)
        return requests

    def _admit(self, message: Admit) -> None:
        """Admit those of the requests that all ranks have enough of, and late ones; the others are proposed again."""
        have = self._true_on_all(
            [self._prefetches.has(rid, pages, late=rid in message.late) for rid, pages in message.pages.items()]
        )
        lacking = {rid for rid, enough in zip(message.pages, have, strict=True) if not enough}
        late = lacking & message.late
        self._ranks_lack = lacking != late
        self._prefetches.admit([rid for rid in message.pages if rid not in lacking or rid in late], late=late)

    def queued(self, scheduler: Any, req: Any) -> None:
        """Ask at once for the pages of a request that SGLang has just queued, as far as they are not on the device.

        SGLang queues some requests while it makes a batch, once their grammar is ready: if held, they are not in it.
        """
        with self.names.of(req):
            keys, prompt = missing_pages(scheduler.tree_cache, req)
        if keys:
            whole = divisible(scheduler, req, drafts=self._drafts)
            self._tier.queued(req.rid, keys, replace(prompt, turn=_turn(scheduler, req), divisible=whole))
            if self._held_meanwhile is not None and req.rid in self._prefetches.held:
                self._held_meanwhile.append(scheduler.waiting_queue.pop())

    def retracted(self, tree_cache: Any, req: Any) -> None:
        """SGLang is about to free what a running request has computed, and does not insert it in its tree."""
        if tree_cache.session.will_lend_record(req):
            return  # its session keeps all of it
        keys, parent, first = computed_pages(tree_cache, req)
        if keys:
            last = first + len(keys) * tree_cache.page_size
            slots = tree_cache.req_to_token_pool.req_to_token[req.kv.req_pool_idx, first:last]
            windowed = max(0, last - max(first, req.kv.max_evicted_seqlen))
            self._tier.retracted(req.rid, keys, parent, slots, windowed)

    def make_batch(self, make: Callable[[], Any], scheduler: Any, running_batch: Any) -> Any:
        """Let SGLang make a batch of the requests that are not held; those that are keep their place in the queue.

        running_batch: includes the last batch, which the scheduler's own `running_batch` does not yet.
        """
        self._tier.renew_store()
        self._shared.publish(scheduler.tree_cache)
        self._prefetches.batch_begins()
        self._begin_head_starts(scheduler)
        with self._without_held(scheduler) as any_held:
            busy = scheduler.waiting_queue or not running_batch.is_empty() or scheduler.chunked_req is not None
            self._idle = any_held and not (busy or self._others_wait_for_us)
            looked, self._looked = self._looked, False
            if self._idle and looked:
                self._tier.wait_for_news(_RANKS_WAIT_S if self._ranks_lack else _IDLE_WAIT_S)
            result = make()
        batch, *_ = result
        if batch is not None:
            self._scheduled(scheduler, batch.reqs)
        return result

    @contextmanager
    def _without_held(self, scheduler: Any) -> Iterator[bool]:
        """Take held requests out of the queue, and put them back in their places; whether there are any."""
        before, held = scheduler.waiting_queue, set(self._prefetches.held)
        if held:
            scheduler.waiting_queue = [req for req in before if req.rid not in held]
        self._held_meanwhile = held_meanwhile = list[Any]()
        try:
            yield bool(held)
        finally:
            self._held_meanwhile = None
        if held:
            left = scheduler.waiting_queue
            still_there, known = {id(req) for req in left}, {id(req) for req in before}
            scheduler.waiting_queue = [req for req in before if id(req) in still_there or req.rid in held]
            scheduler.waiting_queue += [req for req in left if id(req) not in known]
        scheduler.waiting_queue += held_meanwhile

    def add(self, add: Callable[[], Any], adder: Any, req: Any) -> Any:
        """Of a batch that is being made."""
        before = len(adder.can_run_list)
        result = self._shared.add(add, adder, req)
        self.added(adder.can_run_list[before:])
        return result

    def added(self, reqs: Sequence[Any]) -> None:
        """They are in the batch that is being made, each with what it prefills there."""
        for req in reqs:
            self._prefetches.batched(req.extend_len, req.prefix_len)

    def released(self, rid: str) -> None:
        """SGLang is done with a request, or it was aborted."""
        self._shared.forget(rid)
        self._head_starts.aborted(rid)
        self._tier.forget_request(rid)

    def _scheduled(self, scheduler: Any, reqs: list[Any]) -> None:
        self._head_starts.scheduled(reqs)
        for req in reqs:
            self._tier.forget_request(req.rid)  # what it has leased and does not load is not needed any more
            self._shared.forget(req.rid)
            self.names.forget(req)
            # SGLang leaves a hit there that the last lookup did not find again.
            scheduler.tree_cache.linker.hit_markers.pop(req.rid, None)

    def _begin_head_starts(self, scheduler: Any) -> None:
        """Queue head starts directly: SGLang's own way would count or refuse them, and ask for their pages again."""
        while self._to_begin:
            start = self._to_begin.pop(0)
            if start.rid not in self._prefetches.held:  # admitted, or aborted, in the same step
                continue
            if (head := self._head_starts.begin(scheduler, start)) is not None:
                self._prefetches.begin_head_start(start, *missing_pages(scheduler.tree_cache, head))
                scheduler.waiting_queue.append(head)


def _turn(scheduler: Any, req: Any) -> int:
    """With `--enable-priority-scheduling` SGLang sorts by it, then by arrival."""
    if not scheduler.enable_priority_scheduling:
        return 0
    return int(req.priority if scheduler.schedule_low_priority_values_first else -req.priority)


def usable_tokens(req: Any, tokens: int) -> int:
    """How many tokens of a prefix may come from a cache: none of which the request wants log-probabilities.

    tokens: of the request, so far.
    """
    if req.positional_embed_overrides is not None:
        return 0
    return int(req._compute_max_prefix_len(tokens))


def missing_pages(tree_cache: Any, req: Any) -> tuple[list[bytes], Prompt]:
    """Keys of the request's pages behind what the radix tree has on the device; asks no other rank."""
    tokens = req.origin_input_ids + req.output_ids
    if tree_cache.session.will_lend_record(req):
        return [], Prompt(len(tokens), 0)
    match, keys = _behind_device(tree_cache, req, tokens, usable_tokens(req, len(tokens)))
    on_device = match.device_prefix_len
    covered = on_device + len(keys) * tree_cache.page_size
    return keys, Prompt(max(1, len(tokens) - covered), on_device)


def computed_pages(tree_cache: Any, req: Any) -> tuple[list[bytes], bytes, int]:
    """Keys of a running request's whole pages that the radix tree lacks; the key before them, and where they begin.

    Pages that the request has inserted itself are left out, though the tree may not find them any more for want of
    their windowed layers.
    """
    tokens = req.origin_input_ids + req.output_ids
    usable = min(usable_tokens(req, len(tokens)), req.kv.kv_committed_len)
    match, keys = _behind_device(tree_cache, req, tokens, usable)
    on_device = match.device_prefix_len
    inserted = min(len(keys), max(0, req.kv.cache_protected_len - on_device) // tree_cache.page_size)
    before = tree_cache.get_last_hash_value(match.last_device_node) if on_device else None
    parent = [bytes.fromhex(before) if before else ROOT, *keys][inserted]
    return keys[inserted:], parent, on_device + inserted * tree_cache.page_size


def _behind_device(tree_cache: Any, req: Any, tokens: Any, usable: int) -> tuple[Any, list[bytes]]:
    """What the radix tree has of the first tokens on the device, and keys of the pages behind."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.common import _req_radix_key

    key, _ = _req_radix_key(tree_cache, req, tokens, usable).maybe_to_bigram_view(tree_cache.tree_core.is_eagle)
    match = tree_cache.match_prefix(MatchPrefixParams(key=key))
    names = tree_cache.linker._tail_hashes(key, match, match.device_prefix_len)
    return match, [bytes.fromhex(name) for name in names]
