"""A queued request: what was asked of the store for it, how far that has come, and what it waits for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from sglang_hcache.queueing.load_planner import Prompt

RETRY_S = 0.5  # a lookup that found nothing may be tried again after this, and after half of the time waited


@dataclass(frozen=True)
class Wait:
    """What a held request waits for; planned when it is first looked at."""

    enough: int  # pages
    pass_s: float  # of the engine, from then on, by itself
    beside_s: float  # the same, in a pass with others
    tries: bool  # once it waits no more, the reads still under way are timed, to see how fast drives are


class HeadStartState(Enum):
    """A held request has one at most."""

    NOT_THOUGHT_OF = auto()
    UNDER_WAY = auto()
    NO_MORE = auto()


@dataclass
class Request:
    keys: tuple[bytes, ...]
    prompt: Prompt
    arrived_at: float  # by the clock that is the same for all who share a prefetcher
    asked_at: float  # monotonic
    waits_until: float  # monotonic; reading goes on as long as the request is queued
    others_until: float = math.inf  # monotonic; how long other ranks are waited for, once it is admissible here
    late: bool = False  # its time is up, on the rank that proposes
    saved: threading.Event | None = None  # set once what this rank saves of what it was retracted with is stored
    retracted: bool = False  # and asked for again since
    there: int = 0  # pages, when it was last looked at
    findable: int = field(init=False)  # pages that will be there in the end, as far as was known then
    wait: Wait | None = None
    head_start: HeadStartState = HeadStartState.NOT_THOUGHT_OF
    looked_up: int = 0  # pages, by the last lookup
    found: int = 0  # of these
    planned: int = 0  # of these, to be restored
    planned_before: bool = False  # after a lookup that has found pages: the planner counts a request once
    tries_bus: bool = False
    place: dict[bytes, int] = field(init=False)  # of each key in `keys`

    def __post_init__(self) -> None:
        self.place = {key: i for i, key in enumerate(self.keys)}
        self.findable = len(self.keys)

    def prompt_before(self, keys: Sequence[bytes], page_tokens: int) -> Prompt:
        """With pages `keys`, which end where those asked for end: by now the device has more of them, or fewer."""
        covered = self.prompt.device_tokens + len(self.keys) * page_tokens
        return replace(self.prompt, device_tokens=max(0, covered - len(keys) * page_tokens))

    def worth_asking_again(self, first: bytes) -> bool:
        """Whether to ask again for pages from `first` on, none of which is there: less often the longer it waits.

        Where SGLang sorts requests by their hits, it looks up each one of a long queue in every step.
        """
        waiting_s = time.time() - self.arrived_at
        return first not in self.place or time.monotonic() - self.asked_at > max(RETRY_S, waiting_s / 2)
