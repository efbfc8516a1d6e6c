"""Histograms: where a value is counted, and what is read off."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.buckets import DURATION_SECS, LATENCY_SECS, WAIT_SECS, Buckets


def test_a_value_counts_below_the_bound_that_it_does_not_exceed() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1, 100.0):
        buckets.add(value)
    assert [2, 2, 2] == buckets.counts
    assert (6, 106.6) == (buckets.count, buckets.sum)


def test_nothing_added_is_no_quantile() -> None:
    assert Buckets(WAIT_SECS).quantile(0.5) is None


@given(st.lists(st.floats(0, 0.999), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_right_to_within_its_bucket(values: list[float], share: float) -> None:
    buckets = Buckets(LATENCY_SECS)
    for value in values:
        buckets.add(value)
    rank = -int(-share * len(values) // 1)
    exact = sorted(values)[rank - 1]
    read = buckets.quantile(share)
    assert read is not None
    upper = next(bound for bound in LATENCY_SECS if exact <= bound)
    lower = max((bound for bound in LATENCY_SECS if bound < upper), default=0.0)
    assert lower <= read <= upper


def test_beyond_the_last_bound_it_is_the_last_bound() -> None:
    buckets = Buckets((1.0,))
    buckets.add(50.0)
    assert 1.0 == buckets.quantile(0.99)


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0, 100)))
def test_merging_is_adding_all(one: list[float], other: list[float]) -> None:
    first, second, both = Buckets(DURATION_SECS), Buckets(DURATION_SECS), Buckets(DURATION_SECS)
    for value in one:
        first.add(value)
        both.add(value)
    for value in other:
        second.add(value)
        both.add(value)
    first.merge(second)
    assert both.counts == first.counts
    assert both.sum == pytest.approx(first.sum)
