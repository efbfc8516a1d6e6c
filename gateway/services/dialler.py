"""How services are dialled: one client for all calls of a process, which knows which services can't be reached at the moment."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from socket import IPPROTO_TCP, SO_SNDBUF, SOL_SOCKET, AddressFamily
from typing import Any, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

from gateway.direct import Heartbeat, outlet, release
from gateway.errors import RemoteError, untrace
from gateway.services.framed import SUBPROTOCOL_FRAMED
from gateway.services.native import SUBPROTOCOL_RAW
from gateway.services.retry import FAILURES_PER_SEC, FINAL_STATUSES, PROBE_SECS, Breaker, Limiter
from gateway.settings import WebsocketService
from gateway.tracing import CURRENT

HANDSHAKES = 32
"""Handshakes at once with one service: one that is back is not run over by a thousand calls."""

LARGEST_MESSAGE = 16 * 2**20
"""Bytes of one message from a service; a larger one closes the connection (1009)."""

HEARTBEAT_SECS = 20.0
CLOSE_SECS = 2.0
"""A service that does not answer our close frame in this time is left."""

RESOLVE_SECS = 1.0
"""Name servers that take longer count as down: half of what a connection may take."""

SEND_BUFFER_BYTES, UNSENT_BYTES = 16 * 1024, 8 * 1024
"""What the kernel may hold of a connection, and of that not yet on the wire: audio waits where it can be counted and dropped."""

_TCP_NOTSENT_LOWAT = 25  # Linux; the `socket` module names it from Python 3.12 on


class Offer(NamedTuple):
    """What a handshake shows besides the bearer token."""

    subprotocols: tuple[str, ...] = (SUBPROTOCOL_RAW, SUBPROTOCOL_FRAMED)
    headers: Mapping[str, str] = {}


NATIVE = Offer()
"""The gateway's own protocol."""


class Unreachable(RemoteError):
    """No connection. `final`: the next attempt would end the same way."""

    def __init__(self, text: str, *, final: bool = False) -> None:
        super().__init__(text)
        self.final = final


class Redirected(aiohttp.ClientError):
    """A service answered the handshake with a redirect, which is never followed: it could lead anywhere."""


