"""Listeners hear the call, each in its own way, and nothing that they do or fail to do can be heard on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from gateway.events import Audio, Clear, Dtmf, Fault, Flow, FlowState, Start, Stop
from gateway.listeners import ListenerLine, Listeners, Overheard
from gateway.media import MULAW_8K, Track
from gateway.services import Line, LinkFigures, ServiceLost
from gateway.settings import EchoService
from tests.conftest import Launch
from tests.doubles import RecordingService, TwilioMedia
from tests.doubles.service import FRAMED, Link
from tests.test_end_to_end import MULAW, played, stream_url

NOISE = bytes(random.Random(1).choices(range(255), k=16_000))
"""Without a byte of silence, and no piece of it comes twice."""

RAW_MULAW = {"encoding": "mulaw", "sample_rate": 8000}


def listener(service: RecordingService | str, **options: object) -> dict[str, object]:
    url = service if isinstance(service, str) else service.url
    return {"kind": "websocket", "url": url, "media_format": RAW_MULAW, **options}


def echoing(*listeners: str, **services: object) -> dict[str, Any]:
    """A gateway whose own echo speaks."""
    return {
        "services": {"echo": {"kind": "echo"}, **services},
        "routes": [{"service": "echo", "listeners": [*listeners]}],
    }


async def test_each_hears_its_track_in_its_format(launch: Launch) -> None:
    async with (
        RecordingService() as speaker,
        RecordingService() as inbound,
        RecordingService(subprotocol=FRAMED) as outbound,
        RecordingService() as wide,
    ):
        server = await launch(
            services={
                "agent": listener(speaker),
                "a": listener(inbound),
                "b": listener(outbound, track="outbound"),
                "c": {"kind": "websocket", "url": wide.url, "media_format": {"encoding": "pcm_s16le", "sample_rate": 24000}},
            },
            routes=[{"service": "agent", "listeners": ["a", "b", "c"]}],
        )
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            links = [await service.connected() for service in (inbound, outbound, wide)]
            await (await speaker.connected()).send_audio(NOISE[:8000])
            await call.speak(MULAW[:8000])
            await call.digits("5")
            await asyncio.sleep(0.3)
            await call.hangup()
            stops = [await link.wait_for("stop") for link in links]
    assert [("listener", "inbound"), ("listener", "outbound"), ("listener", "inbound")] == [
        (link.start["role"], link.start["track"]) for link in links
    ]
    assert MULAW[:8000] == links[0].audio
    heard = links[1].memory.audio
    assert NOISE[:8000] == heard.replace(b"\xff", b""), "bit for bit, with silence around"
    assert 1000 <= len(heard) / 8 <= 2500
    assert 48_000 <= len(links[2].audio) <= 48_300
    assert all(link.texts("dtmf") == [{"type": "dtmf", "digits": "5"}] for link in (links[0], links[2]))
    assert [] == inbound.violations + outbound.violations + wide.violations + call.violations
    assert {"caller_hangup"} == {stop["reason"] for stop in stops}


async def test_what_the_caller_hears_is_cut_at_a_clear_where_the_ear_is_cut(launch: Launch) -> None:
    async with RecordingService() as speaker, RecordingService() as hearer:
        server = await launch(
            services={"agent": listener(speaker), "ear": listener(hearer, track="outbound")},
            routes=[{"service": "agent", "listeners": ["ear"]}],
        )
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link, ear = await speaker.connected(), await hearer.connected()
            await call.speak(b"\xff" * 160)
            await link.send_audio(NOISE)
            await asyncio.sleep(0.5)
            await link.send(type="clear")
            cut = await link.wait_for("clear")
            await asyncio.sleep(0.3)
            await link.send_audio(NOISE[:800])
            await asyncio.sleep(0.4)
            await call.hangup()
            await ear.wait_for("stop")
    begin = ear.audio.index(NOISE[:400])
    heard = ear.audio[begin:]
    assert heard.startswith(NOISE[: cut["played_ms"] * 8 - 8])
    assert not heard.startswith(NOISE[: cut["played_ms"] * 8 + 9])
    pause = heard.index(NOISE[:400], 1) - cut["played_ms"] * 8
    assert 280 <= pause / 8 <= 420, "silence for as long as it lasted"
    assert [cut] == ear.texts("clear")


async def test_the_outbound_track_of_a_listening_stream_is_the_carriers(launch: Launch) -> None:
    both = {"kind": "twilio_media_streams", "auth": "none", "mode": "listen", "then": "<Hangup/>", "track": "both"}
    async with RecordingService() as one, RecordingService() as other:
        server = await launch(
            providers={"twilio": both},
            services={"in": listener(one), "out": listener(other, track="outbound")},
            routes=[{"service": "in", "listeners": ["out"]}],
        )
        async with TwilioMedia(stream_url(server, "twilio"), tracks=("inbound", "outbound")) as call:
            links = [await one.connected(), await other.connected()]
            await call.speak({"inbound": MULAW[:1600], "outbound": MULAW[1600:3200]})
            await call.hangup()
            for link in links:
                await link.wait_for("stop")
    assert [MULAW[:1600], MULAW[1600:3200]] == [link.audio for link in links]


@pytest.mark.parametrize("framed", [False, True])
async def test_every_command_but_ready_and_ack_is_refused(launch: Launch, framed: bool) -> None:
    async with RecordingService(subprotocol=FRAMED if framed else None) as hearer:
        server = await launch(**echoing("a", a=listener(hearer)))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await hearer.connected()
            commands = [
                {"type": "clear"},
                {"type": "checkpoint", "name": "x"},
                {"type": "dtmf", "digits": "1"},
                {"type": "say", "text": "hello"},
                {"type": "play", "source": "x"},
                {"type": "language", "speech": "de"},
                {"type": "stop"},
            ]
            for number, command in enumerate(commands):
                await link.send(**command, id=number)
            await link.send(type="sing", id="song")
            if framed:
                await link.play(MULAW[:3200])
            else:
                await link.send_audio(MULAW[:3200])
            await link.wait_for("fault", count=len(commands) + 2)
            await call.speak(MULAW[:1600])
            await asyncio.sleep(0.1)
            await call.hangup()
            await link.wait_for("stop")
    faults = [(fault["code"], fault["ref"]) for fault in link.texts("fault")]
    refused = [("not_speaker", number) for number in range(len(commands))]
    assert [*refused, ("malformed_command", "song"), ("not_speaker", None)] == faults, "audio is refused once"
    assert MULAW[:1600] == played(call)
    assert [] == call.violations
    assert [] == call.ear.clears


async def flood_of_texts(link: Link) -> None:
    while True:
        await link.send(type="clear", id=1)


async def flood_of_audio(link: Link) -> None:
    while True:
        await link.ws.send(bytes(1_000_000))


async def stalls(link: Link) -> None:
    link.stall()


async def drops_again_and_again(link: Link) -> None:
    await asyncio.sleep(0.1)
    link.drop()


async def is_done(link: Link) -> None:
    await link.close(1000)


async def breaks_off(link: Link) -> None:
    await link.close(1011)


BAD: list[Callable[[], RecordingService]] = [
    lambda: RecordingService(script=flood_of_texts),
    lambda: RecordingService(script=flood_of_audio),
    lambda: RecordingService(script=flood_of_texts, subprotocol=FRAMED, answer="silent"),
    lambda: RecordingService(script=stalls, small_buffers=True),
    lambda: RecordingService(script=drops_again_and_again),
    lambda: RecordingService(script=is_done),
    lambda: RecordingService(script=breaks_off),
    lambda: RecordingService(refuse=403),
    lambda: RecordingService(refuse=503),
    lambda: RecordingService(handshake_delay=2),
    lambda: RecordingService(subprotocol="nonsense"),
]
NAMES = [
    *("floods", "floods with audio", "floods and is never ready", "stalls", "drops", "is done", "breaks off", "forbids"),
    *("is overloaded", "hangs", "talks nonsense"),
]


@pytest.mark.parametrize("make", BAD, ids=NAMES)
async def test_a_bad_listener_is_not_heard_on_the_call(launch: Launch, log: list[Any], make: Callable[[], Any]) -> None:
    async with make() as bad, RecordingService() as good:
        bad.errors = Errors()
        server = await launch(**echoing("bad", "good", bad=listener(bad, replay_ms=300), good=listener(good)))
        loop = asyncio.get_running_loop()
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await good.connected()
            await call.speak(MULAW[:4800])
            await asyncio.sleep(0.3)
            began = loop.time()
            await call.hangup()
            await link.wait_for("stop")
            while server.streams:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
            ended = loop.time() - began
        for each in bad.links:
            each.drop()
    assert ended < 1.5, "nobody waits for it at the end, as long as FAREWELL_SECS"
    assert MULAW[:4800] == played(call) == link.audio
    assert [] == call.violations
    (line,) = [entry for entry in log if entry["event"] == "stream_ended"]
    assert ("caller_hangup", 0, {}) == (line["reason"], line["dropped_samples"], line["faults"])
    assert line["latency_to_caller_ms"] is None or line["latency_to_caller_ms"]["p50"] < 10


class Errors(list[BaseException]):
    """A double that is cut off in mid-word is no failure here."""

    def __bool__(self) -> bool:
        return False


async def test_nobody_there_is_told_once_and_the_call_goes_on(launch: Launch, log: list[Any]) -> None:
    server = await launch(**echoing("gone", gone=listener("ws://127.0.0.1:9/", give_up_secs=0.3)))
    async with TwilioMedia(stream_url(server, "twilio")) as call:
        await call.speak(MULAW[:8000])
        await asyncio.sleep(0.2)
        assert len(next(iter(server.streams.values()))._channel._subscriptions) == 1, "what nobody takes is not kept"
        await call.hangup()
    assert MULAW[:8000] == played(call)
    (lost,) = [entry for entry in log if entry["event"] == "listener_lost"]
    assert ("gone", True) == (lost["listener"], "127.0.0.1:9" in lost["error"])


async def test_a_listener_comes_back_by_itself(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as hearer:
        server = await launch(**echoing("a", a=listener(hearer)))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await hearer.connected()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(call.speak(MULAW[:9600]))
                await asyncio.sleep(0.4)
                await hearer.down()
                await asyncio.sleep(0.3)
                await hearer.up()
                link = await hearer.connected(2)
            await call.hangup()
            await link.wait_for("stop")
    assert MULAW[:9600] == link.memory.audio
    assert ("listener", 0) == (link.start["role"], link.start["resume"]["queued_ms"])


async def test_nobody_listens_outbound_and_nothing_is_kept(launch: Launch) -> None:
    async with RecordingService() as hearer:
        server = await launch(**echoing("a", a=listener(hearer)))
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            await hearer.connected()
            await call.speak(MULAW[:800])
            (stream,) = server.streams.values()
            assert stream.session.playout is not None
            assert stream.session.playout.outbound is None


# --- one listener, by itself ---------------------------------------------------------------------------------------------


class Speaker:
    """The line of the service that speaks."""

    session_id, provider, kind = "s", "p", "k"
    start = Start("MZ1", "CA1", media_format=MULAW_8K)
    log = structlog.get_logger()

    def report(self, code: str, message: str) -> None:
        raise AssertionError(code)


def make_line() -> tuple[ListenerLine, Overheard]:
    overheard = Overheard(MULAW_8K, capacity_ms=100, track=Track.INBOUND, everything=False)
    return ListenerLine(Speaker(), "x", overheard, None), overheard  # type: ignore[arg-type]


async def test_it_is_not_told_what_is_between_the_speaker_and_the_gateway() -> None:
    _, overheard = make_line()
    for event in (Fault("x"), Flow(FlowState.PAUSE, 1), Dtmf("1"), Stop()):
        overheard.offer(event)
    assert [Dtmf("1"), Stop()] == overheard.take_nowait()


async def test_refusals_are_bounded() -> None:
    line, overheard = make_line()
    for _ in range(10_000):
        line.perform(Clear(ref=1))
        line.perform(Audio(b"x"))
    assert 20_000 == line.refusals
    assert len(overheard.take_nowait()) <= 25
    assert (0, ()) == line.pending()


@pytest.mark.parametrize("error", [ServiceLost("gone"), ZeroDivisionError("bug"), asyncio.CancelledError()])
async def test_whatever_ends_a_link_ends_nothing_else(error: BaseException) -> None:
    class Broken:
        forwarded_bytes = 0

        def figures(self) -> LinkFigures:
            return LinkFigures("x", "serving")

        async def run(self) -> None:
            raise error

    class Channel:
        left = 0

        def subscribe(self, _: object) -> None: ...

        def unsubscribe(self, _: object) -> None:
            self.left += 1

    def link(_: Line) -> Any:
        return Broken()

    channel = Channel()
    async with asyncio.TaskGroup() as tasks:
        listeners = Listeners(Speaker(), channel, None, capacity_ms=100)  # type: ignore[arg-type]
        listeners.add(tasks, "x", EchoService(), link)
        await listeners.finish(1)
    assert 1 == channel.left
