"""One client's session, as the prefetcher sees it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq

from sglang_hcache.prefetch.door import Frames, Peer, Put
from sglang_hcache.prefetch.messages import Bye, FromClient, Hello
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

    ticket: int
    store_owner: str  # its name in the store, which knows nothing of sessions
    keys: Sequence[bytes] = ()  # without repetitions; between hosts only
    announced: int = 0
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
    heard_at: float
    received: int = 0  # seq of the last message from it
    sent: int = 0
    credit: int = 0  # pages that a client on another host can take
    broken: bool = False
    granted: set[int] = field(default_factory=set)  # ready for new pages, or being filled
    wanted: int = 0  # slots it has asked for and not got yet
    asked: dict[str, Asked] = field(default_factory=dict)
    outbox: deque[Frames] = field(default_factory=deque)  # what its socket could not take yet
    outbox_bytes: int = 0  # without payload, which lies in the arena

    @property
    def name(self) -> str:
        return f"{self.hello.name} (session {self.number})"

    @property
    def remote(self) -> bool:
        return self.peer.door.remote

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

    def ask(self, owner: str, ticket: int, keys: Sequence[bytes]) -> Asked:
        """Note a prefetch. On this host it takes the place of the owner's former one, in the store, too."""
        name = f"{self.number} {ticket if self.remote else 0} {owner}"
        asked = Asked(ticket, name, list(dict.fromkeys(keys)) if self.remote else ())
        self.asked[owner] = asked
        return asked

    def let_go(self, owner: str) -> Parting | None:
        """End a prefetch of the owner's; what is left to do where its records are still being sent."""
        asked = self.asked.pop(owner, None)
        if asked is None:
            return None
        parting = Parting(self.space.store, asked.store_owner, asked.sending)
        return None if parting.end() else parting

    def end(self) -> list[Parting]:
        """Give back all it holds; what must wait until it is sent."""
        self.outbox.clear()
        self.outbox_bytes = 0
        partings = [parting for owner in list(self.asked) if (parting := self.let_go(owner))]
        for slot in self.granted:
            self.space.store.abandon(slot)
        self.space.sessions.discard(self.number)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        return partings


def split_owner(store_owner: str) -> tuple[int, str]:
    """Number of the session, and owner, of an `Asked.store_owner`."""
    number, _, owner = store_owner.split(" ", 2)
    return int(number), owner
