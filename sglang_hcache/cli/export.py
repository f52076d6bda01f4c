"""Write what is stored of a prompt, or everything, to a file that `hcache import` reads. Safe while a server runs.

Exit status: 0; 2 bad arguments; 3 a page is missing or damaged, or the file cannot be written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from sglang_hcache.cli.bundle import Model, write_bundle
from sglang_hcache.cli.common import CommandFailed, add_common, count, explain, human, read_table, require_siblings
from sglang_hcache.page_hash import page_hash
from sglang_hcache.storage.about import About, read_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.evictor import segment_file
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, Entry
from sglang_hcache.storage.layout import ChunkDamaged, Record, verify
from sglang_hcache.storage.segment import SegmentReader

Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Pages = dict[bytes, tuple[Path, Entry]]  # by key: the directory, and where in it


class Tokenized(msgspec.Struct):
    """The answer of SGLang's `/v1/tokenize`."""

    tokens: list[Token]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tokens",
        type=_tokens,
        metavar="FILE",
        help="the prompt whose pages to write: a JSON list of token ids, or the answer of /v1/tokenize; - is stdin",
    )
    what.add_argument("--all", action="store_true", help="every page whose prefix is complete")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")


def run(arguments: argparse.Namespace) -> int:
    require_siblings(arguments.dir)
    stored = _stored(arguments.dir)
    models, chosen = [], []
    for fingerprint, pages in sorted(stored.items()):
        about = _about(arguments.dir, fingerprint)
        if about.layout is None:
            if not arguments.all:
                continue
            raise CommandFailed(f"the layout of {fingerprint.hex()} is not known: its about.json is missing")
        reader = _Reader(fingerprint, about, pages)
        if run_ := reader.everything() if arguments.all else reader.prefix(arguments.tokens):
            models.append(
                Model(fingerprint.hex(), about.layout.page_tokens, about.layout.layer_bytes, about.texts, len(run_))
            )
            chosen.append((reader, run_))
    if not models:
        where = ", ".join(map(str, arguments.dir))
        raise CommandFailed(f"{where}: nothing is stored" + ("" if arguments.all else " of this prompt"))
    try:
        write_bundle(arguments.out, models, (reader.read(key) for reader, keys in chosen for key in keys))
        size = arguments.out.stat().st_size
    except OSError as error:
        raise CommandFailed(f"{arguments.out}: {error.strerror}") from error
    total = sum(model.pages for model in models)
    if arguments.json:
        print(json.dumps({"file": str(arguments.out), "pages": total, "bytes": size}))
    else:
        print(f"{arguments.out}: {count(total, 'page')}, {human(size)}")
    return 0


class _Reader:
    """Pages of one fingerprint."""

    def __init__(self, fingerprint: bytes, about: About, pages: Pages) -> None:
        assert about.layout is not None
        self._fingerprint = fingerprint
        self._layout = about.layout
        self._pages = pages

    def read(self, key: bytes) -> Record:
        path, entry = self._pages[key]
        file = segment_file(path, self._fingerprint, entry.segment)
        record = np.empty(self._layout.record_bytes, np.uint8)
        try:
            SegmentReader(file, self._layout.record_bytes).read(entry.slot, record)
            verify(record, self._layout, self._fingerprint, key)
        except ChunkDamaged as damaged:
            raise CommandFailed(f"page {key.hex()}: {damaged.reason}") from damaged
        except OSError as error:
            raise CommandFailed(explain(error, file)) from error
        return record

    def prefix(self, tokens: list[int]) -> list[bytes]:
        """The first pages of a prompt, as far as they are stored."""
        hashes = page_hash(tokens, None, self._layout.page_tokens)
        assert isinstance(hashes, list)
        return list(itertools.takewhile(self._pages.__contains__, map(bytes.fromhex, hashes)))

    def everything(self) -> list[bytes]:
        starts = {key[:8]: key for key in self._pages}
        done: dict[bytes, bool] = {}
        for key in self._pages:
            run, at = [], key
            while at not in done:
                done[at] = False
                run.append(at)
                parent = self._pages[at][1].parent
                if parent == bytes(8):
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
    found = [read_about(path / "segments" / fingerprint.hex()) for path in directories]
    return next((about for about in found if about.layout is not None), About())


def _tokens(file: str) -> list[int]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        prompt = msgspec.json.decode(data, type=list[Token] | Tokenized)
    except OSError as error:
        raise argparse.ArgumentTypeError(explain(error, Path(file))) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{file} is neither a list of token ids nor has one ({error})") from error
    return prompt if isinstance(prompt, list) else prompt.tokens
