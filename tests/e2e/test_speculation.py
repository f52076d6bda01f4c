"""With speculative decoding: what is verified is stored and restored, and so is what the draft model keeps of it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.harness import Answer, ModelSpec, Server, random_prompt
from tests.e2e.conftest import (
    Workshop,
    only_on_disk,
    sent_together,
    started_together,
    told_by_all,
)
from tests.e2e.scenarios import (
    LLAMA,
    PAGE,
    SCENARIOS,
    SERVER_ARGS,
    TIER,
    assert_equal,
    evict_everything,
    tail_logprobs,
    whole_pages,
)

SPOILT_PLUGIN = Path(__file__).parent / "spoilt"
DRAFT_LAYERS = {"STANDALONE": 3, "EAGLE": 1, "EAGLE3": 1}
ONE_LAYER, WIDTH = replace(LLAMA, layers=1), LLAMA.hidden_size
LATENTS = ModelSpec("deepseek_v3")
DRAFTS = 3  # at once
CHAIN = (
    *("--speculative-num-steps", str(DRAFTS), "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", str(DRAFTS + 1)),
)
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
    drafts = {
        "STANDALONE": workshop.model(LLAMA),
        "EAGLE": eagle_draft(workshop),
        "EAGLE3": eagle3_draft(workshop),
    }
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
    return ("--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(draft), *CHAIN)


def eagle_draft(workshop: Workshop) -> Path:
    """One layer of a Llama that takes the next token, and what the model made of the last; random: rarely right."""
    left_out = ("lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight")
    weights = {name: weight for name, weight in one_layer(workshop).items() if name not in left_out}
    weights |= {"fc.weight": noise(WIDTH, 2 * WIDTH), "fc.bias": torch.zeros(WIDTH)}
    return saved(workshop, "LlamaForCausalLMEagle", weights, {})


def eagle3_draft(workshop: Workshop) -> Path:
    """Likewise, but of the last token it takes what two layers of the model were given, beside the next token's."""
    weights = one_layer(workshop)
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"layers.0.self_attn.{name}.weight"] = noise(WIDTH, 2 * WIDTH)
    weights |= {"fc.weight": noise(WIDTH, 2 * WIDTH), "layers.0.hidden_norm.weight": torch.ones(WIDTH)}
    of_the_model = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}
    return saved(workshop, "LlamaForCausalLMEagle3", weights, {"draft_vocab_size": LLAMA.vocab, **of_the_model})


def model_with_a_draft_layer(workshop: Workshop) -> Path:
    """DeepSeek's way: the checkpoint's last layer drafts, from the next token and what the model made of the last."""
    folder = workshop.folder / "models" / "nextn"
    shutil.copytree(workshop.model(LATENTS), folder)
    weights, own = load_file(folder / "model.safetensors"), f"model.layers.{LATENTS.layers}."
    last = f"model.layers.{LATENTS.layers - 1}."
    draft = {own + name.removeprefix(last): weight.clone() for name, weight in weights.items() if last in name}
    draft |= {own + f"{name}.weight": torch.ones(LATENTS.hidden_size) for name in ("enorm", "hnorm")}
    draft[own + "eh_proj.weight"] = noise(LATENTS.hidden_size, 2 * LATENTS.hidden_size)
    for name, of_the_model in (("shared_head.norm", "model.norm"), ("shared_head.head", "lm_head")):
        draft[own + f"{name}.weight"] = weights[f"{of_the_model}.weight"].clone()
    draft[own + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights | draft, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_layer(workshop: Workshop) -> dict[str, torch.Tensor]:
    weights = load_file(workshop.model(ONE_LAYER) / "model.safetensors")
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / math.sqrt(shape[-1])


def saved(workshop: Workshop, name: str, weights: dict[str, torch.Tensor], fields: dict[str, object]) -> Path:
    folder = workshop.folder / "models" / name
    shutil.copytree(workshop.model(ONE_LAYER), folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [name]} | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("algorithm", DRAFT_LAYERS)
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
    state = server.tier_state()
    assert (state["representation"], state["layers_draft"]) == ("hidden", DRAFT_LAYERS[algorithm])
    assert state["loads_failed"] == state["pages_leased"] == state["tokens_not_captured"] == 0
    assert server.reported_leaks() == []


@pytest.mark.parametrize("algorithm", DRAFT_LAYERS)
def test_what_requests_have_in_common_is_loaded_once(algorithm: str, speculating: Speculating) -> None:
    """But for the last page, where keys are of a token and the next, as an EAGLE's."""
    server, prefix = speculating.servers[algorithm], random_prompt(10 * PAGE, seed=400)
    requests = [tail_logprobs(prefix + random_prompt(50, seed=401 + i)) for i in range(3)]
    wanted = [server.send(request) for request in requests]
    only_on_disk(server)
    before = server.tier_state()
    assert_equal(sent_together(server, requests), wanted)
    after = server.tier_state()
    of_each = 0 if algorithm == "STANDALONE" else PAGE
    assert after["tokens_restored"] - before["tokens_restored"] == len(prefix) + 2 * of_each
    assert after["loads_shared"] - before["loads_shared"] == 1
    assert after["loads_failed"] == after["pages_leased"] == 0
    assert server.reported_leaks() == []


def test_latents_and_those_of_the_draft_layer_are_restored(workshop: Workshop, fresh_store: Path) -> None:
    """NEXTN: multi-token prediction as in DeepSeek-V3."""
    model, converse = model_with_a_draft_layer(workshop), SCENARIOS["conversation"]
    drafting = (*TIER, "--hcache-dir", str(fresh_store), "--speculative-algorithm", "NEXTN", *CHAIN, *ROOM_FOR_ALL)
    plain = Server(model, SERVER_ARGS, log=workshop.log("stock"))
    server = Server(model, (*SERVER_ARGS, *drafting), log=workshop.log("nextn"))
    with started_together(plain, server):
        wanted, answers = told_by_all(converse, plain, server)
        state = server.tier_state()
    assert_equal(answers, wanted)
    for former, answer in itertools.pairwise(answers):
        assert answer.cached_host == whole_pages(former.prompt_tokens + len(former.output_ids) - 1)
        assert 0 < answer.verifications < len(answer.output_ids)
    assert (state["representation"], state["layers_draft"]) == ("kv", 1)
    assert state["loads_failed"] == state["pages_leased"] == 0


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
