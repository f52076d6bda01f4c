"""The GPU benches run on the CPU, too, on a small shape: their figures mean nothing there, their checks do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import exactness, gpu_ceilings, gpu_report, gpu_restore, gpu_run, kernels, report, restore_rig
from bench.gpu import DEVICE
from bench.kernels import on_gpu, table
from sglang_hcache import copiers, copy_engine
from sglang_hcache.copiers import KernelCopier
from sglang_hcache.triton_kernels import project_kv as project
from sglang_hcache.triton_kernels.tuning import Fused, Shape
from tests.triton_kernels.driver import batch

ROOT = Path(__file__).parents[2]
GPU_BENCHES = ("gpu_restore", "kernels", "codec")
TINY = Shape(width=64, k_heads=2, v_heads=2, head_dim=264)  # too large a head for the fused form


def test_gpu_benches_need_torch_triton_and_numpy_alone() -> None:
    """On the machine that has the GPU there may be nothing else, and nothing may be installed."""
    others = ("sglang", "transformers", "tokenizers", "psutil", "lmdb", "msgspec", "zmq", "xxhash", "matplotlib")
    program = f"import sys; sys.modules.update(dict.fromkeys({others}))\nimport bench.{', bench.'.join(GPU_BENCHES)}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_kernels_bench_checks_and_times_every_form() -> None:
    found = on_gpu((8, 16), {"tiny": TINY})
    (error,) = found["errors"]["tiny"]
    assert error["fused"] is None
    assert error["k"] < 1.5 * error["product"] + 2**-8
    assert error["v"] <= 1.01 * error["product"]
    assert error["k_unwritten"] == error["v_unwritten"] == error["k_strayed"] == error["v_strayed"] == 0
    (entry,) = table(found)["entries"]
    assert Shape(**entry["shape"]) == TINY
    assert [row["tokens"] for row in entry["rows"]] == [8, 16]


@pytest.mark.parametrize(("failed", "spills", "ends"), [(0, 0, None), (1, 0, "compile"), (0, 1, "compile")])
def test_a_kernel_that_fails_to_compile_or_spills_fails_the_bench(
    failed: int, spills: int, ends: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compile_all", lambda: {"compiled": 2, "failed": failed, "spills": spills})
    monkeypatch.setattr("sys.argv", ["bench.kernels", "--compile-only"])
    with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
        kernels.main()


def test_what_was_measured_is_kept_after_each_shape_and_handed_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checkout, and in the one folder that comes back from a machine of which nothing else does."""
    out, results, tuned = tmp_path / "out", tmp_path / "results", tmp_path / "kernels" / "tuned.json"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(kernels, "TABLE", tuned)
    other = dataclasses.replace(TINY, width=32)
    known = [{"capability": 70, "shape": dataclasses.asdict(TINY), "rows": []}]
    tuned.parent.mkdir()
    tuned.write_text(json.dumps({"entries": known}))
    seen: list[int] = []

    def keep(found: dict[str, Any]) -> None:
        kernels.write(found, results=True, tuned=True)
        for folder, table_file in ((results, tuned), (out, out / "tuned.json")):
            saved = json.loads((folder / "kernels_gpu.json").read_text())
            assert saved["models"].keys() == found["models"].keys()
            entries = json.loads(table_file.read_text())["entries"]
            assert entries[0] == known[0]
            assert [entry["shape"] for entry in entries[1:]] == [each["shape"] for each in found["models"].values()]
        seen.append(len(found["models"]))

    on_gpu((8,), {"tiny": TINY, "other": other}, keep)
    assert seen == [1, 2]


def test_other_benches_hand_their_results_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.save("codec", {"figure": 1})
    for folder in ("out", "results"):
        assert json.loads((tmp_path / folder / "codec.json").read_text()) == {"figure": 1}


RIGHT = {"fused": None, "ratio": 1.0, "product": 0.003, "k": 0.003, "v": 0.003, "unwritten": 0, "strayed": 0}
ONE_LENGTH = dataclasses.replace(gpu_run.SMALL, tokens=(64,))


