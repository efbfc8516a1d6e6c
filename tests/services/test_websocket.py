"""Services that fail, stall and return, behind real calls: the faults D1 to D10 by their ids, and what is lost, exactly.

The caller's audio is a ledger: each 20 ms frame says its own number, so that lost, doubled or changed is seen at once.

What can't be had on every machine that runs the tests is played by something that looks the same from the gateway:

| fault | here | because |
|---|---|---|
| D1 a blackholed address | a listener that never answers the handshake | needs a network namespace; one deadline covers both |
| D1, D9 name servers that fail or change | a resolver of ours in the dialler; a name under .invalid | needs a name server |
| D2 1,000 kills over 100 calls | `test_kill.py`, two kills over twenty calls; the long form on demand | a minute |
| D5 1 of 100 stalled, resident memory | `test_slow.py`, one of twenty, by bytes held | a process's memory is no one call's |
| D10 a balancer before two instances | a relay of ten lines | needs HAProxy |
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from websockets.exceptions import ConnectionClosed

from gateway.server import Server
from gateway.services import dialler, websocket
from gateway.settings import WebsocketService
from tests.conftest import Launch
from tests.doubles import FRAMED, RAW, ConversationRelay, RecordingService, TwilioMedia
from tests.doubles.service import DISCONTINUITY, HEADER, LAST, REPLAYED, SILENCE, Memory
from tests.test_end_to_end import played, stream_url

MULAW = {"encoding": "mulaw", "sample_rate": 8000}
PCM48 = {"encoding": "pcm_s16le", "sample_rate": 48000}
NOBODY = "ws://127.0.0.1:9/"


def ledger(first: int, count: int) -> bytes:
    """Frames of 20 ms whose samples say which one each is."""
    return b"".join(index.to_bytes(4, "little") * 40 for index in range(first, first + count))


def numbers(audio: bytes) -> list[int]:
    """Which frames of the ledger these are."""
    frames = [audio[at : at + 160] for at in range(0, len(audio), 160)]
    indices = [int.from_bytes(frame[:4], "little") for frame in frames]
    assert [index.to_bytes(4, "little") * 40 for index in indices] == frames
    return indices


def agent(service: RecordingService | str, **options: Any) -> dict[str, object]:
    url = service if isinstance(service, str) else service.url
    return {"kind": "websocket", "url": url, "media_format": MULAW, **options}


def caller(server: Server, **options: Any) -> TwilioMedia:
    return TwilioMedia(stream_url(server, "twilio"), **options)


@asynccontextmanager
async def speaking(call: TwilioMedia, frames: int) -> AsyncIterator[None]:
    """The caller says so many frames of the ledger, without a pause, and then hangs up."""
    async with asyncio.TaskGroup() as tasks:
        talk = tasks.create_task(call.speak(ledger(0, frames)))
        yield
        await talk
        await call.hangup()


def logged(log: list[Any], event: str) -> list[Any]:
    return [entry for entry in log if entry["event"] == event]


def balanced(stop: dict[str, Any], received_ms: int) -> None:
    account = stop["account"]
    assert received_ms == account["received"] == account["forwarded"] + account["dropped"]


# --- D1: down at the start of the call ---


@pytest.mark.parametrize("mode", [FRAMED, RAW])
async def test_d1_down_at_the_start_and_up_a_little_later(launch: Launch, mode: str) -> None:
    async with RecordingService(subprotocol=mode) as service:
        await service.down()
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 40):
            await asyncio.sleep(0.4)
            await service.up()
            link = await service.connected()
        stop = await link.wait_for("stop")
    audio = link.memory.audio if mode == FRAMED else link.audio
    assert [*range(40)] == numbers(audio)
    assert [] == link.texts("gap")
    balanced(stop, 800)
    assert [] == service.violations


@pytest.mark.parametrize("how", ["refused", "blackholed", "dialect"])
async def test_d1_a_caller_who_hangs_up_while_the_service_is_dialled_is_gone_at_once(
    launch: Launch, log: list[Any], how: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, and never answers
        url = NOBODY if how == "refused" else f"ws://127.0.0.1:{mute.getsockname()[1]}/"
        dialect = {"dialect": "twilio_media_streams"} if how == "dialect" else {"media_format": MULAW}
        server = await launch(services={"agent": {"kind": "websocket", "url": url, "connect_timeout_secs": 30, **dialect}})
        async with caller(server) as call:
            await call.speak(ledger(0, 20))
            (stream,) = server.streams.values()
            await call.hangup()
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(10):
            while server.streams:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() - began < 1, "not the two seconds that a service has for the end"
    assert stream.session.over
    (ended,) = logged(log, "stream_ended")
    assert ("caller_hangup", 3200, 0) == (ended["reason"], ended["dropped_samples"], ended["forwarded_samples"])


async def test_d1_busy_for_a_moment_is_tried_again(launch: Launch) -> None:
    async with RecordingService(refuse=[503, 500, 429]) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            link = await service.connected()
            await call.hangup()
            await link.wait_for("stop")
    assert 4 == len(service.attempts)


@pytest.mark.parametrize("status", [401, 403, 404, 426])
@pytest.mark.allow_errors("service_lost")
async def test_d1_a_refusal_for_good_is_not_tried_again(launch: Launch, log: list[Any], status: int) -> None:
    async with RecordingService(refuse=status) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            await call.wait_closed()
    assert 1 == len(service.attempts)
    assert f"HTTP {status}" in logged(log, "service_lost")[0]["error"]


@asynccontextmanager
async def silent_listener() -> AsyncIterator[str]:
    """Accepts connections and says nothing."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("down", "why"),
    [
        pytest.param(NOBODY, "can't connect", id="refused"),
        pytest.param("silent", "within 0.2 s", id="blackhole"),
        pytest.param("ws://no-such-host.invalid/", "no-such-host", id="unknown-name"),
        pytest.param("tls", "can't connect", id="no-tls-there"),
        pytest.param("401", "HTTP 401", id="refused-for-good"),
        pytest.param("4029", "", id="full"),
        pytest.param("4404", "", id="not-for-this-service"),
        pytest.param("4003", "", id="no-common-mode"),
        pytest.param("silent-ready", "", id="never-ready"),
    ],
)
async def test_d1_services_are_tried_in_order(
    launch: Launch, log: list[Any], monkeypatch: pytest.MonkeyPatch, down: str, why: str
) -> None:
    """The second one gets the call with the caller's audio from the first sample on."""
    monkeypatch.setattr(websocket, "READY_SECS", 0.2)

    async def close(link: Any) -> None:
        await link.wait_for("start")
        await link.close(int(down))

    first = RecordingService(
        refuse=401 if down == "401" else None,
        script=close if down in ("4029", "4404") else None,
        subprotocol="chat" if down == "4003" else FRAMED if down == "silent-ready" else None,
        answer="silent",
    )
    async with silent_listener() as silent, first, RecordingService() as second:
        url = {"silent": silent, "tls": first.url.replace("ws:", "wss:")}.get(down, down)
        services = {
            "one": agent(url if url.startswith("ws") else first, connect_timeout_secs=0.2),
            "two": agent(second),
        }
        server = await launch(services=services, routes=[{"service": ["one", "two"]}])
        async with caller(server) as call:
            await call.speak(ledger(0, 30))
            link = await second.connected()
            await call.hangup()
            await link.wait_for("stop")
    assert [*range(30)] == numbers(link.audio)
    assert 1 == len(second.links)
    assert [] == logged(log, "service_lost")


