from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.paper import GOAL, Row, mean_error, rows_of
from bench.report import RESULTS
from bench.testbeds import REASONS, Constants


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return rows_of(Constants())


def test_the_papers_figures_are_reproduced(rows: list[Row]) -> None:
    assert mean_error(rows) <= GOAL
    ranges = [one for one in rows if one.end == "low"]
    for low in ranges:
        high = next(one for one in rows if (one.figure, one.end) == (low.figure, "high"))
        assert low.published < high.published
        assert low.simulated <= high.simulated


def test_every_published_figure_has_a_row(rows: list[Row]) -> None:
    published = {1.27, 1.90, 2.21, 3.57, 1.62, 1.93, 2.66, 5.73, 1.92, 2.40, 1.04, 1.34, 1.35, 1.64, 1.13, 2.19, 0.5}
    assert {one.published for one in rows} == published


def test_what_is_off_by_more_than_the_goal_is_explained(rows: list[Row]) -> None:
    for one in rows:
        assert one.rel_err <= GOAL or len(one.note) > 100, one.figure


def test_the_simulated_values_follow_from_the_constants(rows: list[Row]) -> None:
    changed = rows_of(replace(Constants(), gemm_efficiency=0.35, drive_bytes_per_s=2e9, host_bytes=150e9))
    same = [before.figure for before, after in zip(rows, changed, strict=True) if before.simulated == after.simulated]
    assert same == ["bytes of an activation block over a KV block"]


def test_every_constant_has_its_reason_and_the_saved_result_is_of_this_code(rows: list[Row]) -> None:
    assert set(vars(Constants())) <= set(REASONS)
    saved = json.loads((RESULTS / "paper.json").read_text())
    assert saved["mean_abs_rel_err"] == pytest.approx(mean_error(rows), rel=1e-6)
    assert [one["simulated"] for one in saved["rows"]] == pytest.approx([one.simulated for one in rows], rel=1e-6)
