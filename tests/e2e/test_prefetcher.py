"""The prefetcher under real servers: ahead of scheduling, killed and hung under load, shared.

Continuous integration kills it a few times; `HCACHE_SERVER_KILLS=50` is the full count.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.harness import Answer, Server, free_port, random_prompt
from sglang_hcache.prefetch.endpoint import endpoint_for, is_running
from tests.e2e.conftest import Workshop, nothing_is_held, only_on_disk, pages_in, started_together
from tests.e2e.scenarios import (
    LLAMA,
    PAGE,
    SCENARIOS,
    SERVER_ARGS,
    TIER,
    assert_equal,
    evict_everything,
    tail_logprobs,
    wait_until,
    whole_pages,
)

Reference = dict[str, list[Answer]]

KILLS = int(os.environ.get("HCACHE_SERVER_KILLS", "3"))
PREFIX_TOKENS = 1200
BASE_S = 6.0
HUNG_S = 10.0  # after which a client gives a silent prefetcher up


@pytest.fixture(scope="module")
def directories(workshop: Workshop) -> list[Path]:
    return [workshop.folder / f"store-prefetcher-{number}" for number in range(2)]


@pytest.fixture(scope="module")
def server(workshop: Workshop, directories: list[Path]) -> Iterator[Server]:
    timeout = ("--hicache-storage-prefetch-policy", "timeout", "--hcache-prefetch-timeout", f"{BASE_S},0")
    args = (*SERVER_ARGS, *timeout)
    with started_together(workshop.tiered(",".join(map(str, directories)), args=args)) as (server,):
        yield server


def runs(pid: int) -> bool:
    """A killed process may stay as a zombie where the machine's first process reaps none."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_pages_on_disk_come_in_ahead_of_scheduling(
    server: Server, directories: list[Path], reference: Reference
) -> None:
    """Of four requests that want the same, and nothing beyond what is stored: it would be asked for, in vain."""
    prompt = random_prompt(PREFIX_TOKENS, seed=1)
    first = server.send(tail_logprobs(prompt))
    assert_equal([first], [reference["evicted_prefix"][0]])
    only_on_disk(server)
    before = server.tier_state()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.send(tail_logprobs(prompt)), range(4)))
    after = server.tier_state()
    assert after["lookups_not_ahead"] == before["lookups_not_ahead"]
    assert after["requests_admitted_late"] == before["requests_admitted_late"] == 0
    pages = whole_pages(PREFIX_TOKENS) // PAGE
    assert after["hits_file"] - before["hits_file"] == pages, "one read serves all"
    assert all(pages_in(directory) > pages // 4 for directory in directories), "striped"
    assert max(answer.cached_host for answer in answers) == whole_pages(PREFIX_TOKENS)
    assert_equal(answers, [first] * 4)
    assert nothing_is_held(server)


def test_a_killed_prefetcher_costs_no_request_and_no_output(server: Server, reference: Reference) -> None:
    """Eight conversations at once, all the time; the prefetcher is killed at random moments."""
    chance = random.Random(1)
    restarts = server.tier_state()["prefetcher_restarts"]
    done = threading.Event()

    def converse() -> int:
        runs = 0
        while not done.is_set():
            assert_equal(SCENARIOS["eight_conversations"](server), reference["eight_conversations"])
            runs += 1
        return runs

    with ThreadPoolExecutor(1) as pool:
        talk = pool.submit(converse)
        try:
            for kill in range(KILLS):
                time.sleep(chance.uniform(0.2, 2.0))
                os.kill(server.tier_state()["prefetcher_pid"], signal.SIGKILL)
                wait_until(lambda n=kill: server.tier_state()["prefetcher_restarts"] == restarts + n + 1, 30)  # type: ignore[misc]
        finally:
            done.set()
        assert talk.result() > 0
    wait_until(lambda: nothing_is_held(server), 10)
    evict_everything(server)
    before = server.tier_state()["tokens_restored"]
    assert_equal(SCENARIOS["evicted_prefix"](server), reference["evicted_prefix"])
    assert server.tier_state()["tokens_restored"] > before, "it restores again"


def test_a_hung_prefetcher_holds_requests_no_longer_than_allowed(server: Server, reference: Reference) -> None:
    evict_everything(server)
    state = server.tier_state()
    os.kill(state["prefetcher_pid"], signal.SIGSTOP)
    began = time.monotonic()
    answer = server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
    meanwhile = server.server_info()["internal_states"][0]["hcache"]
    held_s = meanwhile["requests_held_s"] - state["requests_held_s"]
    assert meanwhile["requests_admitted_late"] == state["requests_admitted_late"] + 1
    assert answer.ttft_s >= BASE_S
    assert BASE_S <= held_s < HUNG_S
    assert answer.cached_host == 0
    assert_equal([answer], [reference["evicted_prefix"][0]])

    def replaced() -> bool:
        server.generate(random_prompt(20, seed=3), 1)
        return bool(server.tier_state()["prefetcher_restarts"] > state["prefetcher_restarts"])

    wait_until(replaced, HUNG_S + 20)
    assert time.monotonic() - began > HUNG_S / 2
    assert not runs(state["prefetcher_pid"])


def test_two_servers_share_what_either_has_computed(workshop: Workshop, tmp_path: Path, reference: Reference) -> None:
    store = tmp_path / "store"
    servers = workshop.tiered(store), workshop.tiered(store)
    servers[0].shares_prefetcher = True
    with started_together(*servers) as (one, other):
        one.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
        wait_until(lambda: other.tier_state()["pages_host"] >= PREFIX_TOKENS // PAGE, 30)
        answer = other.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1) + random_prompt(40, seed=2)))
        assert answer.cached_host >= whole_pages(PREFIX_TOKENS)
        assert_equal([answer], [reference["evicted_prefix"][1]])
        states = one.tier_state(), other.tier_state()
        assert states[0]["prefetcher_pid"] == states[1]["prefetcher_pid"]
        assert states[0]["prefetcher_clients"] == 2
        one.kill()
        wait_until(lambda: other.tier_state()["prefetcher_clients"] == 1, 30)
        assert other.healthy()
    endpoint = endpoint_for([str(store)])
    assert not is_running(endpoint)
    assert not endpoint.socket.exists()
    assert not endpoint.lock.exists()


