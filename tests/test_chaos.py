"""The chaos proxy itself, and calls through it: the rows of the fault table that a bad network is to blame for, by their ids.

The caller's audio is a ledger: each 20 ms says its own number. What can't be had without a network namespace is played by
something that looks the same from the gateway: a half-open connection is one whose bytes vanish in the proxy.
"""

from __future__ import annotations

import asyncio
import json
import signal
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from gateway import cli
from gateway.chaos import REORDER_WINDOW, Accidents, Chaos
from gateway.chaos.messages import Frames
from gateway.chaos.plan import Faults, Plan
from gateway.server import Server
from tests.conftest import Launch
from tests.doubles import FRAMED, RAW, ConversationRelay, RecordingService, TwilioMedia
from tests.services.test_websocket import agent, balanced, ledger, logged, numbers
from tests.test_doctor import free_port
from tests.test_end_to_end import played

MEDIA = '"event":"media"'
SILENCE = b"\xff" * 160


def frame(payload: bytes, opcode: int = 2, *, mask: bytes = b"", final: bool = True) -> bytes:
    length = len(payload)
    short = (
        bytes([length])
        if length < 126
        else b"\x7e" + struct.pack(">H", length)
        if length < 65536
        else b"\x7f" + struct.pack(">Q", length)
    )
    head = bytes([0x80 * final | opcode, short[0] | (0x80 if mask else 0)]) + short[1:]
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if mask else payload
    return head + mask + masked


# --- messages, without a network -------------------------------------------------------------------------------------------


