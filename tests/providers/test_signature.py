"""What the checks of all signatures share: what a log is shown of a URL."""

from __future__ import annotations

import pytest

from gateway.provider import SignedRequest
from providers import _signature

LONG = "https://h.example" + "/of-a-path" * 30


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.example:8443/a?b=1&c#d", "https://h.example:8443/a?b=…&c=…"),
        ("https://h.example/" + "t" * 31, "https://h.example/" + "t" * 31),
        ("https://h.example/" + "t" * 32 + "/x", "https://h.example/…/x"),
        ("https://h.example/a\x1b[31m\nb/é", "https://h.example/a?[31m?b/?"),
        (LONG[:200], LONG[:200]),
        (LONG[:201], LONG[:199] + "…"),
        ("/no/url", "not a URL"),
        ("https://[2001:db8::1/a", "not a URL"),
    ],
)
def test_a_log_is_shown_nothing_secret_and_nothing_long(url: str, shown: str) -> None:
    assert shown == _signature.shown(url)


def test_an_upgrade_says_so() -> None:
    assert _signature.is_upgrade(SignedRequest("GET", "https://h.example/", {"upgrade": " WebSocket "}))
    assert not _signature.is_upgrade(SignedRequest("GET", "https://h.example/", {"upgrade": "h2c"}))
    assert not _signature.is_upgrade(SignedRequest("GET", "https://h.example/"))
