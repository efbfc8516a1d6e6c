"""The fuzzer's own processes: carriers that talk rubbish to a gateway's socket, and a service that talks rubbish to its link.

Raw sockets, so that the WebSocket itself can be broken too. Reads the gateway's port as its first line, runs until its standard
input closes, and prints what it sent as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import sys
from argparse import ArgumentParser
from contextlib import suppress
from itertools import count
from random import Random

import aiohttp
from aiohttp import web

from tests.fuzz.codecs import COMMANDS, FRAMES, HOUSEKEEPING, transcripts
from tests.fuzz.mutation import Frame, Mutator

UPGRADE = (
    "GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
BATCH, MOST_BATCHES = 20, 12
CALL_ID = re.compile(r'(?<="callSid":)\s*"[^"]*"|(?<="callId":)\s*"[^"]*"')


def framed(frame: Frame) -> bytes:
    """As a client writes it; its mask is zero, so that nothing need be masked. Lone surrogates become bytes that are no UTF-8."""
    data = frame.encode(errors="surrogatepass") if isinstance(frame, str) else frame
    return _header(0x81 if isinstance(frame, str) else 0x82, len(data)) + data


def _header(first: int, size: int) -> bytes:
    if size < 126:
        return bytes((first, 0x80 | size)) + bytes(4)
    if size < 65536:
        return struct.pack("!BBH", first, 0xFE, size) + bytes(4)
    return struct.pack("!BBQ", first, 0xFF, size) + bytes(4)


BROKEN = (
    _header(0x83, 3) + b"abc",  # an opcode of nobody's
    _header(0xC1, 3) + b"abc",  # a reserved bit: compressed, where nothing was agreed
    _header(0x81, 4) + b"\xff\xfe\x80a",
    b"\x81\x03abc",  # not masked
    struct.pack("!BBQ", 0x81, 0xFF, 10 << 30) + bytes(4) + b"x" * 1000,
    _header(0x81, 70_000) + b" " * 70_000,
    _header(0x01, 3) + b'{"e' + _header(0x81, 2) + b"{}",  # a message inside a message
    _header(0x80, 3) + b"abc",  # the end of nothing
    _header(0x01, 30_000) + b" " * 30_000 + (_header(0x00, 30_000) + b" " * 30_000) * 4,
    _header(0x88, 1) + b"\x03",
    _header(0x88, 2) + struct.pack("!H", 1005),
    _header(0x88, 2) + struct.pack("!H", 1000),
    _header(0x89, 126) + b"p" * 126,
    _header(0x09, 3) + b"abc",  # a ping in pieces
)
"""Ways to break the WebSocket. Each ends the connection."""

HARMLESS = (
    _header(0x89, 0),
    _header(0x8A, 4) + b"pong",
    _header(0x01, 2) + b'{"' + _header(0x89, 1) + b"p" + _header(0x80, 2) + b'"}',  # a ping between two pieces
)


class Hammer:
    """Carriers, several connections at once."""

    def __init__(self, port: int, seed: int, rate: float) -> None:
        self.port, self.random = port, Random(seed)
        self.rate, self.due = rate, 0.0
        self.numbers = count(1)
        self.seed = seed
        self.frames = self.connections = self.refused = 0

    async def attack(self, provider: str, kind: str) -> None:
        scripts = transcripts(kind)
        mutators = [Mutator([line.text for line in each.lines if line.dir == "in"], self.random) for each in scripts]
        while True:
            at = int(self.random.random() * len(scripts))
            good = [line.text for line in scripts[at].lines if line.dir == "in" and line.error is None]
            try:
                await self._connect(f"/{provider}/stream", good, mutators[at])
            except OSError:
                self.refused += 1
                await asyncio.sleep(0.01)

    async def _connect(self, path: str, good: list[Frame], mutator: Mutator) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(UPGRADE.format(path).encode())
            if b" 101 " not in await reader.readuntil(b"\r\n\r\n"):
                self.refused += 1
                return
            self.connections += 1
            async with asyncio.TaskGroup() as tasks:
                draining = tasks.create_task(self._drain(reader))
                await self._talk(writer, good, mutator, draining)
                draining.cancel()
        except asyncio.IncompleteReadError:
            self.refused += 1
        finally:
            writer.close()

    async def _talk(
        self, writer: asyncio.StreamWriter, good: list[Frame], mutator: Mutator, draining: asyncio.Task[None]
    ) -> None:
        draw = self.random.random
        if draw() < 0.9:
            # A call of its own: an id that nobody has.
            name = f'"CA{self.seed:04d}{next(self.numbers):028d}"'
            writer.write(b"".join(framed(CALL_ID.sub(name, frame) if isinstance(frame, str) else frame) for frame in good[:2]))
        for _ in range(MOST_BATCHES):
            batch = [framed(mutator.frame()) for _ in range(BATCH)]
            if draw() < 0.03:
                batch.append(HARMLESS[int(draw() * len(HARMLESS))])
            if draw() < 0.02:
                batch.append(BROKEN[int(draw() * len(BROKEN))])
            with suppress(ConnectionError):
                writer.write(b"".join(batch))
                await writer.drain()
            self.frames += BATCH
            await self._pace()
            if draining.done():
                return
        await asyncio.sleep(0.01)

    async def _pace(self) -> None:
        now = asyncio.get_running_loop().time()
        self.due = max(self.due, now) + BATCH / self.rate
        await asyncio.sleep(self.due - now)

    async def _drain(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass


class Rubbish:
    """A service that takes any call and talks rubbish, in whatever mode it is offered; and quiet carriers who call it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.raw = Mutator([*COMMANDS, b"\0\0" * 160], self.random)
        self.framed = Mutator([*COMMANDS, *HOUSEKEEPING, *FRAMES], self.random)
        self.messages = self.calls = 0

    async def listen(self, port: int) -> None:
        app = web.Application()
        app.router.add_get("/", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        numbered = self.random.random() < 0.6
        protocol = "telephony-gateway.v1" if numbered else "telephony-gateway.v1.raw"
        socket = web.WebSocketResponse(protocols=(protocol,), compress=False)
        await socket.prepare(request)
        mutator = self.framed if numbered else self.raw
        self.calls += 1
        with suppress(ConnectionError):
            if numbered:
                await socket.send_str('{"type":"ready","next":null}')
            async with asyncio.TaskGroup() as tasks:
                talking = tasks.create_task(self._talk(socket, mutator))
                async for _ in socket:
                    pass
                talking.cancel()
        return socket

    async def _talk(self, socket: web.WebSocketResponse, mutator: Mutator) -> None:
        with suppress(ConnectionError):
            for number in range(400):
                message = mutator.frame()
                data = message.encode(errors="replace") if isinstance(message, str) else message
                if '"stop"' in str(message) and number < 300:
                    continue  # most calls would be over at once
                await (socket.send_frame(data, aiohttp.WSMsgType.TEXT) if isinstance(message, str) else socket.send_bytes(data))
                self.messages += 1
                if number % 20 == 19:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            await socket.close(code=self.random.choice((1000, 1000, 1011, 4000)))


async def quiet_call(http: aiohttp.ClientSession, port: int, provider: str, number: int, *, text: bool) -> None:
    """A carrier that does nothing wrong, for the service that does."""
    call_id = f"CA{number:032d}"
    start: dict[str, object] = {"callSid": call_id, "streamSid": f"MZ{number:032d}"}
    start["mediaFormat"] = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
    frame = {"type": "setup", "sessionId": f"VX{number:032d}", "callSid": call_id} if text else {"event": "start", "start": start}
    with suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
        async with asyncio.timeout(5), http.ws_connect(f"http://127.0.0.1:{port}/{provider}/stream") as socket:
            await socket.send_str(json.dumps(frame))
            async for _ in socket:
                pass


async def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--listen", type=int, default=0, help="the port of the service")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--attack", action="append", default=[], help="provider:kind")
    parser.add_argument("--call", action="append", default=[], help="provider whose calls go to the service of this process")
    parser.add_argument("--rate", type=float, default=1e6, help="frames a second, at most")
    given = parser.parse_args()
    os.nice(19)  # in life this is another machine: it has what the gateway and its neighbours' callers leave
    rubbish = Rubbish(given.seed)
    await rubbish.listen(given.listen)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    port = int(await reader.readline() or 0)
    hammer = Hammer(port, given.seed, given.rate)

    async def callers(provider: str, at: int) -> None:
        async with aiohttp.ClientSession() as http:
            for number in count(at * 1_000_000 + given.seed * 10_000_000):
                await quiet_call(http, port, provider, number, text="relay" in provider)

    running: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as tasks:
        for each in given.attack:
            provider, _, kind = each.partition(":")
            running += [tasks.create_task(hammer.attack(provider, kind)) for _ in range(3)]
        running += [tasks.create_task(callers(provider, at)) for at, provider in enumerate(given.call, 1)]
        await reader.read()
        for task in running:
            task.cancel()
    sent = {"frames": hammer.frames, "connections": hammer.connections, "refused": hammer.refused}
    print(json.dumps({**sent, "service_messages": rubbish.messages, "service_calls": rubbish.calls}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
