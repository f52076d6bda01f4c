"""Where segments lie in a directory: segments/<fingerprint>/<name>.seg, both in lower-case hexadecimal digits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SUFFIX = ".seg"
_NAME = re.compile("[0-9a-f]{16}")
_FINGERPRINT = re.compile("[0-9a-f]{32}")


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