@pytest.mark.allow_errors("service_lost")
async def test_d1_nobody_there_ends_the_call_with_a_reason(launch: Launch, log: list[Any]) -> None:
    services = {"one": agent(NOBODY, give_up_secs=0.4), "two": agent("ws://no-such-host.invalid/")}
    server = await launch(services=services, routes=[{"service": ["one", "two"]}])
    async with caller(server) as call:
        await call.wait_closed()
    (lost,) = logged(log, "service_lost")
    assert ["one", "two"] == lost["services"]
    assert "service_lost" == logged(log, "stream_ended")[0]["reason"]


@pytest.mark.allow_errors("service_lost")
async def test_d1_the_echo_steps_in_when_no_service_does(launch: Launch) -> None:
    services = {"one": agent(NOBODY, give_up_secs=0.2), "echo": {"kind": "echo"}}
    server = await launch(services=services, routes=[{"service": ["one", "echo"]}])
    async with caller(server) as call:
        await call.speak(ledger(0, 25))
        await asyncio.sleep(0.3)
        await call.hangup()
    assert [*range(25)] == numbers(played(call))


# --- D2: dies in mid-call ---


async def test_d2_a_service_that_dies_in_mid_call_loses_nothing(launch: Launch, log: list[Any]) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 75):
            for n in range(2):
                await asyncio.sleep(0.3)
                await service.down()
                await call.digits(str(n))
                await asyncio.sleep(0.1)
                await service.up()
                await service.connected(2 + n)
        await service.link.wait_for("stop")
    (memory,) = service.memories.values()
    assert [*range(75)] == numbers(memory.audio)
    assert [] == memory.told("gap")
    assert ["0", "1"] == [text["digits"] for text in memory.told("dtmf")]
    balanced(memory.told("stop")[0], 1500)
    resumed = [link for link in service.links if link.start["resume"]]
    assert 2 == len(resumed) == len(logged(log, "service_back"))
    for link in resumed:
        resume = link.start["resume"]
        assert link.start["session"] == resume["session"]
        assert resume["oldest"] <= resume["next"]
        late = [frame for frame in link.frames if frame.flags & REPLAYED]
        assert late == link.frames[: len(late)]
        assert resume["next"] - 1 <= late[-1].seq  # what was heard between resuming and `ready` is late too
    assert [] == service.violations