@settings(deadline=None)  # other tests run beside this one
@given(
    st.lists(st.tuples(st.binary(max_size=300), st.sampled_from([b"", b"\1\2\3\4"])), min_size=1, max_size=8),
    st.lists(st.integers(1, 400), max_size=20),
)
def test_any_cutting_gives_the_same_messages(messages: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    wire = b"".join(frame(payload, mask=mask) for payload, mask in messages)
    frames, found, at = Frames(), [], 0
    for size in [*cuts, len(wire)]:
        found += [*frames.feed(wire[at : at + size])]
        at += size
    found += [*frames.feed(wire[at:])]
    assert [payload for payload, _ in messages] == [message.payload() for message in found]
    assert wire == b"".join(message.raw for message in found) + frames.rest


def test_fragments_are_one_message_and_control_frames_pass_between_them() -> None:
    wire = [frame(b"one ", 1, final=False), frame(b"", 9), frame(b"two", 0)]
    ping, whole = Frames().feed(b"".join(wire))
    assert (True, b"") == (ping.control, ping.payload())
    assert (1, b"one two", wire[0] + wire[2]) == (whole.opcode, whole.payload(), whole.raw)


@pytest.mark.parametrize("size", [0, 5, 125, 126, 65535, 65536])
def test_lengths_of_every_form(size: int) -> None:
    (message,) = Frames().feed(frame(bytes(size), mask=b"abcd"))
    assert bytes(size) == message.payload()


@pytest.mark.parametrize("mask", [b"", b"\x9a\x01\xff\x00"])
@pytest.mark.parametrize("opcode", [1, 2])
def test_one_byte_is_changed_and_text_stays_text(opcode: int, mask: bytes) -> None:
    text = b'{"event":"media","x":"e"}'
    (message,) = Frames().feed(frame(text, opcode, mask=mask))
    for seed in range(50):
        (again,) = Frames().feed(message.corrupted(Random(seed)))
        assert 1 == sum(a != b for a, b in zip(text, again.payload(), strict=True))
        if opcode == 1:
            again.payload().decode()


def meet(faults: Faults, count: int = 400, seed: int = 1) -> tuple[list[int], list[str]]:
    did: list[str] = []
    accidents, out = Accidents(Random(seed), did.append), []
    for number in range(count):
        raw = frame(number.to_bytes(4, "big"))
        (message,) = Frames().feed(raw)
        out += [*accidents.meet(message, faults)]
    out += accidents.flush()
    return [int.from_bytes(next(Frames().feed(raw)).payload(), "big") for raw in out], did


def test_accidents_are_seeded_and_what_they_say() -> None:
    assert meet(Faults(drop=0.1)) == meet(Faults(drop=0.1))
    assert meet(Faults(drop=0.1)) != meet(Faults(drop=0.1), seed=2)
    out, did = meet(Faults(drop=0.1))
    assert 400 == len(out) + len(did)
    assert 20 < len(did) < 60
    out, did = meet(Faults(duplicate=0.1))
    assert [*range(400)] == sorted({*out}) == [number for at, number in enumerate(out) if number not in out[:at]]
    assert 400 + len(did) == len(out)
    out, did = meet(Faults(reorder=0.1))
    assert [*range(400)] == sorted(out) != out
    assert {"reordered"} == {*did}
    assert max(abs(at - number) for at, number in enumerate(out)) <= 2 * REORDER_WINDOW


def test_what_does_not_match_is_left_alone_and_nothing_is_overtaken_by_the_end() -> None:
    accidents = Accidents(Random(1), lambda _: None)
    faults = Faults(reorder=1.0, match="media")
    (media, stop, close) = Frames().feed(frame(b"media", 1) + frame(b"stop", 1) + frame(b"", 8))
    assert [] == [*accidents.meet(media, faults)]
    assert [media.raw, stop.raw] == [*accidents.meet(stop, faults)]
    assert [close.raw] == [*accidents.meet(close, Faults(drop=1.0))]


def test_plans_that_make_no_sense_are_refused() -> None:
    for wrong in ({"drop": 0.6, "corrupt": 0.6}, {"latency_ms": -1.0}):
        with pytest.raises(ValueError, match="below 0"):
            Faults(**wrong)
    for steps in ([{"at": 1, "do": "explode"}], [{"at": 1, "up": {"latency": 5}}], [{"do": "stall"}], {"at": 1}):
        with pytest.raises(ValueError, match=r"Invalid|unknown|missing|Expected"):
            Plan.read(steps)


# --- the proxy ---------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def through(
    port: int, *, tell: Callable[[dict[str, Any]], None] | None = None, **plan: Any
) -> AsyncIterator[tuple[Chaos, int]]:
    steps = plan.pop("steps", [])
    proxy = Chaos(Plan.read(steps, **plan), "127.0.0.1", port, tell=tell)
    listening = await proxy.start()
    try:
        yield proxy, listening
    finally:
        await proxy.stop()


@asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with listener:
        yield int(listener.sockets[0].getsockname()[1])


async def test_bytes_pass_as_they_are_late_slow_and_in_crumbs() -> None:
    data = Random(3).randbytes(3000)
    for faults in (Faults(), Faults(slice=1), Faults(latency_ms=60, jitter_ms=20), Faults(rate=200_000)):
        async with echoing() as target, through(target, up=faults) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            began = asyncio.get_running_loop().time()
            for at in range(0, 3000, 100):
                writer.write(data[at : at + 100])
                await writer.drain()
                await asyncio.sleep(0)
            writer.write_eof()
            assert data == await asyncio.wait_for(reader.read(-1), 10)
            took = asyncio.get_running_loop().time() - began
            writer.close()
        assert took > {60: 0.035, 0: 0}[round(faults.latency_ms)]
        if faults.rate:
            assert took > 0.05, "3,000 bytes at 200 kbit/s take 0.12 s, of which 0.05 may come at once"


async def test_a_stall_is_of_one_direction_and_ends() -> None:
    told: list[dict[str, Any]] = []
    steps = [{"at": 0.2, "do": "stall", "direction": "up"}, {"at": 0.8, "do": "resume"}]
    async with echoing() as target, through(target, steps=steps, tell=told.append) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"a")
        assert b"a" == await asyncio.wait_for(reader.read(1), 5)
        await asyncio.sleep(0.4)
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.1)
        assert b"b" == await asyncio.wait_for(reader.read(1), 5)
        writer.close()
    assert ["connected", "stall", "resume"] == [each["did"] for each in told[:3]]


