"""Schedulers with requests of their own share one prefetcher: what one has stored, another restores."""

from __future__ import annotations

import os
import re
import urllib.request
from pathlib import Path

import pytest

from bench.harness import ModelSpec, Server, random_prompt
from sglang_hcache.metrics import EVERY_S
from tests.e2e.conftest import PATIENT, Workshop, begin, started_together, stopped
from tests.e2e.scenarios import assert_equal, tail_logprobs, wait_until, whole_pages

PROMPT_TOKENS = 700
RESTORED_TOKENS = whole_pages(PROMPT_TOKENS - 9)  # all but the last tokens, whose log-probabilities are asked for
RANKS = int(os.environ.get("HCACHE_GROUP_RANKS", "1"))  # that have the same requests
ARGS = (
    *("--page-size", "64", "--max-total-tokens", "2048", "--chunked-prefill-size", "512", "--enable-metrics"),
    *("--hicache-ratio", "8"),
)


@pytest.mark.parametrize(
    ("architecture", "parallelism", "representation"),
    [
        ("llama", ("--tp", str(RANKS), "--dp", "2"), "hidden"),
        ("qwen3", ("--tp", str(2 * RANKS), "--attn-dp-size", "2"), "hidden"),
        ("deepseek_v2", ("--tp", str(2 * RANKS), "--dp", "2", "--enable-dp-attention"), "kv"),
    ],
    ids=["replicas", "attention, hidden states", "attention, latents"],
)
def test_what_one_has_stored_another_restores(
    architecture: str, parallelism: tuple[str, ...], representation: str, workshop: Workshop, fresh_store: Path
) -> None:
    """SGLang gives requests to the two in turn; together they have room for less than what is asked for at once."""
    cores = "|".join(str(rank % 2) for rank in range(2 * RANKS))
    args, env = (*ARGS, *parallelism), {"SGLANG_CPU_OMP_THREADS_BIND": cores, **PATIENT}
    requests = [tail_logprobs(random_prompt(PROMPT_TOKENS, seed=60 + i), 4) for i in range(5)]
    with started_together(workshop.tiered(fresh_store, ModelSpec(architecture), args, env=env)) as (server,):
        fresh = [server.send(requests[0])]
        wait_until(lambda: server.tier_state()["pages_host"] >= PROMPT_TOKENS // 64, 30)
        by_the_other = server.send(requests[0])
        fresh += [server.send(request) for request in requests[1:]]
        server.tier_states()  # comes from the prefetcher behind all pages that have been stored
        with stopped(server.pids("sglang::scheduler")):
            asked = [begin(server, request) for request in requests]
        at_once = [answer() for answer in asked]
        states = server.tier_states()
        restored = {group_of(state["scheduler"]): state["tokens_restored"] for state in states}
        wait_until(lambda: restored_by_metrics(server) == restored, 2 * EVERY_S + 10)
    assert [answer.cached_tokens for answer in fresh] == [0] * len(requests)
    assert by_the_other.cached_host == RESTORED_TOKENS
    assert all(answer.cached_tokens >= RESTORED_TOKENS for answer in at_once)
    assert_equal([by_the_other, *at_once], [fresh[0], *fresh])
    assert [state["representation"] for state in states] == [representation] * 2
    assert states[0]["pages_total"] == states[1]["pages_total"]
    assert {state["prefetcher_clients"] for state in states} == {2 * RANKS}
    assert sorted(restored) == [0, 1]
    assert all(restored.values())


def group_of(scheduler: str) -> int:
    """Its `dp_rank`."""
    number = int(re.findall(r"\d+", scheduler)[0])
    return number if scheduler.startswith("replica") else number // RANKS


def restored_by_metrics(server: Server) -> dict[int, float]:
    """Of the first rank of each group, by its `dp_rank`."""
    with urllib.request.urlopen(f"http://{server.host}:{server.port}/metrics", timeout=10) as answer:
        lines = re.findall(r"^hcache_restored_tokens_total\{(.*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
    series = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in lines]
    assert {labels["tp_rank"] for labels, _ in series} <= {str(rank) for rank in range(RANKS)}
    return {int(labels["dp_rank"]): value for labels, value in series if labels["tp_rank"] == "0"}
