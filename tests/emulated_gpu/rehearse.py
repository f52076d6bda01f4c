"""A rehearsal of the GPU's path without a GPU: the real server, the product unmodified, on a device that is emulated.

    make rehearse                                             # all ways; some minutes each
    python -m tests.emulated_gpu.rehearse --keep DIR kv engine  # some, and keep their logs

`device.cpp` gives torch a device "cuda": tensors, streams, events, pinned and registered host memory, graphs, and the
driver's copy engine. An operator's call returns when its result has memory; its CPU kernel runs when the stream comes
to it, on the stream's own thread. `device.py` puts that behind `torch.cuda`, and has Triton's interpreter run kernels
when their stream comes to them. `platform.py` has SGLang do in torch what it does in CUDA kernels of its own, so its
scheduler runs as on a GPU: forwards are issued ahead, on a stream of their own.

The device is as unfriendly as CUDA may be. Some pieces of work come late, by chance, so what reads without a wait
reads too early, and what writes without one writes too early; with `lazy` no work is done before somebody waits for
it, or asks for it. Memory that is freed is used again at once by the stream it was taken for, and is overwritten
with NaNs then, in that stream's order; fresh memory has NaNs, too. What is written beside a piece of it ends the
process. A copy to the host is done at once only where CUDA does so. Copies by the engine, and kernels, refuse host
memory that is not registered. As a control, our streams wait for no event: then answers must differ.

What it does not show:

- that kernels compile, run and are right on a GPU: they run in the interpreter, one program after another;
- that CUDA, its driver and torch's CUDA code behave as `device.cpp` has it, and take the arguments they are given;
- SGLang's own CUDA kernels, attention backends and graphs: decoding is eager here (capture in a graph runs in
  `bench.capture_cost` on a real GPU only), and so is prefill;
- races within a kernel, several GPUs, memory that runs out, and how long anything takes: rates measured here, and so
  what the default plan restores, are those of no machine.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.client import RequestFailed
from bench.harness import Answer, ModelSpec, Server, ServerDied, make_model, random_prompt
from tests.e2e.conftest import sent_together
from tests.e2e.scenarios import tail_logprobs, worst

SERVER_ARGS = ("--page-size", "64", "--max-total-tokens", "1536", "--chunked-prefill-size", "256", "--sleep-on-idle")
TIER = ("--hicache-backend", "hcache")
ALL = (*TIER, "--hcache-plan", "always")
HIDDEN, KV = (*ALL, "--hcache-representation", "hidden"), (*ALL, "--hcache-representation", "kv")
TOLERANCE = 1e-3  # of log-probabilities; the same kernels run with and without the tier

PLAIN = ModelSpec("llama", hidden_size=256, layers=3)  # a page of a layer is large enough for the copy engine
ENGINE = "emulated copy engine: "
FAULTS = ("emulated GPU: ", "hcache: restoring failed", "hcache: a page could not be kept")


Asks = Callable[[Server], list[Answer]]


def an_evicted_prefix(server: Server) -> list[Answer]:
    prefix = random_prompt(700, seed=1)
    first = server.send(tail_logprobs(prefix))
    for seed in (2, 3, 4):
        server.generate(random_prompt(800, seed=seed), 1)
    return [first, server.send(tail_logprobs(prefix + random_prompt(40, seed=5)))]


def three_conversations(server: Server) -> list[Answer]:
    """At once, of three turns each; their prefixes do not fit into the pool together."""

    def converse(index: int) -> list[Answer]:
        answers, history = list[Answer](), random_prompt(500 + 40 * index, seed=100 + index)
        for turn in range(3):
            answers.append(server.send(tail_logprobs(history, new_tokens=24)))
            history = [*history, *answers[-1].output_ids, *random_prompt(90, seed=200 + 10 * index + turn)]
        return answers

    with ThreadPoolExecutor(3) as pool:
        return [answer for answers in pool.map(converse, range(3)) for answer in answers]


def forks(server: Server) -> list[Answer]:
    """Three at once of an evicted prefix; of one that is too short to wait for, each loads a copy."""
    answers = list[Answer]()
    for seed, tokens in ((300, 640), (310, 384)):
        prefix = random_prompt(tokens, seed=seed)
        server.generate(prefix, 1)
        server.generate(random_prompt(1400, seed=seed + 1), 1)
        requests = [tail_logprobs(prefix + random_prompt(40 + i, seed=seed + 2 + i)) for i in range(3)]
        answers += sent_together(server, requests)
    return answers


def all_of_it(server: Server) -> list[Answer]:
    return [*an_evicted_prefix(server), *three_conversations(server), *forks(server)]


@dataclass(frozen=True)
class Way:
    """To serve: the tier's flags and what the device is like, and what the log must have and must not have."""

    flags: tuple[str, ...]
    device: str = "late"
    log_has: tuple[str, ...] = ()
    log_lacks: tuple[str, ...] = ()
    spec: ModelSpec = PLAIN
    restores: bool = True
    shares: bool = True  # loads, for requests that begin alike
    control: bool = False  # answers must differ
    asks: Asks = all_of_it
    like: tuple[str, ...] = ()  # flags of the server whose answers must be the same; none: that has no tier


