"""What the self-test compares: values, also where the pool keeps them as bytes. Real servers run the rest of it."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache.startup.selftest import _tolerance, _worst

PAGE, TOKENS, WIDTH = 16, 40, 256


class Projector:
    """Writes K and V, times a factor."""

    def __init__(self, pool: MHATokenToKVPool, factor: float, noise: float) -> None:
        self._pool, self._factor, self._noise = pool, factor, noise
        self.made = [[torch.randn(TOKENS, 2, 8) for _ in range(2)] for _ in range(pool.layer_num)]

    def project(self, layer: int, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        buffers = self._pool.k_buffer[layer], self._pool.v_buffer[layer]
        for buffer, made in zip(buffers, self.made[layer], strict=True):
            values = made * self._factor * (1 + self._noise * torch.randn_like(made))
            buffer[slots] = values.to(torch.bfloat16).to(self._pool.dtype).view(buffer.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("factor", "passes"),
    [(1.0, True), (-1.0, False), (1.6, False), (0.6, False), (0.0, False), (float("nan"), False)],
)
def test_equal_values_pass_and_wrong_scales_do_not(dtype: torch.dtype, factor: float, passes: bool) -> None:
    """And nothing fails because zeros differ in their sign, or values of eight bits in their last place."""
    pool = MHATokenToKVPool(8 * PAGE, PAGE, dtype, 2, 8, 3, "cpu", enable_memory_saver=False)
    slots, rows = torch.randperm(TOKENS) + PAGE, torch.zeros(pool.layer_num, TOKENS, WIDTH, dtype=torch.bfloat16)
    projector = Projector(pool, 1.0, noise=2e-3)
    for layer in range(pool.layer_num):
        projector.project(layer, rows[layer], slots, slots)
        pool.k_buffer[layer][slots[0]] = 0
    projector._factor = factor
    for layer in range(pool.layer_num):
        projector.made[layer][0][0] = -0.0
    worst = _worst(rows, slots, slots, projector, pool)
    assert (worst <= _tolerance(rows.dtype, pool.dtype, WIDTH)) is passes
