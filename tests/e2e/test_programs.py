"""SGLang frontend programs, OpenAI clients and replayed workloads, on servers with the tier and without it."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sglang
from openai import OpenAI

from bench.harness import Server
from bench.replay import replay
from bench.workloads import MADE
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import SERVER_ARGS, evict_everything

Servers = tuple[Server, Server]

TURNS = 3


class ServedFromConfig(Server):
    """By `sglang serve`, which wants to see the model, with all other flags in a file."""

    def command(self) -> list[str]:
        words = super().command()
        flags: dict[str, str | bool] = {}
        for word, follows in zip(words, [*words[1:], "--"], strict=True):
            if word.startswith("--"):
                flags[word.removeprefix("--")] = follows if not follows.startswith("--") else True
        model, file = str(flags.pop("model-path")), self.log.with_suffix(".yaml")
        file.write_text(json.dumps(flags))  # which YAML reads, too
        sglang_command = str(Path(words[0]).with_name("sglang"))
        return [sglang_command, "serve", "--model-type", "llm", "--model-path", model, "--config", str(file)]


def text_of(characters: int, seed: int) -> str:
    return "".join(Random(seed).choices(string.ascii_letters + string.digits + " ", k=characters))


def chat(s: Any) -> None:
    """Turns of a conversation, in the model's chat template."""
    s += sglang.system(text_of(300, seed=1))
    for turn in range(TURNS):
        s += sglang.user(text_of(150, seed=10 + turn))
        s += sglang.assistant(sglang.gen(f"answer {turn}", max_tokens=24))


def questions_on_a_document(s: Any) -> None:
    """One prefix, several branches at once, and what they said put together."""
    s += text_of(1000, seed=2)
    branches = s.fork(4)
    for number in range(4):
        branches[number] += text_of(80, seed=20 + number) + sglang.gen("answer", max_tokens=16)
    s += "".join(branch["answer"] for branch in branches) + sglang.gen("summary", max_tokens=16)


def agent(s: Any) -> None:
    """A constrained choice of a tool, then its result, and again."""
    s += text_of(700, seed=3)
    for step in range(TURNS):
        s += " use: " + sglang.select(f"tool {step}", ["search", "read", "write a file"])
        s += " with: " + sglang.gen(f"argument {step}", max_tokens=8, regex=r"[a-z]{4} \d{3}")
        s += " result: " + text_of(200, seed=30 + step)


PROGRAMS = {program.__name__: sglang.function(program) for program in (chat, questions_on_a_document, agent)}


def run(program: Any, server: Server) -> str:
    backend = sglang.RuntimeEndpoint(f"http://{server.host}:{server.port}", chat_template_name="chatml")
    state = program.run(backend=backend, temperature=0.0)
    assert state.error() is None
    return str(state.text())


@pytest.fixture(scope="module")
def servers(workshop: Workshop) -> Iterator[Servers]:
    """With the tier, and without it."""
    args = (*SERVER_ARGS, "--enable-cache-report")
    tiered = workshop.tiered_by(ServedFromConfig, workshop.folder / "store-programs", args=args)
    stock = workshop.stock(args=args)
    with started_together(tiered, stock):
        yield tiered, stock


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_the_same_when_its_prefixes_were_evicted(name: str, servers: Servers) -> None:
    tiered, stock = servers
    wanted = run(PROGRAMS[name], stock)
    assert run(PROGRAMS[name], tiered) == wanted
    evict_everything(tiered)
    before = tiered.tier_state()["tokens_restored"]
    assert run(PROGRAMS[name], tiered) == wanted
    assert tiered.tier_state()["tokens_restored"] - before >= 512


def converse(server: Server, *, stream: bool) -> tuple[list[str], list[int]]:
    """What an OpenAI client is answered in each turn, and how much of its prompt it is told was cached."""
    client = OpenAI(base_url=f"http://{server.host}:{server.port}/v1", api_key="none", max_retries=0, timeout=120)
    messages: list[dict[str, str]] = [{"role": "system", "content": text_of(300, seed=4)}]
    said, cached = [], []
    for turn in range(TURNS):
        messages.append({"role": "user", "content": text_of(150, seed=40 + turn)})
        asked: Any = {"model": "default", "messages": messages, "max_tokens": 24, "temperature": 0.0}
        if stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(client.chat.completions.create(**asked))
            said.append("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices))
            usage = chunks[-1].usage
        else:
            answer = client.chat.completions.create(**asked)
            said.append(answer.choices[0].message.content)
            usage = answer.usage
        details = usage.prompt_tokens_details
        cached.append(details.cached_tokens if details else 0)
        messages.append({"role": "assistant", "content": said[-1]})
    return said, cached


def test_an_openai_client_gets_the_same_answers_and_is_told_what_was_restored(servers: Servers) -> None:
    tiered, stock = servers
    wanted, _ = converse(stock, stream=False)
    assert all(wanted)
    assert converse(tiered, stream=False)[0] == wanted
    evict_everything(tiered)
    before = tiered.tier_state()["tokens_restored"]
    found, cached = converse(tiered, stream=True)
    assert found == wanted
    restored = tiered.tier_state()["tokens_restored"] - before
    assert cached[0] > 0
    assert restored >= cached[0]


def test_programs_in_a_batch(servers: Servers) -> None:
    """As many at once as the frontend likes: their prefixes evict each other."""

    def ask(s: Any, document: str, question: str) -> None:
        s += document
        s += question
        s += sglang.gen("answer", max_tokens=8)

    arguments = [
        {"document": text_of(900, seed=100 + number % 6), "question": text_of(40, seed=200 + number)}
        for number in range(24)
    ]

    def answers(server: Server) -> list[str]:
        backend = sglang.RuntimeEndpoint(f"http://{server.host}:{server.port}")
        states = sglang.function(ask).run_batch(arguments, backend=backend, temperature=0.0, num_threads=12)
        return [state["answer"] for state in states]

    tiered, stock = servers
    wanted = answers(stock)
    assert len(set(wanted)) > len(wanted) // 2
    assert answers(tiered) == wanted
    before = tiered.tier_state()["tokens_restored"]
    assert answers(tiered) == wanted
    assert tiered.tier_state()["tokens_restored"] > before


@pytest.mark.parametrize("name", MADE)
def test_a_replayed_workload_gets_the_same_answers(name: str, servers: Servers) -> None:
    tiered, stock = servers
    workload = MADE[name]().shrunk(16, longest=1500).first(sessions=10, calls=5)
    wanted = replay(stock, workload, clients=4, speed=0.0)
    before = tiered.tier_state()["tokens_restored"]
    found = [replay(tiered, workload, clients=4, speed=0.0) for _ in range(2)]
    assert [run.answers.count(None) for run in (wanted, *found)] == [0, 0, 0]
    for run_ in found:
        assert [a.output_ids for a in run_.answered] == [a.output_ids for a in wanted.answered]
    restored = sum(answer.cached_host for run_ in found for answer in run_.answered)
    assert tiered.tier_state()["tokens_restored"] - before == restored
