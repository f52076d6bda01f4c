"""With which other directories a directory was last used: a small JSON file in each, for tools; the store reads none.

{"siblings": [absolute path]}: pages before and after those that are here lie there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from sglang_hcache.storage.files import write_atomically

NAME = "stripe.json"

logger = logging.getLogger(__name__)


class _Stripe(msgspec.Struct):
    siblings: list[str]


def write_siblings(path: Path, siblings: Iterable[Path]) -> None:
    """Write the file where it says something else. What a disk does is only logged: the directory can be used."""
    names = sorted(map(os.path.realpath, siblings))
    if _read(path) == names:
        return
    try:
        write_atomically(path / NAME, msgspec.json.format(msgspec.json.encode(_Stripe(names))))
    except OSError as error:
        note = "hcache: %s cannot be written (%s): `hcache` cannot tell what belongs together"
        logger.info(note, path / NAME, error)


def read_siblings(path: Path) -> list[Path]:
    """What the file says; none where it is missing or damaged."""
    return [Path(name) for name in _read(path)]


def _read(path: Path) -> list[str]:
    try:
        return msgspec.json.decode((path / NAME).read_bytes(), type=_Stripe).siblings
    except (OSError, ValueError):
        return []
