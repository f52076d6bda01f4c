"""Savers: how the pages that SGLang inserts in its radix tree get into the store, by representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_hcache.hostwork import HostWork
from sglang_hcache.lanes import Mark
from sglang_hcache.pages import OpenPages, chunk_rows
from sglang_hcache.projector import gather_kv
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
    """Commits the rows that capture has collected. It is capture's sink, too."""

    def __init__(self, store: ChunkStore, work: HostWork, *, layers: int, row_bytes: int) -> None:
        self._page_tokens = store.layout.page_tokens
        self._pages = OpenPages(store, layers=layers, row_bytes=row_bytes)
        self._store = store
        self._work = work
        self._pages_incomplete = 0

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Mark:
        if self._work.crowded:
            self.drop(slots)
            return self._work.mark()
        host_slots, host_positions, host_rows = map(self._work.to_host, (slots, positions, rows))
        self._work.submit(
            lambda: self._pages.write(host_slots.numpy(), host_positions.numpy(), host_rows.view(torch.uint8).numpy())
        )
        return self._work.mark()

    def drop(self, slots: torch.Tensor) -> None:
        host_slots = self._work.to_host(slots)
        self._work.submit(lambda: self._pages.drop(host_slots.numpy()))

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        first_slots = self._work.to_host(slots[:: self._page_tokens])

        def commit() -> None:
            incomplete = [
                key
                for key, before, slot in zip(keys, [parent, *keys], first_slots.tolist(), strict=False)
                if not self._pages.commit(slot // self._page_tokens, key, before)
            ]
            if incomplete:
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
        }


class KVSaver:
    """Copies K and V out of the device pool."""

    def __init__(
        self,
        store: ChunkStore,
        work: HostWork,
        pool: MHATokenToKVPool,
        *,
        row_bytes: int,
        forward_stream: torch.cuda.Stream | None,
    ) -> None:
        self._store = store
        self._work = work
        self._pool = pool
        self._chunks = chunk_rows(store, layers=pool.layer_num, row_bytes=row_bytes)
        self._forward_stream = forward_stream if torch.cuda.is_available() else None
        self._tokens_captured = 0
        self._tokens_not_captured = 0

    def save(self, keys: Sequence[bytes], parent: bytes, slots: torch.Tensor) -> None:
        page_tokens = self._store.layout.page_tokens
        missing = [i for i, stored in enumerate(self._store.contains(keys)) if not stored]
        pages = [(keys[i], i, chunk) for i in missing if (chunk := self._store.reserve()) is not None]
        self._tokens_captured += len(pages) * page_tokens
        self._tokens_not_captured += (len(missing) - len(pages)) * page_tokens
        if not pages:
            return
        if self._forward_stream is not None:
            torch.cuda.current_stream().wait_stream(self._forward_stream)
        wanted = slots.view(-1, page_tokens)[[index for _, index, _ in pages]].flatten()
        layers = [
            [self._work.to_host(part) for part in gather_kv(self._pool, layer, wanted)]
            for layer in range(self._pool.layer_num)
        ]
        chunks = [chunk for _, _, chunk in pages]

        def put() -> None:
            for layer, (key_rows, value_rows) in enumerate(layers):
                rows = np.concatenate([key_rows.numpy(), value_rows.numpy()], axis=1)
                self._chunks[chunks, layer] = rows.reshape(len(chunks), page_tokens, -1)
            before = [parent, *keys]
            for key, index, chunk in pages:
                self._store.commit(key, chunk, before[index])

        self._work.submit(put)

    def overwrite(self, slots: torch.Tensor) -> None:
        pass

    def clear(self) -> None:
        self._work.drain()

    def stats(self) -> dict[str, int]:
        return {"tokens_captured": self._tokens_captured, "tokens_not_captured": self._tokens_not_captured}
