"""A stream that was lost is not the end of its call: the carrier asks again, gets a new stream, and the service goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import structlog

import providers
from gateway.callreport import CallReport
from gateway.events import Event
from gateway.journal import MOST_ATTEMPTS
from gateway.media import MULAW_8K
from gateway.server import Server
from gateway.signing import Signing
from gateway.simulator import simulate
from gateway.stream import Stream
from providers import twilio_conversation_relay

from .conftest import Launch
from .doubles.service import FRAMED, SILENCE, Frame, Link, RecordingService

SPEECH = b"".join(bytes([1 + at % 120]) * 160 for at in range(600))
"""Twelve seconds in which each 20 ms differs from the next."""
AUDIO = ["twilio", "plivo"]
KINDS = {"twilio": "twilio_media_streams", "relay": "twilio_conversation_relay", "plivo": "plivo_audio_streaming"}
PLAIN = {"encoding": "mulaw", "sample_rate": 8000}


def answer_url(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.port}/{name}/answer"


@asynccontextmanager
async def calling(server: Server, name: str, **options: Any) -> AsyncIterator[asyncio.Task[CallReport]]:
    """A call that lasts until this is left, or it has come to its end."""
    hang_up = asyncio.Event()
    options = {"audio": SPEECH, "audio_format": MULAW_8K, "hold_secs": 30.0, "hang_up": hang_up, **options}
    kind = providers.load(KINDS[name])
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        try:
            yield tasks.create_task(simulate(kind, url=answer_url(server, name), measure=False, **options))
        finally:
            hang_up.set()


def cut(server: Server) -> None:
    """The carrier's connection is gone, without a word on either side."""
    (stream,) = server.streams.values()
    cut_off(stream)


def cut_off(stream: Stream) -> None:
    stream._transport.abort()


async def until(condition: Callable[[], object], secs: float = 8.0) -> None:
    async with asyncio.timeout(secs):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def framed(**service: Any) -> dict[str, Any]:
    return {"kind": "websocket", "media_format": PLAIN, **service}


def whole(frames: list[Frame], jumps: int = 1) -> None:
    """Every frame once and in order, and every sample in its place; what no carrier sent is silence, and said to be."""
    assert [*range(len(frames))] == [frame.seq for frame in frames]
    position = 0
    for frame in frames:
        assert frame.pos >= position
        position = frame.pos + len(frame.samples)
    heard = [frame.samples for frame in frames if not frame.flags & SILENCE]
    numbers = [SPEECH.index(each) // 160 for each in heard if len({*each}) == 1]
    steps = [(after - before) % 120 for before, after in pairwise(numbers) if before != after]
    assert sum(step != 1 for step in steps) <= jumps, f"more is missing than what was said to nobody: {steps}"


@pytest.mark.parametrize("name", AUDIO)
async def test_t8_a_lost_stream_is_taken_up_again_under_the_same_session(launch: Launch, name: str) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)})
        async with calling(server, name) as call:
            first = await service.connected()
            await first.until(lambda: len(first.frames) > 40)
            cut(server)
            second = await service.connected(2)
            await second.until(lambda: len(second.frames) > 40)
        report = call.result()
        await second.wait_for("stop")
    assert [] == service.violations
    assert 2 == len(report.streams)
    assert [] == report.errors
    assert first.start["session"] == second.start["session"]
    assert first.start["call_id"] == second.start["call_id"]
    assert first.start["stream_id"] != second.start["stream_id"]
    resume = second.start["resume"]
    assert first.start["session"] == resume["session"]
    assert resume["oldest"] <= resume["next"]
    assert [] == first.texts("stop")
    (gap,) = second.texts("gap")
    assert "carrier" == gap["reason"]
    assert abs(gap["lost_ms"] - report.gaps_ms[0]) < 400
    whole(second.memory.frames)
    assert "caller_hangup" == second.texts("stop")[0]["reason"] or name == "plivo"


