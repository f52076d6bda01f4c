"""Restore and capture on a GPU: the machine's ceilings, then what the pipeline makes of them. One call does it all.

    python3 -m bench.gpu_restore [--budget-s N] [--out FOLDER] [--save] [--json]
    TRITON_INTERPRET=1 python3 -m bench.gpu_restore --tiny

Needs torch, Triton and numpy. `--tiny` runs every section on small shapes, on a CPU too; its speeds mean nothing.

Method: random bf16 weights and activations; device time between events, median of 7 rounds after 2 that warm up
(where not said otherwise), fastest and slowest beside it; products and projections 8 calls in a row, with three
weights in turns. Ceilings come from the same run. An arena of shared memory, registered with CUDA as the server
does it, holds chunks of 64-token pages; the server's own `Restorer` copies them and projects every layer into a
paged pool, chunks and slots in random order, another load each round. Time runs from issue to the event that the
forward would wait for before the last layer; `caller_ms` is how long Python was busy with it, `beside_ms` how long
four bytes took to the device that were issued right after it, as the next forward's inputs are. `ratio` is its time
over the larger of the copy's at the copy engine's rate from the same memory and the projection's at cuBLAS' rate
for products of that shape and up to 8,192 rows. Each restore is first made into pools of NaNs: of three layers, all
slots are checked for values missing or strayed, and four pages against float64; the error's norm over the values'
is compared with that of K and V made as a forward makes them. K and V stored as such must come back bit by bit.
Prefill: one decoder layer in plain torch with flash attention, in chunks of 8,192 tokens, times the number of
layers; embedding and sampling are left out. Capture: all layers of the model, with and without hooks, in turns, two
forwards in flight, of each of which four bytes are copied to the host and waited for, as SGLang does; plain
forwards are measured twice a round, which gives the noise. `host_ms` is the time a forward until the host had kept
the rows of all. The decode step's graph stages rows by kernels, as in the server, and again by copies of the
engine's. Restores are made with the copier that the server would take, and two lengths again with each of both. The
exit status is 1 where a section failed, a result is wrong, or CUDA did not register the arena.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import gpu_report
from bench.capture_cost import Bench
from bench.gpu import DEVICE, about, noise, seconds
from bench.gpu_ceilings import ceilings, copiers, numerics, projections
from bench.gpu_run import FULL, KERNELS, SMALL, Run, Scale
from bench.report import RESULTS, arguments_of, emit, out_folders, save
from bench.restore_rig import PAGE_TOKENS, Arena, Rig, pipeline_ms
from bench.toy_model import CHUNK, Layer, Model, Prefix, Weights, angles, forward
from sglang_hcache.restoring.copiers import Copier, EngineCopier, KernelCopier
from sglang_hcache.restoring.copy_engine import CopyEngine, NoCopyEngine

Sections = list[tuple[str, Callable[[Run], dict[str, Any]]]]
GRACE_S = 35  # for what has begun within the budget
COMPARED = (4096, 16384)  # tokens of the restores that are made with each copier


def overhead(run: Run) -> dict[str, Any]:
    """The caller's milliseconds for a batch of 32 layers where copier and projector do nothing."""
    return {"one_request_of_63_pages_ms": pipeline_ms(32, [63]), "7_requests_of_9_pages_ms": pipeline_ms(32, [9] * 7)}


def restores(run: Run, model: Model, *, kv: bool) -> dict[str, Any]:
    """Times by length, of hidden states or of K and V."""
    scale = run.scale
    fits = [n for n in scale.tokens if _free_bytes() > Rig.bytes_needed(model, n, scale.dtype)]
    report: dict[str, Any] = {"rows": [], "too_large": [n for n in scale.tokens if n not in fits]}
    if not fits:
        return report
    rig = Rig(run.arena, model, max(fits), scale.dtype, kv=kv)

    def measured(tokens: int, copier: Callable[[], Copier] | None = None) -> dict[str, Any]:
        rig.use(copier and copier())
        return rig.check(tokens) | rig.times(tokens)

    def row(tokens: int) -> dict[str, Any]:
        found = measured(tokens)
        found["gb_s"] = tokens * rig.bytes_a_token / found["ms"] / 1e6
        floors = None if kv else run.floors_ms(model, tokens)
        return found | (floors | {"ratio": found["ms"] / max(floors.values())} if floors else {})

    ways: dict[str, Callable[[], Copier]] = {"engine": EngineCopier, "kernel": KernelCopier}
    if not run.arena.pinned:
        ways.clear()
    else:
        try:
            CopyEngine()
        except NoCopyEngine as error:
            del ways["engine"]
            report["no_engine"] = str(error)
    report["rows"] = [{"tokens": n} | run.isolated(f"{model.name}, {n}", partial(row, n)) for n in fits]
    compared = [n for n in fits if n in COMPARED] or fits[:1]
    for name, way in ways.items():
        tried = ((n, run.isolated(f"{model.name}, {n}, {name}", partial(measured, n, way))) for n in compared)
        report[f"by {name}"] = {"rows": [{"tokens": n} | found for n, found in tried]}

    def sweep() -> dict[str, Any]:
        found = {}
        for programs, warps in KERNELS:
            rig.use(KernelCopier(programs, warps))
            found[f"{programs}x{warps}"] = rig.times(scale.sweep_tokens, rounds=5)["ms"]
        return {"by_kernel_ms": found}

    if not kv and run.arena.pinned and scale.sweep_tokens in fits:
        report["sweep"] = run.isolated(f"{model.name}, sweep", sweep)
    return report


