"""SGLang's `torch_native` attention without computing queries for tokens that are already in the cache.

The stock backend attends from every position of a sequence, the cached prefix included, and throws that part away:
the cost of a prefix hit is then quadratic in the prefix. Here only the new tokens attend.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class TorchCpuAttention(TorchNativeAttnBackend):  # type: ignore[misc]  # SGLang is untyped here
    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Length of the sequences that fill up a batch, as data-parallel attention does."""
        return 1

    def _in_the_layers_pool(
        self, req_to_token: torch.Tensor, rows: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A table of slots, and the requests' rows in it: layers with a window may have a pool of their own."""
        if window is None or not self.use_sliding_window_kv_pool:
            return req_to_token, rows
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(req_to_token[rows]), torch.arange(len(rows))

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *args: Any,
        sliding_window_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        table, rows = self._in_the_layers_pool(req_to_token, req_pool_indices, sliding_window_size)
        attended: torch.Tensor = super()._run_sdpa_forward_decode(
            query,
            output,
            k_cache,
            v_cache,
            table,
            rows,
            seq_lens,
            *args,
            sliding_window_size=sliding_window_size,
            **kwargs,
        )
        return attended

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor | None,
        extend_seq_lens: torch.Tensor | None,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """As the stock method: query and output `[tokens, heads, dim]`, caches `[slots, heads, dim]`."""
        if encoder_lens is not None or not causal:
            stock: torch.Tensor = super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
            return stock
        window = None if sliding_window_size in (None, -1) else sliding_window_size
        if extend_prefix_lens is None:  # drafts to be verified, equally many of each request, after its tokens
            seq_lens, extend_prefix_lens = seq_lens + len(query) // len(seq_lens), seq_lens
        table, rows = self._in_the_layers_pool(req_to_token, req_pool_indices, window)
        start = 0
        for row, length, prefix in zip(rows.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(), strict=True):
            end = start + length - prefix
            first_seen = 0 if window is None else max(0, prefix - window)
            slots = table[row, first_seen:length]
            output[start:end] = _attend(
                query[start:end], k_cache[slots], v_cache[slots], scaling, enable_gqa, window=window
            )
            start = end
        return output


def attend_to_latents() -> None:
    """MLA: attention of PyTorch reads K and V from the pool, so prefills, too, must attend to what is there."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda _module, _batch: AttnForwardMethod.MLA)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    enable_gqa: bool,
    *,
    window: int | None,
) -> torch.Tensor:
    """The last `len(query)` tokens of a sequence attend to all before them, or to `window` of them and themselves.

    `[tokens, heads, dim]` each.
    """
    new, length = len(query), len(key)
    mask = None
    if new < length or (window is not None and window < new):
        mask = torch.ones((new, length), dtype=torch.bool).tril(diagonal=length - new)
        if window is not None:
            mask = mask.triu(diagonal=length - new - window)
    heads_first = [part.to(query.dtype).movedim(0, 1).unsqueeze(0) for part in (query, key, value)]
    attended = scaled_dot_product_attention(
        heads_first[0],
        heads_first[1],
        heads_first[2],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=enable_gqa,
    )
    return attended.squeeze(0).movedim(0, 1)
