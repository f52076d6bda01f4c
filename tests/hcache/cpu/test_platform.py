"""When the CPU platform takes part at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_hcache.cpu import platform


@pytest.mark.parametrize(
    ("accelerator", "gpu", "environment", "active"),
    [
        (False, False, {}, True),
        (True, True, {}, False),
        (False, False, {"SGLANG_USE_CPU_ENGINE": "1"}, False),
        (False, True, {}, False),
        (False, True, {"CUDA_VISIBLE_DEVICES": "0"}, False),
        (False, True, {"CUDA_VISIBLE_DEVICES": ""}, True),
        (False, True, {"CUDA_VISIBLE_DEVICES": "-1"}, True),
    ],
)
def test_it_is_active_where_there_is_nothing_faster(
    accelerator: bool,
    gpu: bool,
    environment: dict[str, str],
    active: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU whose driver is too old for torch is no reason to serve on the CPU without a word."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(platform, "_GPU", tmp_path if gpu else tmp_path / "none")
    for name in ("SGLANG_USE_CPU_ENGINE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (platform.activate() is not None) is active
    out_of_reach = gpu and not accelerator and not active
    assert ("Update its driver" in caplog.text) is out_of_reach
