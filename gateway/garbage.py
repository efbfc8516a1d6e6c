"""When Python's garbage collector may hold up a process that serves calls. For processes of our own: `Server` never asks for it.

What a call has had is freed as it ends, without the collector (`tests/test_garbage.py`). That is there for what libraries and
mistakes leave in cycles. By itself it looks through what is new when there is much more than there was, so that while calls come
and go a hundred thousand objects may count as new, and through everything that lives now and then: pauses that callers hear. Here
it looks through what is new many times a second, which is little each time, and through the rest when no call is live, or seldom;
what is there from the start is not looked at again.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

YOUNG_SECS, AT_REST_SECS = 0.025, 0.5
"""How often what is new is looked at while calls are live, and while none is; every other time with what was new the time before.
What is left then is for a sweep."""

MOST_YOUNG, NEVER = 50_000, 1_000_000_000
"""More new objects than that are looked at in between: the event loop is held up."""

IDLE_SECS = 10.0
"""Between sweeps while no call is live. They take a few milliseconds."""

BUSY_SECS = 600.0
"""Between sweeps while calls are live, twice that in an onrush: each holds them up, a hundred calls by 3 to 8 ms, four hundred
by 50."""

RUSH = 1000
"""More objects in YOUNG_SECS than there were: a few new calls."""


def settle() -> None:
    """Once everything is there that stays: look through it for the last time. What has come since, when called again."""
    gc.collect()
    gc.freeze()
    if _by_generations():
        gc.set_threshold(MOST_YOUNG, NEVER, NEVER)


async def tidy(live: Callable[[], int]) -> None:
    """Forever, after `settle`: look through what has come since, with so many calls `live`."""
    loop = asyncio.get_running_loop()
    swept_at = loop.time()
    while _by_generations():
        await asyncio.sleep(YOUNG_SECS if live() else AT_REST_SECS)
        rush = gc.get_count()[0] > RUSH
        gc.collect(0)
        await asyncio.sleep(YOUNG_SECS if live() else AT_REST_SECS)
        wait_secs = BUSY_SECS * (1 + rush) if live() else IDLE_SECS
        if loop.time() - swept_at < wait_secs:
            gc.collect(1)
        else:
            gc.collect()
            swept_at = loop.time()


def _by_generations() -> bool:
    """Whether the collector looks through all that lives in one go. Where it does that bit by bit, it knows best itself."""
    return gc.get_threshold()[2] > 0
