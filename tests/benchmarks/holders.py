"""What those cost who hold a connection and do nothing with it: `python tests/benchmarks/holders.py upgraded --number 5000`.

Three processes: a gateway, a client that opens so many connections at a rate, and a call through the echo service that times each
20 ms chunk there and back, first alone, then beside them. Each connection has its own clock, from when it came into its state (by
its TCP connection, its upgrade, its answer) to its end, so that the time in which they are opened is not counted.

    silent      says nothing at all
    drip        sends a header line a second
    answered    has had an answer, and says nothing more
    upgraded    is a WebSocket with a good token and signature, and never starts

The client and the call do without the garbage collector, whose pauses would count as the gateway's, and the client, which in
life is another machine, has what the other two leave of the processors.

Memory is the gateway's resident set, less what it was before, by the connections that it had when it was largest: the process's
own. The kernel's buffers of an idle socket are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gateway import host
from gateway.tokens import Tokens
from tests.benchmarks.door import PUBLIC, SECRET, TOKEN, call, free_port, gateway, quantile
from tests.doubles.twilio_media import signature

TICK_SECS = 0.001
DRIP_SECS = 1.0
SETTLE_SECS = 10.0
STATES = {"silent": b"", "drip": b"", "answered": b"HTTP/1.1 200 ", "upgraded": b"HTTP/1.1 101 "}
"""And the answer that brings a connection there."""


def first_bytes(state: str, number: int) -> bytes:
    if state == "silent":
        return b""
    if state == "drip":
        return b"GET /twilio/stream HTTP/1.1\r\nHost: x\r\n"
    if state == "answered":
        return b"GET /twilio/stream HTTP/1.1\r\nHost: x\r\n\r\n"
    token = Tokens(SECRET).mint("twilio", f"CA{number:032}", "route-0", now=time.time(), nonce=os.urandom(16))
    url = f"{PUBLIC.replace('https', 'wss')}/twilio/stream/{token}"
    return (
        f"GET /twilio/stream/{token} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\nX-Twilio-Signature: {signature(TOKEN, url)}\r\n\r\n"
    ).encode()


class Holder(asyncio.Protocol):
    """One of them. `held` is for how long it was in its state, None as long as it is; `code` is of the WebSocket's close."""

    def __init__(self, state: str, number: int) -> None:
        self.state = state
        self.number = number
        self.code = 0
        self.held: float | None = None
        self.came: float | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # it is both ways
        if not STATES[self.state]:
            self.came = time.monotonic()
        self.transport.write(first_bytes(self.state, self.number))

    def data_received(self, data: bytes) -> None:
        if self.came is None:
            if data.startswith(STATES[self.state]):
                self.came = time.monotonic()
        elif self.state == "upgraded" and data[0] == 0x88:
            self.code = int.from_bytes(data[2:4])
            self.transport.write(b"\x88\x82\0\0\0\0" + data[2:4])
            self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()

    def _ended(self) -> None:
        if self.held is None and self.came is not None:
            self.held = time.monotonic() - self.came


async def client(port: int, state: str, number: int, rate: float, seconds: float) -> dict[str, Any]:
    """Opens so many, and waits for their ends, `seconds` at most."""
    loop = asyncio.get_running_loop()
    began, holders = loop.time(), []
    drips: deque[tuple[float, Holder]] = deque()  # the next due first
    opening: set[asyncio.Task[Any]] = set()
    while len(holders) < number or (any(each.held is None for each in holders) and loop.time() - began < seconds + number / rate):
        while len(holders) < min(number, (loop.time() - began) * rate):
            holder = Holder(state, len(holders))
            holders.append(holder)
            task = loop.create_task(loop.create_connection(lambda holder=holder: holder, "127.0.0.1", port))  # type: ignore[misc]
            opening.add(task)
            task.add_done_callback(opening.discard)
            if state == "drip":
                drips.append((loop.time() + DRIP_SECS, holder))
        while drips and drips[0][0] <= loop.time():
            due, holder = drips.popleft()
            if holder.held is None:
                drips.append((due + DRIP_SECS, holder))
                if holder.came is not None:
                    holder.transport.write(b"X: y\r\n")
        await asyncio.sleep(TICK_SECS)
    held = [each.held for each in holders if each.held is not None]
    codes = sorted({each.code for each in holders})
    return {
        "number": number, "came": sum(each.came is not None for each in holders), "ended": len(held), "codes": codes,
        "p50_secs": quantile(held, 0.5), "min_secs": min(held), "max_secs": max(held),
    }  # fmt: skip


