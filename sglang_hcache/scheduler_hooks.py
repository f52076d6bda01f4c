"""The hooks of a scheduler process that serves with the tier, and the two objects they act on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_hcache import metrics
from sglang_hcache.capture import Capture
from sglang_hcache.config import HCacheConfig, Representation
from sglang_hcache.head_start import HeadStart, HeadStarts, divisible
from sglang_hcache.load_planner import Prompt
from sglang_hcache.model import attention_sites
from sglang_hcache.storage.layout import ROOT

if TYPE_CHECKING:
    from sglang_hcache.linker import HCacheLinker

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.005  # with nothing to do but to wait for pages; new requests are looked for as often

# A scheduler process has one target model and one linker.
runner: Any = None
capture: Capture | None = None
linker: HCacheLinker | None = None
_head_starts = HeadStarts()
_to_begin: list[HeadStart] = []  # in this step
_idle = False  # in the last step there was nothing to do but to wait for pages
_held_meanwhile: list[Any] | None = None  # requests that were queued, and are held, while a batch is made


def after_load_model(_result: None, model_runner: Any) -> None:
    """Hooks must be on the model before CUDA graphs are captured, and the staging buffer before memory is sized."""
    global runner, capture
    if model_runner.is_draft_worker:
        return
    runner = model_runner
    extra = model_runner.server_args.unified_cache_external_linker_config["linker_extra_config"]
    wanted = HCacheConfig.from_linker_extra(extra).representation
    sites = attention_sites(model_runner.model)
    width = model_runner.model_config.hidden_size
    if wanted == Representation.KV or not sites or not (wanted == Representation.HIDDEN or _smaller(width, sites)):
        return
    capture = Capture(
        sites,
        rows=most_rows_of_a_forward(),
        width=width,
        dtype=model_runner.model_config.dtype,
        device=model_runner.device,
    )


def _smaller(width: int, sites: list[Any]) -> bool:
    """Whether hidden states have fewer elements than the K and V of all ranks. Pools of 8 bits may still say no."""
    from sglang.srt.runtime_context import get_parallel

    attention = sites[0].attention
    kv_width = attention.tp_k_head_num * attention.qk_head_dim + attention.tp_v_head_num * attention.v_head_dim
    return bool(width < kv_width * get_parallel().attn_tp_size)


def most_rows_of_a_forward() -> int:
    from sglang.srt.runtime_context import get_schedule, get_spec

    schedule = get_schedule()
    prefill = schedule.chunked_prefill_size or 0
    decode = (schedule.max_running_requests or 0) * (get_spec().speculative_num_draft_tokens or 1)
    return int(max(prefill if prefill > 0 else schedule.max_prefill_tokens, decode, 512))


def around_forward(
    original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    if model_runner is not runner:
        return original(model_runner, forward_batch, *args, **kwargs)
    if linker is not None:
        linker.forward_begins(forward_batch)
    if capture is None:
        output = original(model_runner, forward_batch, *args, **kwargs)
    else:
        slots, positions = forward_batch.out_cache_loc, forward_batch.positions
        capture.before_forward()
        output = original(model_runner, forward_batch, *args, **kwargs)
        if slots is not None and slots.numel():
            capture.after_forward(slots, positions, from_graph=bool(output.can_run_graph))
    if linker is not None:
        linker.forward_ended()
    return output


def before_release_request(_wrapper: object, rid: str) -> None:
    if linker is not None:
        _head_starts.aborted(rid)
        linker.forget_request(rid)


def around_match(original: Callable[..., Any], wrapper: Any, key: Any, req: Any, result: Any) -> Any:
    """Where requests are sorted by what they find, SGLang looks up all of a prompt, be it usable or not."""
    usable = _usable_tokens(req, len(req.origin_input_ids) + len(req.output_ids)) - key.is_bigram
    return original(wrapper, key if len(key) <= usable else key[:usable], req, result)


def _usable_tokens(req: Any, tokens: int) -> int:
    """How many tokens of a prefix may come from a cache: none of which the request wants log-probabilities.

    tokens: of the request, so far.
    """
    if req.positional_embed_overrides is not None:
        return 0
    return int(req._compute_max_prefix_len(tokens))


def before_offload_node(wrapper: Any, node_id: Any, _transfers: object) -> None:
    if linker is not None:
        before = wrapper.cache.tree_core.get_prefix_hash_values(node_id)
        linker.offload_follows(bytes.fromhex(before[-1]) if before else ROOT)


@dataclass(frozen=True)
class Admit:
    """Rides on SGLang's own broadcast of requests: these are held no more, on any rank, from this step on."""

    rids: tuple[str, ...]


def after_request_queued(_result: None, scheduler: Any, req: Any, *_args: object, **_kwargs: object) -> None:
    """The pages of a new request that are not on the device are asked for at once.

    SGLang queues some while it makes a batch (their grammar is ready): if they are held, they are not for that one.
    """
    queue = scheduler.waiting_queue
    if linker is None or not queue or queue[-1] is not req:
        return
    keys, prompt = _missing_pages(scheduler.tree_cache, req)
    if keys:
        linker.queued(req.rid, keys, prompt)
        if _held_meanwhile is not None and req.rid in linker.held:
            _held_meanwhile.append(queue.pop())


