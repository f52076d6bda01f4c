"""Delete pages whose prefix is incomplete; with options also those not used for long, a prompt, the least valuable.

Safe while a server runs; files that it is writing are left alone, and what it has in memory. Exit status: 0; 2 bad
arguments; 3 a directory cannot be used, could not be shrunk to --to-size, or may have more of the --tokens.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np

from sglang_hcache.cli.common import (
    CommandFailed,
    add_common,
    count,
    fingerprint_folders,
    human,
    is_open,
    print_json,
    read_table,
    require,
    require_owner,
    require_siblings,
    size,
    span,
)
from sglang_hcache.cli.prompt import TOKENS, Prompt, add_namespace, prompt_of, tokens_in
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.eviction import ORPHAN_S, Ints, Mask, choose
from sglang_hcache.storage.evictor import ROUNDS, drop, freeable
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.locks import evicting, open_shared, seal_if_last
from sglang_hcache.storage.paths import bytes_below, bytes_on_disk, index_folder, segment_files
from sglang_hcache.storage.sweep import sweep
from sglang_hcache.storage.table import Table, starts_of

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--older-than", type=span, metavar="30d", help="also delete pages that have not been used for this long"
    )
    parser.add_argument(
        "--tokens",
        type=tokens_in,
        metavar="FILE",
        help=f"also delete a prompt and all that follows it, but no pages that others share: {TOKENS}",
    )
    add_namespace(parser)
    parser.add_argument(
        "--with-shared", action="store_true", help="with --tokens: those as well, and all that follows them"
    )
    parser.add_argument(
        "--to-size", type=size, metavar="100GB", help="also delete the least valuable pages until each directory fits"
    )
    parser.add_argument("--dry-run", action="store_true", help="only report what would be deleted")


def run(arguments: argparse.Namespace) -> int:
    directories: list[Path] = arguments.dir
    erases = prompt_of(arguments) is not None
    if arguments.with_shared and not erases:
        raise CommandFailed("--with-shared goes with --tokens")
    for path in directories:
        require(path)
    require_siblings(directories)
    if not arguments.dry_run:
        require_owner(directories)
    if arguments.to_size is not None:
        _require_room(directories, arguments.to_size)
    try:
        results = _foresee(arguments) if arguments.dry_run else _collect(arguments)
    except lmdb.Error as error:
        raise CommandFailed(str(error)) from error
    for path, one in zip(directories, results, strict=True):
        one["in_use"] = is_open(path) if erases else None
    if arguments.json:
        print_json({"dry_run": arguments.dry_run, "directories": results})
    else:
        for one in results:
            _print(one, "would delete" if arguments.dry_run else "deleted")
    short = [one["path"] for one in results if one["short_bytes"] > 0]
    if short and not arguments.dry_run:
        raise CommandFailed(
            f"{', '.join(short)} takes more than --to-size: the rest is its index, in use, or not in the index"
        )
    unlisted = [one["path"] for one in results if one["unlisted_models"] > 0]
    if erases and unlisted:
        raise CommandFailed(
            f"{', '.join(unlisted)} may have more of the prompt, which the index does not list: "
            "run `hcache fsck --repair`, or start that model's server, and then this again"
        )
    return 0


def _require_room(directories: Sequence[Path], to_size: int) -> None:
    """Deleting every page leaves the index."""
    for path in directories:
        least = bytes_below(index_folder(path))
        if to_size < least:
            raise CommandFailed(f"--to-size must be at least {least}B, the size of the index of {path}")


def _print(one: dict[str, Any], does: str) -> None:
    orphans = count(one["orphans"], "orphan")
    print(f"{one['path']}: {does} {count(one['pages'], 'page')}, {human(one['freed_bytes'])} ({orphans})")
    if one["index_damaged"]:
        lost = count(one["damaged_entries"], "damaged entry", "damaged entries")
        print(f"{one['path']}: the index is damaged ({lost}); pages it does not list are not counted")
    if one["shared_pages"]:
        kept = count(one["shared_pages"], "page")
        print(f"{one['path']}: {kept} of the prompt kept, as others follow, too: see --with-shared")
    if one["in_use"]:
        print(f"{one['path']}: in use; what servers have in memory, and files they are writing, are left alone")


@dataclass(frozen=True)
class Choice:
    """What to delete in one directory, and of the pages in the others that follow on its pages."""

    table: Table
    victims: Mask
    orphans: int  # of the victims
    freed_bytes: int
    shared: int = 0  # pages of the prompt here that stay, as others follow them, too
    unlisted: int = 0  # models

    @property
    def pages(self) -> int:
        return int(self.victims.sum())


def _foresee(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What would be deleted. Changes nothing."""
    damages = [Damage() for _ in arguments.dir]
    tables = [read_table(path, damage) for path, damage in zip(arguments.dir, damages, strict=True)]
    results, gone = [], [np.zeros(len(table.names), np.bool_) for table in tables]
    for i, (path, damage) in enumerate(zip(arguments.dir, damages, strict=True)):
        choice = _choose(_first(i, arguments.dir), _first(i, tables), arguments)
        pages = 0
        for volume, one in enumerate(_first(i, gone)):  # what goes in one takes pages of all along
            victims = choice.victims[choice.table.volume == volume]
            pages += int((victims & ~one).sum())
            np.logical_or(one, victims, out=one)
        left = bytes_on_disk(path) - choice.freed_bytes
        results.append(_result(path, pages, choice, choice.freed_bytes, left, arguments, damage))
    return results


