"""Time to first token of requests that come together with the same evicted prefix, as the forks of a program do.

    python -m bench.together [--json] [--rounds N] [--prefix-tokens N] [--requests N] [--save]

Method: an MHA Llama in float32 is served without a tier, and with it, with the default representation and plan
(`auto`) and with hidden states, all of which are restored (`hidden`): one server after another. Each is served by
`--schedule-policy fcfs`, SGLang's default, and by `lpm`, which puts requests that share a prefix behind the first
of them; with the tier also such that each request loads the prefix for itself (`apart`). In each round a prefix
that was served before is on disk only; while an unrelated prompt of 512 tokens is prefilled, the requests arrive,
each with the prefix and 64 tokens never seen before. The KV pool has room for a copy of the prefix for each.
Figures are of all requests of all rounds: the median time to the first token, and that of the last request of a
round, median over the rounds; `restored_tokens` is of a round. The greedy answers of all servers are compared token
by token.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang
import torch

from bench.harness import Answer, ModelSpec, Server, compare, make_model, random_prompt
from bench.report import about, arguments_of, emit, progress
from bench.ttft import wait_until_written

APART = Path(__file__).parent / "loads_apart"
TIERS: dict[str, list[str]] = {
    "auto": [],
    "hidden": ["--hcache-representation", "hidden", "--hcache-plan", "always"],
}
MODES = (
    *("recompute", "recompute lpm"),
    *(f"{tier} {how}" for tier in TIERS for how in ("apart", "shared", "shared lpm")),
)
NEW_TOKENS, ANSWER_TOKENS, OTHER_TOKENS = 64, 4, 512
MODEL = ModelSpec("llama", hidden_size=768, layers=6, heads=12, intermediate=2112, max_position_embeddings=8192)


@dataclass(frozen=True)
class Case:
    prefix_tokens: int
    requests: int
    rounds: int

    def prompts(self, round_: int) -> list[list[int]]:
        prefix = random_prompt(self.prefix_tokens, seed=round_)
        return [prefix + random_prompt(NEW_TOKENS, seed=1000 + 100 * round_ + i) for i in range(self.requests)]


@dataclass(frozen=True)
class Measured:
    rounds: list[list[Answer]] = field(default_factory=list)
    restored_tokens: list[int] = field(default_factory=list)

    def ttft_s(self) -> dict[str, float]:
        times = [[answer.ttft_s for answer in answers] for answers in self.rounds]
        return {"median": statistics.median(itertools.chain(*times)), "last": statistics.median(map(max, times))}


def measure(case: Case, mode: str, folder: Path) -> Measured:
    pool_tokens = case.requests * (case.prefix_tokens + 2 * NEW_TOKENS) + 4 * OTHER_TOKENS
    args = ["--max-total-tokens", str(pool_tokens), "--page-size", "64"]
    what, *how = mode.split()
    if what in TIERS:
        args += ["--hicache-backend", "hcache", "--hcache-dir", str(folder / f"store {mode}"), *TIERS[what]]
    if "lpm" in how:
        args += ["--schedule-policy", "lpm"]
    apart = {"PYTHONPATH": os.pathsep.join((str(APART), os.environ.get("PYTHONPATH", "")))}
    env = apart if "apart" in how else {}
    measured = Measured()
    with Server(make_model(folder / "model", MODEL), args, log=folder / f"{mode}.log", env=env) as server:
        for round_ in range(case.rounds + 1):  # the first one warms up
            answers, restored = together(case, server, round_)
            progress(f"{mode}: round {round_} of {case.rounds}, {max(answer.ttft_s for answer in answers):.2f} s")
            if round_:
                measured.rounds.append(answers)
                measured.restored_tokens.append(restored)
    return measured


def together(case: Case, server: Server, round_: int) -> tuple[list[Answer], int]:
    """The answers of a round, and how many tokens were restored for them."""
    prompts = case.prompts(round_)
    server.generate(prompts[0][: case.prefix_tokens], 1)
    tiered = "--hicache-backend" in server.args
    if tiered:
        wait_until_written(server)
    server.flush_cache()
    before = server.tier_state()["tokens_restored"] if tiered else 0
    with ThreadPoolExecutor(1 + case.requests) as pool:
        other = pool.submit(server.generate, random_prompt(OTHER_TOKENS, seed=9000 + round_), 1)
        time.sleep(0.1)
        answers = list(pool.map(lambda prompt: server.generate(prompt, ANSWER_TOKENS), prompts))
        other.result()
    return answers, (server.tier_state()["tokens_restored"] if tiered else 0) - before


def run(case: Case, folder: Path) -> dict[str, Any]:
    """The report; its keys are what `--json` prints."""
    measured = {mode: measure(case, mode, folder) for mode in MODES}
    ttft_s = {mode: found.ttft_s() for mode, found in measured.items()}
    wanted = [*itertools.chain(*measured["recompute"].rounds)]

    def ratio(slow: str, fast: str) -> dict[str, float]:
        return {which: ttft_s[slow][which] / ttft_s[fast][which] for which in ("median", "last")}

    return {
        "prefix_tokens": case.prefix_tokens,
        "new_tokens": NEW_TOKENS,
        "requests": case.requests,
        "rounds": case.rounds,
        "model": {"hidden_size": MODEL.hidden_size, "layers": MODEL.layers, "dtype": MODEL.dtype},
        "ttft_s": ttft_s,
        "restored_tokens": {mode: statistics.median(found.restored_tokens) for mode, found in measured.items()},
        "ratio_recompute": {tier: ratio("recompute", f"{tier} shared") for tier in TIERS},
        "ratio_recompute_lpm": {tier: ratio("recompute lpm", f"{tier} shared lpm") for tier in TIERS},
        "ratio_apart": {tier: ratio(f"{tier} apart", f"{tier} shared") for tier in TIERS},
        "tokens_equal": all(
            compare(answer, other).same_tokens
            for found in measured.values()
            for answer, other in zip(itertools.chain(*found.rounds), wanted, strict=True)
        ),
        **about(
            __doc__,
            machine={"accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
            versions={"sglang": sglang.__version__, "torch": torch.__version__},
        ),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for mode in MODES:
        times, restored = report["ttft_s"][mode], report["restored_tokens"][mode]
        yield f"{mode:>17}: {times['median']:6.2f} s median, {times['last']:6.2f} s last; {restored:,.0f} restored"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    case = Case(arguments.prefix_tokens, arguments.requests, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="hcache-together-") as folder:
        report = run(case, Path(folder))
    emit(arguments, "together", report, lines(report))


if __name__ == "__main__":
    main()
