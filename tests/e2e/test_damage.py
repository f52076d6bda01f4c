"""Every file of a store, damaged in every way under a stopped server: answers stay right, and it is said.

Continuous integration runs a slice of the matrix; `HCACHE_DAMAGE_ALL=1` runs all of it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.harness import Answer, Server, random_prompt
from tests.e2e.conftest import Workshop, started_together, told_by_all
from tests.e2e.scenarios import PREFIX_TOKENS, assert_equal, tail_logprobs, whole_pages

INDEX_HEAD_BYTES = 2 * 4096  # of an index, any page after them may happen to be free, and not be missed

Reference = dict[str, list[Answer]]
Damage = Callable[[Path], None]


def flip_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes() or bytes(64))  # an empty file gets what it should not have
    generator = random.Random(0)
    for _ in range(max(16, len(content) // 64)):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, min(path.stat().st_size // 2, INDEX_HEAD_BYTES))


def delete(path: Path) -> None:
    path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Damage, ...] = (flip_bytes, truncate, delete, replace_by_directory)
FILES = ("index/data.mdb", "segments", "index/lock.mdb", "hcache.lock", "checkpoints.json")
SLICE: list[tuple[str, Damage]] = [
    *(("segments", damage) for damage in (flip_bytes, truncate, delete)),
    *(("index/data.mdb", damage) for damage in (flip_bytes, truncate)),
    ("checkpoints.json", replace_by_directory),
]
CASES = [(file, damage) for damage in DAMAGES for file in FILES] if os.environ.get("HCACHE_DAMAGE_ALL") else SLICE
NEEDED = ("index/data.mdb", "segments")  # the others are made anew
AT_ONCE = 3  # servers


def converse(server: Server) -> list[Answer]:
    """The requests of scenario `evicted_prefix`, without the traffic that evicts."""
    prefix = random_prompt(PREFIX_TOKENS, seed=1)
    return [
        server.send(tail_logprobs(prefix)),
        server.send(tail_logprobs(prefix + random_prompt(40, seed=2))),
    ]


def victim(store: Path, file: str) -> Path:
    return next(store.glob("segments/*/*.seg")) if file == "segments" else store / file


@pytest.mark.parametrize(
    "cases",
    [CASES[first : first + AT_ONCE] for first in range(0, len(CASES), AT_ONCE)],
    ids=lambda cases: ", ".join(f"{damage.__name__} {file}" for file, damage in cases),
)
def test_answers_stay_right(
    cases: list[tuple[str, Damage]], workshop: Workshop, filled_store: Path, reference: Reference, tmp_path: Path
) -> None:
    stores = [Path(shutil.copytree(filled_store, tmp_path / str(number))) for number in range(len(cases))]
    harmed = [victim(store, file) for store, (file, _) in zip(stores, cases, strict=True)]
    for path, (_, damage) in zip(harmed, cases, strict=True):
        damage(path)
    servers = [workshop.tiered(store) for store in stores]
    with started_together(*servers):
        told = told_by_all(lambda server: (converse(server), server.tier_state()), *servers)
    for (file, _), path, server, (answers, state) in zip(cases, harmed, servers, told, strict=True):
        assert_equal(answers, reference["evicted_prefix"])
        noted, rebuilt = state["pages_damaged"] + state["files_damaged"], state["index_rebuilt"]
        if file in NEEDED:
            assert noted or rebuilt
        else:
            assert answers[0].cached_host == whole_pages(PREFIX_TOKENS - 8)
        log = server.log_text()
        assert log.count("was rebuilt from the segment files") == rebuilt
        assert log.count(f"hcache: {path} is damaged") == bool(noted)