async def test_half_open_vanishes_without_a_word() -> None:
    async with echoing() as target, through(target) as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"a")
        await reader.readexactly(1)
        proxy.do("half_open")
        writer.write(bytes(100_000))
        await writer.drain()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)
        writer.close()


async def test_a_reset_after_so_many_bytes() -> None:
    async with echoing() as target, through(target, reset_after=1000) as (proxy, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(bytes(5000))
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.readexactly(5000), 5)
        writer.close()
        for _ in range(100):
            if not proxy.connections:
                break
            await asyncio.sleep(0.02)
    assert 1 == proxy.counts["reset"]


async def test_the_command_tells_what_it_does(tmp_path: Path) -> None:
    script = tmp_path / "script.yaml"
    script.write_text("[{at: 0.3, up: {latency_ms: 5}}, {at: 0.4, do: reset}]")
    port = free_port()
    async with echoing() as target:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "chaos", "--listen", f"127.0.0.1:{port}", "--to", f"127.0.0.1:{target}",
            "--drop", "5%", "--rate", "64k", "--script", str(script), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        lines = [json.loads(await asyncio.wait_for(process.stdout.readline(), 30))]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reader.readexactly(1), 10)
        writer.close()
        lines += [json.loads(await asyncio.wait_for(process.stdout.readline(), 10)) for _ in range(4)]
        process.send_signal(signal.SIGTERM)
        assert 0 == await asyncio.wait_for(process.wait(), 10)
    assert ["listening", "connected", "changed", "reset", "ended"] == [line["did"] for line in lines]
    assert {"latency_ms": 5} == lines[2]["faults"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--drop", "120%"], "write for instance 5%"),
        (["--rate", "fast"], "write for instance 64k"),
        (["--latency", "-5"], "below 0"),
        (["--listen", "9001"], "write for instance 127.0.0.1:9000"),
        (["--script", "/nowhere/script.yaml"], "No such file"),
    ],
)
def test_the_command_says_what_to_write(options: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.main, ["chaos", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1", *options])
    assert 2 == result.exit_code
    assert says in result.output


# --- a carrier's frames: F5 to F7 --------------------------------------------------------------------------------------------


def places(audio: bytes) -> dict[int, int]:
    """Which frame of the ledger stands at which place; silence stands for none."""
    pieces = [audio[at : at + 160] for at in range(0, len(audio), 160)]
    return {place: numbers(piece)[0] for place, piece in enumerate(pieces) if piece != SILENCE}


async def heard(launch: Launch, frames: int, **plan: Any) -> tuple[Any, Chaos, dict[str, Any]]:
    """What the service heard of so many frames, said through a proxy that has it in for media."""
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)})
        async with through(gateway.port, **plan) as (proxy, port):
            async with TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", pace="fast", line_silence=False) as call:
                link = await service.connected()
                await call.speak(ledger(1, frames))
                await call.hangup()
            stop = await link.wait_for("stop")
    assert [] == service.violations
    return link, proxy, stop


async def test_f5_no_sample_comes_twice_when_frames_do(launch: Launch) -> None:
    link, proxy, _ = await heard(launch, 400, up=Faults(duplicate=0.05, match=MEDIA), seed=5)
    assert proxy.counts["up.duplicated"] > 8
    assert [*range(1, 401)] == numbers(link.audio)
    assert [] == link.texts("gap")


async def test_f6_the_timeline_keeps_its_length_when_frames_are_lost(launch: Launch) -> None:
    link, proxy, _ = await heard(launch, 400, up=Faults(drop=0.05, match=MEDIA), seed=6)
    lost = proxy.counts["up.dropped"]
    assert lost > 8
    found = places(link.audio)
    first, last = min(found.values()), max(found.values())
    assert {number - place for place, number in found.items()} == {first}, "each at its place"
    assert last - first + 1 == len(link.audio) // 160, "to the frame"
    assert 400 - lost == len(found)
    gaps = link.texts("gap")
    assert {"carrier"} == {gap["reason"] for gap in gaps}
    assert 20 * (last - first + 1 - len(found)) == sum(gap["lost_ms"] for gap in gaps)


