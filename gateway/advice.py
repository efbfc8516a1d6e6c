"""What a configuration says that works and is probably not meant. Pure: settings in, paths and sentences out."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from gateway.settings import EchoService, Settings, WebsocketService, host_port, is_loopback

KeyPath = tuple[str | int, ...]

SECRET_CHARACTERS = 32
"""What `openssl rand -hex 16` makes, and what the carriers' own tokens have at least."""

_WILDCARD = re.compile("[*?]")
_FEWEST_DIFFERENT = 8
_LARGEST_SEARCH = 5_000
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*(?P<default>:-[^}]+)?\}|^file:")
_SECRET_QUERY = re.compile(r"(?i)(^|_)(secret|token|password|authorization|key|sig|signature)$")
_ISSUED = re.compile(r"(?i)^(auth_tokens?|signing_keys?)$")

Advice = Iterator[tuple[KeyPath, str]]


class Given(NamedTuple):
    """A value of the file: how it is written there (None: not a scalar), what came out, whether its key says it is a secret."""

    written: str | None
    value: Any
    secret: bool


def warnings(settings: Settings, given: Mapping[KeyPath, Given], *, signed: Sequence[str]) -> Advice:
    """(where, what; what to write instead) for everything that is probably not meant.

    `given` has every value in the file by its path, `signed` the names of providers whose requests are signed.
    """
    yield from _secrets(given)
    yield from _unused(settings)
    yield from _services(settings)
    yield from _routes(settings, signed)
    yield from _listeners(settings)


def _secrets(given: Mapping[KeyPath, Given]) -> Advice:
    for path, (written, value, secret) in given.items():
        if not secret or not isinstance(value, str) or not value or written is None:
            continue
        key = next(part for part in reversed(path) if isinstance(part, str))
        reference = _REFERENCE.search(written)
        if reference is None:
            yield path, f"a secret in the file itself; write {key}: ${{NAME}}, or file:/run/secrets/name"
        elif reference["default"]:
            yield path, "a secret in the file itself, as a default; write ${NAME} alone"
        elif len(value) < SECRET_CHARACTERS:
            hint = "was it copied whole?" if _ISSUED.match(key) else "make one with `openssl rand -hex 32`"
            yield path, f"a secret of {len(value)} characters; {SECRET_CHARACTERS} or more can't be guessed: {hint}"
        elif len(set(value)) < _FEWEST_DIFFERENT:
            yield path, f"a secret of {len(set(value))} different characters; make one with `openssl rand -hex 32`"


def _unused(settings: Settings) -> Advice:
    wanted = {name for route in settings.routes for name in (*route.service, *route.listeners)}
    for name in settings.services:
        if name not in wanted and settings.admin is None:  # else operators may have it listen
            yield ("services", name), "no route leads to it; name it in a route, or take it out"
    asked = {route.provider for route in settings.routes}
    for name in settings.providers:
        if not asked & {None, name}:
            yield ("providers", name), "no route takes its calls, so each ends at once; write a route for it, or take it out"


def _services(settings: Settings) -> Advice:
    for name, service in settings.services.items():
        if not isinstance(service, WebsocketService):
            continue
        parts = urlsplit(service.url)
        if parts.scheme == "ws" and not is_loopback(parts.hostname or ""):
            yield (
                ("services", name, "url"),
                f"calls to {parts.hostname} go in clear text; write wss://, or keep ws:// for a network that nobody else is in",
            )
        for key, value in parse_qsl(parts.query):
            if value and _SECRET_QUERY.search(key):
                yield ("services", name, "url"), f"`{key}` in a URL ends up in logs of others; write authorization: ${{NAME}}"


