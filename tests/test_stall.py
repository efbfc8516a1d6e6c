"""A carrier whose audio stops while its connection lives, and one that only looks like that: rows F13 and T1."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.frames import Opcode

from gateway import server
from gateway.server import Server
from gateway.stall import Stall
from tests.conftest import Launch
from tests.doubles import FRAMED, RAW, ConversationRelay, RecordingService, TwilioMedia
from tests.services.test_websocket import agent, ledger, logged, numbers
from tests.test_metrics import ADMIN, scrape

LOOK = server.STALL_LOOK_SECS


# --- without a socket --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last_audio", [0.01, 0.13, 0.24])
def test_three_seconds_are_told_once_within_a_quarter(last_audio: float) -> None:
    """`last_audio`: how long after a look."""
    stall, told = Stall(), []
    for look in range(1, 81):
        change = stall.look(160, 1, LOOK)
        if change is not None:
            told.append((change, look * LOOK - last_audio))
    ((change, after),) = told
    assert "stalled" == change
    assert 2.75 < after <= 3.25 + 1e-9


def test_each_stall_is_told_and_each_end_of_one() -> None:
    stall = Stall()
    looks = [*range(1, 5), *[4] * 20, 5, *[5] * 20, 6]
    assert ["stalled", "resumed"] * 2 == [change for audio in looks if (change := stall.look(audio, audio, LOOK))]


def test_whatever_else_the_carrier_says_is_a_sign_of_life_but_no_audio() -> None:
    stall = Stall()
    for frames in range(100):
        stall.look(0, frames, LOOK)
        assert stall.mute_secs <= LOOK
    assert stall.stalled
    assert 100 * LOOK == stall.silent_secs


# --- F13 ---------------------------------------------------------------------------------------------------------------------


async def until(done: Any, within: float = 10.0) -> float:
    """Seconds until it is so."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(within):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return loop.time() - began


async def test_f13_a_stall_is_told_after_three_seconds_and_its_end_as_well(launch: Launch, log: list[Any]) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)}, admin=ADMIN)
        assert 0 == (await scrape(gateway))["telephony_media_stalls_total", "twilio"]
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=False) as call:
            link = await service.connected()
            await call.speak(ledger(0, 5))
            took = await until(lambda: logged(log, "media_stalled"))
            assert 2.5 <= took < 5, "3 s, and the time that other tests take"
            await asyncio.sleep(3 * LOOK)
            (told,) = logged(log, "media_stalled")
            assert 2750 <= told["silent_ms"] <= 3500
            assert gateway.streams, "a pong is answer enough"
            await call.speak(ledger(5, 5))
            await until(lambda: logged(log, "media_resumed"))
            assert 1 == (await scrape(gateway))["telephony_media_stalls_total", "twilio"]
            await call.hangup()
            assert "caller_hangup" == (await link.wait_for("stop"))["reason"]
    assert 10 * 160 == len(link.audio) - 160 * sum(gap["lost_ms"] for gap in link.texts("gap")) // 20


async def test_f13_what_sends_nothing_at_all_is_ended(launch: Launch, log: list[Any]) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)}, stall_timeout_secs=1)
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=False) as call:
            link = await service.connected()
            await call.speak(ledger(0, 5))
            took = await until(lambda: link.texts("stop"))
            assert 0.9 <= took < 3
            assert "timeout" == link.texts("stop")[0]["reason"]
            await asyncio.wait_for(call.closed.wait(), 5)
            assert 1000 == call.close_code
    assert 1 == len(logged(log, "stall_timeout"))
    assert not gateway.streams


async def test_f13_a_carrier_that_says_what_it_plays_is_not_ended(launch: Launch, log: list[Any]) -> None:
    """As one does that sends no audio while its caller is muted."""
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)}, stall_timeout_secs=1)
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=False) as call:
            link = await service.connected()
            for beat in range(12):
                await link.send_audio(ledger(0, 5))
                await link.send(type="checkpoint", name=f"beat-{beat}")
                await asyncio.sleep(0.3)
            assert [] == link.texts("stop")
            assert 1 == len(logged(log, "media_stalled"))
            await call.hangup()
            assert "caller_hangup" == (await link.wait_for("stop"))["reason"]


