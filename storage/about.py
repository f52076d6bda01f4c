"""What a fingerprint stands for: a small JSON file beside its segments.

It is for people and tools. A store reads only the layout, of fingerprints not its own: to know the size of pages that
it evicts where the index does not say.

{"layout": {"page_tokens": int, "layer_bytes": [int]}, "checksum": xxh3_64 of the rest's JSON, and strings: what the
store's user says of the pages}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import xxhash

from sglang_hcache.storage.files import write_atomically
from sglang_hcache.storage.layout import ChunkLayout

NAME = "about.json"


@dataclass(frozen=True)
class About:
    layout: ChunkLayout | None = None
    texts: dict[str, str] = field(default_factory=dict)
    verified: bool = False  # by its checksum; a file of an earlier version has none


def write_about(folder: Path, layout: ChunkLayout, texts: Mapping[str, str]) -> None:
    """Write the file, unless it is there and verified. Raises OSError."""
    found = read_about(folder)
    if found.verified and found.layout == layout:
        return
    content: dict[str, object] = {key: text for key, text in texts.items() if key != "checksum"}
    content["layout"] = {"page_tokens": layout.page_tokens, "layer_bytes": layout.layer_bytes}
    content["checksum"] = _checksum(content)
    write_atomically(folder / NAME, msgspec.json.format(msgspec.json.encode(content)))


def read_about(folder: Path) -> About:
    """What the file says; nothing where it is missing or damaged."""
    try:
        content = msgspec.json.decode((folder / NAME).read_bytes(), type=dict[str, object])
        checksum = content.pop("checksum", None)
        if checksum not in (None, _checksum(content)):
            return About()
        layout = msgspec.convert(content.pop("layout"), ChunkLayout)
    except (OSError, ValueError, KeyError):
        return About()
    texts = {key: value for key, value in content.items() if isinstance(value, str)}
    return About(layout, texts, verified=checksum is not None)


def _checksum(content: Mapping[str, object]) -> str:
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(content, order="sorted"))
