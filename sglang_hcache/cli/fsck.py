"""Check the index against the files, and every checksum of every page.

Without --repair it changes nothing and is safe while a server runs. --repair removes damaged pages from the index,
adds intact pages that it has lost, and deletes stray files; no other process may have the directory open then.

Exit status: 0 clean; 1 problems, all repaired; 2 problems, not all repaired (or bad arguments); 3 not everything
could be checked, and what was found has been repaired.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from sglang_hcache.cli.common import (
    CommandFailed,
    Progress,
    add_common,
    alone,
    count,
    explain,
    is_fingerprint,
    print_json,
    read_table,
    require_owner,
)
from sglang_hcache.storage.about import NAME, read_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import remove
from sglang_hcache.storage.index import Index, Size
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, PARENT_BYTES, Entry
from sglang_hcache.storage.index_file import prepare, seal_closed
from sglang_hcache.storage.layout import ChunkDamaged, ChunkLayout, Header, read_header, verify
from sglang_hcache.storage.locks import census
from sglang_hcache.storage.paths import folder_of, index_folder, segment_file, segment_files
from sglang_hcache.storage.segment import SegmentReader
from sglang_hcache.storage.sweep import sweep_folder
from sglang_hcache.storage.table import Table

REPAIRED, UNREPAIRED, FAILED = 1, 2, 3


@dataclass(frozen=True)
class Problem:
    """What is wrong, and with which file or record."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Report:
    """What was found in one directory."""

    path: Path
    pages: int = 0  # whole, and listed
    problems: list[Problem] = field(default_factory=list)
    unchecked: list[Problem] = field(default_factory=list)
    repaired: int = 0  # problems

    def add(self, place: object, reason: str, *, repaired: int = 0) -> None:
        self.problems.append(Problem(str(place), reason))
        self.repaired += repaired

    @property
    def status(self) -> int:
        if self.repaired < len(self.problems):
            return UNREPAIRED
        return FAILED if self.unchecked else int(bool(self.problems))

    def as_json(self) -> dict[str, Any]:
        texts = {name: [*map(str, getattr(self, name))] for name in ("problems", "unchecked")}
        return {"path": str(self.path), "pages": self.pages, **texts, "repaired": self.repaired}


@dataclass
class _Model:
    """One fingerprint: its layout, the pages listed, by place, and the records that are whole."""

    folder: Path
    fingerprint: bytes
    layout: ChunkLayout
    listed: dict[tuple[str, int], bytes]
    in_full: bool  # any other record is free, whatever it holds
    bad: dict[tuple[bytes, Entry], str] = field(default_factory=dict)  # listed, and why they are not whole
    unlisted: list[tuple[bytes, Entry]] = field(default_factory=list)  # whole, and lost from the index
    may_miss_pages: bool = False  # that are not listed: the disk has failed to read some records

    def record(self, segment: str, slot: int) -> str:
        return f"{segment_file(self.folder, segment)}, record {slot}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")


def run(arguments: argparse.Namespace) -> int:
    if arguments.repair:
        require_owner(arguments.dir)
    reports = list[Report]()
    try:
        for path in arguments.dir:
            try:
                with alone(path) if arguments.repair else nullcontext():
                    reports.append(check(path, repair=arguments.repair))
            except (OSError, lmdb.Error) as error:
                raise CommandFailed(explain(error, path)) from error
    finally:  # also of what was done before an error: what is repaired is not found again
        if arguments.json and reports:
            print_json({"directories": [report.as_json() for report in reports]})
        else:
            for report in reports:
                _print(report)
    worst_first = (UNREPAIRED, FAILED, REPAIRED)
    return next((one for one in worst_first if any(report.status == one for report in reports)), 0)


def _print(report: Report) -> None:
    for problem in [*report.problems, *report.unchecked]:
        print(problem)
    whole = f"{count(report.pages, 'page')} intact"
    unchecked = f", {count(len(report.unchecked), 'model')} not checked" if report.unchecked else ""
    print(f"{report.path}: {whole}, {count(len(report.problems), 'problem')}, {report.repaired} repaired{unchecked}")


def check(path: Path, *, repair: bool) -> Report:
    report, damage = Report(path), Damage()
    if repair:
        prepare(index_folder(path), damage)
    listed, sizes = _listed(path, damage, repair)
    if damage.files:
        lost = count(damage.pages, "entry", "entries") if damage.pages else "everything"
        report.add(index_folder(path), f"damaged; {lost} in it lost", repaired=repair)
    for folder in sorted((path / "segments").iterdir()):
        if not is_fingerprint(folder):
            _stray(folder, report, repair)
            continue
        fingerprint = bytes.fromhex(folder.name)
        pages = listed.pop(fingerprint, {})
        layout = _layout(folder, sizes.get(fingerprint))
        if layout is None:
            reason = f"{NAME} is missing, damaged, without a checksum or not as the index says"
            report.unchecked.append(Problem(str(folder), f"{reason}; its pages are not checked"))
            continue
        in_full = fingerprint in sizes and not damage.files
        _check_model(_Model(folder, fingerprint, layout, pages, in_full), report, repair)
    for fingerprint, pages in listed.items():
        _check_lost(fingerprint, pages, report, repair)
    if repair:
        seal_closed(index_folder(path))
    return report