async def test_d2_the_last_words_of_a_call_are_delivered_after_the_return(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            async with speaking(call, 20):
                await asyncio.sleep(0.2)
                await service.down()
            await service.up()
            await (await service.connected(2)).wait_for("stop")
    (memory,) = service.memories.values()
    assert [*range(20)] == numbers(memory.audio)


async def test_d2_a_service_that_says_1000_is_done_and_one_that_vanishes_is_not(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            (await service.connected()).ws.transport.close()  # the end of the connection without a close frame
            await (await service.connected(2)).close(1000)
            await call.wait_closed()
    assert 2 == len(service.links)


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013, 4009, 3456])
async def test_d2_close_codes_that_bring_us_back(launch: Launch, code: int) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            await (await service.connected()).close(code)
            link = await service.connected(2)
            await call.hangup()
            await link.wait_for("stop")


@pytest.mark.parametrize("code", [1008, 4400, 4001, 4003, 4404, 4409])
@pytest.mark.allow_errors("service_lost")
async def test_d2_close_codes_that_do_not(launch: Launch, log: list[Any], code: int) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            await (await service.connected()).close(code)
            await call.wait_closed()
    assert 1 == len(service.links)
    assert f"code {code}" in logged(log, "service_lost")[0]["error"]


# --- D3: flapping ---


async def test_d3_a_flapping_service_is_not_stormed_and_loses_nothing(launch: Launch) -> None:
    calls = 5
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with asyncio.TaskGroup() as tasks:
            lines = [caller(server, seed=n) for n in range(calls)]

            async def talk(line: TwilioMedia) -> None:
                async with line as call:
                    await call.speak(ledger(0, 300))
                    await up.wait()
                    await call.hangup()

            up = asyncio.Event()
            for line in lines:
                tasks.create_task(talk(line))
            for _ in range(12):
                await asyncio.sleep(0.3)
                await service.down()
                await asyncio.sleep(0.2)
                await service.up()
            dials, seen = server.house.dialler.dials, len(service.attempts)
            secs = asyncio.get_running_loop().time() - service.attempts[0]
            await service.link.until(lambda: [300] * calls == [len(each.frames) for each in service.memories.values()], 8)
            up.set()
    assert all([*range(300)] == numbers(memory.audio) for memory in service.memories.values())
    assert seen / calls <= secs, "once a second; what that comes to over longer is in test_retry.py"
    assert dials / calls / secs <= 4, "with those that nobody answered"
    assert [] == service.violations


# --- D4: longer than the ring ---


