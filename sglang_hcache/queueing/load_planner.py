"""How much of a hit is restored, from what the machine delivers now: the planner's face towards the linker."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sglang_hcache.planner.cost import Costs, costs_of
from sglang_hcache.planner.load import plan_head_start, plan_load
from sglang_hcache.planner.machine import Machine
from sglang_hcache.planner.rate_tracker import RateTracker, Resource
from sglang_hcache.planner.shape import ModelShape
from sglang_hcache.planner.timeline import Hit, Layout

_REFRESH_S = 0.1  # shortest time between two updates of the costs from the rates
_CLEARLY_FASTER = 1.5  # a forward beside a load counts if this many times faster than expected: less may be noise
_LEAST_SHARED_TOKENS = 512  # without measured rates: restoring this many takes about as long as a forward
_LEAST_TOKENS = 32  # a forward, or a load, of fewer says little about rates

# Where SGLang sorts requests by their hits, it asks for the same plans in every step.
_plan_load = lru_cache(maxsize=1024)(plan_load)


@dataclass(frozen=True)
class Prompt:
    """Of a request's prompt, what no page of the hit covers, and how the queue may serve it."""

    new_tokens: int  # after the hit
    device_tokens: int  # before it, in the KV pool
    divisible: bool = False  # a request for its first tokens alone would prefill them alike
    turn: int = 0  # those of a lower one are served first, whenever they came


