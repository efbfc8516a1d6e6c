"""Who looks at a connection's first bytes: a request that is to be refused is refused here, before the HTTP server is asked at
all, be it an upgrade whose token opens nothing, an upgrade or a webhook that the account has not signed, or a path that leads
nowhere.

That is what a flood is made of, and a quarter of the price of the same refusal by the HTTP server. What comes in pieces is waited
for, a moment long. Everything else is handed on as it came, whatever is not plain at first sight too; the server checks again, so
that nothing depends on how bytes are cut.

No address is remembered for what it was refused. Whoever is refused for the thousandth time pays the price of the first, and that
is the lowest there is: carriers come from few addresses, through load balancers, and all of them from one where a proxy is not
trusted, so a good request has to be told from a bad one by its token and signature in any case. All that a table of addresses
could save is the answer (4 to 7 of 55 µs); but nginx takes a server that does not answer for a dead one, so that anybody could
have taken the gateway from the carriers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

FIRST_BYTES_SECS = 2.0
"""A connection must say something by then; what it has said in pieces by then is handed on."""

MOST_WAITING = 4096
"""Connections of which nothing is known yet. Who is good speaks at once: of more, the oldest has to go."""

_MOST_HELD_BYTES = 16 * 1024
_MOST_PIECES = 8

_LINE = re.compile(rb"([A-Z]{3,7}) (/[\x21-\x22\x24-\x7e]*) HTTP/1\.1")
_PLACE = re.compile(rb"/([^/]+)/(?:(answer|action(?:/[^/]+)?|status|document/[^/]+)|stream(?:/([^/]+))?)")
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,400}")
_LENGTH = re.compile(r"[0-9]{1,5}")
_ODD = frozenset({"transfer-encoding", "expect"})
_HEADER = re.compile(rb"([A-Za-z0-9-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)?[ \t]*")


class Visitor(NamedTuple):
    """A carrier that wants a WebSocket, or, where there is no token, an answer. Header names are lower case."""

    provider: str
    token: str | None
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


class Sight(Enum):
    """What bytes are that are no visitor's."""

    PIECE = 1
    """There is more to come."""
    NOWHERE = 2
    """A path that leads nowhere."""
    UNCLEAR = 3
    """The HTTP server will know."""


class Porters:
    """A protocol factory for a listener. `close` ends those connections that have not been handed on."""

    def __init__(self, behind: Callable[[], asyncio.Protocol], admits: Callable[[Visitor], bool]) -> None:
        """`behind` makes the HTTP server's protocols. `admits(visitor)`: is it worth asking there?"""
        self.behind = behind
        self.admits = admits
        self.waiting: dict[asyncio.Transport, None] = {}
        """The oldest first."""

    def __call__(self) -> asyncio.Protocol:
        return _Porter(self)

    def close(self) -> None:
        for transport in [*self.waiting]:
            transport.abort()


class _Porter(asyncio.Protocol):
    __slots__ = ("_held", "_pieces", "_porters", "_timer", "_transport")

    def __init__(self, porters: Porters) -> None:
        self._porters = porters
        self._held = b""
        self._pieces = 0
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        waiting = self._porters.waiting
        self._transport = transport  # type: ignore[assignment]  # a listener's are always both ways
        waiting[self._transport] = None
        self._timer = asyncio.get_running_loop().call_later(FIRST_BYTES_SECS, self._out_of_time)
        if len(waiting) > MOST_WAITING:
            oldest = next(iter(waiting))
            del waiting[oldest]
            oldest.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._porters.waiting.pop(self._transport, None)

    def data_received(self, data: bytes) -> None:
        self._pieces += 1
        data = self._held + data if self._held else data
        seen = _read(data)
        if seen is Sight.PIECE and self._pieces < _MOST_PIECES and len(data) < _MOST_HELD_BYTES:
            self._held = data
            return
        self._timer.cancel()
        self._porters.waiting.pop(self._transport, None)
        if seen is Sight.NOWHERE:
            self._refuse("404 Not Found")
        elif isinstance(seen, Visitor) and not self._porters.admits(seen):
            self._refuse("403 Forbidden")
        else:
            self._hand_on(data)

    def _out_of_time(self) -> None:
        self._porters.waiting.pop(self._transport, None)
        if self._held:
            self._hand_on(self._held)
        else:
            self._transport.abort()

    def _refuse(self, status: str) -> None:
        """To the letter what the HTTP server answers, so that nobody can tell who has refused."""
        self._transport.write(
            f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nDate: {rfc822_formatted_time()}\r\nServer: {SERVER_SOFTWARE}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        self._transport.close()

    def _hand_on(self, data: bytes) -> None:
        server = self._porters.behind()
        self._transport.set_protocol(server)
        server.connection_made(self._transport)
        server.data_received(data)


def _read(data: bytes) -> Visitor | Sight:
    """Who it is, if the bytes are one whole request that everybody reads in the same way."""
    head, end, body = data.partition(b"\r\n\r\n")
    line, more, fields = head.partition(b"\r\n")
    asked = _LINE.fullmatch(line)
    if not end:
        plain = data.isascii() and (asked if more else b"\n" not in line)
        return Sight.PIECE if plain else Sight.UNCLEAR
    if asked is None or b"%" in asked[2]:
        return Sight.UNCLEAR
    place = _PLACE.fullmatch(asked[2].partition(b"?")[0])
    if place is None:
        return Sight.NOWHERE
    headers: dict[str, str] = {}
    for text in fields.split(b"\r\n"):
        header = _HEADER.fullmatch(text)
        if header is None or (name := header[1].decode().lower()) in headers:
            return Sight.UNCLEAR
        headers[name] = (header[2] or b"").decode()
    method, provider, path, token = asked[1].decode(), place[1], asked[2].decode(), place[3]
    upgrade = headers.get("upgrade", "").lower()
    if _NAME.fullmatch(provider) is None or not headers.keys().isdisjoint(_ODD):
        return Sight.UNCLEAR
    if place[2] is None:
        if method != "GET" or token is None or upgrade != "websocket" or _TOKEN.fullmatch(token) is None or "?" in path:
            return Sight.UNCLEAR
        return Visitor(provider.decode(), token.decode(), method, path, headers)
    length = headers.get("content-length", "0")
    if method not in ("GET", "POST") or upgrade or _LENGTH.fullmatch(length) is None or int(length) >= _MOST_HELD_BYTES:
        return Sight.UNCLEAR
    if len(body) < int(length):
        return Sight.PIECE
    return Visitor(provider.decode(), None, method, path, headers, body) if len(body) == int(length) else Sight.UNCLEAR
