"""A store whose disk can be held up, a clock that is set, and where pages lie on the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_hcache.queueing import load_planner, prefetch_queue, read_meter, request, step_waits, wait_plan
from sglang_hcache.storage import fetch
from sglang_hcache.storage import store as stores
from sglang_hcache.storage.fetch import Fetch
from sglang_hcache.storage.store import LocalStore
from sglang_hcache.storage.stripe import Place
from tests.prefetch import clients
from tests.prefetch.clients import PATIENCE_S
from tests.prefetch.conftest import be_patient
from tests.storage.pages import open_store, save

PAGE = 16  # tokens


def slots_of(*device_pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in device_pages])


def until(holds: Callable[[], object]) -> None:
    assert clients.until(holds), "it did not come about in time"


@pytest.fixture(autouse=True)
def answers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads wait until it is set."""
    gate, read = threading.Event(), Place.read
    monkeypatch.setattr(Place, "read", lambda place, key, out: gate.wait(PATIENCE_S) and read(place, key, out))
    return gate


@pytest.fixture
def store(tmp_path: Path, disk: threading.Event) -> Iterator[LocalStore]:
    """Ten pages on file, none in memory."""
    store = open_store(tmp_path)
    save(store, range(10))
    assert store.flush(PATIENCE_S)
    store.drop_host()
    yield store
    disk.set()
    store.check()
    store.close()


class Clock:
    """Stands still, but for what is added."""

    def __init__(self) -> None:
        self._now = 1000.0

    def monotonic(self) -> float:
        return self._now

    def time(self) -> float:
        return self._now + 4000

    def advance(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of the queue, of its planner, and of the store's times."""
    clock = Clock()
    for module in (prefetch_queue, request, wait_plan, step_waits, load_planner, read_meter, fetch):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(stores, "Fetch", lambda *what: replace(Fetch(*what), began_at=clock.monotonic()))
    return clock
