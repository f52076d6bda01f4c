"""Layers with a sliding window, of which SGLang keeps K and V of a prefix's last tokens only, in slots of their own.

A page can then lack these layers, which does not matter inside a prefix: they are needed where a prefix ends, for the
length of the window. Whether a page has them stands in its first position, as K and V need no positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MISSING = -1

Positions = npt.NDArray[np.int32]  # [slots, page_tokens], of a store's pages


def least_slots(window_tokens: int, page_tokens: int, forward_tokens: int) -> int:
    """Slots of such layers with which SGLang admits every hit in the end; with fewer it may wait for ever.

    It reserves a window for what is restored (as for new tokens and their answer) beside the one that the prefix on
    the device keeps locked, and what a forward writes beyond a window (`SWAPrefillBudget.check_prefill`).
    """
    return 3 * window_tokens + page_tokens + max(0, forward_tokens - window_tokens) + 1


def note(positions: Positions, slot: int, *, windowed: bool) -> None:
    """That the page in a slot has its windowed layers, or not."""
    positions[slot] = 0 if windowed else _MISSING


def ends(positions: Positions, slots: Sequence[int], window_pages: int) -> list[int]:
    """Where a prefix of the pages in these slots may end: after so many, of which the last have windowed layers.

    Fewer pages than a window have all: what is before them is in the device pool.
    """
    there = positions[list(slots), 0] != _MISSING
    lengths = np.arange(1, len(there) + 1)
    last_missing = np.maximum.accumulate(np.where(there, 0, lengths)) if len(there) else lengths
    found: list[int] = lengths[lengths - last_missing >= np.minimum(lengths, window_pages)].tolist()
    return found


def up_to(found: list[int], pages: int) -> list[int]:
    """Of the ends that were found those up to so many pages, and the next one where it is nearer than the last."""
    count = bisect_right(found, pages)
    last = found[count - 1] if count else 0
    next_is_nearer = count < len(found) and found[count] - pages < pages - last
    return found[: count + next_is_nearer]
