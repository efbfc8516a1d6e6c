"""A faithful carrier with a caller on the line: asks the webhook, dials the stream, talks, listens, and reports what was heard.

When a stream ends it goes on as carriers do: it asks the action URL what comes next, and dials again if that is a stream.

The protocol is the provider's `Carrier` half, the caller's ear and the speech synthesis are `gateway.ear`; here are the
sockets, the clock, and the script of the call.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any, Literal, assert_never
from urllib.parse import urljoin
from uuid import uuid4
from xml.etree import ElementTree

import aiohttp
import msgspec
import numpy as np
from msgspec import Struct

from gateway.alignment import Echo, measure_echo
from gateway.audio import convert_whole, resample_whole
from gateway.callreport import (
    CallReport,
    Recording,
    Refusal,
    StreamReport,
    explain,
    explain_close,
    explain_status,
    origin,
)
from gateway.ear import Ear, Fate
from gateway.errors import GatewayError, MalformedFrame
from gateway.events import (
    Audio,
    Checkpoint,
    Clear,
    Command,
    Dtmf,
    Event,
    Fault,
    Language,
    Party,
    Play,
    Say,
    Speech,
    Start,
    Stop,
    StopReason,
    Transcript,
)
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.provider import Call, Carrier, Dial, HttpRequest, Provider, Returning, StreamEnd
from gateway.signing import UPGRADE
from gateway.voice import Voice

Direction = Literal["up", "down"]
"""`up`: an event, from the carrier to the gateway. `down`: a command, from the gateway to the carrier."""

OnEvent = Callable[[float, Direction, Event | Command], None]
"""Called with seconds since the call began, the direction and the message."""

OnStream = Callable[[StreamReport], None]
"""Called when a stream has begun and when it has ended (`ended_ms`)."""

CHUNK_MS = 20
SEND_TIMEOUT_SECS = 5.0
MOST_REFUSALS = 20
"""Different refusals that are kept word for word; what follows is counted under its reason."""
STRIKES = 10
"""A text carrier hangs up (1007) after so many bad frames in a row."""
MOST_STREAMS = 1000
"""Streams of one call: an answer that names a stream nobody can connect to is no reason to ask for ever."""
MOST_XML = 1000
"""Characters of an answer that are kept."""


async def simulate(
    kind_cls: type[Provider],
    *,
    url: str,
    audio: bytes | None = None,
    audio_format: MediaFormat | None = None,
    media_format: MediaFormat | None = None,
    dtmf: str = "",
    say: list[str] | None = None,
    hold_secs: float = 1.0,
    barge_in_after_secs: float | None = None,
    caller: str = "+15550100001",
    called: str = "+15550100002",
    call_id: str = "",
    stream_id: str = "",
    account_id: str = "",
    parameters: dict[str, str] | None = None,
    sign: Callable[[HttpRequest], HttpRequest] | None = None,
    follow: bool = True,
    hang_up: asyncio.Event | None = None,
    on_event: OnEvent | None = None,
    on_stream: OnStream | None = None,
    measure: bool = True,
    chunk_ms: int = CHUNK_MS,
    jitter_ms: float = 20.0,
    fate: Callable[[str], Fate] | None = None,
    chars_per_sec: float = 15.0,
    reply_timeout_secs: float = 5.0,
    connect_timeout_secs: float = 5.0,
    close_timeout_secs: float = 5.0,
    longest_call_secs: float = 3600.0,
) -> CallReport:
    """Places one call and returns how it went; never raises for what the gateway does.

    url — `http(s)://…/{provider}/answer` is asked as the carrier asks its webhook and the stream dialled as the answer says;
    `ws(s)://…` is dialled directly, with `media_format` (default mu-law 8 kHz) and `parameters` in the start frame.
    audio — what the caller says, in `audio_format` (None: already in the stream's). Silence before, between and after.
    dtmf — keys pressed, from half a second on. say — what the caller says to a carrier of text, one turn each.
    hold_secs — how long the caller stays on the line after all that.
    barge_in_after_secs — the caller is silent until the agent has been heard for so long, then speaks (of `say`: the last turn).
    sign — signs the webhook request and then the stream's upgrade, as the account's secret would (see `gateway.signing`), and
    may send either to another address. fate — decides about each echoed checkpoint, for fuzzing.
    follow — when a stream ends, ask its action URL what comes next, and if that is a stream, go on with it; the caller talks on
    meanwhile, and what is said without a stream is lost. False: the call ends with its first stream.
    hang_up — once it is set the caller hangs up, whatever is left to say.
    measure — False for many calls in one process: keeps no audio, and so reports neither recording nor echo. chunk_ms — audio in
    one frame; carriers send 20, others need measure=False.
    jitter_ms — see `Ear`. Every wait is bounded; the whole call by `longest_call_secs`.
    """
    prefixes = kind_cls.carrier().habits.id_prefixes
    ids = [f"{prefix}{uuid4().hex}" for prefix in prefixes] if prefixes else [str(uuid4()) for _ in range(3)]
    line = _Line(
        kind_cls,
        url=url,
        call=Call(call_id or ids[0], caller, called, account_id=account_id or ids[2]),
        stream_id=stream_id or ids[1],
        on_event=on_event,
    )
    line.sign, line.fate, line.jitter_ms, line.chars_per_sec = sign, fate, jitter_ms, chars_per_sec
    line.follow, line.on_stream, line.measure, line.chunk_ms = follow, on_stream, measure, chunk_ms
    line.connect_timeout_secs, line.close_timeout_secs = connect_timeout_secs, close_timeout_secs
    script = _Script(audio, audio_format, dtmf, say or [], hold_secs, barge_in_after_secs, reply_timeout_secs)
    try:
        async with asyncio.timeout(longest_call_secs):
            await line.run(script, Dial(url, parameters or {}, media_format), hang_up or asyncio.Event())
    except TimeoutError:
        line.report.errors.append(f"The call was still running after {longest_call_secs:g} s and was cut.")
    return await line.finish()


async def simulate_many(
    count: int,
    call: Callable[[int], Awaitable[CallReport]],
    *,
    ramp_secs: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CallReport]:
    """Places `count` calls, evenly begun over `ramp_secs`: `call(index)` is a `simulate(…)` to await. Reports in order of index.

    `on_progress(started, finished)` is called at each change.
    """
    reports: dict[int, CallReport] = {}
    started = 0
    begin = monotonic()

    async def place(index: int) -> None:
        nonlocal started
        await asyncio.sleep(max(0.0, begin + index * ramp_secs / count - monotonic()))
        started += 1
        if on_progress:
            on_progress(started, len(reports))
        reports[index] = await call(index)
        if on_progress:
            on_progress(started, len(reports))

    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(place(index))
    return [reports[index] for index in range(count)]


class _Script(Struct, frozen=True):
    audio: bytes | None
    audio_format: MediaFormat | None
    dtmf: str
    say: list[str]
    hold_secs: float
    barge_in_after_secs: float | None
    reply_timeout_secs: float


class _Refused(Exception):  # the sentence for the report
    """The call can't go on; the text is what the report says."""


class _Attached:
    """A stream while it lasts."""

    def __init__(self, carrier: Carrier, socket: aiohttp.ClientWebSocketResponse, dial: Dial, report: StreamReport) -> None:
        self.carrier = carrier
        self.socket = socket
        self.report = report
        self.tracks = tuple(Track(track) for track in dial.tracks)
        self.listen_only = not dial.bidirectional
        self.outbox: deque[Event] = deque()
        self.sending = asyncio.Lock()
        self.bad_in_a_row = 0
        self.first_ms = random.randrange(40, 180)
        self.first_tick: int | None = None
        self.end = StreamEnd(report.stream_id, "failure")


class _Line:
    """One call: its streams, its clock, what went over them."""

    def __init__(self, kind_cls: type[Provider], *, url: str, call: Call, stream_id: str, on_event: OnEvent | None) -> None:
        self.report = CallReport(kind=kind_cls.__module__.rpartition(".")[2], url=url, call_id=call.call_id, stream_id=stream_id)
        self.sign: Callable[[HttpRequest], HttpRequest] | None = None
        self.fate: Callable[[str], Fate] | None = None
        self.jitter_ms = 20.0
        self.chars_per_sec = 15.0
        self.follow = self.measure = True
        self.on_stream: OnStream | None = None
        self.chunk_ms = CHUNK_MS
        self.connect_timeout_secs = self.close_timeout_secs = 5.0
        self._provider = kind_cls
        self._habits = kind_cls.carrier().habits
        self._call = call
        self._on_event = on_event
        self._began = monotonic()
        self._http: aiohttp.ClientSession
        self._stream: _Attached | None = None
        self._dial: Dial
        self._answer = ""  # the document that the call goes by
        self._base = url  # what a relative URL in it is relative to
        self._first_attached = asyncio.Event()
        self._over = False  # the caller has hung up
        self._media_format = MULAW_8K
        self._ear: Ear | None = None
        self._voice: Voice | None = None
        self._wake = asyncio.Event()
        self._left_unsaid = self._said_ms = self._detached_ms = 0
        self._said = bytearray()
        self._sent_at: list[float] = []  # of each chunk
        self._received = bytearray()
        self._arrivals: list[tuple[float, int]] = []  # time, and bytes received by then

    # --- the course of a call ----------------------------------------------------------------------------------------

    async def run(self, script: _Script, dial: Dial, hang_up: asyncio.Event) -> None:
        """From the webhook to the end of the last stream."""
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_no_redirect)
        try:
            connector = aiohttp.TCPConnector(force_close=True)  # a kept connection may be to a gateway that is gone
            async with aiohttp.ClientSession(connector=connector, trace_configs=[trace]) as self._http:
                if dial.url.startswith(("http://", "https://")):
                    self._answer = await self._ask(self._provider.webhook(self._call, dial.url))
                    dial = self._read(self._answer)
                await self._converse(script, dial, hang_up)
        except _Refused as refused:
            self.report.errors.append(str(refused))

    async def finish(self) -> CallReport:
        """Settles the accounts: what had not sounded is lost; measures the echo in a thread of its own."""
        report, now = self.report, self._now()
        report.duration_ms = round(now * 1000)
        if self._voice is not None:
            report.spoken, report.dtmf_heard, report.media_played = self._voice.spoken, self._voice.digits, self._voice.clips
            first = self._voice.first_heard_at
            report.first_heard_ms = None if first is None else round(first * 1000)
        if self._ear is not None:
            ear = self._ear
            ear.end(now)
            report.audio_sent_ms = self._said_ms - report.lost_in_gaps_ms
            report.heard_ms = round(self._media_format.duration_ms(len(ear.heard)))
            report.underruns, report.underrun_ms = ear.underruns, round(ear.underrun_ms, 1)
            report.max_buffered_ms = round(ear.max_buffered_ms, 1)
            report.first_heard_ms = None if ear.first_heard_at is None else round(ear.first_heard_at * 1000)
            report.checkpoints, report.clears = ear.marks, ear.cuts
            if self.measure:
                report.echo, report.recording = await asyncio.to_thread(self._listen_back, ear)
            if report.echo is not None:
                report.latency_p50_ms, report.latency_p99_ms = report.echo.p50_ms, report.echo.p99_ms
        return report

    async def _ask(self, request: HttpRequest) -> str:
        """Asks the gateway what to do, and again where the carrier would."""
        if self.sign is not None:
            request = self.sign(request)
        form = dict(request.form)
        query, body = (form, None) if request.method == "GET" else (None, form)
        for left in reversed(range(1 + self._habits.webhook_retries)):
            try:
                async with (
                    asyncio.timeout(self.connect_timeout_secs),
                    self._http.request(request.method, request.url, headers=request.headers, params=query, data=body) as response,
                ):
                    answer = await response.text(errors="replace")
                    if response.status != 200:
                        raise _Refused(explain_status(response.status, request.url, "webhook"))
                    self._base = request.url
                    return answer
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                silent = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientConnectorError)
                again = self._habits.retries_silence if silent else isinstance(error, aiohttp.ClientConnectorError)
                if not left or not again:
                    raise _Refused(explain(error, request.url, self.connect_timeout_secs)) from error
        raise AssertionError

    def _read(self, answer: str) -> Dial:
        """The first answer as the carrier reads it: anything but a stream is the end."""
        place = origin(self._base)
        try:
            return self._provider.dial(answer)
        except MalformedFrame as error:
            if "<Reject" in answer or "<Hangup" in answer:
                raise _Refused(
                    f"{place} turned the call away: it is full, or more calls came in a second than it admits "
                    "(max_calls, max_calls_per_second)."
                ) from error
            raise _Refused(f"A real carrier would have refused the answer of {place}: {error}") from error

    async def _connect(self, url: str) -> aiohttp.ClientWebSocketResponse:
        offered = (self._habits.subprotocol,) if self._habits.subprotocol else ()
        request = HttpRequest("GET", url, UPGRADE)
        if self.sign is not None:
            request = self.sign(request)
            url = request.url
        for left in reversed(range(self._habits.stream_attempts)):
            try:
                async with asyncio.timeout(self.connect_timeout_secs):
                    return await self._http.ws_connect(
                        url,
                        protocols=offered,
                        headers={name: value for name, value in request.headers.items() if name.lower() not in UPGRADE},
                        timeout=aiohttp.ClientWSTimeout(ws_close=self.close_timeout_secs),
                        max_msg_size=16 * 1024 * 1024,  # what is too large is the carrier half's to judge
                    )
            except aiohttp.WSServerHandshakeError as error:
                if not left:
                    raise _Refused(explain_status(error.status, url, "stream")) from error
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                if not left:
                    raise _Refused(explain(error, url, self.connect_timeout_secs)) from error
        raise AssertionError

    async def _converse(self, script: _Script, dial: Dial, hang_up: asyncio.Event) -> None:
        """The streams, talking and the playout clock side by side; the first to end ends the call."""
        if self._habits.text:
            self._voice = Voice(chars_per_sec=self.chars_per_sec)
        else:
            self._media_format = dial.media_format or MULAW_8K
            self._ear = Ear(self._media_format, self._habits, jitter_ms=self.jitter_ms, fate=self.fate)
        async with asyncio.TaskGroup() as group:
            streaming = group.create_task(self._guard(self._attend(dial)))
            others = [group.create_task(self._guard(part)) for part in (self._talk(script), self._keep_time())]
            others.append(group.create_task(_until(hang_up)))
            await asyncio.wait((streaming, *others), return_when=asyncio.FIRST_COMPLETED)
            for other in others:
                other.cancel()
            if not streaming.done():
                self._over = True
                await self._hang_up()
                streaming.cancel()
        if not self._dial.bidirectional:
            return
        if self.report.connected and not self.report.frames_in:
            self.report.remarks.append("The caller heard nothing at all. Does the service speak? Is the URL this carrier's own?")

    async def _attend(self, dial: Dial | None) -> None:
        """One stream after the other, until what comes next is none."""
        while dial is not None:
            self._dial = dial
            stream = StreamReport(stream_id=self.report.stream_id if not self.report.streams else self._new_id())
            self.report.streams.append(stream)
            try:
                end = await self._carry(dial, stream)
            except _Refused as refused:
                stream.problem, end = str(refused), StreamEnd(stream.stream_id, "failure")
                stream.ended_ms = round(self._now() * 1000)
            if self._over:
                return
            try:
                dial = await self._next(dial, end)
            finally:
                if stream.problem:
                    # A stream that another one has followed is no longer what ended the call.
                    told = self.report.errors if dial is None or dial is self._dial else self.report.remarks
                    told.append(stream.problem)
        if self._left_unsaid:
            self.report.remarks.append(f"The gateway hung up with {self._left_unsaid} ms of the caller's words unsaid.")

    async def _carry(self, dial: Dial, report: StreamReport) -> StreamEnd:
        """One stream from its start frame to its end. Raises _Refused."""
        if not self._habits.text and (dial.media_format or MULAW_8K) != self._media_format:
            raise _Refused(f"The call went on in another format, {dial.media_format}: this caller's telephone can't.")
        socket = await self._connect(dial.url)
        carrier = self._provider.carrier()
        if self.report.connected and isinstance(carrier, Returning):
            carrier.come_back()
        stream = _Attached(carrier, socket, dial, report)
        try:
            self._stream = stream
            await self._tell(self._start(stream, dial))
            now_ms = round(self._now() * 1000)
            if self.report.connected:
                report.gap_ms = now_ms - self._detached_ms
            report.attached_ms = now_ms
            self.report.connected = True
            self._first_attached.set()
            if self._voice is not None and dial.greeting:
                await self._tell(*self._voice.say(Say(dial.greeting), self._now()))
                self._wake.set()
            if self.on_stream is not None:
                self.on_stream(report)
            await self._listen(stream)
        finally:
            self._stream = None
            if not self._over:
                await self._close(stream)
        return msgspec.structs.replace(stream.end, duration_secs=round(self._now() - (report.attached_ms or 0) / 1000))

    def _start(self, stream: _Attached, dial: Dial) -> Start:
        return Start(
            stream_id=stream.report.stream_id,
            call_id=self._call.call_id,
            account_id=self._call.account_id,
            caller=self._call.caller,
            called=self._call.called,
            direction=self._call.direction,
            media_format=None if self._habits.text else self._media_format,
            tracks=stream.tracks,
            parameters=dict(dial.parameters),
        )

    async def _next(self, dial: Dial, end: StreamEnd) -> Dial | None:
        """What comes after a stream: another one, or None where the call is over. Raises _Refused."""
        if not self.follow or not self._answer:
            return None
        if dial.action_url is None:
            self.report.ended_with = _rest(self._answer)
            return None
        request = self._provider.webhook(self._call, urljoin(self._base, dial.action_url), end)
        self._answer = await self._ask(request)
        if len(self.report.streams) >= MOST_STREAMS:
            raise _Refused(f"The call had {MOST_STREAMS} streams, and was told to begin another.")
        try:
            return self._provider.dial(self._answer)
        except MalformedFrame as error:
            if _verbs(self._answer) is None:
                raise _Refused(f"A real carrier would have refused the answer of {origin(request.url)}: {error}") from error
            self.report.ended_with = self._answer[:MOST_XML]
            return None

    async def _guard(self, part: Coroutine[Any, Any, object]) -> None:
        """Runs one part of the call; when it ends, well or not, the call ends."""
        try:
            await part
        except (GatewayError, _Refused) as error:
            self.report.errors.append(str(error))
        except TimeoutError:
            self.report.errors.append(
                f"The gateway did not read its socket for {SEND_TIMEOUT_SECS:g} s: a carrier's buffer would have overflowed."
            )

    async def _talk(self, script: _Script) -> None:
        await self._first_attached.wait()
        await (self._type_text(script) if self._habits.text else self._speak(script))

    async def _hang_up(self) -> None:
        """The caller hangs up: where a stream is up, it ends in the carrier's own way; nobody waits for what comes after."""
        stream, self._stream = self._stream, None
        if stream is None:
            self.report.ended_by = "caller"
            return
        if stream.report.ended_by == "nobody" and not stream.socket.closed:
            stream.report.ended_by = "caller"
            if self._habits.says_stop:
                self._stream = stream
                await self._guard(self._tell(Stop(StopReason.CALLER_HANGUP)))
                self._stream = None
        await self._close(stream)
        if stream.report.problem:
            self.report.errors.append(stream.report.problem)
        action = self._dial.action_url
        if self._habits.tells_hangup and self.follow and self._answer and action is not None:
            secs = round(self._now() - (stream.report.attached_ms or 0) / 1000)
            end = StreamEnd(stream.report.stream_id, "hangup", secs)
            try:
                await self._ask(self._provider.webhook(self._call, urljoin(self._base, action), end))
            except _Refused as refused:
                self.report.remarks.append(f"Told of the hang-up: {refused}")

    async def _close(self, stream: _Attached) -> None:
        """The close frames, and what there is to say of them."""
        ws, report = stream.socket, stream.report
        if not ws.closed:
            began = self._now()
            await ws.close(code=1007 if stream.bad_in_a_row >= STRIKES and self._habits.text else 1000)
            # Where the gateway closes on our stop, its close frame may cross ours: nobody is late then.
            if ws.close_code == 1006 and self._now() - began >= self.close_timeout_secs:
                report.problem = f"The gateway did not answer the close frame within {self.close_timeout_secs:g} s."
        elif ws.close_code == 1006:
            report.problem = "The gateway's socket went away in mid-call without a close frame (1006)."
        report.close_code = self.report.close_code = ws.close_code
        self.report.ended_by = report.ended_by
        if report.ended_by == "gateway" and not report.problem:
            report.problem = explain_close(ws.close_code)
        now = self._now()
        report.ended_ms = self._detached_ms = round(now * 1000)
        if self._ear is not None:
            self._ear.end(now)
        if self._voice is not None:
            self._voice.end(now)
        if self.on_stream is not None:
            self.on_stream(report)

    def _new_id(self) -> str:
        prefixes = self._habits.id_prefixes
        return f"{prefixes[1]}{uuid4().hex}" if prefixes else str(uuid4())

    # --- from the carrier to the gateway -------------------------------------------------------------------------------

    async def _tell(self, *events: Event) -> bool:
        """Sends events in the order given, also among several callers. False: nobody is there. Raises TimeoutError."""
        stream = self._stream
        if stream is None:
            return False
        stream.outbox.extend(events)
        async with stream.sending:
            while stream.outbox:
                event = stream.outbox.popleft()
                try:
                    for frame in stream.carrier.encode(event):
                        async with asyncio.timeout(SEND_TIMEOUT_SECS):
                            await (stream.socket.send_str(frame) if isinstance(frame, str) else stream.socket.send_bytes(frame))
                        self.report.frames_out += 1
                        stream.report.frames_out += 1
                except (ConnectionError, aiohttp.ClientError):  # who reads will see the end
                    stream.outbox.clear()
                    return False
                self._show("up", event)
        return True

    async def _speak(self, script: _Script) -> None:
        """The caller's audio in chunks on an absolute schedule, keys in between, then silence until the caller hangs up."""
        chunk_ms = self.chunk_ms
        silence = self._media_format.silence(chunk_ms)
        chunks = deque(self._chunks(script, len(silence)))
        keys = deque(script.dtmf)
        listening = script.barge_in_after_secs is not None
        begin = self._now()
        left = round(script.hold_secs * 1000 / chunk_ms)
        tick = 0
        while chunks or keys or left > 0:
            if not chunks and not keys:
                left -= 1
            await asyncio.sleep(max(0.0, begin + tick * chunk_ms / 1000 - self._now()))
            if listening and self._may_interrupt(script, self._now() - begin):
                listening = False
                self._mouth.barge_in(self._now())
            said = chunks.popleft() if chunks and not listening else silence
            self._left_unsaid = len(chunks) * chunk_ms
            await self._utter(said, silence, tick)
            tick += 1
            if keys and tick * chunk_ms >= 500 and tick % (300 // chunk_ms or 1) == 0:
                self.report.dtmf_sent += keys[0]
                await self._tell(Dtmf(keys.popleft()))
        await asyncio.sleep(max(0.0, begin + tick * chunk_ms / 1000 - self._now()))

    async def _utter(self, said: bytes, silence: bytes, tick: int) -> None:
        """One chunk, `tick` chunks after the caller began; lost where there is no stream to take it."""
        self._said_ms += self.chunk_ms
        if self.measure:
            self._said += said
            self._sent_at.append(self._now())
        stream, sent = self._stream, False
        if stream is not None and stream.report.attached_ms is not None:
            stream.first_tick = tick if stream.first_tick is None else stream.first_tick
            timestamp_ms = stream.first_ms + (tick - stream.first_tick) * self.chunk_ms
            tracks = stream.tracks
            sent = await self._tell(
                *(Audio(said if track is Track.INBOUND else silence, track, timestamp_ms) for track in tracks)
            )
        if not sent:
            self.report.lost_in_gaps_ms += self.chunk_ms

    def _chunks(self, script: _Script, size: int) -> list[bytes]:
        audio = script.audio or b""
        if script.audio_format is not None and script.audio_format != self._media_format:
            audio = convert(audio, script.audio_format, self._media_format)
        audio += self._media_format.silence(self.chunk_ms)[: -len(audio) % size]
        return [audio[at : at + size] for at in range(0, len(audio), size)]

    def _may_interrupt(self, script: _Script, waited: float) -> bool:
        first = self._mouth.first_heard_at
        if first is None and waited > script.reply_timeout_secs:
            raise _Refused(f"Nothing to interrupt: the caller heard no audio for {script.reply_timeout_secs:g} s.")
        return first is not None and self._now() >= first + (script.barge_in_after_secs or 0.0)

    async def _type_text(self, script: _Script) -> None:
        """The caller's turns as a text carrier tells them: partials, the final text, keys; each waits for the agent to finish."""
        voice = self._words
        await asyncio.sleep(0.2)
        for index, text in enumerate(script.say):
            if script.barge_in_after_secs is not None and index == len(script.say) - 1:
                if not await self._until(lambda: voice.speaking(self._now()), script.reply_timeout_secs):
                    raise _Refused(f"Nothing to interrupt: the caller heard no speech for {script.reply_timeout_secs:g} s.")
                await asyncio.sleep(script.barge_in_after_secs)
            else:
                await self._until_quiet()
            await self._take_turn(text)
            await self._until(lambda: voice.sounding(self._now()), script.reply_timeout_secs)
        if script.dtmf:
            await self._until_quiet()
        for key in script.dtmf:
            self.report.dtmf_sent += key
            await self._tell(Dtmf(key), *voice.interrupt(self._now()))
            await asyncio.sleep(0.3)
        await self._until_quiet()
        await asyncio.sleep(script.hold_secs)

    async def _take_turn(self, text: str) -> None:
        words = text.split()
        cut = self._words.interrupt(self._now())
        first = Transcript(" ".join(words[:2]), final=False, language="en-US")
        if cut:
            await self._tell(Speech(Party.CALLER, True), *cut[:-1], first, cut[-1])
        else:
            await self._tell(Speech(Party.CALLER, True), first)
        for count in range(4, len(words) + 1, 2):
            await asyncio.sleep(0.2)
            await self._tell(Transcript(" ".join(words[:count]), final=False, language="en-US"))
        await asyncio.sleep(0.2)
        self.report.said.append(text)
        await self._tell(Speech(Party.CALLER, False), Transcript(text, final=True, language="en-US"))

    async def _until_quiet(self) -> None:
        """Until nothing was spoken for a moment; a service that never stops talking is cut by the call's own bound."""
        quiet_since = self._now()
        while self._now() - quiet_since < 0.25:
            await asyncio.sleep(0.02)
            if self._words.sounding(self._now()):
                quiet_since = self._now()

    async def _until(self, condition: Callable[[], bool], timeout_secs: float) -> bool:
        deadline = self._now() + timeout_secs
        while not condition():
            if self._now() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def _keep_time(self) -> None:
        """Tells checkpoints and spoken words when they are due."""
        machine = self._ear or self._words
        while True:
            self._wake.clear()
            due = machine.next_event()
            wait = 3600.0 if due is None else due - self._now()
            if wait > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            await self._tell(*machine.advance(self._now()))

    # --- from the gateway to the carrier -------------------------------------------------------------------------------

    async def _listen(self, stream: _Attached) -> None:
        while True:
            message = await stream.socket.receive()
            match message.type:
                case aiohttp.WSMsgType.TEXT | aiohttp.WSMsgType.BINARY:
                    self.report.frames_in += 1
                    stream.report.frames_in += 1
                    if not await self._take(stream, message.data):
                        return
                case aiohttp.WSMsgType.ERROR:
                    self.report.errors.append(f"The gateway broke the WebSocket protocol: {message.data}")
                    stream.report.ended_by = "gateway"
                    return
                case aiohttp.WSMsgType.CLOSE | aiohttp.WSMsgType.CLOSING | aiohttp.WSMsgType.CLOSED:
                    if stream.report.ended_by == "nobody":
                        stream.report.ended_by = "gateway"
                    return
                case _:
                    pass

    async def _take(self, stream: _Attached, frame: str | bytes) -> bool:
        """Carries out one frame; False when it ended the stream."""
        try:
            commands = list(stream.carrier.decode(frame))
            if stream.listen_only:
                raise MalformedFrame("unidirectional", "a frame on a stream that only listens")
        except MalformedFrame as error:
            self._refuse(error)
            stream.bad_in_a_row += 1
            await self._tell(Fault(error.reason, str(error).removeprefix(f"{error.reason}: ")))
            if self._habits.text and stream.bad_in_a_row >= STRIKES:
                self.report.errors.append(f"A real carrier would have hung up (1007) after {STRIKES} bad frames in a row.")
                return False
            return True
        stream.bad_in_a_row = 0
        for command in commands:
            self._show("down", command)
            events = self._obey(command, self._now())
            self._wake.set()
            await self._tell(*events)
            if isinstance(command, Stop):
                stream.report.ended_by = "gateway"
                stream.end = StreamEnd(stream.report.stream_id, "request", handoff=command.handoff)
                await asyncio.sleep(0.09)
                return False
        return True

    def _obey(self, command: Command, now: float) -> list[Event]:
        match command:
            case Audio(payload=payload) if self._ear is not None:
                if self.measure:
                    self._received += payload
                    self._arrivals.append((now, len(self._received)))
                self._ear.media(payload, now)
            case Checkpoint(name=name) if self._ear is not None:
                return self._ear.checkpoint(name, now)
            case Clear() if self._ear is not None:
                return self._ear.clear(now)
            case Dtmf(digits=digits):
                if self._voice is not None:
                    return self._voice.tones(digits, now)
                self.report.dtmf_heard += digits
            case Say() if self._voice is not None:
                return self._voice.say(command, now)
            case Play() if self._voice is not None:
                return self._voice.play(command, now)
            case Audio() | Checkpoint() | Clear() | Say() | Play() | Language() | Stop():
                pass
            case _:
                assert_never(command)
        return []

    def _refuse(self, error: MalformedFrame) -> None:
        text, refusals = str(error)[:300], self.report.refusals
        if len(refusals) >= MOST_REFUSALS:
            text = f"more of {error.reason}"
        for refusal in refusals:
            if refusal.message == f"a real carrier would have refused: {text}":
                refusal.count += 1
                return
        refusals.append(Refusal(error.reason, f"a real carrier would have refused: {text}"))

    # --- small things --------------------------------------------------------------------------------------------------

    @property
    def _mouth(self) -> Ear:
        assert self._ear is not None  # noqa: S101  # only used on audio carriers
        return self._ear

    @property
    def _words(self) -> Voice:
        assert self._voice is not None  # noqa: S101  # only used on text carriers
        return self._voice

    def _now(self) -> float:
        return monotonic() - self._began

    def _show(self, direction: Direction, message: Event | Command) -> None:
        if self._on_event is not None:
            self._on_event(self._now(), direction, message)

    def _listen_back(self, ear: Ear) -> tuple[Echo | None, Recording]:
        wide = MediaFormat(Encoding.PCM_S16LE, self._media_format.sample_rate)
        said, heard, received = (convert(bytes(raw), self._media_format, wide) for raw in (self._said, ear.heard, self._received))
        start = self._sent_at[0] if self._sent_at else 0.0
        heard_at = None if ear.first_heard_at is None else ear.first_heard_at - start
        width = self._media_format.sample_bytes
        arrivals = [(at, count // width) for at, count in self._arrivals]
        echo = measure_echo(said, received, heard, wide.sample_rate, sent_at=self._sent_at, arrivals=arrivals, heard_at=heard_at)
        return echo, Recording(wide.sample_rate, heard, said, (heard_at or 0.0) * 1000)


def convert(audio: bytes, source: MediaFormat, target: MediaFormat) -> bytes:
    """A whole recording in another format."""
    if source.encoding is Encoding.PCM_S16LE and not 8000 <= source.sample_rate <= 48000:  # files may have any rate, streams not
        samples = np.frombuffer(audio[: len(audio) // 2 * 2], "<i2").astype(np.float32)
        wide = resample_whole(samples, source.sample_rate, target.sample_rate)
        audio = np.clip(np.rint(wide), -32768, 32767).astype("<i2").tobytes()
        source = MediaFormat(Encoding.PCM_S16LE, target.sample_rate)
    return convert_whole(audio, source, target)


def _verbs(answer: str) -> list[ElementTree.Element] | None:
    """The elements of an answer; None if it is not the XML that a carrier takes."""
    try:
        root = ElementTree.fromstring(answer)  # noqa: S314 - what the gateway under test answers
    except (ElementTree.ParseError, ValueError):
        return None
    return [*root] if root.tag == "Response" else None


def _rest(answer: str) -> str:
    """What stands after the stream in the answer that began it."""
    verbs = _verbs(answer) or []
    at = next((index for index, verb in enumerate(verbs) if verb.tag in ("Connect", "Start", "Stream")), len(verbs))
    rest = "".join(ElementTree.tostring(verb, encoding="unicode") for verb in verbs[at + 1 :])
    return f"<Response>{rest}</Response>"[:MOST_XML]


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def _no_redirect(_session: object, _context: object, params: aiohttp.TraceRequestRedirectParams) -> None:
    """Carriers follow redirects of a webhook at most; `ws_connect` would follow them to any host."""
    if "Upgrade" in params.headers:
        raise _Refused(
            f"{origin(str(params.url))} answered the stream's handshake with a redirect, which carriers do not follow."
        )
