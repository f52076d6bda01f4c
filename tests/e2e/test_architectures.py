"""The replay projector needs no line for any model: the same equality for one architecture after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness import Answer, ModelSpec, Server, compare, random_prompt
from tests.e2e.conftest import PATIENT, Workshop, started_together, told_by_all, update_weights
from tests.e2e.scenarios import (
    FLOAT32_TOLERANCE,
    LLAMA,
    PAGE,
    SCENARIOS,
    assert_equal,
    evict_everything,
    tail_logprobs,
    whole_pages,
    worst,
)

PROMPT_TOKENS = 700
ARGS = (
    *("--page-size", "64", "--max-total-tokens", "2048", "--chunked-prefill-size", "256", "--sleep-on-idle"),
    *("--hicache-ratio", "8"),  # pages are lost where a prefetcher that is slow to give slots has few to give
)

REPRESENTATIONS = {
    "qwen3": "hidden",  # K norm
    "olmoe": "hidden",  # mixture of experts
    "opt": "hidden",  # learned positions, biases
    "gemma": "hidden",
    "phi3": "hidden",  # fused QKV
    "stablelm": "hidden",  # partial RoPE
    "gptj": "hidden",  # interleaved RoPE
    "olmo3": "hidden",  # K norm over all heads, layers with a sliding window
    "gemma3": "kv",  # GQA, layers with a sliding window
}
# What no other test serves with: SGLang's flags, with and without the tier, and the tier's own.
SCHEDULING = {
    "olmoe": ("--disable-overlap-schedule",),
    "gemma": ("--enable-mixed-chunk",),
    "phi3": ("--kv-cache-dtype", "fp8_e5m2"),
    "gemma3": ("--kv-cache-dtype", "fp8_e4m3"),
}
TIER = {
    "phi3": ("--hicache-write-policy", "write_back", "--hcache-representation", "hidden"),
    "stablelm": ("--hicache-write-policy", "write_through_selective"),
    "gptj": ("--hicache-storage-prefetch-policy", "best_effort"),
}
TWO_RANKS, ONE_CORE_EACH = ("--tp", "2"), {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **PATIENT}
BY_KERNELS = ("qwen3", "opt")  # these, too: in Triton's interpreter, where there is no GPU to run them


def restore_once(server: Server) -> list[Answer]:
    """A prompt, other traffic that evicts it, and the prompt again with another ending."""
    prompt = random_prompt(PROMPT_TOKENS, seed=1)
    first = server.send(tail_logprobs(prompt))
    evict(server)
    return [first, server.send(tail_logprobs(prompt + random_prompt(30, seed=2)))]


def evict(server: Server) -> None:
    for i in range(3):
        server.generate(random_prompt(PROMPT_TOKENS, seed=20 + i), 1)


@pytest.mark.parametrize("architecture", REPRESENTATIONS)
def test_restores(architecture: str, workshop: Workshop, tmp_path: Path) -> None:
    spec = ModelSpec(architecture)
    changed = random_prompt(PROMPT_TOKENS, seed=1)
    changed[5] += 1
    args = (*ARGS, *SCHEDULING.get(architecture, ()))
    of_tier = (*args, *TIER.get(architecture, ()))
    tiered = workshop.tiered(tmp_path / "store", spec, of_tier, env=PATIENT)
    servers = [workshop.stock(spec, args), tiered]
    if architecture in BY_KERNELS:
        servers.append(workshop.tiered(tmp_path / "by-kernels", spec, ARGS, env={"TRITON_INTERPRET": "1"}))
    with started_together(*servers) as (stock, *with_tier):
        wanted, *restored = told_by_all(restore_once, *servers)
        control = compare(stock.send(tail_logprobs(changed)), wanted[0])
        states = [server.tier_state() for server in with_tier]
    for state, answers in zip(states, restored, strict=True):
        assert state["representation"] == REPRESENTATIONS[architecture], state["representation_reason"]
        assert answers[1].cached_host == whole_pages(PROMPT_TOKENS)
        assert_equal(answers, wanted)
    assert [state["projector"] for state in states[1:]] == ["kernels"] * (architecture in BY_KERNELS)
    assert control.logprob > 5 * FLOAT32_TOLERANCE, "the model's output does not depend on its prefix"


@pytest.mark.parametrize(("parallelism", "env"), [((), {}), (TWO_RANKS, ONE_CORE_EACH)], ids=["one rank", "two"])
def test_of_windowed_layers_the_ends_are_restored(
    parallelism: tuple[str, ...], env: dict[str, str], workshop: Workshop, fresh_store: Path
) -> None:
    """With slots of their own: inside an answer longer than the window (200 tokens) there is nothing left of them.

    The model has GQA, and a mixture of experts.
    """
    spec, window, args = ModelSpec("mellum"), 200, (*ARGS, "--max-total-tokens", "4096")
    tiered = workshop.tiered(fresh_store, spec, (*args, *parallelism), env=env)
    with started_together(workshop.stock(spec, args), tiered) as servers:
        conversations = told_by_all(SCENARIOS["eight_conversations"], *servers)
        long_answers = told_by_all(lambda server: long_answer(server, window + 2 * PAGE), *servers)
        state = servers[1].tier_state()
    wanted, restored = (of_all + long for of_all, long in zip(conversations, long_answers, strict=True))
    assert_equal(restored, wanted)
    former, answer = restored[-2:]
    assert answer.cached_host == whole_pages(former.prompt_tokens + len(former.output_ids) - 1)
    assert sum(answer.cached_host for answer in restored[:-2]) > 0
    assert (state["representation"], state["layers_windowed"], state["layers_kv"]) == ("kv", 2, 3)
    assert state["loads_failed"] == state["pages_leased"] == 0
    assert servers[1].reported_leaks() == []


def long_answer(server: Server, tokens: int) -> list[Answer]:
    """To a short prompt; then, evicted, with another question after it."""
    prompt = random_prompt(100, seed=60)
    answer = server.send(tail_logprobs(prompt, new_tokens=tokens))
    evict_everything(server)
    return [answer, server.send(tail_logprobs([*prompt, *answer.output_ids, *random_prompt(30, seed=61)]))]


def test_bfloat16_stays_within_the_spread_of_the_prefix_cache(workshop: Workshop, fresh_store: Path) -> None:
    """SGLang's own prefix cache changes log-probabilities in bf16 a little; the tier changes them no more."""
    spec = ModelSpec("llama", dtype="bfloat16")
    prompts = [random_prompt(PROMPT_TOKENS, seed=40 + i) for i in range(6)]
    with started_together(workshop.stock(spec, ARGS), workshop.tiered(fresh_store, spec, ARGS)) as (server, tiered):
        fresh = [server.send(tail_logprobs(prompt, 4)) for prompt in prompts]
        for prompt in prompts:
            server.flush_cache()
            server.generate(prompt, 1)
            cached = server.send(tail_logprobs(prompt, 4))
            assert cached.cached_device > 0
            fresh.append(cached)
        for prompt in prompts:
            tiered.generate(prompt, 1)
        restored = [tiered.send(tail_logprobs(prompt, 4)) for prompt in prompts[:4]]
    spread = worst(fresh[6:], fresh[:6]).logprob
    assert [answer.cached_host for answer in restored] == [whole_pages(PROMPT_TOKENS - 9)] * 4
    assert worst(restored, fresh[:4]).logprob <= spread


