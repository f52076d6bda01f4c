"""Would recomputing the first layers beat prefilling the last tokens? From parts measured on the real server.

    python -m bench.layerwise [--json] [--rounds N] [--prefix-tokens N] [--hidden-size N] [--layers N] [--save]

Method: no server restores a part of the layers, but one whose model has only some layers does a part of the work.
Llamas in float32, alike but for their depth, are served over HTTP. Without a tier: a prompt prefilled by a quarter,
half, three quarters and all of the layers, and with all layers the rest of it after a part that is on the device.
With the tier (`--hcache-plan always`, hidden states, pages in host memory): a prefix restored by as many layers, and
parts of it by all of them; each request has 64 new tokens. All servers run one at a time, `--passes` times in turn.
Parts are medians over all requests; lines through them give a layer's prefill and restoration, a parabola the
token-wise split by its restored tokens. A drive's reading time is stated, as in `bench.regimes`: 4 times (starved),
once (balanced), a tenth (rich) of the prefill's, in proportion to the layers and tokens that are read.
`tokenwise` restores the best number of pages and prefills the rest, in all layers; `layerwise` recomputes the best
number of layers and restores the others; `either` may do both at once. Each has the read before the pass
(`before`, as the server does it), beneath it layer by layer (`beneath`), or hidden but for what exceeds the pass
(`hidden`); work on the cores adds up. What a layer-wise server would pay besides is left out, so `gain`, tokenwise
over either, is a bound. 8 layers are what is measured; 32 are 32 of the same layers. `auto` is the real server
from such a drive, `split_error` a split that a server did from host memory, composed over measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Server, make_model, random_prompt
from bench.regimes import NEW_TOKENS, PAGE_TOKENS, REGIMES, Case, serve
from bench.ttft import wait_until_written

RESULTS = Path(__file__).parent / "results"
DEPTHS = (8, 32)
Times = dict[tuple[Any, ...], list[float]]


@dataclass(frozen=True)
class Parts:
    """Seconds, measured. A request also takes `fixed_s`, whatever its model's depth."""

    tokens: int  # of the prefix
    fixed_s: float
    prefill_s: float  # a layer's, of the prefix and the new tokens
    split_s: tuple[float, float, float]  # a layer's, by the restored part x of the prefix: s[0]·x² + s[1]·x + s[2]

    def layer_s(self, restored: float) -> float:
        return float(np.polyval(self.split_s, restored))


def read_before(reads: Sequence[float], work: Sequence[float]) -> float:
    return sum(reads) + sum(work)


def read_beneath(reads: Sequence[float], work: Sequence[float]) -> float:
    """A layer's work starts when it has been read and the layer before it is done."""
    read = done = 0.0
    for layer_read, layer_work in zip(reads, work, strict=True):
        read += layer_read
        done = max(done, read if layer_read else 0.0) + layer_work
    return done


def read_hidden(reads: Sequence[float], work: Sequence[float]) -> float:
    return max(sum(reads), sum(work))


READING: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "before": read_before,
    "beneath": read_beneath,
    "hidden": read_hidden,
}


@dataclass(frozen=True)
class Choice:
    recomputed_layers: int
    restored: float  # part of the prefix, in the other layers
    seconds: float


def choices(parts: Parts, layers: int, reading_s: float, how: str) -> Iterator[Choice]:
    """Every number of recomputed layers with every number of restored pages; `reading_s` for all of both."""
    pages = parts.tokens // PAGE_TOKENS
    for none in range(layers + 1):
        for page in range(pages + 1):
            restored = page / pages
            read = restored * reading_s / layers
            reads = [0.0] * none + [read] * (layers - none)
            work = [parts.prefill_s] * none + [parts.layer_s(restored)] * (layers - none)
            yield Choice(none, restored, parts.fixed_s + READING[how](reads, work))


def compare(parts: Parts, layers: int, reading: float, how: str) -> dict[str, Any]:
    """`reading`: time of reading all over that of prefilling all."""
    everything = list(choices(parts, layers, reading * layers * parts.prefill_s, how))
    found = {
        "tokenwise": [choice for choice in everything if choice.recomputed_layers == 0],
        "layerwise": [choice for choice in everything if choice.restored == 1],
        "either": everything,
    }
    best = {name: min(some, key=lambda choice: choice.seconds) for name, some in found.items()}
    gain = best["tokenwise"].seconds / best["either"].seconds
    return {"layers": layers, "read": how, **{name: asdict(choice) for name, choice in best.items()}, "gain": gain}


@contextmanager
def _server(case: Case, folder: Path, store: Path | None = None) -> Iterator[Server]:
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(case.prefix_tokens + 5 * PAGE_TOKENS)]
    args += ["--chunked-prefill-size", str(2 * case.prefix_tokens), "--sleep-on-idle"]
    if store:
        args += ["--hicache-backend", "hcache", "--hcache-dir", str(store), "--hicache-ratio", "16"]
        args += ["--hcache-plan", "always", "--hcache-representation", "hidden"]
        args += ["--hicache-storage-prefetch-policy", "wait_complete"]
    model = make_model(folder / f"{case.layers}-layers", case.spec)
    with Server(model, args, log=folder / f"{case.layers}-{'tier' if store else 'plain'}.log") as server:
        server.generate(random_prompt(case.prefix_tokens, seed=1), 1)
        yield server


def _ttft_s(server: Server, prefix: list[int], new_tokens: int, request: int) -> float:
    answer = server.generate(prefix + random_prompt(new_tokens, seed=10_000 + request), 1)
    if answer.cached_tokens != len(prefix):
        raise RuntimeError(f"{answer.cached_tokens} of {len(prefix)} tokens were there")
    return answer.ttft_s


