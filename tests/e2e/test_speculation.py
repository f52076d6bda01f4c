"""With speculative decoding: what is verified is stored and restored, and so is what the draft model keeps of it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.harness import Answer, Server, random_prompt
from tests.e2e.conftest import Workshop, started_together, tier_state
from tests.e2e.scenarios import (
    LLAMA,
    SCENARIOS,
    SERVER_ARGS,
    assert_equal,
    evict_everything,
    whole_pages,
)

SPOILT_PLUGIN = Path(__file__).parent / "spoilt"
ALGORITHMS = ("STANDALONE", "EAGLE")
DRAFTS = 3  # at once
ROOM_FOR_ALL = ("--hicache-ratio", "8")  # so that what is not captured is so for the drafts, not for a slow disk


@dataclass(frozen=True)
class Speculating:
    """A server for each algorithm, and where to write how what it restores is to be spoilt."""

    servers: dict[str, Server]
    way_to_spoil: Path


@pytest.fixture(scope="module")
def speculating(workshop: Workshop) -> Iterator[Speculating]:
    way = workshop.folder / "way-to-spoil-drafts"
    way.write_text("not at all")
    env = {"HCACHE_SPOIL": str(way), "PYTHONPATH": str(SPOILT_PLUGIN)}
    drafts = {"STANDALONE": workshop.model(LLAMA), "EAGLE": eagle_draft(workshop)}
    servers = {
        algorithm: workshop.tiered(
            workshop.folder / f"store-{algorithm}",
            args=(*SERVER_ARGS, *flags(algorithm, draft), *ROOM_FOR_ALL),
            env=env,
        )
        for algorithm, draft in drafts.items()
    }
    with started_together(*servers.values()):
        yield Speculating(servers, way)


def flags(algorithm: str, draft: Path) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", str(DRAFTS), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(DRAFTS + 1)),
    )


def eagle_draft(workshop: Workshop) -> Path:
    """One layer of a Llama that takes the next token, and what the model made of the last; random: rarely right."""
    made_of = workshop.model(replace(LLAMA, layers=1))
    folder = workshop.folder / "models" / "eagle"
    shutil.copytree(made_of, folder)
    left_out = ("lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model."): weight for name, weight in weights.items() if name not in left_out}
    width = LLAMA.hidden_size
    noise = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(0))
    weights |= {"fc.weight": noise / (2 * width) ** 0.5, "fc.bias": torch.zeros(width)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLMEagle"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scenario", ["conversation", "eight_conversations", "two_tenants"])
def test_outputs_equal_those_of_a_plain_server(
    algorithm: str, scenario: str, speculating: Speculating, reference: dict[str, list[Answer]]
) -> None:
    """Which has neither drafts nor the tier."""
    server = speculating.servers[algorithm]
    answers = SCENARIOS[scenario](server)
    assert_equal(answers, reference[scenario])
    assert sum(answer.cached_host for answer in answers) > 0
    if scenario == "conversation":
        for former, answer in itertools.pairwise(answers):
            assert answer.cached_host == whole_pages(former.prompt_tokens + len(former.output_ids) - 1)
            assert 0 < answer.verifications < len(answer.output_ids)
    state = tier_state(server)
    assert (state["representation"], state["layers_draft"]) == ("hidden", {"STANDALONE": 3, "EAGLE": 1}[algorithm])
    assert state["loads_failed"] == state["pages_leased"] == state["tokens_not_captured"] == 0
    assert "leak" not in server.log_text()


def test_drafts_after_a_restored_prefix_are_as_good_as_before(speculating: Speculating) -> None:
    """And worse without what the draft model had kept of it, while the answer is the same."""
    server, prompt = speculating.servers["STANDALONE"], random_prompt(900, seed=5)
    prefilled = server.generate(prompt, 64)
    answers = {}
    for way in ("not at all", "zero what is the draft model's"):
        speculating.way_to_spoil.write_text(way)
        evict_everything(server)
        answers[way] = server.generate(prompt, 64)
    speculating.way_to_spoil.write_text("not at all")
    restored, spoilt = answers.values()
    assert prefilled.cached_tokens == 0
    assert restored.cached_host == spoilt.cached_host == whole_pages(899)
    assert_equal([restored, spoilt], [prefilled, prefilled])
    assert restored.verifications == prefilled.verifications
    assert spoilt.verifications > 1.1 * restored.verifications
