"""Slots for new pages, shared out among the sessions that fill any."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_hcache.prefetch.messages import MAX_KEYS
from sglang_hcache.prefetch.session import Session
from sglang_hcache.prefetch.spaces import Space
from sglang_hcache.storage.layout import erase_header

MOST = 0.25  # of an arena's slots, for pages that are being filled


def share_of(space: Space, savers: Sequence[Session]) -> int:
    """Slots that each of the sessions which fill any may have."""
    return max(1, _most(space) // len(savers))


def grant(session: Session, savers: Sequence[Session], *, heard_since: float) -> list[int]:
    """Reserve slots that the session wants and may have now; they are its own from now on.

    savers: all sessions that fill slots of the same space. heard_since: a session last heard of before this time
    (monotonic) has stopped and gives nothing back, so what it holds beyond its share does not count against others.
    """
    if not session.wanted or session.remote or session.broken:
        return []
    store, share, left = session.space.store, share_of(session.space, savers), _most(session.space)
    for other in savers:
        stopped = other.broken or other.heard_at < heard_since
        left -= min(len(other.granted), share) if stopped else len(other.granted)
    wanted, slots = min(session.wanted, left, share - len(session.granted), MAX_KEYS), list[int]()
    while len(slots) < wanted and store.available and (slot := store.reserve()) is not None:
        erase_header(store.memory[slot])  # no header of a former page may look like this one's
        slots.append(slot)
    session.granted.update(slots)
    session.wanted -= len(slots)
    return slots


def _most(space: Space) -> int:
    return int(space.store.memory.shape[0] * MOST)
