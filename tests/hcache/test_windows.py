from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget

from sglang_hcache import windows


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_a_prefix_may_end_where_a_window_before_it_is_there(there: list[bool], window_pages: int) -> None:
    positions = np.random.default_rng(0).integers(0, 9, (len(there) + 1, 4), np.int32)
    slots = [*range(len(there), 0, -1)]  # in no order
    for slot, windowed in zip(slots, there, strict=True):
        windows.note(positions, slot, windowed=windowed)
    expected = [end for end in range(1, len(there) + 1) if all(there[max(0, end - window_pages) : end])]
    assert windows.ends(positions, slots, window_pages) == expected


@pytest.mark.parametrize(
    ("window", "page", "forward"), [(256, 64, 256), (128, 64, 8192), (8192, 64, 2048), (64, 64, 64)]
)
def test_with_the_least_slots_sglang_admits_what_comes_behind_a_locked_prefix(
    window: int, page: int, forward: int
) -> None:
    def admits(slots: int, tokens: int) -> bool:
        allocator = SimpleNamespace(
            page_size=page,
            size_swa=slots,
            full_available_size=lambda: 1 << 40,
            swa_available_size=lambda: slots - window,
        )
        tree = SimpleNamespace(
            sliding_window_size=window, full_evictable_size=lambda: 0, swa_evictable_size=lambda: 0
        )
        fits, chunk = SWAPrefillBudget(allocator, tree).check_prefill(
            extend_input_len=tokens,
            total_tokens=tokens,
            max_new_tokens=1 << 20,
            input_tokens=tokens,
            swa_host_hit_length=window,
            chunk_limit=forward,
        )
        return fits and bool(chunk)

    least = windows.least_slots(window, page, forward)
    requests = range(page, 3 * forward + 1, page)
    assert all(admits(least, tokens) for tokens in requests)
    assert not all(admits(least - 1, tokens) for tokens in requests)


@pytest.mark.parametrize(
    ("pages", "expected"),
    [(9, [2, 3, 9]), (7, [2, 3, 9]), (6, [2, 3]), (3, [2, 3]), (2, [2]), (1, []), (12, [2, 3, 9])],
)
def test_a_plan_is_rounded_to_the_nearest_end(pages: int, expected: list[int]) -> None:
    assert windows.up_to([2, 3, 9], pages) == expected
    assert windows.up_to([], pages) == []