WAYS = {
    "engine": Way(HIDDEN, log_has=("by kernels passed", "storing hidden", ENGINE)),
    "lazy": Way(HIDDEN, "lazy", log_has=("storing hidden", ENGINE)),
    "kernel": Way((*HIDDEN, "--hcache-copier", "kernel"), log_has=("storing hidden",), log_lacks=(ENGINE,)),
    "unregistered": Way(HIDDEN, "late unregistered", ("cannot register",), (ENGINE,)),
    "kv": Way(KV, log_has=("storing kv", ENGINE)),
    "default": Way(TIER, log_has=("calibrated",), restores=False, shares=False),
    "packed": Way(
        (*HIDDEN, "--hcache-codec", "packed"),
        spec=replace(PLAIN, dtype="bfloat16"),  # in which prefilling in other pieces gives other answers
        asks=an_evicted_prefix,
        shares=False,
        like=HIDDEN,
    ),
    "replay": Way(HIDDEN, log_has=("by replay of K and V passed",), spec=replace(PLAIN, architecture="stablelm")),
    "qwen3": Way(HIDDEN, log_has=("by kernels passed",), spec=replace(PLAIN, architecture="qwen3", kv_heads=4)),
    "latent": Way(KV, spec=replace(PLAIN, architecture="deepseek_v2")),
    "windows": Way(KV, spec=replace(PLAIN, architecture="mellum"), shares=False),
    "control": Way(HIDDEN, "late unordered", log_has=("storing hidden",), shares=False, control=True),
}


class EmulatedServer(Server):
    def __init__(self, device: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, env={"EMULATED_GPU": device, "OMP_NUM_THREADS": "1"}, start_timeout_s=900, **kwargs)

    def command(self) -> list[str]:
        words = super().command()
        words[words.index("sglang.launch_server")] = "tests.emulated_gpu.server"
        words[words.index("--device") + 1] = "cuda"
        return words


def are_equal(one: Answer, other: Answer) -> bool:
    try:
        difference = worst([one], [other])
    except ValueError:  # they are not even of the same tokens
        return False
    return difference.same_tokens and difference.logprob <= TOLERANCE


class Rehearsal:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @functools.cache  # noqa: B019
    def _reference(self, spec: ModelSpec, asks: Asks, flags: tuple[str, ...]) -> list[Answer]:
        name = f"{'tier' if flags else 'no-tier'}-{spec.architecture}-{spec.dtype}"
        return self._answers(name, spec, asks, flags)[0]

    def _answers(
        self, name: str, spec: ModelSpec, asks: Asks, flags: tuple[str, ...], device: str = "late"
    ) -> tuple[list[Answer], int]:
        """And how often requests have waited for another one's load."""
        if flags:
            flags = (*flags, "--hcache-dir", str(self._folder / f"store-{name}"))
        with EmulatedServer(device, self._model(spec), (*SERVER_ARGS, *flags), log=self._log(name)) as server:
            return asks(server), server.tier_state()["loads_shared"] if flags else 0

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _model(self, spec: ModelSpec) -> Path:
        return make_model(self._folder / spec.digest(0)[:16], spec)

    def passes(self, name: str, way: Way) -> bool:
        """Prints how it went."""
        wanted, began = self._reference(way.spec, way.asks, way.like), time.monotonic()
        try:
            found, shared = self._answers(name, way.spec, way.asks, way.flags, way.device)
        except (ServerDied, RequestFailed) as error:
            print(f"{name:14} FAILED: {error}", flush=True)
            return False
        text = self._log(name).read_text(errors="replace")
        equal = sum(map(are_equal, found, wanted))
        restored = sum(answer.cached_host for answer in found)
        wrong = [f"the log lacks {part!r}" for part in way.log_has if part not in text]
        wrong += [f"the log has {part!r}" for part in (*way.log_lacks, *FAULTS) if part in text]
        if (equal == len(found)) == way.control:
            wrong.append("answers are equal" if way.control else "answers differ")
        if way.restores and not restored:
            wrong.append("nothing was restored")
        if way.shares and not shared:
            wrong.append("no load was shared")
        took = f"{time.monotonic() - began:.0f} s"
        print(
            f"{name:14} {equal} of {len(found)} answers equal, {restored} tokens restored, {took}", *wrong, flush=True
        )
        return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--keep", type=Path, help="folder for logs and models")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rehearsal = Rehearsal(arguments.keep or Path(temporary))
        passed = [rehearsal.passes(name, WAYS[name]) for name in arguments.ways or WAYS]
    return int(not all(passed))


if __name__ == "__main__":
    raise SystemExit(main())
