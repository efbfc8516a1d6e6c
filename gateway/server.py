"""Where carriers connect: webhooks that answer with XML, and stream sockets. What a stream does is in `gateway.stream`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError
from structlog.typing import FilteringBoundLogger

from gateway import __version__
from gateway.bus import Bus
from gateway.clock import Clock
from gateway.door import Door, Refused, Remarks
from gateway.errors import MalformedFrame
from gateway.events import StopReason
from gateway.provider import Answer, Call, Provider, SignedRequest
from gateway.routing import match
from gateway.services.dialler import Dialler
from gateway.settings import Settings, host_port
from gateway.stream import FAREWELL_SECS, House, Stream
from gateway.tls import CHECK_SECS, Certificate

LARGEST_FRAME = 64 * 1024
"""Bytes of one frame or webhook body from a carrier; the largest legitimate frame is a start with many parameters."""

HEARTBEAT_SECS = 10.0
SLOW_HEADER_SECS = 5.0
HANDSHAKE_SECS = 5.0
BODY_SECS = 5.0
"""A webhook's body must be there by then."""

LINGER_SECS = 1.0
"""How long a body that nobody wants is read, so that whoever sends it can read why."""

BACKLOG = 1024
"""Connections that the system accepts for us while we are busy."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """The carriers' listener. `start`, then serve until `stop`, which ends live streams with reason `drain`."""

    def __init__(self, settings: Settings, providers: Mapping[str, Provider]) -> None:
        self.settings = settings
        self.providers = providers
        self.bus = Bus()
        self.port = 0
        self.house: House
        self._log: FilteringBoundLogger = structlog.get_logger("gateway")
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None
        self._certificate: Certificate | None = None
        self._next_check: asyncio.TimerHandle | None = None

    @property
    def streams(self) -> dict[str, Stream]:
        """Live streams by session id."""
        return self.house.streams

    async def start(self) -> int:
        """Listen. Returns the port. Raises ConfigError for a certificate and OSError for an address that can't be used."""
        loop = asyncio.get_running_loop()
        if self.settings.tls is not None:
            self._certificate = Certificate(self.settings.tls, self._log)
        remarks = Remarks(self._log.warning)
        self.house = House(
            settings=self.settings,
            bus=self.bus,
            clock=Clock(loop),
            dialler=Dialler(f"telephony-audio-gateway/{__version__}"),
            door=Door(self.settings, self.providers, self._log, remarks),
        )
        app = web.Application(client_max_size=LARGEST_FRAME, middlewares=[self._observe])
        for method in ("GET", "POST"):
            app.router.add_route(method, "/{provider}/answer", self._answer)
            app.router.add_route(method, "/{provider}/action", self._action)
            app.router.add_route(method, "/{provider}/status", self._status)
        app.router.add_route("GET", "/{provider}/stream", self._stream)
        app.router.add_route("GET", "/{provider}/stream/{token}", self._stream)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_HttpLog(self._log, remarks),
            keepalive_timeout=SLOW_HEADER_SECS,
            lingering_time=LINGER_SECS,
            auto_decompress=False,  # a signature covers a body as it was sent, and no carrier packs it
            shutdown_timeout=FAREWELL_SECS,
        )
        await self._runner.setup()
        host, port = host_port(self.settings.listen)
        handler: Any = self._runner.server
        try:
            self._listener = await loop.create_server(
                handler,
                host,
                port,
                backlog=BACKLOG,
                ssl=self._certificate.context if self._certificate else None,
                ssl_handshake_timeout=HANDSHAKE_SECS if self._certificate else None,
            )
        except OSError:
            await self.stop()
            raise
        self.port = int(self._listener.sockets[0].getsockname()[1])
        self._check_certificate()
        scheme = "https" if self._certificate else "http"
        self._log.info("listening", address=f"{host}:{self.port}", scheme=scheme, providers=[*self.providers])
        return self.port

    def reload(self) -> None:
        """Take a new certificate now; calls go on. What can't be used is logged, and the old one stays."""
        if self._certificate is not None:
            self._certificate.check(force=True)

    async def stop(self) -> None:
        """Stop listening; end every live stream properly."""
        if self._next_check is not None:
            self._next_check.cancel()
        if self._listener is not None:
            self._listener.close()
        for stream in [*self.streams.values()]:
            stream.session.close_code = aiohttp.WSCloseCode.GOING_AWAY
            stream.end(StopReason.DRAIN)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.house.dialler.close()
        self.house.door.close()

    def _check_certificate(self) -> None:
        if self._certificate is not None:
            self._certificate.check()
            self._next_check = asyncio.get_running_loop().call_later(CHECK_SECS, self._check_certificate)

    # --- webhooks ---

    async def _answer(self, request: web.Request) -> web.Response:
        """The carrier asks what to do with a call."""
        name, provider, signed, call = await self._webhook(request)
        route = match(self.settings.routes, provider=name, called=call.called, caller=call.caller)
        label = route.label if route is not None else ""
        try:
            token = self.house.door.announce(name, call, label, self._now())
        except Refused:
            return _xml(provider.overflow())
        scheme, _, rest = self.settings.base_url(self.port).partition("://")
        base = f"{rest}/{name}"
        stream_url = f"{'wss' if scheme == 'https' else 'ws'}://{base}/stream/{token}"
        answer = provider.answer(
            signed, stream_url, action_url=f"{scheme}://{base}/action", status_url=f"{scheme}://{base}/status"
        )
        self._log.info("call_answered", provider=name, call_id=call.call_id, caller=call.caller, called=call.called, route=label)
        return _xml(answer)

    async def _action(self, request: web.Request) -> web.Response:
        """The carrier asks what comes after a stream."""
        name, provider, signed, call = await self._webhook(request)
        lost = (name, call.call_id) in self.house.service_lost
        return _xml(provider.gone(signed) if lost else provider.after(signed))

    async def _status(self, request: web.Request) -> web.Response:
        """The carrier tells how a stream fares. Never needed to end one: it may come late, twice or not at all."""
        name, provider, signed, _ = await self._webhook(request)
        status = provider.status(signed)
        self._log.info(
            "carrier_status", provider=name, call_id=status.call_id, stream_id=status.stream_id, status=status.event,
            reason=status.reason,
        )  # fmt: skip
        return web.Response(status=204)

    async def _webhook(self, request: web.Request) -> tuple[str, Provider, SignedRequest, Call]:
        name, provider = self._provider(request)
        try:
            async with asyncio.timeout(BODY_SECS):
                signed = self._signed(request, await request.read())
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        self.house.door.authenticate(name, signed, self._now())
        return name, provider, signed, provider.call(signed)

    # --- streams ---

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The carrier connects a stream."""
        name, provider = self._provider(request)
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(text="a carrier's WebSocket connects here\n")  # load balancers ask like this
        door, now = self.house.door, self._now()
        ticket = door.ticket(name, request.match_info.get("token", ""), now)  # first, for nothing refuses at a lower price
        address = door.address(request.remote, ",".join(request.headers.getall("X-Forwarded-For", ())), now)
        admitted = door.knock(name, self._signed(request), ticket, address, now)
        try:
            socket = web.WebSocketResponse(
                protocols=provider.subprotocols,
                compress=False,
                max_msg_size=LARGEST_FRAME,
                heartbeat=HEARTBEAT_SECS,
                timeout=FAREWELL_SECS,
            )
            await socket.prepare(request)
            stream = Stream(self.house, name, provider.codec(), socket, admitted, self._log.bind(provider=name))
        except BaseException:
            door.leave(admitted)
            raise
        await stream.run()
        return socket

    # --- for all ---

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refusals become bare status codes; what was asked is logged by its route, never by its path."""
        response: web.StreamResponse
        try:
            response = await handler(request)
        except Refused as refused:
            response = web.Response(status=refused.status)
            response.force_close()  # whatever else was sent along is not read
        except MalformedFrame as error:
            self.house.door.remarks.tell("bad_webhook", self._now(), error=str(error))
            response = web.Response(status=400, text="this request names no call\n")
        route = request.match_info.route.resource
        self._log.debug("request", route=route.canonical if route is not None else None, status=response.status)
        return response

    def _provider(self, request: web.Request) -> tuple[str, Provider]:
        name = request.match_info["provider"]
        provider = self.providers.get(name)
        if provider is None:
            raise web.HTTPNotFound(text="")
        return name, provider

    def _signed(self, request: web.Request, body: bytes = b"") -> SignedRequest:
        return SignedRequest.read(request.method, self.settings.base_url(self.port) + request.raw_path, request.headers, body)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _xml(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, text=answer.body, content_type=answer.content_type)


class _HttpLog(logging.Logger):
    """What aiohttp has to say of requests, without a traceback for everybody who speaks no HTTP."""

    def __init__(self, log: FilteringBoundLogger, remarks: Remarks) -> None:
        super().__init__("gateway.http")
        self._structured = log
        self._remarks = remarks

    def exception(self, msg: object, *args: object, exc_info: Any = True, **_: Any) -> None:
        now = asyncio.get_running_loop().time()
        if isinstance(exc_info, (HttpProcessingError, aiohttp.ClientPayloadError)):
            self._remarks.tell("bad_http", now, why=type(exc_info).__name__)
        else:
            self._remarks.tell("request_failed", now, log=self._structured.error, exc_info=exc_info)