def test_two_ranks_share_the_pages_of_a_latent(workshop: Workshop, fresh_store: Path) -> None:
    """MLA: the first rank saves for both, and a server of one rank, whose answers are the same, finds them."""
    spec = ModelSpec("deepseek_v2")
    ranks = workshop.tiered(fresh_store, spec, (*ARGS, *TWO_RANKS), env=ONE_CORE_EACH)
    with started_together(workshop.stock(spec, ARGS), ranks) as servers:
        wanted, answers = told_by_all(restore_once, *servers)
    assert answers[1].cached_host == whole_pages(PROMPT_TOKENS)
    assert_equal(answers, wanted)
    with started_together(workshop.tiered(fresh_store, spec, ARGS)) as (alone,):
        again = alone.send(tail_logprobs(random_prompt(PROMPT_TOKENS, seed=1) + random_prompt(30, seed=2)))
    assert again.cached_host >= whole_pages(PROMPT_TOKENS)
    assert_equal([again], wanted[1:])


def test_two_ranks_agree(workshop: Workshop, fresh_store: Path) -> None:
    """With each other, and with one rank that has no tier."""
    args = (*ARGS, *TWO_RANKS)
    tiered = workshop.tiered(fresh_store, args=args, env=ONE_CORE_EACH)
    with started_together(workshop.stock(args=ARGS), tiered) as servers:
        wanted, answers = told_by_all(restore_once, *servers)
        assert len(tiered.pids("sglang::scheduler")) == 2
    with started_together(workshop.tiered(fresh_store, args=args, env=ONE_CORE_EACH)) as (tiered,):
        again = tiered.send(tail_logprobs(random_prompt(PROMPT_TOKENS, seed=1) + random_prompt(30, seed=2)))
        state = tiered.tier_state()
        update_weights(tiered, workshop.model(replace(LLAMA, sharpness=2.0)))
        prompt = random_prompt(PROMPT_TOKENS, seed=1)
        new = [tiered.send(tail_logprobs(prompt))]
        evict(tiered)
        new.append(tiered.send(tail_logprobs(prompt)))
    assert answers[1].cached_host == whole_pages(PROMPT_TOKENS)
    assert again.cached_host >= whole_pages(PROMPT_TOKENS)
    assert state["representation"] == "hidden"
    assert_equal([*answers, again], [*wanted, wanted[1]])
    assert [answer.cached_host for answer in new] == [0, whole_pages(PROMPT_TOKENS - 9)], "of the new weights' pages"
    assert_equal(new[1:], new[:1])
