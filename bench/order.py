"""The order in which waiting requests are served, as the server asks the prefetcher for them (docs/planner.md)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_hcache.planner.load import AGEING


@dataclass(frozen=True)
class Waiting:
    request: Any
    restore_s: float  # of the bus, as planned
    arrival_s: float  # on one clock


def in_order(waiting: Iterable[Waiting], *, ageing: float = AGEING) -> list[Waiting]:
    """Shortest first; each second of waiting counts as `ageing` seconds less to restore.

    So a request is only ever overtaken by those that come within `restore_s / ageing` after it.
    """
    if ageing <= 0:
        raise ValueError(f"ageing must be positive, not {ageing}: long restorations would starve")
    return sorted(waiting, key=lambda one: (one.restore_s + ageing * one.arrival_s, one.arrival_s))
