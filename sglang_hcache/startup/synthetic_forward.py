"""Forwards of random tokens before the server takes requests, for the self-test, codecs and calibration."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.dp_attn import prepare_mlp_sync_batch_raw
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_schedule
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.utils import require_mlp_sync, require_mlp_tp_gather

from sglang_hcache.device.streams import Event, current_stream
from sglang_hcache.saving.capture import Capture


def most_tokens(runner: Any, page_size: int) -> int:
    """The longest prompt that the model takes, and that all of its layers' pools hold."""
    slots = min(runner.max_total_num_tokens, runner.token_to_kv_pool_allocator.size)  # one for windows may be smaller
    return int(min(slots - 2 * page_size, runner.model_config.context_len - 2))


def most_at_once(runner: Any, page_size: int) -> int:
    """Of such a prompt, what SGLang prefills in one forward: some of its buffers hold no more."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size or 0
    return int(min(most_tokens(runner, page_size), chunk if chunk > 0 else schedule.max_prefill_tokens))


@contextlib.contextmanager
def leaving_no_trace(runner: Any) -> Iterator[None]:
    """Leaves the pools as it found them, empty."""
    try:
        yield
    finally:
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        runner.shared_read_done_event = None  # else a request's first forward would take it for its own


class Captured:
    """A capture sink that keeps what one forward hands over."""

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        self.slots, self.positions, self.rows = slots.clone(), positions.clone(), rows.clone()
        return current_stream(str(rows.device)).record()

    def drop(self, slots: torch.Tensor) -> None:
        self.rows = None


@contextlib.contextmanager
def captured_prefill(runner: Any, capture: Capture, page_size: int, tokens: int) -> Iterator[Captured]:
    """What `capture` sees of a forward of random tokens, while the pools are as that has left them.

    As `prefill_random_prompt`, of at most so many tokens. Its `rows` are None if the forward was not captured.
    """
    capture.sink = captured = Captured()
    try:
        with leaving_no_trace(runner):
            prefill_random_prompt(runner, page_size, min(tokens, most_at_once(runner, page_size)))
            yield captured
    finally:
        capture.sink = None


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


@torch.no_grad()
def prefill_random_prompt(runner: Any, page_size: int, tokens: int) -> None:
    """One forward of `tokens` random tokens. Must run on all ranks alike, `leaving_no_trace`."""
    vocabulary = runner.model_config.vocab_size
    prompt = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    request = Req(
        rid="hcache-synthetic",
        origin_input_text="",
        origin_input_ids=array("q", prompt),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = len(prompt)
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
    if require_mlp_sync():
        _tell_other_ranks(batch, runner)
    runner.forward(ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False))


def _tell_other_ranks(batch: ScheduleBatch, runner: Any) -> None:
    """With data-parallel attention each rank has a batch of its own, and all know the sizes of all."""
    prepare_mlp_sync_batch_raw(
        batch,
        model_runner=runner,
        get_idle_batch=lambda: batch,
        disable_cuda_graph=True,
        require_mlp_tp_gather=require_mlp_tp_gather(),
        disable_overlap_schedule=get_schedule().disable_overlap_schedule,
        offload_tags=set(),
    )
