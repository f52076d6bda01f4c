"""Workloads keep what a prefix cache lives on: who begins like whom, and when."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.workloads import MADE, Call, Session, Workload, agentic, azure, burstgpt, mooncake, workload_of


def workload(*prompts: tuple[int, ...], block_tokens: int = 8) -> Workload:
    calls = [Call(prompt, block_tokens * len(prompt), 4) for prompt in prompts]
    return Workload("made", block_tokens, tuple(Session(float(i), (call,)) for i, call in enumerate(calls)))


def test_prompts_begin_alike_as_far_as_their_blocks_do() -> None:
    made = workload((1, 2, 3), (1, 2, 4), (5, 2, 3))
    first, second, third = (made.prompt(call) for call in made.calls)
    assert len(first) == 24
    assert first[:16] == second[:16]
    assert first[16:] != second[16:]
    assert first[:8] != third[:8]


def test_a_last_block_is_used_in_part() -> None:
    made = Workload("made", 8, ())
    assert made.prompt(Call((1, 2), 11, 1)) == made.prompt(Call((1, 2), 16, 1))[:11]


def test_what_an_ideal_cache_finds() -> None:
    made = workload((1, 2, 3), (1, 2, 4), (2, 1), (1, 2, 3))
    assert made.reusable_share() == (0 + 16 + 0 + 24) / (24 + 24 + 16 + 24)


def test_a_small_cache_forgets_what_was_not_used_for_longest() -> None:
    made = workload((1,), (2,), (3,), (1,), (3,))
    assert made.reusable_share(3 * 8) == 2 / 5
    assert made.reusable_share(2 * 8) == 1 / 5, "only the 3 is still there"


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(0, 200),
)
@settings(max_examples=200, deadline=None)
def test_a_bounded_cache_finds_no_more_than_one_without_bounds(
    prompts: list[list[int]], factor: int, capacity: int
) -> None:
    shrunk = workload(*map(tuple, prompts)).shrunk(factor, longest=1000)
    assert 0 <= shrunk.reusable_share(capacity) <= shrunk.reusable_share() < 1


@pytest.mark.parametrize("name", MADE)
def test_made_workloads_reuse_prefixes_and_shrink_without_losing_that(name: str) -> None:
    whole = workload_of(name)
    assert 0.5 < whole.reusable_share() < 1
    shrunk = whole.shrunk(4, longest=10_000)
    assert shrunk.block_tokens * 4 == whole.block_tokens
    assert shrunk.reusable_share() == pytest.approx(whole.reusable_share(), abs=0.01)
    assert [len(session.calls) for session in shrunk.sessions] == [len(session.calls) for session in whole.sessions]
    assert all(
        4 * call.input_tokens <= like.input_tokens + 4 for call, like in zip(shrunk.calls, whole.calls, strict=True)
    )
    assert workload_of(name) == whole, "made from a seed"


def test_a_session_ends_before_the_first_prompt_that_is_too_long() -> None:
    calls = tuple(Call(tuple(range(n)), 64 * n, 64) for n in (2, 4, 8, 3))
    shrunk = Workload("made", 64, (Session(0.0, calls), Session(1.0, calls[2:]))).shrunk(2, longest=200)
    assert [[call.input_tokens for call in session.calls] for session in shrunk.sessions] == [[64, 128]]


def test_the_first_sessions_and_calls() -> None:
    calls = tuple(Call((n,), 8, 1) for n in range(4))
    kept = Workload("made", 8, (Session(0.0, calls), Session(1.0, calls))).first(1, 3)
    assert [session.calls for session in kept.sessions] == [calls[:3]]


def test_mooncake_rows() -> None:
    rows = [
        {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]},
        {"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]},
    ]
    read = mooncake(io.StringIO("".join(json.dumps(row) + "\n" for row in rows)))
    assert read.block_tokens == 512
    assert [session.begins_s for session in read.sessions] == [0.0, 3.0]
    assert [(call.blocks, call.input_tokens, call.output_tokens) for call in read.calls] == [
        ((0, 1), 600, 9),
        ((0, 7), 700, 5),
    ]


def agentic_row(request: dict[str, object], t: float, **more: object) -> dict[str, object]:
    return {"t": t, "type": "n", "in": 128, "out": 3, "think_time": 2.5, **request, **more}


def test_agentic_conversations_share_no_block_and_helpers_run_beside_them() -> None:
    helper = {"t": 5.0, "type": "subagent", "requests": [agentic_row({"hash_ids": [1, 2]}, 0.0)]}
    first = {
        "block_size": 64,
        "requests": [agentic_row({"hash_rle": [1, 2]}, 0.0), helper, agentic_row({"hash_rle": [1, 2, 9, 1]}, 40.0)],
    }
    second = {"block_size": 64, "requests": [agentic_row({"hash_ids": [1, 2]}, 0.0)]}
    read = agentic(io.StringIO(f"{json.dumps(first)}\n{json.dumps(second)}\n"))
    main, other, beside = read.sessions
    assert (main.begins_s, other.begins_s, beside.begins_s) == (0.0, 4.0, 5.0)
    assert [call.pause_s for call in main.calls] == [2.5, 2.5]
    assert main.calls[1].blocks[:2] == main.calls[0].blocks == beside.calls[0].blocks
    assert len(main.calls[1].blocks) == 3
    assert not set(other.calls[0].blocks) & set(main.calls[1].blocks)


def test_azure_rows_have_arrivals_and_nothing_in_common() -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,65,0\n"
    read = azure(io.StringIO("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert [session.begins_s for session in read.sessions] == [0.0, 1.5]
    assert [(len(call.blocks), call.input_tokens, call.output_tokens) for call in read.calls] == [
        (6, 374, 44),
        (2, 65, 1),
    ]
    assert read.reusable_share() == 0


def test_burstgpt_rows_of_a_session_follow_one_another() -> None:
    head = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    rows = (
        "5,b,2,ChatGPT,64,10,74,Conversation log\n"
        "1,a,2,ChatGPT,100,20,120,Conversation log\n"
        "9,a,1,ChatGPT,200,30,230,Conversation log\n"
        "12,a,1,ChatGPT,300,0,300,Conversation log\n"
    )
    read = burstgpt(io.StringIO(head + rows))
    assert [session.begins_s for session in read.sessions] == [1.0, 5.0]
    first, second = read.sessions[0].calls
    assert (first.pause_s, second.pause_s) == (0.0, 6.0)
    assert second.blocks[:2] == first.blocks
    assert len(second.blocks) == 4


def test_burstgpt_rows_without_sessions() -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,64,10,74,API log\n"
    (session,) = burstgpt(io.StringIO(text)).sessions
    assert session.calls[0].input_tokens == 64


@pytest.mark.parametrize("pack", [lambda raw: raw, gzip.compress], ids=["plain", "gzip"])
def test_a_trace_is_read_from_a_file(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    row = json.dumps({"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]}) + "\n"
    path = tmp_path / "trace"
    path.write_bytes(pack(2 * row.encode()))
    assert len(workload_of(f"mooncake={path}").sessions) == 2
    assert len(workload_of(f"mooncake={path}", most_lines=1).sessions) == 1


@pytest.mark.parametrize("name", ["chit", "mooncake", "mooncake=", "parquet=x"])
def test_what_is_no_workload_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="chat, agent, rag, mooncake=PATH"):
        workload_of(name)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "[1, 2]\n", "{}\n"])
def test_a_file_that_is_no_such_trace_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.jsonl is no trace of kind mooncake"):
        workload_of(f"mooncake={path}")
