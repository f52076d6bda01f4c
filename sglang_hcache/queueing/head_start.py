"""Head starts: while drives read the end of a held request's prefix, an otherwise idle engine prefills its beginning.

The beginning is a request of its own, which nobody but this process knows of: SGLang prefills it, in chunks if it is
long, and puts it into the radix tree, where the request that it is for finds it. It ends with its first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HeadStart:
    """Rides on SGLang's own broadcast of requests: all ranks queue the same request in the same step."""

    rid: str  # of the held request
    head_rid: str  # id of the one that is made for it
    pages: int  # to prefill, the first of those that the held request waits for
    tokens: int  # of its prompt, up to the end of these pages


def divisible(scheduler: Any, req: Any, *, drafts: bool) -> bool:
    """Whether a request for its first tokens alone would end after one token, and leave the same K and V behind.

    drafts: there is a draft model; its K and V of a token depend on the next one, which differs at a beginning's end.
    """
    return (
        scheduler.is_generation
        and not (drafts or scheduler.tree_cache.tree_core.is_eagle)
        and req.multimodal_inputs is None
        and req.input_embeds is None
        and req.token_type_ids is None
        and req.session is None
        and req.lora_id is None  # SGLang may unload an adapter that no request of a client uses
        and not req.skip_radix_cache_insert
    )


class HeadStarts:
    """Those of this scheduler, by the id of the request that each is for."""

    def __init__(self) -> None:
        self._heads: dict[str, Any] = {}
        self._aborted: set[str] = set()

    def begin(self, scheduler: Any, start: HeadStart) -> Any | None:
        """The request that is to be queued; None where the one it is for is gone, or clients need the place."""
        queue, most = scheduler.waiting_queue, scheduler.max_queued_requests
        req = next((req for req in queue if req.rid == start.rid), None)
        if req is None or (most is not None and len(queue) + 1 >= most):
            return None
        head = self._heads[start.rid] = _head_of(scheduler, req, start)
        return head

    def over(self) -> Iterator[str]:
        """Ids of requests whose head start is over: it is in the radix tree, or was aborted."""
        for rid, head in self._heads.items():
            if head.finished() or head.rid in self._aborted:
                yield rid

    def scheduled(self, reqs: Iterable[Any]) -> None:
        """Correct the hits of requests that are in a batch: what their heads have restored is a hit of the host tier,
        and what these have prefilled is none.
        """
        for req in reqs:
            if (head := self._heads.pop(req.rid, None)) is None:
                continue
            self._aborted.discard(head.rid)
            prefilled = len(head.origin_input_ids) - head.cached_tokens if head.finished() else 0
            req.cached_tokens = max(0, req.cached_tokens - prefilled)
            req.cached_tokens_device = max(0, req.cached_tokens_device - prefilled)
            restored = min(req.cached_tokens_device, head.cached_tokens_host)
            req.cached_tokens_device -= restored
            req.cached_tokens_host += restored

    def aborted(self, rid: str) -> None:
        """A request is gone before its end; a head, or one that had a head."""
        if (head := self._heads.pop(rid, None)) is not None:
            self._aborted.discard(head.rid)
        elif any(head.rid == rid for head in self._heads.values()):
            self._aborted.add(rid)


def is_head_start(req: Any) -> bool:
    """Whether nobody has sent this request, and nobody is to hear of it."""
    return getattr(req, "is_head_start", False)


def _head_of(scheduler: Any, req: Any, start: HeadStart) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
    sampling.normalize(None)
    head = Req(
        rid=start.head_rid,
        origin_input_text="",
        origin_input_ids=(req.origin_input_ids + req.output_ids)[: start.tokens],
        sampling_params=sampling,
        vocab_size=req.vocab_size,
        priority=req.priority,
        routing_key=req.routing_key,
    )
    # As they are by now: SGLang appends the adapter's name to the key.
    head.extra_key, head.cache_salt = req.extra_key, req.cache_salt
    head.tokenizer = req.tokenizer
    head.logprob_start_len = -1
    head.finished_output = head.is_head_start = True  # to nobody
    scheduler.init_req_max_new_tokens(head)
    head.time_stats.set_wait_queue_entry_time()
    head.arrival_processed_tokens = req.arrival_processed_tokens
    return head
