from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_hcache.startup import synthetic_forward
from sglang_hcache.startup.synthetic_forward import most_at_once, most_tokens

PAGE, SLOTS, WINDOW_SLOTS = 16, 512, 128


@pytest.mark.parametrize(
    ("chunk", "most"), [(64, 64), (4096, SLOTS - 2 * PAGE), (None, 300), (-1, 300)], ids=["chunk", "pool", "", "none"]
)
def test_no_forward_is_larger_than_those_of_the_server(
    chunk: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = SimpleNamespace(chunked_prefill_size=chunk, max_prefill_tokens=300)
    monkeypatch.setattr(synthetic_forward, "get_schedule", lambda: schedule)
    runner = SimpleNamespace(
        max_total_num_tokens=SLOTS,
        token_to_kv_pool_allocator=SimpleNamespace(size=SLOTS),
        model_config=SimpleNamespace(context_len=4096),
    )
    assert most_at_once(runner, PAGE) == most


def test_a_prompt_is_no_longer_than_the_smallest_pool() -> None:
    plain = PagedTokenToKVPoolAllocator(SLOTS, PAGE, torch.float32, "cpu", None, False)
    pool = SWAKVPool(
        SLOTS, WINDOW_SLOTS, PAGE, torch.float32, 2, 4,
        swa_attention_layer_ids=[0], full_attention_layer_ids=[1], device="cpu",
    )  # fmt: skip
    windowed = SWATokenToKVPoolAllocator(SLOTS, WINDOW_SLOTS, PAGE, torch.float32, "cpu", pool, False)
    found = [
        most_tokens(
            SimpleNamespace(
                max_total_num_tokens=SLOTS,
                token_to_kv_pool_allocator=allocator,
                model_config=SimpleNamespace(context_len=context),
            ),
            PAGE,
        )
        for allocator, context in ((plain, 4096), (windowed, 4096), (plain, 100))
    ]
    assert found == [SLOTS - 2 * PAGE, WINDOW_SLOTS - 2 * PAGE, 98]
