"""Bots that were written for one carrier, on calls of the other: real sockets, foreign carriers, and bots in their own words."""

from __future__ import annotations

import asyncio
import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from socket import SO_RCVBUF, SOL_SOCKET
from typing import Any, Self

import pytest
from aiohttp import web
from plivo.utils import validate_v3_signature
from twilio.request_validator import RequestValidator
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from gateway import config
from gateway.errors import ConfigError, MalformedFrame
from gateway.events import Start
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.provider import Habits
from gateway.services import dialect_pipecat
from gateway.services.dialect import detail, likened, masked, no_dialects, translated
from gateway.settings import WebsocketService
from tests.conftest import Launch
from tests.doubles import ConversationRelay, Plivo, RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, played, stream_url

TOKEN = "0123456789abcdef0123456789abcdef"
SUBPROTOCOL = Subprotocol("audio.plivo.com")
SPEECH = MULAW[:8000]


class Bot(ABC):
    """Echoes, and goes by the caller's keys: 1 a mark, 2 two seconds of speech and a mark, * clear, # close."""

    kind: str
    subprotocols: list[Subprotocol] | None = None

    def __init__(self, *, echo: bool = True, close_code: int = 1000, refuse: int = 0) -> None:
        self.echo, self.close_code, self.refuse = echo, close_code, refuse
        self.frames: list[dict[str, Any]] = []
        self.connections: list[ServerConnection] = []
        self.ended: list[int | None] = []
        self.stream_id = ""
        self.url = ""
        self._server: Server

    async def __aenter__(self) -> Self:
        self._server = await serve(self._attend, "127.0.0.1", 0, process_request=self._answer, subprotocols=self.subprotocols)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/media"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    def service(self, **options: Any) -> dict[str, object]:
        return {"kind": "websocket", "url": self.url, "dialect": self.kind, **options}

    @property
    def headers(self) -> Any:
        request = self.connections[-1].request
        assert request is not None
        return request.headers

    def told(self, event: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["event"] == event]

    @property
    def audio(self) -> bytes:
        return b"".join(base64.b64decode(frame["media"]["payload"]) for frame in self.told("media"))

    def _answer(self, connection: ServerConnection, _request: Any) -> Any:
        if self.refuse:
            self.refuse -= 1
            return connection.respond(503, "busy")
        return None

    async def _attend(self, socket: ServerConnection) -> None:
        self.connections.append(socket)
        with suppress(ConnectionClosed):
            async for text in socket:
                assert isinstance(text, str)
                frame = json.loads(text)
                self.frames.append(frame)
                await self._react(frame)
        self.ended.append(socket.close_code)

    async def _react(self, frame: dict[str, Any]) -> None:
        match frame["event"]:
            case "start":
                self.stream_id = frame["start"][self.stream_key]
            case "media" if self.echo:
                await self.say(base64.b64decode(frame["media"]["payload"]))
            case "dtmf":
                await self._press(frame["dtmf"]["digit"])

    async def _press(self, digit: str) -> None:
        match digit:
            case "1":
                await self.send(self.mark("one"))
            case "2":
                await self.say(MULAW[:8000] * 2)
                await self.send(self.mark("two"))
            case "*":
                await self.send(self.clear())
            case "#":
                await self.connections[-1].close(self.close_code)

    async def send(self, frame: dict[str, Any]) -> None:
        await self.raw(json.dumps(frame))

    async def raw(self, frame: str | bytes) -> None:
        await self.connections[-1].send(frame)

    stream_key: str

    @abstractmethod
    async def say(self, audio: bytes) -> None: ...

    @abstractmethod
    def mark(self, name: str) -> dict[str, Any]: ...

    @abstractmethod
    def clear(self) -> dict[str, Any]: ...


class TwilioBot(Bot):
    kind = "twilio_media_streams"
    stream_key = "streamSid"

    async def say(self, audio: bytes) -> None:
        payload = base64.b64encode(audio).decode()
        await self.send({"event": "media", "streamSid": self.stream_id, "media": {"payload": payload}})

    def mark(self, name: str) -> dict[str, Any]:
        return {"event": "mark", "streamSid": self.stream_id, "mark": {"name": name}}

    def clear(self) -> dict[str, Any]:
        return {"event": "clear", "streamSid": self.stream_id}


