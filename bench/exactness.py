"""Projections of random weights, and how exact the K and V are that a form of `project_kv` makes with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.gpu import DEVICE, noise
from bench.toy_model import forward_kv
from sglang_hcache.triton_kernels.project_kv import project_kv
from sglang_hcache.triton_kernels.projection import Projection, project_kv_reference
from sglang_hcache.triton_kernels.tuning import Fused, Shape

MOST_ERROR = 1.5  # of K and V, over that of a forward's own; and over that of torch's product, and a rounding more
ROUNDING = 2.0**-8  # of bf16, at worst
POSITIONS = 32768
CHECKED_TOKENS = 1100  # more than a group of any form's tiles, the last of which is not full


def projection_of(shape: Shape, dtype: torch.dtype) -> Projection:
    """Random, with RoPE: activations of unit variance give K and V of unit variance."""
    turns = torch.arange(POSITIONS)[:, None] / 10000 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    columns = (shape.k_heads + shape.v_heads) * shape.head_dim
    return Projection(
        weight=noise(columns, shape.width, dtype=dtype, scale=shape.width**-0.5),
        k_heads=shape.k_heads,
        k_dim=shape.head_dim,
        v_heads=shape.v_heads,
        v_dim=shape.head_dim,
        cos_sin=torch.cat((turns.cos(), turns.sin()), dim=-1).to(DEVICE),
    )


def projections_in_turns(shape: Shape, dtype: torch.dtype) -> Iterator[Projection]:
    """As the layers of a restore: the weight of one alone would stay in the L2 cache."""
    return itertools.cycle([projection_of(shape, dtype) for _ in range(3)])


def pool_of(shape: Shape, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (
        torch.full((slots, heads, shape.head_dim), torch.nan, dtype=dtype, device=DEVICE)
        for heads in (shape.k_heads, shape.v_heads)
    )
    return keys, values


def misplaced(buffer: torch.Tensor, slots: torch.Tensor) -> tuple[int, int]:
    """Elements of these slots that were not written, and of others that were, of a buffer that was full of NaNs."""
    poisoned = buffer.isnan().flatten(1)
    others = torch.ones(len(buffer), dtype=torch.bool, device=buffer.device)
    others[slots] = False
    return int(poisoned[~others].sum()), int((~poisoned[others]).sum())


def errors(
    rows: torch.Tensor, projection: Projection, positions: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, float]:
    """Norm of the error over the norm, of K and V and of what a forward would have written; `ratio`, the worst."""
    n = len(rows)
    exact = [torch.empty(part.shape, dtype=torch.float64, device=DEVICE) for part in (key, value)]
    project_kv_reference(rows, projection, positions, torch.arange(n, device=DEVICE), exact[0], exact[1])
    report = {}
    for name, pair in {"": (key, value), "forward_": forward_kv(rows, projection, positions)}.items():
        for side, got, want in zip("kv", pair, exact, strict=True):
            report[name + side] = _error(got, want)
    return report | {"ratio": float(np.max([report[side] / report[f"forward_{side}"] for side in "kv"]))}  # or NaN


def check(shape: Shape, form: Fused | None, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """As `errors`, of torch's product alone, too, and how many elements were not written, or astray."""
    projection, rows = projection_of(shape, dtype), noise(tokens, shape.width, dtype=dtype)
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
    positions = torch.randint(0, POSITIONS, (tokens,), device=DEVICE)
    pool = pool_of(shape, 2 * tokens, dtype)
    project_kv(rows, projection, positions, slots, *pool, fused=form)
    report = errors(rows, projection, positions, pool[0][slots], pool[1][slots])
    report["product"] = _error(rows @ projection.weight.T, rows.double() @ projection.weight.double().T)
    for side, part in zip("kv", pool, strict=True):
        report[f"{side}_unwritten"], report[f"{side}_strayed"] = misplaced(part, slots)
    return report | {kind: report[f"k_{kind}"] + report[f"v_{kind}"] for kind in ("unwritten", "strayed")}


def is_right(report: dict[str, Any]) -> bool:
    """By what `check` says, if it says anything."""
    if "ratio" not in report:
        return False
    most = MOST_ERROR * report["product"] + ROUNDING
    exact = report["ratio"] <= MOST_ERROR and report["k"] <= most and report["v"] <= most
    return bool(exact and not report["unwritten"] and not report["strayed"])


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
