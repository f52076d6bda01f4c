"""What the tier needs to know of a model: its attention modules, and the bytes stored for each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

OnePool: TypeAlias = MHATokenToKVPool | MLATokenToKVPool
Pool: TypeAlias = OnePool | SWAKVPool  # the last has two: layers with a sliding window are in one of their own


@dataclass(frozen=True)
class Pools:
    """The KV pools of this process."""

    model: Pool
    drafts: tuple[OnePool, ...]  # of draft models: a token has the same slot there
    page_tokens: int
    window_pages: int = 0  # that hold a window, where its layers have slots of their own

    @property
    def device(self) -> str:
        return str(self.model.device)


_DRAFTING = (None, "EAGLE", "EAGLE3", "STANDALONE")  # as SGLang names them in the end; NEXTN is its EAGLE
_REPLAYED = {"hidden_states", "positions", "forward_batch"}


class Unsupported(Exception):
    """The model cannot be served by the tier; the message says why, in one line."""


@dataclass(frozen=True)
class AttentionSite:
    """One decoder layer's attention module, the one that owns the layer's only `RadixAttention`."""

    module: torch.nn.Module
    attention: RadixAttention
    signature: inspect.Signature  # of `module.forward`, without self

    @cached_property
    def _place(self) -> int:
        return list(self.signature.parameters).index("hidden_states")

    @property
    def rotates_by_forward(self) -> bool:
        """Whether a token's K depends on the other tokens of its forward: by the largest position, here."""
        return any(isinstance(part, Phi3LongRoPEScaledRotaryEmbedding) for part in self.module.modules())

    @property
    def normalizes_across_heads(self) -> bool:
        """Whether K is normalized over all heads at once, which several ranks have to exchange for that."""
        weight = getattr(getattr(self.module, "k_norm", None), "weight", None)
        return weight is not None and weight.numel() > self.attention.qk_head_dim

    def hidden_states(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The attention's input, `[tokens, width]`, among the arguments of a call of the module."""
        hidden: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[self._place]
        return hidden


def attention_sites(model: torch.nn.Module) -> list[AttentionSite]:
    """The model's attention modules in layer order; empty when they cannot all be replayed.

    A module qualifies when it has exactly one `RadixAttention` child and its `forward` can be called with
    hidden states, positions and a forward batch alone.
    """
    sites = []
    for module in model.modules():
        owned = [child for child in module.children() if isinstance(child, RadixAttention)]
        if not owned:
            continue
        signature = inspect.signature(module.forward)
        given = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = {name for name, p in signature.parameters.items() if p.default is p.empty and p.kind in given}
        if len(owned) != 1 or "hidden_states" not in signature.parameters or required - _REPLAYED:
            return []
        sites.append(AttentionSite(module, owned[0], signature))
    sites.sort(key=lambda site: site.attention.layer_id)
    layers = [site.attention.layer_id for site in sites]
    return sites if layers == list(range(len(sites))) else []


def check_pool(pool: Any, components: set[Any]) -> Pool:
    """The device pool, if it is of the kind the tier can read and write; raises `Unsupported` if not."""
    names = {component.name for component in components}
    if names == {"FULL", "SWA"}:
        parts = (pool.full_kv_pool, pool.swa_kv_pool) if type(pool) is SWAKVPool else ()
        if parts and all(type(part) is MHATokenToKVPool and part.layer_num for part in parts):
            for part in parts:
                _of_a_kind_we_know(part)
            return pool
        what_to_do = "add --disable-hybrid-swa-memory, with which all layers keep K and V of all tokens"
        raise Unsupported(
            f"a KV pool of type {type(pool).__name__} for sliding windows is not supported; {what_to_do}"
        )
    if names != {"FULL"}:
        raise Unsupported(f"the radix cache holds {', '.join(sorted(names))} state; only full attention is supported")
    return _of_a_kind_we_know(pool)


def draft_pools(params: Any, spec: Any, pool: Pool) -> tuple[OnePool, ...]:
    """The pools of a draft model, if there is one: each token has the same slot there as in the model's own pool.

    params: SGLang's radix-cache parameters. spec: its settings of speculative decoding, some of which it derives from
    the model. pool: the model's own. Raises `Unsupported`.
    """
    if (algorithm := spec.speculative_algorithm) not in _DRAFTING:
        why = f"SGLang drafts by {algorithm} for it, which is not supported yet"
        raise Unsupported(f"{why}; drop --speculative-algorithm")
    if (spec.speculative_eagle_topk or 1) > 1:
        why = "accepted drafts of a tree are moved after their forward"
        raise Unsupported(f"{why}; add --speculative-eagle-topk 1, with the numbers of steps and of draft tokens")
    drafts = (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools)
    if drafts and spec.enable_multi_layer_eagle:
        why = "SGLang drafts with several models at once for it, which is not supported yet"
        raise Unsupported(f"{why}; drop --speculative-algorithm")
    if drafts and isinstance(pool, SWAKVPool):
        raise Unsupported("a draft model beside layers with slots of their own; add --disable-hybrid-swa-memory")
    return tuple(map(_of_a_kind_we_know, drafts))


def _of_a_kind_we_know(pool: Any) -> OnePool:
    if type(pool) is MHATokenToKVPool:
        if pool.is_quantized_kv_cache:
            raise Unsupported("a KV pool of this quantisation is not supported yet; drop --kv-cache-dtype")
        if pool.kv_cache_layout != "nhd":
            what_to_do = "unset SGLANG_USE_HND_KVCACHE and SGLANG_AITER_KV_CACHE_LAYOUT"
            raise Unsupported(f"the KV pool's layout {pool.kv_cache_layout} is not supported; {what_to_do}")
        return pool
    if type(pool) is MLATokenToKVPool and not pool.use_dsa:
        return pool
    raise Unsupported(f"a KV pool of type {type(pool).__name__} is not supported yet")


def has_latent(pool: Pool) -> bool:
    """Whether the pool holds MLA's latent, from which all heads derive K and V; it is the same on every rank."""
    return isinstance(pool, MLATokenToKVPool)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose K and V, or latents, this rank keeps in one pool, in the pool's order.

    numbers: SGLang's, of the model's layers; those of draft models are counted on from there.
    """

    pool: OnePool
    numbers: tuple[int, ...]
    windowed: bool = False  # their tokens have slots of their own
    draft: bool = False

    @property
    def row_bytes(self) -> int:
        """Of a token in a layer."""
        return sum(buffer[0].nbytes for buffer in kv_buffers(self.pool, 0))


def layer_groups(pool: Pool, drafts: Sequence[OnePool] = ()) -> tuple[LayerGroup, ...]:
    """All that is stored, as it lies in a record: one group after the other."""
    if isinstance(pool, SWAKVPool):
        by_place = sorted(pool.layers_mapping.items(), key=lambda item: item[1])  # layer: (place, windowed)
        full, windowed = (tuple(layer for layer, (_, of) in by_place if of == which) for which in (False, True))
        groups = [LayerGroup(pool.full_kv_pool, full), LayerGroup(pool.swa_kv_pool, windowed, windowed=True)]
    else:
        groups = [LayerGroup(pool, tuple(range(pool.layer_num)))]
    first = pool.layer_num
    for draft in drafts:
        groups.append(LayerGroup(draft, tuple(range(first, first + draft.layer_num)), draft=True))
        first += draft.layer_num
    return tuple(groups)


def kv_buffers(pool: OnePool, place: int) -> tuple[torch.Tensor, ...]:
    """What a pool keeps of the layer at a place in it: K and V, or MLA's latent; `[slots, heads, elements]` each."""
    if isinstance(pool, MLATokenToKVPool):
        return (pool.kv_buffer[place],)
    return pool.k_buffer[place], pool.v_buffer[place]
