"""Routes: the first that fits takes the call."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import match
from gateway.settings import Route


@pytest.mark.parametrize(
    ("pattern", "number", "fits"),
    [
        ("+14155550100", "+14155550100", True),
        ("+14155550100", "14155550100", True),  # Plivo sends no plus
        ("14155550100", "+14155550100", True),
        ("14155550100", "+141555501001", False),
        ("+91*", "919876543210", True),
        ("91*", "+919876543210", True),
        ("91*", "1919876543210", False),
        ("+1415555010?", "+14155550109", True),
        ("+1415555010?", "+1415555010", False),
        ("sip:*@example.com", "sip:alice@example.com", True),
        ("sip:*@example.com", "SIP:Alice@Example.COM", True),
        ("sip:*@example.com", "sip:alice@example.org", False),
        ("sip:bot@[2001:db8::1]", "sip:bot@[2001:db8::1]", True),
        ("[19]*", "14155550100", False),  # classes are no part of the pattern language
        ("1.2", "112", False),
        ("*", "", True),
        ("*", "anonymous", True),
        ("+*", "", False),
        ("?*", "", False),
        ("**", "", False),
        ("*", "a\nb", True),
        ("a?b", "a\nb", True),
    ],
)
def test_pattern(pattern: str, number: str, fits: bool) -> None:
    routes = [Route(service=("a",), called=pattern)]

    assert fits == (match(routes, provider="p", called=number) is not None)
    assert fits == (match([Route(service=("a",), caller=pattern)], provider="p", caller=number) is not None)


def test_first_match_wins_and_absent_fields_match_anything() -> None:
    routes = [
        Route(service=("both",), provider="plivo", called="91*"),
        Route(service=("plivo",), provider="plivo"),
        Route(service=("vip",), caller="+14155550100"),
        Route(service=("rest",)),
    ]

    assert routes[0] is match(routes, provider="plivo", called="919876543210")
    assert routes[1] is match(routes, provider="plivo", called="+14155550100")
    assert routes[2] is match(routes, provider="twilio", called="+91987", caller="+14155550100")
    assert routes[3] is match(routes, provider="twilio")


def test_no_route_fits() -> None:
    assert match([Route(service=("a",), provider="plivo")], provider="twilio") is None
    assert match([], provider="twilio") is None


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_is_a_pattern_that_fits_itself(pattern: str, number: str) -> None:
    routes = [Route(service=("a",), called=pattern)]

    match(routes, provider="p", called=number)
    if number.strip() and number == number.strip() and number.strip("+"):
        assert match([Route(service=("a",), called=number)], provider="p", called=number) is not None


def test_long_hostile_numbers_cost_nothing() -> None:
    routes = [Route(service=("a",), called="*a" * 20 + "b")]
    before = time.perf_counter()

    assert match(routes, provider="p", called="a" * 5000) is None
    assert time.perf_counter() - before < 1
