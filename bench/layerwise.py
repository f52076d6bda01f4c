"""Would recomputing the first layers beat prefilling the last tokens? From parts measured on the real server.

    python -m bench.layerwise [--json] [--rounds N] [--passes N] [--prefix-tokens N] [--layers 4N] [--save]

Method: no server restores a part of the layers, but one whose model has only some layers does a part of the work.
Llamas in float32, alike but for their depth, are served over HTTP, one at a time, `--passes` times in turn. Without
a tier: a prompt prefilled by a quarter, half, three quarters and all of the layers, and by all of them parts of it,
and the rest after a part that is on the device. With the tier (`--hcache-plan always`, hidden states, pages in host
memory): a prefix restored by as many layers, and parts of it by all; each with 64 new tokens. Parts are the least
over all requests, as others may use the machine; a parabola gives a layer's share of the token-wise split by its
restored tokens, `lines_error` says how far layers are from alike. `masked`: the rest as measured, with torch's masked
attention, which computes what it masks; `causal`: as the whole prompt less its part, as kernels for GPUs have it. A
drive's reading time is stated, as in `bench.regimes`: 4 times (starved), once (balanced), a tenth (rich) of the
prefill's, in proportion to layers and tokens. `tokenwise` restores the best number of pages and prefills the rest,
in all layers; `layerwise` recomputes the best number of layers and restores the others; `either` may do both. The
drive is read before the pass (`before`, as the server does it), beneath it layer by layer (`beneath`), or hidden but
for what exceeds the pass (`hidden`); work on the cores adds up. What a layer-wise server pays besides is left out, so
`gain`, tokenwise over either, is a bound. As many layers as are measured, and 32 of the same. `auto_s`: the real
server from such a drive. `split_error`: half restored from host memory, half prefilled, composed over measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.harness import Server, make_model, random_prompt
from bench.regimes import NEW_TOKENS, PAGE_TOKENS, REGIMES, UNCOUNTED, Case, serving
from bench.report import about, arguments_of, emit
from bench.ttft import wait_until_written

DEEP = 32
Times = dict[tuple[str, int], list[float]]  # by what was measured, and its layers or tokens


class Parts(NamedTuple):
    pages: int  # of the prefix
    fixed_s: float  # of a request, whatever its model's depth
    split_s: tuple[float, ...]  # a layer's, by the restored part of the prefix: a polynomial, highest power first

    @property
    def prefill_s(self) -> float:
        return self.split_s[-1]


class Choice(NamedTuple):
    seconds: float
    recomputed_layers: int
    restored: float  # part of the prefix, in the other layers


def read_beneath(reads: Sequence[float], work: Sequence[float]) -> float:
    """A layer's work starts when it has been read and the layer before it is done."""
    read = done = 0.0
    for read_s, work_s in zip(reads, work, strict=True):
        read += read_s
        done = max(done, read) + work_s
    return done


READING: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "before": lambda reads, work: sum(reads) + sum(work),
    "beneath": read_beneath,
    "hidden": lambda reads, work: max(sum(reads), sum(work)),
}


def choices(parts: Parts, layers: int, reading_s: float, how: str) -> Iterator[Choice]:
    """Every number of recomputed layers with every number of restored pages; `reading_s` for all of both."""
    shares = np.linspace(0, 1, parts.pages + 1)
    for share, layer_s in zip(shares, np.polyval(parts.split_s, shares), strict=True):
        for none in range(layers + 1):
            reads = [0.0] * none + [share * reading_s / layers] * (layers - none)
            work = [parts.prefill_s] * none + [layer_s] * (layers - none)
            yield Choice(parts.fixed_s + float(READING[how](reads, work)), none, float(share))


def compare(parts: Parts, layers: int, reading: float, how: str) -> dict[str, Any]:
    """`reading`: time of reading all over that of prefilling all."""
    everything = list(choices(parts, layers, reading * layers * parts.prefill_s, how))
    best = {
        "tokenwise": min(one for one in everything if not one.recomputed_layers),
        "layerwise": min(one for one in everything if one.restored == 1),
        "either": min(everything),
    }
    gain = best["tokenwise"].seconds / best["either"].seconds
    return {"layers": layers, "read": how, **{name: one._asdict() for name, one in best.items()}, "gain": gain}


@contextmanager
def _server(case: Case, folder: Path, store: str = "") -> Iterator[Server]:
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(case.prefix_tokens + 5 * PAGE_TOKENS)]
    args += ["--chunked-prefill-size", str(2 * case.prefix_tokens), "--sleep-on-idle"]
    if store:
        args += ["--hicache-backend", "hcache", "--hcache-dir", store, "--hicache-ratio", "16"]
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
                times["start", tokens].append(_ttft_s(server, [], tokens + NEW_TOKENS, 100 * round_ + 3))
                server.flush_cache()
                prefix = random_prompt(tokens, seed=2)
                server.generate(prefix, 1)
                rest_s = _ttft_s(server, prefix, whole - tokens, 100 * round_ + 1)
                times["rest", tokens].append(rest_s - _ttft_s(server, prefix, NEW_TOKENS, 100 * round_ + 2))


