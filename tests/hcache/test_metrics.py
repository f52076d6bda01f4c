from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Counter

from sglang_hcache import metrics, scheduler_hooks
from sglang_hcache.metrics import HISTOGRAMS, METRICS, Durations, Publisher, numbers_of

DOCS = Path(__file__).parents[2] / "docs"
LABELS = {"model_name": "m", "tp_rank": 1}


class Published:
    """A publisher of whatever `stats` is now, and what Prometheus makes of it."""

    def __init__(self, **stats: Any) -> None:
        self.stats = stats
        self.durations = {name: Durations() for name, _ in HISTOGRAMS}
        self._registry = CollectorRegistry()
        self._publisher = Publisher(lambda: self.stats, self.durations, LABELS, self._registry)

    def now(self, name: str, **more: str) -> float | None:
        """After one more look."""
        self._publisher.publish()
        return self.found(name, **more)

    def found(self, name: str, **more: str) -> float | None:
        return self._registry.get_sample_value(name, {name: str(value) for name, value in LABELS.items()} | more)


def test_names_say_what_they_are() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"hcache_[a-z_]+", metric.name)
    assert len({metric.name for metric in METRICS}) == len({metric.stat for metric in METRICS}) == len(METRICS)
    assert all(name.endswith("_seconds") for name, _ in HISTOGRAMS)


def test_who_sees_a_load_counted_finds_its_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    published, seen, inc = Published(prefetcher="ok", loads_accepted=1), list[float | None](), Counter.inc
    published.durations["hcache_load_seconds"].append(0.5)

    def scraped_before(counter: Counter, amount: float) -> None:
        seen.append(published.found("hcache_load_seconds_count"))
        inc(counter, amount)

    monkeypatch.setattr(Counter, "inc", scraped_before)
    assert published.now("hcache_loads_accepted_total") == 1
    assert seen == [1.0]


