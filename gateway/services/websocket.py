"""A stream's link to services behind WebSockets that we dial. Connections come and go; the link lasts as long as the stream."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from aiohttp import WebSocketError, WSMessage, WSMsgType
from msgspec import UNSET

from gateway import direct
from gateway.audio import Converter
from gateway.buckets import WAIT_SECS, Buckets
from gateway.errors import MalformedFrame, untrace
from gateway.events import COMMAND_NAMES, Account, After, Audio, Checkpoint, Clear, Command, Stop
from gateway.journal import Entry as JournalEntry
from gateway.journal import Legacy
from gateway.services import Line, LinkFigures, ServiceLost
from gateway.services.dialler import LARGEST_MESSAGE, ServiceSocket, Unreachable
from gateway.services.framed import HEADER_BYTES, SUBPROTOCOL_FRAMED, Flags, Header, Numbers, pack, unpack
from gateway.services.intake import Intake
from gateway.services.native import SUBPROTOCOL_RAW, Ack, Malformed, NativeCarrier, Ready, Resume, acknowledgement, numbered
from gateway.services.retry import REFUSALS, STABLE_SECS, Limiter, Patience, Redial, Verdict, verdict
from gateway.services.ring import Frame, Hole, Ring, Word
from gateway.settings import WebsocketService

READY_SECS = 5.0
ACK_SECS = 0.2
MESSAGE_TOO_BIG = 1009

LARGEST_AUDIO_BYTES = 4 * 2**20
"""Audio in one message; more is refused whole. Half a minute at the highest rate and widest samples."""

LARGEST_TEXT_BYTES = 64 * 1024
SLICE_BYTES = 32 * 1024
"""Audio that is converted in one go; between slices other calls have their turn."""

MESSAGES_IN_A_ROW = 8
"""After so many messages from or to one service, other calls have their turn: a thousand replays go on side by side."""

LISTENER_UNITS_PER_SEC, UNIT_BYTES = 100.0, 8 * 1024
"""What is read of a listener, which has nothing to say but `ready` and `ack`: so many messages a second, long ones count more."""

FAULTS_PER_SEC = 20.0
"""Mistakes of one service that are told each second; the others are counted."""

FULL_BYTES = 16 * 1024
"""A connection in which more than this waits gets nothing further; the ring holds it."""

POLL_SECS = 0.005
"""How often a full connection is looked at. Others need no timer."""

YIELD_SECS = 0.05
"""While other calls are still being connected to a service that is back, a replay pauses so long after each few messages."""

_DISCONTINUITY, _LAST = int(Flags.DISCONTINUITY), int(Flags.LAST)  # an enum's operators take longer than all the rest of a frame

SLOW_MS, FAST_MS = 1000, 500
"""A service that lags behind the caller by more is slow, until it lags by less."""


@dataclass(slots=True)
class _Ended:
    """How an attempt, or a connection, ended."""

    verdict: Verdict
    why: str
    code: int = 0


class _Connection:
    """One socket, and what is known of it alone."""

    __slots__ = (
        "acknowledge", "at", "broken", "closing", "established", "expected", "framed", "level", "moved_at", "released",
        "replay_number", "replay_seq", "replays", "socket",
    )  # fmt: skip

    def __init__(self, socket: ServiceSocket, began: float) -> None:
        self.socket = socket
        self.framed = socket.selected == SUBPROTOCOL_FRAMED
        self.established = False
        self.at = began
        self.moved_at = began
        self.level = 0
        self.expected = 0  # the number of the frame that would come next without a hole
        self.replays = False
        self.released = False
        self.broken = False
        self.replay_seq = 0
        self.replay_number = 0
        self.acknowledge = False
        self.closing: _Ended | None = None

    @property
    def open(self) -> bool:
        return self.established and self.closing is None and not self.broken

    def full(self, now: float) -> bool:
        """Whether nothing should be sent now. Notes when something last moved."""
        level = self.socket.transport.get_write_buffer_size()
        if level < self.level or level <= FULL_BYTES:
            self.moved_at = now
        self.level = level
        return level > FULL_BYTES


class WebsocketLink:
    """One stream and a list of services, of which one at a time has the call.

    At the start of a call they are tried in order, over and over, until one takes it. A service that is lost in mid-call is
    dialled again, it alone, because it knows the conversation; once given up, `on_lost` decides about the next of the list.
    """

    __slots__ = (
        "_ack_timer", "_begun", "_connection", "_downward", "_failure", "_faults", "_full", "_idle", "_intake", "_intake_rate",
        "_journal", "_left", "_legacy", "_line", "_loop", "_losses", "_more", "_name", "_numbers", "_on_lost", "_outages",
        "_parting", "_patience", "_protocol", "_pumping", "_redial", "_role", "_round", "_service", "_shape", "_slow",
        "_socket", "_stopped", "_tasks", "_took_at", "_untold_faults", "faults",
    )  # fmt: skip

    def __init__(
        self,
        services: Sequence[tuple[str, WebsocketService]],
        line: Line,
        *,
        on_lost: Literal["hangup", "next"] = "hangup",
        role: Literal["speaker", "listener"] = "speaker",
        journal: JournalEntry | None = None,
        legacy: Legacy | None = None,
    ) -> None:
        """`journal` is told what another process would need to go on, `legacy` what such a one has left."""
        self._line = line
        self._role = role
        self._intake_rate = Limiter(LISTENER_UNITS_PER_SEC, LISTENER_UNITS_PER_SEC)
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._left = [*services]
        """Services that may still take the call."""
        self._round: list[tuple[str, WebsocketService]] = []
        self._name, self._service = services[0]
        self._begun = False
        self._journal = journal
        self._legacy = legacy
        if legacy is not None and legacy.standing.service in (names := [name for name, _ in services]):
            self._round = [services[names.index(legacy.standing.service)]]
            self._name, self._service = self._round[0]
            self._begun = True  # it knows the conversation
        self._tasks: asyncio.TaskGroup
        self._pumping: asyncio.Task[None] | None = None
        self._idle = False  # the pump has nothing to do, and leaves events to whoever brings them
        self._failure: Exception | None = None  # of passing events on outside the pump's task
        self._connection: _Connection | None = None
        self._socket: ServiceSocket | None = None
        self._intake: Intake | None = None
        self._protocol: NativeCarrier
        self._shape: object = None
        self._downward: Converter
        self._numbers = Numbers()
        self._ack_timer: asyncio.TimerHandle | None = None
        self._redial = Redial()
        self._patience = Patience(self._service.give_up_secs, self._loop.time())
        self._faults = Limiter(FAULTS_PER_SEC, FAULTS_PER_SEC)
        self._untold_faults = 0
        self._slow = False
        self._full = False
        self._more = False
        self._stopped = False
        self._parting: ServiceSocket | None = None  # the stream's end has been sent: to be closed
        self._took_at: float | None = None
        self._losses: Counter[str] = Counter()
        self._outages: dict[str, Buckets] = {}
        self.faults = 0
        """Mistakes of the service, told or not."""

    @property
    def forwarded_bytes(self) -> int:
        """See `Link`."""
        return self._intake.ring.forwarded if self._intake is not None else 0

    @property
    def held_bytes(self) -> int:
        """See `Link`."""
        return self._intake.held_bytes if self._intake is not None else 0

    @property
    def unknown(self) -> bool:
        """See `Link`."""
        return self._connection is None and not self._begun

    def figures(self) -> LinkFigures:
        """See `Link`."""
        connection, lag_ms = self._connection, 0.0
        serving = connection is not None and connection.established
        if self._intake is not None and self._line.start.media_format is not None:
            ring = self._intake.ring
            behind = ring.unacked_bytes if connection is None or connection.framed else ring.waiting_bytes + connection.level
            lag_ms = self._service.media_format.duration_ms(behind)
        state: Literal["serving", "away", "dialling"] = "serving" if serving else "away" if self._begun else "dialling"
        unsent = self._intake.unsent_bytes if self._intake is not None else 0
        return LinkFigures(self._name, state, self._took_at, unsent, lag_ms, self._losses, self._outages)

    async def run(self) -> None:
        """See `Link.run`. Events wait in the subscription until a service has taken the call, from then on in the ring."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await self._serve()
                if self._pumping is not None and not self._stopped:
                    self._pumping.cancel()  # else it is closing the connection
        except ExceptionGroup as group:
            if len(group.exceptions) == 1 and isinstance(group.exceptions[0], ServiceLost):
                untrace(group)
                raise group.exceptions[0] from None
            raise
        finally:
            self._line.subscription.notify(None)
            self._pumping = None
            if self._ack_timer is not None:
                self._ack_timer.cancel()
            if self._socket is not None:
                self._socket.abandon()  # unless it is closed by now, nobody will do it any more

    @property
    def _ring(self) -> Ring:
        if self._intake is None:
            raise AssertionError("no service has been reached")
        return self._intake.ring

    # --- which service, and when ---

    async def _serve(self) -> None:
        while True:
            if not self._round:
                self._round = [(self._name, self._service)] if self._begun else [*self._left]
            self._name, self._service = self._round.pop(0)
            ended = await self._attempt()
            if self._stopped or ended.verdict is Verdict.DONE:
                if not self._stopped and self._role == "speaker":
                    self._line.perform(Stop())  # a service that closes without a word is done: the same as `stop`
                return
            now = self._loop.time()
            if ended.verdict is Verdict.FINAL:
                self._give_up(ended)
            elif ended.verdict is Verdict.NEXT and self._begun and len(self._left) > 1:
                self._give_up(ended, moves_on=True)
            elif self._patience.left(now) <= 0:
                self._give_up(ended)
            if not self._round:
                delay, by_the_clock = self._redial.pause(now, random.random())  # noqa: S311 - jitter
                delay = min(delay, max(0.0, self._patience.left(now)))
                await self._line.dialler.pause(self._name, delay, by_the_clock=by_the_clock)

    def _give_up(self, ended: _Ended, *, moves_on: bool = False) -> None:
        """This service won't have the call (any more). Raises ServiceLost unless there is another one."""
        begun = self._begun
        if begun:
            # Its predecessors in the list were tried before it, and have not become better since.
            names = [name for name, _ in self._left]
            self._left = self._left[names.index(self._name) + 1 :]
        elif ended.verdict is Verdict.FINAL:
            self._left = [each for each in self._left if each[0] != self._name]
        else:
            self._left = []
        if begun and self._on_lost == "hangup" and not moves_on:
            self._left = []
        if not self._left:
            raise ServiceLost(ended.why, begun=begun)
        if begun:
            self._begun = False
            self._round = [*self._left]
            self._patience = Patience(self._left[0][1].give_up_secs, self._loop.time())
            self._redial = Redial()
            self._line.log.warning("service_replaced", service=self._name, by=self._left[0][0])

    async def _attempt(self) -> _Ended:
        """Dial, serve, and tell how it ended."""
        try:
            socket = await self._line.dialler.dial(self._name, self._service)
        except Unreachable as error:
            return _Ended(Verdict.FINAL if error.final else Verdict.RETRY, str(error))
        self._socket = socket
        connection = _Connection(socket, self._loop.time())
        try:
            if socket.selected not in (None, SUBPROTOCOL_RAW, SUBPROTOCOL_FRAMED):
                return self._hang_up(connection, 4003, f"selected {socket.selected!r}, which was not offered")
            ended = await self._attend(connection)
        finally:
            self._connection = None
            if not self._stopped and connection.closing is None:
                socket.abandon()
        self._lost(connection, ended)
        return ended

    async def _attend(self, connection: _Connection) -> _Ended:
        self._adopt()
        self._connection = connection
        socket, ring = connection.socket, self._ring
        resume = None
        if connection.framed and (ring.next_seq or ring.next_number):
            queued_ms, names = self._line.pending()
            resume = Resume(self._line.session_id, ring.oldest, ring.next_seq, self._numbers.next, queued_ms, names)
            connection.replays = True
        try:
            await socket.send_str(self._protocol.start(self._line.start, resume))
        except ConnectionError as error:
            return _Ended(Verdict.RETRY, f"{self._service.url} went away: {error}", 1006)
        ended = None
        if not connection.framed:
            self._establish(connection, None)
        else:
            try:
                async with asyncio.timeout(READY_SECS):
                    while ended is None and not connection.established:
                        ended = await self._take(connection, await self._receive(socket))
            except TimeoutError:
                return self._hang_up(connection, 4008, f"was not ready within {READY_SECS:g} s")
        messages = 0
        try:
            if self._role == "speaker":
                direct.hand_over(socket, partial(self._take_short, connection))
            while ended is None:
                ended = await self._take(connection, await self._receive(socket))
                messages += 1
                if not messages % MESSAGES_IN_A_ROW:
                    await asyncio.sleep(0)
        finally:
            direct.hand_over(socket, None)
        return ended

    async def _receive(self, socket: ServiceSocket) -> WSMessage:
        message = await socket.receive()
        if self._role == "listener":
            wait = 0.0
            for _ in range(
                1 + len(message.data or b"") // UNIT_BYTES if message.type in (WSMsgType.TEXT, WSMsgType.BINARY) else 0
            ):
                wait = self._intake_rate.reserve(self._loop.time())
            if wait:
                await asyncio.sleep(wait)  # what comes meanwhile stays in its own connection
        return message

    def _adopt(self) -> None:
        """Prepare for the service that is about to get the call."""
        service, line = self._service, self._line
        carrier_format = line.start.media_format
        self._protocol = protocol = NativeCarrier(
            session=line.session_id,
            provider=line.provider,
            kind=line.kind,
            role=self._role,
            track=service.track,
            media_format=None if carrier_format is None else service.media_format,
            frame_ms=service.frame_ms,
        )
        shape = (service.media_format, service.frame_ms, service.track, service.replay_ms)
        if self._intake is not None and shape == self._shape:
            return
        self._shape = shape
        intake = Intake(
            carrier_format,
            service.media_format,
            frame_ms=service.frame_ms,
            capacity_ms=service.replay_ms,
            track=service.track,
            protocol=protocol,
        )
        self._numbers = Numbers()
        now, legacy, journal = self._loop.time(), self._legacy, self._journal
        inherits = legacy is not None and legacy.standing.service == self._name and legacy.standing.shape == self._shape_text
        if self._intake is not None:
            intake.adopt(self._intake, now)
            self._give_up_journal()  # what was made of another service's frames can't be made again from the audio
        elif legacy is not None and inherits:
            intake.inherit(legacy, now)
            self._numbers.next = legacy.next_out
        elif journal is not None and legacy is not None:
            journal.restart()
        if self._journal is not None:
            intake.journal = journal
        self._begun = self._intake is None and legacy is not None and legacy.standing.service == self._name
        self._legacy = None
        self._intake = intake
        self._downward = Converter(service.media_format, carrier_format or service.media_format)
        line.subscription.track = service.track

    @property
    def _shape_text(self) -> str:
        """What a service's frames are made of, and how."""
        return f"{self._line.start.media_format} {self._shape}"

    def _give_up_journal(self) -> None:
        """From now on nothing is kept for another process but that this service has the call."""
        if self._journal is not None:
            self._journal.restart()
            self._journal.serve(self._name, "")
            self._journal = None

    def _establish(self, connection: _Connection, ready: Ready | None) -> None:
        """The service has the call: from now on events go to it, those first that it has not had."""
        now = self._loop.time()
        ring = self._ring
        away = self._patience.back(now)
        lost = replay = 0
        if ready is None:
            lost = ring.live() if self._begun else 0
            connection.expected = ring.next_waiting
        else:
            wanted = ring.acked + 1 if ready.next is UNSET else ready.next
            if wanted is not None and wanted > ring.next_seq:
                self._fault("malformed_command", f"ready.next {wanted} is beyond the next frame, {ring.next_seq}", ready.id)
                wanted = ring.next_seq
            if wanted is None and not self._begun:
                self._absorb()
            lost = ring.resume(wanted)
            connection.expected = wanted if wanted is not None else -1
            if connection.replays:
                connection.replay_seq, connection.replay_number = ring.next_seq, ring.next_number
            replay = ring.waiting_bytes
        if self._took_at is None:
            self._took_at = now
        if self._journal is not None:
            self._journal.acked(ring.acked)
            self._journal.serve(self._name, self._shape_text if connection.framed else "")
        if self._begun:
            self._outages.setdefault(self._name, Buckets(WAIT_SECS)).add(away)
            self._line.log.info(
                "service_back",
                service=self._name,
                away_ms=round(away * 1000),
                replayed_ms=round(self._service.media_format.duration_ms(replay)),
                lost_ms=round(self._service.media_format.duration_ms(lost)),
            )
        connection.established = self._begun = True
        connection.at = connection.moved_at = now
        if self._pumping is None:
            self._pumping = self._tasks.create_task(self._pump())
            self._line.subscription.notify(self._pass_on, self._hear)
        self._line.subscription.nudge()

    def _lost(self, connection: _Connection, ended: _Ended) -> None:
        """The connection is over, and the call is not."""
        self._slow = False
        if not connection.established or self._stopped or ended.verdict is Verdict.DONE:
            return
        now = self._loop.time()
        stable = self._patience.lost(now)
        self._redial.lost(now, random.random(), stable=stable)  # noqa: S311 - jitter
        if ended.code in REFUSALS and not stable:
            self._begun = False
            self._ring.rewind()
        else:
            self._round = []
        self._losses[self._name] += 1
        self._line.log.warning("service_away", service=self._name, error=ended.why)
        if self._role == "listener":
            return
        if not connection.framed and self._line.start.media_format is not None and (tail := self._downward.flush()):
            self._line.perform(Audio(tail))
        if self._service.on_away == "clear" and COMMAND_NAMES[Clear] in self._line.start.accepts:
            self._line.perform(Clear())

    # --- caller to service ---

    def _pass_on(self) -> None:
        """Pass on what was just offered, at once; what can't be done at once is left to the pump."""
        if not self._idle:
            self._line.subscription.nudge()
            return
        try:
            self._absorb()
            self._flush()
        except Exception as error:
            self._idle, self._failure = False, error
        if self._full or self._more or self._stopped or self._failure is not None:
            self._idle = False
            self._line.subscription.nudge()

    def _hear(self, payload: bytes) -> bool:
        """Pass on the caller's audio, at once. False: it is to be queued, for the pump is at work."""
        intake = self._intake
        if not self._idle or intake is None:
            return False
        try:
            intake.hear(payload)
            self._flush()
        except Exception as error:
            self._idle, self._failure = False, error
        if self._full or self._more or self._stopped or self._failure is not None:
            self._idle = False
            self._line.subscription.nudge()
        return True

    async def _pump(self) -> None:
        """Events into the ring and from there to the service, as long as the stream lasts, where that can't be done at once."""
        while not self._stopped and self._failure is None:
            if self._more:
                await asyncio.sleep(YIELD_SECS if self._line.dialler.busy(self._name) else 0)
            elif self._full:
                await asyncio.sleep(POLL_SECS)
            else:
                self._idle = True
                try:
                    await self._line.subscription.wait()
                finally:
                    self._idle = False
            if not self._stopped and self._failure is None:
                self._absorb()
                self._flush()
        if self._failure is not None:
            raise self._failure
        if self._parting is not None:
            await self._part(self._parting)

    def _absorb(self) -> None:
        if self._intake is not None:
            now = self._loop.time()
            for event in self._line.subscription.take_nowait():
                self._intake.take(event, now)

    def _flush(self) -> None:
        """Send what the connection takes. No send ever waits: what it does not take stays in the ring."""
        connection, intake = self._connection, self._intake
        self._full = self._more = False
        if connection is None or intake is None or not connection.open:
            return
        now, ring = self._loop.time(), intake.ring
        keep = connection.framed or now - connection.at < STABLE_SECS
        if not keep and not connection.released:
            ring.release()
            connection.released = True
        full, waits = connection.full(now), True
        try:
            if connection.acknowledge and not full:
                connection.acknowledge = False
                connection.socket.write(acknowledgement(self._numbers.next - 1))
            messages = 0
            while not full and (entry := ring.take(keep=keep)) is not None:
                try:
                    self._send(connection, entry)
                except ConnectionError:
                    ring.put_back(entry)
                    raise
                if self._stopped:
                    self._parting = connection.socket
                    return
                waits = ring.waits
                if not waits:
                    break
                messages += 1
                if messages == MESSAGES_IN_A_ROW:
                    self._more = True
                    break
                full = connection.full(now)
        except ConnectionError:
            connection.broken = True  # who receives sees it too, and ends the connection
            return
        self._full = full
        if waits or self._slow or connection.level or connection.framed:
            self._watch(connection, now)

    async def _part(self, socket: ServiceSocket) -> None:
        """Close in an orderly way; what a service that does not answer has not taken by then is not waited for."""
        try:
            await socket.close()
        finally:
            if socket.close_code in (None, 1006):
                socket.transport.abort()

    def _send(self, connection: _Connection, entry: Frame | Word | Hole) -> None:
        socket = connection.socket
        if type(entry) is Frame and not connection.framed:
            socket.write(entry.payload)
            return
        match entry:
            case Frame():
                flags = entry.flags | (Flags.REPLAYED if entry.seq < connection.replay_seq else 0)
                if entry.seq != connection.expected:
                    flags |= _DISCONTINUITY
                connection.expected = entry.seq + 1
                socket.write(pack(Header(self._service.track, flags, entry.seq, entry.pos), entry.payload))
            case Hole() if self._intake is not None:
                socket.write(self._intake.told(entry))
            case Word():
                stop = isinstance(entry.message, Stop)
                text = entry.message
                if isinstance(text, Stop):
                    (encoded,) = self._protocol.encode(self._accounted(text))
                    text = str(encoded)
                if connection.framed:
                    text = numbered(text, entry.number, entry.number < connection.replay_number)
                socket.write(text)
                self._stopped = stop
            case _:
                pass

    def _watch(self, connection: _Connection, now: float) -> None:
        """Is the service slow, or has it stopped taking anything at all?"""
        service, ring = self._service, self._ring
        behind = ring.unacked_bytes if connection.framed else ring.waiting_bytes + connection.level
        if self._slow or behind:
            lag_ms = service.media_format.duration_ms(behind)
            if not self._slow and lag_ms > SLOW_MS and now - connection.at > SLOW_MS / 1000:
                self._slow = True
                self._line.log.warning("service_slow", service=self._name, lag_ms=round(lag_ms))
            elif self._slow and lag_ms < FAST_MS:
                self._slow = False
                self._line.log.info("service_keeps_up", service=self._name, lag_ms=round(lag_ms))
        if self._full and now - connection.moved_at > service.replay_ms / 1000:
            self._hang_up(connection, 4009, f"took nothing for {service.replay_ms / 1000:g} s")

    def _hang_up(self, connection: _Connection, code: int, why: str) -> _Ended:
        """Close the connection beside everything else, and have it count as lost."""

        async def close() -> None:
            try:
                await connection.socket.close(code=code)
            finally:
                connection.socket.abandon()

        connection.closing = _Ended(verdict(code), f"{self._service.url} {why}", code)
        self._tasks.create_task(close())
        return connection.closing

    def _accounted(self, stop: Stop) -> Stop:
        """The stream's account, completed by what only this link knows."""
        carrier_format = self._line.start.media_format
        if stop.account is None or carrier_format is None:
            return stop
        received = round(carrier_format.duration_ms(self._line.subscription.offered_bytes))
        forwarded = round(carrier_format.duration_ms(self.forwarded_bytes))
        playout = stop.account
        return Stop(
            stop.reason,
            account=Account(
                received=received,
                forwarded=forwarded,
                dropped=received - forwarded,
                queued=playout.queued,
                played=playout.played,
                cleared=playout.cleared,
                lost=playout.lost,
            ),
        )

    # --- service to caller ---

    async def _take(self, connection: _Connection, message: WSMessage) -> _Ended | None:
        """One message of the service. Returns how the connection ended, if it did."""
        if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
            if isinstance(message.data, direct.HandlerFailed):
                raise message.data
            return connection.closing or self._ended(message)
        if not self._take_short(connection, message.data):
            await self._play_long(connection, message.data)
        return None

    def _take_short(self, connection: _Connection, message: str | bytes) -> bool:
        """One message of the service, unless it is so long that other calls should have their turn meanwhile."""
        if isinstance(message, str):
            self._obey(connection, message)
        elif len(message) > SLICE_BYTES:
            return False
        elif connection.framed or self._role == "listener":
            self._play(connection, message)
        else:
            self._convert(message)
        return True

    def _ended(self, message: WSMessage) -> _Ended:
        # Only a close frame's code counts: the library also reports a connection that just ended as 1000.
        code = 1006
        if message.type is WSMsgType.CLOSE:
            code = message.data or 1005
        elif message.type is WSMsgType.ERROR and isinstance(message.data, WebSocketError):
            code = message.data.code
            if code == MESSAGE_TOO_BIG:
                self._fault("message_too_large", f"a message was longer than {LARGEST_MESSAGE} bytes", None)
        return _Ended(verdict(code), f"{self._service.url} closed the connection in mid-call (code {code})", code)

    def _play(self, connection: _Connection, message: bytes) -> None:
        flags = self._audio_flags(connection, message)
        if flags is None:
            return
        if flags & _DISCONTINUITY:
            self._play_out()
        self._convert(message[HEADER_BYTES:] if connection.framed else message)
        if flags & _LAST:
            self._play_out()

    async def _play_long(self, connection: _Connection, message: bytes) -> None:
        flags = self._audio_flags(connection, message)
        if flags is None:
            return
        if flags & _DISCONTINUITY:
            self._play_out()
        for at in range(HEADER_BYTES if connection.framed else 0, len(message), SLICE_BYTES):
            self._convert(message[at : at + SLICE_BYTES])
            await asyncio.sleep(0)
        if flags & _LAST:
            self._play_out()

    def _audio_flags(self, connection: _Connection, message: bytes) -> int | None:
        """What is special about a message of audio. None: it is not to be played."""
        if self._role == "listener":
            self._line.perform(Audio(b""))
            return None
        flags = 0
        if connection.framed:
            try:
                header = unpack(message, self._service.media_format.sample_bytes)
            except MalformedFrame as error:
                self._fault(error.reason, str(error), None)
                return None
            if not self._numbers.take(header.seq):
                return None
            if self._journal is not None:
                self._journal.took(self._numbers.next)
            if self._ack_timer is None:
                self._ack_timer = self._loop.call_later(ACK_SECS, self._acknowledge)
            flags = header.flags
        if len(message) > LARGEST_AUDIO_BYTES:
            self._fault(
                "message_too_large", f"{len(message)} bytes of audio in one message: send at most {LARGEST_AUDIO_BYTES}", None
            )
            return None
        return flags

    def _convert(self, samples: bytes) -> None:
        if payload := self._downward.convert(samples):
            self._line.perform(Audio(payload))

    def _play_out(self) -> None:
        """The converter's tail belongs to what was said before."""
        if tail := self._downward.flush():
            self._line.perform(Audio(tail))

    def _acknowledge(self) -> None:
        self._ack_timer = None
        if self._connection is not None and self._connection.framed:
            self._connection.acknowledge = True
            self._pass_on()

    def _obey(self, connection: _Connection, text: str) -> None:
        if len(text) > LARGEST_TEXT_BYTES:
            self._fault("malformed_command", f"a text of {len(text)} characters: send at most {LARGEST_TEXT_BYTES}", None)
            return
        commands: list[Command] = []
        try:
            if connection.framed:
                message = self._protocol.read(text)
                if isinstance(message, Ready):
                    self._ready(connection, message)
                elif isinstance(message, Ack):
                    self._confirm(message)
                else:
                    commands.append(message)
            else:
                commands.extend(self._protocol.decode(text))
        except MalformedFrame as error:
            self._fault(error.reason, str(error), error.ref if isinstance(error, Malformed) else None)
            return
        for command in commands:
            self._settle(command)
            self._line.perform(command)

    def _ready(self, connection: _Connection, ready: Ready) -> None:
        if connection.established:
            raise Malformed("ready was said before", ready.id)
        self._establish(connection, ready)

    def _confirm(self, ack: Ack) -> None:
        if not self._ring.ack(ack.seq):
            raise Malformed(f"ack of {ack.seq}: the next frame to be sent is {self._ring.next_waiting}", ack.id)
        if self._journal is not None:
            self._journal.acked(self._ring.acked)

    def _settle(self, command: Command) -> None:
        """The converter's tail belongs to what was said before a checkpoint or the end; a clear throws it away."""
        match command:
            case Checkpoint() | Stop(after=After.PLAYED):
                self._play_out()
            case Clear():
                self._downward.reset()
            case _:
                pass

    def _fault(self, code: str, message: str, ref: str | int | None) -> None:
        """Tell the service of its mistake, unless it makes them faster than anybody reads."""
        self.faults += 1
        if not self._faults.take(self._loop.time()):
            self._untold_faults += 1
            return
        message = message[:300]
        if self._untold_faults:
            message += f" (and {self._untold_faults} more before it)"
            self._untold_faults = 0
        self._line.fault(code, message, ref)
