"""The GPU benches run on the CPU, too, on a small shape: their figures mean nothing there, their checks do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bench import (
    capture_cost,
    codec,
    exactness,
    gpu_ceilings,
    gpu_report,
    gpu_restore,
    gpu_run,
    kernels,
    report,
    restore_rig,
)
from bench.gpu import DEVICE
from bench.kernels import on_gpu, table
from sglang_hcache.device.streams import CudaStream, ImmediateStream
from sglang_hcache.restoring import copiers, copy_engine
from sglang_hcache.restoring.copiers import KernelCopier
from sglang_hcache.saving import copy_out
from sglang_hcache.triton_kernels import packing, quantize
from sglang_hcache.triton_kernels import project_kv as project
from sglang_hcache.triton_kernels.tile_order import GROUP
from sglang_hcache.triton_kernels.tuning import SHAPES, Fused, Shape, candidates
from tests.triton_kernels.driver import batch

ROOT = Path(__file__).parents[2]
GPU_BENCHES = ("gpu_restore", "kernels", "codec")
TINY = Shape(width=64, k_heads=2, v_heads=2, head_dim=264)  # too large a head for the fused form


PAGE = (ROOT / "docs" / "gpu.md").read_text()
(WHOLE_RUN,) = re.findall(r"^    \(export OUT.*?\)$", PAGE, re.MULTILINE | re.DOTALL)
KERNEL_TESTS = ("rows", "packing", "quantize", "project_kv")
OTHERS = ("sglang", "transformers", "tokenizers", "psutil", "lmdb", "msgspec", "zmq", "xxhash", "matplotlib")
WITHOUT_OTHERS = f"import sys; sys.modules.update(dict.fromkeys({OTHERS}))\n"


def test_gpu_benches_need_torch_triton_and_numpy_alone() -> None:
    """On the machine that has the GPU there may be nothing else, and nothing may be installed."""
    program = f"{WITHOUT_OTHERS}import bench.{', bench.'.join(GPU_BENCHES)}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_tests_of_kernels_need_pytest_and_hypothesis_beside_these() -> None:
    files = [f"tests/triton_kernels/test_{name}.py" for name in KERNEL_TESTS]
    program = f"{WITHOUT_OTHERS}import pytest; sys.exit(pytest.main(['--collect-only', '-q', *{files}]))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("failing", [None, 2, 8])
def test_the_whole_run_goes_on_after_a_failure_and_tells_of_it(failing: int | None, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\necho "$HF_HUB_OFFLINE $OUT $*" >> {tmp_path}/calls\n'
        f'test "$(wc -l < {tmp_path}/calls)" != "{failing}"\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUT": "results"}
    done = subprocess.run(["bash", "-c", WHOLE_RUN], cwd=ROOT, env=environment, check=False)
    assert done.returncode == (failing is not None)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"1 results -m {module}"
        for module in (
            *(f"pytest -q tests/triton_kernels/test_{name}.py" for name in KERNEL_TESTS),
            "bench.gpu_restore --tiny",
            "bench.kernels --tune --save",
            "bench.codec --save",
            "bench.gpu_restore",
        )
    ]
    assert f"KERNEL_TESTS := {' '.join(KERNEL_TESTS)}\n" in (ROOT / "Makefile").read_text()


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


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_form_is_checked_beyond_a_group_of_tiles_and_in_one_that_is_not_full(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "check", lambda shape, form, tokens, dtype: {"tokens": tokens})
    checked = kernels._check(TINY, None)["tokens"]
    assert gpu_run.FULL.checked_tokens == checked
    for shape in SHAPES.values():
        for form in candidates(shape.head_dim, capability):
            assert checked > GROUP * form.tokens
            assert checked % form.tokens


def test_weights_take_turns_in_every_form_and_in_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[str, list[int]] = {"product": [], "forms": []}

    def mm(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> None:
        used["product"].append(weight.data_ptr())

    def project_kv(rows: torch.Tensor, projection: Any, *others: Any, **how: Any) -> None:
        used["forms"].append(projection.weight.data_ptr())

    def seconds(work: Callable[[], object], *, calls: int) -> float:
        for _ in range(6):
            work()
        return 1.0

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(kernels, "project_kv", project_kv)
    monkeypatch.setattr(kernels, "seconds", seconds)
    kernels.measure(TINY, 8, [None])
    for weights in (used["product"], used["forms"][:6]):
        assert len(set(weights[:3])) == 3
        assert weights[3:] == weights[:3]


LAUNCHED = """
import json, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.kernels import launched
from sglang_hcache.triton_kernels import packing

