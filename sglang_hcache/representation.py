"""What is stored of this model, hidden states or K and V: by size, and only what has just been proven on it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.runtime_context import get_parallel

from sglang_hcache.capture import Capture
from sglang_hcache.config import Representation
from sglang_hcache.fast_projector import KernelProjector
from sglang_hcache.model import Unsupported, kv_row_bytes
from sglang_hcache.projector import KeyValueReplayProjector, KVProjector, ReplayProjector
from sglang_hcache.restore import Projector
from sglang_hcache.selftest import run_self_test

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What is stored of each layer, and how it comes back."""

    representation: Representation
    reason: str
    row_bytes: int  # of a token in a layer
    dtype: torch.dtype  # of a row's elements
    projector: Projector
    projector_name: str


def choose(wanted: str, runner: Any, capture: Capture | None, pool: MHATokenToKVPool, page_tokens: int) -> Chosen:
    """Runs the self-test of hidden states where they are wanted: before any request, on all ranks alike.

    Takes `capture` off the model where it is not needed. Raises Unsupported for a wish that cannot be met.
    """
    kv_bytes = sum(kv_row_bytes(pool, 0))
    kv_bytes_all_ranks = kv_bytes * get_parallel().tp_size
    dtype: torch.dtype = runner.model_config.dtype
    hidden_bytes = runner.model_config.hidden_size * dtype.itemsize
    reason = "as --hcache-representation says"
    if wanted != Representation.KV:
        projector, obstacle = _hidden_projector(runner, capture, pool, page_tokens)
        if projector is not None and (wanted == Representation.HIDDEN or hidden_bytes < kv_bytes_all_ranks):
            reason = f"{hidden_bytes} bytes a token and layer, {kv_bytes_all_ranks} as K and V"
            return Chosen(Representation.HIDDEN, reason, hidden_bytes, dtype, projector, projector.name)
        if wanted == Representation.HIDDEN:
            raise Unsupported(f"--hcache-representation hidden: {obstacle}; use auto or kv")
        reason = obstacle or f"{kv_bytes_all_ranks} bytes a token and layer, {hidden_bytes} as hidden states"
    if capture is not None:
        capture.remove()
    return Chosen(Representation.KV, reason, kv_bytes, torch.uint8, KVProjector(pool), "copy")


def _hidden_projector(
    runner: Any, capture: Capture | None, pool: MHATokenToKVPool, page_tokens: int
) -> tuple[KernelProjector | ReplayProjector | None, str]:
    """The fastest projector that the self-test has just passed; else why hidden states cannot be restored here."""
    if capture is None:
        return None, "hidden states are larger than K and V, or the attention modules cannot be replayed"
    if len(capture.sites) != pool.layer_num:
        return None, f"{len(capture.sites)} attention modules for {pool.layer_num} layers of the KV pool"
    if runner.server_args.enable_lora:
        return None, "with LoRA the projection depends on the request"
    if runner.model_config.model_is_mrope:
        return None, "positions of several dimensions (M-RoPE) are not stored"
    for projector in _candidates(capture.sites, pool):
        result = run_self_test(runner, capture, projector, pool, page_tokens)
        verdict = f"largest error {result.worst:.1e}, tolerated {result.tolerance:.1e}"
        passed = "passed" if result.passed else "FAILED"
        logger.info("hcache: self-test of hidden states by %s %s (%s)", projector.name, passed, verdict)
        if result.passed:
            return projector, ""
    return None, f"the self-test failed ({verdict})"


def _candidates(sites: Sequence[Any], pool: MHATokenToKVPool) -> Iterator[KernelProjector | ReplayProjector]:
    """Projectors of hidden states, the fastest first."""
    try:
        yield KernelProjector(sites, pool)
    except ValueError as error:
        logger.info("hcache: K and V are projected by the model's own code (%s)", error)
    with contextlib.suppress(ValueError):
        yield KeyValueReplayProjector(sites, pool)
    yield ReplayProjector(sites, pool)
