"""The rates of this machine on this model: measured at start, and kept for later starts."""

from __future__ import annotations

import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.runtime_context import get_parallel

import sglang_hcache
from sglang_hcache.config import HCacheConfig
from sglang_hcache.device.pinning import PinnedMemory
from sglang_hcache.device.streams import current_stream
from sglang_hcache.planner.hf_config import shape_of_config
from sglang_hcache.planner.machine import ATTENTION_EFFICIENCY, GEMM_EFFICIENCY, Machine
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.ranks import all_ranks
from sglang_hcache.restoring.host_pages import HostPages, StoredLayer
from sglang_hcache.restoring.layer_events import LayerEvents
from sglang_hcache.restoring.restore import restorer_for
from sglang_hcache.startup.kept import CALIBRATION, Kept
from sglang_hcache.startup.representation import Formats, LayerFormat
from sglang_hcache.startup.synthetic_forward import leaving_no_trace, most_at_once, most_tokens, prefill_random_prompt
from sglang_hcache.storage.probe import measure_read_rate

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = {"cpu": (64, 512), "cuda": (64, 2048)}
_RESTORED_TOKENS = 1024
_REPEATS = 5
_SLOW_S = 0.5  # a forward that takes longer is tried once, and no longer one is
_LEAST_S = 1e-9  # what is too short to be measured
_NO_PROBE_BYTES_PER_S = 1e9  # where a drive cannot be tried: corrected by the first loads
_REMOTE_BYTES_PER_S = 1e9  # likewise
_LEARN_EVERY_S = 30.0
_LEARNED = [field.name for field in fields(Machine) if field.name.endswith("_per_s")]
_WORTH_KEEPING = 1.2  # times faster or slower


def calibrate(
    config: HCacheConfig, runner: Any, formats: Formats, *, page_tokens: int, layers: int, device: str
) -> tuple[ModelShape, KeptRates] | None:
    """The model's shape and this machine's rates on it; None if the model's cost cannot be computed.

    Must be called before any request, on all ranks: if the rates are not known yet, it runs the model.
    """
    model, ranks = runner.model_config, get_parallel().attn_tp_size
    try:
        shape = shape_of_config(model.hf_config.to_dict(), Path(model.model_path).name)
        if shape.layers != layers:
            raise ValueError(f"its configuration names {shape.layers} layers, its KV pool has {layers}")
    except ValueError as error:
        logger.warning("hcache: all of every hit is restored, whatever it costs: %s", error)
        return None
    stored_bytes = formats.hidden.row_bytes if formats.hidden else 0
    shape = replace(
        shape,
        dtype_bytes=model.dtype.itemsize,
        stored_hidden_bytes=stored_bytes,
        stored_kv_bytes=formats.kv.row_bytes * shape.kv_shares(ranks),
    )

    def measure() -> Machine:
        rates = _measure(config, runner, formats, shape, page_tokens=page_tokens, ranks=ranks, device=device)
        if config.prefetcher is not None:
            return replace(rates, remote_bytes_per_s=_REMOTE_BYTES_PER_S)
        return replace(rates, ssd_bytes_per_s=_drives(config.directories, config.read_bytes_per_s))

    about = {
        "version": sglang_hcache.__version__,
        "machine": _machine_name(),
        "model": asdict(shape),
        "projector": formats.hidden.projector_name if formats.hidden else None,
        "device": device,
        "copier": config.copier,
        "ranks": ranks,
        "rank": get_parallel().tp_rank,
        "page_tokens": page_tokens,
        "directories": list(config.directories),
        "read_bytes_per_s": config.read_bytes_per_s,
        "prefetcher": config.prefetcher,
    }
    return shape, KeptRates(Path(config.directories[0]) / CALIBRATION, about, measure, agree=all_ranks)


