"""List the stored models: pages, bytes, hits and last use. Changes nothing; safe while a server runs.

Exit status: 0; 2 bad arguments; 3 a directory cannot be read.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from sglang_hcache.cli.common import add_common, count, duration, fingerprint_folders, human, print_json, read_table
from sglang_hcache.storage.about import read_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.eviction import Mask
from sglang_hcache.storage.paths import bytes_below, bytes_on_disk, index_folder
from sglang_hcache.storage.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    found = inspect(*arguments.dir)
    if arguments.json:
        print_json({"directories": found})
    else:
        for directory in found:
            print_directory(directory)
    return 0


def inspect(*paths: Path) -> list[dict[str, Any]]:
    """What each directory holds. Times are unix seconds, sizes bytes."""
    damages = [Damage() for _ in paths]
    tables = [read_table(path, damage) for path, damage in zip(paths, damages, strict=True)]
    together = Table.join(tables)  # what a page follows may be in another one
    orphan = [together.forest.orphan[together.volume == i] for i in range(len(tables))]
    return [_directory(*one) for one in zip(paths, tables, orphan, damages, strict=True)]


def _directory(path: Path, table: Table, orphan: Mask, damage: Damage) -> dict[str, Any]:
    return {
        "path": str(path),
        "bytes": bytes_on_disk(path),
        "index_bytes": bytes_below(index_folder(path)),
        "free_bytes": shutil.disk_usage(path).free,
        "index_damaged": damage.files > 0,
        "damaged_entries": damage.pages,
        "fingerprints": [_fingerprint(folder, table, orphan) for folder in fingerprint_folders(path)],
    }


def _fingerprint(folder: Path, table: Table, orphan: Mask) -> dict[str, Any]:
    about = read_about(folder)
    mine = table.of([bytes.fromhex(folder.name)])
    rows = table.value[mine]
    layout = about.layout
    return {
        "fingerprint": folder.name,
        "about": about.texts,
        "page_tokens": layout.page_tokens if layout else None,
        "record_bytes": layout.record_bytes if layout else None,
        "pages": len(rows),
        "orphans": int(orphan[mine].sum()),
        "bytes": bytes_below(folder),
        "hits": int(rows["hits"].sum()),
        "oldest_use": int(rows["last_use"].min()) if len(rows) else None,
        "newest_use": int(rows["last_use"].max()) if len(rows) else None,
    }


def print_directory(directory: dict[str, Any]) -> None:
    print(f"{directory['path']}: {human(directory['bytes'])}, {human(directory['free_bytes'])} free on the disk")
    if directory["index_damaged"]:
        print("  the index is damaged: lost pages are not listed; the next server rebuilds it from the files")
    for one in directory["fingerprints"]:
        name = ", ".join(one["about"].values()) or "unknown model"
        print(f"  {one['fingerprint'][:12]}  {name}")
        used = "never" if one["newest_use"] is None else f"{duration(time.time() - one['newest_use'])} ago"
        print(
            f"    {count(one['pages'], 'page')}, {human(one['bytes'])}, {count(one['hits'], 'hit')}, last used {used}"
        )
