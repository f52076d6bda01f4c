"""Where segments lie in a directory, and how much they take.

segments/<fingerprint>/<name>.seg, both in lower-case hexadecimal digits; the index is in index/.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SUFFIX = ".seg"
_NAME = re.compile("[0-9a-f]{16}")
_FINGERPRINT = re.compile("[0-9a-f]{32}")


def lock_file(path: Path) -> Path:
    return path / "hcache.lock"


def index_folder(path: Path) -> Path:
    return path / "index"


def folder_of(path: Path, fingerprint: bytes) -> Path:
    return path / "segments" / fingerprint.hex()


def fingerprint_of(folder: Path) -> bytes | None:
    """None where the folder cannot be a fingerprint's, by its name."""
    return bytes.fromhex(folder.name) if _FINGERPRINT.fullmatch(folder.name) else None


def is_segment_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def segment_file(folder: Path, name: str) -> Path:
    return folder / f"{name}{_SUFFIX}"


def segment_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Name and status of each segment in a fingerprint's folder; whatever else is there is left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name, suffix = os.path.splitext(entry.name)
            if suffix == _SUFFIX and is_segment_name(name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # a server may delete it meanwhile
                    yield name, entry.stat(follow_symlinks=False)


def bytes_on_disk(path: Path) -> int:
    """What the segments of all fingerprints and the index take of the disk, including what is preallocated."""
    return bytes_below(index_folder(path)) + sum(map(bytes_below, folders_in(path / "segments")))


def folders_in(path: Path) -> list[Path]:
    """The folders in a directory; [] if it does not exist."""
    try:
        return [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def bytes_below(folder: Path) -> int:
    """What the files of a folder take of the disk; nothing where there is none."""
    total = 0
    for entry in os.scandir(folder) if folder.exists() else ():
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total
