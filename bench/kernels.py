"""The kernels: what they compile to, and on a GPU whether they are right and how fast they are.

    python -m bench.kernels --compile-only [--json] [--save]
    python -m bench.kernels [--json] [--save] [--tune]

Method: `--compile-only` needs no GPU: every kernel in every configuration is compiled for sm_80, sm_90 and sm_100;
registers, shared memory and spills are what cuobjdump reads in the machine code; a failure or a spill makes the exit
status 1. On a GPU: for each model's shape and number of tokens, random bf16 inputs; the projection's forms are first
compared with float64 on 1,100 tokens, into poisoned pools, by the norm of K's error over K's norm (and V alike),
beside the same error of K and V made as a forward makes them, and of torch's own matrix product; a form with more
than 1.5 times the one, or 1.5 times the other and 2^-8, or with elements missing or strayed, is `wrong`, is not
timed, and makes the exit status 1. Then the product alone (cuBLAS, `mm` with `out`), cuBLAS and the second kernel,
and the fused kernels in each configuration are timed between events, 8 calls in a row that are issued while the
device is kept busy, so that launches do not count; median of 7 after 2 that warm up. `ratio` is the product's time
over the form's: 1.0 means that norm, RoPE and scatter cost nothing. cuBLAS' form works on parts of the rows;
`whole_ms` is the same in one part. Three weights are used in turns, so that none stays in the L2 cache, as in a
restore. `launched` is what Triton compiled for this GPU, registers and spills as the driver counts them. `--tune`
writes which form was fastest to triton_kernels/tuned.json. Both files are written after each model, and to $OUT, too,
if that is set.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from bench.exactness import CHECKED_TOKENS, check, is_right, pool_of, projections_in_turns
from bench.gpu import DEVICE, about, capability, noise, seconds
from bench.report import arguments_of, emit, out_folders, save
from sglang_hcache.triton_kernels.aot import modules_with_kernels, reports
from sglang_hcache.triton_kernels.project_kv import project_kv
from sglang_hcache.triton_kernels.tuning import SHAPES, TABLE, Fused, Shape, candidates

TOKENS = (64, 256, 1024, 4096, 16384)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # Triton's interpreter rounds to no bf16: it cuts
CALLS = 8 if DEVICE == "cuda" else 1


def compile_all() -> dict[str, Any]:
    """Raises RuntimeError where Triton's interpreter stands in the compiler's place."""
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be compiled")
    records = []
    for record in reports(modules_with_kernels()):
        print(f"sm_{record['capability']} {record['module']}: {record['name']}", file=sys.stderr)
        records.append(record)
    failed = [record for record in records if "error" in record]
    return {
        "compiled": len(records) - len(failed),
        "failed": len(failed),
        "spills": sum(record["spills"] > 0 for record in records if "error" not in record),
        "configurations": records,
        "triton": triton.__version__,
    }


def launched() -> list[dict[str, Any]]:
    """What was compiled of each kernel that has run in this process, with what the driver says of its registers."""
    values = [value for name in modules_with_kernels() for value in vars(importlib.import_module(name)).values()]
    kernels = {id(value): value for value in values if isinstance(value, JITFunction)}
    return [
        {
            "kernel": kernel.__name__,
            "constants": ", ".join(
                f"{kernel.arg_names[place]}={value}" for (place, *_), value in compiled.src.constants.items()
            ),
            "num_warps": compiled.metadata.num_warps,
            "num_stages": compiled.metadata.num_stages,
            "shared_bytes": compiled.metadata.shared,
            "registers": getattr(compiled, "n_regs", None),  # where it could not be loaded, there is none
            "spills": getattr(compiled, "n_spills", None),
        }
        for kernel in kernels.values()
        for compiled_kernels, *_ in kernel.device_caches.values()
        for compiled in compiled_kernels.values()
    ]


def _check(shape: Shape, form: Fused | None) -> dict[str, Any]:
    """As `check`, or why the form cannot be checked: the others still can."""
    try:
        return check(shape, form, CHECKED_TOKENS, DTYPE)
    except Exception as error:  # noqa: BLE001
        print(f"{form}: {type(error).__name__}: {error}", file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"}


def measure(shape: Shape, tokens: int, forms: Sequence[Fused | None]) -> dict[str, Any]:
    """Times in milliseconds, and each form's ratio to the matrix product alone."""
    projections, rows = projections_in_turns(shape, DTYPE), noise(tokens, shape.width, dtype=DTYPE)
    slots, positions = torch.randperm(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE)
    pool = pool_of(shape, tokens, DTYPE)
    workspace = rows.new_empty(tokens, next(projections).columns)

    def project(**how: Any) -> None:
        project_kv(rows, next(projections), positions, slots, *pool, **how)

    product_s = seconds(lambda: torch.mm(rows, next(projections).weight.T, out=workspace), calls=CALLS)
    took = {form: seconds(partial(project, fused=form), calls=CALLS) for form in forms}
    whole_s = seconds(partial(project, workspace=workspace), calls=CALLS)
    best = min(took, key=took.__getitem__)
    flops = 2 * tokens * shape.width * workspace.shape[1]
    return {
        "tokens": tokens,
        "product_ms": 1e3 * product_s,
        "product_tflop_s": flops / product_s / 1e12,
        "ratio": product_s / took[best],
        "best": asdict(best) if best else None,
        "whole_ms": 1e3 * whole_s,
        "forms": [
            {"fused": asdict(form) if form else None, "ms": 1e3 * s, "ratio": product_s / s}
            for form, s in took.items()
        ],
    }