class PlivoBot(Bot):
    kind = "plivo_audio_streaming"
    stream_key = "streamId"
    subprotocols: list[Subprotocol] | None = [SUBPROTOCOL]  # noqa: RUF012 - never changed
    media = ("audio/x-mulaw", 8000)

    async def say(self, audio: bytes) -> None:
        payload = base64.b64encode(audio).decode()
        media = {"contentType": self.media[0], "sampleRate": self.media[1], "payload": payload}
        await self.send({"event": "playAudio", "media": media})

    def mark(self, name: str) -> dict[str, Any]:
        return {"event": "checkpoint", "streamId": self.stream_id, "name": name}

    def clear(self) -> dict[str, Any]:
        return {"event": "clearAudio", "streamId": self.stream_id}


class Plivo16Bot(PlivoBot):
    media = ("audio/x-l16", 16000)


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:  # noqa: ASYNC109 - a deadline with a message
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - several conditions, one helper
            await asyncio.sleep(0.005)


def logged(log: list[Any], event: str) -> list[Any]:
    return [entry for entry in log if entry["event"] == event]


# --- a whole call ---


async def test_a_twilio_bot_answers_a_plivo_call_as_it_is(launch: Launch, log: list[Any]) -> None:
    async with TwilioBot() as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo"), extra_headers="userId=12345") as call:
            await call.speak(SPEECH)
            await call.digits("1")
            await until(lambda: bot.told("mark"))
            await call.hangup()
            await until(lambda: bot.ended)
    connected, start, *_ = bot.frames
    assert {"event": "connected", "protocol": "Call", "version": "1.0.0"} == connected
    digits = call.stream_id.replace("-", "")
    assert "1" == start["sequenceNumber"]
    assert f"MZ{digits}" == start["streamSid"] == start["start"]["streamSid"]
    assert f"CA{call.call_id.replace('-', '')}" == start["start"]["callSid"]
    assert {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1} == start["start"]["mediaFormat"]
    assert ["inbound"] == start["start"]["tracks"]
    assert {"userId": "12345"} == start["start"]["customParameters"]
    assert SPEECH == bot.audio == played(call), "bit for bit, both ways"
    assert [str(20 * index) for index in range(50)] == [frame["media"]["timestamp"] for frame in bot.told("media")]
    assert {"track": "inbound_track", "digit": "1"} == bot.told("dtmf")[0]["dtmf"]
    assert [{"name": "one"}] == [frame["mark"] for frame in bot.told("mark")]
    assert "stop" == bot.frames[-1]["event"]
    assert [*range(1, len(bot.frames))] == [int(frame["sequenceNumber"]) for frame in bot.frames[1:]]
    assert [1000] == bot.ended
    assert [] == call.violations
    ended = logged(log, "stream_ended")[0]
    assert (8000, 8000, 0) == (ended["received_samples"], ended["forwarded_samples"], ended["dropped_samples"])
    assert [] == logged(log, "dialect_refused")


async def test_a_plivo_bot_answers_a_twilio_call_as_it_is(launch: Launch) -> None:
    async with PlivoBot() as bot:
        server = await launch(services={"bot": bot.service()})
        async with TwilioMedia(stream_url(server, "twilio"), parameters={"userId": "12345"}) as call:
            await call.speak(SPEECH)
            await call.digits("1")
            await until(lambda: bot.told("playedStream"))
            await call.hangup()
            await until(lambda: bot.ended)
    start = bot.frames[0]
    digits = call.stream_sid[2:]
    assert "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])) == start["start"]["streamId"]
    assert {"encoding": "audio/x-mulaw", "sampleRate": 8000} == start["start"]["mediaFormat"]
    assert "userId=12345" == start["extra_headers"]
    assert SPEECH == bot.audio == played(call)
    assert ["one"] == [frame["name"] for frame in bot.told("playedStream")]
    assert [*range(1, len(bot.frames) + 1)] == [frame["sequenceNumber"] for frame in bot.frames]
    assert [] == bot.told("stop"), "Plivo closes without one"
    assert [1000] == bot.ended
    assert SUBPROTOCOL == bot.connections[0].subprotocol
    assert [] == call.violations


