"""Of requests that come together and begin alike, one loads what they have in common, for all of them.

SGLang gives each request that loads slots of its own, which join the radix tree once its forward is over. So a
batch is closed before a request that wants what one in it loads; when the next batch is made, that is in the tree.
Nobody is overtaken or left out twice, and a batch that is closed is never empty.

Where it is closed follows from what ranks agree on: SGLang's order of requests, and hits that it has intersected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class SharedLoads:
    """One a scheduler process."""

    def __init__(self, least_pages: int, put_off: Callable[[str], None] = lambda rid: None) -> None:
        """least_pages: in common, for which a batch is closed; the same on all ranks. 0: none is.

        put_off: is told of a request that will be looked up again.
        """
        self._least_pages = least_pages
        self._put_off = put_off
        self._loading = set[str]()  # names of pages that the batch loads which is being made
        self._loads: list[tuple[Any, int]] = []  # its requests that load; where in the prompt that ends
        self._left_out = set[str]()  # requests that have waited for another
        self.requests = 0  # that were left out: one for each batch that was closed

    def publish(self, tree_cache: Any) -> None:
        """A batch is about to be made: put what the last one loads into the tree, as SGLang does with a chunk.

        What uses it runs behind that batch's forward. A load that has failed is barred from the tree.
        """
        for req, end in self._loads:
            if req.kv.holds_kv and req.kv.cache_protected_len < end and not req.skip_radix_cache_insert:
                tree_cache.checkpoint(req, up_to=end + 1)  # drafts' keys are of a token and the next
        self._loads.clear()
        self._loading.clear()

    def least(self, rid: str, names: Sequence[str]) -> int:
        """Pages that a lookup of these should find in any case, as the request will wait for them to be loaded."""
        return self._least_pages if self._waits(rid, names) else 0

    def add(self, add: Callable[[], Any], adder: Any, req: Any) -> Any:
        """SGLang's adding of a request to the batch that is being made, unless that is closed before it."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        linker = adder.tree_cache.linker
        hit = linker.hit_markers.get(req.rid) if self._least_pages and req.host_hit_length else None
        if hit is None:
            return add()
        if self._waits(req.rid, hit.tail_hashes) and not adder.preempt_list:
            del linker.hit_markers[req.rid]
            self._left_out.add(req.rid)
            self._put_off(req.rid)
            self.requests += 1
            return AddReqResult.OTHER
        result = add()
        loaded = linker.private_load_indices.get(req.rid)
        joins_the_tree = req.session is None and not req.skip_radix_cache_insert
        if loaded is not None and joins_the_tree:
            self._loading.update(hit.tail_hashes)
            self._loads.append((req, hit.device_hit_len + len(loaded)))
        return result

    def forget(self, rid: str) -> None:
        """It is in a batch, or not queued any more."""
        self._left_out.discard(rid)

    def _waits(self, rid: str, names: Sequence[str]) -> bool:
        """A page's name stands for all before it, so one tells whether so many are in common."""
        least = self._least_pages
        return 0 < least <= len(names) and names[least - 1] in self._loading and rid not in self._left_out
