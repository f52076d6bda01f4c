"""Is the planner ever the worse choice? Time to first token by each method, from drives slow, middling and fast.

    python -m bench.regimes [--json] [--rounds N] [--prefix-tokens N] [--hidden-size N] [--layers N] [--save]

Method: an MHA and a GQA Llama in float32 are served with an evicted prefix on disk only: the KV pool holds one
conversation and a little more, two take turns, and device and host memory are emptied before each request. Reading is
limited (`--hcache-read-limit`) so that the smaller representation of the whole prefix takes 4 times (starved), once
(balanced), or a tenth (rich) of what prefilling it takes, as measured on the server without a tier in the same run.
`hidden` and `kv` restore all of it (`--hcache-plan always`), `auto` is the server as it comes; every request asks for
its prefix and 64 tokens never seen before, so `recompute` is prefilling both. Medians over the rounds, after two
requests of each server that fill the store and two that are not counted. `worst_auto` is the largest ratio of auto's
median to the best method's. Answers are compared with recompute's token by token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Answer, ModelSpec, Server, compare, make_model, random_prompt
from bench.ttft import wait_until_written

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS = 64
ANSWER_TOKENS = 4
PAGE_TOKENS = 64
UNCOUNTED = 2
METHODS = ("hidden", "kv", "auto")
REGIMES = {"starved": 4.0, "balanced": 1.0, "rich": 0.1}  # reading time over prefilling time


@dataclass(frozen=True)
class Case:
    model: str
    prefix_tokens: int
    hidden_size: int
    layers: int
    rounds: int

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            self.model,
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.hidden_size // 64,
            intermediate=self.hidden_size * 11 // 4,
            max_position_embeddings=2 * self.prefix_tokens,
        )

    @property
    def smaller_bytes(self) -> int:
        """Of the prefix, as hidden states or as K and V."""
        kv = 2 * self.spec.num_kv_heads * self.spec.head_dim
        return min(kv, self.hidden_size) * 4 * self.layers * self.prefix_tokens

    def prompt(self, request: int) -> list[int]:
        return random_prompt(self.prefix_tokens, seed=request % 2) + random_prompt(NEW_TOKENS, seed=1000 + request)


@dataclass(frozen=True)
class Served:
    answers: list[Answer]
    state: dict[str, Any]

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)


def serve(
    case: Case,
    method: str,
    limit_gb: float | None,
    folder: Path,
    *,
    store: Path | None = None,
    loads: int = UNCOUNTED,
) -> Served:
    """The counted answers, after `loads` that are not; with a store of its own, if none is given."""
    pool_tokens = -(-(case.prefix_tokens + NEW_TOKENS + ANSWER_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS + 256
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(pool_tokens), "--sleep-on-idle"]
    tiered = method != "recompute"
    with tempfile.TemporaryDirectory(dir=folder) as own:
        if tiered:
            args += ["--hicache-backend", "hcache", "--hcache-dir", str(store or own), "--hicache-ratio", "4"]
            args += ["--hicache-storage-prefetch-policy", "wait_complete", "--hcache-read-limit", str(limit_gb)]
        if method in ("hidden", "kv"):
            args += ["--hcache-plan", "always", "--hcache-representation", method]
        with Server(
            make_model(folder / case.model, case.spec), args, log=folder / f"{case.model}-{method}.log"
        ) as server:
            answers = []
            for request in range(2 + loads + case.rounds):
                if tiered:
                    wait_until_written(server)
                if request >= 2:
                    server.flush_cache()
                answers.append(server.generate(case.prompt(request), ANSWER_TOKENS))
            state = server.server_info()["internal_states"][0]["hcache"] if tiered else {}
    return Served(answers[2 + loads :], state)


def run(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    equal = True
    for case in cases:
        plain = serve(case, "recompute", None, folder)
        _progress(f"{case.model}: prefilled in {plain.ttft_s:.2f} s")
        for regime, reading in REGIMES.items():
            limit_gb = case.smaller_bytes / (reading * plain.ttft_s) / 1e9
            served = {method: serve(case, method, limit_gb, folder) for method in METHODS}
            seconds = {"recompute": plain.ttft_s} | {method: found.ttft_s for method, found in served.items()}
            for found in served.values():
                equal &= all(compare(*pair).same_tokens for pair in zip(found.answers, plain.answers, strict=True))
            best = min(value for method, value in seconds.items() if method != "auto")
            restored = statistics.mean(answer.cached_host for answer in served["auto"].answers) / case.prefix_tokens
            rows.append(
                {
                    "regime": regime,
                    "model": case.model,
                    **seconds,
                    "auto_over_best": seconds["auto"] / best,
                    "auto_restored": restored,
                    "read_limit_gb_s": limit_gb,
                    "factors": {k: v for k, v in served["auto"].state.items() if k.startswith("slower_")},
                }
            )
            _progress(json.dumps(rows[-1]))
    return {
        "rows": rows,
        "worst_auto": max(row["auto_over_best"] for row in rows),
        "tokens_equal": equal,
        "prefix_tokens": cases[0].prefix_tokens,
        "rounds": cases[0].rounds,
        "machine": {"cores": os.cpu_count()},
        "date": datetime.date.today().isoformat(),
        "method": " ".join((__doc__ or "").split("Method: ")[1].split()),
    }


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="append", choices=("llama", "llama_gqa"), help="default: both")
    parser.add_argument("--save", action="store_true", help="write the report to bench/results/regimes.json")
    arguments = parser.parse_args()
    sizes = arguments.prefix_tokens, arguments.hidden_size, arguments.layers, arguments.rounds
    cases = [Case(model, *sizes) for model in arguments.model or ("llama", "llama_gqa")]
    with tempfile.TemporaryDirectory(prefix="hcache-regimes-") as folder:
        report = run(cases, Path(folder))
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "regimes.json").write_text(json.dumps(report, indent=2) + "\n")
    for row in report["rows"]:
        cells = "  ".join(f"{method} {row[method]:6.3f}" for method in ("recompute", "kv", "hidden", "auto"))
        print(f"{row['model']:>10} {row['regime']:>9}: {cells}   auto over the best {row['auto_over_best']:.2f}")
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
