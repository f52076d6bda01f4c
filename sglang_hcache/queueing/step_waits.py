"""How long a scheduler's step may wait for a store's answers: requests that run must not wait for those that come."""

from __future__ import annotations

import time

from sglang_hcache.storage.contract import ChunkStore

STEP_WAIT_S = 0.02  # all waits of a step together: requests that run are not kept waiting by many that come at once
NO_WAIT_S = 0.02  # after a wait in vain


class StepWaits:
    def __init__(self) -> None:
        self._next_at = 0.0  # monotonic
        self._left_s = STEP_WAIT_S  # in this step

    def new_step(self) -> None:
        self._left_s = STEP_WAIT_S

    def there_within(self, store: ChunkStore, owner: str, timeout_s: float, *, until_known: bool = False) -> bool:
        """Whether all that the owner asked for is there, or known not to come.

        until_known: what must be read is not waited for.
        """
        began = time.monotonic()
        timeout_s = min(timeout_s, self._left_s)
        if timeout_s <= 0 or began < self._next_at:
            return store.progress(owner).done
        progress = store.wait(owner, timeout_s, until_known=until_known)
        now = time.monotonic()
        self._left_s -= now - began
        if not progress.ends_wait(until_known=until_known):
            self._next_at = now + NO_WAIT_S
        return progress.done
