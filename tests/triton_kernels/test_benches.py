"""The GPU benches run on the CPU, too, on a small shape: their figures mean nothing there, their checks do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_report, gpu_restore, gpu_run
from bench.gpu import DEVICE
from bench.kernels import on_gpu, table
from sglang_hcache.triton_kernels.tuning import Shape

TINY = Shape(width=64, k_heads=2, v_heads=2, head_dim=264)  # too large a head for the fused form


def test_the_kernels_bench_checks_and_times_every_form() -> None:
    report = on_gpu((8, 16), {"tiny": TINY})
    (error,) = report["errors"]["tiny"]
    assert error["fused"] is None
    assert error["k"] < 1.5 * error["product"] + 2**-8
    assert error["v"] <= 1.01 * error["product"]
    assert error["k_unwritten"] == error["v_unwritten"] == error["k_strayed"] == error["v_strayed"] == 0
    (entry,) = table(report, 90)["entries"]
    assert Shape(**entry["shape"]) == TINY
    assert [row["tokens"] for row in entry["rows"]] == [8, 16]


ONE_LENGTH = dataclasses.replace(gpu_run.SMALL, tokens=(64,))


def test_the_restore_bench_runs_every_section_and_finds_nothing_wrong(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    report = gpu_restore.measure(ONE_LENGTH, 1e6, saved.append)
    found = report["sections"]
    assert "traceback" not in json.dumps(report)
    assert len(saved) == len(found) == 9
    for form in found["numerics"]["tiny"]:
        assert form["unwritten"] == form["strayed"] == 0
        assert form["ratio"] < 1.5
    (hidden,) = found["restore hidden, tiny"]["rows"]
    (kv,) = found["restore KV, tiny"]["rows"]
    assert hidden["error_ratio"] < 1.5
    assert kv["differing"] == 0
    assert hidden["unwritten"] == hidden["strayed"] == kv["unwritten"] == kv["strayed"] == 0
    captured = found["capture, tiny"]
    assert captured["prefill"]["differing"] == 0
    assert captured["prefill"]["captured_share"] == 1
    if DEVICE == "cuda":
        assert captured["decode"]["differing"] == 0
    else:
        assert "GPU" in captured["decode"]["skipped"]
    lines = list(gpu_report.table(report))
    assert any("restore hidden, tiny, 64" in line for line in lines)
    plot_gpu = pytest.importorskip("bench.plot_gpu")
    for file in plot_gpu.draw(json.loads(json.dumps(report)), tmp_path / "figures"):
        assert file.stat().st_size > 1000


def test_the_restore_bench_survives_a_section_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: gpu_run.Run) -> dict[str, Any]:
        run.deadline = 0
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_restore, "ceilings", fails)
    report = gpu_restore.measure(ONE_LENGTH, 1e6)
    found = report["sections"]
    assert found["ceilings"]["error"] == "RuntimeError: out of memory"
    assert {section["skipped"] for name, section in found.items() if name != "ceilings"} == {"out of time"}
    assert any("out of memory" in line for line in gpu_report.table(report))
