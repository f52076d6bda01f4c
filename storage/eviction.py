"""Which pages to give up: pure functions on arrays, one element a page.

A page's own value is what restoring it saves, times how likely it is asked for, over the bytes it takes:

    tokens × (1 + (depth + 1/2) × tokens / ATTENTION_TOKENS) × (1 + log2(1 + hits)) / (age_s + FRESH_S) / record_bytes

where `depth` is how many pages come before it: at position ATTENTION_TOKENS attention costs as much prefill time as
everything else in the model. Hits count by their logarithm, so that a former workload's pages, asked for a hundred
times, soon make room for today's. A page is worth nothing without the pages before it, so

- its value is at least that of every page after it (the maximum over its subtree);
- of equal values the deeper goes first: the victims always include all pages after each of them;
- where its parent, or any page before that, is not stored, its own value is zero, once nobody has used it for
  ORPHAN_S: until then the parent may be on its way;
- a page that must stay, and so all pages before it, is worth more than any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ATTENTION_TOKENS = 32768
ORPHAN_S = 60
FRESH_S = 600.0  # two pages used within such a time of each other are about equally recent

AT_ONCE = 1 << 19  # pages, in a call of numpy's that keeps all other threads waiting

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]  # of pages and nodes: there are too many for larger ones
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

Keep = Callable[[], Iterable[bytes]]  # keys of pages that must stay: many, and asked for only where pages must go


@dataclass(frozen=True)
class Forest:
    """How pages hang together: pages 0..n-1, then the node before all first pages, then one for what is missing.

    `jumps[k][i]`: the node 2^k steps before node i.
    """

    jumps: tuple[Numbers, ...]
    depth: Numbers  # [n], pages before it that are stored
    orphan: Mask  # [n], some page before it is missing

    @classmethod
    def of(cls, group: Numbers, key: npt.NDArray[np.uint64], parent: npt.NDArray[np.uint64]) -> Forest:
        """From the starts of each page's key and of its parent's, 0 for none; one group is one tree or several.

        A parent that is named by a circle counts as missing. Two keys of a group that start alike are mixed up,
        which costs nothing but a bad choice.
        """
        n = len(key)
        before = _find(group, key, parent)
        before[parent == 0] = n
        before[before < 0] = n + 1
        jump = np.concatenate([before, np.array([n, n + 1], np.int32)])
        distance = np.concatenate([np.ones(n, np.int32), np.zeros(2, np.int32)])
        jumps = [jump]
        while (jump[:n] < n).any() and 1 << len(jumps) <= 2 * n:
            distance = distance + distance[jump]
            jump = jump[jump]
            jumps.append(jump)
        return cls(tuple(jumps), distance[:n] - 1, jump[:n] != n)

    def largest_below(self, value: Floats) -> Floats:
        """For each page the largest value of it and all pages after it."""
        n = len(self.depth)
        largest = np.concatenate([value, [0.0, 0.0]])
        for jump in self.jumps:
            former = largest.copy()
            for pages in (slice(start, min(start + AT_ONCE, n)) for start in range(0, n, AT_ONCE)):
                np.maximum.at(largest, jump[pages], former[pages])
        return largest[:n]

    def with_all_after(self, chosen: Mask) -> Mask:
        """The chosen pages and all pages after them."""
        marked = np.concatenate([chosen, [False, False]])
        for jump in self.jumps:
            marked = marked | marked[jump]
        return marked[: len(self.depth)]


def values(
    forest: Forest,
    *,
    tokens: Ints,
    record_bytes: Ints,
    hits: Ints,
    last_use: Ints,
    now: float,
    keep: Mask | None = None,
) -> Floats:
    """What each page is worth keeping for, as above; `last_use` and `now` in unix seconds. `keep`: must stay."""
    age = np.abs(now - last_use)  # a clock that went back is no reason to keep a page
    saves = tokens * (1 + (forest.depth + 0.5) * tokens / ATTENTION_TOKENS)
    own = saves * (1 + np.log2(1.0 + hits)) / (age + FRESH_S) / np.maximum(record_bytes, 1)
    own[forest.orphan & (age > ORPHAN_S)] = 0
    if keep is not None:
        own[keep] = np.inf
    return forest.largest_below(own)


def choose(forest: Forest, value: Floats, freed: Ints, wanted: int) -> Mask:
    """The pages of least value that together free `wanted` bytes, or all there are; closed under "comes after".

    `freed`: bytes that giving up each page returns, 0 where somebody else holds the file. A page that frees nothing
    is only chosen where one before it is.
    """
    order = np.lexsort((-forest.depth, value))
    count = int(np.searchsorted(np.cumsum(freed[order]), wanted)) + 1 if wanted > 0 else 0
    chosen = np.zeros(len(value), np.bool_)
    chosen[order[:count]] = True
    return forest.with_all_after(chosen & (freed > 0))


def _find(group: Numbers, key: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> Numbers:
    """For each page the page of its group with the wanted key; -1 where there is none."""
    found = np.full(len(key), -1, np.int32)
    for one in np.unique(group):
        members = np.flatnonzero(group == one)
        members = members[np.argsort(key[members], kind="stable")]
        keys = key[members]
        at = np.minimum(np.searchsorted(keys, wanted[members]), len(keys) - 1)
        hit = keys[at] == wanted[members]
        found[members[hit]] = members[at[hit]]
    return found