assert launched() == []
spec = next(packing.compile_specs())
names = spec.kernel.arg_names
signature = {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names}
source = ASTSource(spec.kernel, signature, dict(spec.constexprs), {})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=spec.options)
compiled.n_regs, compiled.n_spills = 77, 8  # as the driver does
spec.kernel.device_caches[0] = ({"key": compiled}, {}, None, None, None)
print(json.dumps([launched(), spec.kernel.__name__, dict(spec.constexprs), spec.options]))
"""


def test_what_triton_compiled_at_a_launch_is_told() -> None:
    """By Triton's compiler, which in this process may not be there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHED]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (kernel,), name, constants, options = json.loads(done.stdout)
    assert kernel["kernel"] == name
    assert kernel["constants"] == ", ".join(f"{constant}={value}" for constant, value in constants.items())
    assert {option: kernel[option] for option in options} == options
    assert (kernel["registers"], kernel["spills"]) == (77, 8)
    assert kernel["shared_bytes"] > 0


@pytest.mark.parametrize("broken", [None, "pack_rows", "unpack_rows", "quantize_rows", "dequantize_rows"])
def test_the_codec_bench_compares_what_every_kernel_wrote(
    broken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:

    def once(work: Callable[[], object], rounds: int) -> float:
        work()
        return 1.0

    page = torch.randn(4, 128).to(torch.bfloat16)
    monkeypatch.setattr(codec, "RAW_ON_GPU", 4 * page.numel())
    monkeypatch.setattr(codec, "_median_on_gpu_s", once)
    if broken:
        monkeypatch.setattr(packing if "pack" in broken else quantize, broken, lambda *arguments: None)
    rates, wrong = codec.gpu_rates(page, packing.usual_exponents(page[None])[0], rounds=1)
    kind = (broken or "").removesuffix("_rows")
    names = [kind] if "pack" in kind else [f"{kind}_{code}" for code in quantize.CODE_TYPES] if kind else []
    assert wrong == names
    assert rates.keys() > {"pack", "unpack", *(f"quantize_{code}" for code in quantize.CODE_TYPES)}


@pytest.mark.parametrize(("wrong", "ends"), [([], None), (["pack"], "wrong on the GPU: pack")])
def test_a_codec_that_is_wrong_fails_the_bench(
    wrong: list[str], ends: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"kinds": {}, "cpu_gb_s": {}, "gpu_gb_s": {}, "gpu_wrong": wrong}
    monkeypatch.setattr(codec, "measure", lambda rounds: measured)
    monkeypatch.setattr("sys.argv", ["bench.codec"])
    with pytest.raises(SystemExit, match=ends) if ends else contextlib.nullcontext():
        codec.main()


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
    assert seen == [1, 2, 2], "at last with the kernels that were launched"


def test_a_shape_that_cannot_be_measured_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    other, measure = dataclasses.replace(TINY, width=2 * TINY.width), kernels.measure

    def fails(shape: Shape, tokens: int, forms: Sequence[Fused | None]) -> dict[str, Any]:
        if shape == TINY and tokens == 16:
            raise RuntimeError("no shared memory is left")
        return measure(shape, tokens, forms)

    monkeypatch.setattr(kernels, "measure", fails)
    found = on_gpu((8, 16), {"tiny": TINY, "other": other})["models"]
    assert [row["tokens"] for row in found["tiny"]["rows"]] == [8]
    assert found["tiny"]["error"] == "RuntimeError: no shared memory is left"
    assert [row["tokens"] for row in found["other"]["rows"]] == [8, 16]


def test_other_benches_hand_their_results_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.save("codec", {"figure": 1})
    for folder in ("out", "results"):
        assert json.loads((tmp_path / folder / "codec.json").read_text()) == {"figure": 1}


RIGHT = {"fused": None, "ratio": 1.0, "product": 0.003, "k": 0.003, "v": 0.003, "unwritten": 0, "strayed": 0}
ONE_LENGTH = dataclasses.replace(gpu_run.SMALL, tokens=(64,))


def on_cpu(sections: dict[str, Any]) -> dict[str, Any]:
    """A report of these."""
    return {"sections": sections, "machine": {"gpu": None}, "arena": {"pinned": False}}


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
    assert captured["prefill"]["host_ms"] > 0
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
    assert not gpu_report.failed(on_cpu(run.sections))
    lines = list(gpu_report.table(on_cpu(run.sections)))
    assert (f"{name}: no copy engine: CUDA's driver is older than 12.8" in lines) is not engine


def test_what_both_copiers_did_is_in_the_table_and_in_a_figure() -> None:
    """As a GPU's report has it."""
    row: dict[str, Any] = {"tokens": 64, "ms": 2.0, "caller_ms": 1.0, "gb_s": 3.0, "unwritten": 0, "strayed": 0}
    by: dict[str, Any] = {
        name: {"rows": [{key: row[key] for key in row if key != "gb_s"}]} for name in gpu_report.COPIERS
    }
    by["by kernel"]["rows"].append({"tokens": 256, "error": "CUDA error"})
    section = {"rows": [row], **by, "sweep": {"by_kernel_ms": {"4x16": 2.5}}}
    copiers = {"gb_s": {65536: {"engine": 50.0, "kernel 4x16": 40.0}}}
    measured = on_cpu({"copiers": copiers, "restore hidden, tiny": section}) | {"comparison": {"tiny": {}}}
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
    assert not gpu_report.failed(on_cpu(right))
    assert gpu_report.failed(on_cpu(right | wrong))


@pytest.mark.parametrize(("gpu", "pinned"), [("H200", False), ("H200", True), (None, False)])
def test_a_gpu_that_did_not_take_the_arena_measured_nothing(gpu: str | None, pinned: bool) -> None:
    measured = {"sections": {}, "machine": {"gpu": gpu}, "arena": {"pinned": pinned}}
    assert gpu_report.failed(measured) is (gpu is not None and not pinned)
    assert any("did not register" in line for line in gpu_report.table(measured)) is gpu_report.failed(measured)


class Clock:
    """Comes on by what is done."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def event(self, *, enable_timing: bool) -> Any:
        """As of CUDA, on a stream that is done with everything."""
        event: Any = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self._now)
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event


def test_the_small_copys_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(restore_rig, "DEVICE", "cuda")
    monkeypatch.setattr(restore_rig, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    rig: Any = restore_rig.Rig.__new__(restore_rig.Rig)
    rig._restorer = SimpleNamespace(run=lambda loads: clock.advance(5))
    rig._beside, rig._small_host = None, None
    rig._small = SimpleNamespace(copy_=lambda *_, **how: clock.advance(1))
    rig._pages = SimpleNamespace(layers=[None])
    rig._events = SimpleNamespace(
        set_consumer=lambda index: None, wait_until=lambda layer: clock.advance(2), synchronize=lambda index: None
    )
    assert rig.run(None) == restore_rig.Took(device_s=8, caller_s=5, beside_s=1)


def test_the_host_that_comes_after_the_forwards_is_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps = Clock(), 4

    def series(forward: Any, steps: int, *, captured: bool) -> float:
        clock.advance(steps)
        return 1.0

    monkeypatch.setattr(capture_cost, "time", clock)
    monkeypatch.setattr(capture_cost.Forward, "series", series)
    drained = SimpleNamespace(drain=lambda: clock.advance(2), close=lambda: None)
    sink: Any = SimpleNamespace(copy_out=drained, share=lambda: 1.0)
    found = capture_cost.Forward(*5 * [None]).compare(sink, steps)  # type: ignore[arg-type]
    assert (found["captured_ms"], found["host_ms"]) == (1000, 1500)


def test_a_series_of_prefills_is_more_than_pinned_memory_holds() -> None:
    assert capture_cost.PREFILL_STEPS > 2 * copy_out._FORWARDS_PENDING


def test_the_callers_overhead_is_of_batches_that_end_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []

    def end_copy(stream: object) -> None:
        ended.append(stream)

    for stream in (ImmediateStream, CudaStream):
        monkeypatch.setattr(stream, "end_copy", end_copy)
    assert len(gpu_restore.overhead(None)) == 2  # type: ignore[arg-type]
    assert not ended


def test_the_engines_ceiling_by_pages_slices_nothing_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class Noted(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **kwargs or {})

    def seconds(work: Callable[[], object], **how: int) -> float:
        with Noted():
            work()
        return 1.0

    monkeypatch.setattr(gpu_ceilings, "seconds", seconds)
    scale = dataclasses.replace(ONE_LENGTH, copy_bytes=2 << 20)
    arena: Any = SimpleNamespace(memory=torch.zeros(scale.copy_bytes, dtype=torch.uint8), pinned=False)
    gpu_ceilings.ceilings(gpu_run.Run(scale, arena, deadline=math.inf))
    assert called.count("copy_") == 1 + 4, "of the whole, and of pages of 512 KiB"
    assert "__getitem__" not in called


def fails_if_fused(*arguments: Any, fused: Any = None) -> None:
    if fused is not None:
        raise RuntimeError("no shared memory is left")
    project.project_kv(*arguments, fused=fused)


def test_a_form_that_fails_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [Fused(16, 32, 4, 2), None]
    monkeypatch.setattr(gpu_ceilings, "_forms", lambda model: forms)

    for module in (exactness, gpu_ceilings):
        monkeypatch.setattr(module, "project_kv", fails_if_fused)
    run = gpu_run.Run(ONE_LENGTH, None, deadline=math.inf)  # type: ignore[arg-type]
    run.sections["numerics"] = found = gpu_ceilings.numerics(run)
    bad, good = found["tiny"]
    assert bad["error"] == "RuntimeError: no shared memory is left"
    assert good["ratio"] < 1.5
    run.sections["projection"] = gpu_ceilings.projections(run)
    (row,) = run.sections["projection"]["tiny"]["rows"]
    assert [form["fused"] for form in row["forms"]] == [None]
    assert gpu_report.failed(on_cpu(run.sections))
    assert any("no shared memory" in line for line in gpu_report.table(on_cpu(run.sections)))


def test_a_form_that_fails_only_when_it_is_timed_costs_its_own_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [Fused(16, 32, 4, 2), None]
    monkeypatch.setattr(gpu_ceilings, "_forms", lambda model: forms)

    monkeypatch.setattr(gpu_ceilings, "project_kv", fails_if_fused)
    run = gpu_run.Run(ONE_LENGTH, None, deadline=math.inf)  # type: ignore[arg-type]
    run.sections["numerics"] = {"tiny": [RIGHT, RIGHT]}
    run.sections["projection"] = gpu_ceilings.projections(run)
    (row,) = run.sections["projection"]["tiny"]["rows"]
    bad, good = row["forms"]
    assert bad["error"] == "RuntimeError: no shared memory is left"
    assert row["ratio"] == row["product_ms"] / good["ms"]
    assert gpu_report.failed(on_cpu(run.sections))
    run.deadline = 0.0
    (skipped,) = gpu_ceilings._projections(run, ONE_LENGTH.models[0])["rows"]
    assert skipped == {"tokens": 64, "skipped": "out of time"}
    assert not gpu_report.failed(on_cpu({"projection": {"tiny": {"rows": [skipped]}}})), "it is marked, and no error"
    run.deadline = math.inf
    run.sections["numerics"] = {"tiny": [RIGHT | {"ratio": 9.0}, RIGHT | {"ratio": 9.0}]}
    assert "error" in gpu_ceilings.projections(run)["tiny"], "none is right"


def test_the_last_lines_are_a_short_table_of_the_worst_figures() -> None:
    def rows(*ratios: float) -> dict[str, Any]:
        return {"rows": [{"tokens": 256 << i, "ratio": ratio, "forms": []} for i, ratio in enumerate(ratios)]}

    sections = {
        "numerics": {"a": [RIGHT], "b": [RIGHT | {"ratio": 1.25}]},
        "projection": {"a": rows(0.1, 0.2, 0.95, 0.91), "b": rows(0.1, 0.1, 0.97), "took_s": 1.0},
        "restore hidden, a": rows(9.0, 3.0, 2.0, 2.0, 1.05, 1.2),
        "capture, a": {"prefill": {"slow_down": 0.021}, "decode": {"error": "lost"}},
    }
    compared: dict[str, Any] = {
        "a": {"rows": [{"tokens": 4096, "restore KV / hidden": 1.93}], "restore_faster_from": 1024},
        "b": {"rows": [], "restore_faster_from": None},
    }
    lines = [" ".join(line.split()) for line in gpu_report.goals({"sections": sections, "comparison": compared})]
    assert lines == [
        "goal, and the worst measured:",
        "project_kv's throughput / the product's ≥ 0.85 0.91",
        "restore / max(copy, projection) ≤ 1.10 1.20",
        "restore as K and V / as hidden states ≥ 1.9 1.93",
        "error / the forward's own ≤ 1.5 1.25",
        "slow-down by capture, prefill ≤ 3 % 2.10 %",
        "restoring beats prefill, a from 1024 tokens on",
        "restoring beats prefill, b at no length",
    ]


@pytest.mark.parametrize(("prefill_ms", "since"), [([2, 2, 2], 64), ([2, 0.5, 2], 256), ([0.5, 2, 0.5], None)])
def test_restoring_is_faster_from_where_it_stays_so(prefill_ms: list[float], since: int | None) -> None:
    lengths = (64, 128, 256)
    sections = {
        "restore hidden, a": {"rows": [{"tokens": n, "ms": 1.0} for n in lengths]},
        "prefill, a": {"rows": [{"tokens": n, "ms": ms} for n, ms in zip(lengths, prefill_ms, strict=True)]},
    }
    assert gpu_report.compare(sections, ["a"])["a"]["restore_faster_from"] == since


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