def test_the_restore_bench_runs_every_section_and_finds_nothing_wrong(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    measured = gpu_restore.measure(ONE_LENGTH, 1e6, saved.append)
    found = measured["sections"]
    assert "traceback" not in json.dumps(measured)
    assert measured["arena"]["took_s"].keys() == {"zero", "register", "fill"}
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
    lines = list(gpu_report.table(measured))
    assert any("restore hidden, tiny, 64" in line for line in lines)
    plot_gpu = pytest.importorskip("bench.plot_gpu")
    for file in plot_gpu.draw(json.loads(json.dumps(measured)), tmp_path / "figures"):
        assert file.stat().st_size > 1000


class Streams:
    """CUDA's, on a machine without: one for all."""

    cuda_stream = 1

    def wait_stream(self, other: object) -> None:
        pass


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's own test is the bench")
@pytest.mark.parametrize("engine", [True, False])
def test_what_only_a_gpu_measures_runs_with_a_stand_in_for_the_driver(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copiers by themselves, restores by each of them, the sweep: as on memory that CUDA has taken."""

    class Taken:
        pinned = True

        def __init__(self, memory: torch.Tensor) -> None: ...

        def release(self) -> None: ...

    def driver() -> object:
        if engine:
            return batch
        raise copy_engine.NoCopyEngine("CUDA's driver is older than 12.8")

    monkeypatch.setattr(copy_engine, "_of_driver", driver)
    monkeypatch.setattr(KernelCopier, "indexed_on", "cpu")
    monkeypatch.setattr(copiers, "ENGINE_PAGE_BYTES", 1)
    monkeypatch.setattr(restore_rig, "PinnedMemory", Taken)
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    monkeypatch.setattr(torch.cuda, "current_stream", Streams)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for module in (gpu_ceilings, gpu_restore):
        monkeypatch.setattr(module, "KERNELS", ((2, 4), (1, 16)))
    monkeypatch.setattr(restore_rig, "WARM_UP", 0)
    monkeypatch.setattr(restore_rig.Rig, "times", partialmethod(restore_rig.Rig.times, rounds=1))
    monkeypatch.setattr(gpu_ceilings, "PAGE_BYTES", (4096,))
    monkeypatch.setattr(gpu_ceilings, "STEP_BYTES", 16384)
    arena = restore_rig.Arena(ONE_LENGTH.arena_bytes, ONE_LENGTH.dtype)
    run = gpu_run.Run(ONE_LENGTH, arena, deadline=math.inf)
    run.sections["copiers"] = found = gpu_ceilings.copiers(run)
    kernels_used = ["kernel 2x4", "kernel 1x16"]
    assert list(found["gb_s"][4096]) == ["engine", *kernels_used] if engine else kernels_used
    assert ("no_engine" in found) is not engine
    name = f"restore hidden, {ONE_LENGTH.models[0].name}"
    run.sections[name] = section = gpu_restore.restores(run, ONE_LENGTH.models[0], kv=False)
    assert ("by engine" in section) is engine
    assert set(section["sweep"]["by_kernel_ms"]) == {"2x4", "1x16"}
    for part in (section, section["by kernel"], section["by engine"] if engine else section):
        (row,) = part["rows"]
        assert row["unwritten"] == row["strayed"] == 0
        assert row["error_ratio"] < 1.5
    assert not gpu_report.failed({"sections": run.sections})
    assert list(gpu_report.table({"sections": run.sections}))


def test_what_both_copiers_did_is_in_the_table_and_in_a_figure() -> None:
    """As a GPU's report has it."""
    row: dict[str, Any] = {"tokens": 64, "ms": 2.0, "caller_ms": 1.0, "gb_s": 3.0, "unwritten": 0, "strayed": 0}
    by: dict[str, Any] = {
        name: {"rows": [{key: row[key] for key in row if key != "gb_s"}]} for name in gpu_report.COPIERS
    }
    by["by kernel"]["rows"].append({"tokens": 256, "error": "CUDA error"})
    section = {"rows": [row], **by, "sweep": {"by_kernel_ms": {"4x16": 2.5}}}
    copiers = {"gb_s": {65536: {"engine": 50.0, "kernel 4x16": 40.0}}}
    measured = {"sections": {"copiers": copiers, "restore hidden, tiny": section}, "comparison": {"tiny": {}}}
    lines = "\n".join(gpu_report.table(measured | {"comparison": {}}))
    for part in (
        "tiny, by engine, 64",
        "by kernel, 256: CUDA error",
        "4x16: 2.50",
        "pages of 64 KiB",
        "engine: 50.0",
    ):
        assert part in lines
    assert gpu_report.failed(measured)
    plot_gpu = pytest.importorskip("bench.plot_gpu")
    assert plot_gpu.by_copier(measured) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"restore hidden, tiny": {"rows": [{"tokens": 64, "unwritten": 4096, "strayed": 0}]}},
        {"restore KV, tiny": {"rows": [{"tokens": 64, "unwritten": 0, "strayed": 0, "differing": 1}]}},
        {"restore hidden, tiny": {"by kernel": {"rows": [{"tokens": 64, "error_ratio": 9.0}]}}},
        {"restore hidden, tiny": {"rows": [{"tokens": 64, "error_ratio": float("nan")}]}},
        {"capture, tiny": {"prefill": {"differing": 77, "captured_share": 1.0}}},
        {"capture, tiny": {"decode": {"differing": 0, "captured_share": 0.0}}},
        {"numerics": {"tiny": [RIGHT, RIGHT | {"ratio": 9.0}]}},
        {"numerics": {"tiny": [RIGHT | {"v": float("nan")}]}},
    ],
)
def test_what_is_wrong_is_no_success(wrong: dict[str, Any]) -> None:
    right = {
        "restore hidden, tiny": {"rows": [{"tokens": 64, "unwritten": 0, "strayed": 0, "error_ratio": 1.4}]},
        "capture, tiny": {"prefill": {"differing": 0, "captured_share": 0.5}},
        "numerics": {"tiny": [RIGHT]},
    }
    assert not gpu_report.failed({"sections": right})
    assert gpu_report.failed({"sections": right | wrong})


