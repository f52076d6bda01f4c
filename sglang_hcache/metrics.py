"""The tier's figures as Prometheus metrics, beside SGLang's own, if the server has `--enable-metrics`."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

EVERY_S = 5.0  # between two looks; each asks the prefetcher once
KEPT = 10_000  # durations between two looks
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Durations(deque[float]):
    """Durations that are not published yet, in seconds; beyond `KEPT` the oldest are dropped."""

    def __init__(self) -> None:
        super().__init__(maxlen=KEPT)


class Metric(NamedTuple):
    stat: str  # its name in what `numbers_of` makes of `HCacheLinker.stats`
    name: str
    help: str  # docs/metrics.md has the same

    @property
    def kind(self) -> str:
        """By Prometheus's convention for names."""
        return "counter" if self.name.endswith("_total") else "gauge"


METRICS = tuple(
    Metric(*row)
    for row in (
        # of the scheduler process
        ("tokens_restored", "hcache_restored_tokens_total", "Tokens restored instead of prefilled"),
        ("loads_accepted", "hcache_loads_accepted_total", "Loads accepted: one per request that is restored"),
        ("loads_refused", "hcache_loads_refused_total", "Loads refused because their lease had ended: prefilled"),
        ("loads_failed", "hcache_loads_failed_total", "Loads that failed: SGLang aborted their requests"),
        ("loads_shared", "hcache_loads_shared_total", "Batches closed for a request to wait for a load in them"),
        ("requests_held", "hcache_requests_held_total", "Requests held in the queue to wait for pages"),
        ("requests_held_now", "hcache_held_requests", "Requests held now"),
        (
            "requests_admitted_late",
            "hcache_requests_admitted_late_total",
            "Requests admitted before all ranks had their pages, as their time was up",
        ),
        ("lookups_not_ahead", "hcache_lookups_not_ahead_total", "Lookups whose pages had not been prefetched"),
        ("head_starts", "hcache_head_starts_total", "Head starts begun"),
        ("tokens_ahead", "hcache_head_start_tokens_total", "Tokens that head starts covered"),
        ("tokens_looked_up", "hcache_looked_up_tokens_total", "Tokens that requests looked up, in whole pages"),
        ("tokens_found", "hcache_found_tokens_total", "Looked-up tokens that were in memory in time"),
        ("plans", "hcache_plans_total", "Hits for which a plan was made"),
        ("pages_left_to_prefill", "hcache_pages_left_to_prefill_total", "Pages of hits left to prefill"),
        ("slower_bus", "hcache_slower_bus_ratio", "Time of copies to the device, over that at start"),
        ("slower_ssd", "hcache_slower_ssd_ratio", "Time of reads from files, over that at start"),
        ("slower_remote", "hcache_slower_remote_ratio", "Time of reads from another host, over that at start"),
        ("slower_projection", "hcache_slower_projection_ratio", "Time of projections, over that at start"),
        ("slower_prefill", "hcache_slower_prefill_ratio", "Time of prefills, over that at start"),
        ("tokens_captured", "hcache_captured_tokens_total", "Tokens whose hidden states were captured"),
        ("tokens_not_captured", "hcache_not_captured_tokens_total", "Tokens that were not captured"),
        ("tokens_not_encoded", "hcache_not_encoded_tokens_total", "Tokens that the codec could not encode"),
        ("pages_saved", "hcache_saved_pages_total", "New pages committed to the store"),
        ("pages_incomplete", "hcache_incomplete_pages_total", "New pages not stored for lack of rows or a slot"),
        ("reserve_failed", "hcache_reserve_failed_total", "Times no slot was free for a new page"),
        ("pages_granted", "hcache_granted_pages", "Slots granted to this process for new pages"),
        ("layers_hidden", "hcache_hidden_layers", "Layers stored as hidden states"),
        ("layers_kv", "hcache_kv_layers", "Layers stored as K and V"),
        ("layers_windowed", "hcache_windowed_layers", "Layers in a KV pool for sliding windows"),
        ("layers_draft", "hcache_draft_layers", "Layers of a draft model, stored as K and V"),
        ("bytes_per_token", "hcache_token_bytes", "Stored bytes per token, all layers"),
        ("page_size", "hcache_page_tokens", "Tokens per page"),
        ("page_bytes", "hcache_page_bytes", "Bytes of a page in memory or in a file"),
        # of the prefetcher
        ("prefetcher_up", "hcache_prefetcher_up", "1 if the prefetcher answers, else 0"),
        ("prefetcher_restarts", "hcache_prefetcher_restarts_total", "Prefetchers that replaced a lost one"),
        ("prefetcher_clients", "hcache_prefetcher_clients", "Processes that use the same prefetcher"),
        ("prefetcher_uptime_s", "hcache_prefetcher_uptime_seconds", "Seconds since the prefetcher was started"),
        ("pages_dropped", "hcache_dropped_pages_total", "Pages from other hosts for which it had no slot"),
        ("messages_refused", "hcache_messages_refused_total", "Messages the prefetcher refused, of all clients"),
        # of the store: the same from all who share its pages
        ("pages_total", "hcache_host_capacity_pages", "Host memory, in slots of a page"),
        ("bytes_total", "hcache_host_capacity_bytes", "Host memory"),
        ("pages_host", "hcache_host_pages", "Pages in host memory"),
        ("bytes_host", "hcache_host_bytes", "Bytes of the pages in host memory"),
        ("pages_free", "hcache_free_pages", "Slots that are unused"),
        ("pages_dirty", "hcache_dirty_pages", "Pages in memory not yet written to a file"),
        ("pages_leased", "hcache_leased_pages", "Pages in memory leased to requests"),
        ("pages_open", "hcache_open_pages", "Slots being filled, or granted for that"),
        ("pages_reading", "hcache_reading_pages", "Pages being read"),
        ("prefetches_waiting", "hcache_prefetches_waiting", "Prefetches waiting for slots"),
        ("hits_host", "hcache_host_hit_pages_total", "Requested pages that were in memory"),
        ("hits_file", "hcache_file_hit_pages_total", "Requested pages read from files"),
        ("bytes_read", "hcache_read_bytes_total", "Bytes of pages read from files"),
        ("pages_written", "hcache_written_pages_total", "Pages written to files"),
        ("bytes_written", "hcache_written_bytes_total", "Bytes of pages written to files"),
        ("pages_write_failed", "hcache_write_failed_pages_total", "Pages that no directory could take"),
        ("pages_write_skipped", "hcache_write_skipped_pages_total", "Pages not written, as drives were behind"),
        ("pages_file", "hcache_file_pages", "Pages of this model in files"),
        ("bytes_file", "hcache_file_bytes", "Disk space in use, of all models"),
        ("quota_bytes", "hcache_file_capacity_bytes", "Disk quota, of all models; 0: no directory"),
        ("pages_evicted", "hcache_evicted_pages_total", "Pages of any model evicted for this model's writes"),
        ("evicted_idle_s", "hcache_evicted_idle_seconds", "Since the last use of pages evicted last, median"),
        ("pages_damaged", "hcache_damaged_pages_total", "Pages on file that failed verification: dropped"),
        ("pages_unreadable", "hcache_unreadable_pages_total", "Pages that a drive could not read: misses"),
        ("pages_damaged_on_the_way", "hcache_damaged_on_the_way_pages_total", "Pages corrupted between hosts"),
        ("files_damaged", "hcache_damaged_files_total", "Files that were damaged or unusable"),
        ("index_rebuilt", "hcache_index_rebuilt_total", "Indexes rebuilt from the segment files"),
        ("volumes", "hcache_volumes", "Directories in use; 0 where pages are in memory only"),
        ("volumes_failed", "hcache_failed_volumes", "Directories that take no writes"),
    )
)  # fmt: skip

