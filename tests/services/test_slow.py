"""One of many calls has a service that reads nothing: the others do not feel it, and it holds no more than its ring."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from gateway.media import Encoding, MediaFormat
from gateway.settings import WebsocketService
from tests.doubles import FRAMED, RecordingService
from tests.services.lines import LedgerService, Line, calls

WIDE = MediaFormat(Encoding.PCM_F32LE, 48000)
"""192,000 bytes a second: buffers that could hide a stall are full at once."""
RING_MS = 1000


async def stall(link: Any) -> None:
    await link.until(lambda: link.ready)
    await asyncio.sleep(0.05)
    link.stall()


def held_bytes(line: Line) -> int:
    connection = line.link._connection
    if connection is None or line.link._intake is None:
        return 0
    return line.link._ring.audio_bytes + connection.socket.transport.get_write_buffer_size()


async def run(count: int, secs: float, *, stalled: bool) -> tuple[list[float], int]:
    """Milliseconds from the caller's mouth to the service for each frame of the good calls, sorted; and the most bytes that the
    stalled one held."""
    service, held = LedgerService(), 0
    await service.revive()
    async with RecordingService(subprotocol=FRAMED, small_buffers=True, script=stall) as bad:
        others = [WebsocketService(url=bad.url, media_format=WIDE, replay_ms=RING_MS, give_up_secs=0.5)] if stalled else []
        with structlog.testing.capture_logs() as log:
            async with calls(count, service, *others) as lines:
                for _ in range(int(secs / 0.05)):
                    await asyncio.sleep(0.05)
                    held = max([held, *(held_bytes(line) for line in lines[count:])])
                await bad.down()
    await service.kill()
    assert stalled == ("service_slow" in {entry["event"] for entry in log})
    times = []
    for line in lines[:count]:
        ledger = service.ledgers[line.session_id]
        assert ([], line.frames) == (ledger.wrong, ledger.next)
        times += [1000 * (got - said) for said, got in zip(line.times, ledger.times, strict=True)]
    return sorted(times), held


async def test_a_stalled_service_among_twenty() -> None:
    times, held = await run(20, 3.0, stalled=True)
    assert times[len(times) // 2] < 20, "generous: other tests run beside this one"
    assert 192_000 <= held <= 192_000 + 128 * 1024


@pytest.mark.long
@pytest.mark.timeout(200)
async def test_a_stalled_service_among_a_hundred() -> None:
    p99 = {}
    for stalled in (False, True, False, True):
        times, held = await run(100, 15.0, stalled=stalled)
        p99[stalled] = min(p99.get(stalled, 1e9), times[len(times) * 99 // 100])
        print(f"stalled {stalled}: p50 {times[len(times) // 2]:.2f} ms, p99 {times[len(times) * 99 // 100]:.2f} ms, held {held}")
    assert p99[True] <= p99[False] + 1
