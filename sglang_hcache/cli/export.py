"""Write what is stored of a prompt, or everything, to a file that `hcache import` reads. Safe while a server runs.

Pages that vanish meanwhile, or are damaged, are left out. Exit status: 0; 2 bad arguments; 3 nothing of it is stored,
or the file cannot be written.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sglang_hcache.cli.bundle import Model, write_bundle
from sglang_hcache.cli.common import (
    CommandFailed,
    add_common,
    count,
    explain,
    human,
    print_json,
    read_table,
    require_siblings,
)
from sglang_hcache.cli.prompt import TOKENS, Prompt, add_namespace, prompt_of, tokens_in
from sglang_hcache.storage.about import About, read_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, PARENT_BYTES, Entry
from sglang_hcache.storage.layout import ChunkDamaged, Record, verify
from sglang_hcache.storage.paths import folder_of, segment_file
from sglang_hcache.storage.segment import SegmentReader

Pages = dict[bytes, tuple[Path, Entry]]  # by key: the directory, and where in it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokens", type=tokens_in, metavar="FILE", help=f"the prompt whose pages to write: {TOKENS}")
    what.add_argument("--all", action="store_true", help="every page whose prefix is complete")
    add_namespace(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")


def run(arguments: argparse.Namespace) -> int:
    prompt = prompt_of(arguments)
    require_siblings(arguments.dir)
    stored = _stored(arguments.dir)
    chosen: list[tuple[Model, Iterator[Record]]] = []
    for fingerprint, pages in sorted(stored.items()):
        about = _about(arguments.dir, fingerprint)
        if about.layout is None:
            if prompt is not None:
                continue
            raise CommandFailed(f"the layout of {fingerprint.hex()} is not known: its about.json is missing")
        reader = _Reader(fingerprint, about, pages)
        if keys := reader.everything() if prompt is None else reader.prefix(prompt):
            layout = about.layout
            model = Model(fingerprint.hex(), layout.page_tokens, layout.layer_bytes, about.texts, len(keys))
            chosen.append((model, reader.read(keys)))
    try:
        written = write_bundle(arguments.out, chosen) if chosen else []
        size = arguments.out.stat().st_size if written else 0
    except OSError as error:
        raise CommandFailed(f"{arguments.out}: {error.strerror}") from error
    total = sum(model.pages for model in written)
    left_out = sum(model.pages for model, _ in chosen) - total
    if not written:
        where = ", ".join(map(str, arguments.dir))
        raise CommandFailed(f"{where}: nothing is stored" + ("" if prompt is None else " of this prompt"))
    if arguments.json:
        print_json({"file": str(arguments.out), "pages": total, "bytes": size, "left_out": left_out})
    else:
        print(f"{arguments.out}: {count(total, 'page')}, {human(size)}")
        if left_out:
            print(f"{count(left_out, 'page')} left out: evicted meanwhile, or damaged, which `hcache fsck` tells")
    return 0


class _Reader:
    """Pages of one fingerprint."""

    def __init__(self, fingerprint: bytes, about: About, pages: Pages) -> None:
        assert about.layout is not None
        self._fingerprint = fingerprint
        self._layout = about.layout
        self._pages = pages

    def read(self, keys: Sequence[bytes]) -> Iterator[Record]:
        """Pages in the order given, each after its parent, without those that are gone and what follows on them."""
        gone = set[bytes]()  # as children know their parents
        record = np.empty(self._layout.record_bytes, np.uint8)
        for key in keys:
            path, entry = self._pages[key]
            file = segment_file(folder_of(path, self._fingerprint), entry.segment)
            try:
                if entry.parent in gone:
                    raise ChunkDamaged("its parent is gone")
                SegmentReader(file, self._layout.record_bytes).read(entry.slot, record)
                verify(record, self._layout, self._fingerprint, key)
            except ChunkDamaged:
                gone.add(key[:PARENT_BYTES])
            except OSError as error:
                raise CommandFailed(explain(error, file)) from error
            else:
                yield record

    def prefix(self, prompt: Prompt) -> list[bytes]:
        """The first pages of a prompt, as far as they are stored."""
        of_both_kinds = prompt.keys(self._layout.page_tokens)
        return max((list(itertools.takewhile(self._pages.__contains__, keys)) for keys in of_both_kinds), key=len)

    def everything(self) -> list[bytes]:
        starts = {key[:PARENT_BYTES]: key for key in self._pages}
        done: dict[bytes, bool] = {}
        for key in self._pages:
            run, at = [], key
            while at not in done:
                done[at] = False
                run.append(at)
                parent = self._pages[at][1].parent
                if parent == bytes(PARENT_BYTES):
                    done[at] = True
                elif parent in starts:
                    at = starts[parent]
            whole = done[at]
            for one in reversed(run):
                done.pop(one)
                done[one] = whole
        return [key for key, whole in done.items() if whole]


def _stored(directories: list[Path]) -> dict[bytes, Pages]:
    stored: dict[bytes, Pages] = {}
    for path in directories:
        table = read_table(path, Damage())
        for name, entry in table.entries():
            stored.setdefault(name[:FINGERPRINT_BYTES], {})[name[FINGERPRINT_BYTES:]] = path, entry
    return stored


def _about(directories: list[Path], fingerprint: bytes) -> About:
    found = [read_about(folder_of(path, fingerprint)) for path in directories]
    return next((about for about in found if about.layout is not None), About())
