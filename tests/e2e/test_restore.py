"""Evicted prefixes come back as hidden states, and no output changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness import Answer, RequestFailed, Server, compare, random_prompt
from tests.e2e.conftest import Workshop, started_together, update_weights, wait_for_stores
from tests.e2e.scenarios import (
    FLOAT32_TOLERANCE,
    LLAMA,
    SCENARIOS,
    assert_equal,
    evict_everything,
    tail_logprobs,
    whole_pages,
)

Reference = dict[str, list[Answer]]

SPOILT_PLUGIN = Path(__file__).parent / "spoilt"
WAYS_TO_SPOIL = ("zero a page", "swap two pages", "skip a layer", "shift positions")


@pytest.fixture(scope="module")
def way_to_spoil(workshop: Workshop) -> Path:
    return workshop.folder / "way-to-spoil"


@pytest.fixture(scope="module")
def servers(workshop: Workshop, reference: Reference, way_to_spoil: Path) -> Iterator[tuple[Server, ...]]:
    """One as it comes, and one that spoils what it restores."""
    way_to_spoil.write_text("not at all")
    env = {"HCACHE_SPOIL": str(way_to_spoil), "PYTHONPATH": str(SPOILT_PLUGIN)}
    folder = workshop.folder
    with started_together(
        workshop.tiered(folder / "store-restore"), workshop.tiered(folder / "store-spoilt", env=env)
    ) as servers:
        yield servers


@pytest.fixture(scope="module")
def server(servers: tuple[Server, ...]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def restored(server: Server) -> Reference:
    return {name: scenario(server) for name, scenario in SCENARIOS.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_outputs_equal_those_without_the_tier(scenario: str, restored: Reference, reference: Reference) -> None:
    assert_equal(restored[scenario], reference[scenario])


def test_a_long_prefix_is_restored_whole(restored: Reference, reference: Reference) -> None:
    again = restored["evicted_prefix"][1]
    assert again.cached_host == whole_pages(1200)
    assert again.cached_device == 0
    assert reference["evicted_prefix"][1].cached_tokens == 0, "other traffic does not evict the prefix"


def test_generated_tokens_are_restored(restored: Reference) -> None:
    for former, answer in zip(restored["conversation"], restored["conversation"][1:], strict=False):
        # The last token of an answer has no K and V yet when the answer ends.
        assert answer.cached_host == whole_pages(former.prompt_tokens + len(former.output_ids) - 1)


def test_concurrent_conversations_are_restored(restored: Reference, server: Server) -> None:
    answers = restored["eight_conversations"]
    assert all(answer.finish_reason == "length" for answer in answers)
    later_turns = [answer for i, answer in enumerate(answers) if i % 3]
    assert sum(answer.cached_host > 0 for answer in later_turns) >= len(later_turns) // 2
    assert server.reported_leaks() == []


def test_tenants_never_share_pages(restored: Reference) -> None:
    first, second = restored["two_tenants"][:4], restored["two_tenants"][4:]
    assert [answer.cached_tokens for answer in first] == [0] * 4
    assert [answer.cached_host for answer in second] == [whole_pages(699)] * 4


def test_state_accounts_for_what_was_restored(restored: Reference, server: Server) -> None:
    before = server.tier_state()
    evict_everything(server, seed=900)
    between = server.tier_state()
    again = server.send(tail_logprobs(random_prompt(1200, seed=1) + random_prompt(40, seed=2)))
    after = server.tier_state()
    assert between["tokens_restored"] > before["tokens_restored"]
    assert after["tokens_restored"] - between["tokens_restored"] == again.cached_host == whole_pages(1232)
    assert after["loads_accepted"] - between["loads_accepted"] == 1
    assert after["representation"] == "hidden"
    assert after["loads_failed"] == after["pages_damaged"] == after["pages_leased"] == 0
    assert [volume["state"] for volume in after["volumes"]] == ["ok"]


def test_the_whole_prefix_decides_the_output(server: Server) -> None:
    """Control: without this, equal outputs would prove nothing."""
    prompt = random_prompt(1200, seed=1)
    changed = [*prompt[:5], prompt[5] + 1, *prompt[6:]]
    difference = compare(server.send(tail_logprobs(prompt)), server.send(tail_logprobs(changed)))
    assert difference.logprob > 20 * FLOAT32_TOLERANCE


def test_weights_that_cannot_be_loaded_change_nothing(server: Server, restored: Reference) -> None:
    with pytest.raises(RequestFailed, match="Failed to get"):
        server.update_weights(Path("/no/such/model"))
    evict_everything(server)
    assert server.generate(random_prompt(1200, seed=1), 1).cached_host > 1000
    state = server.tier_state()
    assert state["prefetcher"] == "ok"
    assert state["volumes"] != []


def test_weights_that_are_written_where_they_are(server: Server, restored: Reference) -> None:
    """SGLang sees no more of RDMA than the session it comes in; what is on file is not for what it wrote."""
    server.hold_weight_session()
    wait_for_stores(server)
    server.flush_cache()
    assert server.generate(random_prompt(1200, seed=1), 1).cached_tokens == 0
    assert server.tier_state()["volumes"] == []


def test_other_weights_find_nothing_of_the_former(workshop: Workshop, server: Server, restored: Reference) -> None:
    """Weights replaced in place: no page of the old ones is restored, and new ones are kept in memory."""
    prompt = random_prompt(1200, seed=1)
    update_weights(server, workshop.model(replace(LLAMA, sharpness=2.0)))
    prefilled = server.send(tail_logprobs(prompt))
    evict_everything(server)
    again = server.send(tail_logprobs(prompt))
    assert prefilled.cached_tokens == 0
    assert compare(prefilled, restored["evicted_prefix"][0]).logprob > 20 * FLOAT32_TOLERANCE
    assert again.cached_host == whole_pages(1199 - 8)
    assert_equal([again], [prefilled])
    state = server.tier_state()
    assert state["volumes"] == []
    assert state["prefetcher_restarts"] == 0


def test_without_the_flag_nothing_is_attached(server: Server, reference_log: str) -> None:
    """The launcher's and the gate's hooks are attached before SGLang logs; what serves is attached after."""
    attached = "hook(s) to sglang.srt.model_executor"
    assert attached in server.log_text()
    assert attached not in reference_log
    assert "hook(s) to" not in reference_log
    assert "hcache:" not in reference_log


def test_the_comparison_notices_a_spoilt_restoration(servers: tuple[Server, ...], way_to_spoil: Path) -> None:
    """Control: each way to spoil what is restored makes the outputs differ."""
    _, server = servers
    prompt = random_prompt(1200, seed=1)
    prefilled = server.send(tail_logprobs(prompt))
    noticed = {}
    for spoilt in ("not at all", *WAYS_TO_SPOIL):
        way_to_spoil.write_text(spoilt)
        evict_everything(server)
        answer = server.send(tail_logprobs(prompt))
        assert answer.cached_host == whole_pages(1199 - 8)
        noticed[spoilt] = compare(answer, prefilled).logprob > FLOAT32_TOLERANCE
    assert noticed == {"not at all": False} | dict.fromkeys(WAYS_TO_SPOIL, True)
