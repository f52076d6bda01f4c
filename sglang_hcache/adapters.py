"""LoRA adapters, identified by content: SGLang makes an adapter's id from its name and path, or at random.

SGLang appends the id to the keys of pages. With a digest of the content in its place, an adapter's pages are found
again after a restart or a reload, under any name; pages of an adapter that was retrained in the same place are not.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sglang_hcache.ranks import if_all_alike, of_first_rank, of_nodes_first_rank, shares_requests
from sglang_hcache.startup.fingerprint import adapter_identity

logger = logging.getLogger(__name__)


class Adapters:
    """The adapters of one scheduler process. Ranks with the same requests call each method in the same step."""

    def __init__(self, memo: Path, cache: str | None) -> None:
        """memo: as for `adapter_identity`. cache: where SGLang keeps what it has loaded from a hub."""
        self._memo = memo
        self._cache = cache
        self._contents: dict[str, str] = {}  # by SGLang's id

    def loaded_at_start(self, adapters: Iterable[Any]) -> None:
        """Adapters given at start: one that cannot be identified gets an identity that is never used again."""
        for adapter in adapters:
            never_again = of_first_rank(uuid.uuid4().hex)  # of all ranks, whichever of them can identify it
            self._contents[adapter.lora_id] = self._content(adapter.lora_path) or never_again

    def load(self, load: Callable[[], Any], request: Any) -> Any:
        """Run SGLang's `load` of an adapter while it serves; if its content is unknown, SGLang's random id stays."""
        before = self._content(request.lora_path)  # None if `load` has to download it first
        result = load()
        after = self._content(request.lora_path)
        if after is not None and before in (None, after):  # else its files changed while they were loaded
            self._contents[request.lora_id] = after
        return result

    def name_by_content(self, req: Any) -> None:
        """A request that SGLang has just made."""
        if (content := self._contents.get(req.lora_id)) is not None:
            req.extra_key = req.extra_key.removesuffix(req.lora_id) + content

    def _content(self, path: str) -> str | None:
        """The same on all ranks with the same requests; None where it is unknown, or not the same on all nodes."""
        if not shares_requests():
            return self._on_disk(path)
        return if_all_alike(of_nodes_first_rank(lambda: self._on_disk(path)))

    def _on_disk(self, path: str) -> str | None:
        try:
            return adapter_identity(path, self._memo, cache=self._cache)
        except OSError as error:
            logger.info("hcache: the adapter %s cannot be identified (%s)", path, error)
            return None
