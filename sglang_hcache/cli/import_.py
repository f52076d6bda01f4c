"""Store the pages of a file that `hcache export` wrote. All of it is verified before anything is stored.

Safe while a server runs. Exit status: 0; 2 bad arguments; 3 the file is damaged, or a directory cannot be written.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_hcache.cli.bundle import BundleDamaged, Model, read_header_of, read_records
from sglang_hcache.cli.common import (
    CommandFailed,
    add_common,
    count,
    explain,
    print_json,
    require_owner,
    require_siblings,
)
from sglang_hcache.storage.about import NAME, read_about
from sglang_hcache.storage.directory import Contents
from sglang_hcache.storage.files import make_private
from sglang_hcache.storage.layout import Record
from sglang_hcache.storage.paths import folder_of, segment_files
from sglang_hcache.storage.store import SEGMENT_BYTES
from sglang_hcache.storage.stripe import PageFiles, Stripe
from sglang_hcache.storage.volume import Volume, belong_together

BATCH_PAGES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="what `hcache export` wrote")


def run(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    stored = present = 0
    require_siblings(arguments.dir)
    require_owner(arguments.dir)
    try:
        header, start = read_header_of(path)
        for _ in read_records(path, start, header.models):
            pass
        _require_layouts(header.models, arguments.dir)
        for directory in arguments.dir:
            make_private(directory)
        for model in header.models:
            for added, there in _store(path, start, model, arguments.dir):
                stored, present = stored + added, present + there
            start += model.pages * model.layout.record_bytes
    except BundleDamaged as damaged:
        raise CommandFailed(f"{path}: {damaged}; {_so_far(stored)}") from damaged
    except _CannotStore as failed:
        raise CommandFailed(f"{failed}; {_so_far(stored)}") from failed
    except OSError as error:
        raise CommandFailed(explain(error, path) + (f"; {_so_far(stored)}" if stored else "")) from error
    if arguments.json:
        print_json({"stored": stored, "present": present})
    else:
        print(f"{count(stored, 'page')} stored, {present} already there")
    return 0


class _CannotStore(Exception):
    """No directory takes a page."""


def _so_far(stored: int) -> str:
    return f"{count(stored, 'page')} of it stored" if stored else "nothing is stored"


def _require_layouts(models: Sequence[Model], directories: Sequence[Path]) -> None:
    """Raises CommandFailed if a directory has a model's pages in another or unknown layout: they would be lost."""
    for model, directory in itertools.product(models, directories):
        folder = folder_of(directory, bytes.fromhex(model.fingerprint))
        known = read_about(folder).layout
        if known is None and folder.exists() and any(segment_files(folder)):
            raise CommandFailed(
                f"{folder} does not say how its pages lie ({NAME} is missing or damaged): start the server of that "
                "model, which writes it; nothing is stored"
            )
        if known is not None and known != model.layout:
            raise CommandFailed(
                f"{directory} has pages of {model.fingerprint} with another layout than the file's; nothing is stored"
            )


def _store(path: Path, start: int, model: Model, directories: list[Path]) -> Iterator[tuple[int, int]]:
    """Of some pages at a time, how many were added, and how many were there."""
    contents = Contents(model.layout, bytes.fromhex(model.fingerprint), SEGMENT_BYTES, about=model.about)
    volumes = [Volume(directory, contents, retry_s=3600) for directory in directories]
    belong_together(volumes)
    stripe = Stripe(volumes)
    try:
        records = read_records(path, start, [model])
        while batch := [(key, record) for _, key, record in itertools.islice(records, BATCH_PAGES)]:
            there = stripe.locate(key for key, _ in batch)
            pages = [(key, record) for key, record in batch if key not in there]
            if not _write(stripe, pages):
                raise _CannotStore("; ".join(f"{volume.path}: {volume.state}" for volume in volumes))
            yield len(pages), len(there)
    finally:
        for volume in volumes:
            volume.close()


def _write(stripe: Stripe, pages: Sequence[tuple[bytes, Record]]) -> bool:
    """False where no directory could take all of them."""
    while pages:
        shares = defaultdict[PageFiles, list[tuple[bytes, Record]]](list)
        for page in pages:
            if (volume := stripe.next()) is None:
                return False
            shares[volume].append(page)
        pages = [page for volume, share in shares.items() if not volume.write(share) for page in share]
    return True
