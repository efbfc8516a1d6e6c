"""The doubles themselves: a good peer passes, each kind of mistake is caught. Nothing of the gateway takes part."""

import ast
import asyncio
import base64
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tests.doubles import (
    ABSENT,
    EXTRA_HEADERS_FORMS,
    FRAMED,
    RAW,
    ConversationRelay,
    EchoService20,
    Plivo,
    RecordingService,
    Refused,
    TwilioMedia,
    scripted,
)
from tests.doubles.audio import Ear
from tests.doubles.plivo import SUBPROTOCOL, signature_v3
from tests.doubles.twilio_media import signature
from tests.doubles.wire import NotJson, parse, standard_base64

Handler = Callable[[ServerConnection], Awaitable[None]]
SPEECH = bytes(Random(7).randrange(0, 0x70) for _ in range(160 * 10))


@asynccontextmanager
async def gateway(handler: Handler, **options: Any) -> AsyncIterator[str]:
    """A WebSocket server that does what the test says, and lets no mistake of its own pass."""
    errors: list[Exception] = []

    async def run(ws: ServerConnection) -> None:
        try:
            await handler(ws)
        except ConnectionClosed:
            pass
        except Exception as error:  # noqa: BLE001, RUF100
            errors.append(error)

    async with serve(run, "127.0.0.1", 0, compression=None, ping_interval=None, close_timeout=1, **options) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/x?a=1"
    if errors:
        raise errors[0]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def nothing(ws: ServerConnection) -> None:
    async for _ in ws:
        pass


# Parts.


@pytest.mark.parametrize("text", ["", "nul", "[]", "3", '{"a":1,"a":2}', '{"a":NaN}', "{'a':1}", '{"a":1} x'])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(NotJson):
        parse(text)


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("AAA=", b"\0\0"),
        ("", b""),
        ("AAA", None),
        ("_-8=", None),
        ("AAB=", None),
        ("AA A", None),
        ("AAA=\n", None),
        ("=AAA", None),
    ],
)
def test_base64_is_standard_padded_and_canonical(text: str, data: bytes | None) -> None:
    assert data == standard_base64(text)


def test_the_ear_plays_back_to_back_and_fills_underrun() -> None:
    ear = Ear(8, b"\xff", 1)
    ear.play(b"a" * 160, 10.0)
    ear.play(b"b" * 160, 10.001)
    assert ear.heard(10.03) == b"a" * 160 + b"b" * 80
    ear.play(b"c" * 80, 10.05)
    assert ear.heard(11) == b"a" * 160 + b"b" * 160 + b"\xff" * 80 + b"c" * 80
    assert [(round(at, 6), round(ms, 6)) for at, ms in ear.underruns()] == [(0.04, 10.0)]
    assert pytest.approx(39.0) == ear.max_buffered_ms


def test_the_ear_cuts_at_clear() -> None:
    ear = Ear(32, b"\0\0", 2)
    ear.mark("at once", 1.0)
    ear.play(b"ab" * 3200, 1.0)
    ear.mark("end", 1.0)
    ear.mark("end", 1.0)
    cleared = ear.clear(1.05)
    assert (["end", "end"], pytest.approx(150.0)) == (cleared.marks, cleared.buffered_ms)
    assert ear.heard(9) == b"ab" * 800
    assert [mark.outcome for mark in ear.marks] == ["empty", "cleared", "cleared"]
    assert pytest.approx(0, abs=1e-6) == ear.quiet_after(1.05)
    ear.play(b"ab" * 320, 1.06)
    assert pytest.approx(30) == ear.quiet_after(1.05)
    ear.play(b"\0\0" * 3200, 1.07)
    assert pytest.approx(30) == ear.quiet_after(1.05)
    assert ear.underruns() == []


def test_twilio_signs_as_its_published_vector() -> None:
    form = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    assert signature("12345", "https://mycompany.com/myapp.php?foo=1&bar=2", form) == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


def test_plivo_signs_as_its_own_library() -> None:
    from plivo.utils.signature_v3 import validate_v3_signature

    url, nonce = "http://voice.example.com/plivo/stream?t=b&a=1", "05429567804466091622"
    assert validate_v3_signature("GET", url, nonce, "secret", signature_v3("secret", url, nonce))


def test_the_doubles_stand_alone() -> None:
    allowed = {"websockets"} | set(sys.stdlib_module_names)
    for file in (Path(__file__).parent / "doubles").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, file


# Twilio Media Streams.


async def echo_media(ws: ServerConnection) -> None:
    """A gateway that makes no mistake: echoes the caller and marks the end of every five chunks."""
    sid, n = "", 0
    async for text in ws:
        frame = json.loads(text)
        if frame["event"] == "start":
            sid = frame["start"]["streamSid"]
        elif frame["event"] == "media":
            n += 1
            await ws.send(json.dumps({"event": "media", "streamSid": sid, "media": {"payload": frame["media"]["payload"]}}))
            if n % 5 == 0:
                await ws.send(json.dumps({"event": "mark", "streamSid": sid, "mark": {"name": f"m{n}"}}))


async def test_twilio_hears_a_good_gateway_without_violations() -> None:
    async with gateway(echo_media) as url, TwilioMedia(url, audio=SPEECH) as call:
        await call.until(lambda: len(call.marks) == 2)
        await call.played_out()
        assert call.violations == []
        assert call.played == SPEECH
        assert len(call.heard) - len(SPEECH) < 160
        assert call.marks == ["m5", "m10"]
        assert {"played"} == {outcome for _, _, outcome in call.mark_log}
        assert 0 < call.max_buffered_ms < 100
    assert call.close_code == 1000