def _missing_pages(tree_cache: Any, req: Any) -> tuple[list[bytes], Prompt]:
    """Keys of the request's pages behind what the radix tree has on the device; asks no other rank."""
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.common import _req_radix_key

    tokens = req.origin_input_ids + req.output_ids
    if tree_cache.session.will_lend_record(req):
        return [], Prompt(len(tokens), 0)
    key = _req_radix_key(tree_cache, req, tokens, _usable_tokens(req, len(tokens)))
    key, _ = key.maybe_to_bigram_view(tree_cache.tree_core.is_eagle)
    match = tree_cache.match_prefix(MatchPrefixParams(key=key))
    on_device = match.device_prefix_len
    if on_device >= len(key):
        return [], Prompt(len(tokens) - on_device, on_device)
    keys = [bytes.fromhex(name) for name in tree_cache.linker._tail_hashes(key, match, on_device)]
    covered = on_device + len(keys) * tree_cache.page_size
    whole = divisible(req) and not key.is_bigram  # of a beginning the last page would miss the token after it
    return keys, Prompt(max(1, len(tokens) - covered), on_device, divisible=whole)


def around_broadcast(
    original: Callable[..., Any], receiver: Any, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
) -> Any:
    if linker is None:
        return original(receiver, recv_reqs, local_reqs)
    global _idle
    for rid in _head_starts.over():
        linker.head_start_over(rid)
    news: list[Any] = list(local_reqs or ())
    if recv_reqs is not None:
        if rids := linker.admissible(idle=_idle and not recv_reqs):
            news.append(Admit(tuple(rids)))
        if start := linker.head_start():
            news.append(start)
    _idle = False
    requests = []
    for message in original(receiver, recv_reqs, news):
        if isinstance(message, Admit):
            linker.admit(message.rids)
        elif isinstance(message, HeadStart):
            _to_begin.append(message)
        else:
            requests.append(message)
    return requests


def around_new_batch(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Held requests stay in the queue, in their place, but out of the scheduler's sight."""
    global _idle
    if linker is None:
        return original(scheduler, *args, **kwargs)
    linker.renew_store()
    _begin_head_starts(scheduler)
    before, held = scheduler.waiting_queue, set(linker.held)
    if held:
        scheduler.waiting_queue = [req for req in before if req.rid not in held]
        running = kwargs["running_batch"]  # the last batch, too, which is not in `scheduler.running_batch` yet
        nothing_to_do = not scheduler.waiting_queue and running.is_empty() and scheduler.chunked_req is None
        if nothing_to_do and not linker.others_wait_for_us:
            _idle = True
            linker.wait_for_news(_IDLE_WAIT_S)
    with _out_of_sight() as held_meanwhile:
        result = original(scheduler, *args, **kwargs)
    if held:
        left = scheduler.waiting_queue
        still_there, known = {id(req) for req in left}, {id(req) for req in before}
        scheduler.waiting_queue = [req for req in before if id(req) in still_there or req.rid in held]
        scheduler.waiting_queue += [req for req in left if id(req) not in known]
    scheduler.waiting_queue += held_meanwhile
    if (batch := result[0]) is not None:
        _head_starts.scheduled(batch.reqs)
        linker.scheduled([req.rid for req in batch.reqs])
        for req in batch.reqs:  # SGLang leaves a hit there that the last lookup did not find again
            scheduler.tree_cache.linker.hit_markers.pop(req.rid, None)
    return result


def _begin_head_starts(scheduler: Any) -> None:
    """What SGLang knows nothing of is queued behind its back: it is not to be counted, refused or asked for ahead."""
    assert linker is not None
    while _to_begin:
        start = _to_begin.pop(0)
        if (head := _head_starts.begin(scheduler, start)) is not None:
            linker.begin_head_start(start, *_missing_pages(scheduler.tree_cache, head))
            scheduler.waiting_queue.append(head)


@contextlib.contextmanager
def _out_of_sight() -> Iterator[list[Any]]:
    """Meanwhile, requests that are queued and held are put in the list instead."""
    global _held_meanwhile
    requests: list[Any] = []
    _held_meanwhile = requests
    try:
        yield requests
    finally:
        _held_meanwhile = None


def after_weights_changed(_result: object, _updater: object, *_args: object, **_kwargs: object) -> None:
    if linker is not None:
        linker.weights_changed()


def after_weights_from_disk(result: tuple[bool, str], _updater: object, *_args: object, **_kwargs: object) -> None:
    """Where these fail, SGLang keeps the former ones, or loads them again."""
    succeeded, _ = result
    if linker is not None and succeeded:
        linker.weights_changed()


def after_metrics_constants(_result: None, scheduler: Any) -> None:
    """The scheduler is complete; it has a collector where the server has `--enable-metrics`.

    `tp_rank` is the one among those that have the same requests, as in SGLang's metrics of the radix cache.
    """
    from sglang.srt.runtime_context import get_parallel

    if linker is not None and scheduler.metrics_collector is not None:
        labels = {**scheduler.metrics_collector.labels, "tp_rank": get_parallel().attn_tp_rank}
        metrics.start(linker.stats, labels)


def after_internal_state(result: Any, *_args: object) -> None:
    if linker is not None:
        result.internal_state["hcache"] = linker.stats()
