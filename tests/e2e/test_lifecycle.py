"""Requests that are aborted at any stage, retracted and paused: others get their answers, nothing stays leased.

A server that reads slowly, so that requests are held, retracts a running request every seventh step, and sorts
those that wait by what it finds of them.
"""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.harness import Answer, Request, Server, random_prompt
from tests.e2e.conftest import (
    Workshop,
    let_it_come,
    nothing_is_held,
    only_on_disk,
    started_together,
    stopped,
    told_by_all,
)
from tests.e2e.scenarios import PAGE, SERVER_ARGS, assert_equal, wait_until

PREFIXES = [random_prompt(9 * PAGE + 50 * index, seed=index) for index in range(8)]
TEN_PAGES_A_SECOND = ("--hcache-read-limit", "0.001", "--hicache-storage-prefetch-policy", "wait_complete")
ARGS = (*SERVER_ARGS, *TEN_PAGES_A_SECOND, "--schedule-policy", "lpm")
ENV = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "7",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}


@pytest.fixture(scope="module")
def servers(workshop: Workshop) -> Iterator[tuple[Server, ...]]:
    """The first one has no tier."""
    store = workshop.folder / "store-lifecycle"
    with started_together(workshop.stock(env=ENV), workshop.tiered(store, args=ARGS, env=ENV)) as servers:
        yield servers


@pytest.fixture
def server(servers: tuple[Server, ...]) -> Server:
    return servers[1]


class Victim:
    """A streamed request that is gone before its end, and known to SGLang, which can abort it by its id."""

    def __init__(self, server: Server, rid: str, prompt: list[int]) -> None:
        self._connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        post(
            self._connection,
            "/generate",
            {"rid": rid, "input_ids": prompt, "stream": True, "sampling_params": sampling},
        )
        let_it_come(server)

    def first_token(self) -> None:
        assert self._connection.getresponse().readline().startswith(b"data:")

    def how_it_ends(self) -> str:
        """For a victim whose first token nobody has read."""
        *_, last = (line for line in self._connection.getresponse().read().splitlines() if b"meta_info" in line)
        return str(json.loads(last.removeprefix(b"data: "))["meta_info"]["finish_reason"]["type"])

    def hang_up(self) -> None:
        self._connection.close()


def post(connection: http.client.HTTPConnection, path: str, body: dict[str, object]) -> None:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})


def tell(server: Server, path: str, **body: object) -> None:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    post(connection, path, body)
    assert connection.getresponse().status == 200
    connection.close()


def abort_at_every_stage(server: Server, attempt: int) -> None:
    """Held for its pages; while it may be loading or in the queue; and running. By its client, and by its id."""
    prompt = PREFIXES[attempt % 8] + random_prompt(30, seed=200 + attempt)
    for stage, by_id in itertools.product(("held", "queued", "running"), (False, True)):
        rid = f"victim {attempt} {stage} {by_id}"
        victim = Victim(server, rid, prompt)
        if stage == "queued":
            wait_until(lambda: server.tier_state()["requests_held_now"] == 0, 60)
        elif stage == "running":
            victim.first_token()
        if by_id:
            tell(server, "/abort_request", rid=rid)
            assert stage == "running" or victim.how_it_ends() == "abort"
        victim.hang_up()


def test_what_happens_to_requests_costs_no_other_one_anything(server: Server) -> None:
    requests = [Request(prefix + random_prompt(20, seed=100), 24) for prefix in PREFIXES]
    alone = [server.send(request) for request in requests]
    assert not any(answer.cached_tokens for answer in alone)
    only_on_disk(server)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.send, request) for _ in range(3) for request in requests]
        for attempt, mode in enumerate(("retract", "in_place")):
            abort_at_every_stage(server, attempt)
            tell(server, "/pause_generation", mode=mode)
            tell(server, "/continue_generation")
        assert_equal([answer.result() for answer in answers], alone * 3)
    assert any(answer.result().cached_host for answer in answers)
    wait_until(lambda: nothing_is_held(server), 10)
    state = server.tier_state()
    assert state["requests_held"] > 8
    assert (state["loads_failed"], state["loads_refused"], state["prefetcher_restarts"]) == (0, 0, 0)
    assert "#retracted_reqs: 1" in server.log_text()
    server.flush_cache()
    assert server.healthy()


def send_two(server: Server) -> list[Answer]:
    """Of which one, behind the other, is retracted time and again. Log-probabilities come out of no cache."""
    requests = [Request(random_prompt(100, seed=seed), 8 * PAGE, logprobs=False) for seed in (300, 301)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(server.send, requests))


def test_what_a_retracted_request_has_decoded_is_restored(servers: tuple[Server, ...]) -> None:
    """And is in the radix tree from then on; pages that SGLang prefills to the end are, too."""
    server = servers[1]
    before = server.tier_state()
    wanted, answers = told_by_all(send_two, *servers)
    assert_equal(answers, wanted)
    after = server.tier_state()
    assert after["tokens_restored"] - before["tokens_restored"] >= 2 * PAGE
    assert (after["loads_failed"], after["loads_refused"]) == (0, 0)


def test_what_a_paused_engine_had_decoded_is_restored(servers: tuple[Server, ...]) -> None:
    stock, server = servers
    request = Request(random_prompt(100, seed=302), 8 * PAGE, logprobs=False)
    before = server.tier_state()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.send, request)
        wait_until(lambda: server.tier_state()["tokens_captured"] >= before["tokens_captured"] + 100 + 3 * PAGE, 30)
        tell(server, "/pause_generation", mode="retract")
        tell(server, "/continue_generation")
        assert_equal([answer.result()], [stock.send(request)])
    assert server.tier_state()["tokens_restored"] - before["tokens_restored"] >= 3 * PAGE


def test_all_are_aborted_while_they_are_held(server: Server) -> None:
    only_on_disk(server)
    with stopped(server.pids("sglang::scheduler")):
        victims = [Victim(server, f"held {index}", prefix) for index, prefix in enumerate(PREFIXES)]
    wait_until(lambda: server.tier_state()["requests_held_now"] > 4, 10)
    tell(server, "/abort_request", abort_all=True)
    wait_until(lambda: nothing_is_held(server), 10)
    for victim in victims:
        victim.hang_up()
    assert server.tier_state()["loads_failed"] == 0
    server.flush_cache()
    assert server.healthy()


def test_what_a_request_may_not_use_is_not_read_for_it(server: Server) -> None:
    """Log-probabilities of the whole prompt are asked for."""
    server.generate(PREFIXES[0], 1)
    only_on_disk(server)
    before = server.tier_state()
    assert server.generate(PREFIXES[0], 1, logprobs_from=0).cached_tokens == 0
    after = server.tier_state()
    assert (after["hits_file"], after["lookups_not_ahead"]) == (before["hits_file"], before["lookups_not_ahead"])