async def test_d4_an_outage_longer_than_the_ring_is_one_gap_exact_to_the_frame(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service, replay_ms=500)})
        async with caller(server) as call, speaking(call, 80):
            link = await service.connected()
            await link.until(lambda: len(link.frames) == 15)
            await service.down()
            await asyncio.sleep(1.0)
            await service.up()
            link = await service.connected(2)
        stop = await link.wait_for("stop")
    (memory,) = service.memories.values()
    got = numbers(memory.audio)
    first = link.frames[0].seq
    assert 30 < first < 75
    assert [*range(15), *range(first, 80)] == got
    assert [{"type": "gap", "track": "inbound", "lost_ms": 20 * (first - 15), "reason": "resume"}] == memory.told("gap")
    assert [first] == [frame.seq for frame in link.frames if frame.flags & DISCONTINUITY]
    balanced(stop, 1600)
    assert 20 * (first - 15) == stop["account"]["dropped"]
    assert [] == service.violations


# --- D5: slow ---


@pytest.mark.parametrize("mode", [FRAMED, RAW])
async def test_d5_a_stalled_service_is_told_dropped_for_and_redialled(launch: Launch, log: list[Any], mode: str) -> None:
    """What waits is bounded by the ring and 128 KiB; another call on the same gateway loses nothing and waits for nothing."""
    async with RecordingService(subprotocol=mode, small_buffers=True) as slow, RecordingService() as good:
        services = {"slow": agent(slow, media_format=PCM48, replay_ms=1000), "good": agent(good)}
        routes = [{"provider": "twilio", "service": "slow"}, {"service": "good"}]
        providers = {name: {"kind": "twilio_media_streams", "auth": "none"} for name in ("twilio", "other")}
        server = await launch(services=services, routes=routes, providers=providers)
        async with caller(server) as call, TwilioMedia(stream_url(server, "other")) as other, speaking(other, 200):
            async with speaking(call, 200):
                link = await slow.connected()
                await link.until(lambda: link.audio or link.frames)
                link.stall()
                (here,) = (link for stream in server.streams.values() if stream.provider == "twilio" for link in stream._links)
                assert isinstance(here, websocket.WebsocketLink)
                most = 0

                def redialled() -> bool:
                    nonlocal most
                    if here._connection is not None:
                        most = max(most, here._ring.audio_bytes + here._connection.socket.transport.get_write_buffer_size())
                    return len(slow.links) == 2

                await link.until(redialled)
                link.resume()
            link = await slow.connected(2)
            stop = await link.wait_for("stop")
        ok = good.link
        await ok.wait_for("stop")
    assert [*range(200)] == numbers(ok.audio)
    arrived = [message.at for message in ok.messages if isinstance(message.payload, bytes)]
    assert max(b - a for a, b in pairwise(arrived)) < 0.15
    assert 96_000 <= most <= 96_000 + 128 * 1024
    assert 1 == len(logged(log, "service_slow"))
    assert "4009" in str(logged(log, "service_away")[0]["error"]) or "took nothing" in logged(log, "service_away")[0]["error"]
    (gap,) = [text for each in slow.links for text in each.texts("gap") if text["reason"] in ("overflow", "resume")]
    assert stop["account"]["dropped"] == gap["lost_ms"] > 0
    balanced(stop, 4000)


async def test_d5_a_service_that_pauses_is_told_the_gaps_of_what_did_not_fit(launch: Launch, log: list[Any]) -> None:
    async with RecordingService(small_buffers=True) as service:
        server = await launch(services={"agent": agent(service, media_format=PCM48, replay_ms=600)})
        async with caller(server) as call, speaking(call, 160):
            link = await service.connected()
            link.stall()
            for _ in range(6):  # reads a few kilobytes now and then
                await asyncio.sleep(0.4)
                link.resume()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                link.stall()
            link.resume()
        stop = await link.wait_for("stop")
    gaps = link.texts("gap")
    assert {"overflow"} == {gap["reason"] for gap in gaps}
    lost_ms = sum(gap["lost_ms"] for gap in gaps)
    assert lost_ms == stop["account"]["dropped"] >= 200
    balanced(stop, 3200)
    # Every sample that was not dropped arrived: 48 of them a millisecond, two more milliseconds of the filter.
    assert 3200 - lost_ms <= len(link.audio) / 96 <= 3205 - lost_ms
    assert 1 == len(service.links)


