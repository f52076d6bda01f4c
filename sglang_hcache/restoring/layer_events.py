"""When each layer of a batch is restored: what SGLang's pool asks for before it is read."""

from __future__ import annotations

from sglang_hcache.device.streams import Event, Stream


class LayerEvents:
    """SGLang's layer counter: the pool's getters ask it to wait until a layer has been restored.

    `reader`: the stream that reads the pool; it waits for a layer's event, the CPU does not. At the last of `layers`
    it also waits for the layers restored after them: those of a draft model, which runs next and never asks.
    """

    def __init__(self, reader: Stream, layers: int) -> None:
        self._reader = reader
        self._recorded: dict[int, list[Event]] = {}
        self._begins: dict[int, Event] = {}
        self.num_layers = layers  # SGLang reads these two before it replays a graph of a whole prefill
        self.consumer_index = -1
        self._last = -1

    def new_batch(self) -> int:
        self._last += 1
        self._recorded[self._last] = []
        return self._last

    def restored(self, index: int, event: Event) -> None:
        """The next layer of batch `index` is restored at `event`."""
        self._recorded[index].append(event)

    def begin(self, index: int, event: Event) -> None:
        """Batch `index` begins at `event`: from then on, the restoring stream works on this batch."""
        self._begins[index] = event

    def follow(self, index: int, stream: Stream) -> None:
        """The stream goes on only when batch `index` is restored."""
        if recorded := self._recorded.get(index):
            stream.wait(recorded[-1])

    def is_restored(self, index: int) -> bool:
        recorded = self._recorded.get(index)
        return not recorded or recorded[-1].query()

    def synchronize(self, index: int) -> float | None:
        """Wait until batch `index` is restored; seconds it took from its begin, where anything was."""
        begin, recorded = self._begins.pop(index, None), self._recorded.pop(index, [])
        if not recorded:
            return None
        recorded[-1].synchronize()
        return None if begin is None else begin.elapsed_time(recorded[-1]) / 1000

    def drop(self, index: int) -> None:
        """Nobody asks for batch `index`."""
        self._begins.pop(index, None)
        self._recorded.pop(index, None)

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        if recorded := self._recorded.get(self.consumer_index):
            self._reader.wait(recorded[layer if layer < self.num_layers - 1 else -1])