def test_the_page_names_what_there_is() -> None:
    page = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(hcache_\w+)` \| `(\w+)` \| (\w+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(metric.name, metric.stat, metric.kind, metric.help) for metric in METRICS]
    assert (
        tuple(re.findall(r"^\| `(hcache_\w+)` \| ([^|]+) \|$", page, re.MULTILINE)[: len(HISTOGRAMS)]) == HISTOGRAMS
    )


def test_alerts_and_dashboard_use_what_there_is() -> None:
    rules = yaml.safe_load((DOCS / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((DOCS / "prometheus" / "dashboard.json").read_text())["panels"]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    for query in shown:
        assert query.count("hcache_") == query.count('{instance=~"$instance",model_name=~"$model"'), query
    queries = [rule["expr"] for rule in rules] + shown
    page = (DOCS / "operating.md").read_text()
    for rule in (rule for rule in rules if "alert" in rule):
        assert f"\n### {rule['alert']}\n" in page
        assert rule["annotations"]["runbook_url"] == f"docs/operating.md#{rule['alert'].lower()}"
    kinds = {metric.name: metric.kind for metric in METRICS}
    kinds |= {f"{name}_bucket": "counter" for name, _ in HISTOGRAMS}
    since_start = re.compile(r"\((\w+) > 0 unless \1 offset 1h\)")
    for query in (since_start.sub(r"increase(\1)", query) for query in queries):
        names = re.findall(r"(?:(rate|increase)\()?\b(hcache_\w+)", query)
        assert names
        for function, name in names:
            assert (kinds[name] == "counter") == bool(function), query


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with Prometheus")
def test_alerts_fire_when_they_should() -> None:
    rules = [DOCS / "prometheus" / "alerts.yml", Path(__file__).with_name("alerts_test.yml")]
    for command, file in zip(("check", "test"), rules, strict=True):
        subprocess.run(["promtool", command, "rules", file], check=True)


def test_figures_are_published_under_sglangs_labels() -> None:
    published = Published(prefetcher="ok", tokens_restored=128, pages_host=3, pages_total=8, page_bytes=4096)
    assert published.now("hcache_restored_tokens_total") == 128
    assert published.now("hcache_prefetcher_up") == 1
    assert published.now("hcache_host_bytes") == 3 * 4096
    assert published.now("hcache_host_capacity_bytes") == 8 * 4096
    assert published.now("hcache_plans_total") is None, "without a planner there is no such figure"
    published.stats["tokens_restored"] = 192
    assert published.now("hcache_restored_tokens_total") == 192
    assert published.now("hcache_restored_tokens_total") == 192


def test_durations_are_counted_once_each() -> None:
    published = Published(prefetcher="ok")
    for _ in range(2):
        published.durations["hcache_held_seconds"].extend([0.004, 0.3])
        published.now("hcache_held_seconds_count")
    assert published.now("hcache_held_seconds_count") == 4
    assert published.now("hcache_held_seconds_sum") == pytest.approx(0.608)
    assert published.now("hcache_held_seconds_bucket", le="0.005") == 2
    assert published.now("hcache_load_seconds_count") == 0


def test_durations_that_nobody_looks_at_take_bounded_memory() -> None:
    durations = Durations()
    durations.extend(range(100_000))
    assert len(durations) == metrics.KEPT
    assert durations[-1] == 99_999


def test_a_counter_goes_on_where_another_prefetcher_begins_anew() -> None:
    published = Published(prefetcher="ok", hits_file=10, pages_host=4, pages_total=8, page_bytes=4096)
    assert published.now("hcache_file_hit_pages_total") == 10
    published.stats = {"prefetcher": "gone: its process has ended"}
    assert published.now("hcache_file_hit_pages_total") == 10
    assert published.now("hcache_prefetcher_up") == 0
    assert published.now("hcache_host_pages") == published.now("hcache_host_bytes") == 0, "its memory is gone, too"
    published.stats = {"prefetcher": "ok", "hits_file": 3, "pages_host": 1, "pages_total": 8, "page_bytes": 4096}
    assert published.now("hcache_file_hit_pages_total") == 13
    assert published.now("hcache_host_pages") == 1


def test_versions_are_labels_of_a_metric_of_their_own() -> None:
    published = Published(prefetcher="gone: none yet", version="2", representation="kv")
    of_one, of_other = ({"version": "2", "prefetcher_version": one, "representation": "kv"} for one in ("1", "2"))
    assert published.now("hcache_info", **of_one) is None, "a prefetcher's version is not known yet"
    published.stats = {**of_one, "prefetcher": "ok", "prefetcher_uptime_s": 7.5}
    assert published.now("hcache_info", **of_one) == 1
    assert published.now("hcache_prefetcher_uptime_seconds") == 7.5
    published.stats = {"prefetcher": "gone: its process has ended", "version": "2", "representation": "kv"}
    assert published.now("hcache_info", **of_one) == 1
    assert published.now("hcache_prefetcher_uptime_seconds") == 0
    published.stats = {**of_other, "prefetcher": "ok"}
    assert published.now("hcache_info", **of_other) == 1
    assert published.now("hcache_info", **of_one) == 0


def test_directories_are_summed() -> None:
    works = {"path": "/a", "state": "ok", "pages": 1, "bytes": 100, "quota_bytes": 1000, "pages_evicted": 0}
    fails = {**works, "path": "/b", "state": "failed: the disk is full", "bytes": 10}
    numbers = numbers_of({"prefetcher": "ok", "volumes": [works, fails]})
    assert numbers["volumes"] == 2
    assert numbers["volumes_failed"] == 1
    assert numbers["bytes_file"] == 110
    assert numbers["quota_bytes"] == 2000


@pytest.mark.parametrize("labels", [None, LABELS])
def test_only_where_the_server_has_metrics(labels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(metrics, "start", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(scheduler_hooks, "linker", SimpleNamespace(stats=dict, durations=dict))
    collector = SimpleNamespace(labels=labels) if labels else None
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: SimpleNamespace(attn_tp_rank=7))
    scheduler_hooks.after_metrics_constants(None, SimpleNamespace(metrics_collector=collector))
    assert started == ([(dict, {}, {**labels, "tp_rank": 7})] if labels else [])