async def test_d5_a_call_that_ends_does_not_wait_for_a_stalled_service(launch: Launch) -> None:
    async with RecordingService(small_buffers=True) as service:
        server = await launch(services={"agent": agent(service, media_format=PCM48)})
        async with caller(server, pace="fast") as call:
            link = await service.connected()
            link.stall()
            await call.speak(ledger(0, 100))
            await asyncio.sleep(0.1)
            (here,) = (link for stream in server.streams.values() for link in stream._links)
            assert isinstance(here, websocket.WebsocketLink)
            connection = here._connection
            assert connection is not None
            await call.hangup()
        async with asyncio.timeout(3):
            while server.streams or not connection.socket.transport.is_closing():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert 0 == connection.socket.transport.get_write_buffer_size()


# --- D6: rubbish ---


async def rubbish_json(link: Any) -> None:
    for n in range(2000):
        await link.raw("{" if n % 2 else '{"type": "sing", "id": "x"}', text=True)


async def rubbish_huge(link: Any) -> None:
    await link.ws.send(bytes(10 * 2**20))
    await link.ws.send("x" * 10 * 2**20)


async def rubbish_flood(link: Any) -> None:
    for _ in range(200):
        await link.ws.send(bytes(32_000))


async def rubbish_commands(link: Any) -> None:
    for n in range(20):
        await link.send(type="say", text="hello", id=n)


async def rubbish_odd(link: Any) -> None:
    await link.raw(b"\0")
    for n in range(2, 40):
        await link.raw(bytes(n))


@pytest.mark.parametrize("mode", [FRAMED, RAW])
@pytest.mark.parametrize(
    ("rubbish", "codes"),
    [
        (rubbish_json, {"malformed_command"}),
        (rubbish_huge, {"message_too_large", "malformed_command"}),
        (rubbish_flood, {"playout_overflow"}),
        (rubbish_commands, {"unsupported_command"}),
        (rubbish_odd, set()),
    ],
)
async def test_d6_rubbish_is_answered_and_the_callers_audio_untouched(
    launch: Launch, mode: str, rubbish: Any, codes: set[str]
) -> None:
    async with RecordingService(subprotocol=mode) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 60):
            link = await service.connected()
            await link.wait_for("start")
            await rubbish(link)
        stop = await link.wait_for("stop")
    audio = link.memory.audio if mode == FRAMED else link.audio
    assert [*range(60)] == numbers(audio)
    faults = link.texts("fault")
    expected = {"malformed_audio", "message_too_large", "malformed_command"} if mode == FRAMED else codes
    if mode == FRAMED and rubbish is not rubbish_flood:
        expected |= codes
    assert codes <= {fault["code"] for fault in faults} or mode == FRAMED
    assert {fault["code"] for fault in faults} <= expected
    assert len(faults) <= 20 + 20 * 2
    if rubbish is rubbish_commands:
        assert [*range(20)] == [fault["ref"] for fault in faults]
    balanced(stop, 1200)
    assert 1 == len(service.links)


async def test_d6_a_message_beyond_all_bounds_closes_the_connection_and_we_come_back(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 50):
            link = await service.connected()
            await link.wait_for("start")
            with suppress(ConnectionClosed):
                await link.ws.send(bytes(17 * 2**20))
            link = await service.connected(2)
        await link.wait_for("stop")
    (memory,) = service.memories.values()
    assert [*range(50)] == numbers(memory.audio)
    assert "message_too_large" == memory.told("fault")[0]["code"]
    assert 1009 == service.links[0].close_code