async def test_twilio_speaks_the_page() -> None:
    frames: list[dict[str, Any]] = []
    head: dict[str, str] = {}

    async def record(ws: ServerConnection) -> None:
        assert ws.request
        head.update((name.lower(), value) for name, value in ws.request.headers.raw_items())
        with suppress(ConnectionClosed):
            async for text in ws:
                frames.append(json.loads(text))
                if frames[-1]["event"] == "dtmf":
                    sid = frames[-1]["streamSid"]
                    await ws.send(json.dumps({"event": "mark", "streamSid": sid, "mark": {"name": "k"}}))

    async with gateway(record) as url:
        async with TwilioMedia(url, parameters={"token": "k3"}, auth_token="s3") as call:
            await call.speak(SPEECH, pace="fast")
            await call.gap(500, pace="fast")
            await call.speak(b"a", pace="fast")
            await call.digits("1#")
            await call.until(lambda: call.marks == ["k", "k"])
        assert {("empty")} == {outcome for _, _, outcome in call.mark_log}
    events = [frame["event"] for frame in frames]
    assert events[:2] == ["connected", "start"]
    assert Counter(connected=1, start=1, media=11, dtmf=2, mark=2, stop=1) == Counter(events)
    assert events[-1] == "stop"
    assert frames[0] == {"event": "connected", "protocol": "Call", "version": "1.0.0"}
    assert [str(n) for n in range(1, len(frames))] == [frame["sequenceNumber"] for frame in frames[1:]]
    assert frames[1]["start"]["customParameters"] == {"token": "k3"}
    media = [frame["media"] for frame in frames if frame["event"] == "media"]
    assert [str(n) for n in range(1, 12)] == [m["chunk"] for m in media]
    stamps = [int(m["timestamp"]) for m in media]
    assert stamps[0] > 0
    assert [b - a for a, b in pairwise(stamps)] == [20] * 9 + [520]
    assert base64.b64decode(media[-1]["payload"]) == b"a" + b"\xff" * 159
    assert next(f["dtmf"] for f in frames if f["event"] == "dtmf") == {"track": "inbound_track", "digit": "1"}
    assert head["user-agent"] == "Twilio.TmeWs/1.0"
    assert head["x-twilio-signature"] == signature("s3", url.replace("ws:", "wss:"))
    assert not {"origin", "sec-websocket-protocol", "sec-websocket-extensions"} & head.keys()


async def test_real_time_is_an_absolute_schedule() -> None:
    async with gateway(nothing) as url, TwilioMedia(url) as call:
        begin = call.now()
        for _ in range(5):
            await call.speak(SPEECH[:320])
        assert 0.17 < call.now() - begin < 0.26


async def test_two_tracks_and_both_counters() -> None:
    seen: list[dict[str, Any]] = []

    async def record(ws: ServerConnection) -> None:
        async for text in ws:
            seen.append(json.loads(text))

    options: dict[str, Any] = {"bidirectional": False, "tracks": ("inbound", "outbound"), "number_counters": True, "pace": "fast"}
    async with gateway(record) as url, TwilioMedia(url, **options) as call:
        await call.speak({"inbound": SPEECH, "outbound": SPEECH[:320]})
    media = [f["media"] for f in seen if f["event"] == "media"]
    assert Counter(m["track"] for m in media) == {"inbound": 10, "outbound": 10}
    assert list(range(1, 21)) == [m["chunk"] for m in media]


M = "MZ" + "0" * 32


def media(payload: Any, **more: Any) -> dict[str, Any]:
    return {"event": "media", "streamSid": M, "media": {"payload": payload}, **more}


TWILIO_WRONG: list[tuple[Any, str]] = [
    (b"\0\1", "31950 binary frame"),
    ("{", "31951 not JSON"),
    ("[]", "31951 not a JSON object"),
    ({"streamSid": M}, "31951 no event"),
    ({"event": "playAudio"}, "31951 unknown event 'playAudio'"),
    ({"event": "Media", "streamSid": M}, "31951 unknown event 'Media'"),
    (media("AAA=", sequenceNumber="1"), "31951 media: unexpected member 'sequenceNumber'"),
    ({"event": "media", "media": {"payload": "AAA="}}, "31951 media: member 'streamSid' is missing"),
    ({"event": "media", "streamSid": M, "media": {"playload": "AAA="}}, "31951 media.media: unexpected member 'playload'"),
    ({"event": "media", "streamSid": M, "media": {}}, "31951 media.media: member 'payload' is missing"),
    ({"event": "media", "streamSid": M, "media": "AAA="}, "31951 media.media: not a object"),
    (media(None), "31951 media.media.payload: not a string"),
    (media(""), "31951 media.payload: empty"),
    (media("_-8="), "31951 media.payload: not standard base64"),
    (media("AAA"), "31951 media.payload: not standard base64"),
    (media(b64(b"RIFF....WAVE")), "31951 media.payload: starts with a file header"),
    (media("AAA=") | {"streamSid": "MZ" + "1" * 32}, "31951 media: streamSid of another stream"),
    ({"event": "mark", "streamSid": M, "name": "a"}, "31951 mark: unexpected member 'name'"),
    ({"event": "mark", "streamSid": M, "mark": {"name": 1}}, "31951 mark.mark.name: not a string"),
    ({"event": "mark", "streamSid": M}, "31951 mark: member 'mark' is missing"),
    ({"event": "clear", "streamSid": M, "clear": {}}, "31951 clear: unexpected member 'clear'"),
    ({"event": "clear"}, "31951 clear: member 'streamSid' is missing"),
]


async def test_twilio_names_every_mistake_once_and_plays_on() -> None:
    async def wrong(ws: ServerConnection) -> None:
        await ws.recv()
        await ws.recv()
        for frame, _ in TWILIO_WRONG * 2:
            await ws.send(json.dumps(frame) if isinstance(frame, dict) else frame)
        await ws.send(json.dumps(media(b64(SPEECH[:160]))))
        await nothing(ws)

    async with gateway(wrong) as url, TwilioMedia(url, stream_sid=M) as call:
        await call.played_out()
        assert call.heard == SPEECH[:160]
        kinds = Counter(kind for _, kind in TWILIO_WRONG)
        assert [f"{kind} (x{2 * n})" for kind, n in kinds.items()] == call.violations
        assert "playload" in call.ledger.samples["31951 media.media: unexpected member 'playload'"]


