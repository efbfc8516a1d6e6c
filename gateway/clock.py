"""One clock for all calls: wakes streams whose playout is due, in ticks, so that a thousand calls need one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil

TICK_SECS = 0.005


class Clock:
    """Wakes callers at a time of the event loop's clock, up to one tick late and never early."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: dict[int, list[Callable[[], None]]] = {}
        self._ticks: list[int] = []  # a heap of the keys of _due
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0

    def wake_at(self, when: float, wake: Callable[[], None]) -> None:
        """Call `wake` once at `when`. It must be quick and harmless when it comes for nothing: it can't be taken back."""
        tick = ceil(max(when, self._loop.time()) / TICK_SECS)
        if tick in self._due:
            self._due[tick].append(wake)
        else:
            self._due[tick] = [wake]
            heappush(self._ticks, tick)
        if self._timer is None or tick < self._next:
            self._arm(tick)

    def _arm(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = tick
        self._timer = self._loop.call_at(tick * TICK_SECS, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = int(self._loop.time() / TICK_SECS + 1e-6)
        while self._ticks and self._ticks[0] <= now:
            for wake in self._due.pop(heappop(self._ticks)):
                wake()
        if self._ticks:
            self._arm(self._ticks[0])
