"""A blocked event loop is noticed, with what blocks it; and nothing that paces a call goes by the wall clock."""

from __future__ import annotations

import ast
import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway import watchdog
from gateway.watchdog import BLOCKED_SECS, OVERLOADED_SECS, Watchdog
from tests.conftest import Launch
from tests.doubles import RecordingService, TwilioMedia
from tests.test_end_to_end import MULAW, played, stream_url

ROOT = Path(__file__).parent.parent


@pytest.fixture
async def dog(log: list[Any]) -> Any:
    made = Watchdog(structlog.get_logger())
    made.start()
    yield made
    made.stop()


def somebody_sleeps(seconds: float) -> None:
    time.sleep(seconds)


async def test_o5_a_blocked_loop_is_told_with_what_blocks_it(dog: Watchdog, log: list[Any]) -> None:
    await asyncio.sleep(0.15)
    somebody_sleeps(0.5)
    await asyncio.sleep(0.1)
    told = [entry for entry in log if entry["event"] == "event_loop_blocked" and entry["lag_ms"] > 100]
    assert told
    assert "warning" == told[0]["log_level"]
    if told[0]["blocked_in"]:  # else another thread had the machine, and the loop told it itself
        assert any("somebody_sleeps" in line and "test_watchdog.py" in line for line in told[0]["blocked_in"][:3])
    assert dog.blocked >= 1
    assert dog.worst() > 0.3
    assert dog.lag.counts[-1] == 0
    assert dog.lag.sum > 0.3


async def test_o5_every_block_is_counted_and_one_line_a_second_tells(dog: Watchdog, log: list[Any]) -> None:
    for _ in range(5):
        await asyncio.sleep(0.06)
        somebody_sleeps(0.2)
    await asyncio.sleep(0.1)
    assert dog.blocked >= 5
    assert 1 <= len([entry for entry in log if entry["event"] == "event_loop_blocked"]) <= 3


async def test_a_loop_on_time_is_left_in_peace(dog: Watchdog) -> None:
    await asyncio.sleep(0.4)
    assert dog.lag.count >= 3
    assert not dog.overloaded()


async def test_one_long_block_is_no_overload_and_several_are(dog: Watchdog) -> None:
    late, on_time = OVERLOADED_SECS * 2, OVERLOADED_SECS / 2
    for lags, overloaded in (
        ([], False),
        ([on_time] * 200, False),
        ([8.0] + [on_time] * 40, False),
        ([late] * 2 + [on_time] * 190, False),
        ([late] * 3 + [on_time] * 190, True),
        ([late] * 30, True),
    ):
        dog._recent.clear()
        dog._recent.extend((0.0, lag) for lag in lags)
        assert overloaded == dog.overloaded(), lags
    dog.stop()
    assert not dog.overloaded(), "nobody looks"


async def test_the_past_is_forgotten(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "RECENT_SECS", 0.3)
    await asyncio.sleep(0.06)
    somebody_sleeps(BLOCKED_SECS * 3)
    await asyncio.sleep(0.06)
    assert dog.worst() > BLOCKED_SECS
    await asyncio.sleep(0.6)
    assert dog.worst() < BLOCKED_SECS * 3


async def test_it_starts_and_stops_as_often_as_one_likes(log: list[Any]) -> None:
    dog = Watchdog(structlog.get_logger())
    dog.stop()
    for _ in range(2):
        dog.start()
        dog.start()
        assert dog.running
        dog.stop()
        dog.stop()
        assert not dog.running
    await asyncio.sleep(0.1)
    assert 0 == dog.lag.count


# --- O9 ---

WALL_CLOCK = {
    "gateway.door": "tokens expire by the wall clock, on whichever host reads them",
    "gateway.tls": "certificates do",
    "gateway.doctor": "compares it with the world's, and looks at certificates",
    "gateway.services.recorder": "recordings are named by date",
    "gateway.capture": "captures are",
    "gateway.journal": "a file's age is told by it, if nothing in the file tells it",
}
"""Who may look at the wall clock, and what for."""

READS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "datetime.today"}


def wall_clock_reads(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).removeprefix("datetime.datetime").endswith(tuple(READS)):
            found.append(f"{node.lineno} {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"{node.lineno} from time import {alias.name}" for alias in node.names if f"time.{alias.name}" in READS]
    return found


def test_o9_the_wall_clock_is_for_tokens_and_certificates_only() -> None:
    readers = {}
    for package in ("gateway", "providers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if name not in WALL_CLOCK and not name.startswith("gateway.conformance") and (found := wall_clock_reads(path)):
                readers[name] = found
    assert {} == readers


async def test_o9_a_clock_that_jumps_changes_nothing_in_a_call(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps, real = random.Random(1), time.time
    year = 365 * 86_400
    monkeypatch.setattr(time, "time", lambda: real() + jumps.choice((-10 * year, -3600, 0, 3600, 10 * year)))
    async with RecordingService() as service:
        mulaw = {"encoding": "mulaw", "sample_rate": 8000}
        server = await launch(services={"agent": {"kind": "websocket", "url": service.url, "media_format": mulaw}})
        server.watchdog.start()
        async with TwilioMedia(stream_url(server, "twilio")) as call:
            link = await service.connected()
            began = time.monotonic()
            await link.send_audio(MULAW[:6400])
            await link.send(type="checkpoint", name="end")
            await call.speak(MULAW[:4800])
            done = await link.wait_for("checkpoint")
            took = time.monotonic() - began
            await call.hangup()
            stop = await link.wait_for("stop")
    assert ("played", 800) == (done["outcome"], done["played_ms"])
    assert 0.7 < took < 1.5
    assert MULAW[:6400] == played(call)
    assert call.ear.max_buffered_ms <= 300
    assert 600 == stop["account"]["received"] == stop["account"]["forwarded"]