async def test_twilio_notices_words_before_start() -> None:
    async def hasty(ws: ServerConnection) -> None:
        await ws.send(json.dumps(media("AAA=")))
        await nothing(ws)

    async with gateway(hasty) as url, TwilioMedia(url, stream_sid=M, start_delay=0.1) as call:
        assert call.violations == ["31951 sent before start"]
        assert call.heard == b""


async def test_a_unidirectional_stream_bears_no_word() -> None:
    async def talk(ws: ServerConnection) -> None:
        for frame in (json.dumps(media("AAA=")), b"x", "rubbish"):
            await ws.send(frame)
        await nothing(ws)

    async with gateway(talk) as url, TwilioMedia(url, stream_sid=M, bidirectional=False) as call:
        await call.until(lambda: len(call.received) == 3)
        assert call.violations == ["31924 message on a unidirectional stream (x3)"]


async def test_broken_framing_and_broken_utf8_are_31924() -> None:
    async def broken(ws: ServerConnection) -> None:
        await ws.recv()
        await ws.send(b'{"event":"\xff"}', text=True)
        await nothing(ws)

    async def unmasked(ws: ServerConnection) -> None:
        await ws.recv()
        ws.transport.write(b"\xf1\x00")
        await nothing(ws)

    for handler, code in ((broken, 1007), (unmasked, 1002)):
        async with gateway(handler) as url, TwilioMedia(url) as call:
            await call.wait_closed()
        assert [v.startswith(f"31924 protocol error: {code}") for v in call.violations] == [True], call.violations


async def test_twilio_clear_drops_audio_and_echoes_the_rest_in_order() -> None:
    back: list[str] = []

    async def clears(ws: ServerConnection) -> None:
        async def say(**frame: Any) -> None:
            await ws.send(json.dumps(frame | {"streamSid": M}))

        await ws.recv()
        await ws.recv()
        await say(event="mark", mark={"name": "empty"})
        for name in ("a", "b", "b"):
            await say(event="media", media={"payload": b64(b"\0" * 8000)})
            await say(event="mark", mark={"name": name})
        await asyncio.sleep(0.1)
        await say(event="clear")
        await say(event="media", media={"payload": b64(b"\1" * 160)})
        await say(event="mark", mark={"name": "new"})
        async for text in ws:
            frame = json.loads(text)
            if frame["event"] == "mark":
                back.append(frame["mark"]["name"])

    async with gateway(clears) as url, TwilioMedia(url, stream_sid=M) as call:
        await call.until(lambda: len(call.marks) == 5)
        await call.played_out()
        assert call.marks == ["empty", "a", "b", "b", "new"]
        assert [outcome for _, _, outcome in call.mark_log] == ["empty", "cleared", "cleared", "cleared", "played"]
        assert 800 - 80 <= call.heard.count(0) <= 800 + 400
        assert call.heard[-160:] == b"\1" * 160
        assert 2900 < call.max_buffered_ms <= 3000
        assert [pytest.approx(20, abs=15)] == call.clear_to_silence_ms
        assert call.violations == []
    assert call.marks == back


async def test_shuffle_is_the_same_call_in_other_words() -> None:
    async def run() -> list[str]:
        seen: list[str] = []

        async def record(ws: ServerConnection) -> None:
            async for text in ws:
                assert isinstance(text, str)
                seen.append(text)

        async with gateway(record) as url, TwilioMedia(url, shuffle=True, seed=3, parameters={"a": "1"}) as call:
            await call.speak(SPEECH * 5, pace="fast")
            await call.digits("123")
        return seen

    first, second = await run(), await run()
    assert first == second
    frames = [json.loads(text) for text in first]
    assert b"".join(base64.b64decode(f["media"]["payload"]) for f in frames if f["event"] == "media") == SPEECH * 5
    assert next(f["start"]["customParameters"] for f in frames if f["event"] == "start") == {"a": "1"}
    assert any(f["event"] not in ("connected", "start", "media", "dtmf", "stop") for f in frames)
    assert any("xFuture" in name for f in frames for name in f)
    assert any(next(iter(f)) != "event" for f in frames)


async def test_rubbish_drop_and_the_gateways_own_close() -> None:
    seen: list[Any] = []
    codes: list[int | None] = []

    async def record(ws: ServerConnection) -> None:
        try:
            async for frame in ws:
                seen.append(frame)
        except ConnectionClosed:
            pass
        codes.append(ws.close_code)

    async with gateway(record) as url:
        async with TwilioMedia(url) as call:
            await call.raw("}{")
            await call.raw(b"\0")
            await call.raw(['{"ev', 'ent":"x"}'])
            call.drop()
            assert await call.wait_closed() == 1006
            assert await call.speak(SPEECH) == 0
        assert seen[2:] == ["}{", b"\0", '{"event":"x"}']
        assert codes == [1006]

    async def closes(ws: ServerConnection) -> None:
        await ws.close(1008, "no")

    async with gateway(closes) as url, TwilioMedia(url, audio=SPEECH) as call:
        assert (await call.wait_closed(), call.close_reason) == (1008, "no")
        assert call.violations == []


async def test_a_refused_handshake_tells_number_and_status() -> None:
    def forbid(ws: ServerConnection, request: Any) -> Any:
        return ws.respond(HTTPStatus.FORBIDDEN, "bad signature")

    def redirect(ws: ServerConnection, request: Any) -> Any:
        response = ws.respond(HTTPStatus.FOUND, "")
        response.headers["Location"] = "/elsewhere"
        return response

    def unasked(ws: ServerConnection, request: Any, response: Any) -> Any:
        response.headers["Sec-WebSocket-Protocol"] = "chat"
        return response

    for options, status in (
        ({"process_request": forbid}, 403),
        ({"process_request": redirect}, 302),
        ({"process_response": unasked}, None),
    ):
        async with gateway(nothing, **options) as url:
            with pytest.raises(Refused) as refused:
                await TwilioMedia(url).__aenter__()
            assert ("31920", status) == (refused.value.code, refused.value.status)
    with pytest.raises(Refused):
        await ConversationRelay("ws://127.0.0.1:9/").__aenter__()


