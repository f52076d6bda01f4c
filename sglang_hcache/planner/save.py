"""What is stored of each layer, so that copies and compute of a restoration end together (HCache's L_H + L_O = N).

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


@dataclass(frozen=True)
class SavePlan:
    layout: Layout
    seconds: float  # to restore the reference, or to recompute it if that is faster


def plan_save(costs: Costs, reference: Hit, *, layerwise: bool = True, splits: bool = True) -> SavePlan:
    """The layout that restores `reference` soonest; of equals, the one with the fewest bytes.

    `layerwise`: layers may be left to be recomputed from tokens. `splits`: the load plan will restore a part of the
    pages only where that is faster; then nothing at all is stored if recomputing is.
    """
    none, hidden, kv = _layouts(costs.layers, layerwise)
    pages = reference.pages
    tried = np.unique(np.linspace(1, pages, SPLITS).astype(int)) if splits else np.array([pages])
    tokens = (tried * reference.page_tokens).astype(float)
    counts = (none[:, None], hidden[:, None], kv[:, None])
    seconds = restore_s(costs, counts, reference, tokens[None, :]).min(axis=1)
    if splits:
        seconds = np.minimum(seconds, recompute_s(costs, reference))
    seconds[hidden + kv == 0] = recompute_s(costs, reference)
    stored = hidden * costs.hidden_bytes_per_token + kv * costs.kv_bytes_per_token
    best = int(np.lexsort((stored, seconds))[0])
    return SavePlan(Layout(int(none[best]), int(hidden[best]), int(kv[best])), float(seconds[best]))


def _layouts(layers: int, layerwise: bool) -> tuple[Any, Any, Any]:
    """Every count of layers stored as nothing, hidden states, KV."""
    none, hidden = np.meshgrid(np.arange(layers + 1 if layerwise else 1), np.arange(layers + 1), indexing="ij")
    fits = none + hidden <= layers
    none, hidden = none[fits], hidden[fits]
    if not layerwise:
        none, hidden = np.append(none, layers), np.append(hidden, 0)
    return none, hidden, layers - none - hidden
