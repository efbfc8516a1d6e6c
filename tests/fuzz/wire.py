"""Level three: a real gateway between carriers and a service that talk rubbish, while neighbours' calls must feel nothing.

Judged: the process lives and ends well; its log holds no error and no traceback; calls on the same gateway, whose frames are
numbered, come through to the sample in both directions; memory stays where it is.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import aiohttp

from tests.indexed import IndexedCaller, IndexedService, latencies_ms, losses, quantile, settled, talk
from tests.oracles import loud
from tests.processes import gateway

CARRIERS = {"twilio": "twilio_media_streams", "relay": "twilio_conversation_relay", "plivo": "plivo_audio_streaming"}
NEIGHBOURS = 4
LOOK_SECS = 0.05
"""Often, so that there is little of the log to read each time: the neighbours' callers are in the same process."""
LARGEST_GROWTH_KIB = 4096
"""Of the resident memory, from a fifth of the frames to the end."""

EXPECTED = ("service_lost",)
"""Errors that are not ours: the service that talks rubbish leaves calls without one."""


async def _hammer(seed: int, arguments: list[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fuzz.hammer", "--seed", str(seed), *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def _configuration(service: IndexedService, rubbish: int) -> dict[str, object]:
    kinds = {**CARRIERS, "neighbour": CARRIERS["twilio"], "bot": CARRIERS["twilio"], "bot_relay": CARRIERS["relay"]}
    return {
        "providers": {name: {"kind": kind, "auth": "none"} for name, kind in kinds.items()},
        "services": {
            "neighbour": service.configuration,
            "bot": {"kind": "websocket", "url": f"ws://127.0.0.1:{rubbish}/", "give_up_secs": 1},
            "echo": {"kind": "echo"},
        },
        "routes": [
            {"provider": "neighbour", "service": "neighbour"},
            *({"provider": name, "service": "bot"} for name in ("bot", "bot_relay")),
            {"service": "echo"},
        ],
        "max_calls": 1000,
        "max_calls_per_second": 100_000,
        "max_pending_per_address": 1000,
    }


async def run(
    count: int, seed: int, jobs: int = 1, *, rate: float = 1e6, secs: float = 1e9, tell: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Until the gateway has taken `count` frames from its carriers, at most `rate` a second, or `secs` are over."""
    hammers, rubbish = [], _free_port()
    for job in range(jobs):
        arguments = [f"--rate={rate / jobs}", *(f"--attack={name}:{kind}" for name, kind in CARRIERS.items())]
        served = ["--call=bot", "--call=bot_relay", f"--listen={rubbish}"] if job == 0 else []
        hammers.append(await _hammer(seed + job, [*arguments, *served]))
    bad: Counter[str] = Counter()
    taken = streams = blocked = 0
    late = 0.0
    rss: list[int] = []
    with TemporaryDirectory() as directory:
        async with (
            IndexedService() as service,
            gateway(Path(directory), _configuration(service, rubbish), judge=False) as running,
        ):
            neighbours: list[IndexedCaller] = []
            began = monotonic()
            for process in hammers:
                assert process.stdin is not None
                process.stdin.write(f"{running.port}\n".encode())

            async def watch() -> None:
                nonlocal taken, streams, blocked, late
                while taken < count and monotonic() - began < secs:
                    slept_at = monotonic()
                    await asyncio.sleep(LOOK_SECS)
                    late = max(late, monotonic() - slept_at - LOOK_SECS)
                    for entry in running.new_entries():
                        blocked += entry["event"] == "event_loop_blocked"
                        if entry["event"] == "stream_ended" and entry["provider"] != "neighbour":
                            taken += entry["frames_in"]
                            streams += 1
                            bad.update(entry["bad_frames"])
                    if taken >= count / 5:
                        rss.append(running.rss_kib)
                    assert running.process.returncode is None, "the gateway is gone"
                    tell(taken)

            found: list[str] = []
            times: list[float] = []
            frames = 0
            async with aiohttp.ClientSession() as http, asyncio.TaskGroup() as tasks:
                watching, round_ = tasks.create_task(watch()), 0
                while not watching.done():
                    round_ += 1
                    url = f"http://127.0.0.1:{running.port}/neighbour/stream"
                    neighbours = [IndexedCaller(http, url, at, f"{round_:06d}") for at in range(NEIGHBOURS)]
                    for caller in neighbours:
                        await caller.dial(tasks)
                    for _ in range(15):  # a call of half a minute, or until it is over
                        await talk(neighbours, 2.0 if secs > 60 else 0.5)
                        if watching.done():
                            break
                    await settled(neighbours, service, 10)
                    found += losses(neighbours, service)
                    times += latencies_ms(neighbours, service)
                    frames += sum(caller.frames for caller in neighbours)
                    for caller in neighbours:
                        await caller.hang_up()
                        service.forget(caller.call_id)
            took = monotonic() - began
            cpu = running.cpu_seconds
            sent: Counter[str] = Counter()
            for process in hammers:
                output, _ = await process.communicate(b"")
                sent.update(json.loads(output.splitlines()[-1]))
            await asyncio.sleep(0.3)
        text = (Path(directory) / "gateway.log").read_text()
    errors = loud(text, EXPECTED)
    times.sort()
    return {
        "frames_taken": taken,
        "frames_sent": sent["frames"],
        "connections": sent["connections"],
        "streams": streams,
        "bad_frames": bad.total(),
        "reasons": len(bad),
        "service_messages": sent["service_messages"],
        "service_calls": sent["service_calls"],
        "per_second": round(taken / took),
        "gateway_cpu_us_per_frame": round(cpu / max(taken, 1) * 1e6, 1),
        "neighbours_frames": frames,
        "neighbours_losses": found[:10],
        "neighbours_p50_ms": round(quantile(times, 0.5), 2),
        "neighbours_p99_9_ms": round(quantile(times, 0.999), 2),
        "neighbours_worst_ms": round(times[-1], 2) if times else 0.0,
        "callers_late_ms": round(1000 * late, 2),
        "gateway_blocked": blocked,
        "rss_first_kib": rss[0] if rss else 0,
        "rss_growth_kib": rss[-1] - rss[0] if rss else 0,
        "log_errors": errors[:10],
        "exceptions": len(errors),
    }


def passed(figures: dict[str, Any]) -> bool:
    """Whether nobody was harmed."""
    return not figures["log_errors"] and not figures["neighbours_losses"] and figures["rss_growth_kib"] <= LARGEST_GROWTH_KIB
