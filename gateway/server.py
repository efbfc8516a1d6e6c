"""Where carriers connect: webhooks that answer with XML, and stream sockets. What a stream does is in `gateway.stream`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
import structlog
from aiohttp import web
from aiohttp.http import HttpProcessingError
from structlog.typing import FilteringBoundLogger

from gateway import __version__, direct
from gateway.admin import Admin, Hooks
from gateway.bus import Bus
from gateway.callcontrol import CallControl
from gateway.clock import Clock
from gateway.direct import CarrierSocket
from gateway.door import Door, Refused, Remarks
from gateway.errors import MalformedFrame, untrace
from gateway.events import StopReason
from gateway.figures import Figures
from gateway.journal import Journal, State
from gateway.metrics import Metrics, Standing, Totals
from gateway.porter import Porters, Visitor
from gateway.provider import Answer, Call, Provider, SignedRequest
from gateway.routing import match
from gateway.services.dialect import Dialects, no_dialects
from gateway.services.dialler import Dialler
from gateway.settings import Route, Settings, host_port
from gateway.shares import Shares
from gateway.stream import FAREWELL_SECS, House, Stream
from gateway.tls import CHECK_SECS, Certificate
from gateway.tokens import LEEWAY_SECS, LIFETIME_SECS, Ticket
from gateway.traced import TracedStream
from gateway.tracing import open_tracer
from gateway.watchdog import Watchdog

LARGEST_FRAME = 64 * 1024
"""Bytes of one frame or webhook body from a carrier; the largest legitimate frame is a start with many parameters."""

HEARTBEAT_SECS = 9.0
"""A carrier that has said nothing for so long is pinged, and gone if half as long later nothing has come: within 15 s, as aiohttp
rounds what is above 5 s up to the next second."""

MEDIA_HEARTBEAT_SECS = 2.5
"""The same of carriers that send audio, which is never silent for so long: a dead connection is found within 4 s."""

STALL_LOOK_SECS = 0.25
"""How often streams are asked whether their carrier's audio flows."""

SLOW_HEADER_SECS = 3.5  # after the first bytes
HANDSHAKE_SECS = 5.0
BODY_SECS = 5.0
"""A webhook's body must be there by then."""

LINGER_SECS = 1.0
"""How long a body that nobody wants is read, so that whoever sends it can read why."""

AFTERMATH_SECS = 2.0
"""After a stream its carrier asks what comes next; for so long a process that ends is still there to say so."""

DRAIN_TICK_SECS = 0.05
BACKLOG = 1024
"""Connections that the system accepts for us while we are busy."""

