"""Builds what a linker starts with from the flags, the model and the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_memory, get_parallel, get_spec

from sglang_hcache import windows
from sglang_hcache.config import LEAST_PAGE_SIZE, HCacheConfig
from sglang_hcache.model import Pools, Unsupported, check_pool, draft_pools
from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.supervisor import LocalSupervisor, RemoteSupervisor, SessionSupervisor
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import LoadPlanner, Planner, RestoreAll
from sglang_hcache.ranks import taking_turns
from sglang_hcache.restoring.projector import PoolReader
from sglang_hcache.saving.capture import Capture
from sglang_hcache.startup.calibration import calibrate
from sglang_hcache.startup.codec_choice import codec_of
from sglang_hcache.startup.kept import CALIBRATION
from sglang_hcache.startup.layout_choice import choose_by_flag, choose_by_plan
from sglang_hcache.startup.representation import Stored, formats_of
from sglang_hcache.startup.synthetic_forward import most_tokens
from sglang_hcache.storage.store import READ_THREADS


def supported_pools(params: Any, model_config: Any, components: set[Any], forward_tokens: int) -> Pools:
    """The KV pools of a model and its draft models, if the tier can serve it. Raises Unsupported.

    params: SGLang's radix-cache parameters. forward_tokens: the most tokens of a forward.
    """
    if params.disable:
        raise Unsupported("SGLang serves it without a radix cache; the tier restores what that evicts")
    if model_config.is_encoder_decoder:
        raise Unsupported("its forward takes all of an encoder's tokens from a cache or none; pages end in them")
    pool = check_pool(params.token_to_kv_pool_allocator.get_kvcache(), components)
    if params.page_size < LEAST_PAGE_SIZE:  # SGLang may choose another one than its flag says
        raise Unsupported(f"pages of {params.page_size} tokens are smaller than {LEAST_PAGE_SIZE}")
    drafts = draft_pools(params, get_spec(), pool)
    if not isinstance(pool, SWAKVPool):
        return Pools(pool, drafts, params.page_size)
    pages, slots = -(-params.swa_retain_window // params.page_size), pool.swa_kv_pool.size
    if slots < (least := windows.least_slots(pages * params.page_size, params.page_size, forward_tokens)):
        raise Unsupported(
            f"the KV pool of its sliding windows has {slots} tokens, and with less than {least} a hit may never be "
            "scheduled; raise --swa-full-tokens-ratio, or add --disable-hybrid-swa-memory"
        )
    return Pools(pool, drafts, params.page_size, pages)


def plan(config: HCacheConfig, runner: Any, capture: Capture | str, pools: Pools) -> tuple[Stored, Planner]:
    """What is stored, and how much of it is restored. Raises Unsupported; runs the model, on all ranks alike.

    capture: or why there is none.
    """
    formats = formats_of(runner, capture, pools, codec_of(config, runner, capture, pools.page_tokens))
    layers, page_tokens = pools.model.layer_num, pools.page_tokens
    stored = choose_by_flag(config.representation, formats, layers, codec=config.codec)
    if config.plan != "auto":
        return stored, RestoreAll(page_tokens)
    with taking_turns(Path(config.directories[0]) / CALIBRATION):  # so that all replicas store the same
        rates = calibrate(config, runner, formats, page_tokens=page_tokens, layers=layers, device=pools.device)
        if rates is None:
            return stored, RestoreAll(page_tokens)
        shape, kept = rates
        # Hosts with a common prefetcher share pages, but do not hear of each other: all store what is smaller.
        if config.representation == "auto" and formats.hidden is not None and config.prefetcher is None:
            stored = choose_by_plan(
                config,
                formats,
                shape,
                kept.calibrated,  # learned rates change with the load, and another layout loses all stored pages
                page_tokens=page_tokens,
                most_tokens=most_tokens(runner, page_tokens),
                mixed=get_parallel().attn_tp_size == 1,  # else hidden states would be stored by each of the ranks
            )
    return stored, LoadPlanner(shape, kept.machine, stored.layout, page_tokens, learned=kept.learned)


def warm_up(stored: Stored, page_tokens: int) -> None:
    """Kernels of a page are compiled before a request waits for them. Leaves the pools as they were."""
    for group in stored.formats.groups:
        device = group.pool.device
        slots = torch.arange(page_tokens, device=device)
        as_kv = [number for number in group.numbers if number >= stored.layout.hidden]
        for number in {group.numbers[0], *as_kv[:1]}:  # a layer of each kind
            place = group.numbers.index(number)
            as_it_was = torch.empty(1, page_tokens, group.row_bytes, dtype=torch.uint8, device=device)
            PoolReader(group.pool, range(place, place + 1)).read(slots, as_it_was)
            way = stored.of(number)
            rows = torch.zeros(page_tokens, way.row_bytes, dtype=torch.uint8, device=device)
            if way.codec is not None and not way.codec.lossless:  # it has had no part in the self-test
                way.codec.encode(way.codec.decode(number, rows)[None], rows[None])
            way.projector.project(number, rows.view(way.dtype), slots, slots)
            stored.formats.kv.projector.project(number, as_it_was[0], slots, slots)


def supervisor_of(
    config: HCacheConfig,
    hello: Callable[[], Hello],
    *,
    opened: Callable[[Any], None],
    closing: Callable[[Any], None],
) -> SessionSupervisor[Any]:
    """The supervisor of the session with the prefetcher that the flags name."""
    if config.prefetcher is not None:
        return RemoteSupervisor(config.prefetcher, config.keys, hello, opened=opened, closing=closing)
    return LocalSupervisor(
        config.directories,
        config.directory_bytes,
        hello,
        read_bytes_per_s=config.read_bytes_per_s,
        opened=opened,
        closing=closing,
    )


def reads_at_once(config: HCacheConfig) -> int:
    """Pages that are being read at the same time, of all directories."""
    if config.read_bytes_per_s is not None:
        return 1
    return READ_THREADS * (1 if config.prefetcher else len(config.directories))


def hold_rule(config: HCacheConfig) -> HoldRule:
    return HoldRule(
        PrefetchPolicy(get_memory().hicache_storage_prefetch_policy),
        base_s=config.prefetch_timeout_base_s,
        per_ki_token_s=config.prefetch_timeout_per_ki_token_s,
    )
