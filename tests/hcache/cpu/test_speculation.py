"""Chains of drafts in PyTorch: what SGLang's kernels do, by their definition."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_hcache.cpu import speculation

TOKENS = 4  # the last of a request, and drafts after it

chains = st.lists(st.lists(st.integers(0, 2), min_size=2 * TOKENS, max_size=2 * TOKENS), min_size=1, max_size=3)


def chain(lengths: torch.Tensor, *, topk: int = 1) -> list[torch.Tensor]:
    """Positions, and of each request's tokens the place, the next one and the sibling."""
    tokens, unused = len(lengths) * TOKENS, torch.empty(0)
    positions, places, following, siblings = (torch.empty(tokens, dtype=torch.int64) for _ in range(4))
    tree = [part.view(-1, TOKENS) for part in (places, following, siblings)]
    speculation._build_chain(
        unused, unused, lengths, unused, positions, tree[0], tree[1], tree[2], topk, TOKENS - 1, TOKENS, None
    )
    return [positions, *tree]


@given(chains)
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(requests: list[list[int]]) -> None:
    count = len(requests)
    candidates = torch.tensor([request[:TOKENS] for request in requests])
    predicted = torch.tensor([request[TOKENS:] for request in requests])
    _, *tree = chain(torch.arange(count))
    tokens, accepted, numbers = speculation._verify_chain(
        predicts=torch.zeros(count * TOKENS, dtype=torch.int32),
        accept_index=torch.full((count, TOKENS), -1, dtype=torch.int32),
        accept_token_num=torch.empty(count, dtype=torch.int32),
        candidates=candidates,
        retrieve_index=tree[0],
        retrieve_next_token=tree[1],
        retrieve_next_sibling=tree[2],
        target_predict=predicted,
        topk=1,
    )
    for request, (drafts, right) in enumerate(zip(candidates.tolist(), predicted.tolist(), strict=True)):
        kept = 0
        while kept < TOKENS - 1 and drafts[kept + 1] == right[kept]:
            kept += 1
        assert numbers[request] == kept
        begin = request * TOKENS
        assert accepted[request].tolist() == [*range(begin, begin + kept + 1), *[-1] * (TOKENS - 1 - kept)]
        assert tokens[begin : begin + kept + 1].tolist() == right[: kept + 1]
    last = torch.empty(count, dtype=torch.int32)
    speculation._fill_bonus_tokens(tokens[accepted], numbers + 1, last, TOKENS, count)
    assert last.tolist() == predicted[torch.arange(count), numbers.long()].tolist()


def test_positions_follow_each_requests_tokens() -> None:
    lengths = torch.tensor([7, 100])
    positions, places, following, siblings = chain(lengths)
    assert positions.tolist() == [7, 8, 9, 10, 100, 101, 102, 103]
    assert places.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert following.tolist() == [[1, 2, 3, -1]] * 2
    assert siblings.eq(-1).all()
    with pytest.raises(ValueError, match="--speculative-eagle-topk 1"):
        chain(lengths, topk=2)


def test_slots_are_given_and_found_again() -> None:
    table = torch.full((3, 12), -1, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 5]), torch.tensor([4, 10])
    slots = torch.randperm(100)[:8]
    speculation._give_slots(rows, table, starts, ends, slots, 2)
    assert (table >= 0).sum() == 8
    found = speculation.slots_of(req_pool_indices=rows, req_to_token=table, start_offset=starts, end_offset=ends)
    assert torch.equal(found, slots)
    drafts = torch.empty(2 * 3, dtype=torch.int64)
    speculation._assign_draft_slots(rows, table, starts, drafts, 1, 3, positions=None, mrope=None)
    assert torch.equal(drafts, torch.cat([slots[:3], slots[3:6]]))


def test_k_and_v_stay_where_they_are() -> None:
    here, there = torch.zeros(3), torch.ones(3)
    speculation._move_nothing(here, here, here, here, 1, 3, {})
    with pytest.raises(ValueError, match="not moved"):
        speculation._move_nothing(here, here, there, here, 1, 3, {})


def test_drafts_of_layers_with_slots_of_their_own_are_where_they_belong() -> None:
    """Two requests; when SGLang begins a chain, the batch has the slots of all its steps."""
    heads, dim, steps, slots = 2, 8, 3, torch.tensor([[10, 11], [20, 21]])  # by request, of all steps but the last
    pool = SWAKVPool(
        64, 32, 16, torch.float32, heads, dim,
        swa_attention_layer_ids=[0], full_attention_layer_ids=[1], device="cpu",
    )  # fmt: skip
    pool.register_mapping((torch.arange(65) + 1) % 32)
    table = torch.zeros(2, 16, dtype=torch.int64)
    table[:, 4:6] = slots
    runner = SimpleNamespace(
        device="cpu", token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=table)
    )
    layer = SimpleNamespace(
        layer_id=0, qk_head_dim=dim, v_head_dim=dim, tp_q_head_num=heads, tp_k_head_num=heads, scaling=1.0,
        is_cross_attention=False, sliding_window_size=4, k_scale=None, v_scale=None, attn_type=None,
    )  # fmt: skip
    batch: Any = SimpleNamespace(
        out_cache_loc=slots.flatten(), req_pool_indices=torch.arange(2), seq_lens=torch.tensor([4, 4]),
        encoder_lens=None, out_cache_loc_is_physical=True,
    )  # fmt: skip
    drafting = speculation._DraftSteps(runner, steps)
    drafting.init_forward_metadata(batch)
    for step, backend in enumerate(drafting.attn_backends):
        query, key, value = torch.randn(3, 2, heads, dim)
        batch.out_cache_loc = slots[:, step]
        backend.forward_decode(query, key, value, layer, batch)
        assert torch.equal(pool.get_key_buffer(0)[slots[:, step] + 1], key)
        assert torch.equal(pool.get_value_buffer(0)[slots[:, step] + 1], value)


def test_who_drafts_is_told_that_tokens_are_the_most_likely_ones(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert speculation._draft_steps(SimpleNamespace(speculative_num_steps=1)) is None
    assert "whatever temperature" in caplog.text
