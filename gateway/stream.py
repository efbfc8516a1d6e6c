"""One carrier's socket: its session, its link to a service, the tasks between them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import Literal

import aiohttp
from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway import direct
from gateway.bus import Bus, Subscription
from gateway.callcontrol import CallControl
from gateway.capture import Capture
from gateway.clock import Clock
from gateway.door import Door, Pass
from gateway.errors import LocalError, untrace
from gateway.events import (
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Command,
    Event,
    Flow,
    Gap,
    Outcome,
    Speech,
    Spoken,
    Start,
    Stop,
    StopReason,
)
from gateway.figures import Figures, measure
from gateway.journal import Entry, Journal, Legacy, Standing, State
from gateway.listeners import Listeners
from gateway.media import Track
from gateway.metrics import Totals
from gateway.provider import Codec, Provider
from gateway.routing import match
from gateway.services import Line, Link, ServiceLost
from gateway.services.dialect import DialectLink, Dialects, no_dialects
from gateway.services.dialler import Dialler
from gateway.services.echo import EchoLink
from gateway.services.recorder import RecorderLink, prepare
from gateway.services.websocket import WebsocketLink
from gateway.session import Session
from gateway.settings import EchoService, RecorderService, Route, Service, Settings, WebsocketService
from gateway.stall import Stall
from gateway.stopwatch import EVERY, Stopwatch
from gateway.tracing import Tracer

FAREWELL_SECS = 2.0
"""How long a carrier may take to close after it was told to end, and a service to take its last messages."""

REPLACED = 4409
"""The close code for a stream whose call has come back with a newer one."""

REMEMBERED_LOSSES = 1000
"""Calls that ended because their service was lost, remembered for the carrier's next question."""


JOURNAL_MS, JOURNAL_MARGIN_MS = 30_000, 500
"""Of a service's `replay_ms`, what is kept for another process; each call's takes memory that all processes share."""

LOOK_SECS = 0.1
"""How often a stream whose carrier is gone looks whether another process has its call."""

NORMAL_CLOSE = 1000

MILESTONES = (Checkpoint, Spoken, BargeIn, Speech)
"""Events after which a stream that was to stop when all is heard may be over."""

STALLED_BYTES = 64 * 1024
SEND_SECS = 5.0
"""A carrier that has not taken anything for so long, with so much waiting for it, is gone."""


@dataclass
class House:
    """What all streams of a process share."""

    settings: Settings
    bus: Bus
    clock: Clock
    dialler: Dialler
    listening: Dialler
    """Dials listeners: those that can't be reached take no turn from a service that speaks."""
    door: Door
    control: CallControl
    providers: Mapping[str, Provider]
    tracer: Tracer | None
    journal: Journal
    streams: dict[str, Stream] = field(default_factory=dict)
    """By session id."""
    conversations: dict[tuple[str, str], Stream] = field(default_factory=dict)
    """By provider's name and call id: the one stream of a call that the service can speak on."""
    service_lost: dict[tuple[str, str], None] = field(default_factory=dict)
    """Calls, by provider's name and call id, whose last stream ended because of its service; the oldest first."""
    totals: Totals = field(default_factory=Totals)
    """Of the streams that have ended, and of whatever belongs to no stream."""
    dialects: Dialects = no_dialects
    """Who plays the carrier towards services that speak a carrier's protocol."""

    def __post_init__(self) -> None:
        for service in self.settings.services.values():
            if isinstance(service, RecorderService):
                prepare(service)  # finishes what a process that died has left


