"""Savers: how the pages that SGLang inserts in its radix tree get into the store, by representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache.hostwork import HostWork
from sglang_hcache.lanes import Mark
from sglang_hcache.pages import OpenPages, chunk_rows
from sglang_hcache.projector import gather_kv
from sglang_hcache.row_code import RowCode
from sglang_hcache.storage.contract import ChunkStore


class Saver(Protocol):
    """Called on the scheduler's thread; may not block on I/O."""

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        """Device slots `[len(keys) × page_tokens]` hold the pages `keys`, which follow `parent`: store them."""

    def overwrite(self, slots: torch.Tensor) -> None:
        """These device slots are about to be filled by a restore."""

    def clear(self) -> None:
        """Forget all that is on its way and not yet in the store."""

    def stats(self) -> dict[str, int]: ...


class NoSaver:
    """Another rank saves the same pages."""

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        pass

    def overwrite(self, slots: torch.Tensor) -> None:
        pass

    def clear(self) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {}


class HiddenSaver:
    """Commits the rows of the first layers that capture has collected, with K and V of the others, if there are any.

    It is capture's sink, too.
    """

    def __init__(
        self,
        store: ChunkStore,
        work: HostWork,
        *,
        layers: int,
        others: KVRows | None = None,
        code: RowCode | None = None,
    ) -> None:
        """code: what has encoded the rows that capture hands over."""
        self._page_tokens = store.layout.page_tokens
        self._pages = OpenPages(store, layers=layers)
        self._store = store
        self._work = work
        self._others = others
        self._code = code
        self._tokens_not_encoded = 0
        self._pages_incomplete = 0

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Mark:
        if self._work.crowded:
            self.drop(slots)
            return self._work.mark()
        host_slots, host_positions, host_rows = map(self._work.to_host, (slots, positions, rows))
        self._work.submit(
            lambda: self._collect(host_slots.numpy(), host_positions.numpy(), host_rows.view(torch.uint8).numpy())
        )
        return self._work.mark()

    def _collect(self, slots: NDArray[np.int64], positions: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        if self._code is not None and not (kept := self._code.encoded(rows)).all():
            self._tokens_not_encoded += int(np.count_nonzero(~kept))
            self._pages.write(slots[kept], positions[kept], rows[:, kept])
            self._pages.drop(slots[~kept])
        else:
            self._pages.write(slots, positions, rows)

    def drop(self, slots: torch.Tensor) -> None:
        host_slots = self._work.to_host(slots)
        self._work.submit(lambda: self._pages.drop(host_slots.numpy()))

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        by_page = slots.view(-1, self._page_tokens)
        first_slots = self._work.to_host(by_page[:, 0])
        new, rows = list(range(len(keys))), None
        if self._others is not None:
            new = [index for index, stored in enumerate(self._store.contains(keys)) if not stored]
            rows = self._others.gather(by_page[new].flatten()) if new else None

        def commit() -> None:
            chunks = [self._pages.take(slot // self._page_tokens) for slot in first_slots.tolist()]
            whole = [(place, chunk) for place, index in enumerate(new) if (chunk := chunks[index]) is not None]
            if self._others is not None and rows is not None and whole:
                self._others.write(rows, *zip(*whole, strict=True))
            for index, chunk in enumerate(chunks):
                if chunk is not None and index in new:
                    self._store.commit(keys[index], chunk, keys[index - 1] if index else parent)
                elif chunk is not None:
                    self._store.abandon(chunk)
            if incomplete := [key for key, chunk in zip(keys, chunks, strict=True) if chunk is None]:
                self._pages_incomplete += self._store.contains(incomplete).count(False)

        self._work.submit(commit)

    def overwrite(self, slots: torch.Tensor) -> None:
        host_slots = self._work.to_host(slots)
        self._work.submit(lambda: self._pages.forget(host_slots.numpy()))

    def clear(self) -> None:
        self._work.submit(self._pages.clear)
        self._work.drain()

    def stats(self) -> dict[str, int]:
        return {
            "tokens_captured": self._pages.tokens_captured,
            "tokens_not_captured": self._pages.tokens_not_captured,
            "pages_incomplete": self._pages_incomplete,
            "pages_open": len(self._pages),
            "tokens_not_encoded": self._tokens_not_encoded,
        }


class KVSaver:
    """Copies K and V of all layers out of the device pool."""

    def __init__(self, store: ChunkStore, work: HostWork, rows: KVRows) -> None:
        self._store = store
        self._work = work
        self._rows = rows
        self._tokens_captured = 0
        self._tokens_not_captured = 0

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        page_tokens = self._store.layout.page_tokens
        missing = [i for i, stored in enumerate(self._store.contains(keys)) if not stored]
        pages = [(i, chunk) for i in missing if (chunk := self._store.reserve()) is not None]
        self._tokens_captured += len(pages) * page_tokens
        self._tokens_not_captured += (len(missing) - len(pages)) * page_tokens
        if not pages:
            return
        indices, chunks = zip(*pages, strict=True)
        rows = self._rows.gather(slots.view(-1, page_tokens)[list(indices)].flatten())
        before = [parent, *keys]

        def put() -> None:
            self._rows.write(rows, range(len(chunks)), chunks)
            for index, chunk in pages:
                self._store.commit(keys[index], chunk, before[index])

        self._work.submit(put)

    def overwrite(self, slots: torch.Tensor) -> None:
        pass

    def clear(self) -> None:
        self._work.drain()

    def stats(self) -> dict[str, int]:
        return {"tokens_captured": self._tokens_captured, "tokens_not_captured": self._tokens_not_captured}


class KVRows:
    """K and V of some layers, on their way from the device pool into slots of the store."""

    def __init__(
        self,
        store: ChunkStore,
        work: HostWork,
        pool: MHATokenToKVPool,
        layers: range,
        forward_stream: torch.cuda.Stream | None,
    ) -> None:
        self._work = work
        self._pool = pool
        self._layers = layers
        self._chunks = chunk_rows(store, layers)
        self._forward_stream = forward_stream if torch.cuda.is_available() else None

    def gather(self, slots: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies K and V of device slots `[n]` to the host; the next job finds them, uint8 `[n, bytes]` each."""
        if self._forward_stream is not None:
            torch.cuda.current_stream().wait_stream(self._forward_stream)
        found = []
        for layer in self._layers:
            keys, values = gather_kv(self._pool, layer, slots)
            found.append((self._work.to_host(keys), self._work.to_host(values)))
        return found

    def write(
        self, rows: Sequence[tuple[torch.Tensor, torch.Tensor]], pages: Sequence[int], chunks: Sequence[int]
    ) -> None:
        """Page `pages[i]` of what was gathered goes to slot `chunks[i]`."""
        page_tokens = self._chunks.shape[2]
        for layer, (keys, values) in enumerate(rows):
            joined = np.concatenate([keys.numpy(), values.numpy()], axis=1)
            self._chunks[list(chunks), layer] = joined.reshape(-1, page_tokens, joined.shape[1])[list(pages)]
