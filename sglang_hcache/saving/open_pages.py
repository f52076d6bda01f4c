"""Open pages: collects captured rows, by device slot, into complete chunks of the store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_hcache.saving.copy_out import spread
from sglang_hcache.storage.contract import ChunkStore
from sglang_hcache.storage.layout import positions as chunk_positions

_SHARES = 4  # batches of single tokens, for the copying threads; one statement per token would contend for the GIL


def chunk_rows(store: ChunkStore, layers: range) -> NDArray[np.uint8]:
    """A view of layers of equal size in the store's memory, `[slots, layers, page_tokens, row_bytes]`."""
    layout = store.layout
    first, row_bytes = layout.layer_offset(layers[0]), layout.layer_bytes[layers[0]] // layout.page_tokens
    stride = layout.layer_offset(layers[1]) - first if len(layers) > 1 else layout.record_bytes
    return np.lib.stride_tricks.as_strided(
        store.memory[:, first:],
        shape=(store.memory.shape[0], len(layers), layout.page_tokens, row_bytes),
        strides=(store.memory.strides[0], stride, row_bytes, 1),
    )


@dataclass
class _OpenPage:
    slot: int  # in the store's memory
    filled: int  # leading rows that are there


class OpenPages:
    """Collects rows of the first `layers` layers by device page, in slots of the store, until SGLang names the page.

    A device page is written front to back by one sequence. Row 0 starts the page anew; a row that is written again
    replaces the old one and all after it (rejected drafts). A gap abandons the page, and so does SGLang's naming it
    before it is whole. Only whole pages are handed out; what cannot be kept is left out, never waited for.
    """

    def __init__(self, store: ChunkStore, *, layers: int, copying: Executor | None = None) -> None:
        """copying: threads that share the copying of rows, which one alone does slower than a GPU makes them."""
        layout = store.layout
        self._store = store
        self._page_tokens = layout.page_tokens
        self._open: dict[int, _OpenPage] = {}
        self._rows = chunk_rows(store, range(layers))
        self._copying = copying

    def write(
        self,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        rows: NDArray[np.uint8],
        usable: NDArray[np.bool_] | None = None,
    ) -> int:
        """Copy rows into their pages, and return how many tokens were kept.

        slots, positions `[n]`; rows `[layers, n, row_bytes]`. usable: `[n]`, False for rows that cannot be kept; a
        page continues after such a row only if the row is written again, as a rejected draft's is.
        """
        kept: list[tuple[int, int, int, int]] = []  # slot, offset in it, first token, tokens
        for start, stop, page, offset in self._runs(slots):
            if (open_page := self._open_page_for(page, offset)) is not None:
                count = stop - start
                if usable is not None and not usable[start:stop].all():
                    count = int(usable[start:stop].argmin())
                open_page.filled = offset + count
                kept.append((open_page.slot, offset, start, count))
        into, into_positions = self._rows, chunk_positions(self._store.memory, self._store.layout)
        written = sum(count for *_, count in kept)

        def copy_run(place: tuple[int, int, int, int]) -> None:
            slot, offset, start, count = place
            into[slot, :, offset : offset + count] = rows[:, start : start + count]
            into_positions[slot, offset : offset + count] = positions[start : start + count]

        def copy_tokens(places: NDArray[np.int64]) -> None:
            slot, offset, start, _ = places.T
            into[slot, :, offset] = rows[:, start[0] : start[-1] + 1].swapaxes(0, 1)
            into_positions[slot, offset] = positions[start]

        if written == len(kept) == len(slots) >= _SHARES:  # one of each sequence, as decoding makes them
            spread(self._copying, copy_tokens, np.array_split(np.array(kept), _SHARES))
        else:
            spread(self._copying, copy_run, kept)
        return written

    def forget(self, slots: NDArray[np.int64]) -> None:
        """The device pages of these slots now hold something else."""
        for page in np.unique(slots // self._page_tokens).tolist():
            self._abandon(page)

    def take(self, page: int) -> int | None:
        """Hand the store's slot with a device page's rows to the caller; if the page is not whole, abandon it."""
        open_page = self._open.get(page)
        if open_page is None or open_page.filled < self._page_tokens:
            self._abandon(page)
            return None
        del self._open[page]
        return open_page.slot

    def clear(self) -> None:
        for page in list(self._open):
            self._abandon(page)

    def __len__(self) -> int:
        return len(self._open)

    def _runs(self, slots: NDArray[np.int64]) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, device page, offset in it) of each run of tokens in consecutive slots of one page."""
        pages, offsets = np.divmod(slots, self._page_tokens)
        breaks = np.flatnonzero((np.diff(pages) != 0) | (np.diff(offsets) != 1)) + 1
        starts = np.concatenate([np.zeros(min(1, len(slots)), np.int64), breaks])
        stops = [*breaks.tolist(), len(slots)]
        yield from zip(starts.tolist(), stops, pages[starts].tolist(), offsets[starts].tolist(), strict=False)

    def _open_page_for(self, page: int, offset: int) -> _OpenPage | None:
        open_page = self._open.get(page)
        if offset == 0:
            if open_page is None:
                slot = self._store.reserve()
                if slot is None:
                    return None
                open_page = self._open[page] = _OpenPage(slot, 0)
            return open_page
        if open_page is not None and open_page.filled >= offset:
            return open_page
        self._abandon(page)
        return None

    def _abandon(self, page: int) -> None:
        if open_page := self._open.pop(page, None):
            self._store.abandon(open_page.slot)
