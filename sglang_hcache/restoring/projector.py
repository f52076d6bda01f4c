"""Projectors: a layer's stored rows become K and V in the device pool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_hcache.model import AttentionSite, LayerGroup, OnePool, kv_buffers
from sglang_hcache.triton_kernels.rows import PoolLayers, scatter_kv


class _Stored(Exception):
    """K and V are in the pool: the rest of the attention module need not run."""


class _StoreAndStop(AttentionBackend):  # type: ignore[misc]  # SGLang is untyped here
    """An attention backend that takes K and V and stops."""

    def __init__(self, pool: MHATokenToKVPool) -> None:
        self.token_to_kv_pool = pool

    def forward(
        self,
        _q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_kwargs: object,
    ) -> NoReturn:
        if save_kv_cache:
            k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
            v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)
        raise _Stored

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        pass


class ReplayProjector:
    """Calls the model's own attention module on the stored inputs and stops it where it would attend.

    Whatever the module does to K and V (norms, biases, partial or scaled RoPE) is done by its own code. It computes Q
    as well, for nothing.
    """

    name = "replay"

    def __init__(self, sites: Sequence[AttentionSite], pool: MHATokenToKVPool) -> None:
        self._sites = sites
        self._context = ForwardContext(attn_backend=_StoreAndStop(pool))

    @torch.no_grad()
    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        self._replay(layer, rows, positions, slots)

    def _replay(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        site = self._sites[layer]
        batch = _bare_batch(positions, slots)
        arguments = {"hidden_states": rows, "positions": positions, "forward_batch": batch}
        accepted = {name: value for name, value in arguments.items() if name in site.signature.parameters}
        with forward_context(self._context, forward_batch=batch):
            try:
                # `forward`, not a call of the module: capture's hook is not for replayed rows.
                site.module.forward(**accepted)
            except _Stored:
                return
        raise RuntimeError(f"the attention module of layer {layer} ended without attending")


class KeyValueReplayProjector(ReplayProjector):
    """A replay whose QKV projection leaves Q at zero: two thirds of the GEMM for multi-head attention.

    Raises ValueError for a model whose attention modules do not each have one unquantised fused projection.
    """

    name = "replay of K and V"

    def __init__(self, sites: Sequence[AttentionSite], pool: MHATokenToKVPool) -> None:
        super().__init__(sites, pool)
        self._projections = [_fused_projection(site) for site in sites]

    @torch.no_grad()
    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        projection = self._projections[layer]
        projection.forward = partial(_project_keys_and_values, projection)
        try:
            self._replay(layer, rows, positions, slots)
        finally:
            del projection.forward  # what the class says, again


def _fused_projection(site: AttentionSite) -> Any:
    fused = [child for child in site.module.children() if isinstance(child, QKVParallelLinear)]
    if len(fused) != 1 or type(fused[0].quant_method) is not UnquantizedLinearMethod or fused[0].skip_bias_add:
        raise ValueError("an attention module without a plain fused projection")
    return fused[0]


def _project_keys_and_values(projection: Any, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Stands in for the projection's `forward`: `[n, width]` → `[n, q + k + v]`, and no bias left to add."""
    queries = projection.q_proj_shard_size
    out = rows.new_empty(len(rows), projection.weight.shape[0])
    out[:, :queries] = 0
    weight = projection.weight[queries:].T
    if projection.bias is None:
        torch.mm(rows, weight, out=out[:, queries:])
    else:
        torch.addmm(projection.bias[queries:], rows, weight, out=out[:, queries:])
    return out, None


class KVProjector:
    """Stored K and V, or MLA's latent, go back as they are: rows are K then V of each token, or the latent."""

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self._buffers = {
            number: kv_buffers(group.pool, place) for group in groups for place, number in enumerate(group.numbers)
        }

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        buffers = self._buffers[layer]
        if rows.device.type == "cuda":
            scatter_kv(rows, slots, buffers)
            return
        for buffer, part in zip(buffers, _parts(rows, buffers), strict=True):
            buffer[slots] = part.contiguous().view(buffer.dtype).view(-1, *buffer.shape[1:])


class PoolReader:
    """Reads what a pool holds for the layers at `places`, in the form that a KVProjector takes."""

    def __init__(self, pool: OnePool, places: range) -> None:
        self._buffers = [kv_buffers(pool, place) for place in places]
        on_gpu = self._buffers[0][0].device.type == "cuda"
        self._layers = PoolLayers(self._buffers) if on_gpu else None

    def read(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Of these layers, what is in slots `[n]`: out uint8 `[layers, n, bytes]`."""
        if self._layers is not None:
            self._layers.gather_kv(slots, out)
            return
        for buffers, rows in zip(self._buffers, out, strict=True):
            for buffer, part in zip(buffers, _parts(rows, buffers), strict=True):
                part.copy_(buffer[slots].flatten(1).view(torch.uint8))


def _parts(rows: torch.Tensor, buffers: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Rows uint8 `[n, bytes]`, split by buffer."""
    parts: Sequence[torch.Tensor] = rows.split([buffer[0].nbytes for buffer in buffers], dim=1)
    return parts


def _bare_batch(positions: torch.Tensor, slots: torch.Tensor) -> ForwardBatch:
    count = slots.numel()
    lengths = slots.new_full((1,), count)  # a tensor of a list would be copied while the caller waits
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros_like(slots),
        req_pool_indices=torch.zeros_like(lengths),
        seq_lens=lengths,
        out_cache_loc=slots,
        seq_lens_sum=count,
        positions=positions,
        extend_num_tokens=count,
        extend_seq_lens=lengths,
        extend_prefix_lens=torch.zeros_like(lengths),
    )
