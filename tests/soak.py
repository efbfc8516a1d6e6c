"""Soak: what a day of calls leaves behind (O7), and what ten thousand of them (O8).

    python -m tests.soak path --calls 50 --hours 24     frames through the whole path in process, as fast as they go
    python -m tests.soak calls --count 10000            short calls to a real gateway, twice

`--store` writes the figures to tests/results for the fault table.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from argparse import ArgumentParser
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import aiohttp

import providers
from gateway.audio import Converter
from gateway.bus import Channel, Subscription
from gateway.events import Audio, Checkpoint, Clear, Event, Start, StopReason
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.services import framed
from gateway.services.intake import Intake
from gateway.services.native import NativeCarrier
from gateway.services.ring import Frame
from gateway.session import Session
from tests.indexed import FRAMES, IndexedCaller, IndexedService, losses, settled
from tests.processes import GatewayProcess, asked, gateway, probe
from tests.results import store

FRAMES_PER_HOUR = 180_000
PCM_16K = MediaFormat(Encoding.PCM_S16LE, 16000)
MOST_BYTES_PER_MILLION = 1024
COARSE_KIB = 16
"""Memory comes in pages of 4: so much over a whole run is none."""
MOST_GROWTH_OF_SECOND_BURST = 0.01
SAMPLES = 60
SETTLE_SECS = 2.0


def rss_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Call:
    """One call in process: carrier's frames in, through session, channel, queue, converter and ring, to the service's messages;
    and what the service says back through converter, playout and codec to the carrier's frames. Time is what it is told."""

    def __init__(self, number: int, kind: str, service: MediaFormat) -> None:
        provider = providers.load(kind)
        self.codec = provider(provider.Config(auth="none")).codec()  # type: ignore[call-arg]
        self.carrier = provider.carrier()
        self.now = 1000.0
        self.service = service
        self.up = Converter(service, MULAW_8K)
        self.channel = Channel(f"s{number}", [])
        self.subscription = Subscription(MULAW_8K, capacity_ms=5000)
        self.channel.subscribe(self.subscription)
        protocol = NativeCarrier(
            session=f"s{number}",
            provider="p",
            kind=kind,
            role="speaker",
            track=Track.INBOUND,
            media_format=service,
            frame_ms=20,
        )
        self.intake = Intake(MULAW_8K, service, frame_ms=20, capacity_ms=10_000, track=Track.INBOUND, protocol=protocol)
        self.session = Session(self.codec, emit=self.emitted, note=lambda *_: None)
        self.checkpoints = 0
        self.sent_frames = self.heard_frames = 0
        self.frames = 0
        for frame in self.carrier.encode(Start(f"MZ{number:032d}", f"CA{number:032d}", "AC" + "0" * 32, media_format=MULAW_8K)):
            self.session.receive(frame, self.now)
        size = service.bytes_for(20)
        self.answers = [bytes([value, value & 0x3F]) * (size // 2) for value in range(50)]

    def emitted(self, event: Event) -> None:
        if isinstance(event, Checkpoint):
            self.checkpoints += 1
        self.channel.publish(event)

    def step(self) -> None:
        """20 ms of a call, in both directions."""
        number = self.frames
        self.frames += 1
        self.now += 0.02
        stamp = number * 20 + (60 if number % 5000 > 4990 else 0)  # now and then the timestamps jump
        (frame,) = self.carrier.encode(Audio(FRAMES[number % len(FRAMES)], Track.INBOUND, stamp))
        self.session.receive(frame, self.now)
        for event in self.subscription.take_nowait():
            self.intake.take(event, self.now)
        ring = self.intake.ring
        while (entry := ring.take(keep=True)) is not None:
            if isinstance(entry, Frame):
                framed.pack(framed.Header(Track.INBOUND, 0, entry.seq, entry.pos), entry.payload)
                self.heard_frames += 1
                if entry.seq % 10 == 9:
                    ring.ack(entry.seq)
        self.session.perform(Audio(self.up.convert(self.answers[number % 50])), self.now)
        if number % 500 == 499:
            self.session.perform(Checkpoint(f"c{number}"), self.now)
        if number % 5000 == 4999:
            self.session.perform(Clear(), self.now)
        while (out := self.session.next_frame(self.now)) is not None:
            self.sent_frames += 1
            for command in self.carrier.decode(out):
                if isinstance(command, Checkpoint):
                    for echo in self.carrier.encode(Checkpoint(command.name)):
                        self.session.receive(echo, self.now)

    def end(self) -> None:
        self.session.end(StopReason.CALLER_HANGUP, self.now)
        stop = self.session.stop
        assert stop is not None
        assert stop.account is not None
        assert stop.account.queued == stop.account.played + stop.account.cleared + stop.account.lost
        assert abs(self.frames - self.heard_frames) <= self.frames * 0.01 + 5
        assert self.checkpoints == self.frames // 500


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares: y for each x."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def path(calls: int, hours: float, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """`hours` of `calls` calls at once; memory is looked at from a fifth of the way on, when queues are as full as they get."""
    kinds = ("twilio_media_streams", "plivo_audio_streaming")
    lines = [Call(number, kinds[number % 2], (MULAW_8K, PCM_16K)[number // 2 % 2]) for number in range(calls)]
    steps = round(hours * FRAMES_PER_HOUR)
    at, memory, blocks = array("d"), array("d"), array("d")  # which hold no objects: what is counted must not grow by counting
    began = monotonic()
    for number in range(1, steps + 1):
        for call in lines:
            call.step()
        if number % max(1, steps // SAMPLES) == 0:
            frames = 2 * calls * number  # both directions
            tell(f"{frames:,} frames, {frames / (monotonic() - began):,.0f} a second, {rss_kib()} KiB")
            if number >= steps / 5:
                gc.collect()
                at.append(frames / 1e6)
                memory.append(rss_kib() * 1024)
                blocks.append(sys.getallocatedblocks())
    for call in lines:
        call.end()
    return {
        "calls": calls,
        "hours_each": hours,
        "frames": 2 * calls * steps,
        "frames_per_second": round(2 * calls * steps / (monotonic() - began)),
        "rss_mib": round(memory[-1] / 2**20, 1),
        "grown_kib": round((memory[-1] - memory[0]) / 1024),
        "bytes_per_million_frames": round(slope(at, memory)),
        "blocks_per_million_frames": round(slope(at, blocks), 1),
    }


# --- real calls ----------------------------------------------------------------------------------------------------------

OBJECTS = """
gc.freeze = lambda: None  # what is frozen can't be counted

def answer():
    gc.collect()
    return collections.Counter(type(each).__name__ for each in gc.get_objects())
"""
"""What objects there are in the gateway's process."""

OURS = ("Stream", "Session", "Subscription", "WebsocketLink", "Playout", "Ring", "Intake", "Timeline", "Channel", "House")
LOOP = ("Task", "TimerHandle", "WebSocketResponse", "ServiceSocket", "RequestHandler", "Future", "Handle")


async def objects(socket_path: Path) -> dict[str, int]:
    counted: dict[str, int] = await asked(socket_path)
    return {name: counted.get(name, 0) for name in (*OURS, *LOOP)}


async def state(running: GatewayProcess, socket_path: Path, secs: float, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is there after `secs`, or as soon as it is no more than `wanted`."""
    until = asyncio.get_running_loop().time() + secs
    while True:
        found = {
            **await objects(socket_path),
            "descriptors": running.descriptors,
            "threads": running.status("Threads"),
            "shm_files": shm_files(running.pid),
        }
        if (wanted is not None and not residue(wanted, found)) or asyncio.get_running_loop().time() > until:
            return found
        await asyncio.sleep(0.25)


def shm_files(pid: int) -> int:
    """Shared memory that the process has mapped or open."""
    maps = {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/shm/" in line}
    return len(maps)


def residue(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """What there is more of."""
    return {name: after[name] - before[name] for name in after if after[name] > before[name]}


async def burst(running: GatewayProcess, service: IndexedService, count: int, at_once: int, prefix: str) -> list[str]:
    """So many short calls, so many at a time. Returns whatever was lost of them."""
    found: list[str] = []
    numbers = iter(range(count))
    url = f"http://127.0.0.1:{running.port}/twilio/stream"

    async def some(http: aiohttp.ClientSession) -> None:
        for number in numbers:
            async with asyncio.TaskGroup() as tasks:
                caller = IndexedCaller(http, url, number, prefix)
                await caller.dial(tasks)
                for _ in range(5):
                    await caller.say()
                await settled([caller], service, 60)
                found.extend(losses([caller], service))
                await caller.hang_up()
            service.forget(caller.call_id)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http, asyncio.TaskGroup() as workers:
        for _ in range(at_once):
            workers.create_task(some(http))
    return found


async def calls(count: int, at_once: int = 20, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Two bursts of `count` short calls each, against a gateway that has had a few."""
    with TemporaryDirectory() as directory:
        socket_path = Path(directory) / "probe"
        async with IndexedService() as service:
            document: dict[str, object] = {
                "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
                "services": {"agent": service.configuration},
                "routes": [{"service": "agent"}],
                "max_calls_per_second": 100_000,
                "max_pending_per_address": 1000,
            }
            async with gateway(Path(directory), document, program=probe(socket_path, OBJECTS)) as running:
                found = await burst(running, service, 2 * at_once, at_once, "000")
                before = await state(running, socket_path, SETTLE_SECS)
                assert before["House"] == 1, "the process that is looked at is not the one that takes the calls"
                figures: dict[str, Any] = {"calls": 2 * count, "rss_before_kib": running.rss_kib}
                began = monotonic()
                for number in (1, 2):
                    found += await burst(running, service, count, at_once, f"{number:03d}")
                    after = await state(running, socket_path, 5 * SETTLE_SECS, before)
                    figures[f"rss_{number}_kib"] = running.rss_kib
                    figures[f"residue_{number}"] = residue(before, after)
                    tell(f"burst {number}: {json.dumps(figures)}")
                figures["calls_per_second"] = round(2 * count / (monotonic() - began))
    figures["losses"] = found[:10]
    figures["second_over_first"] = round(figures["rss_2_kib"] / figures["rss_1_kib"] - 1, 4)
    return figures


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("what", choices=("path", "calls"))
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--count", type=int, default=10_000, help="calls in each of two bursts")
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--store", action="store_true")
    given = parser.parse_args()

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if given.what == "path":
        figures = path(given.calls, given.hours, tell)
        passed = figures["bytes_per_million_frames"] <= MOST_BYTES_PER_MILLION or figures["grown_kib"] <= COARSE_KIB
    else:
        figures = asyncio.run(calls(given.count, given.at_once, tell=tell))
        growth = figures["second_over_first"] <= MOST_GROWTH_OF_SECOND_BURST
        passed = growth and not (figures["residue_1"] or figures["residue_2"] or figures["losses"])
    print(json.dumps(figures))
    if given.store:
        store(f"soak-{given.what}", figures, passed=passed, module="tests.soak")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
