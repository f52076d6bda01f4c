"""While a drive reads the end of a prefix, the engine prefills its beginning: a real server with a slow drive."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.harness import Answer, ModelSpec, Server, random_prompt
from sglang_hcache.planner.hf_config import shape_of_config
from tests.e2e.conftest import PATIENT, Workshop, only_on_disk, started_together
from tests.e2e.scenarios import PAGE, SERVER_ARGS, assert_equal, tail_logprobs, wait_until

KNOWN_RATES_PLUGIN = Path(__file__).parent / "known_rates"
SPEC = ModelSpec("llama", hidden_size=256, layers=4, max_position_embeddings=8192)
PREFIX = 48 * PAGE
PREFIXES = range(3)
ARGS = (*SERVER_ARGS, "--max-total-tokens", "8192", "--chunked-prefill-size", "512")
BYTES = PREFIX * 256 * 4 * 4  # of a prefix, as hidden states
READ_S = 2.0  # of a prefix
PREFILL_S = 4.0  # likewise, by the rates that the server is told: so long that waiting pays in any case
RATES: dict[str, float] = dict.fromkeys(
    ("projection_flop_per_s", "memory_bytes_per_s", "bus_bytes_per_s", "scatter_bytes_per_s"), 1e12
)


def first(prefix: int) -> list[int]:
    return random_prompt(PREFIX, seed=prefix)


def again(prefix: int) -> list[int]:
    return first(prefix) + random_prompt(40, seed=100 + prefix)


def evenly_matched(workshop: Workshop, store: Path, args: tuple[str, ...], env: dict[str, str]) -> Server:
    """Plans what it restores, with a drive that is about as fast as the engine."""
    tier = ("--hicache-backend", "hcache", "--hcache-representation", "hidden", "--hcache-dir", str(store))
    slow = ("--hcache-read-limit", str(BYTES / READ_S / 1e9), "--hicache-storage-prefetch-policy", "wait_complete")
    plugins = os.pathsep.join([str(KNOWN_RATES_PLUGIN), PATIENT["PYTHONPATH"]])
    env = {"PYTHONPATH": plugins, "HCACHE_RATES": json.dumps(rates(workshop)), **env}
    return Server(workshop.model(SPEC), (*args, *tier, *slow), log=workshop.log("head-start"), env=env)


def rates(workshop: Workshop) -> dict[str, float]:
    shape = shape_of_config(json.loads((workshop.model(SPEC) / "config.json").read_text()), "")
    flop = shape.layers * (PREFIX * shape.linear_flop + PREFIX**2 / 2 * shape.attention_flop_per_pair)
    return RATES | dict.fromkeys(("gemm_flop_per_s", "attention_flop_per_s"), flop / PREFILL_S)


def leave(server: Server, prompt: list[int]) -> None:
    """Ask, and hang up when it has been given a head start."""
    before = server.tier_state()["head_starts"]
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    body = {"input_ids": prompt, "stream": True, "sampling_params": {"max_new_tokens": 4}}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    wait_until(lambda: server.tier_state()["head_starts"] > before, 60)
    connection.close()
    wait_until(lambda: server.tier_state()["requests_held_now"] == server.tier_state()["pages_leased"] == 0, 60)


@dataclass(frozen=True)
class Started:
    """Without the tier, and with it by the number of ranks."""

    stock: Server
    tiered: dict[int, Server]


@pytest.fixture(scope="module")
def started(workshop: Workshop) -> Iterator[Started]:
    def server(ranks: int) -> Server:
        env = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
        store = workshop.folder / f"store-head-start-{ranks}"
        return evenly_matched(workshop, store, (*ARGS, "--tp", str(ranks)), env)

    servers = Started(workshop.stock(SPEC, ARGS), {ranks: server(ranks) for ranks in (1, 2)})
    with started_together(servers.stock, *servers.tiered.values()):
        yield servers


@pytest.fixture(scope="module")
def wanted(started: Started) -> list[Answer]:
    return [started.stock.send(tail_logprobs(again(prefix))) for prefix in PREFIXES]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_beginning_is_prefilled_and_the_end_restored(started: Started, wanted: list[Answer], ranks: int) -> None:
    server = started.tiered[ranks]
    for prefix in PREFIXES:
        server.send(tail_logprobs(first(prefix)))
    only_on_disk(server)
    answers = [server.send(tail_logprobs(again(prefix))) for prefix in PREFIXES]
    state = server.tier_state()
    only_on_disk(server)
    for prefix in PREFIXES:
        leave(server, again(prefix))
    left = server.tier_state()
    only_on_disk(server)
    answers += [server.send(tail_logprobs(again(prefix))) for prefix in PREFIXES]
    after = server.tier_state()
    log = server.log_text()
    assert_equal(answers, wanted + wanted)
    assert state["head_starts"] == len(PREFIXES)
    assert state["tokens_ahead"] >= len(PREFIXES) * PAGE
    assert left["head_starts"] == 2 * len(PREFIXES)
    assert after["head_starts"] == 3 * len(PREFIXES)
    assert after["requests_admitted_late"] == after["loads_failed"] == 0
    assert any(PAGE <= answer.cached_host < PREFIX for answer in answers), "part of a prefix was restored"
    for answer in answers:
        assert answer.cached_device == 0, "what was prefilled for a request is no hit of its"
        assert answer.cached_tokens == answer.cached_host
    assert "Scheduler hit an exception" not in log
    assert "state was deleted" not in log, "nobody hears of what was begun"