async def test_a_bot_on_its_own_carriers_call_sees_that_calls_ids(launch: Launch) -> None:
    async with TwilioBot() as bot:
        server = await launch(services={"bot": bot.service()})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await call.speak(SPEECH[:1600])
            await until(lambda: len(bot.audio) == 1600)
    assert (call.stream_sid, call.call_sid) == (bot.stream_id, bot.frames[1]["start"]["callSid"])
    assert None is bot.connections[0].subprotocol


# --- checkpoints, as each dialect tells them ---


async def test_on_the_twilio_dialect_a_clear_echoes_the_marks_that_it_cut(launch: Launch) -> None:
    async with TwilioBot(echo=False) as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("2")
            await call.until(lambda: call.buffered_ms)
            await asyncio.sleep(0.1)
            await call.digits("*")
            await until(lambda: bot.told("mark"))
            assert not call.buffered_ms
    assert [{"name": "two"}] == [frame["mark"] for frame in bot.told("mark")]
    assert len(played(call)) < 16000
    assert [] == call.violations


async def test_on_the_plivo_dialect_the_clear_is_answered_and_the_mark_that_it_cut_is_not(launch: Launch) -> None:
    async with PlivoBot(echo=False) as bot:
        server = await launch(services={"bot": bot.service()})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await call.digits("2")
            await call.until(lambda: call.buffered_ms)
            await asyncio.sleep(0.1)
            await call.digits("*")
            await until(lambda: bot.told("clearedAudio"))
            await call.digits("1")
            await until(lambda: bot.told("playedStream"))
    assert ["one"] == [frame["name"] for frame in bot.told("playedStream")]
    assert 1 == len(bot.told("clearedAudio"))
    assert [] == call.violations


async def test_a_mark_that_the_call_did_not_live_to_see_is_not_told(launch: Launch) -> None:
    async with TwilioBot(echo=False) as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("2")
            await call.until(lambda: call.buffered_ms)
        await until(lambda: bot.ended)
    assert ["connected", "start", "dtmf", "stop"] == [frame["event"] for frame in bot.frames]


# --- audio ---


@pytest.mark.parametrize("carrier", [TwilioMedia, Plivo])
async def test_another_format_is_converted_both_ways(launch: Launch, carrier: Any) -> None:
    media_format = {"encoding": "pcm_s16le", "sample_rate": 16000}
    async with Plivo16Bot() as bot:
        server = await launch(services={"bot": bot.service(media_format=media_format)})
        async with carrier(stream_url(server, "twilio" if carrier is TwilioMedia else "plivo")) as call:
            await call.speak(SPEECH)
            await until(lambda: len(bot.audio) >= 31_900)
            await asyncio.sleep(0.2)
    assert {"encoding": "audio/x-l16", "sampleRate": 16000} == bot.frames[0]["start"]["mediaFormat"]
    assert {640} == {len(base64.b64decode(frame["media"]["payload"])) for frame in bot.told("media")[:-1]}
    assert abs(len(SPEECH) - len(played(call))) <= 320
    assert [] == call.violations


async def test_what_the_carrier_left_out_shows_in_the_timestamps(launch: Launch) -> None:
    async with TwilioBot(echo=False) as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo"), pace="fast") as call:
            await call.speak(SPEECH[:320])
            await call.gap(400)
            await call.speak(SPEECH[320:640])
            await until(lambda: len(bot.audio) == 640)
    assert ["0", "20", "440", "460"] == [frame["media"]["timestamp"] for frame in bot.told("media")]


class Stall(TwilioBot):
    """Reads nothing until it is told to, and its system holds little."""

    def __init__(self) -> None:
        super().__init__(echo=False)
        self.go = asyncio.Event()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        for listener in self._server.sockets:
            listener.setsockopt(SOL_SOCKET, SO_RCVBUF, 8192)  # whom it accepts inherits it
        return self

    async def __aexit__(self, *_: object) -> None:
        self.go.set()
        await super().__aexit__()

    async def _attend(self, socket: ServerConnection) -> None:
        await self.go.wait()
        await super()._attend(socket)


