"""Workers are killed in the middle of calls, and no call ends: each comes back, and its service misses only what nobody heard.

The long form, which prints its figures as JSON:

    python -m tests.test_killed_workers --kills 100 --calls 40 --workers 4 --store
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from struct import Struct
from typing import Any

import pytest
from aiohttp import WSMsgType, web

import providers
from gateway.callreport import CallReport
from gateway.media import MULAW_8K
from gateway.simulator import simulate
from tests.results import store
from tests.services.lines import FRAMES
from tests.test_drain import Gateway, running, until
from tests.test_workers import pids, settled, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")

HEADER = Struct("<BBHIQ")
REPLAYED, DISCONTINUITY, SILENCE = 1, 2, 4
KINDS = {"twilio": "twilio_media_streams", "plivo": "plivo_audio_streaming", "relay": "twilio_conversation_relay"}
UNDER_WAY = 10
"""Frames that a carrier may have written, on a busy machine, and that the process had not read when it was killed."""


class Session:
    """What a service in framed mode knows of one call: each frame tells its own number."""

    def __init__(self) -> None:
        self.next = self.position = 0
        self.runs: list[list[int]] = []  # first and last number of what was heard without a break
        self.silence = 0
        self.told_ms: list[int] = []
        self.wrong: list[str] = []
        self.connections = self.stops = self.digits = 0

    def hear(self, seq: int, pos: int, flags: int, samples: bytes) -> None:
        if seq < self.next:
            self.wrong.append(f"frame {seq} again")
            return
        if seq > self.next:
            self.wrong.append(f"frames {self.next} to {seq - 1} are missing")
        if pos < self.position:
            self.wrong.append(f"frame {seq} lies before its predecessor's end")
        self.next, self.position = seq + 1, pos + len(samples)
        if flags & SILENCE or samples[:1] == b"\xff":
            self.silence += 1
            return
        number = int.from_bytes(samples[:4], "little")
        if FRAMES[number] != samples:
            self.wrong.append(f"frame {seq} is cut")
        elif self.runs and number == self.runs[-1][1] + 1:
            self.runs[-1][1] = number
        elif self.runs and number <= self.runs[-1][1]:
            self.wrong.append(f"what was heard at {self.runs[-1][1]} is heard again: {number}")
        else:
            self.runs.append([number, number])

    @property
    def missing(self) -> int:
        """Frames of the caller's between the first and the last that was heard."""
        return sum(after[0] - before[1] - 1 for before, after in zip(self.runs, self.runs[1:], strict=False))


class Service:
    """Framed mode; acknowledges every ten frames, so that there is always something to be sent again."""

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.by_call: dict[str, str] = {}
        self.wrong: list[str] = []

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("telephony-gateway.v1",), compress=False)
        await socket.prepare(request)
        session = Session()
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                _, _, flags, seq, pos = HEADER.unpack_from(message.data)
                session.hear(seq, pos, flags, message.data[HEADER.size :])
                if seq % 10 == 9:
                    await socket.send_str(json.dumps({"type": "ack", "seq": seq}))
                continue
            text = json.loads(message.data)
            match text["type"]:
                case "start":
                    name, call_id = text["session"], text["call_id"]
                    session = self.sessions.setdefault(name, session)
                    session.connections += 1
                    if self.by_call.setdefault(call_id, name) != name:
                        self.wrong.append(f"call {call_id} has two sessions")
                    if session.connections > 1 and (text["resume"] or {}).get("session") != name:
                        self.wrong.append(f"{name} comes back without its session")
                    await socket.send_str(json.dumps({"type": "ready", "next": session.next}))
                case "gap":
                    session.told_ms.append(text["lost_ms"])
                case "stop":
                    session.stops += 1
                case "dtmf":
                    session.digits += len(text["digits"])
                case _:
                    pass
        return socket


async def killing(
    directory: Path,
    *,
    kills: int,
    calls: int,
    workers: int,
    call_secs: float = 12.0,
    pause_secs: float = 1.0,
    seed: int = 1,
    replaces: int = 0,
    drain_secs: float = 30.0,
) -> dict[str, Any]:
    """So many workers are killed, one at a time, while so many calls go on and new ones follow those that end.

    And all of them are replaced so many times, by new ones that get the calls after `drain_secs`.
    """
    random, service = Random(seed), Service()
    app = web.Application()
    app.router.add_get("/", service.serve)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    url = f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    options: dict[str, Any] = {
        "max_calls": 4 * calls + 100, "max_pending_per_address": 5000, "max_calls_per_second": 10_000,
        "drain_secs": drain_secs, "max_cpu_percent": 100, "max_host_cpu_percent": 100,
        "providers": {name: {"kind": kind, "auth": "none"} for name, kind in KINDS.items()},
        "services": {"agent": {"kind": "websocket", "url": url, "media_format": {"encoding": "mulaw", "sample_rate": 8000}}},
        "routes": [{"service": "agent"}],
    }  # fmt: skip
    reports: list[CallReport] = []
    replaced: list[float] = []
    over = asyncio.Event()
    try:
        async with running(directory, "--workers", str(workers), **options) as gateway:
            async with asyncio.TaskGroup() as tasks:
                for number in range(calls):
                    tasks.create_task(keep_calling(gateway, ("twilio", "plivo")[number % 2], number, call_secs, over, reports))
                await asyncio.sleep(2.0)
                for _ in range(kills):
                    before = await pids(gateway)
                    victim = random.choice(before)
                    began = time.monotonic()
                    os.kill(victim, signal.SIGKILL)

                    async def there(victim: int = victim) -> bool:
                        return victim not in await pids(gateway) and await settled(gateway, workers)

                    await wait_for(there)
                    replaced.append(time.monotonic() - began)
                    await asyncio.sleep(pause_secs)
                for _ in range(replaces):
                    before = await pids(gateway)
                    assert 202 == (await gateway.ask("/replace", "POST"))[0]

                    async def others(before: list[int] = before) -> bool:
                        return not {*before} & {*await pids(gateway)} and await settled(gateway, workers)

                    await wait_for(others)
                    await asyncio.sleep(drain_secs + pause_secs)
                over.set()
            with suppress(TimeoutError):  # what is told last is still on its way
                await until(lambda: all(session.stops for session in service.sessions.values()))
    finally:
        await runner.cleanup()
    return figures(service, reports, replaced, workers=workers, calls=calls)


