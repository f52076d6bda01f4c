"""The format of the index's entries, and the check of a whole index.

LMDB maps its file into memory and trusts every byte of it: a damaged or truncated file can crash the process that
reads it, or make it loop. So the check is run as a program, `index_check.py SOURCE TARGET`, by a process that can
afford to lose it. It needs only the standard library, lmdb and xxhash, and nothing of this package. It reads every
entry of SOURCE and writes those that are sound to a fresh index in TARGET; prints how many it dropped.

Exit status: 0 done; 2 SOURCE cannot be read to its end; 3 TARGET cannot be written. Anything else: it crashed.
"""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb
import xxhash

FINGERPRINT_BYTES = 16
UNREADABLE = 2
UNWRITABLE = 3

_ENTRY = struct.Struct("<16sIQ")


class Entry(NamedTuple):
    """Where a page lies: the segment's name, 16 characters, and the record in it."""

    segment: str
    slot: int


def encode(name: bytes, entry: Entry) -> bytes:
    """The value stored under `name` (fingerprint and page key), with a checksum over both."""
    segment = entry.segment.encode("ascii")
    return _ENTRY.pack(segment, entry.slot, _sum(name, segment, entry.slot))


def decode(name: bytes, value: bytes) -> Entry | None:
    """The entry; None where a bit of it or of its name has changed."""
    if len(value) != _ENTRY.size:
        return None
    segment, slot, checksum = _ENTRY.unpack(value)
    return Entry(segment.decode("ascii"), slot) if checksum == _sum(name, segment, slot) else None


def copy_sound(source: Path, target: Path) -> int:
    """Copy the sound entries of an index to a fresh one; how many were not sound.

    Raises Unreadable for the source, lmdb.Error or OSError for the target.
    """
    dropped, last = 0, b""
    size = (source / "data.mdb").stat().st_size
    env = lmdb.open(str(target), map_size=2 * size + (16 << 20), lock=False, mode=0o600)
    with env, env.begin(write=True) as txn:
        for name, value in _entries(source):
            if name <= last:
                raise Unreadable("its entries are out of order")
            last = name
            if decode(name, value) is None:
                dropped += 1
            else:
                txn.put(name, value, append=True)
    return dropped


class Unreadable(Exception):
    """The index cannot be read to its end."""


def _entries(source: Path) -> Iterator[tuple[bytes, bytes]]:
    try:
        with lmdb.open(str(source), readonly=True, lock=False, create=False) as env, env.begin() as txn:
            yield from txn.cursor()
    except lmdb.Error as error:
        raise Unreadable(str(error)) from error


def _sum(name: bytes, segment: bytes, slot: int) -> int:
    return xxhash.xxh3_64_intdigest(b"".join((name, segment, slot.to_bytes(4, "little"))))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        print(copy_sound(Path(sys.argv[1]), Path(sys.argv[2])))
    except Unreadable as error:
        print(error, file=sys.stderr)
        sys.exit(UNREADABLE)
    except (lmdb.Error, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(UNWRITABLE)


if __name__ == "__main__":
    main()