class LoadPlanner:
    """One a scheduler process. Plans are this rank's own; SGLang restores what all ranks agree to."""

    restores_all = False

    def __init__(
        self,
        shape: ModelShape,
        calibrated: Machine,
        layout: Layout,
        page_tokens: int,
        *,
        learned: Callable[[Machine], None] = lambda machine: None,
    ) -> None:
        """`learned` is told now and then what the machine delivers by now."""
        self._shape = shape
        self._layout = layout
        self._page_tokens = page_tokens
        self._learned = learned
        self._calibrated = costs_of(shape, calibrated)
        self._tracker = RateTracker(calibrated)
        self._costs, self._costs_at = self._calibrated, 0.0
        self._lower_tier = Resource(calibrated.lower_tier.name)
        self._beside_s = 0.0  # of a layer's compute for the requests in the batch that is being made
        self.plans = self.pages_left_to_prefill = 0

    def batch_begins(self) -> None:
        """Another batch is being made."""
        self._beside_s = 0.0

    def batched(self, tokens: int, context_tokens: int) -> None:
        """So many tokens of a request are prefilled in the batch that is being made."""
        costs = self._now()
        self._beside_s += float(costs.layer_s(tokens, context_tokens)) - costs.layer_pass_s

    def pages(
        self,
        host_pages: int,
        prompt: Prompt,
        *,
        missing_pages: int = 0,
        queued_pages: int = 0,
        least_pages: int = 0,
    ) -> int:
        """How many leading pages to restore of a hit in host memory, in the batch that is being made.

        missing_pages: after it, which are not there. queued_pages: of other loads in it.
        least_pages: to be restored whether it pays or not.
        """
        costs, tokens = self._now(), queued_pages * self._page_tokens
        queue_s = tokens * self._per_token(costs.hidden_bus_s_per_token, costs.kv_bus_s_per_token)
        made_s = tokens * self._per_token(costs.projection_s_per_token, costs.scatter_s_per_token)
        beside_s = self._beside_s + made_s / self._layout.layers
        hit = self._hit(host_pages, prompt, missing_pages=missing_pages, bus_queue_s=queue_s, beside_layer_s=beside_s)
        return _plan_load(costs, self._layout, hit, least_pages=least_pages).pages

    def trial_pages(self, host_pages: int, *, again: bool) -> int:
        """How many of a hit in host memory to restore in any case, to see how fast that is.

        again: it was asked for the same hit before.
        """
        return self._tracker.trial_pages(host_pages, again=again)

    def served(self, left_out: int) -> None:
        """A request with a hit in host memory is over, of which so many pages were not restored."""
        self.plans += 1
        self.pages_left_to_prefill += left_out

    def worth_waiting_for(
        self,
        host_pages: int,
        lower_pages: int,
        prompt: Prompt,
        *,
        missing_pages: int = 0,
        start_s: float = 0.0,
        queued_pages: int = 0,
    ) -> int:
        """How many leading pages a request should wait for, of a hit that continues on a lower tier.

        missing_pages: after it, which are not to be had. start_s: until the engine is done with the requests before.
        queued_pages: what is read for others first.
        """
        queues_s = {"start_s": start_s, "lower_queue_s": self.read_s(queued_pages)}
        hit = self._hit(host_pages, prompt, lower_pages, missing_pages=missing_pages, **queues_s)
        return plan_load(self._now(), self._layout, hit).pages

    def head_start(
        self,
        host_pages: int,
        lower_pages: int,
        prompt: Prompt,
        *,
        missing_pages: int = 0,
        queued_pages: int = 0,
        begun_pages: int = 0,
    ) -> int:
        """How many leading pages of such a hit an idle engine should prefill while those behind them are read.

        begun_pages: the first to be read; their reads go on in any case.
        """
        queue_s = self.read_s(queued_pages)
        hit = self._hit(host_pages, prompt, lower_pages, missing_pages=missing_pages, lower_queue_s=queue_s)
        in_vain_s = self.read_s(begun_pages)
        plan = plan_head_start(self._now(), self._layout, hit, in_vain_s=in_vain_s)
        return 0 if plan is None else plan.pages

    def least_shared_pages(self) -> int:
        """How many pages take as long to restore as a forward of one token, the cost of waiting for a load."""
        costs, layout = self._calibrated, self._layout
        copy_s = self._per_token(costs.hidden_bus_s_per_token, costs.kv_bus_s_per_token)
        make_s = self._per_token(costs.projection_s_per_token, costs.scatter_s_per_token)
        forward_s = layout.layers * float(costs.layer_s(1.0, 0.0)) + costs.head_s
        return max(1, math.ceil(forward_s / (self._page_tokens * max(copy_s, make_s))))

    def tries_drives(self) -> bool:
        """Whether to time some reads of a hit that does not wait for all of them; to be asked once for each hit."""
        return self._tracker.due(self._lower_tier)

    def read_s(self, pages: int) -> float:
        """Seconds to read so many pages, if any, from the lower tier into host memory, with nobody else reading."""
        return self._read_s(self._now(), pages) if pages else 0.0

    def pages_read_within(self, seconds: float) -> int:
        """How many pages can be read in this time, by the same rates as `read_s`."""
        latency_s, page_s = self._reading_s(self._now())
        return int(max(0.0, seconds - latency_s) / page_s)

    def pass_s(self, host_pages: int, prompt: Prompt, *, missing_pages: int) -> tuple[float, float]:
        """Seconds that the engine takes for a request with a hit in host memory and pages after it that are not.

        By itself; and in a pass with others, which read the model's weights in any case.
        """
        costs, hit = self._now(), self._hit(host_pages, prompt, missing_pages=missing_pages)
        alone_s = plan_load(costs, self._layout, hit).seconds
        return alone_s, max(0.0, alone_s - costs.layers * costs.layer_pass_s - costs.head_s)

    # ---- what really happened ----

    def prefilled(
        self, tokens: Sequence[int], contexts: Sequence[int], seconds: float, *, waited: bool = False
    ) -> None:
        """A forward has prefilled requests' next tokens, each after its context; `waited`: for loads.

        One that waited counts only if it was clearly faster than expected even alone. One of few tokens never counts:
        most of its time goes to reading weights, whose rate is not tracked.
        """
        if sum(tokens) < _LEAST_TOKENS:
            return
        costs = self._calibrated
        weights_s = costs.layer_s(0, 0)
        work_s = costs.layers * sum(costs.layer_s(m, c) - weights_s for m, c in zip(tokens, contexts, strict=True))
        fixed_s = costs.layers * weights_s + costs.head_s
        took_s = seconds - fixed_s
        believed_s = work_s * self._tracker.factor(Resource.PREFILL)
        if believed_s >= fixed_s and (not waited or took_s < believed_s / _CLEARLY_FASTER):
            self._tracker.observe(Resource.PREFILL, work_s, took_s)

    def restored(self, tokens: int, seconds: float) -> None:
        """A batch's loads, from host memory to the pool."""
        if tokens < _LEAST_TOKENS:
            return
        costs, layout = self._calibrated, self._layout
        copies_s = layout.layers * costs.bus_latency_s
        copies_s += tokens * self._per_token(costs.hidden_bus_s_per_token, costs.kv_bus_s_per_token)
        making_s = layout.hidden * costs.project_s(tokens) + layout.kv * tokens * costs.scatter_s_per_token
        slower = Resource.PROJECTION if making_s > copies_s else Resource.BUS
        self._tracker.observe(slower, max(copies_s, making_s), seconds)

    def read(self, pages: int, seconds: float, *, at_least: bool = False) -> None:
        """Pages came from the lower tier. `at_least`: given up after `seconds`, which counts if unexpectedly long."""
        if at_least and seconds <= self.read_s(pages):
            return
        self._tracker.observe(self._lower_tier, self._read_s(self._calibrated, pages), seconds)

    def stats(self) -> dict[str, float | int]:
        """Plans made, pages that were left to prefill, and how much slower than calibrated each resource is."""
        factors = {f"slower_{resource}": round(self._tracker.factor(resource), 3) for resource in Resource}
        return {"plans": self.plans, "pages_left_to_prefill": self.pages_left_to_prefill, **factors}

    def _hit(
        self, host_pages: int, prompt: Prompt, lower_pages: int = 0, *, missing_pages: int = 0, **queues_s: float
    ) -> Hit:
        """Pages in host memory, then on the lower tier, then nowhere."""
        return Hit(
            self._page_tokens,
            host_pages,
            lower_pages,
            new_tokens=prompt.new_tokens + missing_pages * self._page_tokens,
            device_tokens=prompt.device_tokens,
            **queues_s,
        )

    def _read_s(self, costs: Costs, pages: int) -> float:
        latency_s, page_s = self._reading_s(costs)
        return latency_s + pages * page_s

    def _reading_s(self, costs: Costs) -> tuple[float, float]:
        """From the lower tier into host memory: once, and for every page."""
        per_token = self._per_token(costs.hidden_lower_s_per_token, costs.kv_lower_s_per_token)
        return costs.lower_latency_s, per_token * self._page_tokens

    def _per_token(self, hidden_s: float, kv_s: float) -> float:
        """Of all layers, from those of one that is stored as hidden states, or as K and V."""
        return self._layout.hidden * hidden_s + self._layout.kv * kv_s

    def _now(self) -> Costs:
        if time.monotonic() - self._costs_at > _REFRESH_S:
            machine = self._tracker.machine()
            self._costs, self._costs_at = costs_of(self._shape, machine), time.monotonic()
            self._learned(machine)
        return self._costs


