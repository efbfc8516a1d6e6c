"""Three times the calls that are admitted are offered to a gateway (O1): those inside feel nothing, those outside hear at once.

    python -m tests.overload --admitted 60 --secs 20 --store

All calls are offered at once by their webhooks; whoever is refused asks again every second, as a new call. Those inside speak
numbered frames both ways. Windows with and without offers take turns, so that what the machine does besides is in both.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any
from urllib.parse import urlencode

import aiohttp

from tests.indexed import IndexedCaller, IndexedService, losses, quantile, settled, talk
from tests.processes import gateway
from tests.results import store

STREAM = re.compile(r'<Stream[^>]* url="([^"]+)"')
BUSY = "<Reject"
MOST_ADDED_P99_MS = 20.0
MOST_REFUSAL_MS = 50.0


def _form(caller: IndexedCaller) -> dict[str, str]:
    return {"CallSid": caller.call_id, "From": "+15550100001", "To": "+15550100002", "Direction": "inbound"}


def _at_once(port: int, bodies: Sequence[str]) -> list[tuple[float, str]]:
    """Webhooks over connections that are there already: how long each took in ms, and its answer.

    By bare sockets: an HTTP client of Python's takes longer to send so many than the gateway to answer them.
    """
    head = "POST /twilio/answer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode() for body in bodies]
    with ExitStack() as stack, DefaultSelector() as selector:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in requests]
        sent, took, answers = [0.0] * len(requests), [0.0] * len(requests), [b""] * len(requests)
        for at, (one, request) in enumerate(zip(sockets, requests, strict=True)):
            selector.register(one, EVENT_READ, at)
            sent[at] = monotonic()
            one.sendall(request)
        while selector.get_map():
            ready = selector.select(10)
            assert ready, "no answer within ten seconds"
            now = monotonic()
            for key, _ in ready:
                at, data = key.data, sockets[key.data].recv(65536)
                took[at] = took[at] or 1000 * (now - sent[at])
                answers[at] += data
                if not data:
                    selector.unregister(sockets[at])
    return [(ms, answer.decode()) for ms, answer in zip(took, answers, strict=True)]


class Offers:
    """Callers who ask by webhook whether they may come in."""

    def __init__(self, http: aiohttp.ClientSession, port: int) -> None:
        self.http, self.port = http, port
        self.numbers = count()
        self.refusals_ms: list[float] = []
        self.wrong: list[str] = []

    async def offer(self) -> IndexedCaller | None:
        """One call: None where it is refused."""
        loop, number = asyncio.get_running_loop(), next(self.numbers)
        caller = IndexedCaller(self.http, "", number)
        began = loop.time()
        async with self.http.post(f"http://127.0.0.1:{self.port}/twilio/answer", data=_form(caller)) as response:
            text = await response.text()
        return self._judged(caller, text, 1000 * (loop.time() - began))

    async def offer_at_once(self, number: int) -> list[IndexedCaller]:
        """So many calls in the same moment: who was let in."""
        callers = [IndexedCaller(self.http, "", next(self.numbers)) for _ in range(number)]
        answers = await asyncio.to_thread(_at_once, self.port, [urlencode(_form(caller)) for caller in callers])
        return [
            caller
            for one, (took, text) in zip(callers, answers, strict=True)
            if (caller := self._judged(one, text, took)) is not None
        ]

    def _judged(self, caller: IndexedCaller, text: str, took_ms: float) -> IndexedCaller | None:
        if match := STREAM.search(text):
            caller.url = match[1]
            return caller
        if BUSY not in text:
            self.wrong.append(text[:200])
        self.refusals_ms.append(took_ms)
        return None

    async def keep_offering(self, callers: int, secs: float) -> None:
        """Each of so many asks every second, spread over it; all are refused."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(round(secs * callers)):
            if await self.offer() is not None:
                self.wrong.append("a call too many was let in")
            due += 1 / callers
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)


async def run(admitted: int, secs: float, windows: int = 2, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """`windows` of `secs` each without offers and as many with them. Returns the figures."""
    with TemporaryDirectory() as directory:
        async with IndexedService() as service:
            document: dict[str, object] = {
                "providers": {"twilio": {"kind": "twilio_media_streams", "auth": "none"}},
                "services": {"agent": service.configuration},
                "routes": [{"service": "agent"}],
                "max_calls": admitted,
                "max_calls_per_second": 100_000,
                "max_pending_per_address": 10_000,
                "hold_ms": 10_000,
            }
            async with (
                gateway(Path(directory), document) as running,
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
                asyncio.TaskGroup() as tasks,
            ):
                offers = Offers(http, running.port)
                callers = await offers.offer_at_once(3 * admitted)
                first = sorted(offers.refusals_ms)
                offers.refusals_ms.clear()
                for caller in callers:
                    await caller.dial(tasks)
                await talk(callers, 1.0)
                times: dict[bool, list[float]] = {False: [], True: []}
                for window in range(2 * windows):
                    offering = window % 2 == 1
                    began = [caller.frames for caller in callers]
                    async with asyncio.TaskGroup() as both:
                        if offering:
                            both.create_task(offers.keep_offering(2 * admitted, secs))
                        both.create_task(talk(callers, secs))
                    await settled(callers, service)
                    for caller, at in zip(callers, began, strict=True):
                        heard = service.heard[caller.call_id].times
                        times[offering] += [1000 * (b - a) for a, b in zip(caller.times[at:], heard[at:], strict=False)]
                    ordered = sorted(times[offering])
                    what, p50, p99 = "offers" if offering else "quiet", quantile(ordered, 0.5), quantile(ordered, 0.99)
                    tell(f"{what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
                found = losses(callers, service)
                for caller in callers:
                    await caller.hang_up()
    quiet, offered, refusals = sorted(times[False]), sorted(times[True]), sorted(offers.refusals_ms)
    return {
        "admitted": len(callers),
        "offered_at_once": 3 * admitted,
        "offered_after": len(refusals),
        "frames_each_way": sum(caller.frames for caller in callers),
        "losses": found[:10],
        "wrong_answers": offers.wrong[:10],
        "p50_ms": round(quantile(quiet, 0.5), 2),
        "p99_ms": round(quantile(quiet, 0.99), 2),
        "p99_with_offers_ms": round(quantile(offered, 0.99), 2),
        "added_p99_ms": round(quantile(offered, 0.99) - quantile(quiet, 0.99), 2),
        "refusal_p50_ms": round(quantile(refusals, 0.5), 2),
        "refusal_p99_ms": round(quantile(refusals, 0.99), 2),
        "refusal_worst_ms": round(refusals[-1], 2) if refusals else 0.0,
        "first_burst_p50_ms": round(quantile(first, 0.5), 2),
        "first_burst_worst_ms": round(first[-1], 2) if first else 0.0,
    }


def passed(figures: dict[str, Any]) -> bool:
    harmless = not figures["losses"] and not figures["wrong_answers"]
    return harmless and figures["added_p99_ms"] <= MOST_ADDED_P99_MS and figures["refusal_p99_ms"] <= MOST_REFUSAL_MS


def main() -> int:
    parser = ArgumentParser(prog="python -m tests.overload")
    parser.add_argument("--admitted", type=int, default=60)
    parser.add_argument("--secs", type=float, default=20.0, help="of each of four windows")
    parser.add_argument("--store", action="store_true")
    given = parser.parse_args()
    figures = asyncio.run(run(given.admitted, given.secs, tell=lambda line: print(line, file=sys.stderr, flush=True)))
    print(json.dumps(figures))
    if given.store:
        store("overload", figures, passed=passed(figures), module="tests.overload")
    return 0 if passed(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
