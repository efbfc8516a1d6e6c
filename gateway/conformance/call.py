"""A call without a carrier: a real session and a real link to somebody's service, with a script where the telephone would be.

For `gateway.conformance`. What passes over the service's sockets is seen, and can be changed, by `Tap`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import structlog
from msgspec import Struct

from gateway.bus import Subscription
from gateway.ear import Ear
from gateway.events import (
    COMMAND_NAMES,
    Audio,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Language,
    Message,
    Play,
    Say,
    Start,
    Stop,
    StopReason,
)
from gateway.media import MULAW_8K, MediaFormat, Track
from gateway.provider import Limits
from gateway.services import ServiceLost
from gateway.services.dialler import Dialler, ServiceSocket
from gateway.services.websocket import WebsocketLink
from gateway.session import Session
from gateway.settings import WebsocketService

CHUNK_MS = 20
AUDIO_COMMANDS: frozenset[type[Message]] = frozenset({Audio, Checkpoint, Clear, Stop})
ACCEPTS = tuple(sorted(COMMAND_NAMES[each] for each in AUDIO_COMMANDS))
TEXT_COMMANDS: frozenset[type[Message]] = frozenset({Say, Play, Language, Dtmf, Checkpoint, Stop})

_silent = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class Received(Struct):
    """One message of the service, and when it came."""

    at: float
    data: str | bytes


class Tap(ServiceSocket):
    """A connection that remembers what came, and how it ended."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.received: list[Received] = []
        self.sent: list[bytes] = []
        """Audio messages."""
        self.alter: Callable[[str], str] | None = None
        self.severed = False
        self.close_secs: float | None = None
        """How long our close frame waited for its answer."""
        self.ended_by: int | None = None
        """The close code of the service that ended the connection by itself; 1006: without a close frame."""

    async def send_str(self, data: str, compress: int | None = None) -> None:
        await super().send_str(self.alter(data) if self.alter is not None else data, compress)

    async def send_bytes(self, data: Any, compress: int | None = None) -> None:
        self.sent.append(bytes(data))
        await super().send_bytes(data, compress)

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:  # noqa: ASYNC109 - aiohttp's signature
        message = await super().receive(timeout)
        now = asyncio.get_running_loop().time()
        if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
            self.received.append(Received(now, message.data))
        elif self.ended_by is None and self.close_secs is None and not self.severed:
            if message.type is aiohttp.WSMsgType.CLOSE:
                self.ended_by = message.data or 1005
            elif message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR) and not self._ours:
                error = message.data
                self.ended_by = error.code if isinstance(error, aiohttp.WebSocketError) else 1006
        return message

    _ours = False

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        if self.close_code is not None:
            return await super().close(code=code, message=message)
        self._ours = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            return await super().close(code=code, message=message)
        finally:
            if self.close_secs is None:
                self.close_secs = loop.time() - began

    @property
    def audio_bytes(self) -> int:
        return sum(len(each.data) for each in self.received if isinstance(each.data, bytes))

    def hang_up_rudely(self) -> None:
        """Cut the connection without a close frame."""
        self.severed = True
        self.transport.abort()


class TapDialler(Dialler):
    """Dials so that all that passes is seen."""

    def __init__(self, user_agent: str) -> None:
        super().__init__(user_agent)
        self.http._ws_response_class = Tap
        self.watchers: dict[str, Callable[[Tap], None]] = {}
        """Called with each connection to the service of that name."""

    async def dial(self, name: str, service: WebsocketService) -> ServiceSocket:
        socket = await super().dial(name, service)
        if isinstance(socket, Tap) and name in self.watchers:
            self.watchers[name](socket)
        return socket


class _Paper:
    """A codec whose frames are the structs themselves."""

    def __init__(self, accepts: frozenset[type[Message]]) -> None:
        self.accepts = accepts
        self.limits = Limits()
        self.inbox: deque[Event] = deque()
        self.outbox: deque[Command] = deque()

    def decode(self, frame: str | bytes) -> Iterable[Event]:
        return (self.inbox.popleft(),)

    def encode(self, command: Command) -> Iterable[str | bytes]:
        if isinstance(command, Stop):
            return ()
        self.outbox.append(command)
        return ("",)


