"""Calls through a real gateway on loopback: foreign doubles of the carriers on one side, foreign services on the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest

from gateway.audio.g711 import decode_mulaw, encode_mulaw
from tests.conftest import Launch, bundled_speech
from tests.doubles import ConversationRelay, EchoService20, Plivo, RecordingService, TwilioMedia

SPEECH = bundled_speech()[4000:20000]
MULAW = encode_mulaw(SPEECH).tobytes()
FRAME = 160

AUDIO_CARRIERS = [
    pytest.param(TwilioMedia, "twilio", id="twilio"),
    pytest.param(Plivo, "plivo", id="plivo"),
    pytest.param(lambda url, **options: TwilioMedia(url, shuffle=True, **options), "twilio", id="twilio-shuffled"),
    pytest.param(lambda url, **options: Plivo(url, reduced=True, **options), "plivo", id="plivo-test-client"),
]


def stream_url(server: Any, name: str) -> str:
    return f"ws://127.0.0.1:{server.port}/{name}/stream"


def played(call: Any) -> bytes:
    """What the carrier was given to play, without the silence of a line that ran dry."""
    return b"".join(stretch.data for stretch in call.ear.stretches)


def likeness(sent: npt.NDArray[Any], heard: npt.NDArray[Any]) -> tuple[int, float]:
    """(delay in samples, signal to noise in dB) of `heard` against `sent` at the best alignment."""
    sent, heard = sent.astype(float), heard.astype(float)
    size = 1 << (len(sent) + len(heard)).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(sent, size)))
    delay = int(np.argmax(correlation[:1600]))
    length = min(len(sent), len(heard) - delay)
    noise = heard[delay : delay + length] - sent[:length]
    return delay, 10 * np.log10(np.sum(sent[:length] ** 2) / max(np.sum(noise**2), 1e-9))


@pytest.mark.parametrize(("carrier", "name"), AUDIO_CARRIERS)
async def test_speech_comes_back_from_an_external_echo_service_at_16_khz(launch: Launch, carrier: Any, name: str) -> None:
    async with EchoService20() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with carrier(stream_url(server, name)) as call:
            await call.speak(MULAW)
            await asyncio.sleep(0.2)
            await call.hangup()
    assert [] == call.violations
    assert abs(len(MULAW) - len(played(call))) <= FRAME
    delay, snr = likeness(SPEECH, decode_mulaw(np.frombuffer(played(call), np.uint8)))
    assert delay <= 40, "two filters of 2 ms and rounding"
    assert snr > 30, "mu-law once more, and nothing else"
    words = [message["type"] for message in service.log]
    assert ("start", "stop") == (words[0], words[-1])


async def test_mulaw_passes_bit_exact(launch: Launch) -> None:
    async with RecordingService() as service:
        mulaw = {"encoding": "mulaw", "sample_rate": 8000}
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url, "media_format": mulaw}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await call.speak(MULAW[:8000])
            await link.send_audio(MULAW[:4000])
            await link.send(type="checkpoint", name="end")
            done = await link.wait_for("checkpoint")
            await call.hangup()
            await link.wait_for("stop")
    assert MULAW[:8000] == link.audio
    assert MULAW[:4000] == played(call)
    assert {"type": "checkpoint", "name": "end", "outcome": "played", "played_ms": 500} == done
    assert [] == call.violations
    assert [] == service.violations


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
async def test_every_pcm_rate_arrives_in_whole_frames(launch: Launch, rate: int) -> None:
    async with RecordingService() as service:
        pcm = {"encoding": "pcm_s16le", "sample_rate": rate}
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url, "media_format": pcm, "frame_ms": 20}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await call.speak(MULAW[:3200])
            await call.hangup()
            stop = await link.wait_for("stop")
    assert pcm | {"channels": 1} == link.start["media_format"]
    # Two milliseconds more come out at the end: the filter's tail.
    assert 400 <= len(link.audio) / (rate * 2 / 1000) <= 406
    account = stop["account"]
    assert account["received"] == account["forwarded"] + account["dropped"] == 400


async def test_conversation_relay_talks_to_a_text_service(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with ConversationRelay(stream_url(server, "relay"), characters_per_second=200) as call:
            link = await service.connected()
            await call.says("Where is my order?")
            heard = await link.wait_for("transcript")
            await link.send(type="say", text="It is on its way.")
            await link.send(type="checkpoint", name="told")
            done = await link.wait_for("checkpoint")
            await call.digits("5")
            await link.wait_for("dtmf")
            await link.send(type="play", source="https://media.example.com/bye.mp3")
            await link.send(type="language", speech="de-DE")
            await link.send(type="say", text="One moment.")
            await link.send(type="dtmf", digits="12#")
            await link.send(type="checkpoint", name="sent")
            sent = await link.wait_for("checkpoint", count=2)
            await link.raw(b"\0\0" * 160)
            fault = await link.wait_for("fault")
            await link.send(type="stop", handoff='{"why": "done"}')
            await link.wait_for("stop")
    assert link.start["media_format"] is None
    assert ["checkpoint", "dtmf", "language", "play", "say", "stop"] == sorted(link.start["accepts"])
    assert {"type": "transcript", "text": "Where is my order?", "final": True, "language": "en-US"} == heard
    assert [("told", "played"), ("sent", "played")] == [(each["name"], each["outcome"]) for each in (done, sent)]
    assert ["12#"] == call.dtmf
    assert "It is on its way.One moment." == "".join(each["text"].strip(" ") for each in link.texts("spoken")), (
        "tones are no words"
    )
    assert "unsupported_command" == fault["code"]
    assert [] == call.violations
    assert [] == service.violations


async def test_a_foreign_conversation_relay_finds_no_violation_in_the_echo(launch: Launch) -> None:
    server = await launch()
    async with ConversationRelay(stream_url(server, "relay"), characters_per_second=200) as call:
        await call.says("Hello there.")
        await call.spoken_out()
        await call.digits("#")
        await asyncio.sleep(0.3)
    assert "You said: Hello there." in call.spoken
    assert [] == call.violations


@pytest.mark.parametrize(("carrier", "name"), AUDIO_CARRIERS[:3])  # the last one confirms nothing
async def test_barge_in_cuts_the_line_at_once(launch: Launch, carrier: Any, name: str) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with carrier(stream_url(server, name)) as call:
            link = await service.connected()
            await link.send_audio(b"\x10\x20" * 16000 * 10)
            await link.send(type="checkpoint", name="end")
            await asyncio.sleep(0.6)
            await link.send(type="clear")
            cut = await link.wait_for("clear")
            await asyncio.sleep(0.2)
            heard_until_cut = len(played(call)) / 8
            await link.send_audio(b"\x10\x20" * 1600)
            await link.send(type="checkpoint", name="after")
            after = await link.wait_for("checkpoint", count=2)
            await call.hangup()
    assert [] == call.violations
    assert call.ear.max_buffered_ms <= 300
    (end,) = [text for text in link.texts("checkpoint") if text["name"] == "end"]
    assert "cleared" == end["outcome"]
    assert 400 < cut["played_ms"] < 800
    assert abs(heard_until_cut - cut["played_ms"]) < 60
    assert 10_000 <= cut["played_ms"] + cut["cleared_ms"] <= 10_004
    assert ("after", "played") == (after["name"], after["outcome"])


async def test_rubbish_from_the_carrier_is_skipped_and_logged_once(launch: Launch, log: list[Any]) -> None:
    server = await launch()
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        for _ in range(3):
            await call.raw("{not json")
            await call.raw(b"\x00\x01binary")
            await call.raw(json.dumps({"event": "media", "streamSid": call.stream_sid, "media": {"payload": "%%"}}))
            await call.raw('{"event": "novelty"}')
        await call.speak(MULAW[:1600])
        await asyncio.sleep(0.1)
        await call.hangup()
    assert 1600 == len(played(call))
    for event in ("bad_frame", "unknown_frame"):
        kinds = [entry["kind"] for entry in log if entry["event"] == event]
        assert len(kinds) == len(set(kinds)) >= 1
    (ended,) = [entry for entry in log if entry["event"] == "stream_ended"]
    assert 9 == sum(ended["bad_frames"].values())
    assert {"novelty": 3} == ended["unknown_frames"]


async def test_rubbish_from_the_service_is_answered_with_a_fault(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.raw("{", text=True)
            await link.raw('{"type": "sing", "id": "a"}', text=True)
            await link.raw('{"type": "checkpoint", "id": "b", "nmae": "x"}', text=True)
            await link.raw('{"type": "say", "id": "c", "text": "hello"}', text=True)
            await link.wait_for("fault", count=4)
            await call.speak(MULAW[:800])
            await call.hangup()
            await link.wait_for("stop")
    faults = [(fault["code"], fault["ref"]) for fault in link.texts("fault")]
    assert [
        ("malformed_command", None),
        ("malformed_command", "a"),
        ("malformed_command", "b"),
        ("unsupported_command", "c"),
    ] == faults


@pytest.mark.parametrize("name", ["twilio", "plivo", "relay"])
async def test_no_start_frame_closes_the_socket(launch: Launch, name: str) -> None:
    server = await launch(start_timeout_secs=0.3)
    async with aiohttp.ClientSession() as http, http.ws_connect(stream_url(server, name)) as socket:
        message = await socket.receive(timeout=3)
    assert aiohttp.WSMsgType.CLOSE == message.type
    assert 1008 == message.data


async def test_early_audio_waits_for_a_slow_service(launch: Launch) -> None:
    async with RecordingService(handshake_delay=0.5) as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio"), pace="fast") as call:
            await call.speak(MULAW[:8000])
            link = await service.connected()
            await call.hangup()
            await link.wait_for("stop")
    assert 32000 <= len(link.audio) <= 32000 + 32 * 4


@pytest.mark.allow_errors("service_lost")
async def test_a_service_that_is_not_there_ends_the_call_and_says_why(launch: Launch, log: list[Any]) -> None:
    server = await launch(services={"agent": {"kind": "websocket", "url": "ws://127.0.0.1:9/", "give_up_secs": 0.3}})
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.wait_closed()
    (lost,) = [entry for entry in log if entry["event"] == "service_lost"]
    assert "127.0.0.1:9" in lost["error"]
    assert "service_lost" == next(entry["reason"] for entry in log if entry["event"] == "stream_ended")


async def test_a_service_that_closes_is_done(launch: Launch, log: list[Any]) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.close(1000)
            await call.wait_closed()
    assert "service_stop" == next(entry["reason"] for entry in log if entry["event"] == "stream_ended")
    assert not server.streams


async def test_stopping_the_gateway_ends_calls_with_a_close_frame(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await server.stop()
            stop = await link.wait_for("stop")
            await call.wait_closed()
    assert "drain" == stop["reason"]
    assert 1001 == call.close_code


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("twilio", {"CallSid": "CA1", "From": "+15550001", "To": "+15550002", "Direction": "inbound"}),
        ("relay", {"CallSid": "CA1", "From": "+15550001", "To": "+15550002", "Direction": "inbound"}),
        ("plivo", {"CallUUID": "u1", "From": "15550001", "To": "15550002", "Direction": "inbound", "Event": "StartApp"}),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_answer_webhook_names_the_stream(launch: Launch, name: str, form: dict[str, str], method: str) -> None:
    server = await launch(public_url="https://voice.example.com/gw")
    async with aiohttp.ClientSession() as http:
        passed = {"params": form} if method == "GET" else {"data": form}
        async with http.request(method, f"http://127.0.0.1:{server.port}/{name}/answer", **passed) as response:  # type: ignore[arg-type]
            body = await response.text()
            assert 200 == response.status, body
            assert "xml" in response.headers["Content-Type"]
        assert f"wss://voice.example.com/gw/{name}/stream" in body
        async with http.request(method, f"http://127.0.0.1:{server.port}/{name}/answer") as response:
            assert 400 == response.status
        async with http.request(method, f"http://127.0.0.1:{server.port}/nobody/answer") as response:
            assert 404 == response.status


async def test_a_hole_in_the_callers_audio_is_told_and_filled_with_silence(launch: Launch) -> None:
    async with RecordingService() as service:
        mulaw = {"encoding": "mulaw", "sample_rate": 8000}
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url, "media_format": mulaw}})
        async with TwilioMedia(stream_url(server, "twilio"), pace="fast") as call:
            link = await service.connected()
            await call.speak(MULAW[:1600])
            await call.gap(500)
            await call.speak(MULAW[1600:3200])
            await call.hangup()
            await link.wait_for("stop")
    (gap,) = link.texts("gap")
    assert ("inbound", "carrier") == (gap["track"], gap["reason"])
    assert 480 <= gap["lost_ms"] <= 520
    assert MULAW[:1600] + b"\xff" * (8 * gap["lost_ms"]) + MULAW[1600:3200] == link.audio


async def test_odd_bytes_of_a_wide_stream_come_through_the_echo(launch: Launch) -> None:
    providers = {
        "plivo": {"kind": "plivo_audio_streaming", "auth": "none", "media_format": {"encoding": "pcm_s16le", "sample_rate": 8000}}
    }
    server = await launch(providers=providers)
    samples = SPEECH[:4000].astype("<i2").tobytes()
    url = stream_url(server, "plivo")
    async with Plivo(url, encoding="audio/x-l16", sample_rate=8000, reduced=True, ragged=True, pace="fast") as call:
        await call.speak(samples)
        await asyncio.sleep(0.8)
        await call.hangup()
    assert [] == call.violations
    assert samples == played(call)


async def test_stop_after_played_follows_a_checkpoint_at_once(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            await link.send_audio(b"\0\0" * 3200)
            await link.send(type="checkpoint", name="bye", id=7)
            await link.send(type="stop", after="played")
            await link.wait_for("stop", timeout=2)
            await call.wait_closed()
    assert "played" == link.texts("checkpoint")[0]["outcome"]
    assert [] == call.violations


async def test_a_stop_on_a_text_stream_follows_the_last_spoken_word(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url}})
        async with ConversationRelay(stream_url(server, "relay"), characters_per_second=100) as call:
            link = await service.connected()
            await link.send(type="say", text="Good bye then.")
            await link.send(type="stop", after="played")
            await link.wait_for("stop", timeout=3)
            await call.wait_closed()
    assert "Good bye then." in call.spoken
    assert [] == call.violations


async def test_a_frame_too_large_is_said_in_the_log(launch: Launch, log: list[Any]) -> None:
    server = await launch()
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.raw('{"event": "media", "x": "' + "x" * 70_000 + '"}')
        await call.wait_closed()
    assert 1009 == call.close_code
    assert 1 == sum(entry["event"] == "broken_websocket" for entry in log)
    assert ["protocol_error"] == [entry["reason"] for entry in log if entry["event"] == "stream_ended"]


async def test_a_carrier_that_sends_but_never_reads_is_let_go(launch: Launch, log: list[Any]) -> None:
    async with RecordingService() as service:
        providers = {"plivo": {"kind": "plivo_audio_streaming", "auth": "none"}}
        server = await launch(providers=providers, services={"agent": {"kind": "websocket", "url": service.url}})
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        try:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            writer.write(
                b"GET /plivo/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            await reader.readuntil(b"\r\n\r\n")
            start = {
                "event": "start",
                "start": {"callId": "c", "streamId": "s", "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000}},
            }
            writer.write(unmasked(json.dumps(start).encode()))
            link = await service.connected()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            digits = "1" * 15_000
            for _ in range(900):
                await link.send(type="dtmf", digits=digits)
            await link.send(type="stop")
            await link.wait_for("stop", timeout=15)
            media = unmasked(
                json.dumps({"event": "media", "streamId": "s", "media": {"track": "inbound", "payload": "/" * 216}}).encode()
            )
            async with asyncio.timeout(15):
                while server.streams:
                    with contextlib.suppress(ConnectionError):
                        writer.write(media)
                    await asyncio.sleep(0.02)
        finally:
            writer.close()
    assert 1 == sum(entry["event"] == "carrier_stalled" for entry in log)


def unmasked(payload: bytes) -> bytes:
    """A WebSocket text frame of up to 64 KiB, masked with zeros."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return b"\x81" + size + b"\0\0\0\0" + payload
