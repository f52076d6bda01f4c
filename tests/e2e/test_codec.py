"""Hidden states in fewer bytes: packed they give the very same answers, lossy ones close to what prefilling gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.harness import Answer, ModelSpec, Server, compare, random_prompt
from tests.e2e.conftest import Workshop, started_together, told_by_all
from tests.e2e.scenarios import LLAMA, SERVER_ARGS, TIER, evicted_prefix, tail_logprobs, whole_pages

CLOSER = 5  # times, than the same question after another prefix
SPEC = ModelSpec("llama", hidden_size=512, layers=2, heads=8, dtype="bfloat16")


def serving(workshop: Workshop, spec: ModelSpec, store: Path, *args: str) -> Server:
    tier = (*TIER, "--hcache-representation", "hidden")
    name = "-".join(arg.strip("-") for arg in args) or "plain"
    args = (*SERVER_ARGS, *tier, "--hcache-dir", str(store), *args)
    return Server(workshop.model(spec), args, log=workshop.log(name))


@pytest.fixture(scope="module")
def servers(workshop: Workshop) -> Iterator[tuple[Server, ...]]:
    """Without a codec, with the lossless one, and with a lossy one."""
    plain, packed, lossy = (workshop.folder / f"store-codec-{number}" for number in range(3))
    with started_together(
        serving(workshop, SPEC, plain),
        serving(workshop, SPEC, packed, "--hcache-codec", "packed"),
        serving(workshop, LLAMA, lossy, "--hcache-codec", "lossy_int8"),
    ) as servers:
        yield servers


def test_restored_from_packed_rows(servers: tuple[Server, ...]) -> None:
    plain, packed, _ = servers
    wanted, answers = told_by_all(evicted_prefix, plain, packed)
    other = plain.send(tail_logprobs(random_prompt(1200, seed=3) + random_prompt(40, seed=2)))
    state = packed.tier_state()
    assert wanted[1].cached_host == answers[1].cached_host == whole_pages(1200)
    assert state["codec"] == "packed"
    assert state["bytes_per_token"] == 0.75 * SPEC.layers * SPEC.hidden_size * 2
    assert state["tokens_not_encoded"] == 0
    for one, same in zip(answers, wanted, strict=True):
        assert compare(one, same).same_tokens
        assert compare(one, same).logprob == 0
    assert compare(answers[1], other).logprob > 0.1, "the prefix matters"


def test_restored_from_eight_bits(servers: tuple[Server, ...], reference: dict[str, list[Answer]]) -> None:
    (*_, lossy), wanted = servers, reference["evicted_prefix"]
    answers, state = evicted_prefix(lossy), lossy.tier_state()
    other = lossy.send(tail_logprobs(random_prompt(1200, seed=3) + random_prompt(40, seed=2)))
    assert answers[1].cached_host == whole_pages(1200)
    assert state["codec"] == "lossy_int8"
    assert state["bytes_per_token"] == LLAMA.layers * (LLAMA.hidden_size + 4)
    first, again = (compare(*pair) for pair in zip(answers, wanted, strict=True))
    assert first.logprob == 0, "what was never stored is exact"
    assert 0 < again.logprob < compare(answers[1], other).logprob / CLOSER
