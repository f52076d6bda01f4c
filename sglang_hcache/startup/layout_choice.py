"""Choose what is stored of each layer: by flag, by size, or by what this machine restores fastest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from sglang_hcache.config import HCacheConfig, Representation
from sglang_hcache.model import Unsupported
from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout
from sglang_hcache.ranks import of_first_rank
from sglang_hcache.startup.kept import KeptLayout
from sglang_hcache.startup.representation import Formats, Stored

logger = logging.getLogger(__name__)

_LENGTHS = (1024, 4096, 16384)  # tokens that the plan is made for
_NEW_TOKENS = 64  # after them
_TOLERANCE = 0.02  # of the time to restore: not worth more bytes


def choose_by_flag(wanted: str, formats: Formats, layers: int, *, codec: str | None = None) -> Stored:
    """One representation for all layers: the one that is wanted, or the smaller one. Raises Unsupported.

    codec: which was asked for, and wants hidden states.
    """
    if wanted == Representation.HIDDEN and formats.hidden is None:
        if codec is not None:
            raise Unsupported(f"--hcache-codec {codec} needs hidden states: {formats.obstacle}; drop it")
        raise Unsupported(f"--hcache-representation hidden: {formats.obstacle}; use auto or kv")
    if wanted in (Representation.HIDDEN, Representation.KV):
        hidden, reason = wanted == Representation.HIDDEN, "as --hcache-representation says"
    else:
        hidden = formats.hidden_is_smaller
        sizes = f"{formats.kv_bytes_all_ranks} bytes a token and layer as K and V"
        reason = f"{sizes}, {formats.hidden.row_bytes} as hidden states" if formats.hidden else formats.obstacle
    return Stored(Layout(0, layers, 0) if hidden else Layout(0, 0, layers), formats, reason)


def choose_by_plan(
    config: HCacheConfig,
    formats: Formats,
    shape: ModelShape,
    machine: Machine,
    *,
    page_tokens: int,
    most_tokens: int,
    mixed: bool,
) -> Stored:
    """The layout that this machine's tiers restore fastest, over several lengths up to `most_tokens`.

    mixed: layers may have different representations. All ranks take the first rank's choice, by a collective.
    An earlier start's layout is kept unless another is much faster, since changing it invalidates its pages. If
    restoring does not pay at all, the smaller representation is stored: rates may prove better than measured.
    """
    costs = costs_of(shape, machine)
    hits = tuple(_references(machine, page_tokens, most_tokens))
    hidden_bytes = formats.hidden.row_bytes if formats.hidden else None
    kept = KeptLayout(
        Path(config.directories[0]), shape, page_tokens, hidden_bytes=hidden_bytes, kv_bytes=formats.kv.row_bytes
    )
    plan = plan_save(costs, *hits, layerwise=False, mixed=mixed, in_use=kept.read(), tolerance=_TOLERANCE)
    layout, reason = of_first_rank(plan.layout), "restored soonest on this machine"
    if layout.none:
        layout = choose_by_flag("auto", formats, shape.layers).layout
        reason = "the smaller one: restoring is not expected to pay on this machine"
    try:
        kept.write(layout)
    except OSError as error:
        logger.info("hcache: the layout cannot be kept (%s)", error)
    return Stored(layout, formats, reason)


def _references(machine: Machine, page_tokens: int, most_tokens: int) -> Iterator[Hit]:
    lengths = [tokens for tokens in _LENGTHS if tokens <= most_tokens] or [most_tokens]
    for tokens in lengths:
        pages = max(1, tokens // page_tokens)
        yield Hit(page_tokens, pages, new_tokens=_NEW_TOKENS)
        if machine.lower_tier.bytes_per_s:
            yield Hit(page_tokens, 0, pages, new_tokens=_NEW_TOKENS)
