"""Models that see: a prefix with images in it is restored, and for these images only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.harness import Answer, ModelSpec, Request, Server, compare, random_prompt
from bench.vision import IMAGE_TOKENS, image_of, placeholder
from tests.e2e.conftest import Workshop, started_together, told_by_all
from tests.e2e.scenarios import FLOAT32_TOLERANCE, PAGE, assert_equal, whole_pages

ARGS = ("--page-size", str(PAGE), "--max-total-tokens", "2048", "--chunked-prefill-size", "256", "--sleep-on-idle")
ROOM = ("--hicache-ratio", "16")
HIDDEN, KV = ModelSpec("lighton_ocr"), ModelSpec("qwen2_5_vl")  # the latter has M-RoPE

CAT, DOG, BIRD, FISH = map(image_of, range(4))
BEFORE, QUESTION = 150, 60  # tokens
ONE_IMAGE = BEFORE + 2 + IMAGE_TOKENS  # it begins in the third page; a chunk of a prefill, and two pages, end in it


def ask(question: int, *images: str) -> Request:
    """About an image after a text, or about several, each after a text."""
    prompt: list[int] = []
    for place, _ in enumerate(images):
        prompt += random_prompt(BEFORE, seed=place) + placeholder(HIDDEN.vocab)
    tokens = len(images) * ONE_IMAGE + QUESTION
    return Request(prompt + random_prompt(QUESTION, seed=question), logprobs_from=tokens - 8, images=images)


ASKED = {
    "a cat": ask(10, CAT),
    "a dog": ask(10, DOG),
    "a cat, another question": ask(11, CAT),
    "a cat and a dog": ask(10, CAT, DOG),
    "a dog and a cat": ask(10, DOG, CAT),
}
NEW = {
    "a new question": ask(12, CAT),
    "a bird": ask(10, BIRD),
}
OF_COMMON_TEXT = whole_pages(BEFORE)
OF_COMMON_IMAGE = whole_pages(ONE_IMAGE)  # ends in the midst of the image


@dataclass(frozen=True)
class Seen:
    """A server's answers."""

    first: dict[str, Answer]
    again: dict[str, Answer]  # after other traffic; here the new ones are asked for the first time

    def all(self) -> list[Answer]:
        return [*self.first.values(), *self.again.values()]


def look(server: Server) -> Seen:
    first = {name: server.send(request) for name, request in ASKED.items()}
    again = {}
    for name, request in (ASKED | NEW).items():
        for i in range(3):
            server.generate(random_prompt(700, seed=20 + i), 1)
        again[name] = server.send(request)
    return Seen(first, again)


@pytest.fixture(scope="module")
def store(workshop: Workshop) -> Path:
    return workshop.folder / "store-vision"


@pytest.fixture(scope="module")
def seen(workshop: Workshop, store: Path) -> dict[str, Seen]:
    """By a server without the tier, and by one with it, which ends as servers do."""
    stock, tiered = workshop.stock(HIDDEN, ARGS), workshop.tiered(store, HIDDEN, (*ARGS, *ROOM))
    with started_together(stock, tiered):
        answers = dict(zip(("stock", "tiered"), told_by_all(look, stock, tiered), strict=True))
        state = tiered.tier_state()
        tiered.stop()
    assert state["representation"] == "hidden", state["representation_reason"]
    assert state["loads_failed"] == state["pages_incomplete"] == state["pages_leased"] == 0
    return answers


def test_outputs_equal_those_without_the_tier(seen: dict[str, Seen]) -> None:
    assert_equal(seen["tiered"].all(), seen["stock"].all())


def test_images_decide_the_output(seen: dict[str, Seen]) -> None:
    """Control: without this, equal outputs would prove nothing."""
    answers = seen["stock"].first | seen["stock"].again
    for one, other in (("a cat", "a dog"), ("a cat", "a bird"), ("a cat and a dog", "a dog and a cat")):
        assert compare(answers[one], answers[other]).logprob > 20 * FLOAT32_TOLERANCE


def test_whole_prefixes_are_restored(seen: dict[str, Seen]) -> None:
    assert_restored(seen["tiered"])
    assert all(seen["stock"].again[name].cached_tokens == 0 for name in ASKED), "other traffic evicts nothing"


def assert_restored(of: Seen) -> None:
    for name, request in ASKED.items():
        answer = of.again[name]
        assert answer.prompt_tokens == usable(request) + 8
        assert (answer.cached_device, answer.cached_host) == (0, whole_pages(usable(request)))


def usable(request: Request) -> int:
    """Tokens that may come from a cache: those before the first whose log-probability is asked for."""
    assert request.logprobs_from is not None
    return request.logprobs_from


def test_another_image_has_only_the_text_in_common(seen: dict[str, Seen]) -> None:
    assert_told_apart(seen["tiered"])


def assert_told_apart(of: Seen) -> None:
    assert [answer.cached_device for answer in of.first.values()] == [0, OF_COMMON_TEXT, *[OF_COMMON_IMAGE] * 3]
    assert all(answer.cached_host == 0 for answer in of.first.values())
    assert {name: of.again[name].cached_host for name in NEW} == {
        "a new question": OF_COMMON_IMAGE,
        "a bird": OF_COMMON_TEXT,
    }


@pytest.fixture(scope="module")
def later(workshop: Workshop, store: Path, seen: dict[str, Seen]) -> dict[str, Seen]:
    """By a server that finds what the former one stored, and by one whose model has M-RoPE."""
    again, other = (workshop.tiered(store, spec, (*ARGS, *ROOM)) for spec in (HIDDEN, KV))
    with started_together(again, other):
        found = Seen({}, {name: again.send(request) for name, request in (ASKED | {"a fish": ask(10, FISH)}).items()})
        hits, answers = again.tier_state()["hits_file"], look(other)
        state = other.tier_state()
    assert hits * PAGE >= sum(answer.cached_host for answer in found.again.values()) > 0
    assert (state["representation"], state["loads_failed"]) == ("kv", 0)
    assert "M-RoPE" in state["representation_reason"]
    return {"after a restart": found, "M-RoPE": answers}


def test_another_process_gives_images_the_same_keys(later: dict[str, Seen], seen: dict[str, Seen]) -> None:
    found = later["after a restart"].again
    cached = [answer.cached_device + answer.cached_host for answer in found.values()]
    assert cached == [*(whole_pages(usable(request)) for request in ASKED.values()), OF_COMMON_TEXT]
    assert_equal([found[name] for name in ASKED], [seen["stock"].again[name] for name in ASKED])


def test_with_positions_of_three_dimensions(later: dict[str, Seen]) -> None:
    """Against what the same server has prefilled before."""
    answers = later["M-RoPE"]
    assert_restored(answers)
    assert_told_apart(answers)
    assert_equal([answers.again[name] for name in ASKED], list(answers.first.values()))
    assert compare(answers.first["a cat"], answers.first["a dog"]).logprob > 20 * FLOAT32_TOLERANCE
