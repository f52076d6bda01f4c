"""Chats, agents and RAG, or a trace of real ones, replayed: what the tier saves, and whether answers stay the same.

    python -m bench.replay [WORKLOAD …] [--modes none,auto,kv,hidden] [--rounds 3] [--json] [--save]
    python -m bench.replay agentic=PATH --shrink 16 --sessions 20
    python -m bench.replay chat --at 127.0.0.1:30000      a server that runs already; any model

WORKLOAD: `chat`, `agent`, `rag` (the default is all three), or `mooncake=PATH`, `agentic=PATH`, `azure=PATH`,
`burstgpt=PATH` (see bench/workloads.py for where these traces are). Prompts are random tokens that begin alike where
the workload's do; all else of it, who asks after whom and how much, is kept.

Method: a small MHA Llama in float32 is served once for each mode, one after another: `none` is without a tier, `auto`
the tier as it comes, `kv` and `hidden` restore all that is stored. Each finds an empty store. Prompts and answers are
`--shrink` times shorter than the workload's. The KV pool holds twice the longest prompt and answer, or `--pool-share`
of the workload's distinct tokens where that is more; host memory four times as much, files the rest. `--clients`
sessions are in flight at a time. With `--speed 0` a call is sent once the one before it in its session is answered:
`seconds` is how long a busy server takes for all of it. With another speed, sessions begin and pause as the workload
says, so many times faster. In each of the `--rounds` the modes take turns, on fresh servers, each round beginning
with another one: `seconds` is the median, percentiles are of the calls of all rounds; `cpu_s`, a median as well, is
the CPU time that the server and the prefetcher took meanwhile, that of threads which wait for each other included.
Prompt tokens are counted by where they came from. `ideal` is what a prefix cache without bounds would find, `lru`
what one of the KV pool's size would. Greedy answers of all modes and rounds are compared token by token with the
first ones.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.client import Answer, Client, RequestFailed, compare
from bench.harness import ModelSpec, Server, in_turn, make_model
from bench.report import about, arguments_of, emit, progress
from bench.workloads import MADE, Session, Workload, workload_of

MODES = ("none", "auto", "kv", "hidden")
PAGE_TOKENS = 64
LONGEST = 6000  # tokens of a prompt, after shrinking
MODEL = ModelSpec("llama", hidden_size=512, layers=6, heads=8, intermediate=1408, max_position_embeddings=2 * LONGEST)


@dataclass(frozen=True)
class Replayed:
    """What became of a workload's calls, in their order; None for one that failed."""

    answers: list[Answer | None]
    seconds: float
    cpu_s: float | None = None  # of the server's processes and the prefetcher's

    @property
    def answered(self) -> list[Answer]:
        return [answer for answer in self.answers if answer is not None]


