"""What the machine and the kernels can do by themselves: the first sections of `bench.gpu_restore`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.exactness import check, is_right, pool_of, projections_in_turns
from bench.gpu import DEVICE, capability, device_copy_gb_s, host_to_device_gb_s, noise, seconds
from bench.gpu_run import KERNELS, Run, Scale
from bench.kernels import CALLS
from bench.toy_model import CHUNK, Model
from sglang_hcache.restoring.copiers import Copier, EngineCopier, KernelCopier
from sglang_hcache.restoring.copy_engine import NoCopyEngine
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.triton_kernels.project_kv import project_kv
from sglang_hcache.triton_kernels.tuning import Fused, candidates

PAGE_BYTES = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
STEP_BYTES = 64 << 20  # as a restore copies at once


def ceilings(run: Run) -> dict[str, Any]:
    """GB/s, and milliseconds of one layer's product. Torch alone: no kernel of ours can spoil them."""
    n_bytes, memory = run.scale.copy_bytes, run.arena.memory
    target = torch.empty(n_bytes, dtype=torch.uint8, device=DEVICE)
    parts = itertools.cycle(memory[: len(memory) // n_bytes * n_bytes].view(-1, n_bytes).unbind(0))
    page = min(512 << 10, n_bytes)
    engine_s = seconds(lambda: target.copy_(next(parts), non_blocking=True))
    pieces = list(zip(target.split(page), memory[:n_bytes].split(page), strict=True))

    def page_by_page() -> None:
        for into, piece in pieces:
            into.copy_(piece, non_blocking=True)

    return {
        "registered": run.arena.pinned,
        "pinned_gb_s": host_to_device_gb_s(n_bytes),
        "registered_gb_s": n_bytes / engine_s / 1e9,
        "registered_by_pages_gb_s": n_bytes / seconds(page_by_page, rounds=3) / 1e9,
        "device_copy_gb_s": device_copy_gb_s(n_bytes),
        "gemm": {
            model.name: [_product(model, n, run.scale) for n in _gemm_rows(run.scale)] for model in run.scale.models
        },
    }


def copiers(run: Run) -> dict[str, Any]:
    """GB/s of each way to copy pages of the arena, by their size; scattered pages, others each time."""
    if not run.arena.pinned:
        return {"skipped": "needs a GPU that has taken the memory"}
    ways: dict[str, Callable[[], Copier]] = {"engine": EngineCopier}
    ways |= {f"kernel {programs}x{warps}": partial(KernelCopier, programs, warps) for programs, warps in KERNELS}
    found: dict[str, Any] = {"gb_s": {page_bytes: {} for page_bytes in PAGE_BYTES}}
    for page_bytes, (name, way) in itertools.product(PAGE_BYTES, ways.items()):
        try:
            found["gb_s"][page_bytes][name] = _copying_gb_s(run, way(), page_bytes)
        except NoCopyEngine as error:
            found["no_engine"] = str(error)
    return found


def _copying_gb_s(run: Run, copier: Copier, page_bytes: int) -> float:
    memory = run.arena.chunks(page_bytes)
    stored = HostPages(memory, np.zeros((0, 0), np.int32), [StoredLayer(0, page_bytes, torch.uint8, None)])  # type: ignore[arg-type]
    pages = min(STEP_BYTES // page_bytes, len(memory))
    target = torch.empty(1, pages, page_bytes, dtype=torch.uint8, device=DEVICE)
    picks = [copier.places(stored, torch.randperm(len(memory))[:pages].tolist()) for _ in range(8)]
    places = itertools.cycle([pick.to(copier.indexed_on) for pick in picks])
    side = torch.cuda.Stream()

    def copy() -> None:  # on a stream of its own, as in a restore: the engine's function refuses the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copier.copy(stored, range(1), next(places), target)
        torch.cuda.current_stream().wait_stream(side)

    return target.nbytes / seconds(copy) / 1e9


def _gemm_rows(scale: Scale) -> list[int]:
    return sorted({min(tokens, CHUNK) for tokens in scale.tokens})


def _product(model: Model, tokens: int, scale: Scale) -> dict[str, float]:
    """cuBLAS on the rows of one step."""
    projections = projections_in_turns(model.shape, scale.dtype)
    rows = noise(tokens, model.shape.width, dtype=scale.dtype)
    out = rows.new_empty(tokens, next(projections).columns)
    took = seconds(lambda: torch.mm(rows, next(projections).weight.T, out=out), calls=CALLS)
    flops = 2 * tokens * model.shape.width * out.shape[1]
    return {"tokens": tokens, "ms": 1e3 * took, "tflop_s": flops / took / 1e12}


def projections(run: Run) -> dict[str, Any]:
    """`project_kv` in all forms that are right, beside the product alone; `ratio`: its time over the best form's."""
    return {
        model.name: run.isolated(f"projection, {model.name}", partial(_projections, run, model))
        for model in run.scale.models
    }


def _projections(run: Run, model: Model) -> dict[str, Any]:
    checked = zip(_forms(model), run.sections["numerics"][model.name], strict=True)
    forms = [form for form, errors in checked if is_right(errors)]
    if not forms:
        raise RuntimeError(f"no form is right for {model.name}")
    tried = (
        (n, run.isolated(f"projection, {model.name}, {n}", partial(_projection, run, model, n, forms)))
        for n in _gemm_rows(run.scale)
    )
    return {"rows": [{"tokens": n} | found for n, found in tried]}


def _projection(run: Run, model: Model, tokens: int, forms: list[Fused | None]) -> dict[str, Any]:
    """Without a ratio where no form could be timed."""
    dtype = run.scale.dtype
    projections = projections_in_turns(model.shape, dtype)
    rows = noise(tokens, model.shape.width, dtype=dtype)
    slots, positions = torch.randperm(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE)
    pool = pool_of(model.shape, tokens, dtype)
    product_ms = _product(model, tokens, run.scale)["ms"]

    def timed(form: Fused | None) -> dict[str, float]:
        def project() -> None:
            project_kv(rows, next(projections), positions, slots, *pool, fused=form)

        return {"ms": 1e3 * seconds(project, calls=CALLS)}

    times = [
        {"fused": asdict(form) if form else None}
        | run.isolated(f"projection, {model.name}, {tokens}, {form}", partial(timed, form))
        for form in forms
    ]
    best_ms = min((form["ms"] for form in times if "ms" in form), default=None)
    return {"product_ms": product_ms, "forms": times} | ({"ratio": product_ms / best_ms} if best_ms else {})


def numerics(run: Run) -> dict[str, Any]:
    """Both forms of the projection against float64, beside the forward's own way; into pools of NaNs."""
    n = run.scale.checked_tokens
    return {
        model.name: [
            {"fused": asdict(form) if form else None}
            | run.isolated(f"numerics, {model.name}, {form}", partial(check, model.shape, form, n, run.scale.dtype))
            for form in _forms(model)
        ]
        for model in run.scale.models
    }


def _forms(model: Model) -> list[Fused | None]:
    return [None, *candidates(model.shape.head_dim, capability())]
