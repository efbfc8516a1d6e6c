"""Soak in short (O7, O8). A day of calls and ten thousand of them: `python -m tests.soak`."""

from __future__ import annotations

import pytest

from tests import soak


@pytest.mark.timeout(120)
def test_o7_the_path_keeps_nothing_of_a_frame() -> None:
    figures = soak.path(calls=4, hours=0.04)
    assert 57_600 == figures["frames"]
    # A million frames that were kept would be millions of blocks. Pages are coarse over so short a time.
    assert figures["blocks_per_million_frames"] < 20_000
    assert figures["bytes_per_million_frames"] < 5_000_000


@pytest.mark.timeout(120)
async def test_o8_nothing_is_left_of_calls_that_are_over() -> None:
    figures = await soak.calls(40, at_once=10)
    assert [] == figures["losses"]
    assert {} == figures["residue_1"]
    assert {} == figures["residue_2"]
    assert figures["second_over_first"] < 0.05
