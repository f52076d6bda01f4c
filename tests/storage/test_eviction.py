from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_hcache.storage.eviction import Forest, choose, values

NOW = 2_000_000_000.0


def forest_of(parents: list[int | None], group: list[int] | None = None) -> Forest:
    """Page i has key i + 1; None: its parent is not stored; -1: it is a first page."""
    n = len(parents)
    key = np.arange(1, n + 1, dtype=np.uint64)
    parent = np.array([10**9 + i if p is None else p + 1 for i, p in enumerate(parents)], np.uint64)
    return Forest.of(np.array(group or [0] * n, np.int64), key, parent)


@st.composite
def forests(draw: st.DrawFn) -> list[int | None]:
    n = draw(st.integers(1, 60))
    shuffled = draw(st.permutations(range(n)))
    parents: list[int | None] = [None] * n
    for i in range(n):
        at = draw(st.one_of(st.none(), st.integers(-1, i - 1)))
        parents[shuffled[i]] = shuffled[at] if at is not None and at >= 0 else at
    return parents


def path(parents: list[int | None], page: int) -> list[int | None]:
    """The pages before it, the nearest first, with -1 or None at the end."""
    found: list[int | None] = [parents[page]]
    while (last := found[-1]) is not None and last >= 0:
        found.append(parents[last])
    return found


@settings(max_examples=200, deadline=None)
@given(st.data(), forests())
def test_victims_take_all_pages_after_them_along_and_free_what_is_asked(
    data: st.DataObject, parents: list[int | None]
) -> None:
    n = len(parents)
    forest = forest_of(parents)

    def draw(most: int) -> np.ndarray:
        return np.array(data.draw(st.lists(st.integers(0, most), min_size=n, max_size=n)), np.int64)

    record_bytes = draw(4) + 1
    value = values(
        forest,
        tokens=draw(1) + 16,
        record_bytes=record_bytes,
        hits=draw(3),
        last_use=int(NOW) - draw(3) * 1000,
        now=NOW,
    )
    freed = record_bytes * np.minimum(draw(3), 1)
    wanted = data.draw(st.integers(0, int(freed.sum()) + 5))
    victims = choose(forest, value, freed, wanted)

    for page in range(n):
        before = path(parents, page)
        assert forest.depth[page] == len(before) - 1
        assert forest.orphan[page] == (before[-1] is None)
        if victims[page]:
            continue
        for ancestor in before:
            assert ancestor is None or ancestor < 0 or not victims[ancestor], "a kept page lost one before it"
    assert freed[victims].sum() >= min(wanted, freed.sum())
    if not wanted:
        assert not victims.any()
    useful = victims & (freed > 0)
    for page in np.flatnonzero(victims & (freed == 0)):
        assert any(p is not None and p >= 0 and useful[p] for p in path(parents, int(page))), "given up for nothing"


def test_a_circle_of_parents_counts_as_orphaned() -> None:
    forest = forest_of([1, 2, 0, -1, 3])
    assert forest.orphan.tolist() == [True, True, True, False, False]


def test_a_parent_of_another_model_is_no_parent() -> None:
    forest = forest_of([-1, 0, 0], group=[0, 0, 1])
    assert forest.orphan.tolist() == [False, False, True]


def order_of(**columns: list[int]) -> list[int]:
    n = len(next(iter(columns.values())))
    forest = forest_of(columns.pop("parents", [-1] * n))  # type: ignore[arg-type]
    defaults = {"tokens": [64] * n, "record_bytes": [4096] * n, "hits": [0] * n, "last_use": [int(NOW)] * n}
    arrays = {name: np.array(column) for name, column in (defaults | columns).items()}
    value = values(forest, now=NOW, **arrays)
    return [int(page) for page in np.lexsort((-forest.depth, value))]


@pytest.mark.parametrize(
    ("columns", "order"),
    [
        ({"last_use": [int(NOW) - 100, int(NOW) - 9000, int(NOW)]}, [1, 0, 2]),
        ({"hits": [3, 0, 1]}, [1, 2, 0]),
        ({"record_bytes": [4096, 16384, 8192]}, [1, 2, 0]),
        ({"tokens": [16, 64, 32]}, [0, 2, 1]),
        ({"hits": [0, 1], "last_use": [int(NOW), int(NOW) - 86400]}, [1, 0]),
        ({"parents": [-1, 0, 1], "hits": [0, 0, 9]}, [2, 1, 0]),
        ({"parents": [-1, None], "hits": [0, 99], "last_use": [int(NOW) - 100] * 2}, [1, 0]),
    ],
    ids=["the oldest", "the rarest", "the largest", "the cheapest", "old fame", "the last of a prefix", "an orphan"],
)
def test_the_least_valuable_goes_first(columns: dict[str, list[int]], order: list[int]) -> None:
    assert order_of(**columns) == order


def test_yesterdays_favourites_make_room_for_what_is_asked_for_now() -> None:
    """A hundred hits two hours ago against two of the last minutes; but not against none."""
    forest = Forest.of(np.zeros(3, np.int32), np.array([1, 2, 3], np.uint64), np.zeros(3, np.uint64))
    same = np.full(3, 64)
    old, new, once = values(
        forest,
        tokens=same,
        record_bytes=same,
        hits=np.array([100, 2, 0]),
        last_use=np.array([0, 7200 - 300, 7200 - 3600]),
        now=7200.0,
    )
    assert new > old > once


def test_a_clock_that_went_back_keeps_no_page_for_ever() -> None:
    forest = Forest.of(np.zeros(2, np.int32), np.array([1, 2], np.uint64), np.zeros(2, np.uint64))
    same = np.full(2, 64)
    ahead, fresh = values(
        forest, tokens=same, record_bytes=same, hits=same * 0, last_use=np.array([10**6, 0]), now=60.0
    )
    assert fresh > ahead