def test_a_form_that_fails_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [Fused(16, 32, 4, 2), None]
    monkeypatch.setattr(gpu_ceilings, "_forms", lambda model: forms)

    def project_kv(*arguments: Any, fused: Any = None) -> None:
        if fused is not None:
            raise RuntimeError("no shared memory is left")
        project.project_kv(*arguments, fused=fused)

    for module in (exactness, gpu_ceilings):
        monkeypatch.setattr(module, "project_kv", project_kv)
    run = gpu_run.Run(ONE_LENGTH, None, deadline=math.inf)  # type: ignore[arg-type]
    run.sections["numerics"] = found = gpu_ceilings.numerics(run)
    bad, good = found["tiny"]
    assert bad["error"] == "RuntimeError: no shared memory is left"
    assert good["ratio"] < 1.5
    run.sections["ceilings"] = {"gemm": {"tiny": [{"tokens": 64, "ms": 1.0}]}}
    (row,) = gpu_ceilings.projections(run)["tiny"]
    assert [form["fused"] for form in row["forms"]] == [None]
    assert gpu_report.failed({"sections": run.sections})
    assert any("no shared memory" in line for line in gpu_report.table({"sections": run.sections}))


def test_nothing_is_measured_on_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_run, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    run = gpu_run.Run(ONE_LENGTH, None, deadline=math.inf)  # type: ignore[arg-type]
    assert run.isolated("one", dict) == {}
    assert "illegal memory access" in run.isolated("another", dict)["skipped"]


def test_the_restore_bench_survives_a_section_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: gpu_run.Run) -> dict[str, Any]:
        run.deadline = 0
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_restore, "ceilings", fails)
    measured = gpu_restore.measure(ONE_LENGTH, 1e6)
    found = measured["sections"]
    assert found["ceilings"]["error"] == "RuntimeError: out of memory"
    assert {section["skipped"] for name, section in found.items() if name != "ceilings"} == {"out of time"}
    assert any("out of memory" in line for line in gpu_report.table(measured))