async def test_a_slow_bot_misses_audio_and_its_timeline_says_how_much(launch: Launch, log: list[Any]) -> None:
    async with Stall() as bot:
        server = await launch(services={"bot": bot.service()}, hold_ms=500)
        async with Plivo(stream_url(server, "plivo"), pace="fast") as call:
            await call.speak(MULAW[:16000] * 60)
            (stream,) = server.streams.values()
            await until(lambda: stream.session.received_bytes == 960_000)
            bot.go.set()
            await until(lambda: bot.frames and stream.figures().held == 0)
            await call.speak(MULAW[:1600])
            await call.hangup()
            await until(lambda: bot.ended)
    ended = logged(log, "stream_ended")[0]
    assert 961_600 == ended["received_samples"] == ended["forwarded_samples"] + ended["dropped_samples"]
    assert ended["dropped_samples"] > 100_000
    assert ended["forwarded_samples"] == len(bot.audio)
    gap_ms = ended["gap_ms"] + ended["dropped_samples"] / 8
    assert abs(len(bot.audio) / 8 + gap_ms - 20 - int(bot.told("media")[-1]["media"]["timestamp"])) <= 20
    assert [] == call.violations


@pytest.mark.allow_errors("service_lost")
async def test_a_bot_that_takes_nothing_any_more_is_lost(launch: Launch, log: list[Any]) -> None:
    async with Stall() as bot:
        server = await launch(services={"bot": bot.service(replay_ms=300)}, hold_ms=500)
        async with Plivo(stream_url(server, "plivo"), pace="fast") as call:
            await call.speak(MULAW[:16000] * 60)
            await call.wait_closed()
        bot.go.set()
    assert "code 1006" in logged(log, "service_lost")[0]["error"]


@pytest.mark.allow_errors("service_lost")
async def test_what_a_lost_bot_has_said_is_cut_where_that_is_wanted(launch: Launch) -> None:
    async with TwilioBot(echo=False, close_code=1011) as bot:
        services = {"bot": bot.service(on_away="clear"), "echo": {"kind": "echo"}}
        server = await launch(services=services, routes=[{"service": ["bot", "echo"], "on_lost": "next"}])
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("2")
            await call.until(lambda: call.buffered_ms)
            await call.digits("#")
            await call.until(lambda: call.ear.clears)
    assert [] == call.violations


# --- the handshake ---


async def test_the_handshake_is_signed_as_twilio_signs_it(launch: Launch) -> None:
    async with TwilioBot() as bot:
        server = await launch(services={"bot": bot.service(dialect_token=TOKEN, authorization="secret")})
        async with Plivo(stream_url(server, "plivo")):
            await until(lambda: bot.frames)
    url, signature = bot.url.replace("ws:", "wss:"), bot.headers["X-Twilio-Signature"]
    assert RequestValidator(TOKEN).validate(url, {}, signature)
    assert not RequestValidator(TOKEN[::-1]).validate(url, {}, signature)
    assert "Bearer secret" == bot.headers["Authorization"]


async def test_the_handshake_is_signed_as_plivo_signs_it(launch: Launch) -> None:
    async with PlivoBot() as bot:
        server = await launch(services={"bot": bot.service(dialect_token=TOKEN)})
        async with TwilioMedia(stream_url(server, "twilio")):
            await until(lambda: bot.frames)
    url, nonce = bot.url.replace("ws:", "http:"), bot.headers["X-Plivo-Signature-V3-Nonce"]
    for signature in (bot.headers["X-Plivo-Signature-V3"], bot.headers["X-Plivo-Signature-Ma-V3"]):
        assert validate_v3_signature("GET", url, nonce, TOKEN, signature, {})
        assert not validate_v3_signature("GET", url, nonce, TOKEN[::-1], signature, {})


async def test_without_a_token_nothing_is_signed(launch: Launch) -> None:
    async with TwilioBot() as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo")):
            await until(lambda: bot.frames)
    assert "X-Twilio-Signature" not in bot.headers
    assert "Sec-WebSocket-Protocol" not in bot.headers


