"""Memory that CUDA takes, and memory that it does not: with a fake of CUDA's runtime."""

from __future__ import annotations

import pytest
import torch

from sglang_hcache.pinning import PinnedMemory


class Runtime:
    """Like CUDA, it keeps a failed call's error for the next launch."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.error = 0
        self.registered: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self._limit:
            self.error = 2
            return self.error
        self.registered.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
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


def test_a_refusal_is_one_warning_and_no_error_later_on(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    memory = PinnedMemory(torch.zeros(101, dtype=torch.uint8))
    assert not memory.pinned
    assert "out of memory" in caplog.text
    runtime.launch()
    memory.release()
