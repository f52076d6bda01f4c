"""Restore and capture on a GPU: the machine's ceilings, then what the pipeline makes of them. One call does it all.

    python3 -m bench.gpu_restore [--budget-s N] [--out FOLDER] [--save] [--json]
    TRITON_INTERPRET=1 python3 -m bench.gpu_restore --tiny

Needs torch, Triton and numpy. `--tiny` runs every section on small shapes, on a CPU too; its speeds mean nothing.

Method: random bf16 weights and activations; device time between events, median of 7 rounds after 2 that warm up
(where not said otherwise), fastest and slowest beside it. Ceilings come from the same run. An arena of shared
memory, registered with CUDA as the server does it, holds chunks of 64-token pages; the server's own `Restorer`
copies them and projects every layer into a paged pool, chunks and slots in random order, another load each round.
Time runs from issue to the event that the forward would wait for before the last layer; `caller_ms` is how long
Python was busy with it. `ratio` is that time over the larger of the copy's at the copy engine's rate from the same
memory and the projection's at cuBLAS' rate for products of that shape and up to 8,192 rows. Each restore is first
made into pools of NaNs: of three layers, all slots are checked for values missing or strayed, and four pages
against float64; the error's norm over the values' is compared with that of K and V made as a forward makes them. K
and V stored as such must come back bit by bit. Prefill: one decoder layer in plain torch with flash attention, in
chunks of 8,192 tokens, times the number of layers; embedding and sampling are left out. Capture: all layers of the
model, with and without hooks, in turns, two forwards in flight; plain forwards are measured twice a round, which
gives the noise.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import gpu_report
from bench.capture_cost import Bench
from bench.gpu import DEVICE, device_copy_gb_s, host_to_device_gb_s, machine, noise, seconds
from bench.kernels import POSITIONS, pool_of, projection_of
from bench.restore_rig import PAGE_TOKENS, Arena, Rig, errors, pipeline_ms
from bench.toy_model import CHUNK, MODELS, TINY, Layer, Model, Prefix, Weights, angles, forward
from sglang_hcache.restore import HostPages, KernelCopier, StoredLayer
from sglang_hcache.triton_kernels.project import project_kv
from sglang_hcache.triton_kernels.tuning import Fused, candidates

RESULTS = Path(__file__).parent / "results"
PROGRAMS = (8, 16, 32, 64, 128, 264)


class Skipped(Exception):
    """A section that does not run here, or not any more; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    models: tuple[Model, ...]
    dtype: torch.dtype
    tokens: tuple[int, ...]
    checked_tokens: int  # in the kernels' numerics
    arena_bytes: int
    copy_bytes: int  # of one copy among the ceilings
    chunk: int  # tokens of the prefill that is captured
    batch: int
    context: int
    sweep_tokens: int  # of the restores with several numbers of programs


FULL = Scale(
    MODELS, torch.bfloat16, (256, 1024, 4096, 16384, 65536), 512, 16 << 30, 1 << 30, CHUNK, 64, 1024, 16384
)  # fmt: skip
SMALL = Scale((TINY,), torch.float32, (64, 192), 48, 2 << 20, 1 << 16, 64, 8, 32, 64)
if DEVICE == "cuda":  # pragma: no cover
    SMALL = Scale((TINY,), torch.bfloat16, (64, 192, 1024), 48, 64 << 20, 1 << 22, 64, 8, 32, 1024)


@dataclass
class Run:
    """What sections share. They run in order; each has the results of those before it."""

    scale: Scale
    arena: Arena
    deadline: float
    sections: dict[str, Any] = field(default_factory=dict)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def floors_ms(self, model: Model, tokens: int) -> dict[str, float] | None:
        """The copy's and the projection's least time, of hidden states."""
        ceilings = self.sections.get("ceilings", {})
        if "gemm" not in ceilings:
            return None
        moved = tokens * model.layers * model.row_bytes(self.scale.dtype)
        rows = ceilings["gemm"][model.name]
        at = next((row for row in rows if row["tokens"] >= tokens), rows[-1])
        return {
            "copy_ms": moved / ceilings["registered_gb_s"] / 1e6,
            "projection_ms": at["ms"] * tokens / at["tokens"] * model.layers,
        }


