"""Requests that are not plain generation: embeddings, and turns of streaming sessions."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bench.harness import Server, random_prompt
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import FLOAT32_TOLERANCE, PAGE, SERVER_ARGS, evict_everything, wait_until, whole_pages


def post(server: Server, path: str, **body: object) -> Any:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer
    return json.loads(answer or "null")


def embedding(server: Server, prompt: Sequence[int]) -> Any:
    return np.array(post(server, "/encode", input_ids=list(prompt))["embedding"])


@pytest.fixture(scope="module")
def servers(workshop: Workshop) -> Iterator[tuple[Server, ...]]:
    """One for embeddings, and one with streaming sessions."""
    kinds = ("--is-embedding", "--enable-streaming-session")
    made = [workshop.tiered(workshop.folder / f"store{kind}", args=(*SERVER_ARGS, kind)) for kind in kinds]
    with started_together(*made) as servers:
        yield servers


def test_embeddings_from_a_restored_prefix(servers: tuple[Server, ...]) -> None:
    server, _ = servers
    prefix = random_prompt(1200, seed=1)
    prompts = [prefix + random_prompt(40, seed=seed) for seed in (2, 3)]
    prefilled = embedding(server, prompts[0])
    for seed in range(4):
        embedding(server, random_prompt(1500, seed=900 + seed))
    assert server.tier_state()["tokens_restored"] == 0
    restored, other = (embedding(server, prompt) for prompt in prompts)
    state = server.tier_state()
    assert state["representation"] == "hidden"
    assert state["tokens_restored"] >= whole_pages(1200)
    assert state["loads_failed"] == 0
    assert np.allclose(restored, prefilled, rtol=0, atol=FLOAT32_TOLERANCE)
    assert np.abs(other - prefilled).max() > 20 * FLOAT32_TOLERANCE, "the embedding says nothing"


def test_what_a_streaming_session_keeps_takes_no_room(servers: tuple[Server, ...]) -> None:
    """SGLang inserts its first prompt only, and keeps all else in device memory of the session's."""
    (_, server), turns, turn_tokens = servers, 5, 3 * PAGE
    session = post(server, "/open_session", capacity_of_str_len=100_000, streaming=True)
    sampling = {"temperature": 0, "max_new_tokens": PAGE, "ignore_eos": True}
    for turn in range(turns):
        prompt = random_prompt(turn_tokens, seed=turn)
        answer = post(server, "/generate", input_ids=prompt, session_params={"id": session}, sampling_params=sampling)
        assert answer["meta_info"]["cached_tokens"] == turn * (turn_tokens + PAGE) - (turn > 0)
    wait_until(lambda: server.tier_state()["pages_open"] == server.tier_state()["pages_granted"], 10)
    assert server.tier_state()["pages_saved"] == turn_tokens // PAGE, "the first prompt's"
    with ThreadPoolExecutor(1) as pool:
        sampling["max_new_tokens"] = 8 * PAGE
        prompt = random_prompt(turn_tokens, seed=turns)
        turn_again = {"input_ids": prompt, "session_params": {"id": session}, "sampling_params": sampling}
        retracted = pool.submit(post, server, "/generate", **turn_again)
        wait_until(lambda: server.tier_state()["pages_open"] > server.tier_state()["pages_granted"], 10)
        post(server, "/pause_generation", mode="retract")
        post(server, "/continue_generation")
        assert retracted.result()["meta_info"]["completion_tokens"] == 8 * PAGE
    assert server.healthy()
    post(server, "/close_session", session_id=session)
    evict_everything(server)
    assert server.generate(random_prompt(turn_tokens, seed=0), 1).cached_host == turn_tokens - PAGE