class Stream:
    """One carrier's socket with its session and its link. The server makes one per connection and awaits `run`."""

    __slots__ = (
        "_admitted", "_armed", "_began", "_capture", "_channel", "_closed_with", "_entered", "_failure", "_frame_ms", "_house",
        "_idle", "_journal", "_lead_ms", "_legacy", "_links", "_listeners", "_loop", "_owed", "_put", "_released", "_serving",
        "_socket", "_stall", "_stopwatch", "_taken", "_tasks", "_timed_frame", "_transport", "_untimed", "_wake", "dialler",
        "kind", "log", "provider", "route", "session", "session_id", "start", "subscription",
    )  # fmt: skip

    def __init__(
        self,
        house: House,
        provider_name: str,
        codec: Codec,
        socket: web.WebSocketResponse,
        transport: asyncio.Transport,
        admitted: Pass,
        log: FilteringBoundLogger,
    ) -> None:
        self.session_id = uuid.uuid4().hex
        self.provider = provider_name
        self.kind = house.settings.providers[provider_name].kind
        self.dialler = house.dialler
        self.log = log.bind(session=self.session_id)
        self._house = house
        self._admitted = admitted
        self._entered = False
        self._socket = socket
        self._transport = transport
        self._put = direct.outlet(socket)
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._idle = False  # the writer has nothing to do, and leaves sending to whoever has something
        self._failure: Exception | None = None  # of sending outside the writer's task
        self._tasks: asyncio.TaskGroup
        self._serving: asyncio.Task[None] | None = None
        self._links: list[Link] = []
        self._listeners: Listeners | None = None
        self._taken: Route | None = None
        captures = any(route.capture for route in house.settings.routes)
        self._capture = Capture(asyncio.get_running_loop().time()) if captures else None
        self._began = self._loop.time()
        self._armed = float("inf")
        self._lead_ms, self._frame_ms = codec.limits.lead_ms, codec.limits.frame_ms
        self._journal: Entry | None = None
        self._legacy: Legacy | None = None
        self._owed: tuple[str, ...] = ()  # checkpoints of the call's last stream, until a service is told what became of them
        self._closed_with: int | None = None  # the carrier's own close code
        self._released = asyncio.Event()  # nobody need wait for the carrier to come back
        self._stall = Stall()
        self._stopwatch = Stopwatch()
        self._timed_frame = EVERY  # the carrier's frames from this number on are timed
        self._untimed = EVERY  # commands until the next one is timed
        self.route: str | None = None
        self._channel = house.bus.channel(self.session_id)
        self.subscription: Subscription
        self.start: Start
        self.session = Session(
            codec,
            emit=self._emit,
            note=self._note,
            capacity_ms=house.settings.capacity_ms,
        )

    async def run(self) -> None:
        """Carry the stream until one side ends it."""
        self._house.streams[self.session_id] = self
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                writing = tasks.create_task(self._write())
                try:
                    await self._read()
                    if self._may_return():
                        writing.cancel()
                        await self._hold()
                finally:
                    self.end(StopReason.CARRIER_CLOSED)
                    if self._serving is not None:
                        await asyncio.sleep(0)  # or a task that has just been made would never have begun
                        if not (self._links and self._links[-1].unknown):
                            await asyncio.wait([self._serving], timeout=FAREWELL_SECS)
                        self._serving.cancel()
                    writing.cancel()
                    self._depart()  # listeners may take their time: the call is over
                    if self._listeners is not None:
                        self._house.totals.outlive(*await self._listeners.finish(FAREWELL_SECS))
        except Exception:
            self.log.exception("stream_failed")
            await self._socket.close(code=aiohttp.WSCloseCode.INTERNAL_ERROR)
        finally:
            self._depart()

    def release(self) -> None:
        """After `run`: hold nothing that holds us, or only the garbage collector would ever free what a call has had."""
        self._links, self._listeners, self._serving = [], None, None
        self.session.release()
        direct.release(self._socket)

    def end(self, reason: StopReason) -> None:
        """End the stream from outside; the first reason counts."""
        if reason is StopReason.SERVICE_LOST and not self.session.over:
            self.session.close_code = aiohttp.WSCloseCode.INTERNAL_ERROR
        self.session.end(reason, self._loop.time())
        self._wake.set()
        self._released.set()

    async def hand_over(self) -> None:
        """Have the carrier ask for its call again, so that another process goes on with it; the service is not told of an end.

        Where that can't be, or it does not come back within `reattach_secs`, the stream ends.
        """
        if self._journal is None:
            self.end(StopReason.DRAIN)
            return
        self.log.info("handing_over")
        with suppress(ConnectionError):
            await self._socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)

    def supersede(self) -> bool:
        """Another stream of this call goes on with it: nobody is told of an end. False if it can't be left to it."""
        if self._journal is None or self.session.over:
            return False
        self._journal.close()
        self._journal = None
        if self._serving is not None:
            self._serving.cancel()
        self._channel.unsubscribe(self.subscription)
        self.end(StopReason.CARRIER_CLOSED)
        return True

    def look(self, elapsed: float) -> None:
        """Whoever has the process's clock calls this a few times a second: has the carrier gone silent?"""
        session, stall = self.session, self._stall
        if session.over or session.playout is None or self._socket.closed:
            return  # not begun, of text, or waiting for the carrier to come back
        silent_secs = stall.silent_secs
        if session.received_bytes == stall.audio:
            session.settle()  # what was overtaken would have been here by now
        change = stall.look(session.received_bytes, session.frames_in, elapsed)
        if change == "stalled":
            self._house.totals.happened("telephony_media_stalls", self.provider)
            self.log.warning("media_stalled", silent_ms=round(stall.silent_secs * 1000))
        elif change == "resumed":
            self.log.info("media_resumed", silent_ms=round(silent_secs * 1000))
        patience = self._house.settings.stall_timeout_secs
        if patience and stall.mute_secs >= patience:
            self.log.warning("stall_timeout", after_secs=patience)
            self.end(StopReason.TIMEOUT)

    def figures(self) -> Figures:
        """How it fares."""
        return measure(
            self.provider,
            self.session,
            self._links,
            self.subscription if self._links else None,
            self._stopwatch,
            self._listeners.figures() if self._listeners is not None else (),
            entered=self._entered,
            began=self._began,
            now=self._loop.time(),
        )

    @property
    def account(self) -> Provider:
        """Whose call it is, as configured when it came."""
        return self._house.providers[self.provider]

    # --- the line that links see ---

    def perform(self, command: Command) -> None:
        if self._untimed and type(command) is not Clear:
            self._untimed -= 1
            self.session.perform(command, self._loop.time())
        else:
            self._perform_timed(command)
        if type(command) is Checkpoint and self._journal is not None:
            self._journal.pending(self.session.pending(self._loop.time())[1])
        self._send_due()

    def pending(self) -> tuple[int, tuple[str, ...]]:
        queued_ms, names = self.session.pending(self._loop.time())
        if self._owed and self._links[-1].figures().took_at is not None:
            self._owed = ()  # they are on their way
        return queued_ms, (*self._owed, *names)

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        self.session.fault(code, message, ref)

    def report(self, code: str, message: str) -> None:
        self.session.fault(code, message)

    # --- carrier to gateway ---

    async def _read(self) -> None:
        session, loop = self.session, self._loop
        try:
            try:
                async with asyncio.timeout(self._house.settings.start_timeout_secs):
                    while session.start is None and not session.over:
                        message = await self._socket.receive()
                        if not self._is_frame(message):
                            return
                        if self._capture is not None:
                            self._capture.take("in", message.data, loop.time())
                        session.receive(message.data, loop.time())
            except TimeoutError:
                self.log.warning("no_start", after_secs=self._house.settings.start_timeout_secs)
                session.close_code = aiohttp.WSCloseCode.POLICY_VIOLATION
                self.end(StopReason.TIMEOUT)
            direct.hand_over(self._socket, self._take)
            receive, messages = self._socket.receive, 0
            while self._is_frame(message := await receive()):
                self._take(message.data)
                messages += 1
                if not messages % direct.IN_A_ROW:
                    await asyncio.sleep(0)  # other calls have their turn
        except ConnectionError:
            pass  # a ping met a closing transport: the same as a close
        finally:
            direct.hand_over(self._socket, None)

    def _take(self, frame: str | bytes) -> bool:
        """One frame of the carrier once the stream has started."""
        session = self.session
        if self._capture is not None:
            self._capture.take("in", frame, self._loop.time())
        if session.frames_in < self._timed_frame:
            session.receive(frame, self._loop.time())
        else:
            self._receive_timed(frame)
        if session.stop is not None:
            self._wake.set()
        return True

    def _is_frame(self, message: aiohttp.WSMessage) -> bool:
        """Whether it is one; else the stream is over, and that the carrier broke the WebSocket protocol, or vanished, is said."""
        if message.type is aiohttp.WSMsgType.ERROR:
            if isinstance(message.data, direct.HandlerFailed):
                raise message.data
            if isinstance(message.data, aiohttp.WebSocketError):
                self.log.warning("broken_websocket", error=str(message.data))
                self.end(StopReason.PROTOCOL_ERROR)
            else:
                self.log.warning("carrier_vanished", error=str(message.data))  # no pong came
                self._transport.abort()  # or what it has not taken would keep the socket open
        if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            if message.type is aiohttp.WSMsgType.CLOSE:
                self._closed_with = message.data
            return False
        return True

    def _emit(self, event: Event) -> None:
        if type(event) is Audio:
            self._channel.publish(event)
            return
        if type(event) is Start:
            self._open(event)
        elif type(event) in MILESTONES:
            self._wake.set()  # a stop may have waited for it
            if type(event) is Checkpoint and self._journal is not None:
                self._journal.pending(self.session.pending(self._loop.time())[1])
        elif type(event) is Flow:
            self.log.info("flow", state=event.state, buffered_ms=event.buffered_ms)
        elif type(event) is Stop and self._journal is not None:
            # Before the carrier can see its socket closed, and ask anybody what comes next.
            self._journal.end(State.LOST if event.reason is StopReason.SERVICE_LOST else State.ENDED)
        self._channel.publish(event)
        if self._legacy is not None and type(event) is Start:
            self._tell_inheritance(self._legacy)

    def _open(self, start: Start) -> None:
        """The start frame has come: if it may come in, find the service and let it take over."""
        self.start = start
        self.log = self.log.bind(call_id=start.call_id)
        refusal = self._house.door.enter(self.provider, self._admitted, start, self._loop.time())
        if refusal is not None:
            self.log.warning("stream_refused", reason=refusal)
            self._house.totals.refuse(self.provider, refusal)
            self.session.close_code = aiohttp.WSCloseCode.POLICY_VIOLATION
            self._loop.call_soon(self.end, StopReason.PROTOCOL_ERROR)
            return
        self._entered = True
        self._replace(start)
        settings = self._house.settings
        route = self._route(start)
        if route is not None:
            self._keep_journal(start, route)
        self.route, self._taken = (route.label, route) if route is not None else (None, None)
        self.log.info("stream_started", stream_id=start.stream_id, media_format=str(start.media_format), route=self.route)
        if route is None:
            self.log.warning("no_route", caller=start.caller, called=start.called)
            self._loop.call_soon(self.end, StopReason.SERVICE_LOST)
            return
        service = settings.services[route.service[0]]
        track = service.track if isinstance(service, WebsocketService) else Track.INBOUND
        self.subscription = Subscription(start.media_format, capacity_ms=settings.hold_ms, track=track)
        self._channel.subscribe(self.subscription)
        self._serving = self._tasks.create_task(self._serve(route))
        if any(_hears_playout(settings.services[name]) for name in (*route.service, *route.listeners)):
            self.session.follow_playout(self._loop.time())
        if self._capture is not None and route.capture is not None:
            self._capture.keep(Path(route.capture), self.provider, self.kind, self.session_id, self._capture_failed)
        elif self._capture is not None:
            self._capture = None
        self._listeners = Listeners(self, self._channel, self._house.listening, capacity_ms=settings.hold_ms)
        for name in route.listeners:
            self._listen(self._listeners, name, settings.services[name], route)

    def _listen(self, listeners: Listeners, name: str, service: Service, route: Route) -> None:
        link = partial(_link, [(name, service)], route=route, dialects=self._house.dialects, role="listener")
        listeners.add(self._tasks, name, service, link)

    def attach(self, name: str, service: Service) -> None:
        """Have one more service listen from now on. Raises LocalError with a sentence where it can't."""
        listeners, route = self._listeners, self._taken
        if listeners is None or route is None or self.session.over:
            raise LocalError("the stream is over" if self.session.over else "the stream has not started")
        if (refused := listeners.refuses(name)) is not None:
            raise LocalError(refused)
        if _hears_playout(service):
            self.session.follow_playout(self._loop.time())
            self._send_due()  # a line on which nothing happens is silent from now on, not from when something does
        self._listen(listeners, name, service, route)

    async def detach(self, name: str) -> bool:
        """Take a listener off the call, once it has taken what it was told. False: there is none of this name."""
        self.session.tell_heard(self._loop.time())
        stop = Stop(StopReason.DETACHED, account=self.session.account(self._loop.time()))
        return self._listeners is not None and await self._listeners.remove(name, stop, FAREWELL_SECS)

    def _route(self, start: Start) -> Route | None:
        """The route that the webhook chose, or else the one for what the start frame says."""
        settings, ticket = self._house.settings, self._admitted.ticket
        chosen = settings.route(ticket.route) if ticket is not None else None
        return chosen or match(settings.routes, provider=self.provider, called=start.called, caller=start.caller)

    def _replace(self, start: Start) -> None:
        """A call has one stream that is spoken on: a newer one takes over from one whose end we have not seen."""
        if not start.accepts:
            return
        key = (self.provider, start.call_id)
        older = self._house.conversations.get(key)
        if older is not None:
            older.log.warning("stream_replaced", by=self.session_id)
            older.session.close_code = REPLACED
            if not older.supersede():
                older.end(StopReason.CARRIER_CLOSED)
        self._house.conversations[key] = self

    # --- when the carrier's socket is lost ---

    def _keep_journal(self, start: Start, route: Route) -> None:
        """See to it that this call can go on elsewhere; go on with it if it comes from there."""
        house = self._house
        if not start.accepts or self._admitted.ticket is None or not house.settings.reattach_secs:
            return  # a carrier that only lets us listen, or was not answered by us, does not ask again
        service, capacity = house.settings.services[route.service[0]], 0
        if isinstance(service, WebsocketService) and service.dialect is None and start.media_format is not None:
            capacity = start.media_format.bytes_for(min(service.replay_ms, JOURNAL_MS) + JOURNAL_MARGIN_MS)
        standing = Standing(self.session_id, route.label)
        self._journal, self._legacy = house.journal.begin(self.provider, start.call_id, standing, capacity=capacity)
        if self._journal is None:
            house.totals.happened("telephony_calls_not_journaled", self.provider)
            house.door.remarks.tell("call_not_journaled", self._loop.time(), problem=house.journal.problem)
        if self._legacy is not None:
            self._owed = self._legacy.standing.checkpoints
            self._become(self._legacy.standing.session)

    def _become(self, session_id: str) -> None:
        """The session that a service knows already."""
        streams = self._house.streams
        older = streams.get(session_id)
        if older is not None and older is not self:
            older.end(StopReason.CARRIER_CLOSED)
            older._depart()
        del streams[self.session_id]
        self.session_id = self._channel.session_id = session_id
        streams[session_id] = self
        self.log = self.log.bind(session=session_id)

    def _tell_inheritance(self, legacy: Legacy) -> None:
        """What the service missed while nobody had the call. Listeners hear a stream of their own."""
        # In whole frames: what follows stays in step with the service's, and is passed on as it comes.
        lost_ms = round((monotonic() - legacy.silent_since) * 1000 / self._frame_ms) * self._frame_ms
        self._house.totals.happened("telephony_streams_reattached", self.provider)
        self.log.info("call_reattached", silent_ms=lost_ms, checkpoints_lost=len(self._owed))
        if legacy.heard and self.start.media_format is not None:
            self.subscription.offer(Gap(lost_ms, Track.INBOUND))
        for name in self._owed:
            self.subscription.offer(Checkpoint(name, Outcome.LOST, 0))

    def _may_return(self) -> bool:
        """Whether the carrier has only lost its connection, and will ask for the call again."""
        if self._journal is None or self.session.over or self.session.farewell:
            return False
        return self._closed_with != NORMAL_CLOSE or self.account.carrier().habits.says_stop

    async def _hold(self) -> None:
        """The carrier is gone without a word: give it, and whichever process it comes to, a while to take up the call."""
        waits_secs = self._house.settings.reattach_secs
        self._house.totals.happened("telephony_streams_lost", self.provider)
        self.log.warning("carrier_lost", code=self._closed_with, waits_secs=waits_secs)
        with suppress(TimeoutError):
            async with asyncio.timeout(waits_secs):
                while self._journal is not None and not self.session.over and not self._journal.concluded:
                    if self._journal.superseded:
                        self.log.info("taken_over")
                        self.supersede()
                        break
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._released.wait(), LOOK_SECS)

    def _depart(self) -> None:
        """The call is over, whoever still listens."""
        if self._house.streams.get(self.session_id) is self:
            if self._capture is not None:
                reason = self.session.stop.reason if self.session.stop is not None else None
                self._capture.close(reason, self._loop.time())
            self._leave()
            self._summarize()

    def _leave(self) -> None:
        """Give back everything this stream held of the house."""
        house, session = self._house, self.session
        del house.streams[self.session_id]
        if self._journal is not None:
            self._journal.end(State.ENDED)
        if not self._entered:
            if session.start is None:
                house.door.leave(self._admitted)
            return
        house.door.left(self.provider, self.start.call_id, self._loop.time())
        key = (self.provider, self.start.call_id)
        if house.conversations.get(key) is self:
            del house.conversations[key]
        if session.stop is not None and session.stop.reason is StopReason.SERVICE_LOST:
            house.service_lost[key] = None
            while len(house.service_lost) > REMEMBERED_LOSSES:
                del house.service_lost[next(iter(house.service_lost))]

    async def _serve(self, route: Route) -> None:
        """The services of a route one after the other, until one has served the call to its end."""
        for group in _groups([(name, self._house.settings.services[name]) for name in route.service]):
            link = _link(group, self, route, self._house.dialects, journal=self._journal, legacy=self._legacy)
            self._legacy = None
            self._links.append(link)
            try:
                await link.run()
                return
            except ServiceLost as lost:
                self.log.error("service_lost", services=[name for name, _ in group], error=str(lost))
                untrace(lost)
                if lost.begun and route.on_lost == "hangup":
                    break
            except asyncio.CancelledError as cancelled:
                untrace(cancelled)  # a task remembers it
                return
        self.end(StopReason.SERVICE_LOST)

    # --- gateway to carrier ---

    def _send_due(self) -> None:
        """Send what is due, and see to it that the rest is sent in time; what can't be done at once is left to the writer."""
        if not self._idle:
            self._wake.set()
            return
        session = self.session
        try:
            while self._transport.get_write_buffer_size() < STALLED_BYTES:
                frame = self._next_frame()
                if frame is None:
                    if session.over:
                        break
                    return
                self._put(frame)
                if self._stopwatch.running:
                    self._sent()
                if session.settled:
                    return
        except Exception as error:
            self._idle, self._failure = False, error
        self._wake.set()

    def _next_frame(self) -> str | bytes | None:
        """What is to be sent now; if there is nothing, the clock has been told when there will be."""
        session, now = self.session, self._loop.time()
        frame = session.next_frame(now)
        if frame is None:
            due = session.next_due()
            if due is not None and (due < self._armed or self._armed < now):
                self._armed = due
                self._house.clock.wake_at(due, self._send_due)
        elif self._capture is not None:
            self._capture.take("out", frame, now)
        return frame

    async def _write(self) -> None:
        """Carry out what can't be done at once: wait for a carrier that is full, and close."""
        session, wake = self.session, self._wake
        try:
            while self._failure is None:
                frame = self._next_frame()
                if frame is not None:
                    await self._send(frame)
                    if self._stopwatch.running:
                        self._sent()
                    continue
                if session.over:
                    break
                self._idle = True
                try:
                    await wake.wait()
                finally:
                    self._idle = False
                wake.clear()
            if self._failure is not None:
                raise self._failure
            if session.farewell:
                # The carrier was told and closes by itself; closing first would look like a failure to it.
                await asyncio.sleep(FAREWELL_SECS)
            async with asyncio.timeout(SEND_SECS):
                await self._socket.close(code=session.close_code)
        except TimeoutError:
            self._transport.abort()
        except ConnectionError:
            pass  # the reader sees the same and ends the stream

    async def _send(self, frame: str | bytes) -> None:
        """One frame to the carrier. Raises ConnectionError when the carrier takes nothing any more."""
        sending = self._socket.send_str(frame) if isinstance(frame, str) else self._socket.send_bytes(frame)
        if self._transport.get_write_buffer_size() < STALLED_BYTES:
            await sending
            return
        try:
            async with asyncio.timeout(SEND_SECS):
                await sending
        except TimeoutError:
            self.log.warning("carrier_stalled", waiting_bytes=self._transport.get_write_buffer_size())
            self._transport.abort()
            raise ConnectionResetError from None

    # --- how long it takes: one frame of EVERY, and each clear ---

    def _receive_timed(self, frame: str | bytes) -> None:
        """Take a frame like any other, and see when its audio has left for the service."""
        at, session = monotonic(), self.session
        before = self.subscription.offered_bytes if self._links else 0
        session.receive(frame, self._loop.time())
        self._timed_frame = session.frames_in + EVERY
        if self._links:
            offered = self.subscription.offered_bytes
            if offered > before:
                self._stopwatch.hear(at, offered)
            self._loop.call_soon(self._heard)  # the link, woken by the same frame, has its turn before this

    def _heard(self) -> None:
        held = self.subscription.audio_bytes + self._links[-1].held_bytes
        if not self._stopwatch.heard(monotonic(), self.subscription.offered_bytes, held):
            self._timed_frame = 0  # look again with the next frame

    def _perform_timed(self, command: Command) -> None:
        at, now, session = monotonic(), self._loop.time(), self.session
        session.perform(command, now)
        self._untimed = EVERY - 1
        playout = session.playout
        if playout is None or session.over:
            return
        if type(command) is Clear and session.waiting:
            self._stopwatch.cut(at)
        elif type(command) is Audio and playout.queued_bytes <= len(command.payload) and playout.ahead_ms(now) < self._lead_ms:
            self._stopwatch.say(at, playout.totals(now)[0])  # live: what waits behind other audio, or for its time, is not late

    def _sent(self) -> None:
        session, playout = self.session, self.session.playout
        queued, held = (playout.totals(self._loop.time())[0], playout.queued_bytes) if playout is not None else (0, 0)
        self._stopwatch.left(monotonic(), queued, held, told=not session.waiting)

    # --- for the operator ---

    def _capture_failed(self, error: Exception) -> None:
        self._capture = None
        self.log.error("capture_failed", error=str(error))

    def _note(self, what: str, values: dict[str, object]) -> None:
        self.log.warning(what, **values)

    def _summarize(self) -> None:
        """The one canonical line of a stream."""
        figures = self.figures()
        self._house.totals.end(figures)
        self.log.info("stream_ended", **figures.line(), route=self.route, close_code=self._socket.close_code)


