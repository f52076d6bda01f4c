"""What the commands share."""

from __future__ import annotations

import argparse
import json
import math
import os
import pwd
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from sglang_hcache.config import default_directory, directories_of
from sglang_hcache.storage.damage import Damage
from sglang_hcache.storage.index import Index
from sglang_hcache.storage.index_file import copy_checked
from sglang_hcache.storage.locks import locked
from sglang_hcache.storage.paths import fingerprint_of, index_folder, lock_file
from sglang_hcache.storage.stripe_manifest import NAME, read_siblings
from sglang_hcache.storage.table import Table

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1000, or of 1024 with an i
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class CommandFailed(Exception):
    """What the user is told in one line."""


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        type=_directories,
        default=[],
        metavar="PATH[,PATH…]",
        help="the server's --hcache-dir (default: the server's, in $XDG_CACHE_HOME or ~/.cache)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def fill_in(arguments: argparse.Namespace) -> None:
    """The default of `--dir`. Raises CommandFailed where the user has no home."""
    if getattr(arguments, "dir", None) == []:
        try:
            arguments.dir = [default_directory()]
        except ValueError as error:
            raise CommandFailed(f"--dir {error}") from None


def _directories(text: str) -> list[Path]:
    try:
        return directories_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def print_json(value: object) -> None:
    """On standard output, as every JSON parser reads it. Raises ValueError for infinity and NaN."""
    print(json.dumps(value, indent=2, allow_nan=False))


def size(text: str) -> int:
    """Bytes, from "100GB", "1.5T", "64MiB", "4096B"; a number alone could mean any of them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)", text.strip().upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give a number and a unit, such as 500GB or 2TiB")
    found = float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2] or ""]
    if math.isinf(found):
        raise argparse.ArgumentTypeError(f"{text!r} is too large")
    return int(found)


def span(text: str) -> int:
    """Seconds, from "30d", "12h"."""
    match = re.fullmatch(r"([0-9]+)([smhd])", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: give a number and s, m, h or d, such as 30d")
    return int(match[1]) * _SPANS[match[2]]


def human(n_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: "1 page", "2 pages"."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Of at least two of a unit: "90 minutes", "2 hours"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return count(int(seconds // length), unit)
    return count(max(0, int(seconds)), "second")


def explain(error: Exception, where: Path | None = None) -> str:
    """What went wrong, and with which file: `where`, unless the error names one."""
    what = str(error)
    if isinstance(error, OSError) and error.strerror:
        where, what = error.filename or where, error.strerror
    return f"{where}: {what}" if where else what


def require(path: Path) -> None:
    if not _is_cache(path):
        why = "it has no segments/" if path.is_dir() else "there is no such directory"
        raise CommandFailed(f"{path} holds no cache ({why}): give the server's --hcache-dir with --dir")


def fingerprint_folders(path: Path) -> list[Path]:
    """Where the segments are, of each fingerprint; other things in `segments/` are left out."""
    return [folder for folder in sorted((path / "segments").iterdir()) if is_fingerprint(folder)]


def is_fingerprint(folder: Path) -> bool:
    return fingerprint_of(folder) is not None and folder.is_dir()


def require_siblings(directories: Sequence[Path]) -> None:
    """All directories that hold pages of the same prefixes are given, as far as they are still there."""
    given = set(map(os.path.realpath, directories))
    for path in directories:
        missing = [sibling for sibling in read_siblings(path) if str(sibling) not in given and _is_cache(sibling)]
        if missing:
            every = ",".join(map(str, [*directories, *missing]))
            raise CommandFailed(
                f"{path} was last used together with {', '.join(map(str, missing))}: give --dir {every}, "
                f"or delete {path / NAME} if they do not belong together any more"
            )


def _is_cache(path: Path) -> bool:
    return os.path.isdir(path / "segments")


def read_table(path: Path, damage: Damage) -> Table:
    """What the index lists now. Changes nothing; works whether a server uses the directory or not.

    An index nobody uses may be damaged, and LMDB is not safe to read then: it is checked into a copy first.
    """
    require(path)
    try:
        with locked(path) as alone, tempfile.TemporaryDirectory(prefix="hcache-") as copy:
            if not alone:
                return _read(index_folder(path))
            data = index_folder(path) / "data.mdb"
            if not data.exists():
                return Table.join([])
            reason = copy_checked(data, Path(copy, "data.mdb"), damage)
            if reason is not None:
                damage.file(data, reason)
                return Table.join([])
            return _read(Path(copy))
    except (OSError, lmdb.Error) as error:
        raise CommandFailed(explain(error, path)) from error


def require_owner(paths: Sequence[Path]) -> None:
    """Raises CommandFailed if another user owns a cache: their server could not open what this user writes."""
    for path in paths:
        if owner := other_owner(path):
            raise CommandFailed(
                f"{path} belongs to {owner}: run this as that user, whose server could not open what "
                f"{_user(os.geteuid())} writes"
            )


def other_owner(path: Path) -> str | None:
    """Whose pages are there, if they are not this user's."""
    try:
        owner = (path / "segments").stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        owner = path.stat().st_uid
    return _user(owner) if owner != os.geteuid() else None


def is_open(path: Path) -> bool:
    """Whether some process has the directory open. Changes nothing."""
    if not lock_file(path).exists():
        return False
    try:
        with locked(path) as nobody:
            return not nobody
    except TimeoutError:
        return True


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else has the directory open."""
    require(path)
    with locked(path) as yes:
        if not yes:
            raise CommandFailed(f"{path} is in use by another process; stop it first")
        yield


def _read(path: Path) -> Table:
    index = Index(path, b"", writable=False)
    try:
        return Table.read(index)
    finally:
        index.close()


class Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._shown = sys.stderr.isatty()

    def step(self) -> None:
        self._done += 1
        if self._shown and (self._done % 64 == 0 or self._done == self._total):
            filled = 40 * self._done // self._total
            end = "\n" if self._done == self._total else ""
            bar = "#" * filled + "." * (40 - filled)
            print(f"\r{self._what} [{bar}] {self._done}/{self._total}", end=end, file=sys.stderr, flush=True)
