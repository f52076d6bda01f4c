"""What capture costs a forward: an eager prefill chunk, and a decode step in a CUDA graph, with and without it."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from bench.gpu import DEVICE, noise
from bench.toy_model import Attend, Decoding, Layer, Model, Prefix, Weights, angles, forward
from sglang_hcache.device.streams import Event, current_stream, new_stream
from sglang_hcache.saving import capture
from sglang_hcache.saving.capture import Capture
from sglang_hcache.saving.copy_out import CopyOut, InlineCopyOut, StreamCopyOut, spread

Step = Callable[[], torch.Tensor]
PAGE_TOKENS = 64
IN_FLIGHT = 2  # forwards issued and not yet done: an overlapping scheduler is one ahead
PREFILL_STEPS = 8  # in a row, so that a host that is too slow comes to drop rows: pinned memory holds three forwards


@dataclass(frozen=True)
class Site:
    module: torch.nn.Module

    def hidden_states(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        hidden: torch.Tensor = args[0]
        return hidden


class HostSink:
    """Rows to the host and into pages there, as the server's saver takes them: a copy for each run of tokens in one.

    n_bytes: of a forward's rows, at most.
    """

    def __init__(self, n_bytes: int) -> None:
        self.copy_out: CopyOut = InlineCopyOut()
        if DEVICE == "cuda":
            self.copy_out = StreamCopyOut(new_stream(DEVICE, urgency=3), current_stream(DEVICE))
        self.copy_out.expect(n_bytes)
        self.written = self.dropped = 0
        self._runs: list[slice] = []  # of the last forward that was written
        self._memory = torch.zeros(n_bytes, dtype=torch.uint8)
        self._pages = self._memory
        self._lock = threading.Lock()

    @property
    def rows(self) -> torch.Tensor:
        """Of the last forward that was written, `[layers, n, width]`."""
        parts = (page[:, : run.stop - run.start] for page, run in zip(self._pages, self._runs, strict=False))
        return torch.cat(list(parts), dim=1)

    def write(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Event:
        host_rows = self.copy_out.rows_to_host(rows)
        if host_rows is None:
            self.drop(slots)
            return self.copy_out.record()
        host_slots, _ = map(self.copy_out.to_host, (slots, positions))

        def keep() -> None:
            runs = _runs(host_slots.numpy())
            layers, _, width = host_rows.shape
            longest = max(run.stop - run.start for run in runs)
            page_bytes = layers * longest * width * host_rows.itemsize
            pages = self._memory[: len(runs) * page_bytes].view(host_rows.dtype)
            pages = pages.view(len(runs), layers, longest, width)
            into, of = pages.view(torch.uint8).numpy(), host_rows.view(torch.uint8).numpy()

            def copy(place: int) -> None:
                into[place, :, : runs[place].stop - runs[place].start] = of[:, runs[place]]

            spread(self.copy_out.copying, copy, range(len(runs)))
            with self._lock:
                self._pages, self._runs = pages, runs
                self.written += len(host_slots)

        self.copy_out.submit(keep)
        return self.copy_out.record()

    def drop(self, slots: torch.Tensor) -> None:
        with self._lock:
            self.dropped += len(slots)

    def share(self) -> float:
        """Of the tokens since the last call, those that were written."""
        self.copy_out.drain()
        written, dropped = self.written, self.dropped
        self.written = self.dropped = 0
        return written / max(1, written + dropped)


def _runs(slots: npt.NDArray[np.int64]) -> list[slice]:
    """Of tokens in consecutive slots of one page."""
    pages, offsets = np.divmod(slots, PAGE_TOKENS)
    breaks = np.flatnonzero((np.diff(pages) != 0) | (np.diff(offsets) != 1)) + 1
    return [slice(start, stop) for start, stop in itertools.pairwise([0, *breaks.tolist(), len(slots)])]


@dataclass
class Forward:
    """One kind of forward: the same weights twice, with capture on one of the two."""

    plain: Step
    captured: Step
    capture: Capture
    tokens: torch.Tensor  # slots, and in the place of positions
    from_graph: bool

    def issue(self, *, captured: bool) -> None:
        if not captured:
            self.plain()
            return
        self.capture.before_forward()
        self.captured()
        self.capture.after_forward(self.tokens, self.tokens, from_graph=self.from_graph)

    def series(self, steps: int, *, captured: bool) -> float:
        """Seconds of the device for a forward, of several in a row, whose results are copied to the host."""
        events: deque[torch.cuda.Event] = deque()
        began = time.perf_counter()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
            results, sampled = torch.cuda.Stream(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
            found = torch.empty(1, dtype=torch.int32, pin_memory=True)
        for _ in range(steps):
            if len(events) == IN_FLIGHT:
                events.popleft().synchronize()
            self.issue(captured=captured)
            if DEVICE == "cuda":
                events.append(torch.cuda.Event(enable_timing=True))
                results.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(results):
                    found.copy_(sampled, non_blocking=True)
                    events[-1].record()
        if DEVICE == "cpu":
            return (time.perf_counter() - began) / steps
        events[-1].synchronize()
        return float(begin.elapsed_time(events[-1])) / 1000 / steps

    def compare(self, sink: HostSink, steps: int, rounds: int = 9) -> dict[str, Any]:
        """In turns: plain, captured, and plain again, whose distance from the first is the noise.

        `host_ms`: a captured forward's time until the host had kept the rows of all.
        """
        kinds = {"plain_ms": False, "captured_ms": True, "plain_again_ms": False}
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        host_took = []
        self.series(steps, captured=False)
        self.series(steps, captured=True)
        sink.share()
        for _, (kind, captured) in itertools.product(range(rounds), kinds.items()):
            began = time.perf_counter()
            took[kind].append(1e3 * self.series(steps, captured=captured))
            if captured:
                sink.copy_out.drain()
                host_took.append(1e3 * (time.perf_counter() - began) / steps)
        median = {kind: statistics.median(values) for kind, values in took.items()}
        base = (median["plain_ms"] + median["plain_again_ms"]) / 2
        return {
            **median,
            "fastest_ms": {kind: min(values) for kind, values in took.items()},
            "slowest_ms": {kind: max(values) for kind, values in took.items()},
            "slow_down": median["captured_ms"] / base - 1,
            "noise": abs(median["plain_again_ms"] - median["plain_ms"]) / base,
            "host_ms": statistics.median(host_took),
            "captured_share": sink.share(),
        }


class Recording:
    """What the attention modules see, kept apart from capture."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.seen: list[torch.Tensor] = []
        self._hooks = [layer.attention.register_forward_pre_hook(self._keep) for layer in layers]

    def _keep(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.seen.append(args[0].clone())

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def differing(self, rows: torch.Tensor) -> int:
        """Elements of `rows`, `[layers, n, width]` on the host, that are not what was seen."""
        return int((rows != torch.stack(self.seen)[:, : rows.shape[1]].cpu()).sum())


def graph_of(step: Step, before_capture: Callable[[], None] = lambda: None) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    before_capture()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Bench:
    """A model of all its layers, twice over one set of weights; capture is on the second.

    Of a graph's rows a quarter is padding, which must not be handed on.
    """

    def __init__(self, model: Model, dtype: torch.dtype, *, chunk: int, batch: int, context: int) -> None:
        self._model, self._dtype, self._chunk, self._batch, self._context = model, dtype, chunk, batch, context
        weights = [Weights.random(model, dtype) for _ in range(model.layers)]
        self._plain, self._hooked = ([Layer(of_layer) for of_layer in weights] for _ in range(2))
        self._capture = Capture(
            [Site(layer.attention) for layer in self._hooked],  # type: ignore[misc]
            rows=chunk,
            width=model.shape.width,
            dtype=dtype,
            device=DEVICE,
        )
        self._sink = HostSink(model.layers * chunk * model.row_bytes(dtype))
        self._capture.sink = self._sink

    @torch.inference_mode()
    def prefill(self, steps: int = PREFILL_STEPS) -> dict[str, Any]:
        prefix = Prefix(self._model, self._chunk, self._dtype)

        def step(layers: Sequence[Layer]) -> Step:
            attends = [self._afresh(prefix)] * len(layers)
            return self._step(layers, attends, self._inputs(self._chunk))

        forward_ = Forward(
            step(self._plain), step(self._hooked), self._capture, torch.arange(self._chunk, device=DEVICE), False
        )
        differing = self._check(forward_)
        return {"tokens": self._chunk, "differing": differing} | forward_.compare(self._sink, steps, rounds=5)

    @torch.inference_mode()
    def decode(self, steps: int = 32, *, by_copies: bool = False) -> dict[str, Any]:
        """by_copies: the graph stages rows by copies of the engine's, not by kernels."""
        if DEVICE == "cpu":
            return {"skipped": "CUDA graphs need a GPU"}
        if by_copies:
            with mock.patch.object(capture, "write_rows", torch.Tensor.copy_):
                return self.decode(steps)
        attends = [Decoding(self._model, self._batch, self._context, self._dtype) for _ in self._plain]
        inputs = self._inputs(self._batch)
        plain, hooked = (self._step(layers, attends, inputs) for layers in (self._plain, self._hooked))
        tokens = PAGE_TOKENS * torch.arange(self._batch, device=DEVICE)  # each request's next one is in another page
        differing = self._check_graph(hooked, inputs, tokens[: self._batch * 3 // 4])
        graphs = [graph_of(step) for step in (plain, hooked)]
        forward_ = Forward(graphs[0].replay, graphs[1].replay, self._capture, tokens, True)  # type: ignore[arg-type]
        found = forward_.compare(self._sink, steps)
        return {"batch": self._batch, "context": self._context, "differing": differing} | found

    def close(self) -> None:
        self._sink.copy_out.drain()
        self._sink.copy_out.close()
        self._capture.keep(0)

    def _inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dim = self._model.shape.head_dim
        turns = torch.arange(tokens, device=DEVICE)[:, None] / 10000 ** (torch.arange(0, dim, 2, device=DEVICE) / dim)
        cos_sin = torch.cat((turns.cos(), turns.sin()), dim=-1)
        x = noise(tokens, self._model.shape.width, dtype=self._dtype)
        return x, *angles(cos_sin, torch.arange(tokens, device=DEVICE), self._dtype)

    @staticmethod
    def _afresh(prefix: Prefix) -> Attend:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            prefix.length = 0
            return prefix(query, key, value)

        return attend

    @staticmethod
    def _step(
        layers: Sequence[Layer], attends: Sequence[Attend], inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> Step:
        return lambda: forward(layers, attends, *inputs)

    def _check(self, forward_: Forward) -> int:
        recording = Recording(self._hooked)
        forward_.issue(captured=True)
        self._sink.copy_out.drain()
        recording.end()
        return recording.differing(self._sink.rows)

    def _check_graph(self, step: Step, inputs: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> int:
        """Of a graph that records what its layers see, replayed on inputs that came after its capture."""
        recording = Recording(self._hooked)
        graph = graph_of(step, before_capture=recording.seen.clear)
        recording.end()
        inputs[0].copy_(noise(*inputs[0].shape, dtype=inputs[0].dtype))
        forward_ = Forward(step, graph.replay, self._capture, tokens, True)  # type: ignore[arg-type]
        forward_.issue(captured=True)
        self._sink.copy_out.drain()
        if self._sink.rows.shape[1] != len(tokens):
            raise RuntimeError(f"{self._sink.rows.shape[1]} rows were captured of {len(tokens)}")
        return recording.differing(self._sink.rows)