def arguments(port: int, state: str, number: int, rate: float, seconds: float) -> list[str]:
    return [sys.executable, __file__, state, "--client", str(port), "--number", str(number), "--rate", str(rate),
            "--seconds", str(seconds)]  # fmt: skip


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def descriptors(pid: int) -> int:
    directory = Path(f"/proc/{pid}/fd")
    return directory.stat().st_size or sum(1 for _ in directory.iterdir())  # Linux 6.2 and newer know without counting


async def measure(state: str, number: int, rate: float) -> dict[str, Any]:
    admin = free_port()
    options = {"max_calls": number, "max_pending_per_address": number, "admin": f"127.0.0.1:{admin}"}
    with gateway(**options) as (port, pid):
        quiet, exact = await call(port, "twilio", number / rate + SETTLE_SECS)
        before, peak, most = resident_kib(pid), 0, 0
        process = await asyncio.create_subprocess_exec(*arguments(port, state, number, rate, SETTLE_SECS), stdout=subprocess.PIPE)
        calling = asyncio.get_running_loop().create_task(call(port, "twilio", number / rate + SETTLE_SECS))
        finished = asyncio.get_running_loop().create_task(process.communicate())
        while not (finished.done() and calling.done()):
            peak, most = max(peak, resident_kib(pid)), max(most, await asyncio.to_thread(descriptors, pid))
            await asyncio.sleep(0.5)
        busy, still_exact = calling.result()
        (out, _) = finished.result()
        metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics").read().decode())
        (pending,) = (line.split()[-1] for line in metrics.splitlines() if line.startswith("telephony_connections_pending "))
        return {
            **json.loads(out),
            "state": state,
            "at_once": most,
            "kib_each": (peak - before) / most,
            "pending_afterwards": float(pending),
            "quiet_p99_ms": quantile(quiet, 0.99),
            "quiet_p999_ms": quantile(quiet, 0.999),
            "busy_p99_ms": quantile(busy, 0.99),
            "busy_p999_ms": quantile(busy, 0.999),
            "exact": exact and still_exact,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", choices=[*STATES])
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=1000.0, help="opened a second")
    parser.add_argument("--seconds", type=float, default=SETTLE_SECS, help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    gc.collect()
    gc.disable()
    if options.client:
        os.nice(19)
        print(json.dumps(host.run(client(options.client, options.state, options.number, options.rate, options.seconds))))
        return
    found = asyncio.run(measure(options.state, options.number, options.rate))
    if options.json:
        print(json.dumps(found))
        return
    print("{came} of {number} came to be {state}; {at_once} descriptors at once at most, {kib_each:.1f} KiB each".format(**found))
    print("{ended} ended, after {p50_secs:.2f} s (p50), {min_secs:.2f} to {max_secs:.2f} s, codes {codes}".format(**found))
    print("the call: p99 {quiet_p99_ms:.2f} ms alone, {busy_p99_ms:.2f} ms beside them, exact: {exact}".format(**found))
    print("          p99.9 {quiet_p999_ms:.2f} ms alone, {busy_p999_ms:.2f} ms beside them".format(**found))
    print("pending afterwards: {pending_afterwards:g}".format(**found))


if __name__ == "__main__":
    main()
