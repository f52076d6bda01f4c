"""Every file of a store, damaged in every way under a stopped server: answers stay right, and it is said.

Continuous integration runs a slice of the matrix; `HCACHE_DAMAGE_CASES=0` runs all of it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.harness import Answer, Server, random_prompt
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import assert_equal, tail_logprobs, whole_pages

Reference = dict[str, list[Answer]]
Damage = Callable[[Path], None]


def flip_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes() or bytes(64))  # an empty file gets what it should not have
    generator = random.Random(0)
    for _ in range(max(16, len(content) // 64)):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def delete(path: Path) -> None:
    path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Damage, ...] = (flip_bytes, truncate, delete, replace_by_directory)
FILES = ("index/data.mdb", "segments", "index/lock.mdb", "hcache.lock", "checkpoints.json")
MATRIX = [(file, damage) for damage in DAMAGES for file in FILES]
SLICE = int(os.environ.get("HCACHE_DAMAGE_CASES", "5"))
CASES = MATRIX[:: -(-len(MATRIX) // SLICE)] if SLICE else MATRIX

PREFIX_TOKENS = 1200


def converse(server: Server) -> list[Answer]:
    """The requests of scenario `evicted_prefix`, without the traffic that evicts."""
    prefix = random_prompt(PREFIX_TOKENS, seed=1)
    return [
        server.send(tail_logprobs(prefix)),
        server.send(tail_logprobs(prefix + random_prompt(40, seed=2))),
    ]


@pytest.fixture(scope="module")
def intact(workshop: Workshop, reference: Reference) -> Path:
    store = workshop.folder / "store-damage"
    with workshop.tiered(store) as server:
        converse(server)
    return store


def victim(store: Path, file: str) -> Path:
    return next(store.glob("segments/*/*.seg")) if file == "segments" else store / file


@pytest.mark.parametrize(("file", "damage"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_answers_stay_right(
    file: str, damage: Damage, workshop: Workshop, intact: Path, reference: Reference, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(intact, tmp_path / "store"))
    harmed = victim(store, file)
    damage(harmed)
    with started_together(workshop.tiered(store)) as (server,):
        answers = converse(server)
        state = server.tier_state()
        assert server.healthy()
    assert_equal(answers, reference["evicted_prefix"])
    # Where nothing is missed, the damage hit what the store does not need: a file made anew, or a free page.
    whole = answers[0].cached_host == whole_pages(PREFIX_TOKENS - 8)
    noted, rebuilt = state["pages_damaged"] + state["files_damaged"], state["index_rebuilt"]
    assert noted or rebuilt or whole
    log = server.log_text()
    assert log.count("was rebuilt from the segment files") == rebuilt
    assert log.count(f"hcache: {harmed} is damaged") == bool(noted)
