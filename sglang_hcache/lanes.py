"""Lanes: queues of device work beside the forward's, and the marks by which one waits for another."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A place in a lane's work."""

    def query(self) -> bool:
        """Whether the device has come this far."""

    def synchronize(self) -> None:
        """Block the caller until it has."""

    def elapsed_time(self, end: Mark) -> float:
        """Milliseconds from here to a later mark of the same kind, once both are passed."""


class Lane(Protocol):
    def active(self) -> contextlib.AbstractContextManager[object]:
        """While this is entered, work is queued here."""

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None:
        """What is queued here from now on starts when the device has reached the mark; the caller goes on."""

    def keep(self, tensor: torch.Tensor) -> None:
        """The tensor's memory is not used for something else before what is queued here now is done."""


class _Passed:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Mark) -> float:
        assert isinstance(end, _Passed)
        return 1000 * (end._at - self._at)


class ImmediateLane:
    """On the CPU work is done when it is issued: there is nothing to wait for."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        return _Passed()

    def wait(self, mark: Mark) -> None:
        pass

    def keep(self, tensor: torch.Tensor) -> None:
        pass


class StreamLane:
    """A CUDA stream; without one, whichever is current."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._own = stream

    def active(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        event: Any = torch.cuda.Event(enable_timing=True)
        self._stream.record_event(event)
        mark: Mark = event
        return mark

    def wait(self, mark: Mark) -> None:
        self._stream.wait_event(mark)  # type: ignore[arg-type]  # marks of streams are events

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self._stream)

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own or torch.cuda.current_stream()


def new_lane(device: str, *, urgent: bool = False) -> Lane:
    """A lane of its own on the device; `urgent`: its work goes before the forward's where both could run."""
    if torch.device(device).type == "cpu":
        return ImmediateLane()
    return StreamLane(torch.cuda.Stream(device, priority=-1 if urgent else 0))


def current_lane(device: str, stream: torch.cuda.Stream | None = None) -> Lane:
    """A stream of SGLang's: the one that is given, or whichever is current when the lane is used."""
    return ImmediateLane() if torch.device(device).type == "cpu" else StreamLane(stream)
