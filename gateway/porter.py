"""Who looks at a connection's first bytes: an upgrade whose token opens nothing, or whose signature is not the account's, is
refused here, before the HTTP server is asked at all.

That is what a flood is made of, and a quarter of the price of the same refusal by the HTTP server. Everything else is handed on
as it came, whatever is not plain at first sight too; the server checks again, so that nothing depends on how bytes are cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE

FIRST_BYTES_SECS = 2.0
"""A connection must say something by then."""

_STREAM = re.compile(rb"GET (/([A-Za-z0-9_-]{1,64})/stream/([A-Za-z0-9_-]{1,400})) HTTP/1\.1")
_HEADER = re.compile(rb"([A-Za-z0-9-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)?[ \t]*")


class Visitor(NamedTuple):
    """A carrier that wants a WebSocket; `path` is what it asks for, header names are lower case."""

    provider: str
    token: str
    path: str
    headers: Mapping[str, str]


class Porters:
    """A protocol factory for a listener. `close` ends those connections that have not been handed on."""

    def __init__(self, behind: Callable[[], asyncio.Protocol], admits: Callable[[Visitor], bool]) -> None:
        """`behind` makes the HTTP server's protocols. `admits(visitor)`: is it worth asking there?"""
        self.behind = behind
        self.admits = admits
        self.waiting: set[asyncio.Transport] = set()

    def __call__(self) -> asyncio.Protocol:
        return _Porter(self)

    def close(self) -> None:
        for transport in [*self.waiting]:
            transport.abort()


class _Porter(asyncio.Protocol):
    __slots__ = ("_porters", "_timer", "_transport")

    def __init__(self, porters: Porters) -> None:
        self._porters = porters
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a listener's are always both ways
        self._porters.waiting.add(self._transport)
        self._timer = asyncio.get_running_loop().call_later(FIRST_BYTES_SECS, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._porters.waiting.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        porters, transport = self._porters, self._transport
        self._timer.cancel()
        porters.waiting.discard(transport)
        visitor = _visitor(data)
        if visitor is not None and not porters.admits(visitor):
            transport.write(_forbidden())
            transport.close()
            return
        server = porters.behind()
        transport.set_protocol(server)
        server.connection_made(transport)
        server.data_received(data)


def _visitor(data: bytes) -> Visitor | None:
    """Who it is, if the bytes are an upgrade's whole head that everybody reads in the same way."""
    line, _, rest = data.partition(b"\r\n")
    head, end, _ = rest.partition(b"\r\n\r\n")
    stream = _STREAM.fullmatch(line)
    if stream is None or not end:
        return None
    headers: dict[str, str] = {}
    for text in head.split(b"\r\n"):
        header = _HEADER.fullmatch(text)
        if header is None or (name := header[1].decode().lower()) in headers:
            return None
        headers[name] = (header[2] or b"").decode()
    if headers.get("upgrade", "").lower() != "websocket":
        return None
    return Visitor(stream[2].decode(), stream[3].decode(), stream[1].decode(), headers)


def _forbidden() -> bytes:
    """To the letter what the HTTP server answers, so that nobody can tell who has refused."""
    return (
        f"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nDate: {rfc822_formatted_time()}\r\nServer: {SERVER_SOFTWARE}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()
