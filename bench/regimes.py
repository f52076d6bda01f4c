"""Is the planner ever the worse choice? Time to first token by each method, from drives slow, middling and fast.

    python -m bench.regimes [--json] [--rounds N] [--prefix-tokens N] [--hidden-size N] [--layers N] [--save]

Method: an MHA and a GQA Llama in float32 are served with an evicted prefix on disk only: the KV pool holds one
conversation and a little more, two take turns, and device and host memory are emptied before each request. Reading is
limited (`--hcache-read-limit`) so that the smaller representation of the whole prefix takes 4 times (starved), once
(balanced), or a tenth (rich) of what prefilling it takes, as measured before on the server without a tier. `hidden`
and `kv` restore all of it (`--hcache-plan always`), `auto` is the server as it comes; every request asks for its
prefix and 64 tokens never seen before, so `recompute` is prefilling both. All four servers run at once and are asked
in turn, so that a noisy machine slows all of them; those that are not asked sleep. In four rounds each comes after
each other once: after `recompute` a machine is up to a tenth slower. Medians over the rounds, after two requests of
each that fill the store and two that are not counted. `worst_auto` is the largest ratio of auto's median to the best
method's. Answers are compared with recompute's token by token.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import Answer, ModelSpec, Server, compare, in_turn, make_model, random_prompt
from bench.report import about, arguments_of, emit, progress
from bench.ttft import median_s, wait_until_written

NEW_TOKENS = 64
ANSWER_TOKENS = 4
PAGE_TOKENS = 64
UNCOUNTED = 2
METHODS = ("auto", "hidden", "kv")  # auto first: it measures the machine at its start
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


@dataclass
class Contender:
    """A server, and what it answered."""

    case: Case
    server: Server
    tiered: bool
    requests: int = 0
    answers: list[Answer] = field(default_factory=list)

    def ask(self) -> Answer:
        """The next request; all but the first two find their prefix in files only, or nowhere."""
        if self.tiered:
            wait_until_written(self.server)
        if self.requests >= 2:
            self.server.flush_cache()
        self.answers.append(self.server.generate(self.case.prompt(self.requests), ANSWER_TOKENS))
        self.requests += 1
        return self.answers[-1]


@contextmanager
def serving(
    case: Case, method: str, limit_gb: float, folder: Path, *, store: Path | None = None
) -> Iterator[Contender]:
    """With a store of its own, if none is given. Before it, nothing else may run: `auto` measures the machine."""
    pool_tokens = -(-(case.prefix_tokens + NEW_TOKENS + ANSWER_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS + 256
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(pool_tokens), "--sleep-on-idle"]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        if method != "recompute":
            args += ["--hicache-backend", "hcache", "--hcache-dir", str(store or own), "--hicache-ratio", "4"]
            args += ["--hicache-storage-prefetch-policy", "wait_complete", "--hcache-read-limit", str(limit_gb)]
        if method in ("hidden", "kv"):
            args += ["--hcache-plan", "always", "--hcache-representation", method]
        model = make_model(folder / case.model, case.spec)
        with Server(model, args, log=folder / f"{case.model}-{method}.log") as server:
            yield Contender(case, server, tiered=method != "recompute")


def compete(case: Case, regime: str, plain: Contender, prefill_s: float, folder: Path) -> tuple[dict[str, Any], bool]:
    """A row of the report, and whether all answers were the same."""
    limit_gb = case.smaller_bytes / (REGIMES[regime] * prefill_s) / 1e9
    with ExitStack() as stack:
        tiers = {method: stack.enter_context(serving(case, method, limit_gb, folder)) for method in METHODS}
        plain.requests, plain.answers = 0, []
        everybody = {"recompute": plain} | tiers
        for turn in range(2 + UNCOUNTED + case.rounds):
            for method in in_turn([*everybody], turn):
                everybody[method].ask()
        state = tiers["auto"].server.tier_state()
    counted = {method: contender.answers[-case.rounds :] for method, contender in everybody.items()}
    seconds = {method: median_s(answers) for method, answers in counted.items()}
    best = min(value for method, value in seconds.items() if method != "auto")
    row = {
        "regime": regime,
        "model": case.model,
        **seconds,
        "auto_over_best": seconds["auto"] / best,
        "auto_restored": statistics.mean(answer.cached_host for answer in counted["auto"]) / case.prefix_tokens,
        "auto_head_starts": state["head_starts"],  # of all its requests but the first two
        "auto_stores": {"hidden_layers": state["layers_hidden"], "kv_layers": state["layers_kv"]},
        "all_s": {method: [answer.ttft_s for answer in answers] for method, answers in counted.items()},
        "read_limit_gb_s": limit_gb,
        "factors": {name: value for name, value in state.items() if name.startswith("slower_")},
    }
    pairs = (pair for tier in tiers.values() for pair in zip(tier.answers, plain.answers, strict=True))
    return row, all(compare(*pair).same_tokens for pair in pairs)


def run(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    equal = True
    for case in cases:
        with serving(case, "recompute", 0.0, folder) as plain:
            prefill_s = median_s([plain.ask() for _ in range(2 + case.rounds)][2:])
            progress(f"{case.model}: prefilled in {prefill_s:.2f} s")
            for regime in REGIMES:
                row, same = compete(case, regime, plain, prefill_s, folder)
                rows.append(row)
                equal &= same
                progress(json.dumps(row))
    return {
        "rows": rows,
        "worst_auto": max(row["auto_over_best"] for row in rows),
        "tokens_equal": equal,
        "prefix_tokens": cases[0].prefix_tokens,
        "rounds": cases[0].rounds,
        **about(__doc__),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for row in report["rows"]:
        cells = "  ".join(f"{method} {row[method]:6.3f}" for method in ("recompute", "kv", "hidden", "auto"))
        yield f"{row['model']:>10} {row['regime']:>9}: {cells}   auto over the best {row['auto_over_best']:.2f}"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model", action="append", choices=("llama", "llama_gqa"), help="default: both")
    arguments = parser.parse_args()
    sizes = arguments.prefix_tokens, arguments.hidden_size, arguments.layers, arguments.rounds
    cases = [Case(model, *sizes) for model in arguments.model or ("llama", "llama_gqa")]
    with tempfile.TemporaryDirectory(prefix="hcache-regimes-") as folder:
        report = run(cases, Path(folder))
    emit(arguments, "regimes", report, lines(report))


if __name__ == "__main__":
    main()