REMEMBERED_PROVIDERS = 64
"""Providers that reloads have taken away, remembered for what their last calls still ask."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Rules(NamedTuple):
    """What a call goes by, from its webhook to its end, whatever is reloaded meanwhile."""

    house: House
    providers: Mapping[str, Provider]


class Place(NamedTuple):
    """What a server is given that is one of several: listening sockets, who else is there, a path for `Admin` to listen at."""

    sockets: Sequence[socket.socket]
    shares: Shares
    admin: str


class Server:
    """The carriers' listener. `start`, then serve until `stop`, which ends live streams with reason `drain`."""

    def __init__(
        self,
        settings: Settings,
        providers: Mapping[str, Provider],
        dialects: Dialects = no_dialects,
        place: Place | None = None,
    ) -> None:
        self.settings = settings
        self.providers = providers
        self._dialects = dialects
        self._place = place
        self.retired = False
        """Whether it accepts no more, for another process does."""
        self.bus = Bus()
        self.port = 0
        self.house: House
        self._log: FilteringBoundLogger = structlog.get_logger("gateway")
        self.hooks = Hooks(drain=self.drain)
        self.watchdog = Watchdog(self._log)
        """Runs if there is an `admin`, or whoever made the server starts it. `stop` ends it."""
        self.admin: Admin | None = None
        self._runner: web.AppRunner | None = None
        self._listeners: list[asyncio.Server] = []
        self._porters: Porters | None = None
        self._certificate: Certificate | None = None
        self._next_check: asyncio.TimerHandle | None = None
        self._next_look: asyncio.TimerHandle | None = None
        self._looked_at = 0.0
        self._announced: dict[tuple[str, str], tuple[float, Rules]] = {}
        """By provider's name and call id: calls that were answered, until when their stream may come; the oldest first."""
        self._former: dict[str, Rules] = {}
        """Providers that were taken away, by name, and what they went by last."""

    @property
    def streams(self) -> dict[str, Stream]:
        """Live streams by session id."""
        return self.house.streams

    async def start(self) -> int:
        """Listen. Returns the port. Raises ConfigError for a certificate or tracing, OSError for an address that won't do."""
        loop = asyncio.get_running_loop()
        if self.settings.tls is not None:
            self._certificate = Certificate(self.settings.tls, self._log)
        tracer = open_tracer(self.settings.tracing)
        remarks, totals = Remarks(self._log.warning), Totals()
        door = Door(self.settings, self.providers, self._log, remarks, shares=self._place.shares if self._place else None)
        self.house = House(
            settings=self.settings,
            bus=self.bus,
            clock=Clock(loop),
            dialler=Dialler(f"telephony-audio-gateway/{__version__}"),
            listening=Dialler(f"telephony-audio-gateway/{__version__}"),
            door=door,
            control=CallControl(f"telephony-audio-gateway/{__version__}", totals.asked),
            providers=self.providers,
            tracer=tracer,
            journal=Journal(door.secret),
            totals=totals,
            dialects=self._dialects,
        )
        app = web.Application(client_max_size=LARGEST_FRAME, middlewares=[self._observe])
        for method in ("GET", "POST"):
            app.router.add_route(method, "/{provider}/answer", self._answer)
            app.router.add_route(method, "/{provider}/action", self._action)
            app.router.add_route(method, "/{provider}/action/{stream}", self._action)
            app.router.add_route(method, "/{provider}/status", self._status)
            app.router.add_route(method, "/{provider}/document/{sealed}", self._document)
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
        self._porters = Porters(handler, self._admits)
        wheres: list[dict[str, Any]] = [{"host": host, "port": port}]
        if self._place is not None:
            wheres = [{"sock": each} for each in self._place.sockets]
        try:
            for where in wheres:
                listener = await loop.create_server(
                    self._porters,
                    **where,
                    backlog=BACKLOG,
                    ssl=self._certificate.context if self._certificate else None,
                    ssl_handshake_timeout=HANDSHAKE_SECS if self._certificate else None,
                )
                self._listeners.append(listener)
        except OSError:
            await self.stop()
            raise
        self.port = int(self._listeners[0].sockets[0].getsockname()[1])
        self._check_certificate()
        self._looked_at = loop.time()
        self._look()
        if self.settings.admin is not None or self._place is not None:
            self.watchdog.start()
            self.admin = self._make_admin()
            try:
                await self.admin.start(self._place.admin if self._place is not None else None)
            except OSError:
                await self.stop()
                raise
        scheme = "https" if self._certificate else "http"
        event = "listening" if self._place is None else "worker_listening"
        self._log.info(event, address=f"{host}:{self.port}", scheme=scheme, providers=[*self.providers])
        if not (direct.WORKS and direct.OUTLETS_WORK):
            self._log.warning("aiohttp_unknown", version=aiohttp.__version__, effect="each frame costs more")
        return self.port

    def reload(self, settings: Settings | None = None, providers: Mapping[str, Provider] | None = None) -> None:
        """New calls go by this from now on, all of it at once; calls that were answered keep what they were answered by.

        Whoever calls has checked it, and that nothing in it takes a restart (`gateway.reload` does). Without `settings` there is
        only a new certificate to take; one that can't be used is logged, and the old one stays.
        """
        if settings is not None and providers is not None:
            old = self._rules
            for name in providers:
                self._former.pop(name, None)
            self._former |= {name: old for name in self.providers if name not in providers}
            for name in [*self._former][:-REMEMBERED_PROVIDERS]:
                del self._former[name]
            # Streams hold on to their house; what both houses must know of calls is one and the same object.
            door = self.house.door.renewed(settings, providers)
            self.house = replace(self.house, settings=settings, door=door, providers=providers)
            self.settings, self.providers = settings, providers
        if self._certificate is not None:
            if self.settings.tls is not None:
                self._certificate.use(self.settings.tls)
            else:
                self._certificate.check(force=True)

    def drain(self) -> None:
        """No new calls from now on, and not ready for any; those that there are go on. Then `finish`, and `stop`."""
        if not self.hooks.draining:
            self.hooks.draining = True
            self._log.info("draining", live_streams=len(self.streams))

    def retire(self) -> None:
        """Another process accepts from our listening sockets: do so no more. What is here goes on. Then `finish`, and `stop`."""
        self.retired = True
        for listener in self._listeners:
            listener.close()

    async def finish(self, drain_secs: float) -> None:
        """After `drain` or `retire`: returns once no call is left; those that are still there after `drain_secs` are ended.

        A server that drains ends them with `drain`, and is there until carriers have asked what comes next. One that has retired
        leaves them to the process that has its place. Whoever loses patience cancels this; then `stop`.
        """
        loop = asyncio.get_running_loop()
        deadline, busy_until, ended = loop.time() + drain_secs, float("-inf"), False
        while True:
            now = loop.time()
            if self.streams:
                busy_until = now + (0.0 if self.retired else AFTERMATH_SECS)
            elif self.retired and self._connected():
                pass  # accepted, and perhaps about to ask for something
            elif now >= busy_until and (ended or not self.house.door.admission.held(now)):
                return
            if now >= deadline and not ended:
                ended = True
                if self.retired:
                    await asyncio.gather(*(stream.hand_over() for stream in [*self.streams.values()]))
                else:
                    self._end_streams()
            elif now >= deadline + (self.settings.reattach_secs if self.retired else 0.0) + FAREWELL_SECS + AFTERMATH_SECS:
                return
            await asyncio.sleep(DRAIN_TICK_SECS)

    def _connected(self) -> bool:
        """Whether a client's connection is open."""
        return bool(
            (self._porters and self._porters.waiting)
            or (self._runner and self._runner.server and self._runner.server.connections)
        )

    def _end_streams(self) -> None:
        for stream in [*self.streams.values()]:
            stream.session.close_code = aiohttp.WSCloseCode.GOING_AWAY
            stream.end(StopReason.DRAIN)

    async def stop(self) -> None:
        """Stop listening; end every live stream properly."""
        if self._next_check is not None:
            self._next_check.cancel()
        if self._next_look is not None:
            self._next_look.cancel()
        for listener in self._listeners:
            listener.close()
        if self._porters is not None:
            self._porters.close()
        self._end_streams()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.house.dialler.close()
        await self.house.listening.close()
        await self.house.control.close()
        if self.house.tracer is not None:
            await self.house.tracer.close()
        self.house.door.close()
        self.house.journal.close()
        if self.admin is not None:  # last: an end can be watched
            await self.admin.stop()
        self.watchdog.stop()

    def _make_admin(self) -> Admin:
        def standing() -> Standing:
            admission, certificate = self.house.door.admission, self._certificate
            return Standing(
                slots=admission.calls,
                slots_limit=self.settings.max_calls,
                pending=admission.pending,
                draining=self.hooks.draining,
                tls_not_after=certificate.not_after if certificate is not None else None,
                reloads=self.hooks.reloads,
            )

        def streams() -> list[Figures]:
            return [stream.figures() for stream in self.streams.values()]

        metrics = Metrics(self.house.totals, self.settings.providers, streams, standing, self.watchdog)
        return Admin(
            lambda: self.house,
            metrics,
            self.watchdog,
            self.hooks,
            listening=lambda: any(listener.is_serving() for listener in self._listeners),
            base_url=lambda: self.settings.base_url(self.port),
        )

    def _check_certificate(self) -> None:
        if self._certificate is not None:
            self._certificate.check()
            self._next_check = asyncio.get_running_loop().call_later(CHECK_SECS, self._check_certificate)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_look = loop.call_later(STALL_LOOK_SECS, self._look)
        now = loop.time()
        # While we were held up ourselves, nobody's audio could be seen to come.
        elapsed = min(now - self._looked_at, 2 * STALL_LOOK_SECS)
        self._looked_at = now
        for stream in [*self.streams.values()]:
            stream.look(elapsed)

    # --- webhooks ---

    async def _answer(self, request: web.Request) -> web.Response:
        """The carrier asks what to do with a call."""
        name = request.match_info["provider"]
        if name not in self.providers:
            raise web.HTTPNotFound(text="")
        rules, provider, signed, call = await self._webhook(request, asks_for_stream=True)
        route = self._chosen(request, rules) or match(
            rules.house.settings.routes, provider=name, called=call.called, caller=call.caller
        )
        label = route.label if route is not None else ""
        try:
            reason = self._closed_for()
            if reason is not None and (name, call.call_id) not in self.house.conversations:
                rules.house.door.remarks.tell("call_refused", self._now(), provider=name, reason=reason)
                raise Refused(503, reason)
            token = rules.house.door.announce(name, call, label, self._now())
        except Refused as refused:
            self.house.totals.refuse(name, refused.reason)
            return _xml(provider.overflow())
        rules.house.door.answered(name, signed, call)
        answer = self._connect(rules, provider, name, signed, call, token)
        if rules.house.settings.reattach_secs:
            self.house.journal.announce(name, call.call_id, label)
        self._log.info("call_answered", provider=name, call_id=call.call_id, caller=call.caller, called=call.called, route=label)
        return _xml(answer)

    def _connect(
        self, rules: Rules, provider: Provider, name: str, signed: SignedRequest, call: Call, token: str, *, resumed: bool = False
    ) -> Answer:
        """The answer that has the carrier connect a stream with this token."""
        self._remember(name, call.call_id, rules)
        scheme, _, rest = self.settings.base_url(self.port).partition("://")
        base = f"{rest}/{name}"
        return provider.answer(
            signed,
            f"{'wss' if scheme == 'https' else 'ws'}://{base}/stream/{token}",
            action_url=f"{scheme}://{base}/action/{secrets.token_hex(4)}",  # what is asked after one stream is asked once
            status_url=f"{scheme}://{base}/status",
            resumed=resumed,
        )

    def _closed_for(self) -> str | None:
        """Why no new calls are taken at the moment, whatever their number; a metric label."""
        if self.hooks.draining:
            return "draining"
        if self.watchdog.overloaded():
            return "loop_lag"
        return next((which for which, _ in self.watchdog.meter.over(self.settings)), None)

    def _chosen(self, request: web.Request, rules: Rules) -> Route | None:
        """The route that is written into the answer URL of a call we placed, if it is there and takes this provider's calls."""
        label = request.query.get("route")
        route = rules.house.settings.route(label) if label else None
        return route if route is not None and route.provider in (None, request.match_info["provider"]) else None

    async def _action(self, request: web.Request) -> web.Response:
        """The carrier asks what comes after a stream: another one, if that was not meant to end."""
        rules, provider, signed, call = await self._webhook(request)
        name = request.match_info["provider"]
        key, house = (name, call.call_id), self.house
        label = house.journal.attempt(*key)
        if label is not None:
            try:
                token = rules.house.door.announce(name, call, label, self._now())
            except Refused as refused:
                house.totals.refuse(name, refused.reason)
            else:
                self._log.info("call_asked_back", provider=name, call_id=call.call_id, route=label)
                return _xml(self._connect(rules, provider, name, signed, call, token, resumed=True))
        lost = key in house.service_lost or house.journal.ask(*key) is State.LOST
        answer = provider.gone(signed) if lost else provider.after(signed)
        if answer.ends_call:
            rules.house.door.over(name, call.call_id)
        return _xml(answer)

    async def _status(self, request: web.Request) -> web.Response:
        """The carrier tells how a stream fares. Never needed to end one: it may come late, twice or not at all."""
        _, provider, signed, _ = await self._webhook(request)
        name, status = request.match_info["provider"], provider.status(signed)
        self._log.info(
            "carrier_status", provider=name, call_id=status.call_id, stream_id=status.stream_id, status=status.event,
            reason=status.reason,
        )  # fmt: skip
        return web.Response(status=204)

    async def _document(self, request: web.Request) -> web.Response:
        """The carrier fetches what a call goes on with, which its URL holds."""
        rules, _, _, call = await self._webhook(request)
        name = request.match_info["provider"]
        document = rules.house.door.document(name, request.match_info["sealed"], self._now())
        self._log.info("document_fetched", provider=name, call_id=call.call_id)
        return _xml(Answer(document))

    async def _webhook(
        self, request: web.Request, *, asks_for_stream: bool = False
    ) -> tuple[Rules, Provider, SignedRequest, Call]:
        """What is asked, and by whom: the account's carrier, and for the first time. Raises Refused, MalformedFrame."""
        name, rules = self._rules_of(request)
        try:
            async with asyncio.timeout(BODY_SECS):
                signed = self._signed(request, await request.read())
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        rules.house.door.authenticate(name, signed, self._now())
        provider = rules.providers[name]
        call = provider.call(signed)
        await rules.house.door.recognize(name, signed, call, asks_for_stream=asks_for_stream)
        if call.over:
            self.house.journal.conclude(name, call.call_id)
        return rules, provider, signed, call

    # --- streams ---

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The carrier connects a stream."""
        name, rules = self._rules_of(request)
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(text="a carrier's WebSocket connects here\n")  # load balancers ask like this
        now = self._now()
        # First the ticket, for nothing refuses at a lower price.
        rules, ticket = self._ticket(name, rules, request.match_info.get("token", ""), now)
        if ticket is None and name not in self.providers:
            raise web.HTTPNotFound(text="")
        house, provider, door = rules.house, rules.providers[name], rules.house.door
        address = door.address(request.remote, ",".join(request.headers.getall("X-Forwarded-For", ())), now)
        admitted = door.knock(name, self._signed(request), ticket, address, now)
        try:
            socket = CarrierSocket(
                protocols=provider.subprotocols,
                compress=False,
                max_msg_size=LARGEST_FRAME,
                heartbeat=HEARTBEAT_SECS if provider.carrier().habits.text else MEDIA_HEARTBEAT_SECS,
                timeout=FAREWELL_SECS,
            )
            await socket.prepare(request)
            if request.transport is None:
                raise ConnectionResetError("the carrier is gone already")
            log = self._log.bind(provider=name)
            parts = (house, name, provider.codec(), socket, request.transport, admitted, log)
            stream = Stream(*parts) if house.tracer is None else TracedStream(house.tracer, *parts)
        except BaseException:
            door.leave(admitted)
            raise
        try:
            await stream.run()
        finally:
            stream.release()
        return socket

    def _admits(self, visitor: Visitor) -> bool:
        """Whether a token and a signature are good. Of a provider that is not there, the HTTP server says so."""
        name, now, rules = visitor.provider, self._now(), self._rules
        if name not in self.providers:
            return True
        try:
            if visitor.token is not None:
                rules, _ = self._ticket(name, rules, visitor.token, now)
            url = self.settings.base_url(self.port) + visitor.path
            request = SignedRequest(visitor.method, url, visitor.headers, visitor.body)
            rules.house.door.authenticate(name, request, now)
        except Refused as refused:
            self.house.totals.refuse(name, refused.reason)
            return False
        return True

    def _ticket(self, name: str, rules: Rules, token: str, now: float) -> tuple[Rules, Ticket | None]:
        """What a stream's token says, and what its call goes by. Raises Refused."""
        ticket = rules.house.door.ticket(name, token, now)
        if ticket is not None:
            _, rules = self._announced.get((name, ticket.call_id), (now, rules))
        return rules, ticket

    # --- for all ---

    @web.middleware
    async def _observe(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refusals become bare status codes; what was asked is logged by its route, never by its path."""
        response: web.StreamResponse
        try:
            if request.version < aiohttp.HttpVersion10:
                raise web.HTTPVersionNotSupported
            response = await handler(request)
        except (Refused, web.HTTPException) as refused:
            if isinstance(refused, Refused):
                self.house.totals.refuse(request.match_info["provider"], refused.reason)
            response = web.Response(status=refused.status)
            response.force_close()  # whatever else was sent along is not read
        except MalformedFrame as error:
            self.house.door.remarks.tell("bad_webhook", self._now(), error=str(error))
            response = web.Response(status=400, text="this request names no call\n")
        if self.retired:
            response.force_close()  # whoever asks next asks somebody else
        route = request.match_info.route.resource
        self._log.debug("request", route=route.canonical if route is not None else None, status=response.status)
        return response

    @property
    def _rules(self) -> Rules:
        """What new calls go by."""
        return Rules(self.house, self.providers)

    def _rules_of(self, request: web.Request) -> tuple[str, Rules]:
        """The provider's name in the path and what it goes by; one that is gone answers for the calls that it had."""
        name = request.match_info["provider"]
        if name in self.providers:
            return name, self._rules
        if name in self._former:
            return name, self._former[name]
        raise web.HTTPNotFound(text="")

    def _remember(self, name: str, call_id: str, rules: Rules) -> None:
        """The stream of this call goes by what its webhook was answered by."""
        now = self._now()
        while self._announced:
            oldest = next(iter(self._announced))
            if self._announced[oldest][0] > now:
                break
            del self._announced[oldest]
        self._announced.pop((name, call_id), None)
        self._announced[name, call_id] = now + LIFETIME_SECS + LEEWAY_SECS, rules

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
        if isinstance(exc_info, (HttpProcessingError, aiohttp.ClientPayloadError, ConnectionError)):
            self._remarks.tell("bad_http", now, why=type(exc_info).__name__)
        elif not direct.ended_unwaited(exc_info):
            self._remarks.tell("request_failed", now, log=self._structured.error, exc_info=exc_info)
        if isinstance(exc_info, Exception):
            untrace(exc_info)  # its frames hold the connection
