"""The formats in which a layer can be stored: hidden states only if the self-test has passed on this model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_exec, get_lora, get_parallel, get_spec

from sglang_hcache.codec import Codec, DecodingProjector
from sglang_hcache.config import Representation
from sglang_hcache.model import AttentionSite, LayerGroup, Pool, Pools, has_latent, layer_groups
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.ranks import all_ranks
from sglang_hcache.restoring.fast_projector import KernelProjector
from sglang_hcache.restoring.host_pages import Projector
from sglang_hcache.restoring.projector import KeyValueReplayProjector, KVProjector, ReplayProjector
from sglang_hcache.saving.capture import Capture
from sglang_hcache.startup.selftest import run_self_test

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFormat:
    """To store a layer, and to get its K and V back."""

    row_bytes: int  # of a token
    dtype: torch.dtype  # of a row's elements
    projector: Projector
    projector_name: str
    codec: Codec | None = None  # rows are encoded by it


@dataclass(frozen=True)
class Formats:
    """What this model allows."""

    hidden: LayerFormat | None
    obstacle: str  # why there are no hidden states
    kv: LayerFormat  # of the first group
    kv_bytes_all_ranks: int  # K and V of a token in a layer
    kv_same_on_all_ranks: bool  # MLA's latent is; K and V are of each rank's own heads
    groups: tuple[LayerGroup, ...]  # of all layers, as they lie in a record

    @property
    def hidden_is_smaller(self) -> bool:
        return self.hidden is not None and self.hidden.row_bytes < self.kv_bytes_all_ranks


@dataclass(frozen=True)
class Stored:
    """What is stored of each layer: hidden states of the first, K and V of the others, and of a draft model's."""

    layout: Layout  # of the model itself
    formats: Formats
    reason: str

    def of(self, layer: int) -> LayerFormat:
        """By the layer's number, a draft model's after the model's."""
        if layer < self.layout.hidden:
            assert self.formats.hidden is not None
            return self.formats.hidden
        (group,) = (group for group in self.formats.groups if layer in group.numbers)
        return replace(self.formats.kv, row_bytes=group.row_bytes)

    @property
    def order(self) -> list[int]:
        """Numbers of the layers as they lie in a record."""
        return [number for group in self.formats.groups for number in group.numbers]

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Of a token, in each layer, in their order."""
        return tuple(self.of(layer).row_bytes for layer in self.order)

    @property
    def pool_row_bytes(self) -> int:
        """Of a token, in all layers of this rank's pools, a draft model's among them."""
        return sum(len(group.numbers) * group.row_bytes for group in self.formats.groups)

    @property
    def windowed(self) -> list[int]:
        """Numbers of the layers whose tokens have slots of their own, as they lie in a record."""
        return [number for group in self.formats.groups if group.windowed for number in group.numbers]

    @property
    def drafts(self) -> list[int]:
        """Numbers of the layers of draft models."""
        return [number for group in self.formats.groups if group.draft for number in group.numbers]

    @property
    def same_on_all_ranks(self) -> bool:
        """Whether all ranks store the same bytes, as they do of hidden states and of MLA's latent."""
        return self.formats.kv_same_on_all_ranks or not (self.layout.kv or self.drafts)

    @property
    def name(self) -> str:
        parts = ((Representation.HIDDEN, self.layout.hidden), (Representation.KV, self.layout.kv))
        return "+".join(kind for kind, layers in parts if layers)

    @property
    def projector_names(self) -> str:
        return " and ".join(dict.fromkeys(self.of(layer).projector_name for layer in range(self.layout.layers)))


def formats_of(
    model_runner: Any,
    capture: Capture | str,
    pools: Pools,
    codec: Codec | None = None,
) -> Formats:
    """Runs the self-test of hidden states if they are captured: before any request, on all ranks alike.

    capture: or why there is none. codec: encodes what is stored of them. A lossy one has no part in the test.
    """
    groups = layer_groups(pools.model, pools.drafts)
    kv_bytes = groups[0].row_bytes
    hidden, model = None, model_runner.model_config
    projector, obstacle = _hidden_projector(model_runner, capture, pools, codec)
    if projector is not None and codec is not None:
        name = f"{projector.name}, from {codec.name}"
        hidden = LayerFormat(codec.row_bytes, torch.uint8, DecodingProjector(projector, codec), name, codec)
    elif projector is not None:
        hidden = LayerFormat(model.hidden_size * model.dtype.itemsize, model.dtype, projector, projector.name)
    return Formats(
        hidden,
        obstacle,
        kv=LayerFormat(kv_bytes, torch.uint8, KVProjector(groups), "copy"),
        kv_bytes_all_ranks=kv_bytes * (1 if has_latent(pools.model) else get_parallel().attn_tp_size),
        kv_same_on_all_ranks=all(map(has_latent, (pools.model, *pools.drafts))),
        groups=groups,
    )


