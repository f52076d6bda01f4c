"""The plugin with which `bench.ttft` measures a scheduler that waits for the disk."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType

import pytest

from bench.ttft import NO_PREFETCH
from sglang_hcache.queueing import prefetch_queue, step_waits
from sglang_hcache.queueing.hold_rule import HoldRule
from sglang_hcache.queueing.prefetch_queue import PrefetchQueue
from sglang_hcache.storage.store import LocalStore
from tests.hcache.queues import ask, unplanned
from tests.storage.pages import keys_of

LATE_S = 0.2  # longer than any wait of a step


def test_nothing_is_read_before_the_lookup_which_waits_for_all(
    store: LocalStore, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((PrefetchQueue, "queued"), (prefetch_queue, "LOOKUP_WAIT_S"), (step_waits, "STEP_WAIT_S")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be what it was, afterwards
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", ModuleType("scheduler"))
    monkeypatch.syspath_prepend(NO_PREFETCH)
    importlib.import_module("hcache_read_in_lookup").register()
    requests = unplanned(store, HoldRule(), one_rank=True)
    requests.new_step()
    ask(requests, "a", keys_of(range(10)))
    assert store.stats()["pages_reading"] == 0
    threading.Timer(LATE_S, disk.set).start()
    assert requests.ready("a", keys_of(range(10))) == 10
    requests.clear()
