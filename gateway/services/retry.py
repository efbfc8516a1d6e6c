"""When to dial a service again: close codes, backoff, breaker, limiter, patience. Pure: `now` and chance are arguments."""

from __future__ import annotations

from collections import deque
from enum import Enum

FINAL_STATUSES = frozenset({401, 403, 404, 426})
"""Answers to a handshake that the same request will get again."""

FIRST_DELAY_SECS, LONGEST_DELAY_SECS = 0.05, 2.0
STABLE_SECS = 5.0
"""A connection that has lasted so long ends the memory of what failed before it."""

FLAPS = 3
"""A service that was lost so often without having been stable is left alone for a while, also when others say that it is back."""
REST_SECS = 1.25
"""For so long at least, and at most for twice as long: on average a call connects less than once a second."""

BREAKER_FAILURES, BREAKER_WINDOW_SECS = 5, 10.0
PROBE_SECS = 0.05
"""While a service can't be reached, all calls together try it one at a time, this far apart."""

FAILURES_PER_SEC = 50.0
"""Dials a second, over all calls, of services that could not be reached the last time; those that answer count for nothing."""


class Verdict(Enum):
    """What the end of a connection means for the call."""

    DONE = "done"  # the service has finished with the call
    RETRY = "retry"  # dial it again
    NEXT = "next"  # it has no room: try the next of the list
    FINAL = "final"  # dialling again would end the same way


_CLOSE_CODES = {
    1000: Verdict.DONE,
    1005: Verdict.DONE,  # a close frame without a code: `close()` of many libraries
    1008: Verdict.FINAL,
    4400: Verdict.FINAL,
    4001: Verdict.FINAL,
    4003: Verdict.FINAL,
    4404: Verdict.FINAL,
    4409: Verdict.FINAL,
    4029: Verdict.NEXT,
}

REFUSALS = frozenset({1013, 4001, 4003, 4008, 4029, 4400, 4404})
"""Close codes of a service that did not take the call: what it was sent since the connection began is nobody's yet."""


def verdict(close_code: int) -> Verdict:
    """What a close code means. Any code without a meaning of its own is an accident, and accidents are retried."""
    return _CLOSE_CODES.get(close_code, Verdict.RETRY)


class Backoff:
    """Full jitter: a random part of a bound that doubles from 50 ms to 2 s."""

    def __init__(self) -> None:
        self._attempts = 0

    def delay(self, chance: float) -> float:
        """Seconds until the next attempt; `chance` is in [0, 1)."""
        bound: float = min(LONGEST_DELAY_SECS, FIRST_DELAY_SECS * 2 ** min(self._attempts, 16))
        self._attempts += 1
        return bound * chance

    def reset(self) -> None:
        self._attempts = 0


class Redial:
    """When one call dials its service again."""

    def __init__(self) -> None:
        self._backoff = Backoff()
        self._flaps = 0
        self._rests_until = float("-inf")

    def lost(self, now: float, chance: float, *, stable: bool) -> None:
        """The service went away. A stable one is dialled at once; one that flaps has its rest first. `chance` is in [0, 1)."""
        self._flaps = 0 if stable else self._flaps + 1
        if stable:
            self._backoff.reset()
        if self._flaps >= FLAPS:
            self._rests_until = now + REST_SECS * (1 + chance)

    def pause(self, now: float, chance: float) -> tuple[float, bool]:
        """Seconds until the next attempt, and whether it comes by the clock, whatever is heard of the service meanwhile."""
        rest = self._rests_until - now
        return (rest, True) if rest > 0 else (self._backoff.delay(chance), False)


class Breaker:
    """One service, as all calls of this process know it. Open: only one probe at a time is let through."""

    def __init__(self) -> None:
        self._failures: deque[float] = deque(maxlen=BREAKER_FAILURES)
        self._probing = False
        self._probe_at = float("-inf")

    @property
    def failing(self) -> bool:
        """Whether it could not be reached the last time."""
        return bool(self._failures)

    def is_open(self, now: float) -> bool:
        return len(self._failures) == BREAKER_FAILURES and now - self._failures[0] <= BREAKER_WINDOW_SECS

    def allows(self, now: float) -> bool:
        """Whether to dial now; if so, `succeeded`, `failed` or `forget` must follow."""
        if not self.is_open(now):
            return True
        if self._probing or now < self._probe_at:
            return False
        self._probing = True
        return True

    def succeeded(self) -> bool:
        """It answered. Returns whether that is news: something had failed before."""
        news = self.failing
        self._failures.clear()
        self._probing = False
        return news

    def failed(self, now: float) -> None:
        """It can't be reached."""
        self._failures.append(now)
        self._probing = False
        self._probe_at = now + PROBE_SECS

    def forget(self) -> None:
        """The attempt was given up before it came to anything."""
        self._probing = False


class Limiter:
    """A bucket of tokens that fills at `per_sec` up to `burst`."""

    def __init__(self, per_sec: float, burst: float) -> None:
        self._per_sec = per_sec
        self._burst = burst
        self._tokens = burst
        self._at: float | None = None

    def reserve(self, now: float) -> float:
        """Take a token, maybe one of the future. Returns the seconds to wait for it."""
        self._fill(now)
        self._tokens -= 1
        return max(0.0, -self._tokens / self._per_sec)

    def take(self, now: float) -> bool:
        """Take a token if there is one."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def give_back(self) -> None:
        self._tokens = min(self._burst, self._tokens + 1)

    def _fill(self, now: float) -> None:
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._per_sec)
        self._at = now


class Patience:
    """How long a call has been without its service: the sum of all outages since it was last stable."""

    def __init__(self, give_up_secs: float, now: float) -> None:
        self._give_up = give_up_secs
        self._before = 0.0
        self._away_since: float | None = now
        self._back_since = now

    def lost(self, now: float) -> bool:
        """The service went away. Returns whether it had been stable."""
        if self._away_since is not None:
            return False
        stable = now - self._back_since >= STABLE_SECS
        if stable:
            self._before = 0.0
        self._away_since = now
        return stable

    def back(self, now: float) -> float:
        """The service is back. Returns the seconds it was away."""
        away = now - self._away_since if self._away_since is not None else 0.0
        self._before += away
        self._away_since = None
        self._back_since = now
        return away

    def left(self, now: float) -> float:
        """Seconds until the call gives up; 0 or less: now."""
        return self._give_up - self._before - (now - self._away_since if self._away_since is not None else 0.0)
