"""Show the rates that servers measured on this machine, the drives' read rates now, and what limits restoring.

A server measures each model at its first start and keeps the rates in its first directory. While it serves, it keeps
rates that have changed by more than 1.2 times for the next start. `--again` makes the next server measure again.
Exit status: 0; 2 bad arguments; 3 nothing has been measured (--hcache-plan always measures nothing).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_hcache import __version__
from sglang_hcache.cli.common import CommandFailed, add_common, explain, print_json
from sglang_hcache.cli.forecast import hit_of, limit, stored_line, times
from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Layout
from sglang_hcache.startup.kept import CALIBRATION, KeptLayout
from sglang_hcache.storage.probe import measure_read_rate

LENGTHS = (1024, 8192, 65536)  # tokens
PLANNED = 8192  # tokens that limits are told for
NEW_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """What a server has kept of one model."""

    about: dict[str, Any]
    shape: ModelShape
    machine: Machine

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Measured:
        """Raises KeyError, TypeError or ValueError."""
        measured = cls(kept["about"], ModelShape(**kept["about"]["model"]), Machine(**kept["rates"]))
        if missing := {"machine", "rank", "ranks", "page_tokens"} - measured.about.keys():
            raise KeyError(*missing)
        return measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--again", action="store_true", help="delete the kept rates: the next server measures again")


def run(arguments: argparse.Namespace) -> int:
    folder = arguments.dir[0] / CALIBRATION
    files = sorted(folder.glob("*.json"))
    if arguments.again:
        if not files:
            raise CommandFailed(f"there is nothing to forget ({folder}): give the server's --hcache-dir with --dir")
        return _forget(files, as_json=arguments.json)
    tried = {str(path): _drive(path) for path in arguments.dir}
    drives = {path: rate if isinstance(rate, float) else None for path, rate in tried.items()}
    measured, skipped = _read(files)
    found = [examine(one, _layout(arguments.dir[0], one), len(drives)) for one in measured]
    for file, why in skipped.items():
        print(f"{file}: left out ({why})", file=sys.stderr)
    if arguments.json:
        print_json({"drives_bytes_per_s": drives, "models": found, "skipped": skipped})
    else:
        for path, rate in tried.items():
            now = f"reads {rate / 1e9:.2f} GB/s now" if isinstance(rate, float) else f"cannot be measured ({rate})"
            print(f"{path}: {now}")
        for report in found:
            _print(report)
    if not found:
        raise CommandFailed(f"no server has measured a model yet ({folder}); --hcache-plan auto does so at its start")
    return 0


def _forget(files: list[Path], *, as_json: bool) -> int:
    for file in files:
        file.unlink(missing_ok=True)
    if as_json:
        print_json({"forgotten": len(files)})
    else:
        print(f"{len(files)} forgotten; the next server measures again")
    return 0


def _read(files: list[Path]) -> tuple[list[Measured], dict[str, str]]:
    """What servers of this version have kept; and by file, why others are left out."""
    found, skipped = [], {}
    for file in files:
        try:
            kept = json.loads(file.read_text())
            if (version := kept["about"]["version"]) != __version__:
                skipped[str(file)] = f"measured by version {version}"
            else:
                found.append(Measured.of(kept))
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped[str(file)] = f"it has no {error}" if isinstance(error, KeyError) else explain(error)
    return found, skipped


def _drive(directory: Path) -> float | str:
    """Bytes a second, or why it cannot be measured."""
    try:
        return measure_read_rate(directory)
    except OSError as error:
        return error.strerror or str(error)


def _layout(directory: Path, measured: Measured) -> Layout:
    """What is stored of the model; where none was planned, the smaller representation."""
    about, shape = measured.about, measured.shape
    hidden = shape.stored_hidden_bytes or None
    kv = shape.stored_kv_bytes // shape.kv_shares(about["ranks"])  # of one rank
    kept = KeptLayout(directory, shape, about["page_tokens"], hidden_bytes=hidden, kv_bytes=kv)
    if not about.get("prefetcher") and (planned := kept.read()) is not None:
        return planned
    smaller = about.get("projector") and shape.hidden_bytes < shape.kv_bytes * shape.kv_copies(about["ranks"])
    return Layout(0, shape.layers, 0) if smaller else Layout(0, 0, shape.layers)


def examine(measured: Measured, layout: Layout, drives: int) -> dict[str, Any]:
    """What one file says, and what follows from it."""
    about, shape, machine = measured.about, measured.shape, measured.machine
    costs, page_tokens = costs_of(shape, machine), about["page_tokens"]
    lower = machine.lower_tier
    tiers = ["host", lower.name] if lower.bytes_per_s else ["host"]
    return {
        "about": about,
        "stored": [{"representation": kind, "layers": [first, last]} for kind, first, last in layout.ranges()],
        "rates": {
            name: value if math.isfinite(value) else None  # None: no cost
            for name, value in vars(machine).items()
            if name.endswith("_per_s")
        },
        "times": {
            tier: [times(costs, layout, hit_of(tokens, tier, NEW_TOKENS, page_tokens)) for tokens in LENGTHS]
            for tier in tiers
        },
        "limits": {
            tier: limit(
                shape,
                machine,
                [hit_of(PLANNED, tier, NEW_TOKENS, page_tokens)],
                tier=tier,
                drives=drives,
                hidden=bool(about.get("projector")),
            )["text"]
            for tier in tiers
        },
    }


def _print(report: dict[str, Any]) -> None:
    about, rates = report["about"], report["rates"]
    print(f"\n{about['model']['name']}, rank {about['rank']} of {about['ranks']}, on {about['machine']}")
    for one in report["stored"]:
        print(stored_line(one["representation"], *one["layers"]))
    print(f"  prefill {rates['gemm_flop_per_s'] / 1e12:.3g} TFLOP/s, attention ", end="")
    print(f"{rates['attention_flop_per_s'] / 1e12:.3g}, projection {rates['projection_flop_per_s'] / 1e12:.3g}")
    print(f"  host to device {rates['bus_bytes_per_s'] / 1e9:.3g} GB/s, ", end="")
    if rates["remote_bytes_per_s"]:
        print(f"the prefetcher's host {rates['remote_bytes_per_s'] / 1e9:.3g} GB/s")
    else:
        print("drives", f"{rates['ssd_bytes_per_s'] / 1e9:.3g} GB/s" if rates["ssd_bytes_per_s"] else "none")
    for tier, rows in report["times"].items():
        for row in rows:
            share = row["restored_tokens"] / row["tokens"]
            print(
                f"  {row['tokens']:>6} tokens from {tier:>6}: {row['plan_s']:.3g} s, {share:.0%} restored "
                f"(prefilled {row['recompute_s']:.3g} s)"
            )
        print(f"  {report['limits'][tier]}")
