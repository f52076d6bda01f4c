"""How the bench of layer-wise recompute puts its measured parts together."""

from __future__ import annotations

import pytest

from bench.layerwise import READING, Parts, Times, choices, compare, parts_of

# A layer prefills in 1 s and restores in 0.25 s; nothing in between is cheaper than in proportion.
LINEAR = Parts(pages=32, fixed_s=0.0, split_s=(-0.75, 1.0))


def test_reading_adds_up_or_hides() -> None:
    reads, work = [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]
    assert READING["before"](reads, work) == 7
    assert READING["beneath"](reads, work) == 5, "the last layer is read after 4 s"
    assert READING["hidden"](reads, work) == 4
    assert READING["beneath"]([0.0, 0.0, 0.0], work) == READING["hidden"]([0.0, 0.0, 0.0], work) == 3


def test_every_choice_contains_the_two_ends() -> None:
    found = {choice[1:]: choice.seconds for choice in choices(LINEAR, 8, 4.0, "before")}
    assert len(found) == 9 * 33
    assert found[0, 0.0] == found[8, 1.0] == pytest.approx(8.0)
    assert found[0, 1.0] == pytest.approx(4.0 + 2.0)
    assert found[4, 1.0] == pytest.approx(2.0 + 4.0 + 1.0)


def test_with_nothing_to_hide_and_tokens_alike_layers_gain_nothing() -> None:
    for reading in (0.0, 0.1, 4.0):
        for how in ("before", "hidden"):
            assert compare(LINEAR, 32, reading, how)["gain"] == pytest.approx(1.0, abs=0.02), "but for the grain"


def test_layers_gain_where_the_last_tokens_are_dearer_or_the_first_layer_is_waited_for() -> None:
    dearer_last = Parts(32, 0.0, (-0.25, -0.5, 1.0))
    hidden = compare(dearer_last, 32, 1.0, "hidden")
    assert hidden["gain"] > 1.02
    assert hidden["either"]["recomputed_layers"] > 0
    few, many = (compare(LINEAR, layers, 1.0, "beneath")["gain"] for layers in (8, 32))
    assert few > many > 1


def test_parts_are_found_again() -> None:
    times: Times = {("split", 512): [3.0, 3.2]}
    for depth in (2, 4, 6, 8):
        times["prefill", depth] = [0.5 + depth, 9.0]
        times["restore", depth] = [9.0, 0.5 + depth / 4]
    for tokens in (256, 512, 768):
        times["part", tokens] = [0.5 + 8 * 0.25 * tokens / 1024]
        times["rest", tokens] = [1.5 * 8 * (1 - tokens / 1024)]
        times["start", tokens] = [0.5 + 8 * tokens / 1024]
    parts, errors = parts_of(1024, times, masked=False)
    assert (parts.pages, parts.fixed_s, parts.prefill_s) == pytest.approx((16, 0.5, 1.0))
    assert parts.split_s == pytest.approx((0.0, -0.75, 1.0), abs=1e-9)
    assert parts_of(1024, times, masked=True)[0].split_s[0] < -0.1
    assert errors["split_error"] == pytest.approx(5.5 / 3.0)
    assert errors["lines_error"] == pytest.approx(0, abs=1e-9)
    assert errors["parabola_error"] == pytest.approx(0, abs=1e-9)