def row_of(rounds: Sequence[Replayed]) -> dict[str, Any]:
    """Times in seconds; shares are of all prompt tokens."""
    answered = [answer for run in rounds for answer in run.answered]
    prompt = sum(answer.prompt_tokens for answer in answered)
    generated = sum(len(answer.output_ids) for answer in answered)
    times = sorted(answer.ttft_s for answer in answered)
    return {
        "seconds": statistics.median(run.seconds for run in rounds),
        "seconds_each": [run.seconds for run in rounds],
        "cpu_s": statistics.median(cpu) if (cpu := [run.cpu_s for run in rounds if run.cpu_s is not None]) else None,
        "tokens_per_s": (prompt + generated) / sum(run.seconds for run in rounds),
        "ttft_mean_s": statistics.fmean(times),
        **{f"ttft_p{percent}_s": times[(len(times) - 1) * percent // 100] for percent in (50, 90, 99)},
        "from_device": sum(answer.cached_device for answer in answered) / prompt,
        "restored": sum(answer.cached_host for answer in answered) / prompt,
        "failed": sum(len(run.answers) for run in rounds) - len(answered),
    }


def replay(client: Client, workload: Workload, *, clients: int, speed: float) -> Replayed:
    """Send a workload's calls, greedy, with so many sessions in flight; speed 0: without pauses."""
    began = time.monotonic()

    def wait_until(at_s: float) -> None:
        time.sleep(max(0.0, began + at_s - time.monotonic()))

    def run(session: Session) -> list[Answer | None]:
        answers: list[Answer | None] = []
        if speed:
            wait_until(session.begins_s / speed)
        for call in session.calls:
            if speed:
                time.sleep(call.pause_s / speed)
            try:
                answers.append(client.generate(workload.prompt(call), call.output_tokens, logprobs=False))
            except (RequestFailed, OSError) as error:
                progress(f"a request failed: {error}")
                answers.append(None)
        return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for answers in pool.map(run, workload.sessions) for answer in answers]
    return Replayed(answers, time.monotonic() - began)


def pool_tokens(workload: Workload, share: float) -> int:
    distinct = len({block for call in workload.calls for block in call.blocks}) * workload.block_tokens
    longest = max(call.input_tokens + call.output_tokens for call in workload.calls)
    return -(-int(max(2 * longest, share * distinct)) // PAGE_TOKENS) * PAGE_TOKENS


def server_for(mode: str, model: Path, tokens: int, folder: Path) -> Server:
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(tokens), "--sleep-on-idle"]
    if mode != "none":
        args += ["--hicache-backend", "hcache", "--hcache-dir", str(folder / "store"), "--hicache-ratio", "4"]
    if mode in ("kv", "hidden"):
        args += ["--hcache-representation", mode, "--hcache-plan", "always"]
    return Server(model, args, log=folder / "server.log")


def compare_modes(
    workload: Workload,
    modes: Sequence[str],
    folder: Path,
    *,
    share: float,
    rounds: int,
    clients: int,
    speed: float,
) -> dict[str, Any]:
    model, tokens = make_model(folder / "model", MODEL), pool_tokens(workload, share)
    runs: dict[str, list[Replayed]] = {mode: [] for mode in modes}
    for turn in range(rounds):
        for mode in in_turn(modes, turn):
            with server_for(mode, model, tokens, folder / f"{workload.name}-{mode}-{turn}") as server:
                before_s = server.cpu_s()
                run = replay(server, workload, clients=clients, speed=speed)
                run = replace(run, cpu_s=server.cpu_s() - before_s)
            runs[mode].append(run)
            progress(f"{workload.name}, {mode}: {run.seconds:.0f} s")
    first = runs[modes[0]][0]
    return {
        "workload": workload.name,
        "sessions": len(workload.sessions),
        "calls": len(first.answers),
        "prompt_tokens_mean": statistics.fmean(call.input_tokens for call in workload.calls),
        "pool_tokens": tokens,
        "ideal": workload.reusable_share(),
        "lru": workload.reusable_share(tokens),
        "modes": {
            mode: row_of(found) | {"different": sum(_different(run, first) for run in found)}
            for mode, found in runs.items()
        },
    }


def _different(run: Replayed, wanted: Replayed) -> int:
    pairs = zip(run.answers, wanted.answers, strict=True)
    return sum(1 for a, b in pairs if a is not None and b is not None and not compare(a, b).same_tokens)


def table(rows: Iterable[tuple[str, dict[str, Any]]]) -> str:
    head = (
        f"{'':>8}{'all':>9}{'CPU':>9}{'TTFT p50':>10}{'p90':>9}{'p99':>9}{'device':>8}{'restored':>10}{'failed':>8}"
    )
    return "\n".join(
        [head]
        + [
            f"{name:>8}{row['seconds']:7.1f} s{_seconds(row['cpu_s']):>9}{row['ttft_p50_s']:8.2f} s"
            f"{row['ttft_p90_s']:7.2f} s{row['ttft_p99_s']:7.2f} s{row['from_device']:8.0%}{row['restored']:10.0%}"
            f"{row['failed']:8}"
            for name, row in rows
        ]
    )


def _seconds(known: float | None) -> str:
    return "" if known is None else f"{known:.1f} s"


def lines(workloads: Iterable[dict[str, Any]]) -> Iterator[str]:
    for one in workloads:
        yield (
            f"\n{one['workload']}: {one['calls']} calls of {one['sessions']} sessions, "
            f"{one['prompt_tokens_mean']:,.0f} prompt tokens each; a KV pool of {one['pool_tokens']:,}; "
            f"ideal {one['ideal']:.0%}, an LRU of the pool's size {one['lru']:.0%}"
        )
        yield table(one["modes"].items())


def _arguments() -> argparse.ArgumentParser:
    parser = arguments_of(__doc__)
    parser.add_argument("workloads", nargs="*", default=list(MADE), metavar="WORKLOAD")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--at", metavar="HOST:PORT", help="replay on this server instead of starting any")
    parser.add_argument("--name", default="replay", help="of the report that --save writes")
    parser.add_argument("--shrink", type=int, default=4, help="prompts and answers are so many times shorter")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of a prompt, then")
    parser.add_argument("--lines", type=int, default=None, help="of a trace that are read; default: all")
    parser.add_argument("--sessions", type=int, default=10**9, help="the first so many of a workload")
    parser.add_argument("--calls", type=int, default=10**9, help="the first so many of each session")
    parser.add_argument("--clients", type=int, default=4, help="sessions in flight")
    parser.add_argument("--rounds", type=int, default=1, help="of all modes, one after another")
    parser.add_argument("--speed", type=float, default=0.0, help="of the workload's clock; 0: without pauses")
    parser.add_argument("--pool-share", type=float, default=0.1, help="of the distinct tokens that the KV pool holds")
    return parser


def main() -> None:
    parser = _arguments()
    arguments = parser.parse_args()
    modes = arguments.modes.split(",")
    if unknown := set(modes) - set(MODES):
        parser.error(f"--modes: {', '.join(sorted(unknown))} is none of {', '.join(MODES)}")
    try:
        workloads = [
            workload_of(name, most_lines=arguments.lines)
            .shrunk(arguments.shrink, arguments.longest)
            .first(arguments.sessions, arguments.calls)
            for name in arguments.workloads
        ]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pace = {"clients": arguments.clients, "speed": arguments.speed}
    if arguments.at:
        host, _, port = arguments.at.rpartition(":")
        for workload in workloads:
            run = replay(Client(int(port), host or "127.0.0.1"), workload, **pace)
            print(table([(workload.name, row_of([run]))]))
        return
    found = []
    with tempfile.TemporaryDirectory(prefix="hcache-replay-") as folder:
        for workload in workloads:
            found.append(
                compare_modes(
                    workload, modes, Path(folder), share=arguments.pool_share, rounds=arguments.rounds, **pace
                )
            )
    settings = {name: getattr(arguments, name) for name in ("shrink", "clients", "rounds", "speed", "pool_share")}
    report = {"workloads": found, **settings, "model": MODEL.__dict__, **about(__doc__)}
    emit(arguments, arguments.name, report, lines(found))
    rows = [row for result in found for row in result["modes"].values()]
    sys.exit(1 if any(row["failed"] or row["different"] for row in rows) else 0)


if __name__ == "__main__":
    main()
