from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    ("pages", "expected"),
    [(9, [2, 3, 9]), (7, [2, 3, 9]), (6, [2, 3]), (3, [2, 3]), (2, [2]), (1, []), (12, [2, 3, 9])],
)
def test_a_plan_is_rounded_to_the_nearest_end(pages: int, expected: list[int]) -> None:
    assert windows.up_to([2, 3, 9], pages) == expected
    assert windows.up_to([], pages) == []
