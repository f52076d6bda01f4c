"""Requests that come together and begin alike: one loads what they have in common, for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.harness import Answer, Server, random_prompt
from tests.e2e.conftest import (
    PATIENT,
    Workshop,
    nothing_is_held,
    only_on_disk,
    sent_together,
    started_together,
)
from tests.e2e.scenarios import PAGE, SERVER_ARGS, assert_equal, tail_logprobs

TOGETHER, PREFIX = 6, 20 * PAGE
ARGS = (*SERVER_ARGS, "--max-total-tokens", "12288", "--chunked-prefill-size", "512")
WAYS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "overlap": ((), {}),
    "two ranks, no overlap, longest prefix first": (
        ("--tp", "2", "--disable-overlap-schedule", "--schedule-policy", "lpm"),
        {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **PATIENT},
    ),
}
PROMPTS = [random_prompt(PREFIX, seed=1) + random_prompt(40 + 10 * i, seed=2 + i) for i in range(TOGETHER)]


@pytest.fixture(scope="module")
def servers(workshop: Workshop) -> Iterator[dict[str, Server]]:
    servers = {"stock": workshop.stock(args=ARGS)}
    for number, (way, (args, env)) in enumerate(WAYS.items()):
        store = workshop.folder / f"store-shared-loads-{number}"
        servers[way] = workshop.tiered(store, args=(*ARGS, *args), env=env)
    with started_together(*servers.values()):
        yield servers


@pytest.fixture(scope="module")
def wanted(servers: dict[str, Server]) -> list[Answer]:
    return [servers["stock"].send(tail_logprobs(prompt)) for prompt in PROMPTS]


def ask_together(server: Server, wanted: list[Answer]) -> tuple[dict[str, int], list[Answer]]:
    """What the tier has counted for requests whose prefix only files have, and their answers, which are right."""
    server.send(tail_logprobs(random_prompt(PREFIX, seed=1)))
    only_on_disk(server)
    before = server.tier_state()
    answers = sent_together(server, list(map(tail_logprobs, PROMPTS)))
    after = server.tier_state()
    assert_equal(answers, wanted)
    assert nothing_is_held(server)
    assert server.reported_leaks() == []
    return {name: after[name] - before[name] for name in ("tokens_restored", "loads_shared", "loads_failed")}, answers


@pytest.mark.parametrize("way", WAYS)
def test_what_is_common_is_loaded_once(way: str, servers: dict[str, Server], wanted: list[Answer]) -> None:
    counted, answers = ask_together(servers[way], wanted)
    assert counted["tokens_restored"] == PREFIX
    assert counted["loads_shared"] == 1, "the batch is closed; the others come with the next"
    assert counted["loads_failed"] == 0
    assert sorted(answer.cached_host for answer in answers) == [0] * (TOGETHER - 1) + [PREFIX]
    assert all(answer.cached_tokens == PREFIX for answer in answers)
