"""Packets that are really lost (T6). Figures: `python -m tests.packet_loss`."""

from __future__ import annotations

import pytest

from tests import netns, packet_loss
from tests.packet_loss import ALL, THIN, Lines

pytestmark = pytest.mark.skipif(bool(netns.missing()), reason=netns.missing())


async def test_t6_one_packet_in_twenty_is_lost_and_no_frame() -> None:
    figures = await packet_loss.run(Lines(5, "both", 20, 10), calls=3, secs=1.5)
    assert figures["packets_dropped"] > 0
    assert figures["retransmitted"] > 0
    assert figures["frames_each_way"] >= 3 * 150
    assert [] == figures["losses"]
    assert [] == figures["gaps"]
    assert 0 == figures["calls_closed"]
    assert set() == set(figures["warnings"]) & packet_loss.GIVEN_UP


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lines", ALL, ids=str)
async def test_t6_no_frame_is_lost_or_out_of_order_however_bad_the_lines(lines: Lines) -> None:
    figures = await packet_loss.run(lines, calls=8, secs=20.0)
    assert figures["packets_dropped"] > figures["packets"] * lines.loss_percent / 200
    assert figures["frames_each_way"] >= 8000  # half of it where calls may be given up
    assert [] == packet_loss.wrong(figures)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_t6_a_thin_and_lossy_line_to_the_service_is_late_and_whole() -> None:
    figures = await packet_loss.run(THIN, calls=1, secs=4.0)
    assert [] == packet_loss.wrong(figures)
    assert figures["p99_ms"] > 1000, "the line is thinner than the audio"
