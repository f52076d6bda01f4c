"""One client's session, as the prefetcher sees it."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq

from sglang_hcache.prefetch.listeners import Frames, Peer, Put
from sglang_hcache.prefetch.messages import Bye, FromClient, Hello, Prefetch
from sglang_hcache.prefetch.payload import Parting
from sglang_hcache.prefetch.spaces import Space

# Kept for a client whose queue is full, before it is given up.
OUTBOX = 10_000  # messages
OUTBOX_BYTES = 32 << 20


class Refusal(Exception):
    """A message that is counted, answered and otherwise ignored."""

    def __init__(self, reason: str, text: str, *, fatal: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.fatal = fatal


@dataclass(eq=False)
class Asked:
    """A prefetch of the session: what its `Ready`s say so far."""

    store_owner: str  # its name in the store, which knows nothing of sessions
    keys: Sequence[bytes] = ()  # without repetitions; between hosts only
    announced: int = 0
    known: bool = False  # by the client: what of it is in memory
    done: bool = False
    sending: list[zmq.MessageTracker] = field(default_factory=list)  # records on their way to another host


@dataclass(eq=False)
class Session:
    """Everything the client holds, so that it can be given back when the client is gone.

    `broken`: its messages cannot be followed any more. What it holds stays, as a client on this host may still be
    reading it, until it says goodbye or its process ends.
    """

    number: int
    peer: Peer
    hello: Hello
    space: Space
    pidfd: int  # -1 for a client on another host
    heard_at: float  # monotonic
    sent_at: float  # it was last sent something; monotonic
    ended_at: float = math.inf  # its process; monotonic
    received: int = 0  # seq of the last message from it
    credit: int = 0  # pages that a client on another host can take
    broken: bool = False
    granted: set[int] = field(default_factory=set)  # ready for new pages, or being filled
    wanted: int = 0  # slots it has asked for and not got yet
    flushes: deque[tuple[int, float]] = field(default_factory=deque)  # `seq` of each that waits, and how long it may
    asked: dict[int, Asked] = field(default_factory=dict)  # by `seq` of the message
    outbox: deque[Frames] = field(default_factory=deque)  # what its socket could not take yet
    outbox_bytes: int = 0  # without payload, which lies in the arena

    @property
    def name(self) -> str:
        return f"{self.hello.name} (session {self.number})"

    @property
    def has_ended(self) -> bool:
        return self.ended_at < math.inf

    @property
    def remote(self) -> bool:
        return self.peer.listener.remote

    @property
    def saves(self) -> bool:
        """Whether it fills slots, and has a share in those that are for that."""
        return self.hello.grant > 0 and not self.remote

    def keep(self, frames: Frames) -> bool:
        """Keep a message for later; False where that is too much."""
        if len(self.outbox) >= OUTBOX or self.outbox_bytes + len(frames[0]) > OUTBOX_BYTES:
            return False
        self.outbox.append(frames)
        self.outbox_bytes += len(frames[0])
        return True

    def send_kept(self) -> None:
        while self.outbox and self.peer.put(self.outbox[0]) is not Put.FULL:
            self.outbox_bytes -= len(self.outbox.popleft()[0])

    def in_order(self, message: FromClient) -> None:
        """Raises Refusal where it is not the next message."""
        if message.seq <= self.received:
            raise Refusal("replayed", f"message {message.seq} came twice")
        if message.seq != self.received + 1 and not isinstance(message, Bye):
            text = f"message {message.seq} came after message {self.received}"
            raise Refusal("out_of_order", text, fatal=True)
        self.received = message.seq

    def take_back(self, slot: int) -> None:
        """A granted slot comes back. Raises Refusal."""
        if slot not in self.granted:
            raise Refusal("not_granted", f"slot {slot} was not granted to this client", fatal=True)
        self.granted.remove(slot)

    def ask(self, message: Prefetch) -> Asked:
        """Note a prefetch."""
        keys = list(dict.fromkeys(message.keys)) if self.remote else ()
        asked = self.asked[message.seq] = Asked(f"{self.number} {message.seq}", keys)
        return asked

    def release(self, prefetch: int) -> Parting | None:
        """End a prefetch. Returns the lease to give back later, if its records are still being sent."""
        asked = self.asked.pop(prefetch, None)
        if asked is None:
            return None
        parting = Parting(self.space.store, asked.store_owner, asked.sending)
        return None if parting.end() else parting

    def end(self) -> list[Parting]:
        """Give back all that the session holds; returns the leases whose records are still being sent."""
        self.outbox.clear()
        self.outbox_bytes = 0
        partings = [parting for prefetch in list(self.asked) if (parting := self.release(prefetch))]
        for slot in self.granted:
            self.space.store.abandon(slot)
        self.space.sessions.discard(self.number)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        return partings


def split_owner(store_owner: str) -> tuple[int, int]:
    """Numbers of the session and the prefetch of an `Asked.store_owner`."""
    session, prefetch = map(int, store_owner.split())
    return session, prefetch