async def test_a_gateway_that_does_not_read_overflows_twilio() -> None:
    async def deaf(ws: ServerConnection) -> None:
        ws.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.3)

    async with gateway(deaf) as url, TwilioMedia(url) as call:
        call.ws.transport.write(bytes(8_000_000))
        await call._offer("inbound", b"\xff" * 160, wait=False)
        assert call.violations == ["31930: the gateway does not read"]
        call.drop()


async def test_a_failing_test_shows_its_own_error() -> None:
    async with gateway(nothing) as url:
        with pytest.raises(AssertionError, match="mine"):
            async with TwilioMedia(url, audio=SPEECH):
                raise AssertionError("mine")
        with pytest.raises(AssertionError, match=r"not in 0\.05 s"):
            async with TwilioMedia(url) as call:
                await call.until(lambda: False, 0.05)


async def test_a_silent_line_still_carries_silence() -> None:
    seen: list[bytes] = []

    async def record(ws: ServerConnection) -> None:
        async for text in ws:
            frame = json.loads(text)
            if frame["event"] == "media":
                seen.append(base64.b64decode(frame["media"]["payload"]))

    async with gateway(record) as url, TwilioMedia(url, line_silence=True) as call:
        await asyncio.sleep(0.1)
        await call.speak(SPEECH[:320])
        await asyncio.sleep(0.1)
    line = b"".join(seen)
    assert SPEECH[:320] in line
    assert line.startswith(b"\xff" * 320)
    assert line.endswith(b"\xff" * 320)


# ConversationRelay.


def relay(*frames: Any, then: Handler = nothing) -> Handler:
    async def run(ws: ServerConnection) -> None:
        await ws.recv()
        for frame in frames:
            if isinstance(frame, float):
                await asyncio.sleep(frame)
            else:
                await ws.send(json.dumps(frame) if isinstance(frame, dict) else frame)
        await then(ws)

    return run


def recorder(seen: list[dict[str, Any]]) -> Handler:
    async def run(ws: ServerConnection) -> None:
        async for text in ws:
            seen.append(json.loads(text))

    return run


def text(token: str, last: bool = False, **more: Any) -> dict[str, Any]:
    return {"type": "text", "token": token, "last": last, **more}


def told(seen: list[dict[str, Any]], name: str) -> list[str]:
    return [frame["value"] for frame in seen if frame.get("name") == name]


async def test_relay_speaks_in_its_own_pieces() -> None:
    seen: list[dict[str, Any]] = []
    words = [text("I"), text(" heard:"), text(" Holding"), text("."), text("", True)]
    async with gateway(relay(*words, then=recorder(seen))) as url, ConversationRelay(url) as call:
        await call.spoken_out()
    assert told(seen, "tokensPlayed") == ["I heard:", " Holding."]
    assert "I heard: Holding." == call.spoken == "".join(call.tokens)
    assert told(seen, "agentSpeaking") == ["on", "off"]
    assert call.violations == []


async def test_relay_setup_is_the_pages() -> None:
    heads: list[dict[str, str]] = []
    seen: list[dict[str, Any]] = []

    async def record(ws: ServerConnection) -> None:
        assert ws.request
        heads.append({name.lower(): value for name, value in ws.request.headers.raw_items()})
        await recorder(seen)(ws)

    async with gateway(record) as url:
        async with ConversationRelay(url, parameters={"token": "k3"}) as call:
            await call.says("Where is my order?", partials=["where is", "where is my"])
            await call.digits("*")
            await call.error("Something")
            await call.info("roundTripDelayMs", "131")
        assert (call.ws.close_code, call.session_status) == (1000, "completed")
    setup = seen[0]
    assert (setup["type"], setup["callStatus"], setup["customParameters"]) == ("setup", "RINGING", {"token": "k3"})
    names = "type sessionId callSid parentCallSid from to forwardedFrom callerName direction callType callStatus"
    assert [*names.split(), "accountSid", "customParameters"] == list(setup)
    prompts = [(f["voicePrompt"], f["last"]) for f in seen if f["type"] == "prompt"]
    assert prompts == [("where is", False), ("where is my", False), ("Where is my order?", True)]
    assert told(seen, "clientSpeaking") == ["on", "off"]
    assert {"type": "dtmf", "digit": "*"} in seen
    assert {"type": "error", "description": "Something"} in seen
    assert (heads[0]["user-agent"], heads[0]["pragma"]) == ("Jetty/11.0.24", "no-cache")
    assert heads[0]["x-twilio-signature"] == heads[0]["x-amzn-bedrock-agentcore-runtime-custom-twilio-signature"]


async def test_relay_barge_in_comes_in_the_recorded_order() -> None:
    seen: list[dict[str, Any]] = []
    script = (text("Sentence one is spoken. Sentence two is never heard by anyone at all.", True),)
    async with (
        gateway(relay(*script, then=recorder(seen))) as url,
        ConversationRelay(url, characters_per_second=100) as call,
    ):
        await call.until(lambda: len(call.spoken_pieces) == 1)
        await asyncio.sleep(0.15)
        await call.says("Stop it", partials=["stop"])
        await asyncio.sleep(0.05)
    order = [frame.get("name", frame["type"]) for frame in seen]
    expected = ["clientSpeaking", "tokensPlayed", "interrupt", "prompt", "agentSpeaking", "clientSpeaking", "prompt"]
    assert expected == order[order.index("clientSpeaking") :]
    [(fragment, milliseconds)] = call.interrupts
    assert " Sentence two is never".startswith(fragment)
    assert fragment.endswith(("two", "is", "never"))
    assert 120 <= milliseconds < 400
    assert "Sentence one is spoken." + fragment == call.spoken


