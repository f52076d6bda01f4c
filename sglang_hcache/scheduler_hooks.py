"""The hooks of a scheduler process that serves with the tier, and the objects they act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_hcache import metrics
from sglang_hcache.config import HCacheConfig
from sglang_hcache.queueing.admission import Admission, usable_tokens
from sglang_hcache.queueing.head_start import is_head_start
from sglang_hcache.queueing.page_names import Names
from sglang_hcache.saving.capture import Capture
from sglang_hcache.startup.capture_choice import capture_of
from sglang_hcache.storage.layout import ROOT

if TYPE_CHECKING:
    from sglang_hcache.linker import HCacheLinker

# A scheduler process has one target model and, once that is loaded, one linker.
runner: Any = None
capture: Capture | None = None
why_not_captured = ""
linker: HCacheLinker | None = None
admission: Admission | None = None


def after_load_model(_result: None, model_runner: Any) -> None:
    """Hooks must be on the model before CUDA graphs are captured, and the staging buffer before memory is sized."""
    global runner, capture, why_not_captured
    if model_runner.is_draft_worker:
        return
    runner = model_runner
    extra = model_runner.server_args.unified_cache_external_linker_config["linker_extra_config"]
    wanted = HCacheConfig.from_linker_extra(extra).representation
    capture, why_not_captured = capture_of(model_runner, wanted, most_rows_of_a_forward())


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
    if admission is not None:
        admission.released(rid)


def around_match(original: Callable[..., Any], wrapper: Any, key: Any, req: Any, result: Any) -> Any:
    """Look up the usable part of a prompt only: to sort requests by their hits, SGLang looks up all of it."""
    usable = max(0, usable_tokens(req, len(req.origin_input_ids) + len(req.output_ids)) - key.is_bigram)
    match = partial(original, wrapper, key if len(key) <= usable else key[:usable], req, result)
    if admission is None:
        return match()
    with admission.names.of(req):
        return match()


def around_names(original: Callable[..., Names], wrapper: Any, key: Any, result: Any, on_device: int) -> Names:
    """Hash the pages of a waiting request once, instead of at every lookup."""
    hash_pages = partial(original, wrapper, key, result, on_device)
    if admission is None:
        return hash_pages()
    return admission.names.behind(on_device, len(key), wrapper.cache.page_size, hash_pages)


def around_sync(original: Callable[..., int], wrapper: Any, lengths: Sequence[int], **others: Any) -> int:
    """SGLang intersects the ranks' sets of lengths element by element; for ranges, the least end is enough."""
    if not isinstance(lengths, range):
        return original(wrapper, lengths, **others)
    common = torch.tensor([lengths.stop - 1], dtype=torch.int)
    wrapper.cache._all_reduce_attn_groups(common, torch.distributed.ReduceOp.MIN)
    return int(common)


def before_offload_node(wrapper: Any, node_id: Any, _transfers: object) -> None:
    if linker is not None:
        before = wrapper.cache.tree_core.get_prefix_hash_values(node_id)
        linker.offload_follows(bytes.fromhex(before[-1]) if before else ROOT)


def around_check_events(original: Callable[..., None], cache: Any) -> None:
    """Skip the ranks' agreement in each step on what is offloaded: here, that is all that SGLang has offered."""
    wrapper = cache.linker
    if linker is None or wrapper is None:
        original(cache)
    else:
        offloaded = wrapper.take_completed_offloads(wrapper.num_completed_offloads())
        wrapper.commit_completed_offloads(offloaded)


def before_release_req(*, req: Any, tree_cache: Any, **_others: object) -> None:
    """Save what a running request has computed before SGLang frees it, for lack of memory or to pause the engine.

    SGLang queues the request again. Nothing is kept of one that it aborts, or whose K and V it keeps out of its tree:
    a load of its prefix has failed, for example.
    """
    if admission is not None and req.to_finish is None and not req.skip_radix_cache_insert:
        admission.retracted(tree_cache, req)


def before_rows_freed(cache: Any, kv: Any, ranges: Sequence[tuple[int, int]]) -> None:
    """A request ends: what it has computed but not inserted in the tree, as the last tokens that fill no page."""
    if linker is not None and capture is not None and capture.sink is not None:
        row = cache.req_to_token_pool.req_to_token[kv.req_pool_idx]
        for begin, end in ranges:
            if begin < end:
                linker.not_inserted(row[begin:end].clone())  # another request's, soon