def measure_restoring(case: Case, parts: Sequence[int], folder: Path, times: Times) -> None:
    """Requests take turns, so that each finds its prefix evicted. With `parts`, one is a split at the half, too."""
    whole = case.prefix_tokens
    turns = [(("restore", case.layers), whole, NEW_TOKENS)] * 2
    turns += [(("part", tokens), tokens, NEW_TOKENS) for tokens in parts]
    turns += [(("split", whole // 2), whole // 2, whole // 2 + NEW_TOKENS)] if parts else []
    with tempfile.TemporaryDirectory(dir=folder) as store, _server(case, folder, store) as server:
        for round_ in range(-1, case.rounds):
            for turn, (name, tokens, new_tokens) in enumerate(turns):
                wait_until_written(server)
                prefix = random_prompt(tokens, seed=3 + turn)
                if round_ < 0:
                    server.generate(prefix, 1)
                else:
                    times[name].append(_ttft_s(server, prefix, new_tokens, 100 * round_ + turn))


def parts_of(whole: int, times: Times, *, masked: bool) -> tuple[Parts, dict[str, float]]:
    """And what the lines, the parabola and the composed split miss. `whole`: tokens of the prefix."""
    found = {name: min(some) for name, some in times.items()}
    depths = sorted(depth for kind, depth in found if kind == "restore")
    measured = np.array([[found[kind, depth] for kind in ("prefill", "restore")] for depth in depths])
    lines = np.polyfit(depths, measured, 1)
    fixed_s = float(lines[1].mean())
    split = {0: found["prefill", depths[-1]], whole: found["restore", depths[-1]]}
    for tokens in [tokens for kind, tokens in found if kind == "part"]:
        rest_s = found["rest", tokens] if masked else split[0] - found["start", tokens]
        split[tokens] = found["part", tokens] + rest_s
    shares, split_s = np.array(sorted(split)) / whole, np.array([split[tokens] for tokens in sorted(split)])
    parabola = np.polyfit(shares, (split_s - fixed_s) / depths[-1], 2)
    return Parts(whole // PAGE_TOKENS, fixed_s, tuple(map(float, parabola))), {
        "split_error": split[whole // 2] / found["split", whole // 2],
        "lines_error": float(np.abs((np.outer(depths, lines[0]) + lines[1]) / measured - 1).max()),
        "parabola_error": float(np.abs((np.polyval(parabola, shares) * depths[-1] + fixed_s) / split_s - 1).max()),
    }


def measure(case: Case, passes: int, folder: Path) -> tuple[Times, dict[str, float]]:
    times: Times = defaultdict(list)
    for _ in range(passes):
        for quarter in (1, 2, 3, 4):
            some = replace(case, layers=quarter * case.layers // 4)
            split_at = [part * case.prefix_tokens // 4 for part in (1, 2, 3)] if quarter == 4 else []
            measure_prefill(some, split_at, folder, times)
            measure_restoring(some, split_at, folder, times)
            print(dict(times), file=sys.stderr, flush=True)
    prefill_s = case.layers * parts_of(case.prefix_tokens, times, masked=True)[0].prefill_s
    auto_s = {}
    for regime, reading in REGIMES.items():
        limit_gb = case.smaller_bytes / (reading * prefill_s) / 1e9
        with serving(case, "auto", limit_gb, folder) as contender:
            answers = [contender.ask() for _ in range(2 + UNCOUNTED + case.rounds)][2 + UNCOUNTED :]
        auto_s[regime] = min(answer.ttft_s for answer in answers)
    return times, auto_s


def report_of(case: Case, times: Times, auto_s: dict[str, float]) -> dict[str, Any]:
    drives = [("host memory", 0.0, "before")]
    drives += [(regime, reading, how) for regime, reading in REGIMES.items() for how in READING]
    rows, parts, errors = [], {}, {}
    for attention in ("causal", "masked"):
        found, errors[attention] = parts_of(case.prefix_tokens, times, masked=attention == "masked")
        parts[attention] = found._asdict()
        rows += [
            {"attention": attention, "regime": regime, **compare(found, layers, reading, how)}
            for regime, reading, how in drives
            for layers in (case.layers, DEEP)
        ]
    return {
        "rows": rows,
        "parts": parts,
        "errors": errors,
        "auto_s": auto_s,
        "measured_s": {" ".join(map(str, name)): found for name, found in times.items()},
        "case": asdict(case),
        **about(__doc__),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for row in report["rows"]:
        where = f"{row['attention']} {row['regime']:>11} {row['layers']:2} layers {row['read']:>7}"
        cells = "  ".join(f"{name} {row[name]['seconds']:6.3f}" for name in ("tokenwise", "layerwise", "either"))
        yield f"{where}: {cells}   gain {row['gain']:.3f}"
    yield f"auto, measured: {report['auto_s']}"


def main() -> None:
    parser = arguments_of(__doc__)
    for name, default in {"prefix-tokens": 2048, "hidden-size": 768, "layers": 8, "rounds": 4, "passes": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    case = Case("llama", arguments.prefix_tokens, arguments.hidden_size, arguments.layers, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="hcache-layerwise-") as folder:
        report = report_of(case, *measure(case, arguments.passes, Path(folder)))
    emit(arguments, "layerwise", report, lines(report))


if __name__ == "__main__":
    main()