def ceilings(run: Run) -> dict[str, Any]:
    """GB/s, and of one layer's projection: milliseconds, and the product's time over `project_kv`'s best."""
    n_bytes, memory = run.scale.copy_bytes, run.arena.memory
    target = torch.empty(n_bytes, dtype=torch.uint8, device=DEVICE)
    parts = itertools.cycle(memory[: len(memory) // n_bytes * n_bytes].view(-1, n_bytes).unbind(0))
    page = min(512 << 10, n_bytes)
    engine_s = seconds(lambda: target.copy_(next(parts), non_blocking=True))

    def page_by_page() -> None:
        for begin in range(0, n_bytes, page):
            target[begin : begin + page].copy_(memory[begin : begin + page], non_blocking=True)

    return {
        "registered": run.arena.pinned,
        "pinned_gb_s": host_to_device_gb_s(n_bytes),
        "registered_gb_s": n_bytes / engine_s / 1e9,
        "registered_by_pages_gb_s": n_bytes / seconds(page_by_page, rounds=3) / 1e9,
        "kernel_gb_s": _kernel_rates(run.arena) if run.arena.pinned else "needs a GPU that has taken the memory",
        "device_copy_gb_s": device_copy_gb_s(n_bytes),
        "gemm": {
            model.name: [_product(model, n, run.scale) for n in _gemm_rows(run.scale)] for model in run.scale.models
        },
    }


def _kernel_rates(arena: Arena, page_bytes: int = 512 << 10, pages: int = 128) -> dict[int, float]:
    """GB/s of the kernel that reads the arena, by how many programs run it; scattered pages, others each time."""
    memory = arena.chunks(page_bytes)
    stored = HostPages(memory, np.zeros((0, 0), np.int32), [StoredLayer(0, page_bytes, torch.uint8, None)])  # type: ignore[arg-type]
    pages = min(pages, len(memory))
    target = torch.empty(1, pages, page_bytes, dtype=torch.uint8, device=DEVICE)
    picks = itertools.cycle([torch.randperm(len(memory), device=DEVICE)[:pages] for _ in range(8)])
    rates = {}
    for programs in PROGRAMS:
        copier = KernelCopier(programs)
        took = seconds(lambda copier=copier: copier.copy(stored, range(1), next(picks), target))  # type: ignore[misc]
        rates[programs] = target.nbytes / took / 1e9
    return rates


def _gemm_rows(scale: Scale) -> list[int]:
    return sorted({min(tokens, CHUNK) for tokens in scale.tokens})


def _product(model: Model, tokens: int, scale: Scale) -> dict[str, Any]:
    """cuBLAS on the rows of one step, and `project_kv`; weights in turns, for one would stay in the L2 cache."""
    projections = itertools.cycle([projection_of(model.shape, scale.dtype) for _ in range(3)])
    rows = noise(tokens, model.shape.width, dtype=scale.dtype)
    out = rows.new_empty(tokens, next(projections).columns)
    slots, positions = torch.randperm(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE)
    pool = pool_of(model.shape, tokens, scale.dtype)

    def project(form: Fused | None) -> None:
        project_kv(rows, next(projections), positions, slots, *pool, fused=form, workspace=out)

    took = seconds(lambda: torch.mm(rows, next(projections).weight.T, out=out))
    forms = {form: 1e3 * seconds(partial(project, form)) for form in _forms(model)}
    return {
        "tokens": tokens,
        "ms": 1e3 * took,
        "tflop_s": 2 * tokens * model.shape.width * out.shape[1] / took / 1e12,
        "project": [{"fused": asdict(form) if form else None, "ms": ms} for form, ms in forms.items()],
        "project_ratio": 1e3 * took / min(forms.values()),
    }


def numerics(run: Run) -> dict[str, Any]:
    """Both forms of the projection against float64, beside the forward's own way; into pools of NaNs."""
    return {
        model.name: [_form_errors(model, form, run.scale) for form in _forms(model)] for model in run.scale.models
    }


def _forms(model: Model) -> list[Fused | None]:
    return [None, *candidates(model.shape.head_dim)]


def _form_errors(model: Model, form: Fused | None, scale: Scale) -> dict[str, Any]:
    n, projection = scale.checked_tokens, projection_of(model.shape, scale.dtype)
    rows = noise(n, model.shape.width, dtype=scale.dtype)
    slots = torch.randperm(2 * n, device=DEVICE)[:n]
    positions = torch.randint(0, POSITIONS, (n,), device=DEVICE)
    pool = pool_of(model.shape, 2 * n, scale.dtype)
    project_kv(rows, projection, positions, slots, *pool, fused=form)
    others = torch.ones(2 * n, dtype=torch.bool, device=DEVICE)
    others[slots] = False
    return {
        "fused": asdict(form) if form else None,
        "unwritten": sum(int(part[slots].isnan().sum()) for part in pool),
        "strayed": sum(int((~part[others].isnan()).sum()) for part in pool),
        **errors(rows, projection, positions, pool[0][slots], pool[1][slots]),
    }


def overhead(run: Run) -> dict[str, Any]:
    """The caller's milliseconds for a batch of 32 layers where copier and projector do nothing."""
    return {"one_request_of_64_pages_ms": pipeline_ms(32, [64]), "8_requests_of_8_pages_ms": pipeline_ms(32, [8] * 8)}


def restores(run: Run, model: Model, *, kv: bool) -> dict[str, Any]:
    """Times by length, of hidden states or of K and V."""
    dtype = run.scale.dtype
    fits = [n for n in run.scale.tokens if _free_bytes() > Rig.bytes_needed(model, n, dtype)]
    report: dict[str, Any] = {"rows": [], "too_large": [n for n in run.scale.tokens if n not in fits]}
    if not fits:
        return report
    rig = Rig(run.arena, model, max(fits), dtype, kv=kv)
    for tokens in fits:
        if run.late():
            report["rows"].append({"tokens": tokens, "skipped": "out of time"})
            continue
        row: dict[str, Any] = {"tokens": tokens} | rig.check(tokens) | rig.times(tokens)
        row["gb_s"] = tokens * rig.bytes_a_token / row["ms"] / 1e6
        floors = None if kv else run.floors_ms(model, tokens)
        if floors is not None:
            row |= floors | {"ratio": row["ms"] / max(floors.values())}
        report["rows"].append(row)
    if not kv and run.arena.pinned and run.scale.sweep_tokens in fits and not run.late():
        report["by_programs_ms"] = {}
        for programs in PROGRAMS:
            rig.use(programs)
            report["by_programs_ms"][programs] = rig.times(run.scale.sweep_tokens, rounds=5)["ms"]
    return report


def prefills(run: Run, model: Model) -> dict[str, Any]:
    """One layer's time times the layers."""
    layer = Layer(Weights.random(model, run.scale.dtype))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for tokens in run.scale.tokens:
            if run.late():
                rows.append({"tokens": tokens, "skipped": "out of time"})
                continue
            prefix, x = (
                Prefix(model, tokens, run.scale.dtype),
                noise(tokens, model.shape.width, dtype=run.scale.dtype),
            )
            cos_sin = torch.ones(tokens, model.shape.head_dim, device=DEVICE)
            cos, sin = angles(cos_sin, torch.arange(tokens, device=DEVICE), run.scale.dtype)
            took = seconds(partial(_chunked, layer, prefix, x, cos, sin), rounds=3)
            rows.append({"tokens": tokens, "ms": 1e3 * took * model.layers})
    return {"rows": rows}


def _chunked(layer: Layer, prefix: Prefix, *inputs: torch.Tensor) -> None:
    prefix.length = 0
    for parts in zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True):
        forward([layer], [prefix], *parts)


def captures(run: Run, model: Model) -> dict[str, Any]:
    scale = run.scale
    bench = Bench(model, scale.dtype, chunk=scale.chunk, batch=scale.batch, context=scale.context)
    try:
        report = {"prefill": bench.prefill()}
        report["decode"] = {"skipped": "out of time"} if run.late() else bench.decode()
    finally:
        bench.close()
    return report


def _free_bytes() -> int:
    if DEVICE == "cpu":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def sections(models: tuple[Model, ...]) -> list[tuple[str, Callable[[Run], dict[str, Any]]]]:
    """The most important first: what comes last is left out when time is up."""
    first = [("ceilings", ceilings), ("numerics", numerics), ("overhead", overhead)]
    per_model = [
        [
            (f"restore hidden, {model.name}", partial(restores, model=model, kv=False)),
            (f"restore KV, {model.name}", partial(restores, model=model, kv=True)),
            (f"prefill, {model.name}", partial(prefills, model=model)),
        ]
        for model in models
    ]
    capture = (f"capture, {models[0].name}", partial(captures, model=models[0]))
    return [*first, *per_model[0], capture, *itertools.chain(*per_model[1:])]


def measure(scale: Scale, budget_s: float, save: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """All sections; `save` has the report after each."""
    began = time.monotonic()
    torch.manual_seed(0)
    report = {"machine": machine(), "method": " ".join((__doc__ or "").split("Method: ")[1].split())}
    report["scale"] = {
        "models": [asdict(model) for model in scale.models],
        "tokens": scale.tokens,
        "dtype": str(scale.dtype),
    }
    run = Run(scale, Arena(scale.arena_bytes, scale.dtype), began + budget_s)
    report["sections"] = run.sections
    report["arena"] = {"bytes": scale.arena_bytes, "made_in_s": time.monotonic() - began, "page_tokens": PAGE_TOKENS}
    try:
        for name, section in sections(scale.models):
            since = time.monotonic()
            run.sections[name] = {"skipped": "out of time"} if run.late() else _isolated(name, partial(section, run))
            run.sections[name]["took_s"] = round(time.monotonic() - since, 1)
            print(f"{since - began:6.1f} s  {name}: {run.sections[name]['took_s']} s", file=sys.stderr, flush=True)
            report["comparison"] = gpu_report.compare(run.sections, [model.name for model in scale.models])
            save(report)
    finally:
        run.arena.close()
    return report


def _isolated(name: str, section: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return section()
    except Exception as error:  # noqa: BLE001  # what one section runs into says nothing of the others
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget-s", type=float, default=500, help="start nothing after so many seconds (default 500)"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON (default $OUT, or bench/results with --save)")
    parser.add_argument("--save", action="store_true", help="write the report to bench/results")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it all run?")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not (arguments.tiny and os.environ.get("TRITON_INTERPRET")):
        sys.exit("bench.gpu_restore: no GPU here; TRITON_INTERPRET=1 and --tiny run it without one")
    folders = {RESULTS} if arguments.save else set()
    if out := arguments.out or os.environ.get("OUT"):
        folders.add(Path(out))

    def save(report: dict[str, Any]) -> None:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "gpu_restore.json").write_text(json.dumps(report, indent=2) + "\n")

    report = measure(SMALL if arguments.tiny else FULL, arguments.budget_s, save)
    print("\n".join(gpu_report.table(report)))
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