def on_gpu(
    tokens: tuple[int, ...] = TOKENS,
    shapes: dict[str, Shape] = SHAPES,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """All shapes; `keep` has the report after each."""
    report: dict[str, Any] = {"models": {}, "errors": {}, **about(__doc__)}
    for shape, model in {shape: model for model, shape in shapes.items()}.items():
        forms: list[Fused | None] = [None, *candidates(shape.head_dim, capability())]
        errors = {form: _check(shape, form) for form in forms}
        right = [form for form in forms if is_right(errors[form])]
        report["errors"][model] = [
            {"fused": asdict(form) if form else None, "wrong": form not in right} | errors[form] for form in forms
        ]
        rows = list[dict[str, Any]]()
        report["models"][model] = {"shape": asdict(shape), "rows": rows}
        try:
            rows += (measure(shape, n, right) for n in tokens if right)
        except Exception as error:  # noqa: BLE001 - the other models are measured all the same
            report["models"][model]["error"] = f"{type(error).__name__}: {error}"
        print(f"{model}: {[round(row['ratio'], 3) for row in rows]}", file=sys.stderr)
        keep(report)
    report["launched"] = launched()
    keep(report)
    return report


def table(report: dict[str, Any], known: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What `tuning.choose` reads; known: entries that stay, where the report has none for their GPU and shape."""
    measured = [
        {
            "capability": report["machine"]["capability"],
            "shape": model["shape"],
            "rows": [{"tokens": row["tokens"], "fused": row["best"]} for row in model["rows"]],
        }
        for model in report["models"].values()
        if model["rows"] and "error" not in model
    ]
    replaced = [(entry["capability"], entry["shape"]) for entry in measured]
    return {"entries": [*(e for e in known if (e["capability"], e["shape"]) not in replaced), *measured]}


def write(report: dict[str, Any], *, results: bool, tuned: bool) -> None:
    """What there is so far."""
    if results:
        save("kernels_gpu", report)
    if tuned:
        known = json.loads(TABLE.read_text())["entries"] if TABLE.exists() else []
        save(TABLE.stem, table(report, known), [TABLE.parent, *out_folders()])


def lines(report: dict[str, Any]) -> Iterator[str]:
    for model, found in report["models"].items():
        cells = "  ".join(f"{row['tokens']}: {row['ratio']:.2f}" for row in found["rows"])
        yield f"{model:>12}  {cells}   of the matrix product's throughput"
    spilling = sum(bool(kernel["spills"]) for kernel in report["launched"])
    yield f"{len(report['launched'])} kernels by Triton {report['versions']['triton']}, {spilling} spill"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--compile-only", action="store_true", help="compile everything; needs no GPU")
    parser.add_argument("--tune", action="store_true", help="write the fastest forms to triton_kernels/tuned.json")
    arguments = parser.parse_args()
    if arguments.compile_only:
        report = compile_all() | about(__doc__)
        line = f"{report['compiled']} compiled, {report['failed']} failed, {report['spills']} spill"
        emit(arguments, "kernels_compiled", report, [line])
    elif DEVICE == "cpu":
        sys.exit("bench.kernels: no GPU here; --compile-only needs none")
    else:
        report = on_gpu(keep=partial(write, results=arguments.save, tuned=arguments.tune))
        emit(arguments, None, report, lines(report))
    if report.get("failed") or report.get("spills"):
        sys.exit("bench.kernels: not all configurations compile without spills")
    if failed := [model for model, found in report.get("models", {}).items() if "error" in found]:
        sys.exit(f"bench.kernels: {', '.join(failed)} could not be measured")
    if wrong := sum(form["wrong"] for forms in report.get("errors", {}).values() for form in forms):
        sys.exit(f"bench.kernels: {wrong} forms are wrong")


if __name__ == "__main__":
    main()
