"""Which form and configuration of a kernel serves a shape: measured tables where there are some, else a rule."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "tuned.json"  # written by bench/kernels.py --tune


@dataclass(frozen=True)
class Shape:
    """What a projection's speed depends on, the number of tokens aside. All in elements."""

    width: int
    k_heads: int
    v_heads: int
    head_dim: int


@dataclass(frozen=True)
class Fused:
    """A configuration of a fused kernel: sizes of its tile, and how it is scheduled."""

    tokens: int
    depth: int  # of the tile along `width`
    warps: int
    stages: int
    heads: int = 1  # of a tile; more than one for `fused_gemm_tma`


SHAPES = {
    "Llama-2-7B": Shape(4096, 32, 32, 128),
    "Llama-2-13B": Shape(5120, 40, 40, 128),
    "OPT-30B": Shape(7168, 56, 56, 128),
    "Qwen1.5-14B": Shape(5120, 40, 40, 128),
    "Gemma-7B": Shape(3072, 16, 16, 256),
    "OLMo-2-7B": Shape(4096, 32, 32, 128),
    "Phi-3-mini": Shape(3072, 32, 32, 96),
}

# By the smallest power of two that holds half a head; all compile without spills for sm_80, sm_90 and sm_100.
_CANDIDATES: dict[int, tuple[Fused, ...]] = {
    32: (Fused(128, 64, 4, 3), Fused(64, 64, 4, 4)),
    64: (Fused(128, 64, 8, 3), Fused(128, 32, 8, 4), Fused(64, 64, 4, 3)),
    128: (Fused(64, 32, 8, 4), Fused(64, 64, 8, 3)),
}

# For two heads of 128 at once, by capability: tiles of 128 × 256, as cuBLAS has.
SEVERAL_HEADS = {90: Fused(128, 64, 8, 4, heads=2), 100: Fused(128, 64, 16, 4, heads=2)}


def candidates(head_dim: int, capability: int) -> tuple[Fused, ...]:
    """Configurations worth trying for heads of this size on such a GPU; none where no fused kernel fits."""
    found = next((found for pairs, found in sorted(_CANDIDATES.items()) if 2 * pairs >= head_dim), ())
    several = SEVERAL_HEADS.get(capability) if head_dim == 128 else None
    return found if several is None else (several, *found)


def choose(shape: Shape, tokens: int, capability: int) -> Fused | None:
    """The fastest form that was measured for this shape on such a GPU; None for cuBLAS and a second kernel.

    capability: 90 for sm_90. A shape that nobody measured gets cuBLAS, whose speed does not depend on our tables.
    """
    measured = _table().get((capability, shape), ())
    return next((fused for upto, fused in measured if tokens <= upto), None)


@functools.cache
def _table() -> dict[tuple[int, Shape], list[tuple[int, Fused | None]]]:
    """For each GPU and shape, the fastest forms, each with the number of tokens up to which it serves."""
    if not TABLE.exists():
        return {}
    return {
        (entry["capability"], Shape(**entry["shape"])): [
            (row["tokens"], Fused(**row["fused"]) if row["fused"] else None) for row in entry["rows"]
        ]
        for entry in json.loads(TABLE.read_text())["entries"]
    }
