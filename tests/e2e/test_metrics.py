"""What Prometheus sees of the tier: `/metrics` of a server with `--enable-metrics`."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest

from bench.harness import Server, random_prompt
from sglang_hcache import __version__
from sglang_hcache.metrics import EVERY_S, METRICS, numbers_of
from tests.e2e.conftest import Workshop, started_together
from tests.e2e.scenarios import SERVER_ARGS, evict_everything, tail_logprobs, wait_until, whole_pages

NAMES = {metric.stat: metric.name for metric in METRICS}


def scraped(server: Server) -> dict[str, tuple[str, float]]:
    """Labels and value of each of the tier's metrics; every one of them has one series, buckets apart."""
    with urllib.request.urlopen(f"http://{server.host}:{server.port}/metrics", timeout=10) as answer:
        lines = re.findall(r"^(hcache_\w+(?<!_bucket))\{(.*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert len({name for name, _, _ in lines}) == len(lines)
    return {name: (labels, float(value)) for name, labels, value in lines}


def test_metrics_are_those_of_server_info(workshop: Workshop, fresh_store: Path) -> None:
    with started_together(workshop.tiered(fresh_store, args=(*SERVER_ARGS, "--enable-metrics"))) as (server,):
        prefix = random_prompt(1200, seed=1)
        server.send(tail_logprobs(prefix))
        evict_everything(server)
        restored = server.send(tail_logprobs(prefix + random_prompt(40, seed=2))).cached_host
        assert restored >= whole_pages(1200)
        assert server.tier_state()["tokens_restored"] == restored

        agreed = list[dict[str, tuple[str, float]]]()

        def figures_agree() -> bool:
            numbers = numbers_of(server.tier_state())
            del numbers["prefetcher_pid"], numbers["prefetcher_uptime_s"]  # no figure, and one that grows
            del numbers["requests_held_s"]  # of a histogram
            found = scraped(server)
            agreed[:] = [found] if {stat: found[NAMES[stat]][1] for stat in numbers} == numbers else []
            return bool(agreed)

        wait_until(figures_agree, 2 * EVERY_S + 10)
        (found,) = agreed
        assert found["hcache_restored_tokens_total"][1] == found["hcache_found_tokens_total"][1] == restored
        assert found["hcache_looked_up_tokens_total"][1] > 4 * restored
        assert found["hcache_load_seconds_count"][1] == server.tier_state()["loads_accepted"] == 1
        assert found["hcache_held_seconds_count"][1] == server.tier_state()["requests_held"]
        assert found["hcache_held_seconds_sum"][1] == pytest.approx(server.tier_state()["requests_held_s"], abs=0.001)
        labels, value = found["hcache_info"]
        assert value == 1
        assert f'version="{__version__}"' in labels
        assert f'representation="{server.tier_state()["representation"]}"' in labels
        assert 0 < found["hcache_prefetcher_uptime_seconds"][1] < 3600
        labels, value = found["hcache_prefetcher_up"]
        assert value == 1
        assert 'tp_rank="0"' in labels
        assert f'model_name="{server.model}"' in labels
