"""Limits that no test is about are so long that a machine that is slow, or stands still, reaches none."""

import pytest

from sglang_hcache.storage import index_file
from sglang_hcache.storage import store as store_module


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "CLOSE_WAIT_S", 60.0)
    monkeypatch.setattr(index_file, "CHECK_TIMEOUT_S", 120.0)
