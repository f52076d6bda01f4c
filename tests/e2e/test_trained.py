"""A model with trained weights: what it says about an evicted document is what it says without the tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.harness import Answer, Server
from bench.trained import NotFetched, make_trained
from tests.e2e.conftest import Workshop, started_together, told_by_all
from tests.e2e.scenarios import PAGE, TIER, assert_equal, settle, tail_logprobs, whole_pages

POOL_TOKENS, PROSE_TOKENS, NEW_TOKENS = 1536, 900, 10
FLOAT32, PACKED = ("--dtype", "float32"), ("--dtype", "bfloat16", "--hcache-codec", "packed")

Prompt = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Path:
    try:
        return make_trained(workshop.folder / "models" / "smollm2")
    except NotFetched as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def prose() -> str:
    return (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def about_a_dog(model: Path, prose: str) -> Prompt:
    """A chat's first message: what a dog is called, much about something else, and a question."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    document = tokenizer.decode(tokenizer(prose)["input_ids"][:PROSE_TOKENS])

    def prompt(name: str) -> list[int]:
        text = f"My dog is called {name}.\n\n{document}\n\nWhat is my dog called?"
        chat = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    return prompt


@pytest.fixture(scope="module")
def servers(workshop: Workshop, model: Path) -> Iterator[tuple[Server, ...]]:
    """Without the tier; with it; and with it in bf16, packed."""
    pool = ("--page-size", str(PAGE), "--max-total-tokens", str(POOL_TOKENS), "--sleep-on-idle")

    def tiered(name: str, *args: str) -> Server:
        store = ("--hcache-dir", str(workshop.folder / f"store-{name}"), "--hicache-size", "1")
        tier = (*TIER, *store, "--hcache-representation", "hidden")
        return Server(model, (*pool, *tier, *args), log=workshop.log(name))

    stock = Server(model, (*pool, *FLOAT32), log=workshop.log("trained-stock"))
    with started_together(stock, tiered("trained", *FLOAT32), tiered("trained-packed", *PACKED)) as servers:
        yield servers


@pytest.fixture(scope="module")
def answers(servers: tuple[Server, ...], about_a_dog: Prompt) -> list[list[Answer]]:
    """Of each server two: another document has taken the prompt's place before the second."""
    prompt = about_a_dog("Marmalade")

    def asked_twice(server: Server) -> list[Answer]:
        first = server.send(tail_logprobs(prompt, NEW_TOKENS))
        server.generate(prompt[::-1], 1)
        if "hcache" in server.args:
            settle(server)
        return [first, server.send(tail_logprobs(prompt, NEW_TOKENS))]

    return told_by_all(asked_twice, *servers)


def test_what_it_says_of_a_restored_document_is_what_it_says_of_a_prefilled_one(answers: list[list[Answer]]) -> None:
    without, restored, packed = answers
    assert without[1].cached_tokens == 0
    assert_equal(restored, without)
    for first, again in (restored, packed):
        assert again.cached_host == whole_pages(first.prompt_tokens - 8)
        assert "Marmalade" in first.text
        assert again.text == first.text


def test_trained_activations_can_be_packed(servers: tuple[Server, ...], answers: list[list[Answer]]) -> None:
    """Those of its first layer differ so much between channels that by themselves half of the rows do not fit."""
    state = servers[2].tier_state()
    assert state["codec"] == "packed"
    assert state["tokens_captured"] > sum(answer.prompt_tokens for answer in answers[2]) / 2
    assert state["tokens_not_encoded"] == 0
    assert "cannot store" not in servers[2].log_text()


def test_the_beginning_of_the_document_decides_the_answer(servers: tuple[Server, ...], about_a_dog: Prompt) -> None:
    """Control: without this, equal answers would prove nothing."""
    assert "Cinnamon" in servers[1].generate(about_a_dog("Cinnamon"), NEW_TOKENS).text
