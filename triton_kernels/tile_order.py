"""In which order programs take the tiles of a product."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8  # blocks of tokens that share a pass over the weight, to find it in L2


@triton.jit
def tile_of_program(n, TOKENS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Block of tokens, block of columns: GROUP blocks of tokens take the same columns before the next ones."""
    blocks = tl.cdiv(n, TOKENS)
    group = tl.program_id(0) // (GROUP * COLUMN_BLOCKS)
    in_group = tl.minimum(blocks - group * GROUP, GROUP)
    in_pass = tl.program_id(0) % (GROUP * COLUMN_BLOCKS)
    return group * GROUP + in_pass % in_group, in_pass // in_group
