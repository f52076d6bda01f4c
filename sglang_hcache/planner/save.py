"""Plans what to store of each layer, so that a restoration's copies and compute end together (HCache: L_H + L_O = N).

Where compute is fast, the first layers are recomputed from tokens while the others' hidden states come in; where
I/O is fast, the last layers are stored as KV. Where KV is smaller than hidden states, no layer is stored as those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_hcache.planner.cost import Costs
from sglang_hcache.planner.timeline import Hit, Layout, recompute_s, restore_s

SPLITS = 32  # parts of the reference hit that are tried
WORTH_A_CHANGE = 0.1  # of the time to restore


@dataclass(frozen=True)
class SavePlan:
    layout: Layout
    seconds: float  # to restore all references one by one, or to recompute those for which that is faster
    slowdown: float  # mean of the references' times over those of the layouts made for each alone


def plan_save(
    costs: Costs,
    *references: Hit,
    layerwise: bool = True,
    mixed: bool = True,
    hidden: bool = True,
    splits: bool = True,
    in_use: Layout | None = None,
    tolerance: float = 0.0,
) -> SavePlan:
    """The layout that restores `references` with the least slowdown; of equal ones, that with the fewest bytes.

    `layerwise`: layers may be left to be recomputed from tokens. `mixed`: some may be stored as hidden states and
    others as KV. `hidden`: any may be stored as hidden states. `splits`: the load plan will restore a part of the
    pages only where that is faster; then nothing at all is stored if recomputing is. `tolerance`: layouts whose
    slowdown exceeds the least by up to this fraction count as equal. `in_use`: the layout of pages stored earlier,
    which any other would make useless: it stays unless it is slower by more than `WORTH_A_CHANGE`.
    """
    counts = _layouts(costs.layers, layerwise, mixed, hidden)
    seconds = np.array([_seconds(costs, counts, reference, splits) for reference in references])
    slowdown = (seconds / seconds.min(axis=1, keepdims=True)).mean(axis=0)
    none, as_hidden, kv = counts
    stored = as_hidden * costs.hidden_bytes_per_token + kv * costs.kv_bytes_per_token
    equal = slowdown <= slowdown.min() * (1 + tolerance)
    best = int(np.lexsort((slowdown, np.where(equal, stored, np.inf), ~equal))[0])
    if in_use is not None:
        used = np.flatnonzero((none == in_use.none) & (as_hidden == in_use.hidden) & (kv == in_use.kv))
        best = next((int(i) for i in used if slowdown[i] <= slowdown.min() * (1 + WORTH_A_CHANGE)), best)
    layout = Layout(int(none[best]), int(as_hidden[best]), int(kv[best]))
    return SavePlan(layout, float(seconds[:, best].sum()), float(slowdown[best]))


def _seconds(costs: Costs, counts: tuple[Any, Any, Any], reference: Hit, splits: bool) -> Any:
    """Seconds to the reference's first token, for each layout."""
    pages = reference.pages
    tried = np.unique(np.linspace(1, pages, SPLITS).astype(int)) if splits else np.array([pages])
    tokens = (tried * reference.page_tokens).astype(float)
    none, hidden, kv = (count[:, None] for count in counts)
    seconds = restore_s(costs, (none, hidden, kv), reference, tokens[None, :]).min(axis=1)
    alone_s = recompute_s(costs, reference)
    if splits:
        seconds = np.minimum(seconds, alone_s)
    seconds[counts[0] == costs.layers] = alone_s
    return seconds


def _layouts(layers: int, layerwise: bool, mixed: bool, hidden: bool) -> tuple[Any, Any, Any]:
    """Every count of layers stored as nothing, hidden states, KV."""
    most_none, most_hidden = layers if layerwise else 0, layers if hidden else 0
    none, as_hidden = np.meshgrid(np.arange(most_none + 1), np.arange(most_hidden + 1), indexing="ij")
    stored = layers - none
    fits = (as_hidden <= stored) & (mixed | (as_hidden == 0) | (as_hidden == stored))
    none, as_hidden = none[fits], as_hidden[fits]
    if not layerwise:
        none, as_hidden = np.append(none, layers), np.append(as_hidden, 0)
    return none, as_hidden, layers - none - as_hidden
