"""Speculative decoding without an accelerator: in PyTorch, what SGLang does with kernels of its own.

Drafts are a chain (`--speculative-eagle-topk 1`): each follows the one before it, so attention is causal, and what is
accepted of them is where it belongs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_hcache.cpu.attention import TorchCpuAttention

logger = logging.getLogger(__name__)


def use_pytorch() -> None:
    """Replace functions in the SGLang modules that call them, but not `slots_of`: SGLang asks its platform for it."""
    from sglang.srt.mem_cache import allocation, memory_pool
    from sglang.srt.speculative import draft_utils, eagle_utils, eagle_worker_common

    allocation.assign_req_to_token_pool_func = _give_slots
    memory_pool.copy_all_layer_kv_cache_func = _move_nothing
    eagle_worker_common.assign_draft_cache_locs_contiguous_func = _assign_draft_slots
    eagle_worker_common.fill_bonus_tokens_func = _fill_bonus_tokens
    eagle_utils.build_tree_kernel_efficient_func = _build_chain
    eagle_utils.verify_tree_greedy_func = _verify_chain
    eagle_utils._is_cpu = True  # drafts are accepted greedily, as on SGLang's own CPU platform
    draft_utils.DraftBackendFactory.create_decode_backend = _draft_steps
    draft_utils.DraftBackendFactory.create_draft_extend_backend = _draft_extend
    if not torch.cuda.is_available():
        torch.cuda.synchronize = _nothing_to_wait_for  # called on any device, as DeepSeek's draft is loaded


def _nothing_to_wait_for(device: object = None) -> None:
    pass


class _DraftStep(TorchCpuAttention):
    """Attention of one step of a chain: a batch's lengths are those before its first draft."""

    def __init__(self, model_runner: Any, step: int) -> None:
        super().__init__(model_runner)
        self._drafts = step + 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: ForwardBatch,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The batch has the slots of this step by now; when metadata were made it had those of all."""
        self.init_forward_metadata(forward_batch)
        attended: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, *args, **kwargs)
        return attended

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
        **kwargs: Any,
    ) -> torch.Tensor:
        lengths = seq_lens + self._drafts
        return super()._run_sdpa_forward_decode(
            query, output, k_cache, v_cache, req_to_token, req_pool_indices, lengths, *args, **kwargs
        )


class _DraftSteps:
    """Attention of all steps but the last, which only samples."""

    def __init__(self, model_runner: Any, steps: int) -> None:
        self.attn_backends = [_DraftStep(model_runner, step) for step in range(steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def _draft_steps(factory: Any) -> _DraftSteps | None:
    """Called once, by each process that drafts."""
    logger.warning(
        "hcache: on a machine without an accelerator drafts are verified greedily: all tokens of an answer but the "
        "first are the most likely ones, whatever temperature, top-p or top-k a request asks for"
    )
    steps = factory.speculative_num_steps
    return _DraftSteps(factory.draft_model_runner, steps) if steps > 1 else None


def _draft_extend(factory: Any) -> TorchCpuAttention:
    return TorchCpuAttention(factory.draft_model_runner)


def slots_of(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **_sizes: object,
) -> torch.Tensor:
    """Of each request's tokens from a start to an end, one request after another; int64."""
    places = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in places]).to(torch.int64)


def _give_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _batch_size: int,
) -> None:
    """The inverse of `slots_of`."""
    begin = 0
    places = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in places:
        req_to_token[row, start:end] = out_cache_loc[begin : begin + end - start]
        begin += end - start


def _move_nothing(
    _pointers: torch.Tensor, _strides: torch.Tensor, to: torch.Tensor, of: torch.Tensor, *_: Any
) -> None:
    """Accept only moves of slots to themselves, as in a warm-up: a chain's K and V are in place already."""
    if not torch.equal(to, of):
        raise ValueError("on a CPU, K and V are not moved")


def _assign_draft_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _topk: int,
    num_cols: int,
    **_positions: None,
) -> None:
    """`out_cache_loc` becomes the next slots after each request's tokens."""
    out_cache_loc.copy_(
        slots_of(
            req_pool_indices=req_pool_indices,
            req_to_token=req_to_token,
            start_offset=seq_lens,
            end_offset=seq_lens + num_cols,
        )
    )


def _build_chain(
    _parent_list: torch.Tensor,
    _top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    _tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    _steps: int,
    tokens: int,
    *_mask_mode: Any,
) -> None:
    """A tree of one branch for each request: its last token, and the drafts after it; `tokens` in all."""
    if topk != 1:
        raise ValueError("on a CPU drafts are a chain: use --speculative-eagle-topk 1")
    places = torch.arange(tokens)
    positions.copy_((seq_lens[:, None] + places).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.where(places < tokens - 1, places + 1, -1))
    retrieve_next_sibling.fill_(-1)


def _verify_chain(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    target_predict: torch.Tensor,
    **_tree: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A draft is accepted if it is what the model predicts after the one before it, which is accepted.

    candidates, target_predict: `[requests, tokens]`, the first of each request is no draft.
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    accepted = right.cumprod(dim=1).sum(dim=1)
    kept = torch.arange(accept_index.shape[1]) <= accepted[:, None]
    accept_index.copy_(torch.where(kept, retrieve_index[:, : kept.shape[1]], -1))
    predicts.copy_(target_predict.flatten())
    accept_token_num.copy_(accepted)
    return predicts, accept_index, accept_token_num


def _fill_bonus_tokens(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """The last that each request has accepted."""
    last = torch.arange(batch_size) * accept_stride + accept_lens - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])
