"""Stores for the commands to work on, and running a command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sglang_hcache.cli.main import main
from sglang_hcache.storage.layout import ROOT
from tests.storage.pages import FINGERPRINT, counters, fill, key_of, open_store, served


def make(*directories: Path, pages: range = range(10), **options: Any) -> None:
    make_prefix(*directories, keys=list(map(key_of, pages)), first=pages[0], **options)


def make_prefix(*directories: Path, keys: Sequence[bytes], first: int = 0, **options: Any) -> None:
    store = open_store(*directories, **options)
    for page, (parent, key) in enumerate(pairwise([ROOT, *keys]), first):
        slot = store.reserve()
        assert slot is not None
        fill(store.memory[slot], page)
        store.commit(key, slot, parent)
    store.close()


def found(*directories: Path, pages: range = range(10), **options: Any) -> list[int]:
    store = open_store(*directories, **options)
    pages_found = served(store, pages)
    assert counters(store)["pages_damaged"] == 0
    store.close()
    return pages_found


def damage_entry(directory: Path, page: int) -> None:
    """Change a bit of what the index says of a page, everywhere: also where LMDB does not look any more."""
    data = directory / "index" / "data.mdb"
    content = bytearray(data.read_bytes())
    at = -1
    while (at := content.find(FINGERPRINT + key_of(page), at + 1)) >= 0:
        content[at + 20] ^= 1
    data.write_bytes(content)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else None
