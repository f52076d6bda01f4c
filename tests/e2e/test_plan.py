"""A server as it comes plans what it restores; the answers are the same, whatever it decides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.harness import Answer, Server, random_prompt
from sglang_hcache.cli.main import main
from tests.e2e.conftest import PATIENT, Workshop, only_on_disk, started_together
from tests.e2e.scenarios import LLAMA, SERVER_ARGS, assert_equal, evicted_prefix, tail_logprobs, whole_pages

Reference = dict[str, list[Answer]]

PREFIX = whole_pages(1200)


def as_it_comes(store: Path, workshop: Workshop) -> Server:
    """With memory for all pages of the test, and a drive on which reading does not pay."""
    tier = ("--hicache-backend", "hcache", "--hcache-dir", str(store), "--hicache-ratio", "4")
    args = (*SERVER_ARGS, *tier, "--hcache-read-limit", "0.0001")
    return Server(workshop.model(LLAMA), args, log=workshop.log("planned"), env=PATIENT)


def test_two_ranks_store_the_same(workshop: Workshop, fresh_store: Path, reference: Reference) -> None:
    """Each measures its own rates; what is stored of all layers is what the first rank finds best."""
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", **PATIENT}
    args = (*SERVER_ARGS, "--tp", "2", "--hicache-ratio", "4")
    tier = ("--hicache-backend", "hcache", "--hcache-dir", str(fresh_store))
    server = Server(workshop.model(LLAMA), (*args, *tier), log=workshop.log("planned"), env=env)
    with started_together(server) as (planned,):
        answers = evicted_prefix(planned)
        state, log = planned.tier_state(), planned.log_text()
    stored = re.findall(r"hcache: storing (\w+ of layers 0-2) \(", log)
    assert len(stored) == 2
    assert stored[0] == stored[1]
    assert log.count("hcache: calibrated in") == 2
    assert len(list((fresh_store / "layouts").glob("*.json"))) == 1
    assert state["plans"] > 0
    assert_equal(answers, reference["evicted_prefix"])


def test_rates_decide_what_is_restored(
    workshop: Workshop, fresh_store: Path, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates are measured, and then replaced, so that it is known what is right: memory is fast, drives are slow.

    So is the layout of what is stored: what is in use stays, as with these rates none is much faster.
    """
    with started_together(as_it_comes(fresh_store, workshop)) as (server,):
        assert "hcache: calibrated in" in server.log_text()
    (kept,) = (fresh_store / "calibration").glob("*.json")
    found = json.loads(kept.read_text())
    assert found["rates"]["ssd_bytes_per_s"] == 100_000
    assert all(found["rates"][name] > 0 for name in ("gemm_flop_per_s", "projection_flop_per_s", "bus_bytes_per_s"))
    assert main(["doctor", "--dir", str(fresh_store)]) == 0
    assert "\n  layer" in capsys.readouterr().out

    fast = dict.fromkeys(("projection_flop_per_s", "scatter_bytes_per_s"), 1e13) | {"bus_bytes_per_s": 1e11}
    found["rates"] |= {"gemm_flop_per_s": 1e9, "attention_flop_per_s": 1e9} | fast
    found["calibrated"] = found["rates"]
    kept.write_text(json.dumps(found))
    (layout,) = (fresh_store / "layouts").glob("*.json")
    layout.write_text(json.dumps(json.loads(layout.read_text()) | {"hidden": 1, "kv": 2}))
    assert main(["doctor", "--dir", str(fresh_store)]) == 0
    assert "  layer 0: hidden states\n  layers 1–2: KV\n" in capsys.readouterr().out
    with started_together(as_it_comes(fresh_store, workshop)) as (server,):
        answers = evicted_prefix(server)
        in_memory = server.tier_state()
        only_on_disk(server)
        prompt = random_prompt(1200, seed=1)
        on_drive = server.send(tail_logprobs(prompt + random_prompt(40, seed=2)))
        assert "hcache: calibrated in" not in server.log_text(), "the rates were kept"
    assert answers[1].cached_host == PREFIX
    assert in_memory["plans"] > 0
    assert (in_memory["representation"], in_memory["layers_hidden"], in_memory["layers_kv"]) == ("hidden+kv", 1, 2)
    assert in_memory["pages_incomplete"] == 0
    assert on_drive.cached_host < PREFIX // 2
    assert_equal([*answers, on_drive], [*reference["evicted_prefix"], reference["evicted_prefix"][1]])
