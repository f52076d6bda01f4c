"""Shared loads: of requests that come together and begin alike, one loads their common pages for all of them.

SGLang gives each request that loads slots of its own, which join the radix tree only when its forward is over. So a
batch is closed before the first request that wants pages which one in it loads; by the next batch, the tree has them.
No request is overtaken or left out twice, and a closed batch is never empty.

All ranks close it at the same request, which follows from SGLang's order of requests and the hits it has intersected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class SharedLoads:
    """One a scheduler process."""

    def __init__(self, least_pages: int, put_off: Callable[[str], None] = lambda rid: None) -> None:
        """least_pages: common leading pages for which a batch is closed, the same on all ranks; 0: it never is.

        put_off: called with the id of a request that is left out, and will be looked up again.
        """
        self._least_pages = least_pages
        self._put_off = put_off
        self._loading = set[str]()  # names of the pages that are loaded by the batch being made
        self._loads: list[tuple[Any, int]] = []  # its requests that load, each with the prompt length covered then
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
        """Whether it has `least_pages` in common with the batch's loads: one name tells, as it covers all before."""
        least = self._least_pages
        return 0 < least <= len(names) and names[least - 1] in self._loading and rid not in self._left_out
