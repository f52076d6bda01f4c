"""Check the index against the files, and every checksum of every page.

Without --repair it changes nothing and may be used while a server runs. --repair drops entries of pages that are not
whole, lists whole pages that were not, and deletes stray files; nobody else may have the directory open then.

Exit status: 0 clean; 1 problems, all repaired; 2 problems, not repaired (or bad arguments); 3 it could not check.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import lmdb
import numpy as np

from sglang_hcache.cli.common import CommandFailed, Progress, add_common, alone, read_table
from sglang_hcache.storage.about import NAME, read_about
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.files import remove
from sglang_hcache.storage.index import Index, Size, prepare
from sglang_hcache.storage.index_check import FINGERPRINT_BYTES, PARENT_BYTES, Entry, decode
from sglang_hcache.storage.layout import ChunkDamaged, ChunkLayout, Header, read_header, verify
from sglang_hcache.storage.quota import give_back
from sglang_hcache.storage.segment import SegmentReader

_SEGMENT = re.compile(r"[0-9a-f]{16}\.seg")


@dataclass
class Report:
    """What was found in one directory."""

    path: str
    pages: int = 0  # whole, and listed
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    repaired: int = 0


@dataclass
class _Model:
    """One fingerprint: its layout, the pages listed, by place, and the records that are whole."""

    folder: Path
    fingerprint: bytes
    layout: ChunkLayout
    listed: dict[tuple[str, int], bytes]
    bad: list[tuple[bytes, Entry]] = field(default_factory=list)
    unlisted: list[tuple[bytes, Entry]] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--repair", action="store_true", help="put right what can be")


def run(arguments: argparse.Namespace) -> int:
    reports = []
    for path in arguments.dir:
        try:
            with alone(path) if arguments.repair else nullcontext():
                reports.append(check(path, repair=arguments.repair))
        except (OSError, lmdb.Error) as error:
            raise CommandFailed(f"{path}: {error}") from error
    if arguments.json:
        print(json.dumps({"directories": [vars(report) for report in reports]}, indent=2))
    else:
        for report in reports:
            for line in [*report.problems, *report.unchecked]:
                print(line)
            problems = len(report.problems)
            print(f"{report.path}: {report.pages} pages are whole, {problems} problems, {report.repaired} repaired")
    if any(report.problems and report.repaired < len(report.problems) for report in reports):
        return 2
    return int(any(report.problems for report in reports))


def check(path: Path, *, repair: bool) -> Report:
    report, damage = Report(str(path)), Damage()
    if repair:
        prepare(path / "index", damage)
    listed = _listed(path, damage, repair)
    if damage.files:
        report.problems.append(f"{path / 'index'}: damaged, {damage.pages} entries were lost")
        report.repaired += repair
    folders = [folder for folder in sorted((path / "segments").iterdir()) if folder.is_dir()]
    for folder in folders:
        fingerprint = bytes.fromhex(folder.name)
        layout = read_about(folder).layout
        if layout is None:
            report.unchecked.append(f"{folder}: {NAME} is missing or damaged; its pages are not checked")
            continue
        model = _Model(folder, fingerprint, layout, listed.pop(fingerprint, {}))
        _check_files(model, report, repair)
        _check_pages(model, report)
        if model.unlisted and not model.listed and not repair:
            report.problems.append(f"{folder}: {len(model.unlisted)} whole pages, and no index lists any of them")
        if model.bad and not repair:
            _forgive(model, path, report)
        if repair:
            _repair(model, path, report)
    return report


def _listed(path: Path, damage: Damage, repair: bool) -> dict[bytes, dict[tuple[str, int], bytes]]:
    """The pages in the index: keys by fingerprint and place."""
    found: dict[bytes, dict[tuple[str, int], bytes]] = defaultdict(dict)
    if repair:
        index = Index(path / "index", b"")
        names, values = index.raw()
        index.close()
    else:
        table = read_table(path, damage)
        names, values = table.names, table.raw
    for name, value in zip(names, values, strict=True):
        entry = decode(name, value)
        if entry is not None:
            found[name[:FINGERPRINT_BYTES]][entry.place] = name[FINGERPRINT_BYTES:]
    return found


def _check_files(model: _Model, report: Report, repair: bool) -> None:
    for file in sorted(model.folder.iterdir()):
        if file.name != NAME and not (_SEGMENT.fullmatch(file.name) and file.is_file() and not file.is_symlink()):
            report.problems.append(f"{file}: does not belong here")
            report.repaired += bool(repair and remove(file))


def _check_pages(model: _Model, report: Report) -> None:
    """Read every record there is, and every one that should be."""
    size = model.layout.record_bytes
    lengths = {
        file.stem: file.stat().st_size // size for file in model.folder.glob("*.seg") if _SEGMENT.fullmatch(file.name)
    }
    places = {(name, slot) for name, count in lengths.items() for slot in range(count)} | model.listed.keys()
    progress = Progress(model.folder.name[:12], len(places))
    keys = set(model.listed.values())
    for (name, slot), header, reason in _read(model, sorted(places), report):
        progress.step()
        key = model.listed.get((name, slot))
        if key is None:
            if header is not None and header.key not in keys:
                keys.add(header.key)
                parent = header.parent[:PARENT_BYTES]
                model.unlisted.append((header.key, Entry(name, slot, parent, 0, int(time.time()))))
        elif header is None or header.key != key:
            model.bad.append((key, Entry(name, slot)))
            report.problems.append(f"{model.folder / name}.seg, record {slot}: {reason or 'it is another page'}")
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
                reader = name, SegmentReader(model.folder / f"{name}.seg", layout.record_bytes)
            reader[1].read(slot, record)
            header = read_header(record, layout)
            verify(record, layout, model.fingerprint, header.key)
        except ChunkDamaged as damaged:
            yield (name, slot), None, damaged.reason
        except OSError as error:
            report.problems.append(f"{model.folder / name}.seg, record {slot}: the disk cannot read it ({error})")
        else:
            yield (name, slot), header, ""


def _forgive(model: _Model, path: Path, report: Report) -> None:
    """A server may have evicted pages while they were read: those are no problem."""
    now = _listed(path, Damage(), repair=False).get(model.fingerprint, {})
    still = [(key, entry) for key, entry in model.bad if now.get(entry.place) == key]
    gone = {f"{model.folder / entry.segment}.seg, record {entry.slot}:" for key, entry in model.bad} - {
        f"{model.folder / entry.segment}.seg, record {entry.slot}:" for key, entry in still
    }
    report.problems = [line for line in report.problems if not any(line.startswith(one) for one in gone)]
    model.bad = still


def _repair(model: _Model, path: Path, report: Report) -> None:
    index = Index(path / "index", model.fingerprint)
    try:
        report.repaired += index.delete_many(model.bad)
        if model.unlisted:
            index.put_many(model.unlisted)
            report.problems.append(f"{model.folder}: {len(model.unlisted)} whole pages were not listed")
            report.repaired += 1
            report.pages += len(model.unlisted)
        index.mark(Size(model.layout.record_bytes, model.layout.page_tokens))
        used = {entry.segment for _, entry in index.entries()}
    finally:
        index.close()
    for file in model.folder.glob("*.seg"):
        if file.stem not in used:
            give_back(file, model.layout.record_bytes, ())
