"""A faithful carrier with a caller on the line: asks the webhook, dials the stream, talks, listens, and reports what was heard.

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
from uuid import uuid4

import aiohttp
import numpy as np
from msgspec import Struct

from gateway.alignment import Echo, measure_echo
from gateway.audio import convert_whole, resample_whole
from gateway.callreport import CallReport, Recording, Refusal, explain, explain_close, explain_status, origin
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
from gateway.provider import Call, Dial, HttpRequest, Provider
from gateway.signing import UPGRADE
from gateway.voice import Voice

Direction = Literal["up", "down"]
"""`up`: an event, from the carrier to the gateway. `down`: a command, from the gateway to the carrier."""

OnEvent = Callable[[float, Direction, Event | Command], None]
"""Called with seconds since the call began, the direction and the message."""

CHUNK_MS = 20
SEND_TIMEOUT_SECS = 5.0
MOST_REFUSALS = 20
"""Different refusals that are kept word for word; what follows is counted under its reason."""
STRIKES = 10
"""A text carrier hangs up (1007) after so many bad frames in a row."""


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
    on_event: OnEvent | None = None,
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
    line.connect_timeout_secs, line.close_timeout_secs = connect_timeout_secs, close_timeout_secs
    script = _Script(audio, audio_format, dtmf, say or [], hold_secs, barge_in_after_secs, reply_timeout_secs)
    try:
        async with asyncio.timeout(longest_call_secs):
            await line.run(script, Dial(url, parameters or {}, media_format))
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


class _Line:
    """One call: its socket, its clock, what went over it."""

    def __init__(self, kind_cls: type[Provider], *, url: str, call: Call, stream_id: str, on_event: OnEvent | None) -> None:
        self.report = CallReport(kind=kind_cls.__module__.rpartition(".")[2], url=url, call_id=call.call_id, stream_id=stream_id)
        self.sign: Callable[[HttpRequest], HttpRequest] | None = None
        self.fate: Callable[[str], Fate] | None = None
        self.jitter_ms = 20.0
        self.chars_per_sec = 15.0
        self.connect_timeout_secs = self.close_timeout_secs = 5.0
        self._provider = kind_cls
        self._carrier = kind_cls.carrier()
        self._habits = self._carrier.habits
        self._call = call
        self._on_event = on_event
        self._began = monotonic()
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._media_format = MULAW_8K
        self._ear: Ear | None = None
        self._voice: Voice | None = None
        self._wake = asyncio.Event()
        self._outbox: deque[Event] = deque()
        self._sending = asyncio.Lock()
        self._bad_in_a_row = 0
        self._listen_only = False
        self._left_unsaid = 0  # milliseconds
        self._said = bytearray()
        self._sent_at: list[float] = []  # of each chunk
        self._received = bytearray()
        self._arrivals: list[tuple[float, int]] = []  # time, and bytes received by then

    # --- the course of a call ----------------------------------------------------------------------------------------

    async def run(self, script: _Script, dial: Dial) -> None:
        """From the webhook to the close frame."""
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_no_redirect)
        try:
            async with aiohttp.ClientSession(trace_configs=[trace]) as http:
                if dial.url.startswith(("http://", "https://")):
                    dial = await self._ask(http, dial)
                async with await self._connect(http, dial.url) as self._ws:
                    self.report.connected = True
                    await self._converse(script, dial)
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
            report.audio_sent_ms = round(self._media_format.duration_ms(len(self._said)))
            report.heard_ms = round(self._media_format.duration_ms(len(ear.heard)))
            report.underruns, report.underrun_ms = ear.underruns, round(ear.underrun_ms, 1)
            report.max_buffered_ms = round(ear.max_buffered_ms, 1)
            report.first_heard_ms = None if ear.first_heard_at is None else round(ear.first_heard_at * 1000)
            report.checkpoints, report.clears = ear.marks, ear.cuts
            report.echo, report.recording = await asyncio.to_thread(self._listen_back, ear)
            if report.echo is not None:
                report.latency_p50_ms, report.latency_p99_ms = report.echo.p50_ms, report.echo.p99_ms
        return report

    async def _ask(self, http: aiohttp.ClientSession, dial: Dial) -> Dial:
        """Asks the webhook and reads the answer as the carrier would."""
        request = self._provider.webhook(self._call, dial.url)
        if self.sign is not None:
            request = self.sign(request)
        form = dict(request.form)
        query, body = (form, None) if request.method == "GET" else (None, form)
        try:
            async with (
                asyncio.timeout(self.connect_timeout_secs),
                http.request(request.method, request.url, headers=request.headers, params=query, data=body) as response,
            ):
                answer = await response.text(errors="replace")
                if response.status != 200:
                    raise _Refused(explain_status(response.status, request.url, "webhook"))
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise _Refused(explain(error, request.url, self.connect_timeout_secs)) from error
        try:
            return self._provider.dial(answer)
        except MalformedFrame as error:
            if "<Reject" in answer or "<Hangup" in answer:
                raise _Refused(
                    f"{origin(request.url)} turned the call away: it is full, or more calls came in a second than it admits "
                    "(max_calls, max_calls_per_second)."
                ) from error
            raise _Refused(f"A real carrier would have refused the answer of {origin(request.url)}: {error}") from error

    async def _connect(self, http: aiohttp.ClientSession, url: str) -> aiohttp.ClientWebSocketResponse:
        offered = (self._habits.subprotocol,) if self._habits.subprotocol else ()
        request = HttpRequest("GET", url, UPGRADE)
        if self.sign is not None:
            request = self.sign(request)
            url = request.url
        try:
            async with asyncio.timeout(self.connect_timeout_secs):
                return await http.ws_connect(
                    url,
                    protocols=offered,
                    headers={name: value for name, value in request.headers.items() if name.lower() not in UPGRADE},
                    timeout=aiohttp.ClientWSTimeout(ws_close=self.close_timeout_secs),
                    max_msg_size=16 * 1024 * 1024,  # what is too large is the carrier half's to judge
                )
        except aiohttp.WSServerHandshakeError as error:
            raise _Refused(explain_status(error.status, url, "stream")) from error
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise _Refused(explain(error, url, self.connect_timeout_secs)) from error

    async def _converse(self, script: _Script, dial: Dial) -> None:
        """Start, then talking, listening and the playout clock side by side; the first to end ends the call."""
        if self._habits.text:
            self._voice = Voice(chars_per_sec=self.chars_per_sec)
        else:
            self._media_format = dial.media_format or MULAW_8K
            self._ear = Ear(self._media_format, self._habits, jitter_ms=self.jitter_ms, fate=self.fate)
        start = Start(
            stream_id=self.report.stream_id,
            call_id=self._call.call_id,
            account_id=self._call.account_id,
            caller=self._call.caller,
            called=self._call.called,
            direction=self._call.direction,
            media_format=None if self._habits.text else self._media_format,
            tracks=tuple(Track(track) for track in dial.tracks),
            parameters=dict(dial.parameters),
        )
        self._listen_only = not dial.bidirectional
        async with asyncio.TaskGroup() as group:
            talking, listening, ticking = (
                group.create_task(self._guard(part)) for part in (self._talk(start, script), self._listen(), self._keep_time())
            )
            await asyncio.wait((talking, listening, ticking), return_when=asyncio.FIRST_COMPLETED)
            talking.cancel()
            ticking.cancel()
            await self._hang_up()
            listening.cancel()

    async def _guard(self, part: Coroutine[Any, Any, None]) -> None:
        """Runs one part of the call; a lost connection ends it and the reading part tells the close code."""
        try:
            await part
        except (ConnectionError, aiohttp.ClientError):
            return
        except (GatewayError, _Refused) as error:
            self.report.errors.append(str(error))
        except TimeoutError:
            self.report.errors.append(
                f"The gateway did not read its socket for {SEND_TIMEOUT_SECS:g} s: a carrier's buffer would have overflowed."
            )

    async def _talk(self, start: Start, script: _Script) -> None:
        await self._tell(start)
        await (self._type_text(script) if self._habits.text else self._speak(script, start.tracks))

    async def _hang_up(self) -> None:
        """The carrier's own way to end: a stop where it says one, then close 1000."""
        ws, report = self._socket, self.report
        if report.ended_by == "nobody" and not ws.closed:
            report.ended_by = "caller"
            if self._habits.says_stop:
                await self._guard(self._tell(Stop(StopReason.CALLER_HANGUP)))
        if not ws.closed:
            began = self._now()
            await ws.close(code=1007 if self._bad_in_a_row >= STRIKES and self._habits.text else 1000)
            # Where the gateway closes on our stop, its close frame may cross ours: nobody is late then.
            if ws.close_code == 1006 and self._now() - began >= self.close_timeout_secs:
                report.errors.append(f"The gateway did not answer the close frame within {self.close_timeout_secs:g} s.")
        elif ws.close_code == 1006:
            report.errors.append("The gateway's socket went away in mid-call without a close frame (1006).")
        report.close_code = ws.close_code
        if report.ended_by == "gateway" and (why := explain_close(ws.close_code)):
            report.errors.append(why)
        if report.ended_by == "gateway" and self._left_unsaid:
            report.remarks.append(f"The gateway hung up with {self._left_unsaid} ms of the caller's words unsaid.")
        if not self._listen_only and not report.frames_in:
            report.remarks.append("The caller heard nothing at all. Does the service speak? Is the URL this carrier's own?")

    # --- from the carrier to the gateway -------------------------------------------------------------------------------

    async def _tell(self, *events: Event) -> None:
        """Sends events in the order given, also among several callers. Raises ConnectionError or TimeoutError."""
        self._outbox.extend(events)
        async with self._sending:
            while self._outbox:
                event = self._outbox.popleft()
                for frame in self._carrier.encode(event):
                    if isinstance(event, Audio) and event.track is Track.INBOUND:
                        self._sent_at.append(self._now())
                    async with asyncio.timeout(SEND_TIMEOUT_SECS):
                        await (self._socket.send_str(frame) if isinstance(frame, str) else self._socket.send_bytes(frame))
                    self.report.frames_out += 1
                self._show("up", event)

    async def _speak(self, script: _Script, tracks: tuple[Track, ...]) -> None:
        """The caller's audio in 20 ms chunks on an absolute schedule, keys in between, then silence until the caller hangs up."""
        silence = self._media_format.silence(CHUNK_MS)
        chunks = deque(self._chunks(script, len(silence)))
        keys = deque(script.dtmf)
        listening = script.barge_in_after_secs is not None
        begin, first_ms = self._now(), random.randrange(40, 180)
        left = round(script.hold_secs * 1000 / CHUNK_MS)
        tick = 0
        while chunks or keys or left > 0:
            if not chunks and not keys:
                left -= 1
            await asyncio.sleep(max(0.0, begin + tick * CHUNK_MS / 1000 - self._now()))
            if listening and self._may_interrupt(script, self._now() - begin):
                listening = False
                self._mouth.barge_in(self._now())
            said = chunks.popleft() if chunks and not listening else silence
            self._left_unsaid = len(chunks) * CHUNK_MS
            self._said += said
            for track in tracks:
                payload = said if track is Track.INBOUND else silence
                await self._tell(Audio(payload, track, first_ms + tick * CHUNK_MS))
            tick += 1
            if keys and tick >= 25 and tick % 15 == 0:
                self.report.dtmf_sent += keys[0]
                await self._tell(Dtmf(keys.popleft()))
        await asyncio.sleep(max(0.0, begin + tick * CHUNK_MS / 1000 - self._now()))

    def _chunks(self, script: _Script, size: int) -> list[bytes]:
        audio = script.audio or b""
        if script.audio_format is not None and script.audio_format != self._media_format:
            audio = convert(audio, script.audio_format, self._media_format)
        audio += self._media_format.silence(CHUNK_MS)[: -len(audio) % size]
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

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            match message.type:
                case aiohttp.WSMsgType.TEXT | aiohttp.WSMsgType.BINARY:
                    self.report.frames_in += 1
                    if not await self._take(message.data):
                        return
                case aiohttp.WSMsgType.ERROR:
                    self.report.errors.append(f"The gateway broke the WebSocket protocol: {message.data}")
                    self.report.ended_by = "gateway"
                    return
                case aiohttp.WSMsgType.CLOSE | aiohttp.WSMsgType.CLOSING | aiohttp.WSMsgType.CLOSED:
                    if self.report.ended_by == "nobody":
                        self.report.ended_by = "gateway"
                    return
                case _:
                    pass

    async def _take(self, frame: str | bytes) -> bool:
        """Carries out one frame; False when it ended the call."""
        try:
            commands = list(self._carrier.decode(frame))
            if self._listen_only:
                raise MalformedFrame("unidirectional", "a frame on a stream that only listens")
        except MalformedFrame as error:
            self._refuse(error)
            self._bad_in_a_row += 1
            await self._tell(Fault(error.reason, str(error).removeprefix(f"{error.reason}: ")))
            if self._habits.text and self._bad_in_a_row >= STRIKES:
                self.report.errors.append(f"A real carrier would have hung up (1007) after {STRIKES} bad frames in a row.")
                return False
            return True
        self._bad_in_a_row = 0
        for command in commands:
            self._show("down", command)
            events = self._obey(command, self._now())
            self._wake.set()
            await self._tell(*events)
            if isinstance(command, Stop):
                self.report.ended_by = "gateway"
                await asyncio.sleep(0.09)
                return False
        return True

    def _obey(self, command: Command, now: float) -> list[Event]:
        match command:
            case Audio(payload=payload) if self._ear is not None:
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
    def _socket(self) -> aiohttp.ClientWebSocketResponse:
        assert self._ws is not None  # noqa: S101  # only used inside `run`
        return self._ws

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


async def _no_redirect(_session: object, _context: object, params: aiohttp.TraceRequestRedirectParams) -> None:
    """Carriers follow redirects of a webhook at most; `ws_connect` would follow them to any host."""
    if "Upgrade" in params.headers:
        raise _Refused(
            f"{origin(str(params.url))} answered the stream's handshake with a redirect, which carriers do not follow."
        )