class ServiceSocket(Heartbeat, aiohttp.ClientWebSocketResponse):
    """A client's socket whose transport can be asked how much waits in it, and cut."""

    def __init__(self, reader: Any, writer: Any, protocol: Any, response: Any, *args: Any, **options: Any) -> None:
        super().__init__(reader, writer, protocol, response, *args, **options)
        self.selected: str | None = response.headers.get("Sec-WebSocket-Protocol")
        """What the service answered; `protocol` is None also where it selected what was not offered."""
        self.transport: asyncio.Transport = writer.transport
        self.write = outlet(self)
        """Send without waiting, however much waits already. Raises ConnectionError."""
        # Whoever sends looks at the level himself; a send that waits would hold up what comes behind it.
        self.transport.set_write_buffer_limits(high=64 * 2**20)
        raw = self.transport.get_extra_info("socket")
        with suppress(OSError, AttributeError):
            raw.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
            raw.setsockopt(IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def abandon(self) -> None:
        """End the connection at once, without a word."""
        self.transport.abort()
        self._response.close()  # or the library complains that nobody has
        release(self)


class LastGoodResolver(AbstractResolver):
    """Asks the system at every attempt, and goes by the last good answer while the name servers are down."""

    def __init__(self, system: AbstractResolver | None = None) -> None:
        self._system = system or DefaultResolver()
        self._good: dict[tuple[str, int, int], list[ResolveResult]] = {}

    async def resolve(self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET) -> list[ResolveResult]:
        key = (host, port, int(family))
        try:
            async with asyncio.timeout(RESOLVE_SECS):
                self._good[key] = await self._system.resolve(host, port, family)
        except (OSError, TimeoutError) as error:
            if key not in self._good:
                raise OSError(None, str(error) or f"no answer for {host} within {RESOLVE_SECS:g} s") from error
        return self._good[key]

    async def close(self) -> None:
        await self._system.close()


class Dialler:
    """Dials services for all calls of a process. Make it in a running loop; `close` it at the end."""

    def __init__(self, user_agent: str, *, resolver: AbstractResolver | None = None) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_refuse_redirect)
        self._resolver = LastGoodResolver(resolver)
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, use_dns_cache=False, resolver=self._resolver),
            trace_configs=[trace],
            headers={"User-Agent": user_agent},
            ws_response_class=ServiceSocket,
        )
        self._breakers: defaultdict[str, Breaker] = defaultdict(Breaker)
        self._handshakes: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(HANDSHAKES))
        self._limiter = Limiter(FAILURES_PER_SEC, FAILURES_PER_SEC)
        self._news = asyncio.Event()
        self._scouts: set[str] = set()
        self._dialling: Counter[str] = Counter()
        self.dials = 0

    async def close(self) -> None:
        await self.http.close()
        await self._resolver.close()

    async def dial(self, name: str, service: WebsocketService) -> ServiceSocket:
        """A connection to the service called `name`. Raises Unreachable."""
        return await self.dial_as(name, service, NATIVE)

    async def dial_as(self, name: str, service: WebsocketService, offer: Offer) -> ServiceSocket:
        """The same, as somebody who offers this. Raises Unreachable."""
        self._dialling[name] += 1
        trace = CURRENT.get()
        if trace is not None:
            offer = offer._replace(headers={**offer.headers, "traceparent": trace.traceparent})
        try:
            async with self._handshakes[name]:
                socket = await self._dial(self._breakers[name], service, offer)
            if trace is not None:
                trace.connected(name)
            return socket
        finally:
            self._dialling[name] -= 1

    def busy(self, name: str) -> bool:
        """Whether calls are being connected to the service called `name`: those that are already can wait with old audio."""
        return self._dialling[name] > 0

    async def _dial(self, breaker: Breaker, service: WebsocketService, offer: Offer) -> ServiceSocket:
        loop = asyncio.get_running_loop()
        if not breaker.allows(loop.time()):
            raise Unreachable(f"{service.url} can't be reached at the moment")
        limited, answered = breaker.failing, False
        try:
            if limited and (wait := self._limiter.reserve(loop.time())):
                await asyncio.sleep(wait)
            self.dials += 1
            socket = await self._connect(service, offer)
            answered = True
        except Unreachable as error:
            answered = error.final
            if not answered:
                breaker.failed(loop.time())
            raise
        finally:
            if answered:
                if limited:
                    self._limiter.give_back()
                if breaker.succeeded():
                    self._announce()
            else:
                breaker.forget()
        return socket

    async def pause(self, name: str, secs: float, *, by_the_clock: bool) -> None:
        """Wait before the service called `name` is dialled again; unless `by_the_clock`, only until it is known to be back.

        One of those who wait, whoever comes first, is the scout and waits no longer than PROBE_SECS.
        """
        if by_the_clock:
            await asyncio.sleep(secs)
            return
        scout = name not in self._scouts
        if scout:
            self._scouts.add(name)
            secs = min(secs, PROBE_SECS * 1.05)
        try:
            async with asyncio.timeout(secs):
                await self._news.wait()
        except TimeoutError:
            pass
        finally:
            if scout:
                self._scouts.discard(name)

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _connect(self, service: WebsocketService, offer: Offer) -> ServiceSocket:
        headers = {**offer.headers}
        if service.authorization:
            headers["Authorization"] = f"Bearer {service.authorization}"
        url = service.url
        try:
            async with asyncio.timeout(service.connect_timeout_secs):
                socket = await self.http.ws_connect(
                    url,
                    protocols=offer.subprotocols,
                    headers=headers,
                    compress=0,
                    max_msg_size=LARGEST_MESSAGE,
                    heartbeat=HEARTBEAT_SECS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECS),
                )
        except TimeoutError:
            raise Unreachable(f"no connection to {url} within {service.connect_timeout_secs:g} s") from None
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 101:
                raise Unreachable(f"{url} answered the WebSocket handshake wrongly: {error.message}") from None
            final = error.status in FINAL_STATUSES
            raise Unreachable(f"{url} refused the WebSocket handshake with HTTP {error.status}", final=final) from None
        except Redirected as error:
            raise Unreachable(f"{url}: {error}", final=True) from None
        except (aiohttp.ClientError, OSError) as error:
            untrace(error)
            raise Unreachable(f"can't connect to {url}: {error}") from None
        if not isinstance(socket, ServiceSocket):
            raise TypeError(type(socket))
        return socket


async def _refuse_redirect(*_: object) -> None:
    raise Redirected("the service answered with a redirect; write the final URL into the configuration")