def measure_prefill(case: Case, parts: Sequence[int], folder: Path, times: Times) -> None:
    whole = case.prefix_tokens + NEW_TOKENS
    with _server(case, folder) as server:
        for round_ in range(case.rounds):
            server.flush_cache()
            times["prefill", case.layers].append(_ttft_s(server, [], whole, 100 * round_))
            for tokens in parts:
                server.flush_cache()
                prefix = random_prompt(tokens, seed=2)
                server.generate(prefix, 1)
                rest_s = _ttft_s(server, prefix, whole - tokens, 100 * round_ + 1)
                new_s = _ttft_s(server, prefix, NEW_TOKENS, 100 * round_ + 2)
                times["rest", tokens].append(rest_s - new_s)


def measure_restoring(case: Case, parts: Sequence[int], folder: Path, times: Times) -> None:
    """Requests take turns, so that each finds its prefix evicted. With `parts`, one is a split at the half, too."""
    whole = case.prefix_tokens
    turns: list[tuple[tuple[Any, ...], int, int]] = [(("restore", case.layers), whole, NEW_TOKENS)] * 2
    turns += [(("part", tokens), tokens, NEW_TOKENS) for tokens in parts]
    turns += [(("split",), whole // 2, whole // 2 + NEW_TOKENS)] if parts else []
    with tempfile.TemporaryDirectory(dir=folder) as store, _server(case, folder, Path(store)) as server:
        for round_ in range(-1, case.rounds):
            for turn, (name, tokens, new_tokens) in enumerate(turns):
                wait_until_written(server)
                prefix = random_prompt(tokens, seed=3 + turn)
                if round_ < 0:
                    server.generate(prefix, 1)
                else:
                    times[name].append(_ttft_s(server, prefix, new_tokens, 100 * round_ + turn))


def parts_of(case: Case, median: dict[tuple[Any, ...], float]) -> tuple[Parts, dict[str, float]]:
    """And what of the measured the lines, the parabola and the composed split miss."""
    depths = sorted(key[1] for key in median if key[0] == "restore")
    prefilled, restored = ([median[name, depth] for depth in depths] for name in ("prefill", "restore"))
    line = np.polyfit(depths, prefilled, 1)
    restore_line = np.polyfit(depths, restored, 1)
    fixed_s = float(line[1] + restore_line[1]) / 2
    split = {0: median["prefill", case.layers], case.prefix_tokens: median["restore", case.layers]}
    split |= {key[1]: median[key] + median["rest", key[1]] for key in median if key[0] == "part"}
    shares = np.array(sorted(split)) / case.prefix_tokens
    layer_s = (np.array([split[tokens] for tokens in sorted(split)]) - fixed_s) / case.layers
    parabola = np.polyfit(shares, layer_s, 2)
    parts = Parts(case.prefix_tokens, fixed_s, float(line[0]), (parabola[0], parabola[1], parabola[2]))
    return parts, {
        "split_error": split[case.prefix_tokens // 2] / median[("split",)],
        "lines_error": max(
            float(np.abs(np.polyval(fit, depths) / found - 1).max())
            for fit, found in ((line, prefilled), (restore_line, restored))
        ),
        "parabola_error": float(np.abs(np.polyval(parabola, shares) / layer_s - 1).max()),
    }


def run(case: Case, passes: int, folder: Path) -> dict[str, Any]:
    times: Times = defaultdict(list)
    shares = [quarter * case.prefix_tokens // 4 for quarter in (1, 2, 3)]
    for _ in range(passes):
        for layers in (quarter * case.layers // 4 for quarter in (1, 2, 3, 4)):
            some, split_at = replace(case, layers=layers), shares if layers == case.layers else []
            measure_prefill(some, split_at, folder, times)
            measure_restoring(some, split_at, folder, times)
            _progress(str(dict(times)))
    median = {name: statistics.median(found) for name, found in times.items()}
    parts, errors = parts_of(case, median)
    auto = {}
    for regime, reading in REGIMES.items():
        limit_gb = case.smaller_bytes / (reading * case.layers * parts.prefill_s) / 1e9
        auto[regime] = serve(case, "auto", limit_gb, folder).ttft_s
        _progress(f"{regime}: {auto[regime]:.3f} s")
    rows = [{"regime": "host memory", **compare(parts, layers, 0.0, "before")} for layers in DEPTHS]
    rows += [
        {"regime": regime, **compare(parts, layers, reading, how)}
        for regime, reading in REGIMES.items()
        for layers in DEPTHS
        for how in READING
    ]
    return {
        "rows": rows,
        "parts": asdict(parts),
        "auto_s": auto,
        **errors,
        "measured_s": {" ".join(map(str, name)): found for name, found in times.items()},
        "case": asdict(case),
        "passes": passes,
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
    parser.add_argument("--layers", type=int, default=8, help="a multiple of 4")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the report to bench/results/layerwise.json")
    arguments = parser.parse_args()
    case = Case("llama", arguments.prefix_tokens, arguments.hidden_size, arguments.layers, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="hcache-layerwise-") as folder:
        report = run(case, arguments.passes, Path(folder))
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "layerwise.json").write_text(json.dumps(report, indent=2) + "\n")
    for row in report["rows"]:
        cells = "  ".join(f"{name} {row[name]['seconds']:6.3f}" for name in ("tokenwise", "layerwise", "either"))
        print(
            f"{row['regime']:>11} {row['layers']:2} layers, read {row['read']:>7}: {cells}   gain {row['gain']:.3f}"
        )
    print("auto, measured: " + "  ".join(f"{regime} {seconds:.3f}" for regime, seconds in report["auto_s"].items()))
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
