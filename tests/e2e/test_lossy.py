"""Hidden states in eight bits: answers go on, and log-probabilities are close to what prefilling gives."""

from __future__ import annotations

from pathlib import Path

from bench.harness import ModelSpec, Server, compare, random_prompt
from tests.e2e.conftest import Workshop, started_together, tier_state
from tests.e2e.scenarios import SERVER_ARGS, evicted_prefix, tail_logprobs, whole_pages

SPEC = ModelSpec("llama", hidden_size=128, layers=3)
CLOSER = 5  # times, than the same question after another prefix


def test_restored_from_eight_bits(workshop: Workshop, fresh_store: Path) -> None:
    tier = ("--hicache-backend", "hcache", "--hcache-plan", "always", "--hcache-dir", str(fresh_store))
    args = (*SERVER_ARGS, *tier, "--hcache-lossy", "int8")
    lossy = Server(workshop.model(SPEC), args, log=workshop.log("lossy"))
    with started_together(workshop.stock(SPEC), lossy) as (stock, server):
        wanted, answers, state = evicted_prefix(stock), evicted_prefix(server), tier_state(server)
        other = stock.send(tail_logprobs(random_prompt(1200, seed=3) + random_prompt(40, seed=2)))
    assert answers[1].cached_host == whole_pages(1200)
    assert state["lossy"] == "int8"
    assert state["bytes_per_token"] == SPEC.layers * (SPEC.hidden_size + 4)
    first, again = (compare(*pair) for pair in zip(answers, wanted, strict=True))
    assert first.logprob == 0, "what was never stored is exact"
    assert 0 < again.logprob < compare(answers[1], other).logprob / CLOSER
