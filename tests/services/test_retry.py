"""When a service is dialled again, and when not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.services.retry import BREAKER_FAILURES, PROBE_SECS, Backoff, Breaker, Limiter, Patience, Verdict, verdict


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