def _measure(
    config: HCacheConfig,
    runner: Any,
    formats: Formats,
    shape: ModelShape,
    *,
    page_tokens: int,
    ranks: int,
    device: str,
) -> Machine:
    """Measure the rates of prefill and restoring, which takes seconds. Attention's is derived from matrix products'.

    A single rank measures less where the model is slow. Several ranks must all run the same, so they never do less.
    With data-parallel attention every rank runs a prompt of its own, as when all are busy.

    ranks: how many share the heads of an attention, and so the work for a token.
    """
    by_itself = get_parallel().tp_size == 1
    limit, at_once = most_tokens(runner, page_tokens), most_at_once(runner, page_tokens)
    few, many = (min(tokens, at_once) for tokens in _PREFILL_TOKENS[torch.device(device).type])
    with leaving_no_trace(runner):
        first_s = _seconds(lambda: _prefill(runner, page_tokens, few), device, repeats=1)
        repeats = 1 if by_itself and first_s > _SLOW_S else _REPEATS
        few_s = _seconds(lambda: _prefill(runner, page_tokens, few), device, repeats)
        if by_itself:
            many = max(few, min(many, int(few * _SLOW_S / few_s)))
        many_s = _seconds(lambda: _prefill(runner, page_tokens, many), device, repeats)
    fixed_s, token_s = _fit((few, few_s), (many, many_s))
    gemm_flop_per_s = shape.linear_flop / ranks * shape.layers / max(token_s, _LEAST_S)
    pages, kv_ranks = max(1, min(_RESTORED_TOKENS, limit) // page_tokens), shape.kv_shares(ranks)
    tokens = pages * page_tokens
    copies_s, kv_s = _try_restoring(config, formats.kv, pages, page_tokens, device)
    copied_bytes, hidden_s = tokens * formats.kv.row_bytes, kv_s
    if formats.hidden:
        copy_s, hidden_s = _try_restoring(config, formats.hidden, pages, page_tokens, device)
        copied_bytes, copies_s = copied_bytes + tokens * formats.hidden.row_bytes, copies_s + copy_s
    return Machine(
        name=_machine_name(),
        ranks=ranks,
        gemm_flop_per_s=gemm_flop_per_s,
        attention_flop_per_s=gemm_flop_per_s * ATTENTION_EFFICIENCY / GEMM_EFFICIENCY,
        memory_bytes_per_s=shape.layer_weight_bytes / ranks * shape.layers / max(fixed_s, _LEAST_S),
        projection_flop_per_s=shape.projection_flop / kv_ranks * tokens / hidden_s,
        scatter_bytes_per_s=shape.kv_bytes / kv_ranks * tokens / kv_s,
        bus_bytes_per_s=copied_bytes / max(copies_s, _LEAST_S),
    )


def _try_restoring(
    config: HCacheConfig, layer_format: LayerFormat, pages: int, page_tokens: int, device: str
) -> tuple[float, float]:
    """Seconds to copy pages of the first layer to the device, and to make K and V of them in the pool, each alone.

    On a CPU the latter includes the copy, as the same cores do both.
    """
    memory = torch.zeros(pages, page_tokens * layer_format.row_bytes, dtype=torch.uint8)
    pinned = PinnedMemory(memory)
    layer = StoredLayer(0, page_tokens * layer_format.row_bytes, layer_format.dtype, layer_format.projector)
    positions = np.zeros((pages, page_tokens), np.int32)
    events = LayerEvents(current_stream(device), layers=1)
    host_pages = HostPages(memory, positions, [layer])
    restorer = restorer_for(host_pages, device, None, events, pinned=pinned.pinned, copy_engine=config.copy_engine)
    try:
        copy_s, make_s = restorer.measure(pages, repeats=_REPEATS)
    finally:
        pinned.release()
    return copy_s, max(make_s + copy_s * (torch.device(device).type == "cpu"), _LEAST_S)


def _drives(directories: Sequence[str], read_limit: float | None) -> float:
    """Bytes a second, of all directories' drives together."""
    total = 0.0
    for directory in directories:
        try:
            total += measure_read_rate(Path(directory))
        except OSError as error:
            logger.info("hcache: %s cannot be tried (%s)", directory, error)
            total += _NO_PROBE_BYTES_PER_S
    return min(total, read_limit or math.inf)


class KeptRates:
    """The rates kept by an earlier start with the same `about`; else measured, and kept, as are rates learned later.

    `calibrated`: as they were measured. `machine`: by what was learned since, which changes with the load.

    about: everything that the rates depend on. A file that cannot be read or written costs a measurement. That runs
    the model, which takes all ranks, so `agree` tells whether all of them have kept rates.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        measure: Callable[[], Machine],
        *,
        agree: Callable[[bool], bool],
    ) -> None:
        self._kept = Kept(folder, about)
        self._looked_at = time.monotonic()
        kept = self._read()
        if agree(kept is not None) and kept is not None:
            self.calibrated, self.machine = kept
            return
        began = time.perf_counter()
        self.calibrated = self.machine = measure()
        logger.info("hcache: calibrated in %.1f s", time.perf_counter() - began)
        self._write()

    def learned(self, machine: Machine) -> None:
        """What the machine delivers by now; kept, in the background, where it differs. May be called often."""
        if time.monotonic() - self._looked_at < _LEARN_EVERY_S:
            return
        self._looked_at = time.monotonic()
        before, now = asdict(self.machine), asdict(machine)
        changes = [abs(math.log(now[name] / before[name])) for name in _LEARNED if 0 < before[name] < math.inf]
        if max(changes) > math.log(_WORTH_KEEPING):
            self.machine = machine
            threading.Thread(target=self._write, name="hcache-rates", daemon=True).start()

    def _read(self) -> tuple[Machine, Machine] | None:
        found = self._kept.read()
        try:
            return (Machine(**found["calibrated"]), Machine(**found["rates"])) if found is not None else None
        except (ValueError, KeyError, TypeError):
            return None

    def _write(self) -> None:
        try:
            self._kept.write(rates=asdict(self.machine), calibrated=asdict(self.calibrated))
        except OSError as error:
            logger.info("hcache: the calibration cannot be kept (%s)", error)


def _machine_name() -> str:
    gpu = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    return f"{platform.node()}, {os.cpu_count()} cores, {gpu}"


def _prefill(runner: Any, page_tokens: int, tokens: int) -> None:
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    prefill_random_prompt(runner, page_tokens, tokens)


def _seconds(work: Callable[[], None], device: str, repeats: int) -> float:
    """The least of a few, the device's work included."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _fit(short: tuple[int, float], long: tuple[int, float]) -> tuple[float, float]:
    """Fixed seconds of a forward, and seconds per token; from two forwards, each (tokens, seconds).

    On a busy machine the short one may have taken as long as the long one: at least half of the long one's time is
    taken to be for its tokens.
    """
    (few, few_s), (many, many_s) = short, long
    token_s = max((many_s - few_s) / max(1, many - few), many_s / many / 2)
    return max(0.0, few_s - few * token_s), token_s