async def test_d6_a_flood_of_audio_is_paused_then_refused(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": agent(service)}, capacity_ms=4000)
        async with caller(server) as call:
            link = await service.connected()
            await link.wait_for("start")
            await link.send_audio(bytes(8000 * 100), frame_bytes=160)
            fault = await link.wait_for("fault")
            flow = await link.wait_for("flow")
            await link.send(type="clear")
            await link.wait_for("clear")
            await call.hangup()
    assert "playout_overflow" == fault["code"]
    assert "pause" == flow["state"]


# --- D7 to D10: who has the call ---


async def test_d7_a_half_dead_connection_has_no_say_once_there_is_a_newer_one(launch: Launch) -> None:
    """The gateway dials, so no two services can claim a call; the old connection is closed before the new one is made."""
    async with RecordingService(subprotocol=FRAMED, small_buffers=True) as service:
        server = await launch(services={"agent": agent(service, media_format=PCM48, replay_ms=200)})
        async with caller(server) as call, speaking(call, 100):
            old = await service.connected()
            await old.wait_for("start")
            old.stall()
            new = await service.connected(2, timeout=4)
            await new.wait_for("start")
            await old.play(b"\x10\x20" * 480)
            await old.send(type="checkpoint", name="late")
            await asyncio.sleep(0.1)
            old.resume()
            await old.until(old.closed.is_set)
        await new.wait_for("stop")
    assert b"" == played(call)
    assert old.close_code in (4009, 1006)
    assert [] == [text for each in service.links for text in each.texts("checkpoint")]


@pytest.mark.parametrize(
    ("answer", "lost"), [(None, True), ("oldest", False), (0, False)], ids=["live", "all-unacknowledged", "from-the-first"]
)
async def test_d8_a_service_without_memory_chooses_where_to_go_on(launch: Launch, answer: Any, lost: bool) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 60):
            first = await service.connected()
            await first.until(lambda: len(first.frames) >= 15)
            await service.down()
            service.memories.clear()
            service.answer = answer
            await asyncio.sleep(0.2)
            await service.up()
            link = await service.connected(2)
        await link.wait_for("stop")
    (memory,) = service.memories.values()
    got = numbers(memory.audio)
    assert [*range(got[0], 60)] == got
    acked = 10
    if lost:
        (gap,) = memory.told("gap")
        assert {"type": "gap", "track": "inbound", "lost_ms": 20 * (got[0] - acked), "reason": "resume"} == gap
        assert got[0] > 15
    elif answer == "oldest":
        assert acked == got[0]
        assert [] == memory.told("gap")
    else:
        (gap,) = memory.told("gap")
        assert (acked, 20 * acked) == (got[0], gap["lost_ms"])
    assert [] == service.violations


