"""Servers are asked in an order that favours none."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from bench.harness import in_turn


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd", "abcdef"])
def test_each_comes_first_once_and_after_each_other_as_often(names: str) -> None:
    rounds = [in_turn(names, turn) for turn in range(len(names))]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(names)
    if len(names) % 2 == 0:
        follows = Counter(pair for order in rounds for pair in pairwise(order))
        assert follows == {(one, other): 1 for one in names for other in names if one != other}
