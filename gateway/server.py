"""Where carriers connect: webhooks that answer with XML, and stream sockets. What a stream does is in `gateway.stream`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
import structlog
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway import __version__
from gateway.bus import Bus
from gateway.clock import Clock
from gateway.door import Door, Refused
from gateway.errors import MalformedFrame
from gateway.events import StopReason
from gateway.provider import Answer, Call, Provider, SignedRequest
from gateway.routing import match
from gateway.services.dialler import Dialler
from gateway.settings import Settings, host_port
from gateway.stream import FAREWELL_SECS, House, Stream

LARGEST_FRAME = 64 * 1024
"""Bytes of one frame or webhook body from a carrier; the largest legitimate frame is a start with many parameters."""

HEARTBEAT_SECS = 10.0
SLOW_HEADER_SECS = 5.0
BODY_SECS = 5.0
"""A webhook's body must be there by then."""


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

    @property
    def streams(self) -> dict[str, Stream]:
        """Live streams by session id."""
        return self.house.streams

    async def start(self) -> int:
        """Listen. Returns the port. Raises OSError when the address can't be had."""
        self.house = House(
            settings=self.settings,
            bus=self.bus,
            clock=Clock(asyncio.get_running_loop()),
            dialler=Dialler(f"telephony-audio-gateway/{__version__}"),
            door=Door(self.settings, self.providers, self._log),
        )
        app = web.Application(client_max_size=LARGEST_FRAME, middlewares=[self._observe])
        for method in ("GET", "POST"):
            app.router.add_route(method, "/{provider}/answer", self._answer)
            app.router.add_route(method, "/{provider}/action", self._action)
            app.router.add_route(method, "/{provider}/status", self._status)
        app.router.add_route("GET", "/{provider}/stream", self._stream)
        app.router.add_route("GET", "/{provider}/stream/{token}", self._stream)
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=SLOW_HEADER_SECS, shutdown_timeout=FAREWELL_SECS)
        await self._runner.setup()
        host, port = host_port(self.settings.listen)
        try:
            site = web.TCPSite(self._runner, host, port)
            await site.start()
        except OSError:
            await self.stop()
            raise
        self.port = int(self._runner.addresses[0][1])
        self._log.info("listening", address=f"{host}:{self.port}", providers=[*self.providers])
        return self.port

    async def stop(self) -> None:
        """Stop listening; end every live stream properly."""
        for stream in [*self.streams.values()]:
            stream.session.close_code = aiohttp.WSCloseCode.GOING_AWAY
            stream.end(StopReason.DRAIN)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.house.dialler.close()
        self.house.door.close()

    # --- webhooks ---

    async def _answer(self, request: web.Request) -> web.Response:
        """The carrier asks what to do with a call."""
        name, provider, signed, call = await self._webhook(request)
        try:
            self.house.door.reserve(name, call, self._now())
        except Refused:
            return _xml(provider.overflow())
        route = match(self.settings.routes, provider=name, called=call.called, caller=call.caller)
        label = route.label if route is not None else ""
        scheme, _, rest = self.settings.base_url(self.port).partition("://")
        base = f"{rest}/{name}"
        stream_url = f"{'wss' if scheme == 'https' else 'ws'}://{base}/stream/{self.house.door.mint(name, call, label)}"
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
        try:
            return name, provider, signed, provider.call(signed)
        except MalformedFrame as error:
            self._log.warning("bad_webhook", provider=name, error=str(error))
            raise web.HTTPBadRequest(text="this request names no call\n") from None

    # --- streams ---

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The carrier connects a stream."""
        name, provider = self._provider(request)
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(text="a carrier's WebSocket connects here\n")  # load balancers ask like this
        door = self.house.door
        address = door.address(request.remote, request.headers.get("X-Forwarded-For", ""))
        token = request.match_info.get("token", "")
        admitted = door.knock(name, self._signed(request), token, address, self._now())
        try:
            socket = web.WebSocketResponse(
                protocols=provider.subprotocols,
                compress=False,
                max_msg_size=LARGEST_FRAME,
                heartbeat=HEARTBEAT_SECS,
                timeout=FAREWELL_SECS,
            )
            await socket.prepare(request)
        except BaseException:
            door.leave(admitted)
            raise
        await Stream(self.house, name, provider.codec(), socket, admitted, self._log.bind(provider=name)).run()
        return socket

    # --- for all ---

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refusals become bare status codes; what was asked is logged by its route, never by its path."""
        try:
            response = await handler(request)
        except Refused as refused:
            response = web.Response(status=refused.status)
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