HISTOGRAMS = (  # of the scheduler process; docs/metrics.md has the same
    ("hcache_held_seconds", "Time that a request was held"),
    ("hcache_load_seconds", "Time that the device took to restore what a batch needs"),
)

INFO = ("version", "prefetcher_version", "representation")  # labels of `hcache_info`, and their names in the stats


def numbers_of(stats: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in `HCacheLinker.stats`, with sums over directories, and memory in bytes."""
    numbers = {name: value for name, value in stats.items() if isinstance(value, int | float)}
    numbers["prefetcher_up"] = int(stats["prefetcher"] == "ok")
    for of in {"total", "host"} if "pages_total" in numbers else ():
        numbers[f"bytes_{of}"] = numbers[f"pages_{of}"] * numbers["page_bytes"]
    if (volumes := stats.get("volumes")) is not None:
        numbers["volumes"] = len(volumes)
        numbers["volumes_failed"] = sum(volume["state"] != "ok" for volume in volumes)
        numbers["bytes_file"] = sum(volume["bytes"] for volume in volumes)
        numbers["quota_bytes"] = sum(volume["quota_bytes"] for volume in volumes)
    return numbers


class Publisher:
    """Sets the metrics from `stats`, and from `durations` by metric; for one thread. Every metric has `labels`."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        durations: Mapping[str, Durations],
        labels: Mapping[str, object],
        registry: Any = None,
    ) -> None:
        # SGLang says where processes leave their figures before it starts us; the import looks at that.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        self._stats = stats
        self._labels = labels
        names, registry = tuple(labels), registry or REGISTRY
        self._parents: dict[str, Any] = {
            metric.stat: Counter(metric.name, metric.help, names, registry=registry)
            if metric.kind == "counter"
            else Gauge(metric.name, metric.help, names, registry=registry, multiprocess_mode="mostrecent")
            for metric in METRICS
        }
        self._histograms = [
            (Histogram(name, what, names, registry=registry, buckets=BUCKETS_S).labels(**labels), durations[name])
            for name, what in HISTOGRAMS
        ]
        self._info = Gauge(
            "hcache_info",
            "1, with the versions and what is stored",
            (*names, *INFO),
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._informed: dict[str, str] = {}
        self._last: dict[str, float] = {}  # by stat; of gauges, what they are where there is no figure

    def publish(self) -> None:
        """Set all metrics once. Counters keep increasing when their figure restarts (a new prefetcher or store).

        Histograms first: who scrapes meanwhile and sees a load counted finds its duration, too.
        """
        stats = self._stats()
        for histogram, durations in self._histograms:
            while durations:
                histogram.observe(durations.popleft())
        self._inform({name: str(stats[name]) for name in INFO if name in stats})
        numbers = self._last | numbers_of(stats)
        for metric in METRICS:
            if (value := numbers.get(metric.stat)) is None:
                continue
            figure, last = self._parents[metric.stat].labels(**self._labels), self._last.get(metric.stat, 0)
            if metric.kind == "counter":
                figure.inc(value - last if value >= last else value)
                self._last[metric.stat] = value
            else:
                figure.set(value)
                self._last[metric.stat] = 0

    def _inform(self, info: dict[str, str]) -> None:
        """Set `hcache_info` once all its labels are known. A new prefetcher may change them: the former go to 0."""
        if info == self._informed or len(info) < len(INFO):
            return
        if self._informed:
            self._info.labels(**self._labels, **self._informed).set(0)
        self._info.labels(**self._labels, **info).set(1)
        self._informed = info


def start(
    stats: Callable[[], Mapping[str, Any]], durations: Mapping[str, Durations], labels: Mapping[str, object]
) -> None:
    """Publish every few seconds for the life of the process. `stats` may block: a separate thread calls it."""
    publisher = Publisher(stats, durations, labels)

    def run() -> None:
        while True:
            try:
                publisher.publish()
            except Exception:  # the thread must outlive a look at a bad moment
                logger.exception("hcache: metrics could not be set")
            time.sleep(EVERY_S)

    threading.Thread(target=run, name="hcache-metrics", daemon=True).start()
