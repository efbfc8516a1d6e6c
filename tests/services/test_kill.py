"""A service that is killed again and again under many calls: nothing is lost, nothing comes twice, in either direction."""

from __future__ import annotations

import asyncio
import random

import pytest
import structlog

from tests.services.lines import LedgerService, calls


async def rounds(count: int, kills: int, *, outage: tuple[float, float], up_secs: float) -> list[float]:
    """Kills the service under `count` calls. Returns for each call and kill the milliseconds from the service's return to the
    first frame that reached it."""
    chance = random.Random(7)
    recoveries: list[float] = []
    loop = asyncio.get_running_loop()
    service = LedgerService()
    await service.revive()
    with structlog.testing.capture_logs() as log:
        async with calls(count, service) as lines:
            await asyncio.sleep(up_secs)
            for _ in range(kills):
                await service.kill()
                await asyncio.sleep(chance.uniform(*outage))
                await service.revive()
                back = loop.time()
                await asyncio.sleep(up_secs)
                for ledger in service.ledgers.values():
                    first = next((at for at in ledger.times if at >= back), None)
                    recoveries.append(float("inf") if first is None else (first - back) * 1000)
    await service.kill()
    assert count == len(service.ledgers)
    assert count * kills == len([entry for entry in log if entry["event"] == "service_back"])
    for line in lines:
        ledger = service.ledgers[line.session_id]
        assert [] == ledger.wrong
        assert line.frames == ledger.next
        assert ["stop"] == [text["type"] for text in ledger.told], "and no gap"
        account = ledger.told[0]["account"]
        assert (20 * line.frames, 0) == (account["forwarded"], account["dropped"])
        assert [*range(len(line.spoken))] == line.spoken
        assert len(line.spoken) >= ledger.made - 1
    return sorted(recoveries)


async def test_killed_under_twenty_calls() -> None:
    recoveries = await rounds(20, 2, outage=(0.1, 0.5), up_secs=0.7)
    assert recoveries[-1] < 600, "generous: other tests run beside this one"


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_thousand_kills_over_a_hundred_calls() -> None:
    recoveries = await rounds(100, 10, outage=(0.1, 3.0), up_secs=6.0)
    p50, p99 = recoveries[len(recoveries) // 2], recoveries[len(recoveries) * 99 // 100]
    print(f"recovery of {len(recoveries)} connections: p50 {p50:.0f} ms, p99 {p99:.0f} ms, worst {recoveries[-1]:.0f} ms")
    assert p99 <= 250
