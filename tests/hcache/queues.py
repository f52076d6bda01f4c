"""Prefetch queues, planners for them, and what these are told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.queueing.hold_rule import HoldRule, PrefetchPolicy
from sglang_hcache.queueing.load_planner import LoadPlanner, Planner, Prompt, RestoreAll
from sglang_hcache.queueing.prefetch_queue import PrefetchQueue
from sglang_hcache.storage.contract import ChunkStore
from tests.hcache.conftest import until
from tests.storage.pages import LAYOUT

TIMEOUT = HoldRule(PrefetchPolicy.TIMEOUT, base_s=0.3, per_ki_token_s=0.0)


def planner(ssd_bytes_per_s: float, bus_bytes_per_s: float = 1e10) -> LoadPlanner:
    shape = ModelShape("m", 4, 512, 8, 8, 64, 1408, 32000)
    machine = Machine("m", 1e11, 1e11, 1e11, 1e11, bus_bytes_per_s, ssd_bytes_per_s=ssd_bytes_per_s)
    return LoadPlanner(shape, machine, Layout(0, 4, 0), LAYOUT.page_tokens)


def queue_of(
    store: ChunkStore, rule: HoldRule, believes: Planner, *, one_rank: bool, **options: bool
) -> PrefetchQueue:
    return PrefetchQueue(store, rule, LAYOUT.page_tokens, one_rank=one_rank, planner=believes, **options)


def unplanned(store: ChunkStore, rule: HoldRule, *, one_rank: bool, **options: bool) -> PrefetchQueue:
    return queue_of(store, rule, RestoreAll(LAYOUT.page_tokens), one_rank=one_rank, **options)


def ask(requests: PrefetchQueue, rid: str, keys: Sequence[bytes], *, saved: threading.Event | None = None) -> None:
    """For a prompt that ends with a page behind these, which are its first."""
    requests.queued(rid, keys, Prompt(LAYOUT.page_tokens, 0), saved=saved)


def timed(believes: LoadPlanner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Pages and seconds that it is told of."""
    told = list[tuple[int, float]]()
    monkeypatch.setattr(believes, "read", lambda pages, seconds, **_: told.append((pages, seconds)))
    return told


def late_of(requests: PrefetchQueue) -> frozenset[str]:
    """Which it proposes to admit in any case."""
    proposed = requests.propose()
    return proposed.late if proposed is not None else frozenset()


def agree(ranks: Sequence[PrefetchQueue]) -> list[str]:
    """What ranks with the same requests admit in one step, the first of which proposes."""
    if (proposed := ranks[0].propose()) is None:
        return []
    pages, late = proposed.pages, proposed.late
    lacking = {rid for rank in ranks for rid in pages if not rank.has(rid, pages[rid], late=rid in late)}
    admitted = [rid for rid in pages if rid in late or rid not in lacking]
    for rank in ranks:
        rank.admit(admitted, late=late & lacking)
    return admitted


def wait_until_admissible(requests: PrefetchQueue, rid: str) -> None:
    until(lambda: rid in requests.admissible())
