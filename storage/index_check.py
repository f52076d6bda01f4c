"""The format of the index's entries, and the check of a whole index.

LMDB maps its file into memory and trusts every byte of it: a damaged or truncated file can crash the process that
reads it, or make it loop. So the check is run as a program, `index_check.py SOURCE TARGET`, by a process that can
afford to lose it. It needs only the standard library, lmdb and xxhash, and nothing of this package. It reads every
entry of the directory SOURCE and writes those that are sound to a fresh index, the file TARGET; prints how many were
damaged, and the number of SOURCE's last transaction. Entries of an older version are left out and not counted.

Exit status: 0 done; 2 SOURCE cannot be read to its end; 3 TARGET cannot be written. Anything else: it crashed.
"""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import lmdb
import xxhash

FINGERPRINT_BYTES = 16
PARENT_BYTES = 8
UNREADABLE = 2
UNWRITABLE = 3
ENTRY_VERSION = 2

ENTRY = struct.Struct("<16sI8sIIQ")
_OLD_SIZES = (28,)
_READ_AHEAD_BYTES = 4 << 20
_MOST_LAST_USE = (1 << 32) - 1


class Entry(NamedTuple):
    """Where a page lies: the segment's name, 16 characters, and the record in it; and how it is used."""

    segment: str
    slot: int
    parent: bytes = bytes(PARENT_BYTES)  # the start of the parent's key; zeros for the first page of a prefix
    hits: int = 0
    last_use: int = 0  # unix time, seconds

    @property
    def place(self) -> tuple[str, int]:
        return self[:2]


def encode(name: bytes, entry: Entry) -> bytes:
    """The value stored under `name` (fingerprint and page key), with a checksum over both."""
    last_use = min(max(entry.last_use, 0), _MOST_LAST_USE)  # a file's time, or the clock, may be anything
    value = ENTRY.pack(entry.segment.encode("ascii"), entry.slot, entry.parent, entry.hits, last_use, 0)[:-8]
    return value + xxhash.xxh3_64_intdigest(name + value).to_bytes(8, "little")


def decode(name: bytes, value: bytes | None) -> Entry | None:
    """The entry; None where there is none, or a bit of it or of its name has changed."""
    if value is None or len(value) != ENTRY.size:
        return None
    segment, slot, parent, hits, last_use, checksum = ENTRY.unpack(value)
    if checksum != xxhash.xxh3_64_intdigest(name + value[:-8]):
        return None
    return Entry(segment.decode("ascii"), slot, parent, hits, last_use)


def last_transaction(source: Path) -> int:
    """The number of the transaction that LMDB takes for the last one. Raises lmdb.Error."""
    with lmdb.open(str(source), readonly=True, lock=False, create=False) as env:
        return int(env.info()["last_txnid"])


def copy_sound(source: Path, target: Path) -> int:
    """Copy the sound entries of an index to a fresh one; how many were not sound.

    If any was not, no fingerprint is marked as listed in full any more: whoever opens it next looks for lost pages.
    Raises Unreadable for the source, lmdb.Error or OSError for the target.
    """
    dropped, last, marks = 0, b"", list[bytes]()
    size = (source / "data.mdb").stat().st_size
    env = lmdb.open(str(target), subdir=False, map_size=2 * size + (16 << 20), lock=False, mode=0o600)
    with env, env.begin(write=True) as txn:
        for name, value in _entries(source):
            if name <= last:
                raise Unreadable("its entries are out of order")
            last = name
            if decode(name, value) is not None:
                txn.put(name, value, append=True)
                if len(name) == FINGERPRINT_BYTES:
                    marks.append(name)
            elif len(value) not in _OLD_SIZES:
                dropped += 1
        for name in marks if dropped else ():
            txn.delete(name)
    return dropped


class Unreadable(Exception):
    """The index cannot be read to its end."""


def _read_ahead(file: Path) -> None:
    """Bring the file into memory: the walk reads it in the order of keys, for which a slow drive takes too long."""
    with suppress(OSError), file.open("rb", buffering=0) as data:
        while data.read(_READ_AHEAD_BYTES):
            pass


def _entries(source: Path) -> Iterator[tuple[bytes, bytes]]:
    _read_ahead(source / "data.mdb")
    try:
        with lmdb.open(str(source), readonly=True, lock=False, create=False) as env, env.begin() as txn:
            seen = 0
            for item in txn.cursor():
                seen += 1
                yield item
            if seen != txn.stat()["entries"]:
                raise Unreadable("it has lost entries")
    except lmdb.Error as error:
        raise Unreadable(str(error)) from error


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        source, target = map(Path, sys.argv[1:])
        print(copy_sound(source, target), last_transaction(source))
    except Unreadable as error:
        print(error, file=sys.stderr)
        sys.exit(UNREADABLE)
    except (lmdb.Error, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(UNWRITABLE)


if __name__ == "__main__":
    main()
