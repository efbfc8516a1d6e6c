"""What it costs to say no, and what a live call feels of it: `python tests/benchmarks/door.py`.

Three processes on one machine: a gateway that checks signatures, a client that sends bad upgrades as fast as told (or as it can),
and a call through the echo service that times each 20 ms chunk on its way there and back. CPU is what the system charges the
gateway: its own time and the kernel's for its sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from gateway import config  # noqa: E402
from gateway.cli import make_server  # noqa: E402
from gateway.provider import SignedRequest  # noqa: E402
from gateway.tokens import Tokens  # noqa: E402

SECRET, TOKEN = "3d1e8b60c4f7a92e5b08d6c17f4a3e92", "0123456789abcdef0123456789abcdef"
PUBLIC = "https://voice.example.com"
BAR_US, BAR_ADDED_MS = 150.0, 5.0
IN_FLIGHT = 64
CHUNK, CHUNK_SECS = 160, 0.02


def document(port: int) -> dict[str, Any]:
    return {
        "listen": f"127.0.0.1:{port}",
        "public_url": PUBLIC,
        "secret": SECRET,
        "log_level": "warning",
        "providers": {
            "twilio": {"kind": "twilio_media_streams", "auth_token": TOKEN},
            "plivo": {"kind": "plivo_audio_streaming", "auth_token": TOKEN},
        },
        "services": {"echo": {"kind": "echo"}},
        "routes": [{"service": "echo"}],
    }


CUT_SECS = 0.005
"""Between the two pieces of a request that is cut in two."""


def bad_request(kind: str, name: str = "twilio") -> list[bytes]:
    """One that is refused, in the pieces in which it is sent: an upgrade by its `token`, or, with a good one, by its `signature`;
    a `webhook` by its signature; `nowhere`, by its path. `cut …` is the same in two pieces."""
    if kind.startswith("cut "):
        (whole,) = bad_request(kind.removeprefix("cut "), name)
        half = whole.index(b"\r\n\r\n") + 4 if whole.startswith(b"POST") else len(whole) // 2
        return [whole[:half], whole[half:]]
    if kind == "nowhere":
        return [b"GET /wp-login.php HTTP/1.1\r\nHost: voice.example.com\r\nUser-Agent: x\r\nAccept: */*\r\n\r\n"]
    if kind == "webhook":
        form = {"CallSid": f"CA{0:032}", "AccountSid": f"AC{0:032}", "From": "+14155550100", "To": "+14155550101",
                "Direction": "inbound", "CallStatus": "ringing", "FromCity": "SAN FRANCISCO"}  # fmt: skip
        body = urlencode(form)
        return [
            f"POST /{name}/answer HTTP/1.1\r\nHost: voice.example.com\r\nUser-Agent: TwilioProxy/1.1\r\n"
            f"Content-Type: application/x-www-form-urlencoded; charset=UTF-8\r\nContent-Length: {len(body)}\r\n"
            f"{signature_headers(name)}\r\n{body}".encode()
        ]
    return [bad_upgrade(kind, name)]


def signature_headers(name: str) -> str:
    names = ("X-Twilio-Signature",) if name == "twilio" else ("X-Plivo-Signature-V3", "X-Plivo-Signature-Ma-V3")
    return "".join(f"{header}: {'A' * 27}=\r\n" for header in names) + "X-Plivo-Signature-V3-Nonce: 1234567890\r\n"


def bad_upgrade(kind: str, name: str = "twilio") -> bytes:
    """One that is refused: by its token, or, with a good one, by its signature."""
    token = "A" * 120
    if kind == "signature":
        token = Tokens(SECRET).mint(name, "CA" + "0" * 32, "route-0", now=time.time(), nonce=os.urandom(16))
    return (
        f"GET /{name}/stream/{token} HTTP/1.1\r\nHost: voice.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\nUser-Agent: Twilio.TmeWs/1.0\r\n"
        f"{signature_headers(name)}\r\n"
    ).encode()


def flood(port: int, kind: str, name: str, rate: float, seconds: float) -> dict[str, float]:
    """Bad requests, each on a connection of its own, `rate` a second (0: as many as go). What was refused, and how fast."""
    first, *rest = bad_request(kind, name)
    poll, open_, sent, refused, other = select.epoll(), {}, 0, 0, 0
    later: deque[tuple[float, socket.socket]] = deque()
    began = time.perf_counter()
    while True:
        now = time.perf_counter() - began
        due = now < seconds and len(open_) < IN_FLIGHT and (not rate or sent < now * rate)
        if due:
            made = socket.socket()
            made.setblocking(False)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.connect_ex(("127.0.0.1", port))
            poll.register(made, select.EPOLLOUT)
            open_[made.fileno()] = made
            sent += 1
            if sent % 8:
                continue
        elif now >= seconds and not open_:
            break
        while later and later[0][0] < now:
            _, made = later.popleft()
            with suppress(OSError):  # it may be closed already
                made.send(rest[0])
        for number, events in poll.poll(0.001 if not due else 0):
            made = open_[number]
            if events & select.EPOLLOUT:
                made.send(first)
                if rest:
                    later.append((now + CUT_SECS, made))
                poll.modify(number, select.EPOLLIN)
                continue
            try:
                answer = made.recv(4096)
            except ConnectionError:
                answer = b""
            if answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 404 ")):
                refused += 1
            else:
                other += 1
            poll.unregister(number)
            made.close()
            del open_[number]
    took = time.perf_counter() - began
    return {"sent": sent, "refused": refused, "other": other, "per_second": refused / took}


def cpu_secs(pid: int) -> tuple[float, float]:
    """(its own, the kernel's for it) until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


async def call(port: int, name: str, seconds: float) -> tuple[list[float], bool]:
    """(milliseconds there and back of each chunk, whether all that came back is what was said)."""
    provider = make_server(config.parse(json.dumps(document(port)))).providers[name]
    kind, call_id = type(provider), f"CA{random.getrandbits(128):032x}"
    form = {"CallSid": call_id, "AccountSid": "AC1", "From": "+15550001", "To": "+15550002", "Direction": "inbound"}
    base, public = f"http://127.0.0.1:{port}", f"{PUBLIC}/{name}/answer"
    body = urlencode(form).encode()
    headers = dict(provider.sign(SignedRequest.read("POST", public, {}, body)))
    headers["content-type"] = "application/x-www-form-urlencoded"
    said, heard, sent_at, arrivals = bytearray(), bytearray(), [], []
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{base}/{name}/answer", data=body, headers=headers) as response:
            url = kind.dial(await response.text()).url
        upgrade = dict(provider.sign(SignedRequest.read("GET", url, {"upgrade": "websocket"})))
        async with http.ws_connect(url.replace("wss://voice.example.com", f"ws://127.0.0.1:{port}"), headers=upgrade) as ws:
            start = {
                "accountSid": "AC1", "streamSid": "MZ1", "callSid": call_id, "tracks": ["inbound"],
                "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}, "customParameters": {},
            }  # fmt: skip
            await ws.send_json({"event": "start", "sequenceNumber": "1", "start": start, "streamSid": "MZ1"})

            async def listen() -> None:
                async for message in ws:
                    frame = json.loads(message.data)
                    if frame["event"] == "media":
                        heard.extend(base64.b64decode(frame["media"]["payload"]))
                        arrivals.append((time.perf_counter(), len(heard)))
                    elif frame["event"] == "mark":
                        await ws.send_json(frame)

            async with asyncio.TaskGroup() as tasks:
                listening = tasks.create_task(listen())
                began = time.perf_counter()
                for number in range(round(seconds / CHUNK_SECS)):
                    await asyncio.sleep(max(0.0, began + number * CHUNK_SECS - time.perf_counter()))
                    chunk = random.randbytes(CHUNK)
                    said.extend(chunk)
                    sent_at.append(time.perf_counter())
                    media = {"track": "inbound", "chunk": str(number + 1), "timestamp": str(number * 20)}
                    media["payload"] = base64.b64encode(chunk).decode()
                    await ws.send_json({"event": "media", "sequenceNumber": str(number + 2), "media": media, "streamSid": "MZ1"})
                await asyncio.sleep(0.5)
                listening.cancel()
    times, at = [], 0
    for number, sent in enumerate(sent_at):
        while at < len(arrivals) and arrivals[at][1] < (number + 1) * CHUNK:
            at += 1
        if at < len(arrivals):
            times.append((arrivals[at][0] - sent) * 1000)
    return times, bytes(said) == bytes(heard)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def child(port: int, kind: str, name: str, rate: float, seconds: float) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, __file__, "--flood", str(port), kind, name, str(rate), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, _ = process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


@contextmanager
def gateway(**options: Any) -> Iterator[tuple[int, int]]:
    """(port, process id) of a gateway that serves `document`, with more options."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "gateway.yaml"
        path.write_text(json.dumps(document(port) | options))
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--workers", "1", "--config", str(path)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def measure(seconds: float, rate: float) -> dict[str, Any]:
    with gateway() as (port, pid):
        found: dict[str, Any] = {"refusals": {}}
        finished(child(port, "token", "twilio", 0, 1))  # warm
        for label, kind, name in (
            ("bad token", "token", "twilio"),
            ("bad signature, Twilio", "signature", "twilio"),
            ("bad signature, Plivo", "signature", "plivo"),
            ("bad token, cut in two", "cut token", "twilio"),
            ("bad webhook, Twilio", "webhook", "twilio"),
            ("bad webhook, Plivo", "webhook", "plivo"),
            ("bad webhook, cut in two", "cut webhook", "twilio"),
            ("no such path", "nowhere", "twilio"),
        ):
            before = cpu_secs(pid)
            result = finished(child(port, kind, name, 0, seconds))
            own, kernel = (after - start for after, start in zip(cpu_secs(pid), before, strict=True))
            number = result["refused"]
            found["refusals"][label] = {
                "cpu_us": (own + kernel) / number * 1e6, "own_us": own / number * 1e6, "kernel_us": kernel / number * 1e6,
                **result,
            }  # fmt: skip
        quiet, exact = asyncio.run(call(port, "twilio", seconds))
        found["quiet"] = {
            "p50_ms": quantile(quiet, 0.5),
            "p99_ms": quantile(quiet, 0.99),
            "max_ms": max(quiet),
            "exact": exact,
        }
        before = cpu_secs(pid)
        flooding = child(port, "token", "twilio", rate, seconds + 1)
        time.sleep(0.5)
        busy, exact = asyncio.run(call(port, "twilio", seconds))
        result = finished(flooding)
        used = sum(cpu_secs(pid)) - sum(before)
        found["flooded"] = {
            "p50_ms": quantile(busy, 0.5), "p99_ms": quantile(busy, 0.99), "max_ms": max(busy), "exact": exact,
            "added_p99_ms": quantile(busy, 0.99) - quantile(quiet, 0.99), "core": used / (seconds + 1.5), **result,
        }  # fmt: skip
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rate", type=float, default=5000.0, help="bad upgrades a second beside the call; 0: as many as go")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--flood", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        port, kind, name, rate, seconds = options.flood
        print(json.dumps(flood(int(port), kind, name, float(rate), float(seconds))))
        return
    found = measure(options.seconds, options.rate)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'refused':<24}{'CPU µs':>8}{'own':>7}{'kernel':>8}{'a second':>10}   bar {BAR_US:g} µs")
    for label, row in found["refusals"].items():
        print(f"{label:<24}{row['cpu_us']:>8.0f}{row['own_us']:>7.0f}{row['kernel_us']:>8.0f}{row['per_second']:>10.0f}")
    for label in ("quiet", "flooded"):
        row = found[label]
        figures = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms, max {row['max_ms']:.1f} ms"
        print(f"call, {label:<10} {figures}, exact: {row['exact']}")
    row = found["flooded"]
    print(
        f"flood: {row['per_second']:.0f} refused a second ({row['other']} not answered), {row['core']:.0%} of a core; "
        f"added p99 {row['added_p99_ms']:.2f} ms (bar {BAR_ADDED_MS:g} ms)"
    )


if __name__ == "__main__":
    main()