Named = tuple[str, Service]


def _groups(services: list[Named]) -> list[list[Named]]:
    """Neighbours that one link can choose from."""
    return [[*group] for _, group in groupby(services, key=lambda each: (type(each[1]), _speaks_a_dialect(each[1])))]


def _speaks_a_dialect(service: Service) -> bool:
    return isinstance(service, WebsocketService) and service.dialect is not None


def _hears_playout(service: Service) -> bool:
    """Whether it wants what the caller hears."""
    return isinstance(service, RecorderService) or (isinstance(service, WebsocketService) and service.track is Track.OUTBOUND)


def _link(
    group: list[Named],
    line: Line,
    route: Route,
    dialects: Dialects,
    role: Literal["speaker", "listener"] = "speaker",
    journal: Entry | None = None,
    legacy: Legacy | None = None,
) -> Link:
    """A link to the first of these services that takes the call; all are of one kind."""
    service = group[0][1]
    match service:
        case EchoService():
            return EchoLink(group[0][0], service, line)
        case RecorderService():
            return RecorderLink(group[0][0], service, line)
        case WebsocketService():
            several = [(name, each) for name, each in group if isinstance(each, WebsocketService)]
            if service.dialect is not None:
                return DialectLink(several, line, dialects, on_lost=route.on_lost, role=role)
            return WebsocketLink(several, line, on_lost=route.on_lost, role=role, journal=journal, legacy=legacy)
