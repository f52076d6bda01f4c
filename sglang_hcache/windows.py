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
    """The fewest slots of windowed layers with which SGLang admits every hit in the end, rather than wait for ever.

    The prefix on the device keeps one window locked; `SWAPrefillBudget.check_prefill` reserves another for what is
    restored, a third for new tokens and their answer, and what a forward writes beyond a window.
    """
    return 3 * window_tokens + page_tokens + max(0, forward_tokens - window_tokens) + 1


def note(positions: Positions, slot: int, *, windowed: bool) -> None:
    """That the page in a slot has its windowed layers, or not."""
    positions[slot] = 0 if windowed else _MISSING


def ends(positions: Positions, slots: Sequence[int], window_pages: int) -> list[int]:
    """After how many of these pages a prefix may end: wherever the last `window_pages` have their windowed layers.

    Where there are fewer pages than that, all of them must: the rest of the window is in the device pool.
    """
    there = positions[list(slots), 0] != _MISSING
    lengths = np.arange(1, len(there) + 1)
    last_missing = np.maximum.accumulate(np.where(there, 0, lengths)) if len(there) else lengths
    found: list[int] = lengths[lengths - last_missing >= np.minimum(lengths, window_pages)].tolist()
    return found


def up_to(found: list[int], pages: int) -> list[int]:
    """The ends up to `pages`, and the next one if that is nearer to `pages` than the last of them."""
    count = bisect_right(found, pages)
    last = found[count - 1] if count else 0
    next_is_nearer = count < len(found) and found[count] - pages < pages - last
    return found[: count + next_is_nearer]