class RestoreAll:
    """In the place of a planner, where there is none: all of a hit is worth any wait, and nothing is learned."""

    restores_all = True

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens

    def least_shared_pages(self) -> int:
        return -(-_LEAST_SHARED_TOKENS // self._page_tokens)

    def batch_begins(self) -> None: ...

    def batched(self, *_: object) -> None: ...

    def pages(self, host_pages: int, *_: object, **__: object) -> int:
        return host_pages

    def trial_pages(self, *_: object, **__: object) -> int:
        return 0  # all are, in any case

    def served(self, *_: object, **__: object) -> None: ...

    def worth_waiting_for(self, host_pages: int, lower_pages: int, *_: object, **__: object) -> int:
        return host_pages + lower_pages

    def head_start(self, *_: object, **__: object) -> int:
        return 0

    def tries_drives(self) -> bool:
        return False

    def read_s(self, _pages: int) -> float:
        return 0.0

    def pages_read_within(self, _seconds: float) -> int:
        return sys.maxsize

    def pass_s(self, *_: object, **__: object) -> tuple[float, float]:
        return 0.0, 0.0

    def prefilled(self, *_: object, **__: object) -> None: ...

    def restored(self, *_: object, **__: object) -> None: ...

    def read(self, *_: object, **__: object) -> None: ...

    def stats(self) -> dict[str, float | int]:
        return {}


Planner = LoadPlanner | RestoreAll