async def test_f7_what_comes_out_of_order_is_put_in_order(launch: Launch) -> None:
    link, proxy, stop = await heard(launch, 400, up=Faults(reorder=0.05, match=MEDIA), seed=7)
    assert proxy.counts["up.reordered"] > 8
    assert [*range(1, 401)] == numbers(link.audio), "nothing lost, nothing twice, in order"
    assert [] == link.texts("gap")
    balanced(stop, 8000)


async def test_f7_what_comes_too_late_counts_as_lost_and_once(launch: Launch) -> None:
    """Half of all frames are held back, and overtaken by more than the window holds."""
    link, _, _ = await heard(launch, 400, up=Faults(reorder=0.5, match=MEDIA), seed=8)
    found = places(link.audio)
    assert sorted({*found.values()}) == [*found.values()], "in order, and none twice"
    first = min(found)
    assert {number - place for place, number in found.items()} == {found[first] - first}, "each at its place"
    assert 300 < len(found) < 400
    assert abs(400 - len(link.audio) // 160) <= 2 * REORDER_WINDOW
    assert sum(gap["lost_ms"] for gap in link.texts("gap")) == len(link.audio) // 8 - 20 * len(found)


# --- transport: T1, T6, T7, T8, D2 -------------------------------------------------------------------------------------------


async def conversation(launch: Launch, frames: int, carrier: dict[str, Any], far: dict[str, Any]) -> None:
    """Both directions bit-exact, through two bad networks."""
    async with RecordingService(subprotocol=FRAMED) as service, through(service.port, **far) as (_, service_port):
        gateway = await launch(services={"agent": agent(f"ws://127.0.0.1:{service_port}/")})
        async with (
            through(gateway.port, **carrier) as (_, port),
            TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", line_silence=False) as call,
        ):
            link = await service.connected()
            await link.until(lambda: link.ready)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(call.speak(ledger(0, frames)))
                tasks.create_task(link.play(ledger(5000, frames), frame_bytes=160))
            await call.until(lambda: len(played(call)) >= frames * 160, 30)
            await call.hangup()
            stop = await link.wait_for("stop", timeout=30)
    (memory,) = service.memories.values()
    assert [*range(frames)] == numbers(memory.audio)
    assert [*range(5000, 5000 + frames)] == numbers(played(call))
    assert [] == memory.told("gap")
    balanced(stop, 20 * frames)
    assert [] == service.violations
    assert [] == call.violations


async def test_t6_late_and_jittery_lines_lose_nothing(launch: Launch) -> None:
    bad = {"up": Faults(latency_ms=150, jitter_ms=100), "down": Faults(latency_ms=150, jitter_ms=100)}
    await conversation(launch, 100, bad, bad)


async def test_t6_a_line_of_64_kbit_s_to_the_service_loses_nothing(launch: Launch) -> None:
    """Less than the audio with its headers: the service falls behind, and the ring has the rest."""
    slow = {"up": Faults(rate=64_000), "down": Faults(rate=128_000)}
    await conversation(launch, 150, {}, slow)


async def test_t7_one_byte_at_a_time_is_bit_exact(launch: Launch) -> None:
    crumbs = {"up": Faults(slice=1), "down": Faults(slice=1)}
    await conversation(launch, 50, crumbs, crumbs)


async def leave(call: TwilioMedia, how: int | str) -> None:
    if how == 1005:
        call.ws.transport.write(frame(b"", 8, mask=b"abcd"))
    elif how == 1006:
        call.ws.transport.close()
    elif isinstance(how, int):
        await call.ws.close(how)


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("how", [1000, 1001, 1005, 1006, "RST"])
async def test_t8_however_the_carrier_goes_the_end_is_one_and_told(
    launch: Launch, log: list[Any], how: int | str, stop: bool
) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)})
        async with (
            through(gateway.port) as (proxy, port),
            TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", line_silence=False) as call,
        ):
            link = await service.connected()
            await call.speak(ledger(0, 5))
            await link.until(lambda: 800 == len(link.audio))
            if stop:
                await call.stop()
                await link.wait_for("stop")
            if how == "RST":
                proxy.do("reset")
            try:
                await leave(call, how)
                told = await link.wait_for("stop")
            except ConnectionClosed:
                told = await link.wait_for("stop")
        async with asyncio.timeout(5):
            while gateway.streams:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert ("caller_hangup" if stop else "carrier_closed") == told["reason"]
    assert 1 == len(link.texts("stop")) == len(logged(log, "stream_ended"))
    assert [*range(5)] == numbers(link.audio)
    balanced(told, 100)


