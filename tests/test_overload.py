"""Overload in short (O1): what must hold on any machine, however busy. Figures: `python -m tests.overload`."""

from __future__ import annotations

from tests import overload


async def test_o1_three_times_the_calls_cost_those_inside_no_frame() -> None:
    figures = await overload.run(admitted=6, secs=0.7, windows=1)
    assert 6 == figures["admitted"]
    assert [] == figures["losses"]
    assert [] == figures["wrong_answers"]
    assert figures["offered_after"] >= 6
    assert figures["frames_each_way"] > 300