def _layout(folder: Path, size: Size | None) -> ChunkLayout | None:
    """Return the layout of the pages; None if it is uncertain, as with a wrong one all pages would seem damaged.

    size: a page's size according to the index, if it states one.
    """
    about = read_about(folder)
    layout = about.layout if about.verified else None
    if layout is not None and size not in (None, Size(layout.record_bytes, layout.page_tokens)):
        return None
    return layout


def _check_model(model: _Model, report: Report, repair: bool) -> None:
    files = sorted(model.folder.iterdir())
    belong = {model.folder / NAME, *(segment_file(model.folder, name) for name, _ in segment_files(model.folder))}
    for file in files:
        if file not in belong and (repair or os.path.lexists(file)):  # a server may have evicted it meanwhile
            _stray(file, report, repair)
    _check_pages(model, report)
    if (model.bad or model.unlisted) and not repair:
        _forgive(model, report.path)
    for (_, entry), reason in model.bad.items():
        report.add(model.record(*entry.place), reason)
    if model.unlisted:
        report.add(model.folder, f"{count(len(model.unlisted), 'intact page')} not in the index", repaired=repair)
    if repair:
        _repair(model, report)


def _stray(path: Path, report: Report, repair: bool) -> None:
    report.add(path, "does not belong here", repaired=repair and remove(path))


def _check_lost(fingerprint: bytes, pages: dict[tuple[str, int], bytes], report: Report, repair: bool) -> None:
    """Pages are listed, and there is no folder for them."""
    folder = folder_of(report.path, fingerprint)
    report.add(folder, f"missing, but the index lists {count(len(pages), 'page')} in it", repaired=repair)
    if repair:
        index = Index(index_folder(report.path), fingerprint)
        index.delete_many((key, Entry(*place)) for place, key in pages.items())
        index.close()


def _listed(
    path: Path, damage: Damage, repair: bool
) -> tuple[dict[bytes, dict[tuple[str, int], bytes]], dict[bytes, Size]]:
    """The pages in the index: keys by fingerprint and place; and the sizes of those that it lists in full."""
    found: dict[bytes, dict[tuple[str, int], bytes]] = defaultdict(dict)
    if repair:
        index = Index(index_folder(path), b"")
        table = Table.read(index)
        index.close()
    else:
        table = read_table(path, damage)
    for name, entry in table.entries():
        found[name[:FINGERPRINT_BYTES]][entry.place] = name[FINGERPRINT_BYTES:]
    return found, table.sizes


def _check_pages(model: _Model, report: Report) -> None:
    """Read every record there is, and every one that should be."""
    size = model.layout.record_bytes
    found = dict(segment_files(model.folder))
    lengths = {name: status.st_size // size for name, status in found.items()}
    places = {(name, slot) for name, records in lengths.items() for slot in range(records)} | model.listed.keys()
    progress = Progress(model.folder.name[:12], len(places))
    keys = set(model.listed.values())
    for (name, slot), header, reason in _read(model, sorted(places), report):
        progress.step()
        key = model.listed.get((name, slot))
        if key is None:
            if header is not None and header.key not in keys and not model.in_full:
                keys.add(header.key)
                parent = header.parent[:PARENT_BYTES]
                model.unlisted.append((header.key, Entry(name, slot, parent, 0, int(found[name].st_mtime))))
        elif header is None or header.key != key:
            model.bad[key, Entry(name, slot)] = reason or "it is another page"
        else:
            report.pages += 1


def _read(
    model: _Model, places: list[tuple[str, int]], report: Report
) -> Iterator[tuple[tuple[str, int], Header | None, str]]:
    """The header of each record that is whole, or why it is not; a record that the disk cannot read is neither."""
    layout = model.layout
    record = np.empty(layout.record_bytes, np.uint8)
    reader: tuple[str, SegmentReader] | None = None
    for name, slot in places:
        try:
            if reader is None or reader[0] != name:
                reader = name, SegmentReader(segment_file(model.folder, name), layout.record_bytes)
            reader[1].read(slot, record)
            header = read_header(record, layout)
            verify(record, layout, model.fingerprint, header.key)
        except ChunkDamaged as damaged:
            yield (name, slot), None, damaged.reason
        except OSError as error:
            report.add(model.record(name, slot), f"the disk cannot read it ({error.strerror or error})")
            model.may_miss_pages |= not model.in_full and (name, slot) not in model.listed
        else:
            yield (name, slot), header, ""


def _forgive(model: _Model, path: Path) -> None:
    """A server may have evicted or written pages while they were read: those are no problem."""
    damage = Damage()
    listed, sizes = _listed(path, damage, repair=False)
    now = listed.get(model.fingerprint, {})
    if model.fingerprint in sizes and not damage.files:
        model.unlisted = []
    model.bad = {(key, entry): reason for (key, entry), reason in model.bad.items() if now.get(entry.place) == key}


def _repair(model: _Model, report: Report) -> None:
    index = Index(index_folder(report.path), model.fingerprint)
    try:
        report.repaired += index.delete_many(model.bad)
        if model.unlisted:
            index.put_many(model.unlisted)
            report.pages += len(model.unlisted)
        if not model.may_miss_pages:
            index.mark(Size(model.layout.record_bytes, model.layout.page_tokens))
            with census(model.folder):
                sweep_folder(model.folder, index)
    finally:
        index.close()
