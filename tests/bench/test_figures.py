"""Figures in the README are those of bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.report import RESULTS
from sglang_hcache.cli.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def cells(row: str) -> list[str]:
    """Of the row of a table that begins like this."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def measured() -> Iterator[tuple[str, str]]:
    ttft, storage, prefetch, together = map(result, ("ttft", "storage", "prefetch", "together"))
    prefilled, apart = together["ratio_recompute"], together["ratio_apart"]
    seconds, stored = ttft["ttft_s"], ttft["bytes_per_token"]
    over_best = [row["auto_over_best"] for row in result("regimes")["rows"]]
    yield "TTFT, 4,096 tokens restored from host memory", f"{ttft['ratio_recompute']:.1f} × faster"
    yield "the same as K and V", f"{seconds['recompute'] / seconds['kv']:.1f} × faster"
    yield "bytes on disk per token", f"{stored['hidden'] / stored['kv']:.2f}"
    yield "TTFT of 8 requests", f"{prefilled['auto']['median']:.1f} × faster"
    yield "their TTFT as hidden states |", f"{prefilled['hidden']['median']:.1f} × faster"
    yield "their TTFT as hidden states, loaded once", f"{apart['hidden']['median']:.1f} × faster"
    yield "TTFT of `auto` over the best", f"{min(over_best):.2f}–{max(over_best):.2f}"
    yield "rate of loading pages from files", f"{prefetch['stream_ratio']['cold']:.2f}"
    yield "rate of loading pages from memory", f"{prefetch['stream_ratio']['warm']:.2f}"
    yield "rate of reading files, over that of `fio`", f"{storage['read_ratio']:.2f}"
    yield "rate of writing files, over that of `fio`", f"{storage['write_ratio']:.2f}"
    yield "rate of reading and verifying files", f"{storage['file_backend_verified_ratio']:.1f}"
    yield "rate of reading files without verifying", f"{storage['file_backend_ratio']:.1f}"


@pytest.mark.parametrize(("row", "figure"), [*measured()])
def test_what_was_measured(row: str, figure: str) -> None:
    assert cells(row)[1] == figure


@pytest.mark.parametrize(
    ("name", "workload", "row"),
    [
        ("replay_agentic", "agentic", "coding agents, [trace]"),
        ("replay", "agent", "[agent]"),
        ("replay", "rag", "[RAG]"),
        ("replay", "chat", "[chat]"),
        ("replay_azure", "azure", "Azure, [trace]"),
    ],
)
def test_replays(name: str, workload: str, row: str) -> None:
    (found,) = [one for one in result(name)["workloads"] if one["workload"] == workload]
    without, with_it = found["modes"]["none"], found["modes"]["auto"]
    assert cells(row)[1:] == [
        f"{found['calls']}, {found['prompt_tokens_mean']:,.0f}",
        f"{without['seconds']:.0f} → {with_it['seconds']:.0f} s",
        *(f"{without[f'ttft_{at}_s']:.2f} → {with_it[f'ttft_{at}_s']:.2f} s" for at in ("p50", "p90", "p99")),
        f"{cached(without)} → {cached(with_it)} of {100 * found['ideal']:.0f} %",
    ]
    assert not without["different"] + with_it["different"] + without["failed"] + with_it["failed"]


def cached(mode: dict[str, Any]) -> str:
    """Percent of the prompt tokens."""
    return f"{100 * (mode['from_device'] + mode['restored']):.0f}"


def test_what_it_costs_where_nothing_is_reused() -> None:
    (found,) = result("replay_azure")["workloads"]
    without, with_it = found["modes"]["none"], found["modes"]["auto"]
    time, cpu, ttft = (f"{with_it[name] / without[name] - 1:.0%}"[:-1] for name in ("seconds", "cpu_s", "ttft_p50_s"))
    text = " ".join(README.split())
    assert f"{time} % of the time, {cpu} % of the CPU time and {ttft} % of the median TTFT" in text
    assert f"{time} % more time (as much as runs differ), {ttft} % more median TTFT and {cpu} % more CPU time" in text


def test_what_gains_nothing() -> None:
    storage, text = result("storage"), " ".join(README.split())
    assert f"gains nothing ({result('together')['ratio_apart']['auto']['median']:.2f} ×)" in text
    read, verified = (storage["gb_s"][kind] / storage["gb_s"]["fio_read"] for kind in ("read", "verified"))
    assert f"at {read:.2f} times `fio`'s rate is without verifying, {verified:.2f} times with it" in text


def test_requests_that_come_together_by_lpm() -> None:
    kv, hidden = (result("together")["ratio_recompute_lpm"][tier]["median"] for tier in ("auto", "hidden"))
    assert f"they came to {kv:.1f} × as K and V and {hidden:.1f} × as hidden states" in " ".join(README.split())


def test_the_time_of_a_queued_request() -> None:
    measured = result("ttft")["ttft_ssd_s"]
    queued, idle = measured["queued"], measured["idle"]
    text = " ".join(README.split())
    assert f"TTFT is {queued['prefetched']:.2f} s with it and {queued['in_lookup']:.2f} s without if" in text
    assert f", and {idle['prefetched']:.2f} s and {idle['in_lookup']:.2f} s if it finds an idle server" in text


def test_the_time_of_a_plan() -> None:
    planned = result("planner")["plan_us"]
    text = " ".join((ROOT / "docs" / "planner.md").read_text().split())
    assert f": {planned['ahead']['p50']:.0f} µs, {planned['streams']['p50']:.0f} µs with streaming drives" in text


def test_the_planner_beside_single_methods() -> None:
    table, names = (ROOT / "docs" / "planner.md").read_text(), {"llama": "MHA", "llama_gqa": "GQA"}
    for row in result("regimes")["rows"]:
        name = f"{names[row['model']]}, {row['regime']}"
        figures = [row[method] for method in ("recompute", "kv", "hidden", "auto", "auto_over_best")]
        assert f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |" in table


def test_the_planners_cases_are_those_of_the_models_that_are_known() -> None:
    text = " ".join((ROOT / "docs" / "planner.md").read_text().split())
    models = sum(shape.latent is None for shape in ARCHITECTURES.values())
    cases = result("planner")["layerwise"]["cases"]
    assert re.search(rf"{cases:,} cases: the {models} models of", text)
