"""Does a server that believes ten times wrong rates find back to the right plan?

    python -m bench.wrong_rates [--json] [--rounds N] [--loads N] [--model NAME] [--save]

Method: as `bench.regimes`, on slow (starved) and fast (rich) drives. A first server calibrates itself; for each of
the others the rates it has kept are replaced by ones that are 10 times too high or too low, each in the direction
that misleads in that regime. After `--loads` requests (20) the median time to first token of the next is compared
with the first server's, measured after as many loads and once more at the end; `over_right` is over the mean of the
two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.regimes import REGIMES, RESULTS, Case, serve

LOADS = 20
RATES = {
    "prefill": ("gemm_flop_per_s", "attention_flop_per_s"),
    "projection": ("projection_flop_per_s", "scatter_bytes_per_s"),
    "drive": ("ssd_bytes_per_s",),
}
WRONG = {  # regime: what is believed, times the truth
    "rich": ({"prefill": 10.0}, {"projection": 0.1}, {"drive": 0.1}),
    "starved": ({"prefill": 0.1}, {"projection": 10.0}, {"drive": 10.0}, {"prefill": 0.1, "drive": 10.0}),
}


def spoil(right: dict[str, Any], wrong: dict[str, float]) -> dict[str, Any]:
    factors = {field: factor for name, factor in wrong.items() for field in RATES[name]}
    return right | {"rates": right["rates"] | {field: right["rates"][field] * by for field, by in factors.items()}}


def run(case: Case, loads: int, folder: Path) -> dict[str, Any]:
    plain = serve(case, "recompute", None, folder)
    rows, worst = [], 0.0
    for regime, wrongs in WRONG.items():
        limit_gb = case.smaller_bytes / (REGIMES[regime] * plain.ttft_s) / 1e9
        store = folder / regime
        first = serve(case, "auto", limit_gb, folder, store=store, loads=loads)
        (kept,) = (store / "calibration").glob("*.json")
        right = json.loads(kept.read_text())
        found = []
        for wrong in wrongs:
            kept.write_text(json.dumps(spoil(right, wrong)))
            served = serve(case, "auto", limit_gb, folder, store=store, loads=loads)
            found.append((wrong, served))
            _progress(f"{regime}, {wrong}: {served.ttft_s:.3f} s, right {first.ttft_s:.3f} s")
        kept.write_text(json.dumps(right))
        again = serve(case, "auto", limit_gb, folder, store=store, loads=loads)
        right_s = statistics.mean([first.ttft_s, again.ttft_s])
        for wrong, served in found:
            factors = {name: value for name, value in served.state.items() if name.startswith("slower_")}
            row = {"regime": regime, "believed": wrong, "ttft_s": served.ttft_s, "factors": factors}
            rows.append(row | {"right_s": [first.ttft_s, again.ttft_s], "over_right": served.ttft_s / right_s})
            worst = max(worst, served.ttft_s / right_s)
    return {
        "rows": rows,
        "worst": worst,
        "loads": loads,
        "model": case.model,
        "recompute_s": plain.ttft_s,
        "machine": {"cores": os.cpu_count()},
        "date": datetime.date.today().isoformat(),
        "method": " ".join((__doc__ or "").split("Method: ")[1].split()),
    }


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=LOADS)
    parser.add_argument("--model", choices=("llama", "llama_gqa"), default="llama")
    parser.add_argument("--save", action="store_true", help="write the report to bench/results/wrong_rates.json")
    arguments = parser.parse_args()
    case = Case(arguments.model, prefix_tokens=1024, hidden_size=768, layers=6, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="hcache-wrong-rates-") as folder:
        report = run(case, arguments.loads, Path(folder))
    if arguments.save:
        (RESULTS / "wrong_rates.json").write_text(json.dumps(report, indent=2) + "\n")
    for row in report["rows"]:
        believed = ", ".join(f"{name} × {factor:g}" for name, factor in row["believed"].items())
        print(
            f"{row['regime']:>8}  {believed:<30} {row['ttft_s']:6.3f} s, {row['over_right']:.2f} of the right plan's"
        )
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
