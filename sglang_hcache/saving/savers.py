"""Savers put the pages that SGLang inserts in its radix tree into the store: captured rows, and K and V."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sglang_hcache import windows
from sglang_hcache.codec import Codec
from sglang_hcache.device.streams import Event, Stream
from sglang_hcache.model import OnePool
from sglang_hcache.restoring.projector import PoolReader
from sglang_hcache.saving.copy_out import CopyOut, spread
from sglang_hcache.saving.open_pages import OpenPages, chunk_rows
from sglang_hcache.storage.contract import ChunkStore
from sglang_hcache.storage.layout import positions as chunk_positions

logger = logging.getLogger(__name__)

_GATHERED_BYTES = 256 << 20  # most K and V in one `gather`; several may be on the device, on their way to the host


class Saver(Protocol):
    """Called on the scheduler's thread; may not block on I/O."""

    def save(
        self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, window_slots: torch.Tensor | None = None
    ) -> None:
        """Device slots `[len(keys) × page_tokens]` hold the pages `keys`, which follow `parent`: store them.

        window_slots: of the last of these pages, where windowed layers have slots of their own.
        """

    def saved(self) -> threading.Event:
        """Set once all that has been saved before is in the store."""

    def discard(self, slots: torch.Tensor) -> None:
        """Do not store what was captured of these device slots, because a restore fills them, for example."""

    def clear(self) -> None:
        """Discard everything that is not yet in the store."""

    def stats(self) -> dict[str, int]: ...