def _collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Delete, in one directory after the other."""
    with ExitStack() as opened:
        damages, indexes = [], []
        for path in arguments.dir:
            damages.append(Damage())
            lock = open_shared(path, damages[-1])
            opened.callback(os.close, lock)
            indexes.append(Index(index_folder(path), b""))
            opened.callback(seal_if_last, path, lock, indexes[-1])
            opened.callback(indexes[-1].close)
        before = [bytes_on_disk(path) for path in arguments.dir]
        done = [
            _collect_one(_first(i, arguments.dir), _first(i, indexes), arguments) for i in range(len(arguments.dir))
        ]
        after = [bytes_on_disk(path) for path in arguments.dir]  # what goes in one may take pages of all along
    return [
        _result(path, pages, first, max(0, was - now), now, arguments, damage)  # servers may write meanwhile
        for path, (pages, first), was, now, damage in zip(arguments.dir, done, before, after, damages, strict=True)
    ]


def _collect_one(
    paths: Sequence[Path], indexes: Sequence[Index], arguments: argparse.Namespace
) -> tuple[int, Choice]:
    """Delete in the first of the directories; the others hold pages of the same prefixes.

    How many pages were deleted, and what was chosen first.
    """
    path = paths[0]
    with evicting(path):
        sweep(path, indexes[0])
        first = _delete(paths, indexes, arguments)
        pages = first.pages
        for _ in range(ROUNDS if arguments.to_size is not None else 0):
            if bytes_on_disk(path) <= arguments.to_size:
                break
            pages += _delete(paths, indexes, arguments).pages  # the index may have grown by what was deleted
    return pages, first


def _result(
    path: Path, pages: int, first: Choice, freed: int, left: int, arguments: argparse.Namespace, damage: Damage
) -> dict[str, Any]:
    return {
        "path": str(path),
        "pages": pages,
        "orphans": first.orphans,
        "freed_bytes": freed,
        "short_bytes": 0 if arguments.to_size is None else max(0, left - arguments.to_size),
        "index_damaged": damage.files > 0,
        "damaged_entries": damage.pages,
        "shared_pages": first.shared,
        "unlisted_models": first.unlisted,
    }


def _delete(paths: Sequence[Path], indexes: Sequence[Index], arguments: argparse.Namespace) -> Choice:
    choice = _choose(paths, [Table.read(index) for index in indexes], arguments)
    if choice.victims.any():
        drop(indexes, choice.table.places(choice.victims))
        for path, index in zip(paths, indexes, strict=True):
            sweep(path, index)
    return choice


def _choose(paths: Sequence[Path], tables: Sequence[Table], arguments: argparse.Namespace) -> Choice:
    table = Table.join(tables)
    freed = freeable(paths[0], table)
    unlisted = _listed_in_part(paths, tables)
    orphans = _orphans(table) & ~table.of(unlisted)
    victims = orphans | _unused(table, arguments.older_than)
    shared = np.zeros(len(table.names), np.bool_)
    if (prompt := prompt_of(arguments)) is not None:
        erased, shared = _of_prompt(table, prompt, victims, arguments.with_shared)
        victims |= erased
    if arguments.to_size is not None:
        short = bytes_on_disk(paths[0]) - int(freed[victims].sum()) - arguments.to_size
        victims |= choose(table.forest, table.worth(time.time()), np.where(victims, 0, freed), short)
    victims &= table.record_bytes > 0  # elsewhere an index has lost its mark, and nobody knows what a page takes
    return Choice(
        table,
        victims,
        orphans=int((orphans & victims).sum()),
        freed_bytes=int(freed[victims].sum()),
        shared=int((shared & ~victims & (table.volume == 0)).sum()),
        unlisted=len(unlisted),
    )


def _listed_in_part(paths: Sequence[Path], tables: Sequence[Table]) -> set[bytes]:
    """Fingerprints of which a directory has segments that its index, damaged before, does not list in full."""
    return {
        fingerprint
        for path, table in zip(paths, tables, strict=True)
        for folder in fingerprint_folders(path)
        if (fingerprint := bytes.fromhex(folder.name)) not in table.sizes and any(segment_files(folder))
    }


def _first(i: int, things: Sequence[T]) -> list[T]:
    """With one of them moved to the front."""
    return [things[i], *things[:i], *things[i + 1 :]]


def _orphans(table: Table) -> Mask:
    age: Ints = int(time.time()) - table.value["last_use"].astype(np.int64)
    orphans: Mask = table.forest.orphan & (age > ORPHAN_S) & (table.volume == 0)
    return orphans


def _unused(table: Table, older_than: int | None) -> Mask:
    """Select the first directory's pages that, like all pages after them, were last used over `older_than` s ago.

    Using a page also uses all before it, but their last use may not show it: the KV pool may have served them.
    """
    if older_than is None:
        return np.zeros(len(table.names), np.bool_)
    last_use = table.forest.largest_below(table.value["last_use"].astype(np.float64))
    unused: Mask = (time.time() - last_use > older_than) & (table.volume == 0)
    return unused


def _of_prompt(table: Table, prompt: Prompt, leaving: Mask, with_shared: bool) -> tuple[Mask, Mask]:
    """Select a prompt's pages to delete, in all directories, and those to keep, as other prompts continue them.

    All that follows its last whole page is deleted, as that contains the prompt's end. Pages that are `leaving`
    anyway do not count as another prompt's.
    """
    leading, after = (np.zeros(len(table.names), np.bool_) for _ in range(2))
    for group, fingerprint in enumerate(table.fingerprints):
        size = table.sizes.get(fingerprint)
        if size is None:
            continue
        if len(prompt.tokens) <= size.page_tokens:
            raise CommandFailed(f"--tokens needs more than {size.page_tokens} tokens, which a page has")
        mine = np.flatnonzero(table.group == group)
        key, parent = (part[mine].astype(np.uint64) for part in (table.names["key"], table.value["parent"]))
        for keys in map(starts_of, prompt.keys(size.page_tokens)):
            leading[mine] |= np.isin(key, keys)
            after[mine] |= np.isin(parent, keys[-1:])
    gone = table.forest.with_all_after(leading | after if with_shared else after)
    others = ~(leading | gone | leaving)
    shared = leading & ~gone & (table.forest.largest_below(others.astype(np.float64)) > 0)
    return gone | leading & ~shared, shared
