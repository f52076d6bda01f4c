"""Memory that CUDA takes, and memory that it does not: with a fake of CUDA's runtime."""

from __future__ import annotations

import pytest
import torch

from sglang_hcache.device import pinning
from sglang_hcache.device.pinning import PinnedMemory


class Runtime:
    """Like CUDA, it keeps a failed call's error for the next launch."""

    def __init__(self, limit: int, total: int = 10**9) -> None:
        self._limit = limit
        self._left = total
        self.error = 0
        self.keeps: set[int] = set()  # addresses that it does not let go
        self.registered: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self._limit or size > self._left:
            self.error = 2
            return self.error
        self._left -= size
        self.registered.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        if address in self.keeps:
            self.error = 1
            return self.error
        self.registered.remove(address)
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return "out of memory"

    def launch(self, *args: object, **kwargs: object) -> None:
        error, self.error = self.error, 0
        if error:
            raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(limit=100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", runtime.launch)
    return runtime


def test_memory_is_registered_until_it_is_released(runtime: Runtime) -> None:
    tensor = torch.zeros(100, dtype=torch.uint8)
    memory = PinnedMemory(tensor)
    assert memory.pinned
    assert runtime.registered == [tensor.data_ptr()]
    memory.release()
    memory.release()
    assert not runtime.registered


def test_a_part_that_stays_registered_is_a_warning_and_no_error_later_on(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning, "_MOST_AT_ONCE", 100)
    rows = torch.zeros(7, 30, dtype=torch.uint8)
    memory = PinnedMemory(rows)
    runtime.keeps = {rows[3].data_ptr()}
    memory.release()
    assert runtime.registered == [rows[3].data_ptr()], "all others are released"
    assert "keeps a part of host memory registered" in caplog.text
    runtime.launch()


def test_a_refusal_is_one_warning_and_no_error_later_on(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    memory = PinnedMemory(torch.zeros(101, dtype=torch.uint8))
    assert not memory.pinned
    assert "out of memory" in caplog.text
    runtime.launch()
    memory.release()


def test_large_memory_is_registered_some_rows_at_a_time(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_MOST_AT_ONCE", 100)
    rows = torch.zeros(7, 30, dtype=torch.uint8)
    memory = PinnedMemory(rows)
    assert memory.pinned
    assert runtime.registered == [rows[first].data_ptr() for first in (0, 3, 6)]
    memory.release()
    assert not runtime.registered


def test_where_a_part_is_refused_no_part_stays_registered(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning, "_MOST_AT_ONCE", 100)
    runtime._left = 150
    memory = PinnedMemory(torch.zeros(7, 30, dtype=torch.uint8))
    assert not memory.pinned
    assert not runtime.registered
    assert len(caplog.records) == 1
    runtime.launch()
