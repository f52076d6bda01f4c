"""Time to first token of a long evicted prefix: prefilled again, restored as K and V, restored as hidden states.

    python -m bench.ttft [--json] [--rounds N] [--prefix-tokens N] [--hidden-size N] [--layers N]

Method: an MHA Llama in float32 is served three times, one after another: without a tier, with K and V, with
hidden states. The KV pool holds one conversation and a little more, and two conversations take turns, so each
request finds its prefix evicted. Each asks for its prefix and 64 tokens never seen before. Times are medians
over all requests after the two that filled the store; bytes are what the store's directory occupies on disk
after the server has stopped, everything counted, over the tokens it holds. The greedy answers of all servers are
compared token by token. For `ttft_ssd_s`, hidden states alone: before each request device and host memory are
emptied, so that the prefix is on disk only, read past the page cache where the file system allows it; `idle` finds
an idle server, `queued` arrives just after a prompt of 512 tokens, whose prefill it waits for. `in_lookup` is the
same without prefetching: the scheduler waits for the disk when it looks the prefix up.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang
import torch

from bench.harness import Answer, ModelSpec, Server, compare, disk_bytes, make_model, random_prompt
from bench.report import about, arguments_of, emit, progress

NEW_TOKENS = 64
ANSWER_TOKENS = 4
PAGE_TOKENS = 64
CONVERSATIONS = 2
MODES = ("recompute", "kv", "hidden")
OTHER_TOKENS = 512
NO_PREFETCH = Path(__file__).parent / "read_in_lookup"


@dataclass(frozen=True)
class Case:
    prefix_tokens: int
    hidden_size: int
    layers: int
    rounds: int  # timed requests a server, half of them of each conversation

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(
            "llama",
            hidden_size=self.hidden_size,
            layers=self.layers,
            heads=self.hidden_size // 64,
            intermediate=self.hidden_size * 11 // 4,
            max_position_embeddings=2 * self.prefix_tokens,
        )

    def prompt(self, conversation: int, turn: int) -> list[int]:
        prefix = random_prompt(self.prefix_tokens, seed=conversation)
        return prefix + random_prompt(NEW_TOKENS, seed=1000 + conversation + CONVERSATIONS * turn)


@dataclass(frozen=True)
class Measured:
    answers: list[Answer]
    disk_bytes: int = 0
    stored_tokens: int = 0
    from_disk: dict[str, list[Answer]] = field(default_factory=dict)  # `idle` and `queued`

    @property
    def ttft_s(self) -> float:
        return median_s(self.answers)


def median_s(answers: Sequence[Answer]) -> float:
    """Median time to the first token, in seconds."""
    return statistics.median(answer.ttft_s for answer in answers)


def measure(case: Case, mode: str, folder: Path, *, prefetch: bool = True) -> Measured:
    """Serve all requests of the case in one mode; the first of each conversation only fills the store."""
    store = folder / f"store-{mode}"
    shutil.rmtree(store, ignore_errors=True)
    # One conversation with its answer and a little more: the other one is always evicted.
    pool_tokens = -(-(case.prefix_tokens + NEW_TOKENS + ANSWER_TOKENS) // PAGE_TOKENS) * PAGE_TOKENS + 256
    args = ["--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(pool_tokens)]
    if mode != "recompute":
        args += [
            "--hicache-backend",
            "hcache",
            "--hcache-dir",
            str(store),
            "--hcache-representation",
            mode,
            "--hcache-plan",
            "always",
        ]
        args += ["--hicache-ratio", "4", "--hicache-storage-prefetch-policy", "wait_complete"]
    model = make_model(folder / "model", case.model)
    env = {} if prefetch else {"PYTHONPATH": os.pathsep.join((str(NO_PREFETCH), os.environ.get("PYTHONPATH", "")))}
    with Server(model, args, log=folder / f"{mode}.log", env=env) as server:
        requests = CONVERSATIONS + (case.rounds if prefetch else 0)
        answers = []
        for request in range(requests):
            turn, conversation = divmod(request, CONVERSATIONS)
            answer = server.generate(case.prompt(conversation, turn), ANSWER_TOKENS)
            progress(f"{mode}: request {request + 1} of {requests}, {answer.ttft_s:.2f} s")
            answers.append(answer)
        if mode == "recompute":
            return Measured(answers[CONVERSATIONS:])
        _require_restored(case, answers[CONVERSATIONS:])
        from_disk = {
            name: [_from_disk(case, server, turn, name == "queued") for turn in range(case.rounds)]
            for name in (("idle", "queued") if mode == "hidden" else ())
        }
        stored = wait_until_written(server) * PAGE_TOKENS
    return Measured(answers[CONVERSATIONS:], disk_bytes(store), stored, from_disk)


def _from_disk(case: Case, server: Server, round_: int, queued: bool) -> Answer:
    """One request of the case whose prefix is on disk only."""
    turn, conversation = divmod(round_, CONVERSATIONS)
    wait_until_written(server)
    server.flush_cache()
    with ThreadPoolExecutor(1) as pool:
        if queued:
            pool.submit(server.generate, random_prompt(OTHER_TOKENS, seed=5000 + round_), 1)
            time.sleep(0.1)
        answer = server.generate(case.prompt(conversation, 1 + turn), ANSWER_TOKENS)
    progress(f"from disk: {answer.ttft_s:.2f} s")
    _require_restored(case, [answer])
    return answer


def wait_until_written(server: Server) -> int:
    """Pages in files, once there are no more to write."""
    while (state := server.tier_state())["pages_dirty"]:
        time.sleep(0.1)
    return int(state["pages_file"])


def run(case: Case, folder: Path) -> dict[str, Any]:
    """The report; its keys are what `--json` prints."""
    measured = {mode: measure(case, mode, folder) for mode in MODES}
    in_lookup = measure(case, "hidden", folder, prefetch=False)
    ttft_s = {mode: measured[mode].ttft_s for mode in MODES}
    reference = measured["recompute"].answers
    return {
        "prefix_tokens": case.prefix_tokens,
        "new_tokens": NEW_TOKENS,
        "model": {"hidden_size": case.hidden_size, "layers": case.layers, "dtype": case.model.dtype},
        "rounds": case.rounds,
        "ttft_s": ttft_s,
        "ttft_ssd_s": {
            name: {"prefetched": median_s(measured["hidden"].from_disk[name]), "in_lookup": median_s(answers)}
            for name, answers in in_lookup.from_disk.items()
        },
        "ratio_recompute": ttft_s["recompute"] / ttft_s["hidden"],
        "ratio_kv": ttft_s["kv"] / ttft_s["hidden"],
        "bytes_per_token": {
            mode: measured[mode].disk_bytes / measured[mode].stored_tokens for mode in MODES if mode != "recompute"
        },
        "tokens_equal": all(
            compare(answer, wanted).same_tokens
            for mode in MODES
            for answer, wanted in zip(measured[mode].answers, reference, strict=True)
        )
        and all(
            compare(answer, wanted).same_tokens
            for run in (measured["hidden"], in_lookup)
            for answers in run.from_disk.values()
            for answer, wanted in zip(answers, reference, strict=True)
        ),
        **about(
            __doc__,
            machine={"accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
            versions={"sglang": sglang.__version__, "torch": torch.__version__},
        ),
    }


def _require_restored(case: Case, answers: list[Answer]) -> None:
    short = [answer.cached_host for answer in answers if answer.cached_host < case.prefix_tokens]
    if short:
        raise RuntimeError(f"a timed request was not restored: {short} of {case.prefix_tokens} prefix tokens")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="hcache-ttft-") as temporary:
        yield Path(temporary)


def lines(report: dict[str, Any]) -> Iterator[str]:
    for mode in MODES:
        yield f"{mode:>10}: {report['ttft_s'][mode]:7.3f} s to the first token"
    for name, times in report["ttft_ssd_s"].items():
        ahead, late = times["prefetched"], times["in_lookup"]
        yield f"from SSD, {name:>6}: {ahead:7.3f} s prefetched, {late:7.3f} s read in the lookup"
    yield f"restored as hidden states: {report['ratio_recompute']:.1f} x faster than prefilling again"


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--prefix-tokens", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6, help="timed requests in each mode")
    parser.add_argument("--keep", type=Path, help="folder for model, logs and stores; default: a temporary one")
    arguments = parser.parse_args()
    case = Case(arguments.prefix_tokens, arguments.hidden_size, arguments.layers, arguments.rounds)
    with _folder(arguments.keep) as folder:
        report = run(case, folder)
    emit(arguments, "ttft", report, lines(report))


if __name__ == "__main__":
    main()
