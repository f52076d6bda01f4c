"""While a drive reads the end of a prefix, the engine prefills its beginning: a real server with a slow drive."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from pathlib import Path

import pytest

from bench.harness import ModelSpec, Server, random_prompt
from tests.e2e.conftest import Workshop, only_on_disk, started_together, wait_until
from tests.e2e.scenarios import PAGE, SERVER_ARGS, assert_equal, tail_logprobs

# A head start pays if reading takes a ninth to nine times as long as prefilling, by the server's rates. What a chunk
# costs whatever its tokens, much with small models, is in the time measured here and hardly in those rates: half of
# that time is nearer to their middle.
READ_OVER_PREFILL = 0.5
SPEC = ModelSpec("llama", hidden_size=256, layers=4, max_position_embeddings=8192)
PREFIX = 48 * PAGE
PREFIXES = range(3)
ARGS = (*SERVER_ARGS, "--max-total-tokens", "8192", "--chunked-prefill-size", "512")
BYTES = PREFIX * 256 * 4 * 4  # of a prefix, as hidden states


def first(prefix: int) -> list[int]:
    return random_prompt(PREFIX, seed=prefix)


def again(prefix: int) -> list[int]:
    return first(prefix) + random_prompt(40, seed=100 + prefix)


def as_it_comes(
    workshop: Workshop, store: Path, args: tuple[str, ...], read_s: float, env: dict[str, str] | None = None
) -> Server:
    """Plans what it restores, and reads a prefix from its files in `read_s`."""
    tier = ("--hicache-backend", "hcache", "--hcache-representation", "hidden", "--hcache-dir", str(store))
    slow = ("--hcache-read-limit", str(BYTES / read_s / 1e9), "--hicache-storage-prefetch-policy", "wait_complete")
    return Server(workshop.model(SPEC), (*args, *tier, *slow), log=workshop.log("head-start"), env=env)


def leave(server: Server, prompt: list[int]) -> None:
    """Ask, and hang up before there is an answer."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    body = {"input_ids": prompt, "stream": True, "sampling_params": {"max_new_tokens": 4}}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    time.sleep(0.15)
    connection.close()
    wait_until(lambda: server.tier_state()["requests_held_now"] == server.tier_state()["pages_leased"] == 0, 60)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_beginning_is_prefilled_and_the_end_restored(workshop: Workshop, fresh_store: Path, ranks: int) -> None:
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else None
    args = (*ARGS, "--tp", str(ranks))
    with started_together(workshop.stock(SPEC, args, env=env)) as (stock,):
        prefill_s = statistics.median(stock.send(tail_logprobs(first(prefix))).ttft_s for prefix in PREFIXES)
        stock.flush_cache()
        wanted = [stock.send(tail_logprobs(again(prefix))) for prefix in PREFIXES]
    with started_together(as_it_comes(workshop, fresh_store, args, READ_OVER_PREFILL * prefill_s, env)) as (server,):
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
    assert state["head_starts"] > 0, (prefill_s, state)
    assert state["tokens_ahead"] % PAGE == 0
    assert left["head_starts"] > state["head_starts"]
    assert after["requests_admitted_late"] == after["loads_failed"] == 0
    assert any(PAGE <= answer.cached_host < PREFIX for answer in answers), "part of a prefix was restored"
    for answer in answers:
        assert answer.cached_device == 0, "what was prefilled for a request is no hit of its"
        assert answer.cached_tokens == answer.cached_host
    assert "Scheduler hit an exception" not in log
    assert "state was deleted" not in log, "nobody hears of what was begun"