def prefills(run: Run, model: Model) -> dict[str, Any]:
    """One layer's time times the layers."""
    dtype, layer = run.scale.dtype, Layer(Weights.random(model, run.scale.dtype))

    @torch.inference_mode()
    def row(tokens: int) -> dict[str, float]:
        prefix, x = Prefix(model, tokens, dtype), noise(tokens, model.shape.width, dtype=dtype)
        cos_sin = torch.ones(tokens, model.shape.head_dim, device=DEVICE)
        cos, sin = angles(cos_sin, torch.arange(tokens, device=DEVICE), dtype)
        took = seconds(partial(_chunked, layer, prefix, x, cos, sin), rounds=3)
        return {"ms": 1e3 * took * model.layers}

    lengths = run.scale.tokens
    return {"rows": [{"tokens": n} | run.isolated(f"{model.name}, {n}", partial(row, n)) for n in lengths]}


def _chunked(layer: Layer, prefix: Prefix, *inputs: torch.Tensor) -> None:
    prefix.length = 0
    for parts in zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True):
        forward([layer], [prefix], *parts)


def captures(run: Run, model: Model) -> dict[str, Any]:
    scale = run.scale
    bench = Bench(model, scale.dtype, chunk=scale.chunk, batch=scale.batch, context=scale.context)
    try:
        kinds: dict[str, Callable[[], dict[str, Any]]] = {
            "prefill": bench.prefill,
            "decode": bench.decode,
            "decode, staged by copies": partial(bench.decode, by_copies=True),
        }
        return {kind: run.isolated(f"capture, {kind}", measured) for kind, measured in kinds.items()}
    finally:
        bench.close()


def _free_bytes() -> int:
    if DEVICE == "cpu":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def sections(models: tuple[Model, ...]) -> Sections:
    """The most important first: what comes last is left out when time is up.

    The fused kernels come behind a model's restores, which need none without a `tuned.json`: one that hangs or
    crashes costs the rest.
    """
    first: Sections = [("ceilings", ceilings), ("overhead", overhead)]
    per_model = [
        [
            (f"restore hidden, {model.name}", partial(restores, model=model, kv=False)),
            (f"restore KV, {model.name}", partial(restores, model=model, kv=True)),
            (f"prefill, {model.name}", partial(prefills, model=model)),
        ]
        for model in models
    ]
    capture = (f"capture, {models[0].name}", partial(captures, model=models[0]))
    kernels: Sections = [("numerics", numerics), ("projection", projections)]
    return [*first, *per_model[0], capture, *kernels, *itertools.chain(*per_model[1:]), ("copiers", copiers)]


def measure(scale: Scale, budget_s: float, keep: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """All sections; `keep` has the report after each."""
    began = time.monotonic()
    torch.manual_seed(0)
    report = about(__doc__)
    report["scale"] = {
        "models": [asdict(model) for model in scale.models],
        "tokens": scale.tokens,
        "dtype": str(scale.dtype),
    }
    run = Run(scale, _arena(scale), began + budget_s)
    report["sections"] = run.sections
    report["arena"] = {
        "bytes": len(run.arena.memory),
        "pinned": run.arena.pinned,
        "took_s": run.arena.took_s,
        "page_tokens": PAGE_TOKENS,
    }
    try:
        for name, section in sections(scale.models):
            since = time.monotonic()
            run.sections[name] = run.isolated(name, partial(section, run))
            run.sections[name]["took_s"] = round(time.monotonic() - since, 1)
            print(f"{since - began:6.1f} s  {name}: {run.sections[name]['took_s']} s", file=sys.stderr, flush=True)
            report["comparison"] = gpu_report.compare(run.sections, [model.name for model in scale.models])
            keep(report)
    finally:
        run.arena.close()
    return report


def _arena(scale: Scale) -> Arena:
    """As large as CUDA takes it; on a CPU as it should be."""
    for n_bytes in (scale.arena_bytes, scale.arena_bytes // 2, scale.arena_bytes // 4):
        arena = Arena(n_bytes, scale.dtype)
        if arena.pinned or DEVICE == "cpu":
            break
    return arena


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--budget-s", type=float, default=500, help="start nothing after so many seconds (default 500)"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON, in the place of $OUT")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it all run?")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not (arguments.tiny and os.environ.get("TRITON_INTERPRET")):
        sys.exit("bench.gpu_restore: no GPU here; TRITON_INTERPRET=1 and --tiny run it without one")
    folders = [arguments.out] if arguments.out else out_folders()
    if arguments.save:
        folders.append(RESULTS)
    name = "gpu_restore_tiny" if arguments.tiny else "gpu_restore"
    scale = SMALL if arguments.tiny else FULL
    # A driver that hangs cannot be interrupted; what was measured until then is kept.
    faulthandler.dump_traceback_later(arguments.budget_s + GRACE_S, exit=True)
    report = measure(scale, arguments.budget_s, partial(save, name, folders=folders))
    emit(arguments, None, report, gpu_report.table(report))
    if gpu_report.failed(report):
        sys.exit(1)


if __name__ == "__main__":
    main()
