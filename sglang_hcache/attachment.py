"""What a scheduler attaches to a store: pinning of its memory, a saver and a restorer."""

from __future__ import annotations

import logging
import time

import torch

from sglang_hcache.device.capture_mode import beside_captures
from sglang_hcache.device.pinning import PinnedMemory
from sglang_hcache.device.streams import current_stream, new_stream
from sglang_hcache.prefetch.client import PrefetchClient
from sglang_hcache.prefetch.remote import RemoteClient
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import Restorer, restorer_for
from sglang_hcache.saving.capture import Capture
from sglang_hcache.saving.copy_out import CopyOut, InlineCopyOut, StreamCopyOut
from sglang_hcache.saving.savers import KVRows, NoSaver, PageSaver, Saver
from sglang_hcache.startup.representation import Stored
from sglang_hcache.storage.layout import positions

Client = PrefetchClient | RemoteClient

logger = logging.getLogger(__name__)


class Attachment:
    """Attaches to one store at a time. Any thread may call `opened` and `closing`; the rest is for the scheduler's.

    capture: where a saver's hidden states come from, if any. rows_of_a_forward: the most rows that a forward writes.
    copy_engine: whether the GPU's copy engine may copy pages. overlaps: whether forwards run on `forward_stream`;
    otherwise they run on the scheduler's stream.
    """

    def __init__(
        self,
        stored: Stored,
        device: str,
        events: LayerEvents,
        forward_stream: torch.cuda.Stream | None,
        *,
        capture: Capture | None,
        rows_of_a_forward: int,
        copy_engine: bool,
        overlaps: bool,
    ) -> None:
        self._stored = stored
        self._events = events
        self._forward_stream = forward_stream
        self._capture = capture
        self._rows_of_a_forward = rows_of_a_forward
        self._copy_engine = copy_engine
        self._overlaps = overlaps
        self._device = device
        # Of an urgency that SGLang has no streams of: torch gives out each stream many times over.
        self._gathering = new_stream(self._device, urgency=3)
        self._copy_out = _copy_out_of(self._device)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1
        self._pinned: dict[Client, PinnedMemory] = {}
        self._staging: torch.Tensor | None = None  # kept for the next store: by then the device may be full

    def opened(self, store: Client) -> None:
        """Pin the store's memory, a second per ten gigabytes: not on the scheduler's thread once it serves."""
        began = time.monotonic()
        if torch.cuda.is_available():
            logger.info(
                "hcache: waiting for %.1f GB of host memory to be allocated and pinned", store.memory.nbytes / 1e9
            )
            if isinstance(store, PrefetchClient):
                store.wait_until_memory_taken()  # else pinning would allocate the memory page by page
            torch.cuda.set_device(self._gpu)  # a new thread starts with device 0, whatever this rank's is
        with beside_captures():
            self._pinned[store] = PinnedMemory(torch.from_numpy(store.memory))
        if torch.cuda.is_available():
            logger.info("hcache: host memory is ready after %.1f s", time.monotonic() - began)

    def closing(self, store: Client) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(self._gpu)
        if memory := self._pinned.pop(store, None):
            with beside_captures():
                memory.release()

    def attach(self, store: Client, *, saves: bool) -> tuple[Saver, Restorer]:
        """To a store that has been opened. saves: False where another rank saves the same pages."""
        return self._make_saver(store) if saves else self._make_no_saver(), self._make_restorer(store)

    def detach(self) -> NoSaver:
        """Nothing that is captured from now on goes anywhere."""
        if self._capture is not None:
            self._capture.sink = None
        return NoSaver()

    def drain(self) -> None:
        """Return once all that was to be saved has left the device."""
        self._copy_out.drain()

    def close(self) -> None:
        self._copy_out.close()

    def _make_restorer(self, store: Client) -> Restorer:
        layout, stored = store.layout, self._stored
        layers = {
            number: StoredLayer(
                layout.layer_offset(place),
                layout.layer_bytes[place],
                stored.of(number).dtype,
                stored.of(number).projector,
                windowed=number in stored.windowed,
            )
            for place, number in enumerate(stored.order)
        }
        restorer = restorer_for(
            HostPages(
                torch.from_numpy(store.memory),
                positions(store.memory, layout),
                [layers[number] for number in range(len(layers))],
            ),
            self._device,
            self._forward_stream,
            self._events,
            pinned=self._pinned[store].pinned,
            copy_engine=self._copy_engine,
            buffer=self._staging,
        )
        self._staging = restorer.buffer
        return restorer

    def _make_no_saver(self) -> NoSaver:
        if self._capture is not None:
            self._capture.keep(0, self._stored.of(0).codec)
        return NoSaver()

    def _make_saver(self, store: Client) -> PageSaver:
        stored, capture = self._stored, self._capture
        hidden, codec = stored.layout.hidden, stored.of(0).codec
        kv, windowed = self._kv_rows(store)
        saver = PageSaver(store, self._copy_out, captured=hidden, kv=kv, windowed=windowed, codec=codec)
        kv_row_bytes = sum(stored.of(number).row_bytes for number in stored.order if number >= hidden)
        forward_bytes = kv_row_bytes * self._rows_of_a_forward
        if capture is not None:
            capture.keep(hidden, codec)
            if hidden:
                forward_bytes += capture.forward_bytes
                capture.sink = saver
        self._copy_out.expect(forward_bytes)
        return saver

    def _kv_rows(self, store: Client) -> tuple[list[KVRows], KVRows | None]:
        """A `KVRows` for each pool with layers stored as K and V; that of windowed layers is returned apart."""
        current = current_stream(self._device)
        forward = current_stream(self._device, self._forward_stream) if self._overlaps else current
        found, windowed, before = list[KVRows](), None, 0
        for group in self._stored.formats.groups:
            places = [place for place, number in enumerate(group.numbers) if number >= self._stored.layout.hidden]
            if places:
                rows = KVRows(
                    store,
                    self._copy_out,
                    group.pool,
                    range(places[0], places[-1] + 1),
                    gathering=self._gathering,
                    current=current,
                    forward=forward,
                    before=before,
                )
                if group.windowed:
                    windowed = rows
                else:
                    found.append(rows)
            before += len(group.numbers)
        return found, windowed


def _copy_out_of(device: str) -> CopyOut:
    on_cpu = torch.device(device).type == "cpu"
    return InlineCopyOut() if on_cpu else StreamCopyOut(new_stream(device, urgency=3), current_stream(device))