async def test_relay_digit_comes_before_its_interrupt_and_the_reply_is_kept() -> None:
    seen: list[dict[str, Any]] = []

    async def answer(ws: ServerConnection) -> None:
        await ws.recv()
        await ws.send(json.dumps(text("A long announcement that nobody will ever hear the end of", True)))
        async for line in ws:
            seen.append(json.loads(line))
            if seen[-1]["type"] == "dtmf":
                await ws.send(json.dumps(text("You pressed one.", True)))

    async with gateway(answer) as url, ConversationRelay(url, characters_per_second=100, dtmf_window=0.05) as call:
        await call.until(lambda: call.agent_speaking)
        await asyncio.sleep(0.1)
        await call.digits("1")
        await call.spoken_out()
        assert call.spoken.endswith("You pressed one.")
        assert "end of" not in call.spoken
    order = [frame.get("name", frame["type"]) for frame in seen]
    assert order[order.index("dtmf") :][:4] == ["dtmf", "tokensPlayed", "interrupt", "agentSpeaking"]


async def test_relay_keeps_quiet_what_the_settings_hide() -> None:
    script = (text("You cannot interrupt this sentence.", True, interruptible=False),)
    async with gateway(relay(*script)) as url, ConversationRelay(url, dtmf_detection=False, characters_per_second=50) as call:
        await call.until(lambda: call.agent_speaking)
        assert not await call.says("But I want to")
        assert not await call.digits("5")
        assert call.unreported == ["But I want to", "5"]
        await call.spoken_out()
        assert call.spoken == "You cannot interrupt this sentence."
        assert call.interrupts == []


async def test_relay_preempts_plays_dials_and_switches() -> None:
    script = (
        text("Please hold the line for quite some time", True, preemptible=True),
        0.15,
        text("Done.", True),
        {"type": "play", "source": "https://media.example.com/hold.mp3", "loop": 2},
        {"type": "sendDigits", "digits": "1w#"},
        {"type": "language", "ttsLanguage": "de-DE"},
    )
    seen: list[dict[str, Any]] = []
    options: dict[str, Any] = {"characters_per_second": 100, "play_seconds": 0.02, "seed": 5, "shuffle": True}
    async with gateway(relay(*script, then=recorder(seen))) as url, ConversationRelay(url, **options) as call:
        await call.until(lambda: call.dtmf)
        await call.spoken_out()
        assert call.plays == [("https://media.example.com/hold.mp3", 2)]
        assert (call.dtmf, call.languages) == (["1w#"], [{"ttsLanguage": "de-DE"}])
        assert call.spoken.startswith("Please")
        assert call.spoken.endswith("Done.")
        assert "time" not in call.spoken
        assert (call.interrupts, call.violations) == ([], [])
    assert "1w#" in told(seen, "tokensPlayed")


async def test_relay_end_closes_in_90_ms_with_the_handoff() -> None:
    script = (text("Goodbye, and thank you for the call.", True), 0.05, {"type": "end", "handoffData": '{"to":"agent"}'})
    async with gateway(relay(*script)) as url, ConversationRelay(url, welcome_greeting="Hi.", characters_per_second=50) as call:
        await call.until(lambda: call.ended)
        begin = call.now()
        await call.wait_closed()
        assert 0.08 < call.now() - begin < 0.3
        assert (call.handoff, call.session_status) == ('{"to":"agent"}', "ended")
        assert call.cut_by_end.endswith("thank you for the call.")
        assert call.violations == []


RELAY_WRONG: list[tuple[Any, str]] = [
    ({"type": "txt"}, "64107 unknown type 'txt'"),
    ({"event": "media"}, "64107 no type"),
    ("hello", "64107 not JSON"),
    (b"\0", "64107 a binary frame"),
    ({"type": "text"}, "64107 text: member 'token' is missing"),
    (text("a") | {"token": None}, "64107 text.token: not a string"),
    (text("a") | {"last": "true"}, "64107 text.last: not a boolean"),
    (text("a", interruptible="any"), "64107 text.interruptible: not a boolean"),
    (text("a", voice="x"), "64107 text: unexpected member 'voice'"),
    (text("fine", True), ""),
    ({"type": "play", "source": "hold.mp3"}, "64107 play.source: not a URL"),
    ({"type": "play", "source": "https://a.example/b", "loop": True}, "64107 play.loop: not a integer"),
    ({"type": "play", "source": "https://a.example/b", "loop": -1}, "64107 play.loop: below zero"),
    ({"type": "sendDigits", "digits": "12A"}, "64107 sendDigits.digits: not [0-9w#*]+"),
    ({"type": "sendDigits", "digits": ""}, "64107 sendDigits.digits: not [0-9w#*]+"),
    ({"type": "language"}, "64107 language: names none"),
    ({"type": "language", "ttsLanguage": ""}, "64107 language: names none"),
    ({"type": "end", "handoffData": {"a": 1}}, "64107 end.handoffData: not a string"),
    ({"type": "clear"}, "64107 unknown type 'clear'"),
]


async def test_relay_answers_every_mistake_with_64107() -> None:
    seen: list[dict[str, Any]] = []
    async with (
        gateway(relay(*(frame for frame, _ in RELAY_WRONG), then=recorder(seen))) as url,
        ConversationRelay(url, events=()) as call,
    ):
        await call.until(lambda: len(call.received) == len(RELAY_WRONG))
        kinds = Counter(kind for _, kind in RELAY_WRONG if kind)
        assert [kind if n == 1 else f"{kind} (x{n})" for kind, n in kinds.items()] == call.violations
    assert seen[0]["description"] == 'Invalid message received, code: 64107, {"type": "txt"}'
    assert len(RELAY_WRONG) - 1 == len([f for f in seen if f["type"] == "error"])


