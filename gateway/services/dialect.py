"""A stream's link to services that were written for a carrier: the gateway plays that carrier, by the `Carrier` half of its kind.

What that carrier would not do is not done: no answer to a bad frame, no second connection in mid-call, no word of ours.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, Protocol, assert_never

from aiohttp import WebSocketError, WSMessage, WSMsgType
from msgspec import structs

from gateway.audio import Converter, Reframer
from gateway.errors import LocalError, MalformedFrame
from gateway.events import (
    COMMAND_NAMES,
    After,
    Audio,
    BargeIn,
    Checkpoint,
    Clear,
    Dtmf,
    Event,
    Fault,
    Flow,
    Gap,
    Outcome,
    Speech,
    Spoken,
    Start,
    Stop,
    Transcript,
    Unknown,
)
from gateway.media import MediaFormat, Track
from gateway.provider import Carrier, Habits, SignedRequest
from gateway.services import Line, LinkFigures, ServiceLost
from gateway.services.dialect_pipecat import PipecatClient
from gateway.services.dialler import Offer, ServiceSocket, Unreachable
from gateway.services.retry import REFUSALS, Backoff, Limiter, Patience, Verdict, verdict
from gateway.services.websocket import (
    FULL_BYTES,
    LARGEST_AUDIO_BYTES,
    LISTENER_UNITS_PER_SEC,
    MESSAGES_IN_A_ROW,
    POLL_SECS,
    SLICE_BYTES,
    UNIT_BYTES,
)
from gateway.settings import WebsocketService

WRONG_SUBPROTOCOL = 1002
REMARKED_KINDS = 20
"""Kinds of refused frames and commands that are remarked on, once each; the rest is only counted."""


class Account(Protocol):
    """Who plays the carrier: what a link needs of a `Provider`."""

    def carrier(self) -> Carrier:
        """A fresh carrier half for one stream."""
        ...

    def sign(self, request: SignedRequest) -> Mapping[str, str]:
        """The headers with which the carrier signs this upgrade."""
        ...


Dialects = Callable[[str, str | None], Account]
"""From the kind and the token of a dialect to an account that plays this carrier. Raises whatever its options say."""

Named = tuple[str, WebsocketService]


def no_dialects(kind: str, _token: str | None) -> Account:
    """Of a process that was made without any."""
    raise LookupError(f"no dialects here, so {kind} can't be spoken")


class DialectLink:
    """One stream and a list of services, of which one at a time has the call.

    At the start of a call they are tried in order, over and over, until one takes it. The one that has it is not dialled again
    when it is lost, as a carrier does not: `on_lost` decides about the next of the list. Its orderly close ends the stream.
    """

    def __init__(
        self,
        services: Sequence[Named],
        line: Line,
        dialects: Dialects,
        *,
        on_lost: Literal["hangup", "next"] = "hangup",
        role: Literal["speaker", "listener"] = "speaker",
    ) -> None:
        self._line = line
        self._dialects = dialects
        self._on_lost = on_lost
        self._role = role
        self._loop = asyncio.get_running_loop()
        self._left = [*services]
        """Services that may still take the call."""
        self._name, self._service = services[0]
        self._conversation: _Conversation | None = None
        self._taken: deque[Event] = deque()
        """Events that are out of the subscription and not sent yet."""
        self._socket: ServiceSocket | None = None
        self._took_at: float | None = None
        self._begun = False
        self._forwarded = 0
        self._losses: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        """What was refused of what services said, by what was wrong with it."""

    @property
    def forwarded_bytes(self) -> int:
        """See `Link`."""
        return self._forwarded + (self._conversation.forwarded if self._conversation is not None else 0)

    @property
    def held_bytes(self) -> int:
        """See `Link`."""
        track = self._service.track
        return sum(len(event.payload) for event in self._taken if type(event) is Audio and event.track is track)

    @property
    def unknown(self) -> bool:
        """See `Link`."""
        return self._conversation is None and not self._begun

    def figures(self) -> LinkFigures:
        """See `Link`."""
        conversation, media_format = self._conversation, self._line.start.media_format
        lag_ms = media_format.duration_ms(self.held_bytes) if media_format is not None else 0.0
        state: Literal["serving", "away", "dialling"] = (
            "serving" if conversation is not None else "away" if self._begun else "dialling"
        )
        return LinkFigures(self._name, state, self._took_at, self.held_bytes, lag_ms, self._losses)

    async def run(self) -> None:
        """See `Link.run`."""
        try:
            while not await self._serve():
                pass
        finally:
            if self._socket is not None:
                self._socket.abandon()  # unless it is closed by now, nobody will do it any more
            if self.remarks:
                self._line.log.info("dialect_refusals", service=self._name, refused=dict(self.remarks))

    async def _serve(self) -> bool:
        """The next service that takes the call, until it is done. False: it was lost, and there are more. Raises ServiceLost."""
        conversation = await self._reach()
        self._conversation = conversation
        self._begun = True
        self._took_at = self._took_at or self._loop.time()
        try:
            code = await conversation.run()
        finally:
            self._forwarded += conversation.forwarded
            self._conversation = None
        if conversation.stopped or any(isinstance(event, Stop) for event in self._taken):
            return True
        if self._role == "speaker":
            conversation.leave(clear=self._service.on_away == "clear")
        if verdict(code) is Verdict.DONE:
            if self._role == "speaker":
                self._line.perform(Stop())
            return True
        self._losses[self._name] += 1
        why = f"{self._service.url} closed the connection in mid-call (code {code})"
        self._line.log.warning("service_away", service=self._name, error=why)
        del self._left[: [name for name, _ in self._left].index(self._name) + 1]
        if not self._left or (self._on_lost == "hangup" and code not in REFUSALS):
            raise ServiceLost(why, begun=code not in REFUSALS)
        self._line.log.warning("service_replaced", service=self._name, by=self._left[0][0])
        return False

    async def _reach(self) -> _Conversation:
        """Dial one after the other until one answers. Raises ServiceLost."""
        patience, backoff = Patience(self._left[0][1].give_up_secs, self._loop.time()), Backoff()
        while True:
            why = ""
            for name, service in [*self._left]:
                self._name, self._service = name, service
                try:
                    return await self._greet(name, service)
                except Unreachable as error:
                    why = str(error)
                    if error.final:
                        self._left.remove((name, service))
            left = patience.left(self._loop.time())
            if not self._left or left <= 0:
                raise ServiceLost(why, begun=self._begun)
            delay = min(backoff.delay(random.random()), left)  # noqa: S311 - jitter
            await self._line.dialler.pause(self._name, delay, by_the_clock=False)

    async def _greet(self, name: str, service: WebsocketService) -> _Conversation:
        """Dial as this carrier and say its first frames. Raises Unreachable."""
        line, kind = self._line, str(service.dialect)
        try:
            account = self._dialects(kind, service.dialect_token)
            carrier = account.carrier()
            headers = account.sign(SignedRequest("GET", service.url, {"upgrade": "websocket"}))
        except Exception as error:  # a foreign one may fail in any way, with anything in its words
            raise Unreachable(f"the dialect {kind} can't be spoken: {type(error).__name__}", final=True) from None
        habits = carrier.habits
        if habits.text is not (line.start.media_format is None):
            carries = "words, and this call carries audio" if habits.text else "audio, and this call carries words"
            raise Unreachable(f"{name} speaks {kind}, which carries {carries}: give it calls of the other sort", final=True)
        start = translated(line.start, habits, service, same=line.kind == kind)
        try:
            first = [*carrier.encode(start)]
        except LocalError as error:
            raise Unreachable(f"{name} can't be told of this call: {error}", final=True) from None
        offered = (habits.subprotocol,) if habits.subprotocol is not None else ()
        socket = await line.dialler.dial_as(name, service, Offer(offered, headers))
        self._socket = socket
        if socket.selected not in (None, *offered):
            await socket.close(code=WRONG_SUBPROTOCOL)
            raise Unreachable(f"{service.url} selected {socket.selected!r}, which was not offered", final=True)
        try:
            for frame in first:
                await send(socket, frame)
        except ConnectionError as error:
            raise Unreachable(f"{service.url} went away: {error}") from None
        return _Conversation(service, line, carrier, socket, self._taken, self._remark, listens=self._role == "listener")

    def _remark(self, kind: str, detail: str) -> None:
        """Count, and remark on it the first time."""
        if kind not in self.remarks and len(self.remarks) >= REMARKED_KINDS:
            kind = "other"
        self.remarks[kind] += 1
        if self.remarks[kind] == 1:
            self._line.log.warning("dialect_refused", service=self._name, reason=kind, detail=detail[:200])


class _Conversation:
    """One connection, and one carrier half, from after its start frame."""

    def __init__(
        self,
        service: WebsocketService,
        line: Line,
        carrier: Carrier,
        socket: ServiceSocket,
        taken: deque[Event],
        remark: Callable[[str, str], None],
        *,
        listens: bool,
    ) -> None:
        self._service = service
        self._line = line
        self._carrier = carrier
        self._habits = carrier.habits
        self._socket = socket
        self._remark = remark
        self._loop = asyncio.get_running_loop()
        ours = service.media_format
        self._ours: MediaFormat = ours
        theirs = line.start.media_format
        self._upward = Converter(theirs or ours, ours)
        self._theirs: MediaFormat = theirs or ours
        self._spoken: MediaFormat = ours
        self._downward = Converter(ours, self._theirs)
        self._reframer = Reframer(ours.bytes_for(service.frame_ms))
        self._track: Track = service.track
        self._position = 0.0  # milliseconds on the media timeline: audio sent, and time that was left out
        self._taken = taken
        self._intake_rate = Limiter(LISTENER_UNITS_PER_SEC, LISTENER_UNITS_PER_SEC) if listens else None
        self._moved_at = self._loop.time()
        self._level = 0
        self._code = 1006
        line.subscription.track = service.track
        self.forwarded = 0
        """Caller audio that was sent, in bytes of the carrier's format."""
        self.stopped = False
        """Whether the stream's end was told."""

    async def run(self) -> int:
        """Until the stream, or the connection, has ended. Returns the close code of the latter."""
        async with asyncio.TaskGroup() as tasks:
            pumping = tasks.create_task(self._pump())
            messages = 0
            while await self._take(await self._socket.receive()):
                messages += 1
                if not messages % MESSAGES_IN_A_ROW:
                    await asyncio.sleep(0)
            if not self.stopped:
                pumping.cancel()  # else it is closing the connection
        return self._code

    def leave(self, *, clear: bool) -> None:
        """The service has gone, and the call has not."""
        self._play_out()
        if clear and COMMAND_NAMES[Clear] in self._line.start.accepts:
            self._line.perform(Clear())

    # --- caller to service ---

    async def _pump(self) -> None:
        subscription, sent = self._line.subscription, 0
        try:
            while not self.stopped:
                if self._full():
                    await asyncio.sleep(POLL_SECS)
                    continue
                if not self._taken:
                    await subscription.wait()
                    self._taken.extend(subscription.take_nowait())
                    continue
                await self._tell(self._taken[0])
                self._taken.popleft()
                sent += 1
                if not sent % MESSAGES_IN_A_ROW:
                    await asyncio.sleep(0)
            await self._part()
        except ConnectionError:
            pass  # who receives sees it too, and ends the connection

    def _full(self) -> bool:
        """Whether the connection takes nothing now. One that has taken nothing for too long is cut."""
        level, now = self._socket.transport.get_write_buffer_size(), self._loop.time()
        if level < self._level or level <= FULL_BYTES:
            self._moved_at = now
        self._level = level
        if level > FULL_BYTES and now - self._moved_at > self._service.replay_ms / 1000:
            self._socket.transport.abort()
        return level > FULL_BYTES

    async def _tell(self, event: Event) -> None:
        match event:
            case Audio():
                if event.track is self._track:
                    await self._say(self._reframer.push(self._upward.convert(event.payload)))
                    self.forwarded += len(event.payload)
            case Gap():
                if event.track is self._track:
                    # Carriers leave out what is missing, and their timestamps tell.
                    await self._say([self._reframer.flush()])
                    self._position += event.lost_ms
            case Checkpoint():
                if event.outcome is Outcome.PLAYED or (event.outcome is Outcome.CLEARED and self._habits.echoes_cleared):
                    await self._send(event)
            case Clear():
                if self._habits.confirms_clear:
                    await self._send(event)
            case Fault():
                # Ours and the carrier's look alike; a carrier of words tells of both.
                self._remark(event.code, masked(event.message) if not self._habits.text else "")
                if self._habits.text:
                    await self._send(event)
            case Stop():
                if self._line.start.media_format is not None:
                    await self._say([*self._reframer.push(self._upward.flush()), self._reframer.flush()])
                if self._habits.says_stop:
                    await self._send(event)
                self.stopped = True
            case Dtmf() | Transcript() | BargeIn() | Speech() | Spoken():
                await self._send(event)
            case Start() | Flow() | Unknown():
                pass
            case _ as never:
                assert_never(never)

    async def _say(self, frames: list[bytes]) -> None:
        for frame in frames:
            if frame:
                await self._send(Audio(frame, self._track, round(self._position)))
                self._position += self._ours.duration_ms(len(frame))

    async def _send(self, event: Event) -> None:
        try:
            for frame in self._carrier.encode(event):
                await send(self._socket, frame)
        except LocalError as error:
            self._remark(error.code, str(error))

    async def _part(self) -> None:
        """Close in an orderly way; what a service that does not answer has not taken by then is not waited for."""
        try:
            await self._socket.close()
        finally:
            if self._socket.close_code in (None, 1006):
                self._socket.transport.abort()

    # --- service to caller ---

    async def _take(self, message: WSMessage) -> bool:
        """One message of the service. Returns whether there may be more."""
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            if self._intake_rate is not None:
                await self._ignore(self._intake_rate, message.data)
            else:
                await self._obey(message.data)
            return True
        # Only a close frame's code counts: the library also reports a connection that just ended as 1000.
        if message.type is WSMsgType.CLOSE:
            self._code = message.data or 1005
        elif message.type is WSMsgType.ERROR and isinstance(message.data, WebSocketError):
            self._code = message.data.code
        return False

    async def _ignore(self, rate: Limiter, frame: str | bytes) -> None:
        """A listener has nothing to say; what it says too fast stays in its own connection."""
        self._remark("not_speaker", "this service only listens; another one speaks on the call")
        wait = max(rate.reserve(self._loop.time()) for _ in range(1 + len(frame) // UNIT_BYTES))
        if wait:
            await asyncio.sleep(wait)

    async def _obey(self, frame: str | bytes) -> None:
        try:
            commands = [*self._carrier.decode(frame)]
        except MalformedFrame as error:
            self._remark(error.reason, masked(detail(error)) if not self._habits.text else "")
            if self._habits.text and not self._full():  # the one carrier that answers says it in these words
                await self._refuse(error)
            return
        if isinstance(self._carrier, PipecatClient) and self._carrier.spoken != self._spoken:
            self._play_out()
            self._spoken = self._carrier.spoken
            self._downward = Converter(self._spoken, self._theirs)
        for command in commands:
            match command:
                case Audio():
                    await self._play(command.payload)
                    continue
                case Checkpoint() | Stop(after=After.PLAYED):
                    self._play_out()
                case Clear():
                    self._downward.reset()
                case _:
                    pass
            self._line.perform(command)

    async def _refuse(self, error: MalformedFrame) -> None:
        with suppress(ConnectionError):  # the next message tells
            await self._send(Fault(error.reason, detail(error)))

    async def _play(self, payload: bytes) -> None:
        if len(payload) > LARGEST_AUDIO_BYTES:
            self._remark("message_too_large", f"{len(payload)} bytes of audio in one frame, more than {LARGEST_AUDIO_BYTES}")
            return
        for at in range(0, len(payload), SLICE_BYTES):
            if at:
                await asyncio.sleep(0)
            if samples := self._downward.convert(payload[at : at + SLICE_BYTES]):
                self._line.perform(Audio(samples))

    def _play_out(self) -> None:
        """The converter's tail belongs to what was said before."""
        if tail := self._downward.flush():
            self._line.perform(Audio(tail))


async def send(socket: ServiceSocket, frame: str | bytes) -> None:
    """One frame as it is. Raises ConnectionError when the connection is over."""
    if isinstance(frame, str):
        await socket.send_str(frame)
    else:
        await socket.send_bytes(frame)


def detail(error: MalformedFrame) -> str:
    """What is wrong with a frame, behind the reason."""
    return str(error).removeprefix(f"{error.reason}: ")


def masked(text: str) -> str:
    """The same for a log: without the digits and names that it quotes."""
    return re.sub(r"(?<!\w)'[^']*'", "'…'", text)


# --- one carrier's call, told as another's ---


def translated(start: Start, habits: Habits, service: WebsocketService, *, same: bool) -> Start:
    """The start of a call as the dialect's carrier would tell it. `same`: it is that carrier's own call, and keeps its ids."""
    if not same:
        call, stream, account = habits.id_prefixes or (None, None, None)
        start = structs.replace(
            start,
            call_id=likened(start.call_id, call),
            stream_id=likened(start.stream_id, stream),
            account_id=likened(start.account_id, account) if account is not None else start.account_id,
        )
    if habits.text:
        return start
    return structs.replace(start, media_format=service.media_format, tracks=(service.track,))


def likened(identifier: str, prefix: str | None) -> str:
    """An id in another carrier's spelling: `prefix` before 32 hexadecimal digits, or (None) a UUID.

    The digits stay the same, so that each can be found in the other's log; an id of another sort is hashed.
    """
    found = re.fullmatch(r"(?:[A-Z]{2})?([0-9a-f]{32})", identifier.replace("-", ""))
    digits = found[1] if found else hashlib.sha256(identifier.encode(errors="replace")).hexdigest()[:32]
    if prefix is not None:
        return prefix + digits
    return "-".join(digits[begin:end] for begin, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
