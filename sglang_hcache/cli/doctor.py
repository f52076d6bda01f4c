"""What servers have measured on this machine, the drives as they are now, and what limits restoring.

A server measures its model once a machine and version, and keeps the rates in the first of its directories;
`--again` has the next one measure anew. Exit status: 0; 2 bad arguments; 3 nothing was measured yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_hcache.cli.advise import limit, times
from sglang_hcache.cli.common import CommandFailed, add_common
from sglang_hcache.planner.cost import costs_of
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout
from sglang_hcache.storage.probe import read_bytes_per_s

RATES, LAYOUTS = "calibration", "layouts"  # as in sglang_hcache.calibration and .save_planner, which need SGLang
LENGTHS = (1024, 8192, 65536)  # tokens
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--again", action="store_true", help="forget the rates: the next server measures them anew")


def run(arguments: argparse.Namespace) -> int:
    folder = arguments.dir[0] / RATES
    files = sorted(folder.glob("*.json"))
    if arguments.again:
        for file in files:
            file.unlink()
        print(f"{len(files)} forgotten; the next server measures anew")
        return 0
    drives = {str(path): _drive(path) for path in arguments.dir}
    stored = arguments.dir[0] / LAYOUTS
    found = [examine(*one, _layout(stored, one[0]), len(drives)) for one in _read(files)]
    if arguments.json:
        print(json.dumps({"drives_bytes_per_s": drives, "models": found}, indent=2))
        return 0
    for path, rate in drives.items():
        print(f"{path}: reads {rate / 1e9:.2f} GB/s now" if rate else f"{path}: cannot be tried")
    if not found:
        raise CommandFailed(f"no server has measured a model yet ({folder}); --hcache-plan auto does so at its start")
    for report in found:
        _print(report)
    return 0


def _read(files: list[Path]) -> Iterator[tuple[dict[str, Any], Machine]]:
    for file in files:
        try:
            kept = json.loads(file.read_text())
            yield kept["about"], Machine(**kept["rates"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandFailed(f"{file} cannot be read ({error}); --again makes room for another") from error


def _drive(directory: Path) -> float | None:
    """Bytes a second; None where it cannot be tried."""
    try:
        return read_bytes_per_s(directory)
    except OSError:
        return None


def _layout(folder: Path, about: dict[str, Any]) -> Layout:
    """What is stored of the model; where none was planned, the smaller representation."""
    for file in folder.glob("*.json"):
        try:
            kept = json.loads(file.read_text())
            if (kept["about"]["model"], kept["about"]["page_tokens"]) == (about["model"], about["page_tokens"]):
                return Layout(0, kept["hidden"], kept["kv"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    layers = about["model"]["layers"]
    return Layout(0, layers, 0) if about["projector"] else Layout(0, 0, layers)


def examine(about: dict[str, Any], machine: Machine, layout: Layout, drives: int) -> dict[str, Any]:
    """What one file says, and what follows from it."""
    shape = ModelShape(**about["model"])
    costs, page_tokens = costs_of(shape, machine), about["page_tokens"]
    asked = argparse.Namespace(tokens=[8192], new_tokens=NEW_TOKENS, offload=0.0, layerwise=False, drives=drives)
    tiers = ("host", "ssd") if machine.ssd_bytes_per_s else ("host",)
    return {
        "about": about,
        "stored": [{"representation": kind, "layers": [first, last]} for kind, first, last in layout.ranges()],
        "rates": {name: value for name, value in vars(machine).items() if name.endswith("_per_s")},
        "times": {
            tier: [times(costs, layout, _hit(tokens // page_tokens, page_tokens, tier)) for tokens in LENGTHS]
            for tier in tiers
        },
        "limits": {tier: limit(shape, machine, tier, asked)["text"] for tier in tiers},
    }


def _hit(pages: int, page_tokens: int, tier: str) -> Hit:
    host, ssd = (pages, 0) if tier == "host" else (0, pages)
    return Hit(page_tokens, host, ssd, new_tokens=NEW_TOKENS)


def _print(report: dict[str, Any]) -> None:
    about, rates = report["about"], report["rates"]
    print(f"\n{about['model']['name']}, rank {about['rank']} of {about['ranks']}, on {about['machine']}")
    stored = ("{representation} of layers {layers[0]}-{layers[1]}".format(**one) for one in report["stored"])
    print(f"  stores {', '.join(stored)}")
    print(f"  prefill {rates['gemm_flop_per_s'] / 1e12:.3g} TFLOP/s, attention ", end="")
    print(f"{rates['attention_flop_per_s'] / 1e12:.3g}, projection {rates['projection_flop_per_s'] / 1e12:.3g}")
    print(f"  host to device {rates['bus_bytes_per_s'] / 1e9:.3g} GB/s, drives ", end="")
    print(f"{rates['ssd_bytes_per_s'] / 1e9:.3g} GB/s" if rates["ssd_bytes_per_s"] else "none")
    for tier, rows in report["times"].items():
        for row in rows:
            share = row["restored_tokens"] / row["tokens"]
            print(
                f"  {row['tokens']:>6} tokens from {tier:>4}: {row['plan_s']:.3g} s, {share:.0%} restored "
                f"(prefilled {row['recompute_s']:.3g} s)"
            )
        print(f"  {report['limits'][tier]}")
