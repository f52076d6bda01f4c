"""Keeps the rates accurate by comparing the times of real loads with the expected ones.

Each resource has one factor, the geometric mean of actual over calibrated time with exponential forgetting. A load
far from the median of the last few is discarded as an outlier; when the median itself has moved, the factor follows.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum

from sglang_hcache.planner.machine import Machine


class Resource(StrEnum):
    BUS = "bus"
    SSD = "ssd"
    REMOTE = "remote"
    PROJECTION = "projection"  # and what else is done with what has been copied
    PREFILL = "prefill"  # matrix products and attention together


GAIN = 0.25  # weight of the newest load; the first few weigh more, so that they outweigh a wrong calibration
WINDOW = 7  # loads whose middle tells outliers
OUTLIER = 2.0  # times slower or faster than the middle
PROBE_EVERY = 5  # plans in a row that left a tier unmeasured
PROBE_SELDOM = 80  # likewise, after probes that found it as it was: each doubles the number, up to this
PROBE_PAGES = 4


@dataclass
class _Probe:
    """When to try a tier again that plans have not used."""

    plans_since: int = 0  # plans that could have used the tier, since it was last measured
    after: int = PROBE_EVERY  # the tier is tried after so many of them

    def measured(self, *, as_before: bool) -> None:
        probed = self.plans_since >= self.after
        self.after = min(2 * self.after, PROBE_SELDOM) if probed and as_before else PROBE_EVERY
        self.plans_since = 0


@dataclass
class _Track:
    log_factor: float = 0.0
    kept: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def observe(self, log_ratio: float) -> None:
        self.recent.append(log_ratio)
        middle = statistics.median(self.recent)
        if abs(log_ratio - middle) > math.log(OUTLIER):
            return
        if abs(self.log_factor - middle) > math.log(OUTLIER) and len(self.recent) >= 3:
            self.log_factor, self.kept = middle, 2
            return
        self.kept += 1
        self.log_factor += max(GAIN, 1 / (1 + self.kept)) * (log_ratio - self.log_factor)


class RateTracker:
    """One for a server. Every method is cheap; none is thread-safe."""

    def __init__(self, calibrated: Machine) -> None:
        self._calibrated = calibrated
        self._tracks = {resource: _Track() for resource in Resource}
        self._probes = {resource: _Probe() for resource in (Resource.BUS, Resource.SSD, Resource.REMOTE)}

    def observe(self, resource: Resource, expected_s: float, actual_s: float) -> None:
        """`expected_s`: what the *calibrated* machine would take for the work alone; both without queueing.

        Work that is too small to be timed, or a clock that went back, says nothing and is ignored.
        """
        if not (expected_s > 0 and actual_s > 0 and math.isfinite(expected_s) and math.isfinite(actual_s)):
            return
        track, log_ratio = self._tracks[resource], math.log(actual_s / expected_s)
        as_before = track.kept > 0 and abs(log_ratio - track.log_factor) < math.log(OUTLIER)
        # A load from host memory measures the slower of its two stages.
        probe = self._probes.get(Resource.BUS if resource is Resource.PROJECTION else resource)
        if probe is not None:
            probe.measured(as_before=as_before)
        track.observe(log_ratio)

    def factor(self, resource: Resource) -> float:
        """How many times slower than calibrated."""
        return math.exp(self._tracks[resource].log_factor)

    def machine(self) -> Machine:
        """The calibrated machine with its rates as they are now."""
        at, factor = self._calibrated, self.factor
        return replace(
            at,
            bus_bytes_per_s=at.bus_bytes_per_s / factor(Resource.BUS),
            ssd_bytes_per_s=at.ssd_bytes_per_s / factor(Resource.SSD),
            remote_bytes_per_s=at.remote_bytes_per_s / factor(Resource.REMOTE),
            projection_flop_per_s=at.projection_flop_per_s / factor(Resource.PROJECTION),
            scatter_bytes_per_s=at.scatter_bytes_per_s / factor(Resource.PROJECTION),
            gemm_flop_per_s=at.gemm_flop_per_s / factor(Resource.PREFILL),
            attention_flop_per_s=at.attention_flop_per_s / factor(Resource.PREFILL),
        )

    def trial_pages(self, host_pages: int, *, again: bool = False) -> int:
        """Pages to restore even if it does not pay, to measure a bus that seems too slow. `again`: as in `due`."""
        return min(PROBE_PAGES, host_pages) if self.due(Resource.BUS, again=again) else 0

    def due(self, tier: Resource, *, again: bool = False) -> bool:
        """Whether a tier that a plan could use should be tried, to see what it delivers now.

        again: it was asked for the same plan before, which counts once.
        """
        self._probes[tier].plans_since += not again
        return self._probes[tier].plans_since >= self._probes[tier].after
