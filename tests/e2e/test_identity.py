"""Whose pages the next server finds: those of what it serves, an id of the hub and adapters included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.harness import Answer, Server, on_accelerator, random_prompt
from tests.e2e.conftest import Workshop
from tests.e2e.scenarios import LLAMA, SERVER_ARGS, TIER, assert_equal, whole_pages

PROMPT = random_prompt(400, seed=77)
COVERED = whole_pages(len(PROMPT))
RANK = 8
UNPINNED = Path(__file__).parent / "unpinned"


@dataclass(frozen=True)
class Found:
    """Answers, in their order, and the last state of each server."""

    answers: list[Answer]
    states: list[dict[str, Any]]


@pytest.fixture(scope="module")
def served(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Found]]]:
    """One server after the other, with each of the two at the same time: most of it is imports."""
    workshop.model(LLAMA)
    ways = {"hub": serve_from_the_hub, "adapters": serve_adapters}
    with ThreadPoolExecutor(len(ways)) as pool:
        yield {name: pool.submit(serve, workshop, tmp_path_factory.mktemp(name)) for name, serve in ways.items()}


def serve_from_the_hub(workshop: Workshop, folder: Path) -> Found:
    """Out of its cache, as it is on a machine that has fetched the model and is offline now."""
    repository = folder / "hub" / "models--org--llama"
    shutil.copytree(workshop.model(LLAMA), repository / "snapshots" / "1111")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1111")
    store, found = folder / "store", Found([], [])
    tier = (*TIER, "--hcache-dir", str(store))
    for _ in range(2):
        server = Server(
            Path("org/llama"),
            (*SERVER_ARGS, *tier, "--dtype", LLAMA.dtype),
            log=workshop.log("hub"),
            env={"HF_HUB_CACHE": str(repository.parent), "HF_HUB_OFFLINE": "1"},
        )
        with server:
            found.answers.append(server.generate(PROMPT, 16))
            found.states.append(server.tier_state())
    return found


def test_a_model_of_the_hub(served: dict[str, Future[Found]]) -> None:
    found = served["hub"].result()
    assert [answer.cached_host for answer in found.answers] == [0, COVERED]
    assert found.states[1]["hits_file"] > 0
    assert_equal(found.answers[1:], found.answers[:1])


class LoraServer(Server):
    """A server whose requests are for `adapter`; None: for the base model."""

    adapter: str | None = None

    def _post(self, path: str, body: dict[str, Any], stream: bool, timeout_s: float) -> Iterator[dict[str, Any]]:
        return super()._post(path, {"lora_path": self.adapter, **body}, stream, timeout_s)

    def ask(self, adapter: str | None) -> Answer:
        self.adapter = adapter
        return self.generate(PROMPT, 16)

    def replace(self, adapter: str, folder: Path) -> None:
        """By what is in the folder now."""
        for path, body in (("/unload_lora_adapter", {}), ("/load_lora_adapter", {"lora_path": str(folder)})):
            (answer,) = self._post(path, {"lora_name": adapter, **body}, False, 60.0)
            assert answer["success"], answer


def train(folder: Path, seed: int) -> None:
    """An adapter that is drawn at random, and strong enough to change every answer."""
    draw = torch.Generator().manual_seed(seed)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {}
    for layer in range(LLAMA.layers):
        for name in names:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            width = LLAMA.hidden_size
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=draw) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=draw) * 0.1
    folder.mkdir(exist_ok=True)
    configuration = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    save_file(weights, folder / "adapter_model.safetensors")


def serve_adapters(workshop: Workshop, folder: Path) -> Found:
    """By three servers: trained, as it was, and trained again; the last one then loads another, and the first one."""
    adapter, found = folder / "adapter", Found([], [])
    lora = ("--lora-paths", f"adapter={adapter}", "--lora-backend", "torch_native")
    env = {} if on_accelerator() else {"PYTHONPATH": str(UNPINNED)}

    def server() -> LoraServer:
        return workshop.tiered_by(LoraServer, folder / "store", LLAMA, (*SERVER_ARGS, *lora), env=env)

    train(adapter, seed=1)
    for _ in range(2):
        with server() as same:
            found.answers.extend([same.ask("adapter"), same.ask(None)])
            found.states.append(same.tier_state())
    train(adapter, seed=2)
    with server() as retrained:
        found.answers.extend([retrained.ask("adapter"), retrained.ask(None)])
        for seed in (3, 1):
            train(adapter, seed)
            retrained.replace("adapter", adapter)
            found.answers.append(retrained.ask("adapter"))
    return found


def test_an_adapter_that_is_trained_again_in_place(served: dict[str, Future[Found]]) -> None:
    found = served["adapters"].result()
    first, again, (retrained, base, replaced, restored) = found.answers[:2], found.answers[2:4], found.answers[4:]
    assert first[0].output_ids != first[1].output_ids, "the adapter does nothing"
    assert [answer.cached_host for answer in again] == [COVERED, COVERED]
    assert found.states[1]["representation"] == "kv", "what a projection gives depends on the request"
    assert found.states[1]["hits_file"] > 0
    assert_equal(again, first)
    assert [retrained.cached_tokens, replaced.cached_tokens] == [0, 0]
    assert [base.cached_host, restored.cached_host] == [COVERED, COVERED], "these are what they were"
    assert_equal([restored, base], first)
    assert len({first[0].output_ids, retrained.output_ids, replaced.output_ids}) == 3
