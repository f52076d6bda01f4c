"""Frees disk space that no page needs: what segment files take beyond the records that the index names.

A segment is locked before it is looked up in the index: its writer names its records before it releases the lock.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sglang_hcache.storage.about import read_about
from sglang_hcache.storage.index import Index, Size, Used
from sglang_hcache.storage.locks import census
from sglang_hcache.storage.paths import fingerprint_of, folders_in, segment_file, segment_files
from sglang_hcache.storage.segment import SegmentWriter
from sglang_hcache.storage.segments import Segments

AT_ONCE = 256  # segments that are open; the index is read again for the next ones if it has changed

logger = logging.getLogger(__name__)


def sweep(path: Path, index: Index, segments: Segments | None = None, *, unlisted: bool = False) -> int:
    """Sweep the segments of all fingerprints in a directory; how many bytes that gains.

    `segments`: those that the caller writes. `unlisted`: delete the segments of fingerprints that the index does not
    list, too. What another process writes is left alone. Raises OSError, lmdb.Error.
    """
    gained, listed = 0, index.marks()
    for folder in folders_in(path / "segments"):
        fingerprint = fingerprint_of(folder)
        if fingerprint is None or not (unlisted or fingerprint in listed):
            continue
        try:
            with census(folder):
                gained += sweep_folder(folder, index, segments if segments and segments.path == folder else None)
        except TimeoutError:
            logger.debug("%s is being opened by another process", folder)
    return gained


def size_described(folder: Path) -> Size | None:
    """The page size of a fingerprint, where the index does not know it: after damage it may list some pages only."""
    layout = read_about(folder).layout
    return None if layout is None else Size(layout.record_bytes, layout.page_tokens)


def sweep_folder(folder: Path, index: Index, segments: Segments | None = None, former: Used | None = None) -> int:
    """`sweep` for one fingerprint, under `census`.

    The records of `segments` are kept to be written again, as far as they can be taken and have not lost their space.
    `former`: what the index named before, which is not read again where nothing has changed since.
    """
    fingerprint = bytes.fromhex(folder.name)
    size = index.marks().get(fingerprint)
    if size is None and index.used(fingerprint).pages:
        size = size_described(folder)
    record_bytes = 1 if size is None else size.record_bytes
    used = Used({}) if size is None else index.used(fingerprint, former)
    names = _wasteful(folder, used, record_bytes, held=segments.held() if segments else set())
    before = segments.free_records() if segments else 0
    gained = 0
    for start in range(0, len(names), AT_ONCE):
        with _locked(folder, names[start : start + AT_ONCE], record_bytes, segments) as writers:
            used = used if size is None else index.used(fingerprint, used)
            while writers:
                writer = writers.popleft()
                if segments is None or not used.count(writer.name) or not segments.take(writer):
                    gained += _give_back(writer, used.of(writer.name))
    if segments:
        gained += segments.look_up(used) + (segments.free_records() - before) * record_bytes
    return gained


def _wasteful(folder: Path, used: Used, record_bytes: int, held: set[str]) -> list[str]:
    """Segments that nobody names, or that take at least a record too much; those that take most first."""
    waste = {}
    for name, status in segment_files(folder):
        too_much = status.st_blocks * 512 - used.count(name) * record_bytes
        if name not in held and (too_much >= record_bytes or not used.count(name)):
            waste[name] = too_much
    return sorted(waste, key=waste.__getitem__, reverse=True)


@contextmanager
def _locked(
    folder: Path, names: Sequence[str], record_bytes: int, segments: Segments | None
) -> Iterator[deque[SegmentWriter]]:
    """Those of the segments that nobody writes; whoever takes one out closes it."""
    writers = deque[SegmentWriter]()
    try:
        for name in names:
            writer = SegmentWriter.adopt(segment_file(folder, name), record_bytes, segments.io if segments else None)
            if writer is not None:
                writers.append(writer)
        yield writers
    finally:
        for writer in writers:
            writer.close()


def _give_back(writer: SegmentWriter, used: set[int]) -> int:
    """Return the space of all other records to the disk, and close the segment; how many bytes that were."""
    try:
        before = writer.disk_bytes()
        if not used:
            writer.truncate_to(0)  # others may have it open, to read
            writer.path.unlink()
            return before
        if max(used) + 1 < writer.records:
            writer.truncate_to(max(used) + 1)
        writer.punch_all_but(used)
        return before - writer.disk_bytes()
    finally:
        writer.close()