async def test_relay_closes_after_ten_strikes_in_a_row() -> None:
    end: list[tuple[int | None, str | None]] = []
    seen: list[dict[str, Any]] = []

    async def hear(ws: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            await recorder(seen)(ws)
        end.append((ws.close_code, ws.close_reason))

    script = [{"type": "x"}] * 9 + [text("ok", True)] + [{"type": "x"}] * 10
    async with gateway(relay(*script, then=hear)) as url:
        async with ConversationRelay(url, events=()) as call:
            await call.wait_closed()
        assert call.session_status == "failed"
    assert end == [(1007, "Too many consecutive malformed messages.")]
    assert 19 == call.errors_told == len(seen)


# Plivo.


def plivo_echo(encoding: str, rate: int) -> Handler:
    async def run(ws: ServerConnection) -> None:
        stream = ""
        n = 0
        async for line in ws:
            frame = json.loads(line)
            if frame["event"] == "start":
                stream = frame["start"]["streamId"]
            elif frame["event"] == "media":
                n += 1
                audio = {"contentType": encoding, "sampleRate": rate, "payload": frame["media"]["payload"]}
                await ws.send(json.dumps({"event": "playAudio", "media": audio}))
                if n == 10:
                    await ws.send(json.dumps({"event": "checkpoint", "streamId": stream, "name": "end"}))
            elif frame["event"] == "dtmf":
                await ws.send(json.dumps({"event": "sendDTMF", "dtmf": frame["dtmf"]["digit"]}))

    return run


@pytest.mark.parametrize(
    ("encoding", "rate", "size"), [("audio/x-mulaw", 8000, 160), ("audio/x-l16", 8000, 320), ("audio/x-l16", 16000, 640)]
)
@pytest.mark.parametrize("reduced", [False, True])
async def test_plivo_hears_a_good_gateway_without_violations(encoding: str, rate: int, size: int, reduced: bool) -> None:
    speech = Random(1).randbytes(size * 10)
    options: dict[str, Any] = {"encoding": encoding, "sample_rate": rate, "reduced": reduced, "offer_subprotocol": not reduced}
    async with gateway(plivo_echo(encoding, rate), select_subprotocol=lambda ws, offered: offered[0] if offered else None) as url:
        async with Plivo(url, **options) as call:
            assert (None if reduced else SUBPROTOCOL) == call.ws.subprotocol
            await call.speak(speech, pace="fast")
            await call.digits("5#")
            await call.until(lambda: call.marks == ["end"] and call.dtmf == ["5", "#"])
            assert call.violations == []
            assert speech == call.heard
            assert call.frames_read_back == 10
        assert (1006 if reduced else 1000) == call.ws.close_code


async def test_plivo_speaks_the_full_dialect() -> None:
    seen: list[dict[str, Any]] = []
    heads: list[Any] = []

    async def run(ws: ServerConnection) -> None:
        assert ws.request
        heads.append(ws.request.headers)
        await recorder(seen)(ws)

    for value, _ in EXTRA_HEADERS_FORMS:
        seen.clear()
        async with gateway(run) as url, Plivo(url, extra_headers=value, tracks=("inbound", "outbound"), pace="fast") as call:
            await call.speak({"inbound": SPEECH[:320], "outbound": SPEECH[:320]})
            await call.digits("9")
        assert [frame["event"] for frame in seen] == ["start", "media", "media", "media", "media", "dtmf"]
        assert list(range(1, 7)) == [frame["sequenceNumber"] for frame in seen]
        assert [frame["media"]["chunk"] for frame in seen[1:5]] == [1, 1, 2, 2]
        assert seen[1]["media"]["timestamp"] == "1705312200000"
        assert seen[0]["start"]["mediaFormat"] == {"encoding": "audio/x-mulaw", "sampleRate": 8000}
        assert "streamId" not in seen[0]
        assert {call.stream_id} == {frame["streamId"] for frame in seen[1:]}
        for frame in seen:
            assert value == frame.get("extra_headers", ABSENT)
    assert {"x-plivo-signature-v3", "x-plivo-signature-ma-v3", "x-plivo-signature-v3-nonce"} <= set(heads[0])


async def test_plivo_speaks_the_reduced_dialect() -> None:
    seen: list[dict[str, Any]] = []
    options: dict[str, Any] = {"reduced": True, "bidirectional": False, "encoding": "audio/x-l16", "pace": "fast", "ragged": True}
    async with gateway(recorder(seen)) as url, Plivo(url, **options) as call:
        await call.speak(SPEECH)
    start, *media, stop = seen
    assert {"event", "start"} == start.keys()
    assert start["start"]["mediaFormat"] == {"encoding": "audio/l16", "sampleRate": 8000}
    assert "tracks" not in start["start"]
    assert stop == {"event": "stop"}
    assert {"event", "media"} == set().union(*media)
    assert [str(n) for n in range(1, len(media) + 1)] == [frame["media"]["chunk"] for frame in media]
    parts = [base64.b64decode(frame["media"]["payload"]) for frame in media]
    assert b"".join(parts) == SPEECH
    assert any(len(part) % 2 for part in parts)


def play(payload: Any, **more: Any) -> dict[str, Any]:
    return {"event": "playAudio", "media": {"contentType": "audio/x-l16", "sampleRate": 16000, "payload": payload} | more}


PLIVO_WRONG: list[tuple[Any, str]] = [
    (b"\0", "a binary frame"),
    ("nope", "not JSON"),
    ({}, "no event"),
    ({"event": "media"}, "unknown event 'media'"),
    ({"event": "clear"}, "unknown event 'clear'"),
    (play("AAAA") | {"streamId": "x"}, "playAudio: unexpected member 'streamId'"),
    (play("AAAA", track="inbound"), "playAudio.media: unexpected member 'track'"),
    (play("AAAA", sampleRate="16000"), "playAudio.media.sampleRate: not a number"),
    (play("AAAA", sampleRate=True), "playAudio.media.sampleRate: not a number"),
    (play("AAAA", contentType="audio/x-l16;rate=16000"), "playAudio.media.contentType: 'audio/x-l16;rate=16000'"),
    (play("AAAA", contentType="audio/l16"), "playAudio.media.contentType: 'audio/l16'"),
    (play("AAA=", sampleRate=8000), "playAudio.media: not the stream's format"),
    (play("AAA=", contentType="audio/x-mulaw", sampleRate=8000), "playAudio.media: not the stream's format"),
    (play(""), "playAudio.media.payload: empty"),
    (play("AA"), "playAudio.media.payload: not standard base64"),
    (play("AAAA"), "playAudio.media.payload: half a sample"),
    (play(b64(b"RIFF")), "playAudio.media.payload: starts with a file header"),
    (play("AAAA" * 20_000), "playAudio: above 64 KB"),
    ({"event": "checkpoint", "name": "a"}, "checkpoint: member 'streamId' is missing"),
    ({"event": "checkpoint", "streamId": "other", "name": "a"}, "checkpoint: streamId of another stream"),
    ({"event": "checkpoint", "streamId": "S", "name": ""}, "checkpoint.name: empty"),
    ({"event": "clearAudio"}, "clearAudio: member 'streamId' is missing"),
    ({"event": "clearAudio", "streamId": 5}, "clearAudio.streamId: not a string"),
    ({"event": "sendDTMF", "dtmf": "1w"}, "sendDTMF.dtmf: not [0-9A-D*#]+"),
    ({"event": "sendDTMF", "dtmf": "1", "streamId": "S"}, "sendDTMF: unexpected member 'streamId'"),
]


async def test_plivo_names_every_mistake() -> None:
    seen: list[dict[str, Any]] = []

    async def wrong(ws: ServerConnection) -> None:
        stream = json.loads(await ws.recv())["start"]["streamId"]
        for frame, _ in PLIVO_WRONG:
            if isinstance(frame, dict) and frame.get("streamId") == "S":
                frame = frame | {"streamId": stream}
            await ws.send(json.dumps(frame) if isinstance(frame, dict) else frame)
        await recorder(seen)(ws)

    async with gateway(wrong) as url, Plivo(url, encoding="audio/x-l16", sample_rate=16000, offer_subprotocol=True) as call:
        await call.until(lambda: len(call.received) == len(PLIVO_WRONG))
        kinds = Counter([f"handshake: {SUBPROTOCOL} was offered and not selected", *(kind for _, kind in PLIVO_WRONG)])
        expected = [kind if n == 1 else f"{kind} (x{n})" for kind, n in kinds.items()]
        assert expected == call.violations
        assert call.heard == b""
    assert {"incorrectPayload": len(PLIVO_WRONG)} == Counter(frame["event"] for frame in seen)


async def test_plivo_queue_sizes_names_and_listeners() -> None:
    async def much(ws: ServerConnection) -> None:
        stream = json.loads(await ws.recv())["start"]["streamId"]
        big = {"contentType": "audio/x-mulaw", "sampleRate": 8000, "payload": b64(bytes(12_800))}
        for _ in range(26):
            await ws.send(json.dumps({"event": "playAudio", "media": big}))
        for _ in range(2):
            await ws.send(json.dumps({"event": "checkpoint", "streamId": stream, "name": "twice"}))
        await nothing(ws)

    async with gateway(much) as url:
        async with Plivo(url) as call:
            await call.until(lambda: len(call.received) == 28)
            assert call.violations == [
                "playAudio.media.payload: above the recommended 16 KB (x26)",
                "buffer_overflow: more than 40 s queued",
                "checkpoint.name: used before on this stream",
            ]
            assert 39_900 < call.max_buffered_ms <= 40_000
        async with Plivo(url, bidirectional=False) as call:
            await call.until(lambda: len(call.received) == 28)
            assert call.violations == ["message on a unidirectional stream (x28)"]


@pytest.mark.parametrize("late", [False, True])
async def test_plivo_clear_forgets_checkpoints(late: bool) -> None:
    seen: list[dict[str, Any]] = []

    async def clears(ws: ServerConnection) -> None:
        stream = json.loads(await ws.recv())["start"]["streamId"]

        async def say(**frame: Any) -> None:
            await ws.send(json.dumps(frame))

        audio = {"contentType": "audio/x-mulaw", "sampleRate": 8000}
        await say(event="checkpoint", streamId=stream, name="empty")
        await say(event="playAudio", media=audio | {"payload": b64(b"\1" * 400)})
        await say(event="checkpoint", streamId=stream, name="short")
        await say(event="playAudio", media=audio | {"payload": b64(b"\2" * 8000)})
        await say(event="checkpoint", streamId=stream, name="gone")
        await asyncio.sleep(0.1)
        await say(event="clearAudio", streamId=stream)
        await recorder(seen)(ws)

    async with gateway(clears) as url:
        async with Plivo(url, late_played=late) as call:
            await call.until(lambda: call.cleared_marks)
            await asyncio.sleep(0.05)
        assert call.cleared_marks == ["gone"]
        assert call.marks == ["empty", "short"]
        assert call.violations == []
        assert 400 + 8 * 30 < len(call.heard) < 400 + 8 * 200
    names = [(frame["event"], frame.get("name")) for frame in seen]
    expected = [("playedStream", "empty"), ("playedStream", "short"), ("clearedAudio", None)]
    assert expected + [("playedStream", "gone")] * late == names
    assert list(range(2, len(names) + 2)) == [frame["sequenceNumber"] for frame in seen]


# Services.

START: dict[str, Any] = {
    "type": "start",
    "session": "s1",
    "provider": "twilio",
    "kind": "twilio-media-streams",
    "stream_id": M,
    "call_id": "CA1",
    "account_id": "AC1",
    "caller": None,
    "called": None,
    "direction": None,
    "role": "speaker",
    "track": "inbound",
    "media_format": {"encoding": "pcm_s16le", "sample_rate": 16000, "channels": 1},
    "frame_ms": 20,
    "accepts": ["checkpoint", "clear", "stop"],
    "parameters": {"a": "b"},
    "resume": None,
}
STOP: dict[str, Any] = {
    "type": "stop",
    "reason": "caller_hangup",
    "account": dict.fromkeys(("received", "forwarded", "dropped", "queued", "played", "cleared", "lost"), 0),
}


@asynccontextmanager
async def dial(url: str, *subprotocols: str) -> AsyncIterator[Any]:
    offered: Any = list(subprotocols) or [RAW, FRAMED]
    async with connect(url, subprotocols=offered, compression=None, proxy=None, close_timeout=1) as ws:
        yield ws


async def test_echo_of_twenty_lines() -> None:
    async with EchoService20() as service, dial(service.url) as ws:
        assert ws.subprotocol is None
        await ws.send(json.dumps(START))
        await ws.send(b"\1\2\3\4")
        assert await ws.recv() == b"\1\2\3\4"
        assert service.log == [START]


async def test_echo_runs_as_a_program() -> None:
    file = Path(__file__).parent / "doubles" / "echo20.py"
    code = [line for line in file.read_text().splitlines() if line.strip()]
    assert len(code) <= 22
    program = await asyncio.create_subprocess_exec(sys.executable, str(file), "0", stdout=asyncio.subprocess.PIPE)
    try:
        assert program.stdout
        url = (await asyncio.wait_for(program.stdout.readline(), 10)).decode().strip()
        async with dial(url) as ws:
            await ws.send(b"ab")
            assert await ws.recv() == b"ab"
    finally:
        program.terminate()
        await program.communicate()


async def test_recording_service_passes_a_good_gateway() -> None:
    steps = ({"type": "checkpoint", "name": "a"}, b"\0\1" * 320, 0.01, {"type": "stop"})
    async with scripted(*steps, subprotocol=RAW) as service:
        async with dial(service.url) as ws:
            assert ws.subprotocol == RAW
            await ws.send(json.dumps(START))
            assert json.loads(await ws.recv()) == {"type": "checkpoint", "name": "a"}
            assert await ws.recv() == b"\0\1" * 320
            assert json.loads(await ws.recv()) == {"type": "stop"}
            await ws.send(b"\0\0" * 320)
            await ws.send(json.dumps({"type": "checkpoint", "name": "a", "outcome": "played", "played_ms": 20}))
            await ws.send(json.dumps(STOP))
        link = service.link
        await link.until(link.closed.is_set)
        assert service.violations == []
        assert (link.audio, link.close_code) == (b"\0\0" * 320, 1000)
        assert [t["type"] for t in link.texts()] == ["start", "checkpoint", "stop"]
        assert link.start["session"] == "s1"
        times = [message.at for message in link.messages]
        assert sorted(times) == times


SERVICE_WRONG: list[tuple[list[Any], str]] = [
    ([b"\0\0"], "audio before start"),
    ([{"type": "dtmf", "digits": "1"}], "dtmf before start"),
    ([START, START], "start: not first"),
    ([START, b"\0"], "audio: half a sample"),
    ([START, b""], "audio: empty"),
    ([START | {"media_format": None}, b"\0\0"], "audio on a stream of text"),
    ([START | {"frame_ms": 20.0}], "start.frame_ms: not integer?"),
    ([START | {"role": "boss"}], "start.role: not speaker|listener"),
    ([START | {"parameters": {"a": 1}}], "start.parameters: not strings"),
    ([START | {"media_format": {"encoding": "l16", "sample_rate": 8000, "channels": 1}}], "start.media_format"),
    ([{name: START[name] for name in START if name != "track"}], "start: field 'track' is missing"),
    ([START, {"type": "dtmf", "digits": "1", "x": 1}], "dtmf: unexpected field 'x'"),
    ([START, {"type": "mark"}], "unknown type 'mark'"),
    ([START, "{"], "text: not JSON"),
    ([START, STOP | {"account": {"received": 1.5}}], "stop.account.received: not an integer"),
    ([START, STOP, STOP], "something after stop"),
    ([START], "closed 1000 without stop"),
]


@pytest.mark.parametrize(("frames", "kind"), SERVICE_WRONG, ids=[kind for _, kind in SERVICE_WRONG])
async def test_recording_service_holds_the_gateway_to_the_protocol(frames: list[Any], kind: str) -> None:
    async with RecordingService() as service:
        async with dial(service.url) as ws:
            for frame in frames:
                await ws.send(json.dumps(frame) if isinstance(frame, dict) else frame)
        link = await service.connected()
        await link.until(link.closed.is_set)
        assert kind in service.ledger.counts


async def test_recording_service_refuses_chooses_closes_drops_and_stalls() -> None:
    async with RecordingService(refuse=[503, 401], subprotocol=lambda offered: offered[-1]) as service:
        for status in (503, 401):
            with pytest.raises(Exception, match=f"HTTP {status}"):
                async with dial(service.url):
                    pass
        async with dial(service.url) as ws:
            assert ws.subprotocol == FRAMED
            link = await service.connected()
            await link.raw(b"\xff", text=True)
            with pytest.raises(ConnectionClosed):
                await ws.recv()
        assert len(service.attempts) == 3
        async with dial(service.url) as ws:
            await (await service.connected(2)).close(4029, "full")
            with pytest.raises(ConnectionClosed) as closed:
                await ws.recv()
            assert closed.value.rcvd
            assert closed.value.rcvd.code == 4029
        async with dial(service.url) as ws:
            (await service.connected(3)).drop()
            with pytest.raises(ConnectionClosed) as closed:
                await ws.recv()
            assert closed.value.rcvd is None
        async with dial(service.url, "chat"):
            pass
        assert any(kind.startswith("handshake: offered ['chat']") for kind in service.violations)

    async with RecordingService(small_buffers=True) as service, dial(service.url) as ws:
        link = await service.connected()
        link.stall()

        async def flood() -> None:
            while True:
                await ws.send(bytes(60_000))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 0.3)
        assert link.audio == b""
        ws.transport.abort()


async def test_a_failing_script_fails_the_test() -> None:
    async def script(link: Any) -> None:
        raise ValueError("script")

    with pytest.raises(ValueError, match="script"):
        async with RecordingService(script=script) as service, dial(service.url):
            await service.connected()
