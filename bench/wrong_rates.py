"""Does a server that believes ten times wrong rates find back to the right plan?

    python -m bench.wrong_rates [--json] [--rounds N] [--loads N] [--model NAME] [--save]

Method: as `bench.regimes`, on slow (starved) and fast (rich) drives. A first server calibrates itself; for each of
the others the rates it has kept are replaced by ones that are 10 times too high or too low, each in the direction
that misleads in that regime. After `--loads` requests (20) the median time to first token of the next is compared
with the first server's, measured after as many loads and once more at the end; `over_right` is over the mean of the
two.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import Answer
from bench.regimes import REGIMES, Case, serving
from bench.report import about, arguments_of, emit, progress
from bench.ttft import median_s

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


def serve(case: Case, limit_gb: float, folder: Path, store: Path, loads: int) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token after so many loads, and what the server then believes."""
    with serving(case, "auto", limit_gb, folder, store=store) as contender:
        answers: list[Answer] = [contender.ask() for _ in range(2 + loads + case.rounds)]
        factors = {name: value for name, value in contender.server.tier_state().items() if name.startswith("slower_")}
    return median_s(answers[2 + loads :]), factors


def run(case: Case, loads: int, folder: Path) -> dict[str, Any]:
    with serving(case, "recompute", 0.0, folder) as plain:
        prefill_s = median_s([plain.ask() for _ in range(2 + case.rounds)][2:])
    rows, worst = [], 0.0
    for regime, wrongs in WRONG.items():
        limit_gb = case.smaller_bytes / (REGIMES[regime] * prefill_s) / 1e9
        store = folder / regime
        before_s, _ = serve(case, limit_gb, folder, store, loads)
        (kept,) = (store / "calibration").glob("*.json")
        right = json.loads(kept.read_text())
        found = []
        for wrong in wrongs:
            kept.write_text(json.dumps(spoil(right, wrong)))
            found.append((wrong, *serve(case, limit_gb, folder, store, loads)))
            progress(f"{regime}, {found[-1]}, right {before_s:.3f} s")
        kept.write_text(json.dumps(right))
        after_s, _ = serve(case, limit_gb, folder, store, loads)
        for wrong, seconds, factors in found:
            over_right = seconds / statistics.mean([before_s, after_s])
            row = {"regime": regime, "believed": wrong, "ttft_s": seconds, "factors": factors}
            rows.append(row | {"right_s": [before_s, after_s], "over_right": over_right})
            worst = max(worst, over_right)
    return {
        "rows": rows,
        "worst": worst,
        "loads": loads,
        "model": case.model,
        "recompute_s": prefill_s,
        **about(__doc__),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for row in report["rows"]:
        believed = ", ".join(f"{name} × {factor:g}" for name, factor in row["believed"].items())
        yield (
            f"{row['regime']:>8}  {believed:<30} {row['ttft_s']:6.3f} s, {row['over_right']:.2f} of the right plan's"
        )


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=LOADS)
    parser.add_argument("--model", choices=("llama", "llama_gqa"), default="llama")
    arguments = parser.parse_args()
    case = Case(arguments.model, prefix_tokens=1024, hidden_size=768, layers=6, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="hcache-wrong-rates-") as folder:
        report = run(case, arguments.loads, Path(folder))
    emit(arguments, "wrong_rates", report, lines(report))


if __name__ == "__main__":
    main()
