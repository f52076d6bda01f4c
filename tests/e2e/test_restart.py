"""What was on disk is restored by the next server on the same directory, and only by the right one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness import Answer, random_prompt
from sglang_hcache.cli.bundle import read_header_of
from sglang_hcache.cli.main import main
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import (
    LLAMA,
    PAGE,
    PREFIX_TOKENS,
    SERVER_ARGS,
    assert_equal,
    tail_logprobs,
    whole_pages,
)

Reference = dict[str, list[Answer]]

STRANGERS = {
    "another model": (replace(LLAMA, sharpness=2.4), SERVER_ARGS),
    "another dtype": (LLAMA, (*SERVER_ARGS, "--dtype", "bfloat16")),
    "another page size": (LLAMA, (*SERVER_ARGS, "--page-size", "128")),
}


@pytest.fixture(scope="module")
def store(workshop: Workshop, filled_store: Path) -> Path:
    """A store that a server has left on SIGTERM."""
    return Path(shutil.copytree(filled_store, workshop.folder / "store-restart"))


def assert_restored(workshop: Workshop, store: Path, reference: Reference, **env: str) -> None:
    """By a server that is killed afterwards."""
    prompt = random_prompt(PREFIX_TOKENS, seed=1) + random_prompt(40, seed=2)
    with started_together(workshop.tiered(store, env=env)) as (server,):
        answer = server.send(tail_logprobs(prompt))
        state = server.tier_state()
    assert whole_pages(PREFIX_TOKENS) <= answer.cached_host == state["hits_file"] * PAGE
    assert state["pages_damaged"] == state["files_damaged"] == 0
    assert_equal([answer], [reference["evicted_prefix"][1]])


def test_what_is_stored_of_a_prompt_is_exported(store: Path, tmp_path: Path) -> None:
    prompt = [*random_prompt(PREFIX_TOKENS, seed=1), *random_prompt(200, seed=2)]
    (tmp_path / "tokens").write_text(json.dumps(prompt))
    (tmp_path / "salad").write_text(json.dumps(prompt[1:]))
    export = ["export", "--dir", str(store), "--out", str(tmp_path / "out"), "--tokens"]
    assert main([*export, str(tmp_path / "tokens")]) == 0
    header, _ = read_header_of(tmp_path / "out")
    assert [model.pages for model in header.models] == [PREFIX_TOKENS // PAGE]
    assert main([*export, str(tmp_path / "salad")]) == 3


def test_after_sigterm(workshop: Workshop, store: Path, reference: Reference) -> None:
    assert_restored(workshop, store, reference, PYTHONHASHSEED="random")  # not as the former one hashed


def test_strangers_miss(workshop: Workshop, store: Path) -> None:
    """Three servers at once on the directory, none of which its pages are for."""
    servers = [workshop.tiered(store, spec, args) for spec, args in STRANGERS.values()]
    with started_together(*servers):
        for stranger, server in zip(STRANGERS, servers, strict=True):
            answer = server.send(tail_logprobs(random_prompt(PREFIX_TOKENS, seed=1)))
            state = server.tier_state()
            assert answer.cached_tokens == 0, stranger
            assert state["hits_file"] == state["pages_damaged"] == state["files_damaged"] == 0, stranger
            assert [volume["state"] for volume in state["volumes"]] == ["ok"], stranger


def test_strangers_destroy_nothing(workshop: Workshop, store: Path, reference: Reference) -> None:
    """They, and the server before them, were killed on this directory."""
    assert_restored(workshop, store, reference)
