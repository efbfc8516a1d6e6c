"""Calls leave nothing for the garbage collector, and it does not hold them up."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway import garbage
from tests.doubles import ConversationRelay, Link, Plivo, RecordingService, TwilioMedia
from tests.processes import GatewayProcess, asked, gateway, probe

CALLS = 5
MOST_EACH = 5.0
"""Objects that a call may leave: uvloop leaves seven of a connection that is cut before anything was read."""

SEEDS = count()
"""No two calls have the same name."""

AUDIO = bytes(range(160)) * 20
AUTH_TOKEN = "0123456789abcdef0123456789abcdef"

GARBAGE = """
def name(each):
    return f"{type(each).__module__}.{type(each).__qualname__}"

def answer():
    gc.collect()
    found = collections.Counter(map(name, gc.garbage))
    gc.set_debug(0)
    gc.garbage.clear()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    live = sum(name(each) in ("gateway.stream.Stream", "gateway.porter._Porter") for each in gc.get_objects())
    return found, live
"""
"""What was garbage since it was asked last, by types, and how many streams and new connections there are."""


def url(running: GatewayProcess, name: str = "twilio") -> str:
    return f"ws://127.0.0.1:{running.port}/{name}/stream"


Act = Callable[[GatewayProcess, RecordingService], Awaitable[None]]


def on(provider: str) -> Act:
    """A Media Streams call, heard and ended by the caller."""

    async def act(running: GatewayProcess, service: RecordingService) -> None:
        async with TwilioMedia(url(running, provider), seed=next(SEEDS)) as call:
            await call.speak(AUDIO)
            await call.hangup()

    act.__name__ = provider
    return act


async def plivo(running: GatewayProcess, service: RecordingService) -> None:
    async with Plivo(url(running, "plivo"), seed=next(SEEDS)) as call:
        await call.speak(AUDIO)
        await call.hangup()


async def relay(running: GatewayProcess, service: RecordingService) -> None:
    async with ConversationRelay(url(running, "relay"), seed=next(SEEDS)) as call:
        await call.says("Where is my order?")
        await call.hangup()


async def connection_cut(running: GatewayProcess, service: RecordingService) -> None:
    async with TwilioMedia(url(running), seed=next(SEEDS)) as call:
        await call.speak(AUDIO)
        call.drop()


async def ended_before_the_service_answers(running: GatewayProcess, service: RecordingService) -> None:
    async with TwilioMedia(url(running), seed=next(SEEDS)):
        pass


async def ended_by_the_service(running: GatewayProcess, service: RecordingService) -> None:
    async with TwilioMedia(url(running), seed=next(SEEDS)) as call:
        await call.speak(AUDIO)
        (link,) = [link for link in service.links if link.start["call_id"] == call.call_sid]
        await link.send(type="stop")
        await call.wait_closed()


async def service_refuses(running: GatewayProcess, service: RecordingService) -> None:
    async with TwilioMedia(url(running, "gone"), seed=next(SEEDS)) as call:
        await call.wait_closed()


async def service_goes_away(running: GatewayProcess, service: RecordingService) -> None:
    async with TwilioMedia(url(running), seed=next(SEEDS)) as call:
        await call.speak(AUDIO)

        def links() -> list[Link]:
            return [link for link in service.links if call.call_sid in str(link.texts("start"))]

        await call.until(links, 5)
        links()[0].drop()
        await asyncio.sleep(0.3)
        await call.hangup()


async def sent(running: GatewayProcess, request: str) -> None:
    """These bytes; then the end is waited for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(request.encode())
    await reader.read()
    writer.close()


def upgrade(path: str, more: str = "") -> str:
    return (
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {'A' * 22}==\r\n{more}\r\n"
    )


async def never_started(running: GatewayProcess, service: RecordingService) -> None:
    await sent(running, upgrade("/twilio/stream"))


async def refused(running: GatewayProcess, service: RecordingService) -> None:
    await sent(running, upgrade(f"/signed/stream/{'A' * 60}"))


async def bad_http(running: GatewayProcess, service: RecordingService) -> None:
    await sent(running, upgrade("/twilio/stream", "Host: y\r\n"))


async def silent(running: GatewayProcess, service: RecordingService) -> None:
    await sent(running, "")


async def webhook(running: GatewayProcess, service: RecordingService) -> None:
    form = {
        "CallSid": f"CA{next(SEEDS):032}",
        "AccountSid": "AC1",
        "From": "+15550001",
        "To": "+15550002",
        "Direction": "inbound",
    }
    base = f"http://127.0.0.1:{running.port}/twilio/answer"
    async with aiohttp.ClientSession() as http, http.post(base, data=form) as response:
        await response.read()


ENDS: list[Act] = [
    *(
        on("twilio"),
        plivo,
        relay,
        on("echo"),
        on("recorded"),
        connection_cut,
        ended_before_the_service_answers,
        ended_by_the_service,
    ),
    *(service_refuses, service_goes_away, never_started, refused, bad_http, silent, webhook),
]


