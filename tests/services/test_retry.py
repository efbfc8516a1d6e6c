"""When a service is dialled again, and when not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.services.retry import (
    BREAKER_FAILURES,
    PROBE_SECS,
    STABLE_SECS,
    Backoff,
    Breaker,
    Limiter,
    Patience,
    Redial,
    Verdict,
    verdict,
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (1000, Verdict.DONE),
        (1005, Verdict.DONE),
        *((code, Verdict.RETRY) for code in (1001, 1002, 1006, 1007, 1009, 1011, 1012, 1013, 4008, 4009, 3000, 4999)),
        *((code, Verdict.FINAL) for code in (1008, 4400, 4001, 4003, 4404, 4409)),
        (4029, Verdict.NEXT),
    ],
)
def test_the_table_of_close_codes(code: int, expected: Verdict) -> None:
    assert expected is verdict(code)


@settings(deadline=None)  # other tests run beside this one
@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=40))
def test_delays_are_full_jitter_between_nothing_and_two_seconds(chances: list[float]) -> None:
    backoff = Backoff()
    for attempt, chance in enumerate(chances):
        assert pytest.approx(chance * min(2.0, 0.05 * 2**attempt)) == backoff.delay(chance)
    backoff.reset()
    assert backoff.delay(0.999) < 0.05


def flap(chance: random.Random, secs: float, change_secs: tuple[float, float]) -> tuple[list[float], float]:
    """One call on a service that comes and goes, by a clock of ours: when it connects, and the longest time it is without."""
    changes = [0.0]
    while changes[-1] < secs + 10:
        changes.append(changes[-1] + chance.uniform(*change_secs))
    redial, now, connects, longest = Redial(), 0.0, [0.0], 0.0
    while now < secs:
        now = lost = next(at for at in changes[1::2] if at > now)  # up from 0 on, so that it goes at every other change
        redial.lost(now, chance.random(), stable=now - connects[-1] >= STABLE_SECS)
        while True:
            wait, by_the_clock = redial.pause(now, chance.random())
            up = next((at for at in changes[::2] if at > now), now + wait)
            now += wait if by_the_clock else min(wait, up - now + chance.uniform(0, PROBE_SECS))  # a scout sees that it is up
            if sum(at <= now for at in changes) % 2:
                break
        connects.append(now)
        longest = max(longest, now - lost)
    return [at for at in connects if at < secs], longest


@pytest.mark.parametrize("change_secs", [(0.2, 0.9), (0.2, 0.2), (0.01, 0.05), (0.9, 0.9)])
def test_d3_a_call_connects_less_than_once_a_second_to_a_service_that_flaps(change_secs: tuple[float, float]) -> None:
    """From the first connection on, also in a short window; and the rest is one that a ring bridges."""
    calls = [flap(random.Random(seed), 60.0, change_secs) for seed in range(200)]
    for window in (4.0, 10.0, 60.0)[change_secs[1] < 0.5 :]:  # the first three connections cost nothing
        mean = sum(sum(at < window for at in connects) for connects, _ in calls) / len(calls) / window
        assert mean <= 1.0, window
    assert max(longest for _, longest in calls) < 4.0
    assert min(len(connects) for connects, _ in calls) > 15, "and it is not left alone for good"


def test_a_stable_service_that_is_lost_is_dialled_at_once_and_has_news_listened_to() -> None:
    redial = Redial()
    for n in range(10):
        redial.lost(n * 10.0, 0.999, stable=True)
        secs, by_the_clock = redial.pause(n * 10.0, 0.999)
        assert (True, False) == (secs < 0.05, by_the_clock)


def test_the_breaker_opens_after_five_failures_and_lets_one_probe_through() -> None:
    breaker = Breaker()
    for n in range(BREAKER_FAILURES):
        assert breaker.allows(n * 0.1)
        breaker.failed(n * 0.1)
    assert not breaker.allows(0.4)
    assert breaker.allows(0.4 + PROBE_SECS)
    assert not breaker.allows(0.4 + PROBE_SECS), "a probe is under way"
    breaker.failed(0.6)
    assert not breaker.allows(0.6)
    assert breaker.allows(0.6 + PROBE_SECS)
    assert breaker.succeeded()
    assert breaker.allows(0.8)
    assert breaker.allows(0.8)


def test_failures_that_lie_long_apart_do_not_open_the_breaker() -> None:
    breaker = Breaker()
    for n in range(20):
        breaker.failed(n * 3.0)
    assert not breaker.is_open(57.0)


@settings(deadline=None)  # other tests run beside this one
@given(st.lists(st.floats(0, 0.5), max_size=200))
def test_never_more_than_the_rate_and_one_burst(steps: list[float]) -> None:
    limiter, now, let = Limiter(10, 5), 0.0, 0
    for step in steps:
        now += step
        let += limiter.take(now)
    assert let <= 5 + now * 10 + 1e-6


@settings(deadline=None)  # other tests run beside this one
@given(st.integers(1, 100))
def test_reservations_are_spaced_by_the_rate(count: int) -> None:
    limiter = Limiter(50, 10)
    waits = [limiter.reserve(0.0) for _ in range(count)]
    assert pytest.approx(max(0.0, (count - 10) / 50)) == waits[-1]
    limiter.give_back()
    assert pytest.approx(max(0.0, (count - 10) / 50)) == limiter.reserve(0.0)


def test_patience_adds_up_outages_until_the_service_was_stable() -> None:
    patience = Patience(10.0, 0.0)
    assert 7.0 == patience.left(3.0)
    assert 3.0 == patience.back(3.0)
    assert not patience.lost(4.0)
    assert 5.0 == patience.left(6.0)
    patience.back(6.0)
    assert 5.0 == patience.left(100.0)
    assert patience.lost(11.0), "five seconds are stable"
    assert 10.0 == patience.left(11.0)
    assert patience.left(21.0) <= 0
