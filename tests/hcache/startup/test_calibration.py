"""Rates from times, and what is kept of them. A real model's are measured by the servers of the end-to-end tests."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_hcache.planner.machine import Machine
from sglang_hcache.startup import calibration
from sglang_hcache.startup.calibration import KeptRates, _fit

MACHINE = Machine("m", 1e12, 2e12, 3e12, 4e9, 5e9, ssd_bytes_per_s=6e9)
ABOUT = {"version": "1", "model": {"layers": 3}, "directories": ["/a"]}


@pytest.mark.parametrize("truth", [(0.01, 1e-4), (0.0, 1e-3)])
def test_two_lengths_tell_what_a_forward_costs(truth: tuple[float, float]) -> None:
    fixed, token = truth
    assert _fit((64, fixed + 64 * token), (512, fixed + 512 * token)) == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(("few_s", "many_s"), [(0.05, 0.04), (0.04, 0.05), (0.001, 0.05)])
def test_a_busy_machine_does_not_make_tokens_free(few_s: float, many_s: float) -> None:
    fixed, token = _fit((64, few_s), (512, many_s))
    assert fixed >= 0
    assert many_s / 512 / 2 <= token <= many_s / 448


def test_one_length_is_enough() -> None:
    assert _fit((64, 0.5), (64, 0.5)) == (0.25, 0.5 / 64 / 2)


def test_what_was_measured_is_kept_for_the_same_server_only(tmp_path: Path) -> None:
    asked: list[Machine] = []

    def measure() -> Machine:
        asked.append(MACHINE)
        return MACHINE

    folder = tmp_path / "calibration"
    assert KeptRates(folder, ABOUT, measure, agree=bool).machine == MACHINE
    assert KeptRates(folder, ABOUT, measure, agree=bool).machine == MACHINE
    assert len(asked) == 1
    KeptRates(folder, {**ABOUT, "version": "2"}, measure, agree=bool)
    assert len(asked) == 2
    for file in folder.glob("*.json"):
        assert file.stat().st_mode & 0o077 == 0
        file.write_text("{ not JSON")
    assert KeptRates(folder, ABOUT, measure, agree=bool).machine == MACHINE
    assert len(asked) == 3


def test_rates_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert KeptRates(tmp_path / "file" / "calibration", ABOUT, lambda: MACHINE, agree=bool).machine == MACHINE


def test_what_was_learned_is_kept_where_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_next_start() -> Machine:
        kept = KeptRates(tmp_path, ABOUT, lambda: pytest.fail("measured again"), agree=bool)
        assert kept.calibrated == MACHINE, "by which the layout is chosen: another one would lose all pages"
        return kept.machine

    def written() -> None:
        for thread in threading.enumerate():
            if thread.name == "hcache-rates":
                thread.join()

    rates = KeptRates(tmp_path, ABOUT, lambda: MACHINE, agree=bool)
    much, little = (replace(MACHINE, bus_bytes_per_s=factor * MACHINE.bus_bytes_per_s) for factor in (0.5, 1.1))
    rates.learned(much)
    written()
    assert at_next_start() == MACHINE, "not so often"
    monkeypatch.setattr(calibration, "_LEARN_EVERY_S", 0.0)
    rates.learned(little)
    written()
    assert at_next_start() == MACHINE
    rates.learned(much)
    written()
    assert at_next_start() == much


def test_with_another_rank_that_has_none_rates_are_measured_again(tmp_path: Path) -> None:
    """Measuring runs the model, which takes all ranks."""
    KeptRates(tmp_path, ABOUT, lambda: MACHINE, agree=bool)
    faster = replace(MACHINE, bus_bytes_per_s=2 * MACHINE.bus_bytes_per_s)
    assert KeptRates(tmp_path, ABOUT, lambda: faster, agree=lambda _: False).machine == faster
    assert KeptRates(tmp_path, ABOUT, lambda: MACHINE, agree=bool).machine == faster
