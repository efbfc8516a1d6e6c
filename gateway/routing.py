"""Which route a call takes. Pure: patterns and numbers in, a route or nothing out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache

from gateway.settings import Route


def match(routes: Iterable[Route], *, provider: str, called: str = "", caller: str = "") -> Route | None:
    """The first route whose every given field fits the call, or None: then nobody serves it.

    `provider` is the name in the configuration. Patterns know `*` (any text) and `?` (one character). A leading `+` counts
    on neither side (Plivo sends none), nor does case (SIP URIs). An unknown number ("") only fits the pattern `*`.
    """
    for route in routes:
        if route.provider in (None, provider) and _fits(route.called, called) and _fits(route.caller, caller):
            return route
    return None


def _fits(pattern: str | None, number: str) -> bool:
    if pattern is None or pattern == "*":
        return True
    number = number.strip().removeprefix("+")
    return bool(number) and _compiled(pattern).match(number) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    # fnmatch also knows [classes]; `[` is literal here, as in sip:bot@[2001:db8::1]. Its translation does not backtrack.
    return re.compile(translate(pattern.removeprefix("+").replace("[", "[[]")), re.IGNORECASE)
