"""The self-test at start: what a forward wrote to the pool, restored from what capture saw, must be the same."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_hcache.capture import Capture
from sglang_hcache.lanes import Mark, current_lane
from sglang_hcache.restore import Projector

_PROMPT_TOKENS = 130


@dataclass(frozen=True)
class SelfTestResult:
    """worst: the largest difference in any layer's K or V, over its largest magnitude there."""

    worst: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance  # False for NaN


class _Recorder:
    """A capture sink that keeps what one forward handed over."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Mark:
        self.slots, self.positions, self.rows = slots.clone(), positions.clone(), rows.clone()
        return current_lane(str(rows.device)).mark()

    def drop(self, slots: torch.Tensor) -> None:
        self.rows = None


class _NoPrefixCache(SimpleNamespace):
    def supports_swa(self) -> bool:
        return False

    def supports_mamba(self) -> bool:
        return False

    def supports_prefix_sharing(self) -> bool:
        return True

    def evict(self, _params: object) -> None:
        pass

    def maybe_hand_to_session(self, _req: object) -> None:
        pass


def run_self_test(
    runner: Any, capture: Capture, projector: Projector, pool: MHATokenToKVPool, page_size: int
) -> SelfTestResult:
    """Prefill a short random prompt, restore it by `projector` and compare K and V with the forward's own.

    Must run before any request, on all ranks alike; leaves the pools as it found them, empty. The tolerance is
    what two GEMMs of different shape may differ by: a few roundings to the pool's dtype, and the growth of
    float32 accumulation over `width` products.
    """
    recorder = _Recorder()
    capture.sink = recorder
    try:
        _prefill_random_prompt(runner, page_size)
        if recorder.rows is None:
            return SelfTestResult(float("inf"), 0.0)
        return _compare(recorder.rows, recorder.positions, recorder.slots, projector, pool)
    finally:
        capture.sink = None
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()


def _compare(
    rows: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    projector: Projector,
    pool: MHATokenToKVPool,
) -> SelfTestResult:
    errors = []
    for layer in range(rows.shape[0]):
        buffers = (pool.k_buffer[layer], pool.v_buffer[layer])
        expected = [buffer[slots].float() for buffer in buffers]
        for buffer in buffers:
            buffer[slots] = torch.zeros((), dtype=buffer.dtype, device=buffer.device)
        projector.project(layer, rows[layer], positions, slots)
        for buffer, want in zip(buffers, expected, strict=True):
            errors.append((buffer[slots].float() - want).abs().max() / want.abs().max())
    width = rows.shape[-1]
    tolerance = 4 * torch.finfo(rows.dtype).eps + 4 * width**0.5 * torch.finfo(torch.float32).eps
    return SelfTestResult(float(torch.stack(errors).max()), tolerance)


@torch.no_grad()
def _prefill_random_prompt(runner: Any, page_size: int) -> None:
    vocabulary = runner.model_config.vocab_size
    room = min(_PROMPT_TOKENS, runner.max_total_num_tokens - 2 * page_size, runner.model_config.context_len - 2)
    tokens = torch.randint(vocabulary, (room,), generator=torch.Generator().manual_seed(0)).tolist()
    request = Req(
        rid="hcache-self-test",
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = len(tokens)
    batch = ScheduleBatch.init_new(
        reqs=[request],
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=_NoPrefixCache(
            page_size=page_size,
            device=runner.device,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        ),
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    runner.forward(ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False))