def test_a_prefetcher_on_another_host(workshop: Workshop, tmp_path: Path, reference: Reference) -> None:
    """As far as one machine can tell: over TCP with keys, no memory shared."""
    keys, port = tmp_path / "keys", free_port()
    hcache = [sys.executable, "-m", "sglang_hcache.cli.main"]
    subprocess.run([*hcache, "keygen", str(keys), "--client", "server-a"], check=True, timeout=30)
    listen = ("--listen", f"tcp://127.0.0.1:{port}", "--keys", str(keys))
    command = [*hcache, "prefetcher", "--dir", str(tmp_path / "store"), *listen]
    with (tmp_path / "prefetcher.log").open("wb") as log, subprocess.Popen(command, stderr=log) as prefetcher:
        args = (
            *SERVER_ARGS,
            *TIER,
            "--hcache-prefetcher",
            f"tcp://127.0.0.1:{port}",
        )
        server = Server(
            workshop.model(LLAMA), (*args, "--hcache-keys", str(keys / "server-a")), log=workshop.log("remote")
        )
        try:
            with started_together(server):
                server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
                only_on_disk(server)
                wanted = random_prompt(PREFIX_TOKENS, seed=1) + random_prompt(40, seed=2)
                answer = server.send(tail_logprobs(wanted))
                assert answer.cached_host >= whole_pages(PREFIX_TOKENS)
                assert_equal([answer], [reference["evicted_prefix"][1]])
        finally:
            prefetcher.terminate()
        assert prefetcher.wait(20) == 0


def test_server_and_prefetcher_killed_at_once(workshop: Workshop, tmp_path: Path, reference: Reference) -> None:
    """What was on disk is restored by the next server; what the prefetcher left behind is tidied up."""
    store = tmp_path / "store"
    with started_together(workshop.tiered(store)) as (server,):
        server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
        wait_until(lambda: server.tier_state()["pages_dirty"] == 0, 30)
        prefetcher = server.tier_state()["prefetcher_pid"]
        server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=7)))
        for scheduler in server.pids("sglang::scheduler"):
            os.kill(scheduler, signal.SIGSTOP)  # it would start another prefetcher
        os.kill(prefetcher, signal.SIGKILL)
        server.kill()
    with started_together(workshop.tiered(store)) as (server,):
        answer = server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1) + random_prompt(40, seed=2)))
        assert answer.cached_host >= whole_pages(PREFIX_TOKENS)
        assert_equal([answer], [reference["evicted_prefix"][1]])
        assert server.tier_state()["pages_damaged"] == 0
    assert not endpoint_for([str(store)]).socket.exists()
