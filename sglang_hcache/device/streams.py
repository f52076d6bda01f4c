"""Streams: queues of device work beside the forward's, and the events by which one waits for another."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Protocol

import torch

# The most that is copied in one piece. A copy engine does not interrupt a copy, nor serve other streams between
# consecutive copies of one stream: at 50 GB/s, SGLang's own small copies wait 0.7 ms for a piece of this size.
COPY_BYTES = 32 << 20
DELAY_CYCLES = 5_000_000  # of a GPU; two to four milliseconds


class Event(Protocol):
    """A place in a stream's work."""

    def query(self) -> bool:
        """Whether the device has come this far."""

    def synchronize(self) -> None:
        """Block the caller until it has."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from here to a later event of the same kind, once both are passed; both are timed."""


class Stream(Protocol):
    def active(self) -> contextlib.AbstractContextManager[object]:
        """While this is entered, work is queued here."""

    def record(self, *, timed: bool = False) -> Event: ...

    def wait(self, event: Event) -> None:
        """What is queued here from now on starts when the device has reached the event; the caller goes on."""

    def end_copy(self) -> None:
        """Let small copies of other streams run before the next large copy on this one."""

    def delay(self) -> None:
        """Keep the stream busy for milliseconds, so that what is timed next does not wait for launches."""

    def keep(self, tensor: torch.Tensor) -> None:
        """The tensor's memory is not used for something else before what is queued here now is done."""

    def adopt(self) -> None:
        """From now on the calling thread works with this stream's device."""


class _Passed:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        assert isinstance(end, _Passed)
        return 1000 * (end._at - self._at)


class ImmediateStream:
    """On the CPU work is done when it is issued: there is nothing to wait for."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def record(self, *, timed: bool = False) -> Event:
        return _Passed()

    def wait(self, event: Event) -> None:
        pass

    def end_copy(self) -> None:
        pass

    def delay(self) -> None:
        pass

    def keep(self, tensor: torch.Tensor) -> None:
        pass

    def adopt(self) -> None:
        pass


class CudaStream:
    """A CUDA stream; without one, whichever is current."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._own = stream
        self._mark: torch.Tensor | None = None

    def active(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def record(self, *, timed: bool = False) -> Event:
        """A thread that waits for a timed event spins; for any other event it sleeps."""
        recorded: Any = torch.cuda.Event(enable_timing=timed, blocking=not timed)
        self._stream.record_event(recorded)
        event: Event = recorded
        return event

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)  # type: ignore[arg-type]  # a CUDA stream records CUDA events

    def end_copy(self) -> None:
        """Launch a small kernel: the copy engine is not given this stream's next copy before it has run."""
        with self.active():
            if self._mark is None:
                self._mark = torch.empty(1, device=self._stream.device)
            self._mark.fill_(0)

    def delay(self) -> None:
        with self.active():
            torch.cuda._sleep(DELAY_CYCLES)

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)

    def adopt(self) -> None:
        torch.cuda.set_device(self._stream.device)

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream()


def new_stream(device: str, *, urgency: int = 0) -> Stream:
    """A stream of its own on the device, whose work goes before that of less urgent ones where both could run.

    urgency: 0, as the forward's, to 3.
    """
    if torch.device(device).type == "cpu":
        return ImmediateStream()
    return CudaStream(torch.cuda.Stream(device, priority=-urgency))


def current_stream(device: str, stream: torch.cuda.Stream | None = None) -> Stream:
    """A stream of SGLang's: the one that is given, or whichever is current when the stream is used."""
    return ImmediateStream() if torch.device(device).type == "cpu" else CudaStream(stream)
