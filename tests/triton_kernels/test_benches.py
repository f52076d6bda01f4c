"""The GPU benches run on the CPU, too, on a small shape: their figures mean nothing there, their checks do."""

from __future__ import annotations

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
