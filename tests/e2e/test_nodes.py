"""Tensor parallelism over two nodes, each with files and a prefetcher of its own; one machine plays both."""

from __future__ import annotations

import itertools
from pathlib import Path

from bench.harness import Answer, Server, free_port, random_prompt
from tests.e2e.conftest import PATIENT, Workshop, only_on_disk, pages_in, started_together
from tests.e2e.scenarios import (
    LLAMA,
    PAGE,
    PREFIX_TOKENS,
    SCENARIOS,
    SERVER_ARGS,
    assert_equal,
    tail_logprobs,
    whole_pages,
)

PAGE_BYTES = PAGE * LLAMA.layers * LLAMA.hidden_size * 4  # as hidden states
READ_S = 0.03  # of a page, by the second node
ROOM = ("--hicache-ratio", "16")  # pages are lost where a prefetcher that is slow to give slots has few to give


class Node(Server):
    """Only the first one answers requests; on others SGLang serves no more than a health check."""

    def _answers(self) -> bool:
        return self.args[self.args.index("--node-rank") + 1] != "0" or super()._answers()


def test_ranks_on_two_nodes_restore_alike(
    workshop: Workshop, tmp_path: Path, reference: dict[str, list[Answer]]
) -> None:
    """Though the second one reads much more slowly: no node restores what another lacks."""
    stores, meet_at = [tmp_path / "first", tmp_path / "second"], f"127.0.0.1:{free_port()}"
    args = (*SERVER_ARGS, *ROOM, "--tp", "2", "--nnodes", "2", "--dist-init-addr", meet_at)
    slow_drive = ("--hcache-read-limit", str(PAGE_BYTES / READ_S / 1e9))
    first, second = (
        workshop.tiered_by(
            Node,
            store,
            args=(*args, "--node-rank", str(rank), *(slow_drive if rank else ())),
            env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **PATIENT},
        )
        for rank, store in enumerate(stores)
    )
    with started_together(second, first):
        evicted, conversation = (SCENARIOS[name](first) for name in ("evicted_prefix", "conversation"))
        only_on_disk(first)  # on the second, too
        read = first.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1) + random_prompt(40, seed=2)))
        state = first.tier_state()
        for node in (first, second):
            node.stop()
    assert evicted[1].cached_host == whole_pages(PREFIX_TOKENS)
    assert read.cached_host == whole_pages(read.prompt_tokens - 1)
    assert read.ttft_s > read.cached_host // PAGE * READ_S
    for former, answer in itertools.pairwise(conversation):
        assert answer.cached_host == whole_pages(former.prompt_tokens + len(former.output_ids) - 1)
    assert_equal([*evicted, read], [*reference["evicted_prefix"], reference["evicted_prefix"][1]])
    assert_equal(conversation, reference["conversation"])
    assert state["representation"] == "hidden"
    assert state["loads_failed"] == state["pages_leased"] == state["pages_incomplete"] == 0
    of_each = [pages_in(store) for store in stores]
    assert of_each[0] == of_each[1] > PREFIX_TOKENS // PAGE, "both have all hidden states"
    assert first.reported_leaks() == second.reported_leaks() == []