async def test_d2_connections_that_are_reset_lose_nothing(launch: Launch) -> None:
    async with RecordingService(subprotocol=FRAMED) as service, through(service.port) as (proxy, service_port):
        gateway = await launch(services={"agent": agent(f"ws://127.0.0.1:{service_port}/")})
        async with TwilioMedia(f"ws://127.0.0.1:{gateway.port}/twilio/stream", line_silence=False) as call:
            link = await service.connected()
            async with asyncio.TaskGroup() as tasks:
                talking = tasks.create_task(call.speak(ledger(0, 100)))
                for count in (2, 3):
                    await asyncio.sleep(0.4)
                    proxy.do("reset")
                    link = await service.connected(count)
                await talking
            await call.hangup()
            await link.wait_for("stop")
    (memory,) = service.memories.values()
    assert [*range(100)] == numbers(memory.audio)
    assert [] == memory.told("gap")
    assert 2 == proxy.counts["reset"]


async def vanish(gateway: Server, service: RecordingService, *, talking: bool) -> float:
    """Seconds from a connection's vanishing to the end of its call."""
    async with (
        through(gateway.port) as (proxy, port),
        TwilioMedia(f"ws://127.0.0.1:{port}/twilio/stream", line_silence=talking, close_timeout=0.1) as call,
    ):
        link = await service.connected()
        await call.speak(ledger(0, 5))
        await link.until(lambda: 800 <= len(link.audio))
        if talking:
            await link.send_audio(ledger(0, 1000))
        proxy.do("half_open")
        began = asyncio.get_running_loop().time()
        assert "carrier_closed" == (await link.wait_for("stop", timeout=30))["reason"]
        took = asyncio.get_running_loop().time() - began
        call.drop()
    return took


@pytest.mark.parametrize("talking", [False, True], ids=["idle", "in-media"])
async def test_t1_a_connection_that_has_vanished_is_found_by_the_heartbeat(launch: Launch, talking: bool) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        took = await vanish(await launch(services={"agent": agent(service)}), service, talking=talking)
    print(f"found after {took:.2f} s")
    assert 3.5 < took < 6, "1.5 heartbeats of 2.5 s, and the time that other tests take"


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_t1_a_connection_without_audio_that_has_vanished_is_found_by_its_slower_heartbeat(launch: Launch) -> None:
    async with RecordingService(subprotocol=RAW) as service:
        gateway = await launch(services={"agent": agent(service)})
        async with (
            through(gateway.port) as (proxy, port),
            ConversationRelay(f"ws://127.0.0.1:{port}/relay/stream", close_timeout=0.1) as call,
        ):
            link = await service.connected()
            proxy.do("half_open")
            began = asyncio.get_running_loop().time()
            assert "carrier_closed" == (await link.wait_for("stop", timeout=30))["reason"]
            took = asyncio.get_running_loop().time() - began
            call.drop()
    print(f"found after {took:.1f} s")
    assert took <= 15.5
