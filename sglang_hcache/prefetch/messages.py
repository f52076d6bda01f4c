"""The messages between the prefetcher and its clients.

A message is one ZeroMQ frame: the bytes `HC`, the protocol's version, a zero byte, then a msgpack array whose first
element names the type. Between hosts, `Ready` and `Commit` are followed by one frame of payload a page. A client
counts its messages, per session, in `seq`; a message that is not the next one is refused, and answers name it.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from sglang_hcache.storage import contract
from sglang_hcache.storage.layout import FINGERPRINT_BYTES, KEY_BYTES, ChunkLayout

VERSION = 6
PREFIX = b"HC" + bytes((VERSION, 0))
MAX_MESSAGE_BYTES = 4 << 20  # a control message; a prefix of a million tokens is 0.5 MiB of keys
MAX_KEYS = 1 << 16  # pages in one message

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Keys = Annotated[list[Key], msgspec.Meta(max_length=MAX_KEYS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Slots = Annotated[list[Count], msgspec.Meta(max_length=MAX_KEYS)]


class Message(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """Base of all."""

    session: Count = 0  # given by the prefetcher in `Welcome`; 0 before that
    seq: Count = 0  # of a client's: 1, 2, 3 … within a session


# ---- from a client ----


class Hello(Message):
    """The first message of a session: who is there, and which pages it means."""

    pid: Count  # of a process on this host whose death ends the session; 0 from another host
    name: Annotated[str, msgspec.Meta(max_length=256)]  # for logs
    fingerprint: Annotated[bytes, msgspec.Meta(min_length=FINGERPRINT_BYTES, max_length=FINGERPRINT_BYTES)]
    page_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    layer_bytes: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=4096)]
    host_bytes: Count  # of host memory for these pages, if nobody else uses them
    grant: Count  # slots the client wants to have ready for new pages, and asks for now; 0: it saves none
    on_file: bool = True  # False: pages live in host memory only
    write_policy: str = "write_through"
    about: Annotated[dict[str, str], msgspec.Meta(max_length=32)] = {}
    host_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0  # at most this share of free memory; 0: no bound

    @property
    def layout(self) -> ChunkLayout:
        """Raises ValueError where no record can look like that."""
        return ChunkLayout(self.page_tokens, tuple(self.layer_bytes))


class Lookup(Message):
    """Asks for a `Found`."""

    keys: Keys


class Prefetch(Message):
    """Read the longest leading run of `keys` into memory, and lease it until `Release`; answered by `Ready`s."""

    keys: Keys
    priority: int  # lower is earlier; equal ones in order of arrival; from another host: by arrival instead
    page_priority: int  # added to it for each page that has to be read


class Cancel(Message):
    """Stop waiting for pages that are not in memory yet; those that are stay leased. Answered by a last `Ready`."""

    prefetch: Count  # its `seq`


class Release(Message):
    """The pages of a prefetch are not needed any more, nor those it still waits for."""

    prefetch: Count  # its `seq`


class Page(msgspec.Struct, array_like=True):
    """A filled slot that becomes a page."""

    key: Key
    parent: Key
    slot: Count  # between hosts: position of its payload's frame


class Commit(Message):
    pages: Annotated[list[Page], msgspec.Meta(max_length=MAX_KEYS)]


class Want(Message):
    """The client is filling granted slots, and asks for this many more."""

    slots: Count


class GiveBack(Message):
    """Granted slots that come back empty, as the client has more than its `Share`."""

    slots: Slots


class Credit(Message):
    """Between hosts: flow control; the prefetcher may send this many more pages."""

    pages: Count


class Flush(Message):
    """Asks for a `Flushed` once all pages committed before are in files, or given up."""


class DropHost(Message):
    """Forget the pages in memory that nobody leases. Files stay."""


class Stats(Message):
    """Asks for `Figures`."""


class Overview(Message):
    """Asks for an `Overviewed`; on this host it needs no session, and takes nothing."""


class Health(Message):
    """Asks for an `Alive`. Sent every second; a client on another host is given up without."""


class Bye(Message):
    """The session ends; everything it holds is given back. Answered by an `Alive`, the last message.

    A client that no longer waits for its welcome sends it without a session number; then it has no answer.
    """


# ---- from the prefetcher ----


class Welcome(Message):
    pid: Count
    region: str  # path of the shared memory; empty between hosts
    slots: Count
    quota_bytes: Count | None  # of each directory; None where none was given
    read_bytes_per_s: float | None  # the most that is read from files; likewise


class Waiting(Message):
    """Sent each second until a `Hello` is answered: directories are being opened, or memory freed for it."""

    pages: Count  # that must be written before that


class Refused(Message):
    """A message was not understood or not allowed; `Figures` count them as `refused_{reason}`."""

    reason: str
    text: str
    fatal: bool  # the session is over: start another


class Granted(Message):
    slots: Slots


class Share(Message):
    """The most slots the client may hold, empty or being filled; it gives back empty ones beyond that at once."""

    slots: Count


class Ready(Message):
    """Pages `first`, `first + 1`, … of a `Prefetch` are in these slots; `done`: no more will come.

    On one host the first one comes at once, with what is in memory, even if that is nothing.
    """

    answers: Count  # `seq` of the `Prefetch`
    first: Count
    slots: Slots
    done: bool
    total: Count  # pages that will be there in the end, if each can be read


class Found(Message):
    answers: Count  # `seq` of the `Lookup`
    present: Annotated[list[bool], msgspec.Meta(max_length=MAX_KEYS)]


class Flushed(Message):
    answers: Count
    complete: bool


class Figures(Message):
    answers: Count
    figures: contract.Stats


class Overviewed(Message):
    """What the prefetcher does for all its clients, and the limits it was started with: None where there is none."""

    pid: Count
    version: str  # of the package
    uptime_s: Annotated[float, msgspec.Meta(ge=0)]
    clients: Count
    pages_closing: Count  # not yet written, of models that are being closed and are not listed any more
    quota_bytes: Count | None  # of each directory
    read_bytes_per_s: float | None
    host_bytes: Count | None  # of one model
    models: list[contract.Stats]  # as in `Figures`, and whose they are


class Alive(Message):
    answers: Count


FromClient = (
    Hello
    | Lookup
    | Prefetch
    | Cancel
    | Release
    | Commit
    | Want
    | GiveBack
    | Credit
    | Flush
    | DropHost
    | Stats
    | Overview
    | Health
    | Bye
)
FromServer = Welcome | Waiting | Refused | Granted | Share | Ready | Found | Flushed | Figures | Overviewed | Alive

_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[FromClient] = msgspec.msgpack.Decoder(FromClient)
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


T = TypeVar("T")


class Malformed(ValueError):
    """Bytes that are no message; `reason` is one of `oversized`, `unknown_version`, `malformed`."""

    fatal = False  # to the session

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def encode(message: Message) -> bytes:
    return PREFIX + _encoder.encode(message)


def decode_from_client(frame: bytes | memoryview) -> FromClient:
    """Raises Malformed."""
    return _decode(_from_client, frame)


def decode_from_server(frame: bytes | memoryview) -> FromServer:
    """Raises Malformed."""
    return _decode(_from_server, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | memoryview) -> T:
    if len(frame) > MAX_MESSAGE_BYTES:
        raise Malformed("oversized", f"{len(frame)} bytes, {MAX_MESSAGE_BYTES} at most")
    view = memoryview(frame)
    if view[:2] != PREFIX[:2] or len(view) < len(PREFIX):
        raise Malformed("malformed", "it does not start as a message does")
    if view[:4] != PREFIX:
        raise Malformed("unknown_version", f"version {view[2]}, this is version {VERSION}")
    try:
        return decoder.decode(view[len(PREFIX) :])
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise Malformed("malformed", str(error)) from None
