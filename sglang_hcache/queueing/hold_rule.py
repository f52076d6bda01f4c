"""How long a request may be held for its pages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sglang_hcache.config import PREFETCH_TIMEOUT_S

LONGEST_WAIT_S = 60.0  # a disk that hangs must not hang a request


class PrefetchPolicy(StrEnum):
    """How long a request is held while its pages are on the way; the names are SGLang's."""

    BEST_EFFORT = "best_effort"  # only until it is known which pages are in memory; it goes with those
    WAIT_COMPLETE = "wait_complete"  # until those are there that the planner finds worth it, or all without a planner
    TIMEOUT = "timeout"  # the same, but no longer than a limit that grows with their number


@dataclass(frozen=True)
class HoldRule:
    """When a held request is admitted."""

    policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    base_s: float = PREFETCH_TIMEOUT_S[0]
    per_ki_token_s: float = PREFETCH_TIMEOUT_S[1]  # for each 1,024 tokens on the way

    def longest_s(self, tokens: int) -> float:
        """How long a request may be held for the pages of so many tokens."""
        if self.policy is PrefetchPolicy.TIMEOUT:
            return min(self.base_s + self.per_ki_token_s * tokens / 1024, max(self.base_s, LONGEST_WAIT_S))
        return LONGEST_WAIT_S