async def keep_calling(
    gateway: Gateway, name: str, number: int, secs: float, over: asyncio.Event, reports: list[CallReport]
) -> None:
    """One call after the other, each as long as the next; the last one ends as it would have."""
    kind = providers.load(KINDS[name])
    await asyncio.sleep(number % 10 * secs / 10)
    while not over.is_set():
        audio = b"".join(FRAMES[: int(secs * 50)])
        report = await simulate(
            kind, url=f"http://127.0.0.1:{gateway.port}/{name}/answer", audio=audio, audio_format=MULAW_8K, measure=False
        )
        reports.append(report)


def figures(service: Service, reports: list[CallReport], replaced: list[float], *, workers: int, calls: int) -> dict[str, Any]:
    gaps = sorted(gap for report in reports for gap in report.gaps_ms)
    lost_streams = sum(len(report.streams) - 1 for report in reports)
    beyond = []
    begun = [report for report in reports if report.connected]
    unheard = 0
    for report in reports:
        session = service.sessions.get(service.by_call.get(report.call_id, ""))
        if session is None:
            unheard += report.connected
            continue
        losses = len(report.streams) - 1
        unread = session.missing - report.lost_in_gaps_ms / 20
        if losses:
            beyond.append(unread / losses)
    return {
        "kills": len(replaced), "workers": workers, "calls_at_once": calls, "calls": len(reports),
        "reattached": lost_streams, "calls_that_came_back": sum(len(report.streams) > 1 for report in reports),
        "failed": [f"{each.call_id}: {'; '.join(each.errors)}" for each in begun if each.errors and not away(each)][:20],
        "webhooks_broken": sum(not each.connected for each in reports),
        "hung_up_while_away": sum(map(away, reports)),
        "not_reattached": sum(report.ended_with is not None for report in reports), "unheard": unheard,
        "wrong": [*service.wrong, *(each for session in service.sessions.values() for each in session.wrong)][:20],
        "frames_lost_beyond_the_gap_at_each_loss": {"mean": round(sum(beyond) / len(beyond), 2), "max": max(beyond)},
        "stops_not_one": sum(session.stops != 1 for session in service.sessions.values()),
        "gap_ms": {name: percentile(gaps, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))},
        "replaced_ms": {
            "p50": percentile(sorted(1000 * each for each in replaced), 0.5),
            "max": round(1000 * max(replaced, default=0)),
        },
    }  # fmt: skip


def away(report: CallReport) -> bool:
    """Whether the caller hung up after a stream was lost and before the next one came."""
    return report.ended_by == "caller" and bool(report.streams) and report.streams[-1].ended_by != "caller"


def percentile(values: list[float] | list[int], share: float) -> int | None:
    return round(values[min(len(values) - 1, int(share * len(values)))]) if values else None


async def test_o3_every_call_of_a_killed_worker_comes_back_and_nothing_that_was_heard_is_lost(tmp_path: Path) -> None:
    found = await killing(tmp_path, kills=3, calls=6, workers=2, call_secs=5.0, pause_secs=0.5)
    assert ([], []) == (found["failed"], found["wrong"])
    assert (0, 0) == (found["not_reattached"], found["unheard"])
    assert found["frames_lost_beyond_the_gap_at_each_loss"]["max"] <= UNDER_WAY, found
    assert 0 == found["stops_not_one"]
    assert found["reattached"] > 0


async def test_o2_calls_that_outlast_the_drain_of_a_replaced_worker_go_on_with_its_successor(tmp_path: Path) -> None:
    found = await killing(tmp_path, kills=0, replaces=1, calls=4, workers=2, call_secs=8.0, drain_secs=0.5)
    assert ([], []) == (found["failed"], found["wrong"])
    assert (0, 0, 0) == (found["not_reattached"], found["unheard"], found["stops_not_one"])
    assert found["frames_lost_beyond_the_gap_at_each_loss"]["max"] <= UNDER_WAY, found
    assert 4 == found["calls_that_came_back"]


def arguments() -> Iterator[tuple[str, int]]:
    yield from (("kills", 100), ("calls", 40), ("workers", 4), ("seed", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in arguments():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--store", action="store_true", help="Keep the figures for the fault table.")
    given = vars(parser.parse_args())
    keep = given.pop("store")
    with tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(killing(Path(directory), **given))
    print(json.dumps(found, indent=2))
    if keep:
        well = not (found["failed"] or found["wrong"] or found["not_reattached"] or found["unheard"])
        store("killed-workers", found, passed=well and found["gap_ms"]["p99"] <= 1500, module="tests.test_killed_workers")


if __name__ == "__main__":
    main()