class Names(aiohttp.abc.AbstractResolver):
    """A name server of ours."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
        self.asked += 1
        if not self.addresses:
            raise OSError(None, "the name servers are down")
        return [
            {"hostname": host, "host": address, "port": port, "family": 2, "proto": 0, "flags": 0} for address in self.addresses
        ]

    async def close(self) -> None:
        pass


async def test_d9_every_address_is_tried_and_the_last_good_ones_serve_without_dns() -> None:
    names = Names("127.0.0.2", "127.0.0.1")
    async with RecordingService() as service:
        settings = WebsocketService(url=service.url.replace("127.0.0.1", "agent.internal"))
        subject = dialler.Dialler("test", resolver=names)
        try:
            await (await subject.dial("agent", settings)).close()
            names.addresses = []
            await (await subject.dial("agent", settings)).close()
            assert 2 == names.asked, "asked anew each time"
            elsewhere = WebsocketService(url="ws://nowhere.internal/")
            with pytest.raises(dialler.Unreachable, match="name servers are down"):
                await subject.dial("elsewhere", elsewhere)
        finally:
            await subject.close()


async def test_d10_another_instance_takes_the_call_over(launch: Launch) -> None:
    """Two instances that share what they know, behind a balancer that forwards to the one that lives."""
    memories: dict[str, Memory] = {}
    one = RecordingService(subprotocol=FRAMED, memories=memories)
    two = RecordingService(subprotocol=FRAMED, memories=memories)
    async with one, two:
        target = one

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                try:
                    while data := await source.read(65536):
                        sink.write(data)
                except ConnectionError:
                    pass
                finally:
                    sink.close()

            there, out = await asyncio.open_connection("127.0.0.1", target.port)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pipe(there, writer))
                tasks.create_task(pipe(reader, out))

        balancer = await asyncio.start_server(forward, "127.0.0.1", 0)
        async with balancer:
            server = await launch(services={"agent": agent(f"ws://127.0.0.1:{balancer.sockets[0].getsockname()[1]}/")})
            async with caller(server) as call, speaking(call, 50):
                await one.connected()
                await asyncio.sleep(0.3)
                target = two
                one.drop_all()
                link = await two.connected()
            await link.wait_for("stop")
    (memory,) = memories.values()
    assert [*range(50)] == numbers(memory.audio)
    assert (1, 1) == (len(one.links), len(two.links))


# --- playback while the service is away ---


async def test_playback_goes_on_and_frames_sent_again_are_taken_once(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call:
            link = await service.connected()
            await link.wait_for("start")
            await link.play(ledger(0, 40), frame_bytes=160)
            await link.send(type="checkpoint", name="a")
            await link.play(ledger(40, 40), frame_bytes=160)
            await link.send(type="checkpoint", name="b")
            ack = await link.wait_for("ack")
            await service.down()
            await asyncio.sleep(0.9)
            await service.up()
            link = await service.connected(2)
            await link.wait_for("start")
            for seq in range(60, 90):
                await link.put(seq, ledger(seq, 1))
            await link.send(type="checkpoint", name="c")
            await link.until(lambda: len(service.memories[link.start["session"]].told("checkpoint")) == 3)
            await call.hangup()
            await link.wait_for("stop")
    assert 79 == ack["seq"]
    resume = link.start["resume"]
    assert (80, ["b"]) == (resume["next_out"], resume["checkpoints"])
    assert 300 <= resume["queued_ms"] <= 800
    (memory,) = service.memories.values()
    assert [("a", "played", 800), ("b", "played", 800), ("c", "played", 200)] == [
        (text["name"], text["outcome"], text["played_ms"]) for text in memory.told("checkpoint")
    ]
    assert [*range(90)] == numbers(played(call))
    assert [] == call.violations


async def test_playback_is_cleared_if_the_service_is_configured_so(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service, on_away="clear")})
        async with caller(server) as call:
            link = await service.connected()
            await link.wait_for("start")
            await link.play(ledger(0, 100), frame_bytes=160)
            await link.send(type="checkpoint", name="a")
            await asyncio.sleep(0.3)
            link.drop()
            link = await service.connected(2)
            checkpoint = await link.wait_for("checkpoint")
            clear = await link.wait_for("clear")
            await call.hangup()
    assert ("a", "cleared") == (checkpoint["name"], checkpoint["outcome"])
    assert 1500 <= clear["cleared_ms"]
    assert 1 == len(call.ear.clears)


# --- raw mode ---


async def test_raw_mode_comes_back_live_and_tells_what_was_missed(launch: Launch) -> None:
    async with RecordingService() as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server) as call, speaking(call, 70):
            first = await service.connected()
            await first.until(lambda: len(first.audio) >= 160 * 15)
            await service.down()
            await call.digits("7")
            await asyncio.sleep(0.5)
            await service.up()
            link = await service.connected(2)
        stop = await link.wait_for("stop")
    before, after = numbers(first.audio), numbers(link.audio)
    assert [*range(len(before))] == before
    assert [*range(after[0], 70)] == after
    assert ["start", "dtmf", "gap"] == [text["type"] for text in link.texts()][:3]
    missed = 20 * (after[0] - len(before))
    assert [{"type": "gap", "track": "inbound", "lost_ms": missed, "reason": "resume"}] == link.texts("gap")
    assert missed == stop["account"]["dropped"]
    balanced(stop, 1400)
    assert link.start["resume"] is None
    assert [] == service.violations


# --- lists of services in mid-call ---


async def test_the_next_service_takes_over_when_the_first_stays_away(launch: Launch, log: list[Any]) -> None:
    """It speaks another format and mode, and gets what the first one has not acknowledged."""
    pcm = {"encoding": "alaw", "sample_rate": 8000}
    async with RecordingService(subprotocol=FRAMED) as one, RecordingService() as two:
        services = {"one": agent(one, give_up_secs=0.3), "two": agent(two, media_format=pcm)}
        server = await launch(services=services, routes=[{"service": ["one", "two"], "on_lost": "next"}])
        async with caller(server) as call, speaking(call, 80):
            link = await one.connected()
            await link.until(lambda: len(link.frames) >= 25)
            await one.down()
            link = await two.connected()
        stop = await link.wait_for("stop")
    assert 160 * 60 == len(link.audio), "all but the twenty frames that were acknowledged"
    assert "alaw" == link.start["media_format"]["encoding"]
    assert 1600 == stop["account"]["forwarded"]
    balanced(stop, 1600)
    assert ("one", "two") == (logged(log, "service_replaced")[0]["service"], logged(log, "service_replaced")[0]["by"])
    assert [] == two.violations


@pytest.mark.allow_errors("service_lost")
async def test_a_call_whose_service_stays_away_ends(launch: Launch, log: list[Any]) -> None:
    async with RecordingService() as one, RecordingService() as two:
        services = {"one": agent(one, give_up_secs=0.3), "two": agent(two)}
        server = await launch(services=services, routes=[{"service": ["one", "two"]}])
        async with caller(server) as call:
            await one.connected()
            await one.down()
            await call.wait_closed()
    assert [] == two.links
    assert "service_lost" == logged(log, "stream_ended")[0]["reason"]


# --- framed mode, in detail ---


async def test_silence_for_a_hole_is_flagged_and_the_last_frame_too(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with caller(server, pace="fast") as call:
            link = await service.connected()
            await link.wait_for("start")
            await call.speak(ledger(0, 5))
            await call.gap(100)
            await call.speak(ledger(5, 5) + b"\x01" * 80)
            await call.hangup()
            await link.wait_for("stop")
    flags = [frame.flags for frame in link.frames]
    assert [0] * 5 + [SILENCE] * 5 + [0] * 5 == flags[:15]
    assert [160 * n for n in range(len(flags))] == [frame.pos for frame in link.frames]
    assert [] == service.violations


async def test_the_end_of_an_utterance_plays_out_at_once_and_headers_are_checked(launch: Launch) -> None:
    pcm16 = {"encoding": "pcm_s16le", "sample_rate": 16000}
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service, media_format=pcm16)})
        async with caller(server) as call:
            link = await service.connected()
            await link.wait_for("start")
            await link.play(bytes(640 * 4), frame_bytes=640)
            await link.play(bytes(640), frame_bytes=640, flags=LAST)
            for bad in (b"", b"\x11", b"\x21" + bytes(17), b"\x11\x07" + bytes(16), HEADER.pack(0x11, 1, 0, 5, 0) + b"odd"):
                await link.raw(bad)
            await link.send(type="ready", next=0, id="again")
            await link.send(type="ack", seq=10**6, id="beyond")
            faults = [await link.wait_for("fault", count=n + 1) for n in range(7)]
            await call.hangup()
            await link.wait_for("stop")
    assert ["malformed_audio"] * 5 + ["malformed_command"] * 2 == [fault["code"] for fault in faults]
    assert ["again", "beyond"] == [fault["ref"] for fault in faults[5:]]
    assert 160 * 5 <= len(played(call)) <= 160 * 5 + 40


async def test_a_text_stream_is_taken_up_again_too(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service:
        server = await launch(services={"agent": agent(service)})
        async with ConversationRelay(stream_url(server, "relay"), characters_per_second=200) as call:
            link = await service.connected()
            await call.says("One.")
            await link.wait_for("transcript")
            await service.down()
            await call.says("Two.")
            await service.up()
            link = await service.connected(2)
            await link.wait_for("transcript", count=2)
            await link.send(type="say", text="Three.")
            await link.send(type="checkpoint", name="c")
            await link.wait_for("checkpoint")
            await call.hangup()
            await link.wait_for("stop")
    (memory,) = service.memories.values()
    assert ["One.", "Two."] == [text["text"] for text in memory.told("transcript")]
    assert [True, True] == [text.get("replayed") for text in link.texts("transcript")]
    assert [] == service.violations


# --- S5 ---


@pytest.mark.allow_errors("service_lost")
async def test_s5_no_redirect_is_followed(launch: Launch, log: list[Any]) -> None:
    async with RecordingService() as elsewhere:

        async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            location = elsewhere.url.replace("ws:", "http:").encode()
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        listener = await asyncio.start_server(redirect, "127.0.0.1", 0)
        async with listener:
            url = f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
            server = await launch(services={"agent": agent(url)})
            async with caller(server) as call:
                await call.wait_closed()
    assert [] == elsewhere.attempts
    assert "redirect" in logged(log, "service_lost")[0]["error"]
