"""Calls over lines that lose packets (T6): real TCP, in a network namespace of its own.

    python -m tests.packet_loss --calls 8 --secs 20 --store

Both lines of every call, the carrier's to the gateway and the gateway's to the service, lose a share of all packets in both
directions, from before the calls are dialled. Callers speak numbered frames both ways. How long frames take is compared with what
the same calls on the same lines take once nothing is lost.
"""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import ArgumentParser
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import aiohttp
import msgspec

from tests import netns
from tests.indexed import IndexedCaller, IndexedService, losses, quantile, settled, talk
from tests.processes import gateway
from tests.results import store

FRAME_MS = 20.0
SETTLE_SECS = 30
DIALS = 10
"""So often a caller tries who gets no answer."""
HARMLESS = {"media_stalled", "service_slow", "event_loop_blocked"}
"""Warnings that change nothing: a caller who waits until the others are through, lag, and other work of this machine."""
GIVEN_UP = {"carrier_vanished", "service_away", "service_lost"}
"""Above 5 %: a connection over which nothing has come for four seconds, or that was not made in time."""


class Lines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lines do, each way; only those that are `losing` lose packets, and `service_rate` is the service's."""

    loss_percent: int = 0
    losing: Literal["carrier", "service", "both"] = "both"
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    service_rate: int = 0

    def __str__(self) -> str:
        delay = f", {self.delay_ms:g} ± {self.jitter_ms:g} ms" if self.delay_ms else ""
        rate = f", {self.service_rate // 1000} kbit/s to the service" if self.service_rate else ""
        return f"{self.loss_percent} % ({self.losing}){delay}{rate}"


ALL = (
    Lines(1),
    Lines(5, "carrier"),
    Lines(5, "service"),
    Lines(5),
    Lines(20),
    Lines(1, "both", 20, 10),
    Lines(5, "carrier", 20, 10),
    Lines(5, "both", 20, 10),
    Lines(5, "carrier", 150, 50),
    Lines(20, "carrier", 20, 10),
)
THIN = Lines(1, "both", 20, 10, 64_000)
"""For one call: less than its audio."""


async def run(lines: Lines, calls: int, secs: float) -> dict[str, Any]:
    """The figures, measured by a process in a new namespace."""
    order = json.dumps({"lines": msgspec.to_builtins(lines), "calls": calls, "secs": secs})
    words = netns.command(sys.executable, "-m", "tests.packet_loss", "--inside", order)
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 0, f"{lines}: ended with {process.returncode}"
    return dict(json.loads(output))


async def measure(lines: Lines, calls: int, secs: float) -> dict[str, Any]:
    """The same within the namespace: a window with losses, and one without."""
    netns.prepare()
    delays = {"delay_ms": lines.delay_ms, "jitter_ms": lines.jitter_ms}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        carrier = stack.enter_context(netns.Line(0, **delays))
        far = stack.enter_context(netns.Line(1, **delays, rate=lines.service_rate))
        losing = [line for name, line in (("carrier", carrier), ("service", far)) if lines.losing in (name, "both")]
        netns.lose(losing, lines.loss_percent)
        async with IndexedService(far.near) as service:
            document: dict[str, object] = {
                "listen": f"{carrier.near}:0",
                "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
                "services": {"agent": {**service.configuration, "url": f"ws://{far.far}:{service.port}/"}},
                "routes": [{"service": "agent"}],
            }
            async with (
                gateway(directory, document, judge=lines.loss_percent <= 5) as running,
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
                asyncio.TaskGroup() as tasks,
            ):
                url = f"http://{carrier.far}:{running.port}/twilio/stream"
                callers = [IndexedCaller(http, url, number) for number in range(calls)]
                dials = sum(await asyncio.gather(*(dialled(caller, tasks) for caller in callers)))
                await talk(callers, 0.5)
                await settle(callers, service)
                before = netns.tcp_counter("RetransSegs"), netns.tcp_counter("TCPTimeouts")
                lossy = await window(callers, service, secs)
                came, dropped = netns.packets()
                again = netns.tcp_counter("RetransSegs"), netns.tcp_counter("TCPTimeouts")
                timeouts = [netns.timeout_ms(line) for line in losing]
                netns.lose(losing, 0)
                clean = await window(callers, service, secs)
                open_ = still_open(callers)
                found = losses(open_, service)
                events = Counter(entry["event"] for entry in running.new_entries() if entry["level"] != "info")
                for caller in callers:
                    await caller.hang_up()
    return {
        **msgspec.to_builtins(lines),
        "calls": calls,
        "dials": dials,
        "frames_each_way": sum(caller.frames for caller in callers),
        "packets": came,
        "packets_dropped": dropped,
        "retransmitted": again[0] - before[0],
        "timeouts": again[1] - before[1],
        "timeouts_ms": timeouts,
        "losses": found[:10],
        "gaps": [text for text in service.texts if text["type"] == "gap"][:10],
        "calls_closed": calls - len(open_),
        "warnings": dict(events),
        "clean_p50_ms": round(quantile(clean, 0.5), 2),
        "clean_p99_ms": round(quantile(clean, 0.99), 2),
        "p50_ms": round(quantile(lossy, 0.5), 2),
        "p99_ms": round(quantile(lossy, 0.99), 2),
        "worst_ms": round(lossy[-1], 2),
        "added_p50_ms": round(quantile(lossy, 0.5) - quantile(clean, 0.5), 2),
        "added_p99_ms": round(quantile(lossy, 0.99) - quantile(clean, 0.99), 2),
    }