class ScriptedCall:
    """One call. `tell` is what the telephone says; what came back is in `taps`, `events` and `commands`. A `Line` to its link."""

    provider = "conformance"
    kind = "conformance"

    def __init__(
        self,
        dialler: TapDialler,
        service: WebsocketService,
        *,
        text: bool = False,
        alter: Callable[[str], str] | None = None,
        **start: Any,
    ) -> None:
        self.session_id = uuid.uuid4().hex
        self.log = _silent.bind()
        self.service = service
        self.carrier_format: MediaFormat | None = None if text else MULAW_8K
        self.taps: list[Tap] = []
        self.events: list[tuple[float, Event]] = []
        """What the service was told, but audio."""
        self.commands: Counter[type[Message]] = Counter()
        self.names: list[str] = []
        """Names of checkpoints, as they were asked for."""
        self.reused: list[str] = []
        """Those that were asked for again on the same connection while they were pending."""
        self.lost: str | None = None
        """Why the link gave up, if it did."""
        self.asked_to_stop = False
        self.speed = 1.0
        """How fast the listener's clock runs."""
        self._alter = alter
        self._loop = asyncio.get_running_loop()
        self._base = self._line_base = self._loop.time()
        self._pending: Counter[str] = Counter()
        self._asked: defaultdict[int, set[str]] = defaultdict(set)  # names, by the connection on which they came
        self._spoken_ms = 0
        accepts = TEXT_COMMANDS if text else AUDIO_COMMANDS
        options: dict[str, Any] = {"caller": "+15550100001", "called": "+15550100002", "direction": "inbound"}
        options |= {"account_id": "conformance", "parameters": {"purpose": "conformance"}} | start
        self.start = Start(
            stream_id=f"stream-{self.session_id[:12]}",
            call_id=f"call-{self.session_id[:12]}",
            media_format=self.carrier_format,
            accepts=tuple(sorted(COMMAND_NAMES[each] for each in accepts)),
            **options,
        )
        self.subscription = Subscription(self.carrier_format, capacity_ms=10_000, track=Track.INBOUND)
        self.name = f"conformance-{self.session_id}"
        self.dialler: Dialler = dialler
        self._codec = _Paper(accepts)
        self.session = Session(self._codec, emit=self.publish, note=lambda what, values: None)
        self._ear = Ear(MULAW_8K)
        self.link = WebsocketLink([(self.name, service)], self)

    # --- the line ---

    def perform(self, command: Command) -> None:
        self.commands[type(command)] += 1
        if isinstance(command, Checkpoint):
            if self._pending[command.name] and command.name in self._asked[len(self.taps)]:
                self.reused.append(command.name)
            self._asked[len(self.taps)].add(command.name)
            self._pending[command.name] += 1
            self.names.append(command.name)
        elif isinstance(command, Stop):
            self.asked_to_stop = True
        self.session.perform(command, self.now())

    def pending(self) -> tuple[int, tuple[str, ...]]:
        return self.session.pending(self.now())

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        self.session.fault(code, message, ref)

    def report(self, code: str, message: str) -> None:
        self.session.fault(code, message)

    # --- the script ---

    @property
    def tap(self) -> Tap:
        """The latest connection."""
        return self.taps[-1]

    @property
    def open(self) -> bool:
        return bool(self.taps) and not self.tap.closed and self.lost is None and not self.session.over

    @property
    def trouble(self) -> int | None:
        """The close code of a connection that the service ended and should not have, or None."""
        return next((tap.ended_by for tap in self.taps if tap.ended_by not in (None, 1000, 1005)), None)

    @property
    def ended_it(self) -> bool:
        """Whether the service ended the call in an orderly way, which is its right."""
        return self.asked_to_stop or any(tap.ended_by in (1000, 1005) for tap in self.taps)

    @property
    def audio_bytes(self) -> int:
        return sum(tap.audio_bytes for tap in self.taps)

    def faults(self) -> list[Fault]:
        return [event for _, event in self.events if isinstance(event, Fault)]

    def told(self, kind: type[Message]) -> list[tuple[float, Event]]:
        return [(at, event) for at, event in self.events if isinstance(event, kind)]

    def now(self) -> float:
        """The listener's clock."""
        return self._line_base + (self._loop.time() - self._base) * self.speed

    def hurry(self, speed: float) -> None:
        """Let the listener's time pass faster."""
        self._line_base, self._base, self.speed = self.now(), self._loop.time(), speed

    def tell(self, event: Event) -> None:
        """Something happens on the telephone."""
        self._codec.inbox.append(event)
        self.session.receive("", self.now())

    async def speak(self, ms: int, clip: bytes = b"", *, pace: float = 0.5) -> None:
        """The caller talks, at `pace` seconds for each second of it (0: all at once)."""
        step = MULAW_8K.bytes_for(CHUNK_MS)
        size = MULAW_8K.bytes_for(ms)
        clip = (clip or MULAW_8K.silence(CHUNK_MS)) * (size // (len(clip) or step) + 1)
        begin = self._loop.time()
        for number, at in enumerate(range(0, size, step)):
            if not self.open:
                return
            self.tell(Audio(clip[at : at + step], timestamp_ms=self._spoken_ms))
            self._spoken_ms += CHUNK_MS
            await asyncio.sleep(max(0.0, begin + (number + 1) * CHUNK_MS / 1000 * pace - self._loop.time()))

    def skip(self, ms: int) -> None:
        """The carrier loses audio."""
        self._spoken_ms += ms

    async def inject(self, frame: str | bytes) -> None:
        """Say something that the link would not say now."""
        try:
            await (self.tap.send_str(frame) if isinstance(frame, str) else ServiceSocket.send_bytes(self.tap, frame))
        except ConnectionError:
            return

    async def until(self, condition: Callable[[], object], secs: float) -> bool:
        """Whether it came true in time."""
        end = self._loop.time() + secs
        while not condition():
            if self._loop.time() >= end:
                return False
            await asyncio.sleep(0.01)
        return True

    def publish(self, event: Event) -> None:
        """Tell the service of an event, by the link, whether it happened or not."""
        if type(event) is not Audio:
            self.events.append((self._loop.time(), event))
            if isinstance(event, Checkpoint):
                self._pending[event.name] -= 1
        self.subscription.offer(event)

    # --- inside ---

    def connected(self, tap: Tap) -> None:
        """One more connection of this call."""
        tap.alter = self._alter
        self.taps.append(tap)

    async def serve(self) -> None:
        try:
            await self.link.run()
        except ServiceLost as lost:
            self.lost = str(lost)
        self.session.end(StopReason.SERVICE_LOST, self.now())

    async def listen(self) -> None:
        """Be the carrier: take what the session sends when it sends it, and confirm what has played."""
        while True:
            now = self.now()
            while self.session.next_frame(now) is not None:
                self._take(self._codec.outbox.popleft(), now)
            self._confirm(self._ear.advance(now))
            await asyncio.sleep(0.01)

    def _take(self, command: Command, now: float) -> None:
        if isinstance(command, Audio):
            self._ear.media(command.payload, now)
        elif isinstance(command, Checkpoint):
            self._confirm(self._ear.checkpoint(command.name, now))
        elif isinstance(command, Clear):
            self._confirm(self._ear.clear(now))

    def _confirm(self, events: list[Event]) -> None:
        for event in events:
            self.tell(event)


@asynccontextmanager
async def scripted_call(
    dialler: TapDialler,
    service: WebsocketService,
    *,
    connect_secs: float = 5.0,
    watch: Callable[[ScriptedCall], None] = lambda call: None,
    **options: Any,
) -> AsyncIterator[ScriptedCall]:
    """A call that the service has taken, or has not: look at `open`. Leaving the block hangs up, if nobody has."""
    call = ScriptedCall(dialler, service, **options)
    watch(call)
    async with asyncio.TaskGroup() as tasks:
        dialler.watchers[call.name] = call.connected
        call.tell(call.start)
        serving, listening = tasks.create_task(call.serve()), tasks.create_task(call.listen())
        await call.until(lambda: call.taps or call.lost is not None, connect_secs)
        try:
            yield call
        finally:
            call.session.end(StopReason.CALLER_HANGUP, call.now())
            await asyncio.wait([serving], timeout=4.0)
            for task in (serving, listening):
                task.cancel()
            del dialler.watchers[call.name]
            for tap in call.taps:
                if not tap.closed:
                    tap.transport.abort()
                    await tap.close()
