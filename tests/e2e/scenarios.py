"""What the end-to-end tests ask of a server. Each scenario runs once without the tier and once with it.

All prompts are random token ids from fixed seeds; requests are greedy. A scenario returns its answers in a
fixed order, so that two runs can be compared answer by answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.harness import Answer, Difference, ModelSpec, Request, Server, compare, random_prompt

PAGE = 64
POOL_TOKENS = 4096
PREFIX_TOKENS = 1200  # of `evicted_prefix`
LLAMA = ModelSpec("llama", hidden_size=128, layers=3)
SERVER_ARGS = (
    "--page-size",
    str(PAGE),
    "--max-total-tokens",
    str(POOL_TOKENS),
    "--chunked-prefill-size",
    "256",
    "--sleep-on-idle",
)

# All of a hit is restored, however long a loaded machine reads for it.
TIER = (
    *("--hicache-backend", "hcache", "--hcache-plan", "always"),
    *("--hicache-storage-prefetch-policy", "wait_complete"),
)

FLOAT32_TOLERANCE = 1e-3  # of log-probabilities

Scenario = Callable[[Server], list[Answer]]


def whole_pages(tokens: int) -> int:
    """The part of a prefix that lies in whole pages, in tokens."""
    return tokens // PAGE * PAGE


def tail_logprobs(prompt: Sequence[int], new_tokens: int = 16, **extra: Any) -> Request:
    """A request with log-probabilities of its answer and of the prompt's last tokens, which no cache holds."""
    return Request(prompt, new_tokens, logprobs_from=len(prompt) - 8, **extra)


def wait_until(holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def evict_everything(server: Server, seed: int = 900) -> None:
    """Other traffic: enough distinct tokens to fill the pool more than once."""
    length = POOL_TOKENS * 3 // 8
    for i in range(4):
        server.generate(random_prompt(length, seed=seed + i), 1)
    if "hcache" in server.args:
        settle(server)


def settle(server: Server) -> None:
    """Wait until all is written that can be, and slots for new pages are there: what comes next will be stored."""

    def written() -> bool:
        state = server.tier_state()
        return not (state["pages_dirty"] and any(one["state"] == "ok" for one in state["volumes"]))

    wait_until(written, 30)
    server.tier_state()  # comes from the prefetcher behind the slots that were asked for


def evicted_prefix(server: Server) -> list[Answer]:
    """A prefix, evicted, and asked for again with another ending."""
    prefix = random_prompt(PREFIX_TOKENS, seed=1)
    first = server.send(tail_logprobs(prefix))
    evict_everything(server)
    again = server.send(tail_logprobs(prefix + random_prompt(40, seed=2)))
    return [first, again]


def conversation(server: Server) -> list[Answer]:
    """Four turns, each with the former prompts and answers as its prefix, each evicted before the next."""
    answers: list[Answer] = []
    history: list[int] = []
    for turn in range(4):
        if turn:
            evict_everything(server, seed=700 + 10 * turn)
        history += random_prompt(150, seed=10 + turn)
        answer = server.send(tail_logprobs(history, new_tokens=160))
        history += answer.output_ids
        answers.append(answer)
    return answers


def eight_conversations(server: Server) -> list[Answer]:
    """Eight conversations at once, prompts several prefill chunks long, together twice as large as the pool."""

    def converse(index: int) -> list[Answer]:
        answers: list[Answer] = []
        history = random_prompt(600 + 40 * index, seed=100 + index)
        for turn in range(3):
            answer = server.send(tail_logprobs(history, new_tokens=24))
            answers.append(answer)
            history = [*history, *answer.output_ids, *random_prompt(90, seed=200 + 10 * index + turn)]
        return answers

    with ThreadPoolExecutor(8) as pool:
        return [answer for answers in pool.map(converse, range(8)) for answer in answers]


def two_tenants(server: Server) -> list[Answer]:
    """One prompt by two salts and two extra keys; then again, evicted, by each of them."""
    prompt = random_prompt(700, seed=300)
    tenants: tuple[dict[str, Any], ...] = (
        {"cache_salt": "alice"},
        {"cache_salt": "bob"},
        {"extra_key": "alice"},
        {"extra_key": "bob"},
    )
    first = [server.send(tail_logprobs(prompt, **tenant)) for tenant in tenants]
    evict_everything(server, seed=800)
    return first + [server.send(tail_logprobs(prompt, **tenant)) for tenant in tenants]


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario for scenario in (evicted_prefix, conversation, eight_conversations, two_tenants)
}


def worst(answers: Sequence[Answer], wanted: Sequence[Answer]) -> Difference:
    """The largest difference of two runs; tokens differ if they differ in any answer."""
    differences = [compare(a, b) for a, b in zip(answers, wanted, strict=True)]
    return max(differences, key=lambda difference: (not difference.same_tokens, difference.logprob))


def assert_equal(answers: Sequence[Answer], wanted: Sequence[Answer], tolerance: float = FLOAT32_TOLERANCE) -> None:
    difference = worst(answers, wanted)
    assert difference.same_tokens, difference
    assert difference.logprob <= tolerance, difference
