"""Trying a drive leaves nothing behind, and gives a rate."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hcache.storage import probe
from sglang_hcache.storage.direct import File
from sglang_hcache.storage.probe import measure_read_rate


def test_a_drive_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a read takes half a second, and all that comes before takes long."""
    now, lock, offsets = 0.0, threading.Lock(), list[int]()

    def takes(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal now
            with lock:
                now += seconds
                offsets.extend(arguments[1:2] if original is read else ())
            return original(*arguments)

        return call

    read = File.read
    monkeypatch.setattr(File, "read", takes(0.5, read))
    monkeypatch.setattr(File, "write", takes(100, File.write))
    monkeypatch.setattr(os, "fsync", takes(100, os.fsync))
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: now))
    assert measure_read_rate(tmp_path, n_bytes=8 << 20) == 2 << 20
    assert sorted(offsets) == list(range(0, 8 << 20, 1 << 20))
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        measure_read_rate(tmp_path / "missing")
