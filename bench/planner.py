"""What planning costs, what head starts gain, and what two other ways of restoring would.

    python -m bench.planner [--json] [--save]

Method: `plan_us`: `plan_load` of a hit of 131,072 tokens (2,048 pages, half of them on SSD), each with other new
tokens; median and 99th percentile of the thread's CPU time in 3,000 calls. `save_ms`: `plan_save`, median of 20.
`layerwise`: for every model of the table on five GPUs with 0 (host memory), 1 and 4 drives of 7 GB/s and hits of 2K,
8K, 32K and 128K tokens, the time of the plan that splits tokens over that of the plan that may also leave the first
layers to be recomputed, each with the layout made for that hit. `streams`: likewise, drives that are read before the
pass starts over drives that feed it layer by layer; `layerwise_streams`: `layerwise` with such drives. `head_start`:
likewise, drives that are read before the pass over those beside which an idle engine prefills the first tokens. The
last four are the cost model's word, not a measurement of a server.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.report import about, arguments_of, emit
from sglang_hcache.cli.architectures import ARCHITECTURES
from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_head_start, plan_load
from sglang_hcache.planner.machine import machine_of
from sglang_hcache.planner.save import plan_save
from sglang_hcache.planner.timeline import Hit, Layout

PAGE_TOKENS = 64
COMPARED = ("A10G", "L40S", "A100-80", "H100", "B200")
LENGTHS = [2048, 8192, 32768, 131072]
DRIVE_BYTES_PER_S = 7e9
MATTERS = 1.05
CALLS = 3000


def measure_planning() -> dict[str, Any]:
    report: dict[str, Any] = {}
    for streams in (False, True):
        machine = machine_of("A100-80", drives=4, drive_bytes_per_s=DRIVE_BYTES_PER_S, streams=streams)
        costs = costs_of(ARCHITECTURES["Llama-2-7B"], machine)
        times = []
        for call in range(CALLS):
            hit = Hit(PAGE_TOKENS, 1024, 1024, new_tokens=1 + call)
            began = time.thread_time()
            plan_load(costs, Layout(0, 30, 2), hit)
            times.append(1e6 * (time.thread_time() - began))
        cut = statistics.quantiles(times, n=100)
        report["streams" if streams else "ahead"] = {"p50": cut[49], "p99": cut[98]}
    times = []
    for _ in range(20):
        began = time.thread_time()
        plan_save(costs, Hit(PAGE_TOKENS, 128))
        times.append(1e3 * (time.thread_time() - began))
    return {"plan_us": report, "save_ms": statistics.median(times)}


def cases() -> Iterator[tuple[str, Costs, Hit]]:
    for model, shape in ARCHITECTURES.items():
        if shape.latent is not None:
            continue
        for gpu in COMPARED:
            for drives in (0, 1, 4):
                costs = costs_of(shape, machine_of(gpu, drives=drives, drive_bytes_per_s=DRIVE_BYTES_PER_S))
                for tokens in LENGTHS:
                    pages = tokens // PAGE_TOKENS
                    hit = Hit(PAGE_TOKENS, 0, pages) if drives else Hit(PAGE_TOKENS, pages)
                    where = f"{drives} drive{'s' if drives > 1 else ''}" if drives else "host memory"
                    yield f"{model} on {gpu}, {tokens} tokens from {where}", costs, replace(hit, new_tokens=64)


def planned_s(costs: Costs, hit: Hit, *, layerwise: bool) -> float:
    layout = plan_save(costs, hit, layerwise=layerwise).layout
    return plan_load(costs, layout, hit).seconds


def compare() -> dict[str, Any]:
    """Gains (times faster) over all cases."""
    layerwise, streams, both = dict[str, float](), dict[str, float](), dict[str, float]()
    head_start = dict[str, float]()
    for name, costs, hit in cases():
        now_s = planned_s(costs, hit, layerwise=False)
        layerwise[name] = now_s / planned_s(costs, hit, layerwise=True)
        if hit.lower_pages:
            streaming = replace(costs, streams=True)
            streamed_s = planned_s(streaming, hit, layerwise=False)
            streams[name] = now_s / streamed_s
            ahead = plan_head_start(costs, plan_save(costs, hit, layerwise=False).layout, hit)
            head_start[name] = now_s / ahead.seconds if ahead is not None else 1.0
            both[name] = streamed_s / planned_s(streaming, hit, layerwise=True)
    gains = {"layerwise": layerwise, "head_start": head_start, "streams": streams, "layerwise_streams": both}
    return {name: summary(gain) for name, gain in gains.items()}


def summary(gains: dict[str, float]) -> dict[str, Any]:
    best = max(gains, key=lambda name: gains[name])
    return {
        "cases": len(gains),
        "cases_5_percent_faster": sum(gain >= MATTERS for gain in gains.values()),
        "median": statistics.median(gains.values()),
        "greatest": gains[best],
        "greatest_case": best,
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for kind, found in report["plan_us"].items():
        yield f"planning 128K tokens ({kind}): {found['p50']:.0f} us, 99 % within {found['p99']:.0f} us"
    yield f"planning what to store: {report['save_ms']:.1f} ms"
    for kind in ("layerwise", "head_start", "streams", "layerwise_streams"):
        one = report[kind]
        yield (
            f"{kind}: 5 % faster in {one['cases_5_percent_faster']} of {one['cases']} cases, median "
            f"{one['median']:.2f}×, at most {one['greatest']:.2f}× ({one['greatest_case']})"
        )


def main() -> None:
    arguments = arguments_of(__doc__).parse_args()
    report = {
        **measure_planning(),
        **compare(),
        **about(__doc__),
    }
    emit(arguments, "planner", report, lines(report))


if __name__ == "__main__":
    main()