async def left_by(act: Act, directory: Path, program: str = "") -> Counter[str]:
    """What CALLS of these leave to the collector, by types. `program` runs in the gateway's process before it."""
    socket_path, twilio_kind = directory / "probe", {"kind": "twilio_media_streams", "auth": "none"}
    async with RecordingService() as service:
        document: dict[str, Any] = {
            "public_url": "https://voice.example.com",
            "secret": "3d1e8b60c4f7a92e5b08d6c17f4a3e92",
            "start_timeout_secs": 1,
            "drain_secs": 0,
            "providers": {
                **dict.fromkeys(("twilio", "echo", "recorded", "gone"), twilio_kind),
                "signed": {"kind": "twilio_media_streams", "auth_token": AUTH_TOKEN},
                "plivo": {"kind": "plivo_audio_streaming", "auth": "none"},
                "relay": {"kind": "twilio_conversation_relay", "auth": "none"},
            },
            "services": {
                "agent": {"kind": "websocket", "url": service.url},
                "gone": {"kind": "websocket", "url": "ws://127.0.0.1:9/", "give_up_secs": 0.3},
                "echo": {"kind": "echo"},
                "recorded": {"kind": "recorder", "directory": str(directory)},
            },
            "routes": [*({"provider": name, "service": name} for name in ("gone", "echo", "recorded")), {"service": "agent"}],
        }
        program = f"{probe(socket_path, GARBAGE)}\n{program}"
        async with gateway(directory, document, program=program, judge=False) as running:
            left = Counter[str]()
            for calls in (1, CALLS):  # the first makes what stays
                await asyncio.gather(*(act(running, service) for _ in range(calls)))
                left.clear()
                async with asyncio.timeout(15):
                    live = 1
                    while live:
                        await asyncio.sleep(0.3)
                        found, live = await asked(socket_path)
                        left += Counter(found)
    return left


@pytest.mark.parametrize("act", ENDS, ids=lambda act: act.__name__)
async def test_nothing_is_left_for_the_collector(act: Act, tmp_path: Path) -> None:
    left = await left_by(act, tmp_path)
    assert [] == [name for name in left if name.startswith(("gateway.", "providers."))], left
    assert left.total() <= MOST_EACH * CALLS, left


async def test_what_is_left_is_found(tmp_path: Path) -> None:
    forgets = "import gateway.stream\ngateway.stream.Stream.release = lambda self: None"
    assert CALLS == (await left_by(on("twilio"), tmp_path, forgets))["gateway.stream.Stream"]


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The generations that are collected, in quick time; the collector is afterwards as it was before."""
    monkeypatch.setattr(garbage, "YOUNG_SECS", 0.001)
    monkeypatch.setattr(garbage, "AT_REST_SECS", 0.001)
    monkeypatch.setattr(garbage, "IDLE_SECS", 0.05)
    monkeypatch.setattr(garbage, "BUSY_SECS", 0.3)
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            found.append(info["generation"])

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*thresholds)


def knots() -> int:
    return sum(isinstance(each, Knot) for each in gc.get_objects())


async def tidied(secs: float, live: Callable[[], int]) -> None:
    async with asyncio.TaskGroup() as tasks:
        tidying = tasks.create_task(garbage.tidy(live))
        await asyncio.sleep(secs)
        tidying.cancel()


def test_what_is_there_at_the_start_is_not_looked_at_again(collections: list[int]) -> None:
    kept = [Knot()]
    assert 1 == knots()
    garbage.settle()
    assert 0 == knots()
    assert [2] == collections
    assert kept


@pytest.mark.skipif(not gc.get_threshold()[2], reason="this collector has no generations to look through")
class TestTidy:
    async def test_new_garbage_goes_at_once_while_calls_are_live(self, collections: list[int]) -> None:
        garbage.settle()
        for _ in range(100):
            Knot()
        await tidied(0.1, lambda: 1)
        assert 0 == knots()
        assert 2 not in collections[1:]

    async def test_old_garbage_goes_when_no_call_is_live(self, collections: list[int]) -> None:
        garbage.settle()
        old: list[Knot] = [Knot() for _ in range(100)]
        gc.collect(1)  # by now it is no longer new
        old.clear()
        live = 1

        async def hang_up() -> None:
            nonlocal live
            await asyncio.sleep(0.1)
            assert 100 == knots()
            live = 0

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hang_up())
            tasks.create_task(tidied(0.25, lambda: live))
        assert 0 == knots()

    async def test_and_now_and_then_when_calls_always_are(self, collections: list[int]) -> None:
        garbage.settle()
        old: list[Knot] = [Knot() for _ in range(100)]
        gc.collect(1)
        old.clear()
        await tidied(1.0, lambda: 1)
        assert 0 == knots()
        assert 2 <= collections[1:].count(2) <= 4

    async def test_the_collector_does_not_look_through_everything_by_itself(self, collections: list[int]) -> None:
        garbage.settle()
        kept = [[number] for number in range(500_000)]
        assert 2 not in collections[1:]
        assert kept
