"""Store the pages of a file that `hcache export` wrote. The file is verified in full before anything is stored.

May be used while a server runs. Exit status: 0; 2 bad arguments; 3 the file is damaged, or a disk refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from sglang_hcache.cli.bundle import BundleDamaged, Model, read_header_of, read_records
from sglang_hcache.cli.common import CommandFailed, add_common, count, explain, require_siblings
from sglang_hcache.storage.directory import Contents
from sglang_hcache.storage.store import SEGMENT_BYTES
from sglang_hcache.storage.stripe import Stripe
from sglang_hcache.storage.volume import Volume

BATCH_PAGES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("file", type=Path, metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    stored = present = 0
    require_siblings(arguments.dir)
    try:
        header, start = read_header_of(path)
        for _ in read_records(path, start, header.models):
            pass
        for model in header.models:
            added, there = _store(path, start, model, arguments.dir)
            stored, present = stored + added, present + there
            start += model.pages * model.layout.record_bytes
    except BundleDamaged as damaged:
        raise CommandFailed(f"{path}: {damaged}; nothing is stored") from damaged
    except OSError as error:
        raise CommandFailed(explain(error, path)) from error
    if arguments.json:
        print(json.dumps({"stored": stored, "present": present}))
    else:
        print(f"{count(stored, 'page')} stored, {present} {'was' if present == 1 else 'were'} there")
    return 0


def _store(path: Path, start: int, model: Model, directories: list[Path]) -> tuple[int, int]:
    """How many pages were added, and how many were there."""
    contents = Contents(model.layout, bytes.fromhex(model.fingerprint), SEGMENT_BYTES, about=model.about)
    stripe = Stripe([Volume(directory, contents, retry_s=3600) for directory in directories])
    stored = present = 0
    try:
        records = read_records(path, start, [model])
        while batch := [(key, record) for _, key, record in itertools.islice(records, BATCH_PAGES)]:
            there = stripe.locate(key for key, _ in batch)
            pages = [(key, record) for key, record in batch if key not in there]
            if stripe.write(pages):
                raise CommandFailed("; ".join(f"{volume.path}: {volume.state}" for volume in stripe.volumes))
            stored, present = stored + len(pages), present + len(there)
    finally:
        stripe.close()
    return stored, present