class RestoredKeys:
    """Keys of pages that came from the store; SGLang offers these for saving all the same, at the head of a node.

    most: how many keys are remembered; beyond that the oldest are forgotten.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: dict[bytes, None] = {}  # the oldest first

    def add(self, keys: Iterable[bytes]) -> None:
        self._keys |= dict.fromkeys(keys)
        for key in list(itertools.islice(self._keys, max(0, len(self._keys) - self._most))):
            del self._keys[key]

    def take_leading(self, keys: Sequence[bytes]) -> int:
        """How many of the keys, from the first on, are known; they are forgotten."""
        leading = list(itertools.takewhile(self._keys.__contains__, keys))
        for key in leading:
            del self._keys[key]
        return len(leading)

    def clear(self) -> None:
        self._keys.clear()


class NoSaver:
    """Stores nothing: another rank saves the same pages, or there is no store."""

    def save(
        self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, window_slots: torch.Tensor | None = None
    ) -> None:
        pass

    def saved(self) -> threading.Event:
        saved = threading.Event()
        saved.set()
        return saved

    def discard(self, slots: torch.Tensor) -> None:
        pass

    def clear(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}


class PageSaver:
    """Commits whole pages: rows of the first layers as capture has collected them, K and V of the others.

    It is capture's sink, too.
    """

    def __init__(
        self,
        store: ChunkStore,
        copy_out: CopyOut,
        *,
        captured: int = 0,
        kv: Sequence[KVRows] = (),
        windowed: KVRows | None = None,
        codec: Codec | None = None,
    ) -> None:
        """captured: number of first layers whose rows are captured. kv: the other layers. windowed: windowed layers
        with slots of their own, which `kv` then excludes. codec: the one that has encoded the captured rows.
        """
        self._store = store
        self._copy_out = copy_out
        self._page_tokens = store.layout.page_tokens
        self._open = OpenPages(store, layers=captured, copying=copy_out.copying) if captured else None
        self._kv = kv
        self._windowed = windowed
        self._positions = chunk_positions(store.memory, store.layout)
        self._codec = codec
        self._counts = dict.fromkeys(
            ("tokens_captured", "tokens_not_captured", "tokens_not_encoded", "pages_saved", "pages_incomplete"), 0
        )

    # ---- capture's sink ----

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        host_rows = self._copy_out.rows_to_host(rows)
        if host_rows is None:
            self.drop(slots)
            return self._copy_out.record()
        host_slots, host_positions = map(self._copy_out.to_host, (slots, positions))
        self._copy_out.submit(
            lambda: self._collect(host_slots.numpy(), host_positions.numpy(), host_rows.view(torch.uint8).numpy())
        )
        return self._copy_out.record()

    def drop(self, slots: torch.Tensor) -> None:
        host_slots = self._copy_out.to_host(slots)
        self._copy_out.submit(lambda: self._drop(host_slots.numpy()))

    def _collect(self, slots: NDArray[np.int64], positions: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        assert self._open is not None
        decodable = self._codec.decodable(rows) if self._codec is not None else None
        if decodable is not None:
            self._counts["tokens_not_encoded"] += int(np.count_nonzero(~decodable))
        written = self._open.write(slots, positions, rows, decodable)
        self._counts["tokens_captured"] += written
        self._counts["tokens_not_captured"] += len(slots) - written

    def _drop(self, slots: NDArray[np.int64]) -> None:
        assert self._open is not None
        self._counts["tokens_not_captured"] += len(slots)
        self._open.forget(slots)

    # ---- pages that SGLang names ----

    def save(
        self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, window_slots: torch.Tensor | None = None
    ) -> None:
        every = (*self._kv, self._windowed) if self._windowed is not None else self._kv
        together, tokens = min((kv.pages_together for kv in every), default=len(keys)), self._page_tokens
        window_slots = slots[:0] if window_slots is None else window_slots
        before_window = len(keys) - len(window_slots) // tokens
        for first in range(0, len(keys), together):
            last = min(first + together, len(keys))
            of_window = slice(max(0, first - before_window) * tokens, max(0, last - before_window) * tokens)
            self._save_together(
                keys[first:last],
                keys[first - 1] if first else parent,
                slots[first * tokens : last * tokens],
                window_slots[of_window],
            )

    def _save_together(
        self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor, window_slots: torch.Tensor
    ) -> None:
        first_slots = self._copy_out.to_host(slots.view(-1, self._page_tokens)[:, 0].contiguous())
        gathered = self._gather(slots, window_slots)
        self._copy_out.submit(lambda: self._commit(keys, parent, first_slots.tolist(), gathered))

    def _gather(self, slots: torch.Tensor, window_slots: torch.Tensor) -> list[tuple[KVRows, torch.Tensor]] | None:
        """What of K and V the host will have; None where there is no room for all of it."""
        wanted = [(kv, slots) for kv in self._kv]
        if self._windowed is not None and len(window_slots):
            wanted.append((self._windowed, window_slots))
        found = []
        for kv, where in wanted:
            try:
                rows = kv.gather(where)
            except torch.OutOfMemoryError:  # beside SGLang's pools there may be little left
                pages = len(slots) // self._page_tokens
                logger.warning("hcache: no device memory to save %d pages by; they are not stored", pages)
                return None
            if rows is None:
                return None
            found.append((kv, rows))
        return found

    def _commit(
        self,
        keys: Sequence[bytes],
        parent: bytes,
        first_slots: list[int],
        gathered: Sequence[tuple[KVRows, torch.Tensor]] | None,
    ) -> None:
        store_slots = [self._store_slot_of(slot // self._page_tokens) for slot in first_slots]
        if gathered is None:
            for store_slot in store_slots:
                if store_slot is not None:
                    self._store.abandon(store_slot)
            store_slots = [None] * len(keys)
        whole = [(index, store_slot) for index, store_slot in enumerate(store_slots) if store_slot is not None]
        windowed_from = len(keys)
        for kv, rows in gathered or ():
            missing = len(keys) - rows.shape[1] // self._page_tokens  # the first ones, of windowed layers
            kv.write(rows, [(index - missing, store_slot) for index, store_slot in whole if index >= missing])
            if kv is self._windowed:
                windowed_from = missing
        before = [parent, *keys]
        for index, store_slot in whole:
            if self._windowed is not None:
                windows.note(self._positions, store_slot, windowed=index >= windowed_from)
            self._store.commit(keys[index], store_slot, before[index])
        self._counts["pages_saved"] += len(whole)
        self._counts["pages_incomplete"] += len(keys) - len(whole)

    def _store_slot_of(self, device_page: int) -> int | None:
        return self._store.reserve() if self._open is None else self._open.take(device_page)

    def saved(self) -> threading.Event:
        saved = threading.Event()
        self._copy_out.submit(saved.set)
        return saved

    def discard(self, slots: torch.Tensor) -> None:
        if (pages := self._open) is not None:
            host_slots = self._copy_out.to_host(slots)
            self._copy_out.submit(lambda: pages.forget(host_slots.numpy()))

    def clear(self) -> None:
        if self._open is not None:
            self._copy_out.submit(self._open.clear)
        self._copy_out.drain()

    def stats(self) -> dict[str, int]:
        return dict(self._counts)


class KVRows:
    """K and V of some layers, on their way from a device pool into slots of the store."""

    def __init__(
        self,
        store: ChunkStore,
        copy_out: CopyOut,
        pool: OnePool,
        places: range,
        *,
        gathering: Stream,
        current: Stream,
        forward: Stream,
        before: int = 0,
    ) -> None:
        """places: indices of the layers in the pool. before: number of layers that precede the pool's in a record.

        gathering: a stream of our own. current: the stream that `gather` is called on. forward: the one that writes
        the pool.
        """
        self._copy_out = copy_out
        self._pool = PoolReader(pool, places)
        self._rows = chunk_rows(store, range(before + places.start, before + places.stop))
        self._gathering, self._current, self._forward = gathering, current, forward
        self.pages_together = max(1, _GATHERED_BYTES // self._rows[0].nbytes)  # at most, in a `gather`

    def gather(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Copies K and V of device slots `[n]` to the host; the next job finds them, uint8 `[layers, n, bytes]`.

        Returns None if the host has no room. The read waits for the forward under way, and the next forward waits for
        the read, as it may write these slots. The current stream waits for neither, as SGLang may wait for it.
        """
        for made_on in (self._current, self._forward):
            self._gathering.wait(made_on.record())
        _, layers, _, row_bytes = self._rows.shape
        with self._gathering.active():
            found = torch.empty((layers, len(slots), row_bytes), dtype=torch.uint8, device=slots.device)
            self._pool.read(slots, found)
        self._gathering.keep(slots)
        gathered = self._gathering.record()
        self._forward.wait(gathered)
        return self._copy_out.rows_to_host(found, gathered)

    def write(self, rows: torch.Tensor, targets: Sequence[tuple[int, int]]) -> None:
        """Copies gathered pages into the store. Each target is a page's place in `rows` and its slot there."""
        by_page = rows.numpy().reshape(len(rows), -1, *self._rows.shape[2:])

        def copy(target: tuple[int, int]) -> None:
            page, store_slot = target
            self._rows[store_slot] = by_page[:, page]

        spread(self._copy_out.copying, copy, targets)
