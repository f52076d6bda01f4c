"""Records on their way to and from clients on other hosts, as the prefetcher sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zmq

from sglang_hcache.prefetch import messages as m
from sglang_hcache.prefetch.spaces import Space
from sglang_hcache.storage.layout import ChunkDamaged, read_header, seal, verify
from sglang_hcache.storage.store import LocalStore


class BadPayload(ValueError):
    """Frames that are not what their message says; `str` says why."""


@dataclass(eq=False)
class Parting:
    """A lease nobody needs any more, but for ZeroMQ, which still sends from its slots."""

    store: LocalStore
    owner: str
    sending: list[zmq.MessageTracker]

    def end(self) -> bool:
        """Give the lease back if it can be."""
        if not all(tracker.done for tracker in self.sending):
            return False
        self.store.release(self.owner)
        return True


def frames_of(space: Space, keys: Sequence[bytes], slots: Sequence[int]) -> list[zmq.Frame]:
    """A frame a leased page, in the arena's own memory; sealed, so that the other side can verify it.

    A page that has not been written to a file yet is sealed here; the writer seals it again, with the same bytes.
    """
    frames = []
    for key, slot in zip(keys, slots, strict=True):
        record = space.store.memory[slot]
        if not _is_sealed(space, record, key):
            seal(record, space.store.layout, space.fingerprint, key, space.store.parent(slot))
        frames.append(zmq.Frame(record.data, track=True, copy=False))
    return frames


def take_pages(space: Space, commit: m.Commit, frames: Sequence[memoryview], counts: Counter[str]) -> None:
    """Copy the pages of a commit, and verify them, into slots; what finds no slot is left out, and counted.

    Raises BadPayload, before anything is taken, where number or size of the frames is wrong.
    """
    store, pages = space.store, commit.pages
    if len(frames) != len(pages):
        raise BadPayload(f"{len(frames)} records came with {len(pages)} pages")
    buffers = [np.frombuffer(frame, np.uint8) for frame in frames]
    for buffer in buffers:
        if len(buffer) != store.layout.record_bytes:
            raise BadPayload(f"a record has {len(buffer)} bytes instead of {store.layout.record_bytes}")
    if sorted(page.slot for page in pages) != list(range(len(pages))):
        raise BadPayload("pages and records cannot be matched")
    for page in pages:
        slot = store.reserve()
        if slot is None:
            counts["pages_dropped"] += 1
            continue
        record = store.memory[slot]
        record[:] = buffers[page.slot]
        try:
            verify(record, store.layout, space.fingerprint, page.key)
        except ChunkDamaged:
            store.abandon(slot)
            counts["pages_damaged_on_the_way"] += 1
            continue
        store.commit(page.key, slot, page.parent)
        counts["pages_received"] += 1


def _is_sealed(space: Space, record: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], key: bytes) -> bool:
    try:
        header = read_header(record, space.store.layout)
    except ChunkDamaged:
        return False
    return (header.fingerprint, header.key) == (space.fingerprint, key)