async def test_raw_mode_goes_on_live_and_is_told_the_gap(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": framed(url=service.url)})
        async with calling(server, "twilio"):
            first = await service.connected()
            await first.until(lambda: len(first.audio) > 160 * 20)
            cut(server)
            second = await service.connected(2)
            await second.until(lambda: len(second.audio) > 160 * 20)
    assert [] == service.violations
    assert first.start["session"] == second.start["session"]
    assert 1 == len(second.texts("gap"))


async def test_checkpoints_of_the_lost_stream_come_back_as_lost(launch: Launch) -> None:
    async def speak(link: Link) -> None:
        await link.wait_for("start")
        if len(service.links) == 1:
            await link.play(bytes([0xFF]) * 80_000)
            await link.send(type="checkpoint", name="greeting")
            await link.send(type="checkpoint", name="menu")

    async with RecordingService(subprotocol=FRAMED, script=speak) as service:
        server = await launch(services={"agent": framed(url=service.url)})
        async with calling(server, "twilio") as call:
            first = await service.connected()
            await first.until(lambda: len(first.frames) > 30)
            cut(server)
            second = await service.connected(2)
            await second.wait_for("checkpoint", count=2)
        assert 2 == len(call.result().streams)
    assert ["greeting", "menu"] == second.start["resume"]["checkpoints"]
    assert [("greeting", "lost"), ("menu", "lost")] == [(each["name"], each["outcome"]) for each in second.texts("checkpoint")]
    assert [] == service.violations


async def test_relay_goes_on_without_a_second_greeting(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[str] = []
    decode = twilio_conversation_relay.Codec.decode

    def spy(codec: twilio_conversation_relay.Codec, frame: str | bytes) -> Iterable[Event]:
        frames.append(str(frame))
        return decode(codec, frame)

    monkeypatch.setattr(twilio_conversation_relay.Codec, "decode", spy)
    account = {"kind": KINDS["relay"], "auth": "none", "welcome_greeting": "Hello!", "welcome_greeting_interruptible": "any"}
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)}, providers={"relay": account})
        async with calling(server, "relay", audio=None, say=["one", "two", "three", "four"]) as call:
            first = await service.connected()
            await first.wait_for("transcript")
            cut(server)
            second = await service.connected(2)
            await second.wait_for("start")
        report = call.result()
    assert [] == service.violations
    assert first.start["session"] == second.start["session"]
    assert 2 == len(report.streams)
    assert 1 == report.spoken.count("Hello!")
    setups = [each for each in map(json.loads, frames) if each["type"] == "setup"]
    assert ["RINGING", "IN_PROGRESS"] == [each["callStatus"] for each in setups]
    assert 2 == len({each["sessionId"] for each in setups})


@pytest.mark.parametrize("name", AUDIO)
async def test_a_call_that_ended_on_purpose_is_not_taken_up(launch: Launch, name: str) -> None:
    async def stop(link: Link) -> None:
        await link.wait_for("start")
        await link.send(type="stop")

    account = {"kind": KINDS[name], "auth": "none", "after": "<Speak>bye</Speak>" if name == "plivo" else "<Say>bye</Say>"}
    async with RecordingService(script=stop) as service:
        server = await launch(services={"agent": framed(url=service.url)}, providers={name: account})
        async with calling(server, name) as call:
            report = await asyncio.wait_for(call, 8)
    assert 1 == len(report.streams)
    assert "bye" in (report.ended_with or "")
    assert 1 == len(service.links)


@pytest.mark.allow_errors("service_lost")
async def test_a_lost_service_ends_the_call_as_configured(launch: Launch) -> None:
    async def vanish(link: Link) -> None:
        await link.wait_for("start")
        await link.close(4404)

    account = {"kind": KINDS["twilio"], "auth": "none", "service_lost": "<Say>sorry</Say>"}
    async with RecordingService(script=vanish) as service:
        server = await launch(services={"agent": framed(url=service.url)}, providers={"twilio": account})
        server.house.service_lost = {}
        async with calling(server, "twilio") as call:
            report = await asyncio.wait_for(call, 8)
    assert 1 == len(report.streams)
    assert "sorry" in (report.ended_with or "")