def after_request_made(_result: None, req: Any, *_args: object, **_kwargs: object) -> None:
    if linker is not None and req.lora_id is not None:
        linker.adapters.name_by_content(req)


def around_load_adapter(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    load = partial(original, scheduler, request)
    return load() if linker is None else linker.adapters.load(load, request)


def after_request_queued(_result: None, scheduler: Any, req: Any, *_args: object, **_kwargs: object) -> None:
    queue = scheduler.waiting_queue
    if admission is not None and queue and queue[-1] is req:
        admission.queued(scheduler, req)


def around_broadcast(
    original: Callable[..., Any], receiver: Any, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
) -> Any:
    if admission is None:
        return original(receiver, recv_reqs, local_reqs)
    return admission.broadcast(partial(original, receiver), recv_reqs, local_reqs or [])


def around_new_batch(original: Callable[..., Any], scheduler: Any, *, running_batch: Any, **others: Any) -> Any:
    make = partial(original, scheduler, running_batch=running_batch, **others)
    return make() if admission is None else admission.make_batch(make, scheduler, running_batch)


def around_abort_output(original: Callable[..., None], scheduler: Any, abort: Any, req: Any) -> None:
    if not is_head_start(req):
        original(scheduler, abort, req)


def around_add(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    add = partial(original, adder, req, *args, **kwargs)
    return add() if admission is None else admission.add(add, adder, req)


def after_chunk_added(_result: Any, adder: Any, _req: Any) -> None:
    """A prompt that is longer than a chunk goes on in the next batch, before others are looked up for it."""
    if admission is not None:
        admission.added(adder.can_run_list)


def before_memory_released(_manager: object, _request: object) -> None:
    """SGLang takes the KV pool's memory away, and flushes its cache only afterwards."""
    if linker is not None:
        linker.drain()


def after_weights_changed(_result: object, _updater: object, *_args: object, **_kwargs: object) -> None:
    if linker is not None:
        linker.weights_changed()


def before_weights_from_disk(_updater: object, *_args: object, **_kwargs: object) -> None:
    """It may capture CUDA graphs anew, which no other thread may disturb by waiting for the device."""
    if linker is not None:
        linker.drain()


def after_weights_from_disk(result: tuple[bool, str], _updater: object, *_args: object, **_kwargs: object) -> None:
    """If loading fails, SGLang means to restore the former weights but reads the new path: they may have changed."""
    succeeded, message = result
    if linker is not None and (succeeded or message.startswith("Failed to update weights")):
        linker.weights_changed()


def after_check_weights(_result: object, _runner: object, *, action: str, **_kwargs: object) -> None:
    """SGLang's tests of weight updates write random numbers first, to see that they are replaced."""
    if linker is not None and action == "reset_tensors":
        linker.weights_changed()


def around_turn(original: Callable[..., bool], sessions: Any, req: Any) -> bool:
    """A turn of a streaming session is over, or retracted.

    If the session keeps its K and V they are not inserted, unless a later turn is aborted, which hands over all.
    """
    slot = sessions.borrowed_slot(req)  # SGLang may take the request's session away
    kept = original(sessions, req)
    if linker is not None and kept:
        kv = slot.kv
        row = sessions.cache.req_to_token_pool.req_to_token[kv.req_pool_idx]
        linker.not_inserted(row[kv.cache_protected_len : kv.kv_committed_len].clone())  # another request's, soon
    return kept


def after_metrics_constants(_result: None, scheduler: Any) -> None:
    """The scheduler is complete; it has a collector where the server has `--enable-metrics`.

    `tp_rank` is the one among those that have the same requests, as in SGLang's metrics of the radix cache.
    """
    from sglang.srt.runtime_context import get_parallel

    if linker is not None and scheduler.metrics_collector is not None:
        labels = {**scheduler.metrics_collector.labels, "tp_rank": get_parallel().attn_tp_rank}
        metrics.start(linker.stats, linker.durations(), labels)


def after_internal_state(result: Any, *_args: object) -> None:
    if linker is not None:
        result.internal_state["hcache"] = linker.stats()
