"""Pages whose whole content follows from their number, so that any process can tell whether a copy is right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_hcache.storage.layout import ROOT, ChunkLayout, positions
from sglang_hcache.storage.store import LocalStore

LAYOUT = ChunkLayout(page_tokens=5, layer_bytes=(1000, 0, 4096))
FINGERPRINT = b"f" * 16
OTHER_FINGERPRINT = b"g" * 16


def key_of(page: int) -> bytes:
    return hashlib.sha256(b"%d" % page).digest()


def keys_of(pages: Iterable[int]) -> list[bytes]:
    return [key_of(page) for page in pages]


def payload_of(page: int, layer: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng([page, layer]).integers(0, 256, LAYOUT.layer_bytes[layer], np.uint8)


def fill(record: npt.NDArray[np.uint8], page: int) -> None:
    positions(record, LAYOUT)[:] = page + np.arange(LAYOUT.page_tokens)
    for layer in range(LAYOUT.n_layers):
        LAYOUT.payload(record, layer)[:] = payload_of(page, layer)


def holds(record: npt.NDArray[np.uint8], page: int) -> bool:
    return bool((positions(record, LAYOUT) == page + np.arange(LAYOUT.page_tokens)).all()) and all(
        np.array_equal(LAYOUT.payload(record, layer), payload_of(page, layer)) for layer in range(LAYOUT.n_layers)
    )


def open_store(*directories: Path, slots: int = 64, **options: Any) -> LocalStore:
    defaults: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "lease_limit": 1.0,
        "segment_bytes": 8 * LAYOUT.record_bytes,
    }
    options = defaults | options
    return LocalStore(LAYOUT, host_bytes=slots * LAYOUT.record_bytes, directories=directories, **options)


def save(store: LocalStore, pages: Iterable[int]) -> None:
    for page in pages:
        slot = store.reserve()
        assert slot is not None
        fill(store.memory[slot], page)
        store.commit(key_of(page), slot, ROOT)


def lease(store: LocalStore, owner: str, keys: Sequence[bytes]) -> list[int]:
    """Slots of the longest leading run that can be had."""
    store.prefetch(owner, keys)
    progress = store.wait(owner, 30)
    assert progress.done
    return list(progress.slots)


def served(store: LocalStore, pages: Iterable[int]) -> list[int]:
    """Which of the pages can be had, each asked for by itself; asserts that they are right."""
    found = []
    for page in pages:
        for slot in lease(store, "served", [key_of(page)]):
            assert holds(store.memory[slot], page), f"a wrong page was served for {page}"
            found.append(page)
    store.release("served")
    return found


def counters(store: LocalStore) -> dict[str, int]:
    return {name: value for name, value in store.stats().items() if isinstance(value, int)}


def states(store: LocalStore) -> list[str]:
    volumes = store.stats()["volumes"]
    assert isinstance(volumes, list)
    return [str(volume["state"]) for volume in volumes]


def segment_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("segments/*/*.seg"))
