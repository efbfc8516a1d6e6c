"""One timer wakes all streams: never early, none forgotten."""

from __future__ import annotations

import asyncio
import random

from gateway.clock import TICK_SECS, Clock


async def test_everyone_is_woken_once_in_time_and_never_early() -> None:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    randomness = random.Random(1)
    woken: dict[int, float] = {}
    due = {n: loop.time() + randomness.uniform(-0.01, 0.2) for n in range(500)}
    for n, when in due.items():
        clock.wake_at(when, lambda n=n: woken.setdefault(n, loop.time()))
    await asyncio.sleep(0.3)
    assert set(due) == set(woken)
    assert all(woken[n] >= when - 1e-6 for n, when in due.items())
    assert not clock._due, "nothing is kept"


async def test_an_earlier_wish_moves_the_timer_forward() -> None:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    woken: list[str] = []
    clock.wake_at(loop.time() + 60, lambda: woken.append("late"))
    clock.wake_at(loop.time() + 2 * TICK_SECS, lambda: woken.append("early"))
    await asyncio.sleep(0.1)
    assert ["early"] == woken


async def test_waking_may_ask_to_be_woken_again() -> None:
    loop = asyncio.get_running_loop()
    clock = Clock(loop)
    times: list[float] = []

    def again() -> None:
        times.append(loop.time())
        if len(times) < 3:
            clock.wake_at(loop.time() + 0.01, again)

    clock.wake_at(loop.time(), again)
    await asyncio.sleep(0.15)
    assert 3 == len(times)
