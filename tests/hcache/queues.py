"""Prefetch queues, planners for them, and what these are told."""

from __future__ import annotations

import pytest

from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.queueing.load_planner import LoadPlanner
from sglang_hcache.queueing.prefetch_queue import HoldRule, PrefetchPolicy, PrefetchQueue
from tests.hcache.conftest import until
from tests.storage.pages import LAYOUT

TIMEOUT = HoldRule(PrefetchPolicy.TIMEOUT, base_s=0.3, per_ki_token_s=0.0)


def planner(ssd_bytes_per_s: float, bus_bytes_per_s: float = 1e10) -> LoadPlanner:
    shape = ModelShape("m", 4, 512, 8, 8, 64, 1408, 32000)
    machine = Machine("m", 1e11, 1e11, 1e11, 1e11, bus_bytes_per_s, ssd_bytes_per_s=ssd_bytes_per_s)
    return LoadPlanner(shape, machine, Layout(0, 4, 0), LAYOUT.page_tokens)


def timed(believes: LoadPlanner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Pages and seconds that it is told of."""
    told = list[tuple[int, float]]()
    monkeypatch.setattr(believes, "read", lambda pages, seconds, **_: told.append((pages, seconds)))
    return told


def wait_until_admissible(requests: PrefetchQueue, rid: str) -> None:
    until(lambda: rid in requests.admissible())