async def test_f13_with_0_a_stall_never_ends_and_a_stream_of_text_never_stalls(launch: Launch, log: list[Any]) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)}, stall_timeout_secs=0)
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=False) as call:
            link = await service.connected()
            (stream,) = gateway.streams.values()
            for _ in range(1000):
                stream.look(10.0)
            assert not stream.session.over
            await call.hangup()
            await link.wait_for("stop")
    assert 1 == len(logged(log, "media_stalled"))
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)}, stall_timeout_secs=1)
        async with ConversationRelay(f"ws://127.0.0.1:{gateway.port}/relay/stream") as text:
            link = await service.connected()
            (stream,) = gateway.streams.values()
            stream.look(1000.0)
            assert not stream.session.over
            await text.hangup()
            await link.wait_for("stop")
    assert 1 == len(logged(log, "media_stalled"))


async def test_f13_our_own_standstill_is_no_stall_of_the_carriers(launch: Launch, log: list[Any]) -> None:
    """What came meanwhile waits in the socket, but the timer comes first."""
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)})
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=True) as call:
            link = await service.connected()
            await link.until(lambda: len(link.audio) > 800)
            gateway._looked_at -= 60  # as after a minute in which this process did not run
            await asyncio.sleep(2 * LOOK)
            assert [] == logged(log, "media_stalled")
            await call.hangup()
            await link.wait_for("stop")


# --- F14 ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secs", "replay_ms"), [(9, 10_000), (40, 60_000)])
async def test_f14_what_comes_at_once_after_a_stall_loses_nothing_that_fits_the_ring(
    launch: Launch, log: list[Any], secs: int, replay_ms: int
) -> None:
    """What does not is told, to the frame, like anything that a service is too slow for (D4)."""
    frames = 50 * secs
    async with RecordingService(subprotocol=FRAMED) as service:
        gateway = await launch(services={"agent": agent(service, replay_ms=replay_ms)})
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", pace="fast", line_silence=False) as call:
            link = await service.connected()
            await call.speak(ledger(0, 5))
            await until(lambda: logged(log, "media_stalled"))
            await call.speak(ledger(5, frames))
            await call.hangup()
            stop = await link.wait_for("stop")
    assert [*range(5 + frames)] == numbers(link.memory.audio)
    assert [] == link.texts("gap")
    assert 20 * (5 + frames) == stop["account"]["received"] == stop["account"]["forwarded"]


# --- T1: who is there, who is not --------------------------------------------------------------------------------------------


def never_pongs(call: TwilioMedia) -> None:
    protocol = call.ws.protocol
    send = protocol.send_frame
    protocol.send_frame = lambda frame: None if frame.opcode is Opcode.PONG else send(frame)  # type: ignore[method-assign]


async def live(gateway: Server, service: RecordingService, *, talks: bool, secs: float) -> bool:
    """Whether a carrier that never pongs is still there after a while."""
    async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=talks) as call:
        never_pongs(call)
        link = await service.connected()
        await asyncio.sleep(secs)
        alive = bool(gateway.streams) and not link.texts("stop")
        call.drop()
    return alive


@pytest.mark.parametrize("talks", [True, False])
async def test_t1_who_never_pongs_but_sends_audio_is_kept(launch: Launch, monkeypatch: pytest.MonkeyPatch, talks: bool) -> None:
    monkeypatch.setattr(server, "MEDIA_HEARTBEAT_SECS", 0.5)
    async with RecordingService(subprotocol=RAW) as service:
        assert talks is await live(await launch(services={"agent": agent(service)}), service, talks=talks, secs=2.5)