async def test_a_carrier_that_does_not_come_back_ends_the_stream(launch: Launch, log: list[structlog.typing.EventDict]) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)}, reattach_secs=0.5)
        async with calling(server, "twilio", follow=False) as call:
            link = await service.connected()
            await link.until(lambda: len(link.frames) > 10)
            cut(server)
            await asyncio.wait_for(call, 8)
            assert [] == link.texts("stop")
            stop = await link.wait_for("stop")
    assert "carrier_closed" == stop["reason"]
    assert [] == service.violations
    await until(lambda: not server.streams)
    assert 1 == [entry["event"] for entry in log].count("carrier_lost")


async def test_without_reattachment_a_lost_stream_is_the_end(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)}, reattach_secs=0)
        async with calling(server, "twilio") as call:
            link = await service.connected()
            await link.until(lambda: len(link.frames) > 10)
            cut(server)
            await link.wait_for("stop", timeout=1.0)
            report = await asyncio.wait_for(call, 8)
    assert 1 == len(report.streams)


async def test_a_call_whose_every_stream_is_lost_comes_to_an_end(launch: Launch) -> None:
    account = {"kind": KINDS["twilio"], "auth": "none", "after": "<Say>enough</Say>"}
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)}, providers={"twilio": account}, reattach_secs=2)
        async with calling(server, "twilio") as call:
            while not call.done():
                for stream in [*server.streams.values()]:
                    if stream.route is not None:
                        cut_off(stream)
                await asyncio.sleep(0.02)
            report = call.result()
    assert 1 + MOST_ATTEMPTS == len(report.streams)
    assert "enough" in (report.ended_with or "")


async def test_hand_over_has_the_carrier_come_back(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)})
        async with calling(server, "twilio") as call:
            first = await service.connected()
            await first.until(lambda: len(first.frames) > 30)
            (stream,) = server.streams.values()
            await stream.hand_over()
            second = await service.connected(2)
            await second.until(lambda: len(second.frames) > 30)
        report = call.result()
    assert 1001 == report.streams[0].close_code
    assert [] == first.texts("stop")
    assert [] == service.violations
    whole(second.memory.frames)


async def test_a_second_stream_of_a_live_call_goes_on_with_its_session(launch: Launch) -> None:
    """F10: the newer one takes over, and the service keeps its conversation."""
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": framed(url=service.url)})
        async with calling(server, "twilio", follow=False, call_id="CA" + "0" * 32) as older:
            first = await service.connected()
            await first.until(lambda: len(first.frames) > 20)
            async with calling(server, "twilio", call_id="CA" + "0" * 32):
                second = await service.connected(2)
                await second.until(lambda: len(second.frames) > 20)
                await asyncio.wait_for(older, 5)
                assert 1 == len(server.streams)
    assert 4409 == older.result().streams[0].close_code
    assert first.start["session"] == second.start["session"]
    assert [] == first.texts("stop")


@pytest.mark.parametrize("name", AUDIO)
async def test_signed_calls_come_back_again_and_again(launch: Launch, name: str) -> None:
    """Twilio signs no nonce: what is asked after each stream must not look like what was asked after the last one."""
    tokens = {"twilio": {"auth_token": "0123456789abcdef0123456789abcdef"}, "plivo": {"auth_token": "secret-of-plivo"}}
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(
            services={"agent": framed(url=service.url)},
            providers={name: {"kind": KINDS[name], **tokens[name]}},
            secret="0123456789abcdef",
            public_url="https://voice.example.com",
        )
        sign = Signing(server.providers[name], "https://voice.example.com", f"http://127.0.0.1:{server.port}")
        async with calling(server, name, sign=sign) as call:
            for at in range(4):
                link = await service.connected(1 + at)
                await link.until(lambda link=link: len(link.frames) > 20)  # type: ignore[misc]
                cut(server)
            last = await service.connected(5)
            await last.until(lambda: len(last.frames) > 20)
    assert 5 == len(call.result().streams)
    assert 1 == len({link.start["session"] for link in service.links})
    assert [] == service.violations
    whole(last.memory.frames, jumps=4)
