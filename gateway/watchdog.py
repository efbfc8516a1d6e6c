"""Is the event loop on time, and is there room for more? A timer in the loop measures how late it is; a thread beside it says
what it is blocked by, and looks once a second at what is used of the host."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from math import ceil
from time import monotonic, process_time
from types import FrameType

from structlog.typing import FilteringBoundLogger

from gateway.buckets import Buckets
from gateway.host import LOOK_SECS, Meter

TICK_SECS = 0.05
BLOCKED_SECS = 0.1
"""A loop that is this late is blocked: a call would hear it."""

OVERLOADED_SECS = 0.25
"""The lag that one tick in a hundred may have before new calls are turned away."""

RECENT_SECS = 10.0
TELL_SECS = 1.0
"""One line a second tells of a blocked loop, however often it is."""

MOST_STACK = 30
"""Calls of a blocked loop's stack that are told, the innermost first."""

LAG_SECS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Watchdog:
    """Watches the loop that it is started in. `start` and `stop` it there; both may be called again."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self.lag = Buckets(LAG_SECS)
        """How late the loop was, twenty times a second."""
        self.blocked = 0
        """How often it was late by more than BLOCKED_SECS."""
        self.meter = Meter()
        self._log = log
        self._recent: deque[tuple[float, float]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._thread: threading.Thread | None = None
        self._watched = 0
        self._done = threading.Event()
        self._due = 0.0
        self._reported = -1.0  # the due time of the tick that was missed when the thread last looked up
        self._told_at = float("-inf")
        self._untold = 0

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        if self._thread is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._done.clear()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._thread is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._done.set()
        self._thread.join()
        self._thread = None

    def worst(self) -> float:
        """The greatest lag of the last RECENT_SECS."""
        return max((lag for _, lag in self._recent), default=0.0)

    def overloaded(self) -> bool:
        """Whether more than one tick in a hundred of the last RECENT_SECS was late by more than OVERLOADED_SECS."""
        late = sum(lag > OVERLOADED_SECS for _, lag in self._recent)
        return self.running and late > ceil(len(self._recent) / 100)

    # --- in the loop ---

    def _arm(self) -> None:
        self._due = monotonic() + TICK_SECS
        if self._loop is not None:
            self._timer = self._loop.call_later(TICK_SECS, self._tick)

    def _tick(self) -> None:
        now, due = monotonic(), self._due
        lag = max(0.0, now - due)
        self.lag.add(lag)
        self._recent.append((now, lag))
        while self._recent[0][0] < now - RECENT_SECS:
            self._recent.popleft()
        if lag > BLOCKED_SECS:
            self.blocked += 1
            if self._reported == due:
                self._log.info("event_loop_back", lag_ms=round(lag * 1000))
            else:  # whatever blocked it let no other thread run either, or was over before the thread looked
                self._tell(now, lag, [])
        self._arm()

    # --- in the thread ---

    def _watch(self) -> None:
        looked_at = float("-inf")
        while not self._done.wait(TICK_SECS / 2):
            now, due = monotonic(), self._due
            if now - looked_at >= LOOK_SECS:
                looked_at = now
                self.meter.look(now, process_time())
            if now - due > BLOCKED_SECS and self._reported != due:
                stack = _stack(sys._current_frames().get(self._watched))
                if self._due == due:  # else it is the stack of something else by now
                    self._reported = due
                    self._tell(now, now - due, stack)

    def _tell(self, now: float, lag: float, stack: list[str]) -> None:
        if now - self._told_at < TELL_SECS:
            self._untold += 1
            return
        self._told_at = now
        self._log.warning("event_loop_blocked", lag_ms=round(lag * 1000), blocked_in=stack, untold=self._untold)
        self._untold = 0


def _stack(frame: FrameType | None) -> list[str]:
    """What a thread is doing, the innermost first."""
    lines: list[str] = []
    while frame is not None and len(lines) < MOST_STACK:
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
        frame = frame.f_back
    return lines
