"""One client's session, as the prefetcher sees it."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field

from sglang_hcache.prefetch.messages import Hello
from sglang_hcache.prefetch.spaces import Space


@dataclass(eq=False)
class Asked:
    """A prefetch of the session: what its `Ready`s say so far."""

    ticket: int
    announced: int = 0
    done: bool = False


@dataclass(eq=False)
class Session:
    """Everything the client holds, so that it can be given back when the client is gone.

    `broken`: its messages cannot be followed any more. What it holds stays, as a client on this host may still be
    reading it, until it says goodbye or its process ends.
    """

    number: int
    identity: bytes
    hello: Hello
    space: Space
    pidfd: int  # -1 for a client on another host
    heard_at: float
    received: int = 0  # seq of the last message from it
    sent: int = 0
    broken: bool = False
    granted: set[int] = field(default_factory=set)
    asked: dict[str, Asked] = field(default_factory=dict)
    outbox: deque[list[bytes]] = field(default_factory=deque)  # what its socket could not take yet

    @property
    def name(self) -> str:
        return f"{self.hello.name} (session {self.number})"

    def store_owner(self, owner: str) -> str:
        """The owner's name in the store, which knows nothing of sessions."""
        return f"{self.number} {owner}"

    def end(self) -> None:
        """Give back all it holds."""
        for owner in self.asked:
            self.space.store.release(self.store_owner(owner))
        for slot in self.granted:
            self.space.store.abandon(slot)
        self.space.sessions.discard(self.number)
        if self.pidfd >= 0:
            os.close(self.pidfd)


def split_owner(store_owner: str) -> tuple[int, str]:
    """Inverse of `Session.store_owner`."""
    number, _, owner = store_owner.partition(" ")
    return int(number), owner
