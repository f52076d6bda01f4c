"""Delete pages whose parent is gone, models that are not used any more, and pages of least value.

May be used while a server runs; what it writes at the moment is left alone. Exit status: 0; 2 bad arguments; 3 a
directory cannot be used, or could not be shrunk as far as asked.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from sglang_hcache.cli.common import CommandFailed, add_common, human, require, size, span
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.directory import open_shared
from sglang_hcache.storage.eviction import ORPHAN_S, Ints, Mask, choose
from sglang_hcache.storage.evictor import ROUNDS, drop, freeable, release
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.quota import Quota, bytes_on_disk
from sglang_hcache.storage.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--older-than", type=span, metavar="30d", help="also models not used for so long")
    parser.add_argument("--to-size", type=size, metavar="100GB", help="also what is worth least, in each directory")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def run(arguments: argparse.Namespace) -> int:
    results = []
    try:
        with ExitStack() as opened:
            indexes = []
            for path in arguments.dir:
                require(path)
                opened.callback(os.close, open_shared(path, Damage()))
                indexes.append(Index(path / "index", b""))
                opened.callback(indexes[-1].close)
            for i, path in enumerate(arguments.dir):
                others = [*indexes[:i], *indexes[i + 1 :]]
                results.append(collect(path, [indexes[i], *others], arguments))
    except (OSError, lmdb.Error) as error:
        raise CommandFailed(str(error)) from error
    if arguments.json:
        print(json.dumps({"dry_run": arguments.dry_run, "directories": results}, indent=2))
    else:
        for one in results:
            does = "would delete" if arguments.dry_run else "deleted"
            print(
                f"{one['path']}: {does} {one['pages']} pages, {human(one['freed_bytes'])} ({one['orphans']} orphans)"
            )
    short = [one["path"] for one in results if one["short_bytes"] > 0]
    if short and not arguments.dry_run:
        raise CommandFailed(f"{', '.join(short)} takes more than --to-size: the rest is in use or not listed")
    return 0


def collect(path: Path, indexes: Sequence[Index], arguments: argparse.Namespace) -> dict[str, Any]:
    """Delete in the first of the indexes' directories; the others hold pages of the same prefixes."""
    with Quota(path, 1 << 62, 0).locked():
        before = bytes_on_disk(path)
        pages, orphans, freed = _collect(path, indexes, arguments)
        for _ in range(ROUNDS if arguments.to_size is not None and not arguments.dry_run else 0):
            if bytes_on_disk(path) <= arguments.to_size:
                break
            pages += _collect(path, indexes, arguments)[0]  # the index may have grown by what was deleted
        after = bytes_on_disk(path)
    return {
        "path": str(path),
        "pages": pages,
        "orphans": orphans,
        "freed_bytes": freed if arguments.dry_run else before - after,
        "short_bytes": 0 if arguments.to_size is None else max(0, after - arguments.to_size),
    }


def _collect(path: Path, indexes: Sequence[Index], arguments: argparse.Namespace) -> tuple[int, int, int]:
    """How many pages were chosen, how many of them as orphans, and the bytes they take."""
    table = Table.read(indexes)
    freed = freeable(path, table)
    orphans = _orphans(table)
    victims = orphans | _unused(table, arguments.older_than)
    if arguments.to_size is not None:
        short = bytes_on_disk(path) - int(freed[victims].sum()) - arguments.to_size
        victims |= choose(table.forest, table.worth(time.time()), np.where(victims, 0, freed), short)
    if not arguments.dry_run and victims.any():
        drop(indexes, table, victims)
        release(path, table, victims, table.slots_in_use(~victims, volume=0))
    return int(victims.sum()), int(orphans.sum()), int(freed[victims].sum())


def _orphans(table: Table) -> Mask:
    age: Ints = int(time.time()) - table.value["last_use"].astype(np.int64)
    orphans: Mask = table.forest.orphan & (age > ORPHAN_S) & (table.volume == 0)
    return orphans


def _unused(table: Table, older_than: int | None) -> Mask:
    """Pages of fingerprints of which none was used for so long."""
    unused = np.zeros(len(table.names), np.bool_)
    if older_than is not None:
        for group in range(len(table.fingerprints)):
            mine = table.group == group
            if time.time() - int(table.value["last_use"][mine].max()) > older_than:
                unused |= mine
    return unused