@pytest.mark.allow_errors("service_lost")
async def test_a_bot_that_selects_what_was_not_offered_is_no_bot_of_this_carrier(launch: Launch, log: list[Any]) -> None:
    async def attend(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        socket.headers["Sec-WebSocket-Protocol"] = "v1.other"
        await socket.prepare(request)
        async for _ in socket:
            pass
        return socket

    app = web.Application()
    app.router.add_get("/", attend)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    server = await launch(services={"bot": {"kind": "websocket", "url": url, "dialect": "twilio_media_streams"}})
    async with Plivo(stream_url(server, "plivo")) as call:
        await call.wait_closed()
    await runner.cleanup()
    assert "selected 'v1.other', which was not offered" in logged(log, "service_lost")[0]["error"]


# --- what a bot gets wrong, and what the call can't do ---

RUBBISH: list[str | bytes] = [
    "",
    "{",
    "[]",
    "null",
    b"\0" * 160,
    '{"event":"media"}',
    '{"event":"explode"}',
    '{"event":"mark","streamSid":"MZelse","mark":{"name":"x"}}',
    '{"event":"clear","streamId":"else"}',
    '{"event":"playAudio","media":{"contentType":"audio/x-l16","sampleRate":44100,"payload":"AAA="}}',
    '{"type":"audio"}',
    "[" * 5000,
]


@pytest.mark.parametrize(("bot_type", "carrier"), [(TwilioBot, Plivo), (PlivoBot, TwilioMedia)])
async def test_rubbish_is_counted_and_does_not_harm_the_call(
    launch: Launch, log: list[Any], bot_type: type[Bot], carrier: Any
) -> None:
    async with bot_type() as bot:
        server = await launch(services={"bot": bot.service()})
        async with carrier(stream_url(server, "plivo" if carrier is Plivo else "twilio")) as call:
            await until(lambda: bot.stream_id)
            for frame in RUBBISH * 10:
                await bot.raw(frame)
            await call.speak(SPEECH[:1600])
            await call.until(lambda: len(played(call)) == 1600)
            before = len(bot.frames)
            await call.hangup()
            await until(lambda: bot.ended)
    assert SPEECH[:1600] == bot.audio == played(call)
    assert before - len(bot.told("media")) == (2 if bot_type is TwilioBot else 1), "no answer to any of it"
    refused = logged(log, "dialect_refusals")[0]["refused"]
    assert len(RUBBISH) * 10 == sum(refused.values())
    assert len(refused) == len(logged(log, "dialect_refused")), "each sort once"
    assert [] == call.violations


async def test_what_the_real_call_can_t_do_is_remarked(launch: Launch, log: list[Any]) -> None:
    async with PlivoBot() as bot:
        server = await launch(services={"bot": bot.service()})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await until(lambda: bot.stream_id)
            await bot.send({"event": "sendDTMF", "dtmf": "12"})
            await call.digits("1")
            await until(lambda: bot.told("playedStream"))
    (remark,) = logged(log, "dialect_refused")
    assert "unsupported_command" == remark["reason"]
    assert "this stream can't carry out '…'; it accepts: audio, checkpoint, clear, stop" == remark["detail"]
    assert [] == call.violations


# --- who ends it ---


@pytest.mark.parametrize("bot_type", [TwilioBot, PlivoBot])
async def test_a_bot_that_closes_ends_the_stream(launch: Launch, log: list[Any], bot_type: type[Bot]) -> None:
    async with bot_type() as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("#")
            await call.wait_closed()
            assert 1000 == call.close_code
    assert "service_stop" == logged(log, "stream_ended")[0]["reason"]
    assert 1 == len(bot.connections)


@pytest.mark.parametrize("code", [1001, 1011, 4009])
@pytest.mark.allow_errors("service_lost")
async def test_a_bot_that_is_lost_is_not_dialled_again(launch: Launch, log: list[Any], code: int) -> None:
    async with TwilioBot(close_code=code) as bot, RecordingService() as next_one:
        services = {"bot": bot.service(), "agent": {"kind": "websocket", "url": next_one.url}}
        server = await launch(services=services, routes=[{"service": ["bot", "agent"]}])
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("#")
            await call.wait_closed()
    assert f"code {code}" in logged(log, "service_lost")[0]["error"]
    assert "service_lost" == logged(log, "stream_ended")[0]["reason"]
    assert 1 == len(bot.connections)
    assert [] == next_one.attempts


@pytest.mark.parametrize("other", ["dialect", "native"])
@pytest.mark.allow_errors("service_lost")
async def test_the_next_of_the_list_takes_over_from_a_bot_that_is_lost(launch: Launch, log: list[Any], other: str) -> None:
    async with TwilioBot(close_code=1011) as bot, PlivoBot() as second, RecordingService() as native:
        services = {
            "bot": bot.service(),
            "dialect": second.service(),
            "native": {"kind": "websocket", "url": native.url, "media_format": {"encoding": "mulaw", "sample_rate": 8000}},
        }
        server = await launch(services=services, routes=[{"service": ["bot", other], "on_lost": "next"}])
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.digits("#")
            if other == "native":
                link = await native.connected()
                await call.speak(SPEECH[:1600])
                await call.hangup()
                await link.wait_for("stop")
                assert SPEECH[:1600] == link.audio
            else:
                await until(lambda: second.stream_id)
                await call.speak(SPEECH[:1600])
                await call.until(lambda: len(played(call)) == 1600)
                await call.hangup()
                await until(lambda: second.ended)
                assert SPEECH[:1600] == second.audio
    assert 1 == len(bot.connections)
    ended = logged(log, "stream_ended")[0]
    assert ended["received_samples"] == ended["forwarded_samples"] + ended["dropped_samples"]


async def test_a_bot_that_is_busy_at_the_start_is_tried_again_and_hears_the_first_words(launch: Launch) -> None:
    async with TwilioBot(refuse=3) as bot:
        server = await launch(services={"bot": bot.service()})
        async with Plivo(stream_url(server, "plivo")) as call:
            await call.speak(SPEECH)
            await call.until(lambda: len(played(call)) == len(SPEECH))
    assert SPEECH == bot.audio == played(call)
    assert 1 == len(bot.connections)


@pytest.mark.allow_errors("service_lost")
async def test_nobody_there(launch: Launch, log: list[Any]) -> None:
    nobody = {"kind": "websocket", "url": "ws://127.0.0.1:9/", "dialect": "twilio_media_streams", "give_up_secs": 0.3}
    server = await launch(services={"bot": nobody})
    async with Plivo(stream_url(server, "plivo")) as call:
        await call.wait_closed()
    assert "127.0.0.1:9" in logged(log, "service_lost")[0]["error"]


# --- listeners ---


async def test_a_bot_that_only_listens_hears_all_and_says_nothing(launch: Launch, log: list[Any]) -> None:
    async with TwilioBot() as bot:
        services = {"echo": {"kind": "echo"}, "bot": bot.service()}
        server = await launch(services=services, routes=[{"service": "echo", "listeners": ["bot"]}])
        async with Plivo(stream_url(server, "plivo")) as call:
            await until(lambda: bot.stream_id)
            await call.speak(SPEECH[:3200])
            await call.until(lambda: len(played(call)) == 3200)
            await call.hangup()
            await until(lambda: bot.ended)
    assert SPEECH[:3200] == bot.audio == played(call)
    assert {"not_speaker"} == {entry["reason"] for entry in logged(log, "dialect_refused")}
    assert [] == call.violations


# --- words ---


class RelayBot:
    """Written for ConversationRelay."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.ended: list[int | None] = []

    async def attend(self, socket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for text in socket:
                frame = json.loads(text)
                self.frames.append(frame)
                if frame["type"] == "prompt" and "bye" in frame["voicePrompt"]:
                    await socket.send(json.dumps({"type": "end", "handoffData": "{}"}))
                elif frame["type"] == "prompt":
                    await socket.send('{"type":"txt"}')
                    await socket.send(json.dumps({"type": "text", "token": f"You said {frame['voicePrompt']}", "last": True}))
        self.ended.append(socket.close_code)


async def test_a_relay_bot_on_a_call_of_words(launch: Launch) -> None:
    bot = RelayBot()
    async with serve(bot.attend, "127.0.0.1", 0) as listener:
        url = f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        server = await launch(services={"bot": {"kind": "websocket", "url": url, "dialect": "twilio_conversation_relay"}})
        async with ConversationRelay(stream_url(server, "relay"), characters_per_second=200) as call:
            await call.says("Hello")
            await call.spoken_out()
            await call.says("bye")
            await call.wait_closed()
        await until(lambda: bot.ended)
    assert "setup" == bot.frames[0]["type"]
    assert "You said Hello" in call.spoken
    (error,) = [frame for frame in bot.frames if frame["type"] == "error"]
    assert error["description"].startswith("Invalid message received, code: 64107"), "the one carrier that answers"
    assert [1000] == bot.ended
    assert [] == call.violations


@pytest.mark.parametrize(
    ("dialect", "carrier"), [("twilio_conversation_relay", Plivo), ("twilio_media_streams", ConversationRelay)]
)
@pytest.mark.allow_errors("service_lost")
async def test_words_and_audio_don_t_go_together(launch: Launch, log: list[Any], dialect: str, carrier: Any) -> None:
    async with TwilioBot() as bot:
        server = await launch(services={"bot": bot.service(dialect=dialect)})
        async with carrier(stream_url(server, "plivo" if carrier is Plivo else "relay")) as call:
            await call.wait_closed()
    assert f"bot speaks {dialect}, which carries" in logged(log, "service_lost")[0]["error"]
    assert [] == bot.connections


# --- pipecat: its messages by hand, from frames.proto ---


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(message: bytes) -> dict[int, Any]:
    """What a message of numbers and bytes holds."""
    found: dict[int, Any] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        found[key >> 3] = number()
        if key & 7 == 2:
            size = found[key >> 3]
            found[key >> 3] = message[at : at + size]
            at += size
    return found


class PipecatBot:
    """Says on its first audio 500 ms at 24 kHz, between captions and messages; `interrupt` is its barge-in."""

    def __init__(self) -> None:
        self.heard: list[dict[int, Any]] = []
        self.ended: list[int | None] = []
        self.socket: ServerConnection

    async def attend(self, socket: ServerConnection) -> None:
        self.socket = socket
        with suppress(ConnectionClosed):
            async for message in socket:
                assert isinstance(message, bytes)
                ((kind, body),) = fields(message).items()
                assert 2 == kind
                self.heard.append(fields(body))
                if len(self.heard) == 1:
                    await self.speak(500)
        self.ended.append(socket.close_code)

    async def speak(self, ms: int) -> None:
        await self.socket.send(field(1, field(1, 77) + field(2, b"TextFrame#1") + field(3, b"Hello")))
        for _ in range(ms // 20):
            audio = field(1, 78) + field(2, b"AudioRawFrame") + field(3, b"\x10\x20" * 480) + field(4, 24000) + field(5, 1)
            await self.socket.send(field(2, audio + field(6, 123456789)))
        await self.socket.send(field(4, field(1, b'{"label":"rtvi-ai"}')))

    async def interrupt(self) -> None:
        await self.socket.send(field(5, field(1, 79) + field(2, b"InterruptionFrame#1")))


async def test_a_pipecat_bot_connects_as_it_is(launch: Launch, log: list[Any]) -> None:
    bot = PipecatBot()
    async with serve(bot.attend, "127.0.0.1", 0) as listener:
        url = f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        server = await launch(services={"bot": {"kind": "websocket", "url": url, "dialect": "pipecat"}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await call.speak(SPEECH[:1600])
            await call.until(lambda: len(played(call)) >= 3980)
            for rubbish in (
                "text",
                b"",
                b"\xff\xff",
                field(2, field(4, 7) + field(5, 1)),
                field(2, field(4, 8000) + field(5, 2)),
            ):
                await bot.socket.send(rubbish)
            await bot.speak(5000)
            await call.until(lambda: len(call.ear.stretches) > 40)
            await bot.interrupt()
            await call.until(lambda: call.ear.clears)
            await call.digits("1")
            await call.hangup()
            await until(lambda: bot.ended)
    assert {(16000, 1)} == {(frame[4], frame[5]) for frame in bot.heard}
    assert 6400 <= sum(len(frame[3]) for frame in bot.heard) <= 6600
    assert {640} == {len(frame[3]) for frame in bot.heard[:-1]}
    assert len(played(call)) < 30_000
    assert [1000] == bot.ended
    refused = logged(log, "dialect_refusals")[0]["refused"]
    assert {"text_message": 1, "empty_frame": 1, "bad_protobuf": 1, "unsupported_format": 2} == refused
    assert [] == call.violations


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    dialect_pipecat.frame_class.cache_clear()
    monkeypatch.setattr(dialect_pipecat, "import_module", missing)
    with pytest.raises(ConfigError, match=r"can't be spoken: 'pipecat'; it needs .*telephony-audio-gateway\[pipecat\]"):
        config.parse(FILE % "dialect: pipecat")


# --- the configuration ---

FILE = """
services:
  bot: {kind: websocket, url: "ws://127.0.0.1:1", %s}
providers: {p: {kind: plivo_audio_streaming, auth: none}}
routes: [{service: bot}]
"""


def test_a_dialect_has_the_carriers_format_unless_another_one_is_given() -> None:
    bot = config.parse(FILE % "dialect: twilio_media_streams, dialect_token: '0123'").services["bot"]
    assert isinstance(bot, WebsocketService)
    assert MULAW_8K == bot.media_format
    assert "0123" not in repr(bot)
    given = "dialect: plivo_audio_streaming, media_format: {encoding: pcm_s16le, sample_rate: 16000}"
    bot = config.parse(FILE % given).services["bot"]
    assert isinstance(bot, WebsocketService)
    assert MediaFormat(Encoding.PCM_S16LE, 16000) == bot.media_format


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("dialect: twilio_media_stream", "unknown dialect: 'twilio_media_stream'; did you mean twilio_media_streams?"),
        ("dialect: no.such.module", "can't be spoken"),
        ("dialect_token: abc", "has no effect without `dialect`"),
        (
            "dialect: twilio_media_streams, media_format: {encoding: alaw, sample_rate: 8000}",
            "Twilio Media Streams carries mulaw/8000, not alaw/8000; leave it out for the dialect's own",
        ),
        ("dialect: pipecat, dialect_token: abc", "pipecat knows no signatures; write `authorization`"),
        (
            "dialect: pipecat, media_format: {encoding: mulaw, sample_rate: 8000}",
            "pipecat carries pcm_s16le at any rate, not mulaw/8000; leave it out for the dialect's own",
        ),
        ("dialect: plivo_audio_streaming, dialect_token: ' x'", "begins or ends with white space"),
    ],
)
def test_a_dialect_that_can_t_be_spoken_is_told(options: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(FILE % options, source="f")
    assert sentence in str(error.value)
    assert str(error.value).startswith("f:3:")


# --- one carrier's call, told as another's ---


def test_ids_keep_their_digits() -> None:
    digits = "0123456789abcdef0123456789abcdef"
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    assert f"CA{digits}" == likened(uuid, "CA")
    assert uuid == likened(f"MZ{digits}", None)
    assert uuid == likened(uuid, None)
    foreign = likened("MAXXXXXXXXXXXXXXXXXX", "AC")
    assert foreign == likened("MAXXXXXXXXXXXXXXXXXX", "AC") != likened("MAYYYYYYYYYYYYYYYYYY", "AC")
    assert 34 == len(foreign)


def test_a_start_says_what_the_bot_will_hear() -> None:
    service = WebsocketService("ws://x", media_format=MULAW_8K, track=Track.OUTBOUND)
    start = Start("s", "c", "a", media_format=MediaFormat(Encoding.PCM_S16LE, 16000), parameters={"k": "v"})
    told = translated(start, Habits(), service, same=False)
    assert (MULAW_8K, (Track.OUTBOUND,), {"k": "v"}, "a") == (told.media_format, told.tracks, told.parameters, told.account_id)
    own = translated(start, Habits(), service, same=True)
    assert ("s", "c") == (own.stream_id, own.call_id)


def test_a_process_without_dialects_says_so() -> None:
    with pytest.raises(LookupError, match="acme"):
        no_dialects("acme", None)


def test_a_remark_quotes_no_digits() -> None:
    assert "digits '…' of '…'" == masked(detail(MalformedFrame("x", "digits '1234' of 'y'")))
