"""Whether hidden states of a model are captured: decided when it is loaded, before SGLang sizes its KV pool."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_hcache.config import Representation
from sglang_hcache.model import AttentionSite, attention_sites
from sglang_hcache.ranks import all_ranks
from sglang_hcache.saving.capture import Capture, capture_bytes
from sglang_hcache.startup.representation import why_never_hidden

_MOST_OF_POOL = 0.2  # of the KV pool's memory, for capture

logger = logging.getLogger(__name__)


def capture_of(runner: Any, wanted: str, rows: int) -> tuple[Capture | None, str]:
    """The capture of hidden states, or None and the reason; the same on all ranks.

    wanted: one of `config.REPRESENTATION_CHOICES`; with auto, hidden states are captured only if that takes little
    memory and can be of use. rows: the most rows of a forward.
    """
    if wanted == Representation.KV:
        return None, "K and V are wanted"
    sites = attention_sites(runner.model)
    if not sites:
        return None, "its attention modules cannot be called with hidden states and positions alone"
    width, dtype = runner.model_config.hidden_size, runner.model_config.dtype
    if why := why_never_hidden(runner, sites):
        return None, why
    if wanted != Representation.HIDDEN:
        if why := _why_not_smaller(width, sites):
            return None, why
        needed = capture_bytes(len(sites), rows=rows, width=width, dtype=dtype)
        if why := _why_no_room(needed, int(runner.pre_model_load_memory * (1 << 30))):
            return None, why
    return Capture(sites, rows=rows, width=width, dtype=dtype, device=runner.device), ""


def _why_not_smaller(width: int, sites: Sequence[AttentionSite]) -> str | None:
    """Why hidden states are not smaller than K and V of all ranks, or None. Pools of 8 bits are considered later."""
    attention = sites[0].attention
    kv_width = attention.tp_k_head_num * attention.qk_head_dim + attention.tp_v_head_num * attention.v_head_dim
    kv_width *= get_parallel().attn_tp_size
    return None if width < kv_width else f"{width} values a token and layer as hidden states, {kv_width} as K and V"


def _why_no_room(needed: int, before_loading: int) -> str | None:
    """Why `needed` bytes would take too much, on any rank, from the KV pool that SGLang sizes next; else None.

    before_loading: bytes that were free then, of which SGLang leaves a share to all else.
    """
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()  # what loading has left there
    free, _ = torch.cuda.mem_get_info()
    for_pool = max(0, free - before_loading * (1 - get_schedule().mem_fraction_static))
    fits = needed <= _MOST_OF_POOL * for_pool
    why = f"capturing hidden states takes {needed / 1e9:.1f} GB of the {for_pool / 1e9:.1f} GB for the KV pool"
    if not fits:
        logger.warning("hcache: %s, so K and V are stored. A smaller --chunked-prefill-size makes it less.", why)
    return None if all_ranks(fits) else why