def _routes(settings: Settings, signed: Sequence[str]) -> Advice:
    for at, route in enumerate(settings.routes):
        if (by := _hidden_by(settings, at)) is not None:
            yield ("routes", at), f"no call comes this far, {by} them all; move it up, or take it out"
        several = len(route.service) > 1
        if route.on_lost == "next" and not several:
            yield ("routes", at, "on_lost"), "there is no next one; give `service` a list, or leave on_lost out"
        for place, name in enumerate(route.service):
            where: KeyPath = ("routes", at, "service", place) if several else ("routes", at, "service")
            if name in route.service[:place]:
                yield where, f"{name} is tried already before; take it out"
            elif any(isinstance(settings.services[before], EchoService) for before in route.service[:place]):
                yield where, "an echo service before it takes every call; put it last"
        unnamed = route.name == f"route-{at}"
        if unnamed and signed and len(settings.routes) > 1:
            yield (
                ("routes", at),
                "a route without a name is known by its place, which a reload or another file can change; write name: …",
            )


def _listeners(settings: Settings) -> Advice:
    public = urlsplit(settings.public_url or "").hostname
    if public and not is_loopback(public):
        for name, entry in settings.providers.items():
            if entry.auth == "none":
                yield ("providers", name, "auth"), f"whoever finds {public} can call; give it its account's `auth_token`"
        clear = settings.tls is None and not settings.trusted_proxies
        if clear and not is_loopback(host_port(settings.listen)[0]):
            yield (
                ("listen",),
                f"{public} is https and this is not: all calls seem to be the proxy's; write its network into trusted_proxies",
            )


# --- which routes another one hides -----------------------------------------------------------------------------------------


def _hidden_by(settings: Settings, at: int) -> str | None:
    """Which earlier routes take everything that this one would (`a and b take`), or None."""
    route = settings.routes[at]
    takers = [
        before for before in settings.routes[:at] if covers(before.called, route.called) and covers(before.caller, route.caller)
    ]
    hiding: list[str] = []
    for provider in [route.provider] if route.provider is not None else settings.providers:
        found = next((before for before in takers if before.provider in (None, provider)), None)
        if found is None:
            return None
        hiding.append(found.label)
    names = [*dict.fromkeys(hiding)]
    return f"{' and '.join(names)} {'takes' if len(names) == 1 else 'take'}" if names else None


def covers(wide: str | None, narrow: str | None) -> bool:
    """Whether every number that fits the pattern `narrow` fits `wide` too; patterns as in `gateway.routing`.

    False also where it would take too long to tell.
    """
    if wide in (None, "*"):
        return True
    if narrow in (None, "*"):
        return False
    return _covers(_plain(str(wide)), _plain(str(narrow)))


@lru_cache(maxsize=4096)
def _plain(pattern: str) -> str:
    return pattern.removeprefix("+").lower()


def _covers(wide: str, narrow: str) -> bool:
    prefix = _WILDCARD.split(wide, maxsplit=1)[0]
    if prefix == wide or not wide.isascii() or not narrow.isascii():
        return wide == narrow
    if not narrow.startswith(prefix):
        return False
    # Walk both patterns side by side: `narrow` may be at one place, `wide` at any of several; a number is told letter by letter.
    letters = {*(wide + narrow)} - {"*", "?"} | {""}  # "": any other
    begin = (0, _closed(wide, [0]))
    seen, waiting = {begin}, deque([begin])
    while waiting:
        place, places = waiting.popleft()
        for here in _closed(narrow, [place]):
            if here == len(narrow) and len(wide) not in places:
                return False
            for letter in letters:
                for after in _step(narrow, [here], letter):
                    state = after, _closed(wide, _step(wide, places, letter))
                    if not state[1]:
                        return False  # whatever comes now fits `narrow` alone
                    if state not in seen:
                        seen.add(state)
                        waiting.append(state)
        if len(seen) > _LARGEST_SEARCH:
            return False
    return True


def _closed(pattern: str, places: Iterable[int]) -> frozenset[int]:
    """The places, and those behind a `*` that stands for nothing."""
    found = set()
    for place in places:
        found.add(place)
        while place < len(pattern) and pattern[place] == "*":
            place += 1
            found.add(place)
    return frozenset(found)


def _step(pattern: str, places: Iterable[int], letter: str) -> list[int]:
    """Where a letter leads to."""
    found = []
    for place in places:
        if place < len(pattern):
            if pattern[place] == "*":
                found.append(place)
            elif pattern[place] == "?" or pattern[place] == letter:
                found.append(place + 1)
    return found
