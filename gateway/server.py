"""Where carriers connect: webhooks that answer with XML, and stream sockets, one TaskGroup each."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping

import aiohttp
import structlog
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway import __version__
from gateway.bus import Bus, Subscription
from gateway.clock import Clock
from gateway.errors import MalformedFrame, SignatureMismatch
from gateway.events import Checkpoint, Command, Event, Flow, Start, StopReason
from gateway.media import Track
from gateway.provider import Provider, SignedRequest
from gateway.routing import match
from gateway.services import Link, ServiceLost
from gateway.services.echo import EchoLink
from gateway.services.websocket import WebsocketLink
from gateway.session import Session
from gateway.settings import EchoService, Service, Settings, WebsocketService, host_port

LARGEST_FRAME = 64 * 1024
"""Bytes of one frame from a carrier; the largest legitimate one is a start with many parameters."""

HEARTBEAT_SECS = 10.0
FAREWELL_SECS = 2.0
"""How long a carrier may take to close after it was told to end, and a service to take its last messages."""

SLOW_HEADER_SECS = 5.0


class Stream:
    """One carrier's socket with its session and its link. The server makes one per connection and awaits `run`."""

    def __init__(self, server: Server, provider_name: str, socket: web.WebSocketResponse, log: FilteringBoundLogger) -> None:
        entry = server.settings.providers[provider_name]
        self.session_id = uuid.uuid4().hex
        self.provider = provider_name
        self.kind = entry.kind
        self.http = server.http
        self.log = log.bind(session=self.session_id)
        self._server = server
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._tasks: asyncio.TaskGroup
        self._serving: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._began = self._loop.time()
        self._armed = float("inf")
        self._channel = server.bus.channel(self.session_id)
        self.subscription: Subscription
        self.start: Start
        self.session = Session(
            server.providers[provider_name].codec(),
            emit=self._emit,
            note=self._note,
            capacity_ms=server.settings.capacity_ms,
        )

    async def run(self) -> None:
        """Carry the stream until one side ends it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                writing = tasks.create_task(self._write())
                try:
                    await self._read()
                finally:
                    self.end(StopReason.CARRIER_CLOSED)
                    if self._serving is not None:
                        await asyncio.wait([self._serving], timeout=FAREWELL_SECS)
                        self._serving.cancel()
                    writing.cancel()
        finally:
            self._summarize()

    def end(self, reason: StopReason) -> None:
        """End the stream from outside; the first reason counts."""
        self.session.end(reason, self._loop.time())
        self._wake.set()

    # --- the line that links see ---

    def perform(self, command: Command) -> None:
        self.session.perform(command, self._loop.time())
        self._wake.set()

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        self.session.fault(code, message, ref)

    # --- carrier to gateway ---

    async def _read(self) -> None:
        session, loop = self.session, self._loop
        try:
            try:
                async with asyncio.timeout(self._server.settings.start_timeout_secs):
                    while session.start is None and not session.over:
                        message = await self._socket.receive()
                        if not _is_frame(message):
                            return
                        session.receive(message.data, loop.time())
            except TimeoutError:
                self.log.warning("no_start", after_secs=self._server.settings.start_timeout_secs)
                session.close_code = aiohttp.WSCloseCode.POLICY_VIOLATION
                self.end(StopReason.TIMEOUT)
            async for message in self._socket:
                if not _is_frame(message):
                    return
                session.receive(message.data, loop.time())
                if session.over:
                    self._wake.set()
        except ConnectionError:
            pass  # a ping met a closing transport: the same as a close

    def _emit(self, event: Event) -> None:
        if type(event) is Start:
            self._open(event)
        elif type(event) is Checkpoint:
            self._wake.set()  # a stop may have waited for it
        elif type(event) is Flow:
            self.log.info("flow", state=event.state, buffered_ms=event.buffered_ms)
        self._channel.publish(event)

    def _open(self, start: Start) -> None:
        """The start frame has come: find the service and let it take over."""
        self.start = start
        self.log = self.log.bind(call_id=start.call_id)
        settings = self._server.settings
        route = match(settings.routes, provider=self.provider, called=start.called, caller=start.caller)
        self.log.info("stream_started", stream_id=start.stream_id, media_format=str(start.media_format), route=_named(route))
        if route is None:
            self.log.warning("no_route", caller=start.caller, called=start.called)
            self._loop.call_soon(self.end, StopReason.SERVICE_LOST)
            return
        name = route.service[0]
        service = settings.services[name]
        track = service.track if isinstance(service, WebsocketService) else Track.INBOUND
        self.subscription = Subscription(start.media_format, capacity_ms=settings.hold_ms, track=track)
        self._channel.subscribe(self.subscription)
        self._link = _link(service, self)
        self._serving = self._tasks.create_task(self._serve(name, self._link))

    async def _serve(self, name: str, link: Link) -> None:
        try:
            await link.run()
        except ServiceLost as error:
            self.log.error("service_lost", service=name, error=str(error))
            self.end(StopReason.SERVICE_LOST)

    # --- gateway to carrier ---

    async def _write(self) -> None:
        session, loop, wake = self.session, self._loop, self._wake
        try:
            while True:
                frame = session.next_frame(loop.time())
                if frame is not None:
                    await (self._socket.send_str(frame) if isinstance(frame, str) else self._socket.send_bytes(frame))
                    continue
                if session.over:
                    break
                due = session.next_due()
                if due is not None and (due < self._armed or self._armed < loop.time()):
                    self._armed = due
                    self._server.clock.wake_at(due, wake.set)
                await wake.wait()
                wake.clear()
            if session.farewell:
                # The carrier was told and closes by itself; closing first would look like a failure to it.
                await asyncio.sleep(FAREWELL_SECS)
            await self._socket.close(code=session.close_code)
        except ConnectionError:
            pass  # the reader sees the same and ends the stream

    # --- for the operator ---

    def _note(self, what: str, values: dict[str, object]) -> None:
        self.log.warning(what, **values)

    def _summarize(self) -> None:
        """The one canonical line of a stream."""
        session, now = self.session, self._loop.time()
        playout = session.playout
        queued, played, cleared, lost = playout.totals(now) if playout is not None else (0, 0, 0, 0)
        start = session.start
        sample_bytes = start.media_format.sample_bytes if start is not None and start.media_format is not None else 1
        received = self.subscription.offered_bytes if self._link is not None else session.received_bytes
        forwarded = self._link.forwarded_bytes if self._link is not None else 0
        self.log.info(
            "stream_ended",
            reason=session.stop.reason if session.stop is not None else None,
            close_code=self._socket.close_code,
            duration_secs=round(now - self._began, 3),
            frames_in=session.frames_in,
            frames_out=session.frames_out,
            bad_frames=dict(session.bad),
            unknown_frames=dict(session.unknown),
            gap_ms=session.gap_ms,
            faults=dict(session.faults),
            checkpoints={str(outcome): count for outcome, count in session.outcomes.items()},
            received_samples=received // sample_bytes,
            forwarded_samples=forwarded // sample_bytes,
            dropped_samples=(received - forwarded) // sample_bytes,
            queued_samples=queued // sample_bytes,
            played_samples=played // sample_bytes,
            cleared_samples=cleared // sample_bytes,
            lost_samples=lost // sample_bytes,
            underruns=playout.underruns if playout is not None else 0,
            refused_samples=playout.refused // sample_bytes if playout is not None else 0,
        )


class Server:
    """The carriers' listener. `start`, then serve until `stop`, which ends live streams with reason `drain`."""

    def __init__(self, settings: Settings, providers: Mapping[str, Provider]) -> None:
        self.settings = settings
        self.providers = providers
        self.bus = Bus()
        self.streams: dict[str, Stream] = {}
        self.clock: Clock
        self.http: aiohttp.ClientSession
        self.port = 0
        self._log: FilteringBoundLogger = structlog.get_logger("gateway")
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen. Returns the port. Raises OSError when the address can't be had."""
        self.clock = Clock(asyncio.get_running_loop())
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_refuse_redirect)
        self.http = aiohttp.ClientSession(trace_configs=[trace], headers={"User-Agent": f"telephony-audio-gateway/{__version__}"})
        app = web.Application(client_max_size=LARGEST_FRAME)
        app.router.add_route("GET", "/{provider}/answer", self._answer)
        app.router.add_route("POST", "/{provider}/answer", self._answer)
        app.router.add_route("GET", "/{provider}/stream", self._stream)
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
        await self.http.close()

    async def _answer(self, request: web.Request) -> web.Response:
        """The carrier asks what to do with a call."""
        name, provider = self._provider(request)
        signed = await self._signed(request)
        try:
            provider.authenticate(signed)
            call = provider.call(signed)
        except SignatureMismatch:
            return web.Response(status=403)
        except MalformedFrame as error:
            self._log.warning("bad_webhook", provider=name, error=str(error))
            return web.Response(status=400, text="this request names no call")
        scheme, _, rest = self.settings.base_url(self.port).partition("://")
        stream_url = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/{name}/stream"
        answer = provider.answer(signed, stream_url)
        self._log.info("call_answered", provider=name, call_id=call.call_id, caller=call.caller, called=call.called)
        return web.Response(status=answer.status, text=answer.body, content_type=answer.content_type)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """The carrier connects a stream."""
        name, provider = self._provider(request)
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(text="a carrier's WebSocket connects here\n")  # load balancers ask like this
        try:
            provider.authenticate(await self._signed(request))
        except SignatureMismatch:
            return web.Response(status=403)
        socket = web.WebSocketResponse(
            protocols=provider.subprotocols,
            compress=False,
            max_msg_size=LARGEST_FRAME,
            heartbeat=HEARTBEAT_SECS,
            timeout=FAREWELL_SECS,
        )
        await socket.prepare(request)
        stream = Stream(self, name, socket, self._log.bind(provider=name))
        self.streams[stream.session_id] = stream
        try:
            await stream.run()
        except Exception:
            stream.log.exception("stream_failed")
            await socket.close(code=aiohttp.WSCloseCode.INTERNAL_ERROR)
        finally:
            del self.streams[stream.session_id]
        return socket

    def _provider(self, request: web.Request) -> tuple[str, Provider]:
        name = request.match_info["provider"]
        provider = self.providers.get(name)
        if provider is None:
            raise web.HTTPNotFound(text="")
        return name, provider

    async def _signed(self, request: web.Request) -> SignedRequest:
        body = await request.read()
        form = await request.post() if request.method == "POST" else request.query
        return SignedRequest(
            method=request.method,
            url=self.settings.base_url(self.port) + request.raw_path,
            headers={name.lower(): value for name, value in request.headers.items()},
            body=body,
            form={name: value for name, value in reversed([*form.items()]) if isinstance(value, str)},
        )


def _link(service: Service, stream: Stream) -> Link:
    match service:
        case EchoService():
            return EchoLink(service, stream)
        case WebsocketService():
            return WebsocketLink(service, stream)


async def _refuse_redirect(*_: object) -> None:
    raise aiohttp.ClientError("the service answered with a redirect; write the final URL into the configuration")


def _is_frame(message: aiohttp.WSMessage) -> bool:
    return message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)


def _named(route: object) -> str:
    return "none" if route is None else "matched"
