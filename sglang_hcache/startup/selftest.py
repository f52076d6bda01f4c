"""The self-test at start: what a forward wrote to the pool, restored from what capture saw, must be the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache.codec import Codec, DecodingProjector
from sglang_hcache.restoring.host_pages import Projector
from sglang_hcache.saving.capture import Capture
from sglang_hcache.startup.synthetic_forward import captured_prefill

_PROMPT_TOKENS = 130


@dataclass(frozen=True)
class SelfTestResult:
    worst: float  # largest difference in any layer's K or V, over its largest magnitude there
    tolerance: float
    not_encoded: float = 0.0  # share of the tokens that a codec has no room for; not compared
    shifted: bool = False  # positions are not those of the batch, from 0 on

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance and not self.shifted  # False for NaN

    def __str__(self) -> str:
        if self.shifted:
            return "the model shifts the positions it is given, which in a CUDA graph are not the batch's"
        return f"largest error {self.worst:.1e}, tolerated {self.tolerance:.1e}"


def run_self_test(
    runner: Any,
    capture: Capture,
    projector: Projector,
    pool: MHATokenToKVPool,
    page_size: int,
    codec: Codec | None = None,
) -> SelfTestResult:
    """Prefill a short random prompt, restore it by `projector` and compare K and V with the forward's own.

    codec: encodes the rows, and decodes them again, if it is lossless.

    Must run before any request, on all ranks alike; leaves the pools as it found them, empty. The tolerance is what
    two GEMMs of different shape may differ by: a few roundings to the model's dtype, one to the pool's if that is
    coarser, and the growth of float32 accumulation over `width` products.
    """
    with captured_prefill(runner, capture, page_size, _PROMPT_TOKENS) as captured:
        if captured.rows is None:
            return SelfTestResult(float("inf"), 0.0)
        rows, positions, slots = captured.rows, captured.positions, captured.slots
        if (positions != torch.arange(len(positions), device=positions.device)).any():
            return SelfTestResult(float("inf"), 0.0, shifted=True)
        tolerance = _tolerance(rows.dtype, pool.dtype, rows.shape[-1])
        if codec is None or not codec.lossless:
            return SelfTestResult(_worst(rows, positions, slots, projector, pool), tolerance)
        coded = torch.empty(*rows.shape[:2], codec.row_bytes, dtype=torch.uint8, device=rows.device)
        codec.encode(rows, coded)
        projector = DecodingProjector(projector, codec)
        kept = torch.from_numpy(codec.decodable(coded.cpu().numpy())).to(rows.device)
        not_encoded = 1 - float(kept.float().mean())
        worst = _worst(coded[:, kept], positions[kept], slots[kept], projector, pool) if kept.any() else math.inf
        return SelfTestResult(worst, tolerance, not_encoded)


def _worst(
    rows: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    projector: Projector,
    pool: MHATokenToKVPool,
) -> float:
    errors = []
    for layer in range(rows.shape[0]):
        buffers = (pool.k_buffer[layer], pool.v_buffer[layer])
        expected = [_values(buffer, slots, pool) for buffer in buffers]
        for buffer in buffers:
            buffer[slots] = torch.zeros((), dtype=buffer.dtype, device=buffer.device)
        projector.project(layer, rows[layer], positions, slots)
        for buffer, want in zip(buffers, expected, strict=True):
            errors.append((_values(buffer, slots, pool) - want).abs().max() / want.abs().max())
    return float(torch.stack(errors).max())


def _values(buffer: torch.Tensor, slots: torch.Tensor, pool: MHATokenToKVPool) -> torch.Tensor:
    """SGLang keeps values of eight bits as bytes."""
    return buffer[slots].view(pool.dtype).float()


def _tolerance(rows: torch.dtype, pool: torch.dtype, width: int) -> float:
    """A pool of eight bits rounds once more: the same value, a little off, may go to the next one up or down."""
    once_more = torch.finfo(pool).eps if pool.itemsize < rows.itemsize else 0.0
    return float(once_more + 4 * torch.finfo(rows).eps + 4 * width**0.5 * torch.finfo(torch.float32).eps)
