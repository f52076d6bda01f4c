"""A store whose disk can be held up, and where pages lie on the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_hcache.storage.store import LocalStore
from sglang_hcache.storage.stripe import Place
from tests.storage.pages import open_store, save

PAGE = 16  # tokens


def slots_of(*device_pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in device_pages])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reads wait until it is set."""
    gate, read = threading.Event(), Place.read
    monkeypatch.setattr(Place, "read", lambda place, key, out: gate.wait(30) and read(place, key, out))
    return gate


@pytest.fixture
def store(tmp_path: Path, disk: threading.Event) -> Iterator[LocalStore]:
    """Ten pages on file, none in memory."""
    store = open_store(tmp_path)
    save(store, range(10))
    assert store.flush(30)
    store.drop_host()
    yield store
    disk.set()
    store.check()
    store.close()
