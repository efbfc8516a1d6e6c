"""Instructions for each frame of the whole process, sockets and event loop included: ours beside the naive relay.

`python tests/benchmarks/process.py [--framed] [--tree DIRECTORY ...]` runs each under valgrind's callgrind, which makes it fifty
times slower: three calls are all it bears, each 60 ms a frame each way. What it does while nothing is said is measured too and
subtracted. The kernel's share is in no such count. A frame is one of 20 ms of one call in one direction. The naive relay holds
audio back and sends it in lumps of five frames: its count has a fifth of our writes in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
from aiohttp import web  # noqa: E402

from gateway.bench.subject import free_ports  # noqa: E402
from gateway.events import Audio, Start  # noqa: E402
from gateway.media import MULAW_8K, Track  # noqa: E402
from gateway.services.framed import SUBPROTOCOL_FRAMED, Header, pack  # noqa: E402
from gateway.services.native import SUBPROTOCOL_RAW  # noqa: E402
from providers.twilio_media_streams import Carrier  # noqa: E402

CALLS, WARM, FRAMES = 3, 60, 150
GAP_SECS = 0.06 / (2 * CALLS)
NAIVE = "naive"


class Service:
    """Takes everything; whoever speaks for it has its sockets."""

    def __init__(self, *, framed: bool) -> None:
        self.subprotocol = SUBPROTOCOL_FRAMED if framed else SUBPROTOCOL_RAW
        self.sockets: list[web.WebSocketResponse] = []

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=[self.subprotocol])
        await socket.prepare(request)
        heard = 0
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                heard += 1
                if self.subprotocol == SUBPROTOCOL_FRAMED and not heard % 10:
                    await socket.send_str(f'{{"type":"ack","seq":{heard - 1}}}')
            elif json.loads(message.data).get("type") == "start":
                await socket.send_str('{"type":"ready"}')
                self.sockets.append(socket)
        return socket


def command(tree: str, ports: list[int], directory: Path) -> list[str]:
    listen, admin, service = ports
    if tree == NAIVE:
        return [sys.executable, str(ROOT / "tests/benchmarks/peers/naive_aiohttp.py"), str(listen), str(service)]
    form = {"encoding": "pcm_s16le", "sample_rate": 16000}
    agent = {"kind": "websocket", "url": f"ws://127.0.0.1:{service}/", "media_format": form, "connect_timeout_secs": 20}
    document = {
        "listen": f"127.0.0.1:{listen}",
        "admin": f"127.0.0.1:{admin}",
        "providers": {"carrier": {"kind": "twilio_media_streams", "auth": "none"}},
        "services": {"agent": agent},
        "routes": [{"service": "agent"}],
    }
    path = directory / "gateway.yaml"
    path.write_text(json.dumps(document))
    return [sys.executable, "-m", "gateway", "serve", "--config", str(path), "--workers", "1"]


def listens(tree: str, ports: list[int]) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0 if tree == NAIVE else 1]}/readyz", timeout=5):
            return True
    except urllib.error.HTTPError:
        return tree == NAIVE
    except OSError:
        return False


async def count(tree: str, *, framed: bool) -> int:
    """Instructions of one frame."""
    service, ports = Service(framed=framed), free_ports(3)
    app = web.Application()
    app.router.add_get("/", service.serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", ports[2]).start()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out"]
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *valgrind, *command(tree, ports, directory), cwd=None if tree == NAIVE else tree, stdout=log, stderr=log
            )
        try:
            async with aiohttp.ClientSession() as http, asyncio.timeout(300):
                while not await asyncio.to_thread(listens, tree, ports):
                    if process.returncode is not None:
                        sys.exit((directory / "log").read_text()[-2000:])
                    await asyncio.sleep(0.5)
                path = "/" if tree == NAIVE else "/carrier/stream"
                return await talk(http, f"ws://127.0.0.1:{ports[0]}{path}", service, process.pid, directory)
        finally:
            process.kill()
            await process.wait()
            await runner.cleanup()


async def talk(http: aiohttp.ClientSession, url: str, service: Service, pid: int, directory: Path) -> int:
    carriers: list[tuple[Carrier, aiohttp.ClientWebSocketResponse]] = []
    draining: list[asyncio.Task[None]] = []

    async def drain(socket: aiohttp.ClientWebSocketResponse) -> None:
        async for _ in socket:
            pass

    for number in range(CALLS):
        carrier, socket = Carrier(), await http.ws_connect(url, compress=0)
        for frame in carrier.encode(Start(f"MZ{number:032}", f"CA{number:032}", f"AC{number:032}", media_format=MULAW_8K)):
            await socket.send_str(str(frame))
        carriers.append((carrier, socket))
        draining.append(asyncio.ensure_future(drain(socket)))  # noqa: TID251 ends with its socket
    while len(service.sockets) < CALLS:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    randomness, said = random.Random(1), 0

    async def speak(frames: int) -> None:
        nonlocal said
        for _ in range(frames):
            for (carrier, socket), answering in zip(carriers, service.sockets, strict=True):
                for frame in carrier.encode(Audio(randomness.randbytes(160), Track.INBOUND, said * 20)):
                    await socket.send_str(str(frame))
                await asyncio.sleep(GAP_SECS)
                samples = randomness.randbytes(640)
                framed = service.subprotocol == SUBPROTOCOL_FRAMED
                await answering.send_bytes(pack(Header(Track.INBOUND, 0, said, said * 320), samples) if framed else samples)
                await asyncio.sleep(GAP_SECS)
            said += 1

    async def note() -> None:
        await asyncio.sleep(1)
        await asyncio.to_thread(subprocess.run, ["callgrind_control", "-d", str(pid)], check=True, capture_output=True)

    loop = asyncio.get_running_loop()
    await speak(WARM)
    await note()
    began = loop.time()
    await speak(FRAMES)
    await note()
    await asyncio.sleep(loop.time() - began - 1)  # as long again, silent
    await note()
    for _, socket in carriers:
        await socket.close()
    await asyncio.gather(*draining)
    totals = [
        int(re.findall(r"^(?:summary|totals): (\d+)", (directory / f"out.{n}").read_text(), re.MULTILINE)[-1]) for n in (2, 3)
    ]
    return (totals[0] - totals[1]) // (2 * FRAMES * CALLS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framed", action="store_true")
    parser.add_argument("--tree", action="append", help="a directory with a gateway, or the word naive; several are compared")
    options = parser.parse_args()
    for tree in options.tree or [str(ROOT), NAIVE]:
        print(f"{asyncio.run(count(tree, framed=options.framed)):>10,} instructions a frame   {tree}", flush=True)


if __name__ == "__main__":
    main()