def _hidden_projector(
    runner: Any,
    capture: Capture | str,
    pools: Pools,
    codec: Codec | None,
) -> tuple[KernelProjector | ReplayProjector | None, str]:
    """The fastest projector that the self-test has just passed; else why hidden states cannot be restored here."""
    if isinstance(capture, str):
        return None, capture
    if obstacle := _obstacle(capture, pools.model):
        return None, obstacle
    deterministic = get_exec().deterministic.enable_deterministic_inference  # which --rl-on-policy-target sets, too
    for projector in _candidates(capture.sites, pools.model, deterministic=deterministic):
        passed, verdict = _try(projector, runner, capture, pools, codec)
        if all_ranks(passed):
            return projector, ""
    return None, f"the self-test failed ({verdict})"


def _obstacle(capture: Capture, pool: Pool) -> str | None:
    """Why hidden states cannot be stored, where the self-test's one short prompt would not show it; or None."""
    obstacles = (
        (has_latent(pool), "the latent of MLA is smaller than hidden states"),
        (isinstance(pool, SWAKVPool), "layers with a sliding window have a KV pool of their own"),
        (
            len(capture.sites) != pool.layer_num,
            f"{len(capture.sites)} attention modules for {pool.layer_num} layers of the KV pool",
        ),
    )
    return next((why for holds, why in obstacles if holds), None)


def why_never_hidden(runner: Any, sites: Sequence[AttentionSite]) -> str | None:
    """Why hidden states of a loaded model would be of no use, however they are captured; or None."""
    ranks = get_parallel().attn_tp_size
    obstacles = (
        # --lora-paths sets this, too, but not in what was given.
        (get_lora().enable_lora, "with LoRA the projection depends on the request"),
        (runner.model_config.model_is_mrope, "positions of several dimensions (M-RoPE) are not stored"),
        (
            any(map(_is_quantised, sites)),
            "its projection is quantised: its products may share memory with those of the forward beside them",
        ),
        (
            any(site.rotates_by_forward for site in sites),
            "with LongRoPE a token's K depends on the longest prompt of its forward",
        ),
        (
            ranks > 1 and bool(get_spec().speculative_algorithm),
            "a draft model's K and V are of each rank's own heads, so each would store the hidden states, too",
        ),
        (
            ranks > 1 and any(site.normalizes_across_heads for site in sites),
            "to normalize K all ranks exchange it, which a restoration must not do beside their forward",
        ),
    )
    return next((why for holds, why in obstacles if holds), None)


def _is_quantised(site: AttentionSite) -> bool:
    """Marlin's products, for one, keep a layer's locks in memory that two of them may not use at once."""
    linear = [module for module in site.module.modules() if isinstance(module, LinearBase)]
    return any(type(module.quant_method) is not UnquantizedLinearMethod for module in linear)


def _try(
    projector: KernelProjector | ReplayProjector,
    runner: Any,
    capture: Capture,
    pools: Pools,
    codec: Codec | None,
) -> tuple[bool, str]:
    """Whether it passes the self-test on this rank, and why; other ranks may see it otherwise."""
    try:
        result = run_self_test(runner, capture, projector, pools.model, pools.page_tokens, codec)
    except Exception as error:  # of the model's own code, as a rule: the tier can do without
        logger.warning("hcache: self-test of hidden states by %s FAILED", projector.name, exc_info=True)
        return False, type(error).__name__
    verdict = str(result)
    passed = "passed" if result.passed else "FAILED"
    logger.info("hcache: self-test of hidden states by %s %s (%s)", projector.name, passed, verdict)
    if codec is not None and result.not_encoded:
        share = f"{result.not_encoded:.1%} of a test prompt's tokens, nor the pages they are in"
        logger.warning("hcache: --hcache-codec %s cannot store %s; drop it", codec.name, share)
    return result.passed, verdict


def _candidates(
    sites: Sequence[Any], pool: Pool, *, deterministic: bool
) -> Iterator[KernelProjector | ReplayProjector]:
    """Projectors of hidden states, the fastest first.

    deterministic: SGLang has put kernels of its own in the place of torch's; the model's code runs just these.
    """
    if not deterministic:
        try:
            yield KernelProjector(sites, pool)
        except ValueError as error:
            logger.info("hcache: K and V are projected by the model's own code (%s)", error)
        with contextlib.suppress(ValueError):
            yield KeyValueReplayProjector(sites, pool)
    yield ReplayProjector(sites, pool)