async def dialled(caller: IndexedCaller, tasks: asyncio.TaskGroup) -> int:
    """How often it took."""
    for number in range(1, DIALS):
        with suppress(aiohttp.ClientError):
            await caller.dial(tasks)
            return number
    await caller.dial(tasks)
    return DIALS


def still_open(callers: list[IndexedCaller]) -> list[IndexedCaller]:
    return [caller for caller in callers if not caller.closed.is_set()]


async def settle(callers: list[IndexedCaller], service: IndexedService) -> None:
    """Until everything has come that still can: whose connection is given up meanwhile is not waited for."""
    loop = asyncio.get_running_loop()
    for _ in range(SETTLE_SECS):
        began = loop.time()
        await settled(still_open(callers), service, 1.0)
        if loop.time() - began < 1.0:
            break


async def window(callers: list[IndexedCaller], service: IndexedService, secs: float) -> list[float]:
    """How long the frames of so many seconds took from the caller's socket to the service's hand, sorted."""
    began = [caller.frames for caller in callers]
    await talk(callers, secs)
    await settle(callers, service)
    times = []
    for caller, at in zip(callers, began, strict=True):
        heard = service.heard[caller.call_id].times if caller.call_id in service.heard else []
        times += [1000 * (got - said) for said, got in zip(caller.times[at:], heard[at:], strict=False)]
    return sorted(times)


async def every(calls: int, secs: float, jobs: int) -> dict[str, dict[str, Any]]:
    """All lines; one call where it is thin."""
    places = asyncio.Semaphore(jobs)

    async def one(lines: Lines) -> tuple[str, dict[str, Any]]:
        async with places:
            figures = await (run(lines, 1, 4.0) if lines == THIN else run(lines, calls, secs))
        print(f"{lines}: {json.dumps(figures)}", *wrong(figures), sep="\n  ", flush=True)
        return str(lines), figures

    return dict(await asyncio.gather(*map(one, (*ALL, THIN))))


def wrong(figures: dict[str, Any]) -> list[str]:
    """What must not be.

    Up to 5 %, the p99 added is a retransmission timeout, and a frame, of each line that loses. Above that, audio may be lost
    where a buffer is full, and a connection that is silent for four seconds is given up: both are told.
    """
    lines = msgspec.convert({name: figures[name] for name in Lines.__struct_fields__}, Lines)
    told = figures["warnings"]
    if lines.loss_percent > 5:
        given_up = sum(told.get(name, 0) for name in GIVEN_UP)
        found = [] if figures["gaps"] or given_up else [*figures["losses"]]
        found += [f"{figures['calls_closed']} calls closed, {given_up} told"] * (figures["calls_closed"] > given_up)
        harmless = HARMLESS | GIVEN_UP | {"carrier_lost"}
    else:
        found, harmless = [*figures["losses"], *figures["gaps"]], HARMLESS
        found += ["calls were closed"] * bool(figures["calls_closed"])
        most = sum(figures["timeouts_ms"]) + FRAME_MS * len(figures["timeouts_ms"])
        if not lines.service_rate and figures["added_p99_ms"] > most:
            found.append(f"p99 {figures['added_p99_ms']:+} ms, more than {most:g}")
    found += [f"{name} in the log" for name in told if name not in harmless]
    return found


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.packet_loss")
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--secs", type=float, default=20.0, help="of each of two windows, with losses and without")
    parser.add_argument("--jobs", type=int, default=3, help="lines at the same time, each in its namespace")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--inside", help="for itself")
    given = parser.parse_args()
    if given.inside:
        order = json.loads(given.inside)
        print(json.dumps(asyncio.run(measure(msgspec.convert(order["lines"], Lines), order["calls"], order["secs"]))))
        return 0
    if missing := netns.missing():
        parser.error(missing)
    measured = asyncio.run(every(given.calls, given.secs, given.jobs))
    passed = not any(wrong(figures) for figures in measured.values())
    if given.store:
        store("packet-loss", measured, passed=passed, module="tests.packet_loss")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
