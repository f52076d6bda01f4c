"""A thread's way to use CUDA beside graph captures, with a fake of CUDA's driver."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch

from sglang_hcache.device.capture_mode import beside_captures

GLOBAL, RELAXED = 0, 2


class Driver:
    """Has a mode for each thread, as CUDA's has."""

    def __init__(self) -> None:
        self._modes = threading.local()

    @property
    def mode(self) -> int:
        return getattr(self._modes, "mode", GLOBAL)

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        former, self._modes.mode = self.mode, mode._obj.value
        mode._obj.value = former
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    return driver


def fail_beside_captures(driver: Driver) -> None:
    with beside_captures():
        with beside_captures():
            assert driver.mode == RELAXED
        assert driver.mode == RELAXED, "the inner one has restored what it found"
        raise RuntimeError("not now")


def test_the_threads_own_mode_comes_back_whatever_happens(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="not now"):
        fail_beside_captures(driver)
    assert driver.mode == GLOBAL


def test_without_nvidias_driver_nothing_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    reached = False
    with beside_captures():
        reached = True
    assert reached


def test_no_other_thread_is_touched(driver: Driver) -> None:
    seen: list[int] = []
    with beside_captures():
        other = threading.Thread(target=lambda: seen.append(driver.mode))
        other.start()
        other.join()
    assert seen == [GLOBAL]
