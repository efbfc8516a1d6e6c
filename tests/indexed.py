"""Calls whose every 20 ms says its own number, in both directions: loss, doubling and order are seen to the sample, and how long
each frame took is known, because caller and service share a clock.

The service takes mu-law in raw mode (nothing is converted, so bytes are comparable) and answers each frame with one of its own.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from aiohttp import web

FRAME_BYTES = 160
MOST_FRAMES = 60_000
FRAMES = [index.to_bytes(4, "little") * 40 for index in range(MOST_FRAMES)]
PAYLOADS = [b64encode(frame).decode() for frame in FRAMES]
MULAW = {"encoding": "mulaw", "sample_rate": 8000}


class Heard:
    """What one end of a call has heard, frame by frame."""

    def __init__(self) -> None:
        self.frames = 0
        self.times: list[float] = []
        self.wrong: list[str] = []
        self._rest = b""

    def take(self, samples: bytes, now: float) -> None:
        """More samples. They may come in any pieces."""
        data = self._rest + samples if self._rest else samples
        whole = len(data) - len(data) % FRAME_BYTES
        for at in range(0, whole, FRAME_BYTES):
            if data[at : at + FRAME_BYTES] != FRAMES[self.frames]:
                number = int.from_bytes(data[at : at + 4], "little")
                if len(self.wrong) < 10:
                    self.wrong.append(f"frame {self.frames} is {number}: {data[at : at + 8].hex()}")
            self.frames += 1
            self.times.append(now)
        self._rest = data[whole:]


class IndexedService:
    """`heard` by the carrier's call id; `url` for the configuration."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.heard: dict[str, Heard] = {}
        self.stops: dict[str, dict[str, Any]] = {}
        self.said: dict[str, int] = {}
        self.texts: list[dict[str, Any]] = []
        """Whatever it was told but starts and stops."""
        self.port = 0
        self._runner: web.AppRunner

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.port}/"

    @property
    def configuration(self) -> dict[str, object]:
        return {"kind": "websocket", "url": self.url, "media_format": MULAW}

    def forget(self, call_id: str) -> None:
        """A call that was judged."""
        for kept in (self.heard, self.said, self.stops):
            kept.pop(call_id, None)

    async def __aenter__(self) -> IndexedService:
        app = web.Application()
        app.router.add_get("/", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, 0, backlog=1024).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("telephony-gateway.v1.raw",), compress=False)
        try:
            await socket.prepare(request)
        except ConnectionResetError:
            return web.Response()  # the gateway has given up
        first = await socket.receive()
        if first.type is not aiohttp.WSMsgType.TEXT:
            return socket  # the call was over before it was told
        call_id, loop = json.loads(first.data)["call_id"], asyncio.get_running_loop()
        heard = self.heard[call_id] = Heard()
        self.said[call_id] = 0
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                heard.take(message.data, loop.time())
                while self.said[call_id] < heard.frames:
                    await socket.send_bytes(FRAMES[self.said[call_id]])
                    self.said[call_id] += 1
            elif message.type is aiohttp.WSMsgType.TEXT:
                text = json.loads(message.data)
                if text["type"] == "stop":
                    self.stops[call_id] = text
                else:
                    self.texts.append({**text, "call_id": call_id})
        return socket


class IndexedCaller:
    """One call of Twilio's. `say` the next frame; `heard` is what came back."""

    def __init__(self, http: aiohttp.ClientSession, url: str, number: int, prefix: str = "") -> None:
        self.call_id = f"CA{prefix}{number:0{32 - len(prefix)}d}"
        self.stream_id = f"MZ{prefix}{number:0{32 - len(prefix)}d}"
        self.heard = Heard()
        self.frames = 0
        self.times: list[float] = []
        self.others: list[str] = []
        """Frames that are no media."""
        self.closed = asyncio.Event()
        self.close_code: int | None = None
        self._http, self.url = http, url
        self._socket: aiohttp.ClientWebSocketResponse
        self._reading: asyncio.Task[None]

    async def dial(self, tasks: asyncio.TaskGroup) -> None:
        """Connect and start. Raises aiohttp.ClientError where that is refused."""
        self._socket = await self._http.ws_connect(self.url, compress=0, max_msg_size=1 << 20)
        format_ = {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1}
        start = {"callSid": self.call_id, "streamSid": self.stream_id, "accountSid": "AC1", "tracks": ["inbound"]}
        frame = {"event": "start", "streamSid": self.stream_id, "start": {**start, "mediaFormat": format_}}
        await self._socket.send_str(json.dumps(frame))
        self._reading = tasks.create_task(self._read())

    async def say(self) -> None:
        """The next 20 ms."""
        frame = (
            f'{{"event":"media","streamSid":"{self.stream_id}","media":{{"track":"inbound","chunk":"{self.frames + 1}",'
            f'"timestamp":"{20 * self.frames}","payload":"{PAYLOADS[self.frames]}"}}}}'
        )
        self.times.append(asyncio.get_running_loop().time())
        self.frames += 1
        await self._socket.send_str(frame)

    async def hang_up(self) -> None:
        """Stop, then close."""
        if not self.closed.is_set():
            await self._socket.send_str(f'{{"event":"stop","streamSid":"{self.stream_id}","stop":{{}}}}')
            await self._socket.close()
        await self._reading

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            frame = json.loads(message.data)
            if frame["event"] == "media":
                self.heard.take(b64decode(frame["media"]["payload"]), loop.time())
            else:
                self.others.append(message.data)
        self.close_code = self._socket.close_code
        self.closed.set()


async def talk(callers: Sequence[IndexedCaller], secs: float) -> None:
    """All of them speak in real time, a few each millisecond, as callers do."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for tick in range(round(secs * 1000)):
        for caller in callers[tick % 20 :: 20]:
            if not caller.closed.is_set():
                with suppress(aiohttp.ClientConnectionResetError):  # it is being closed, and `closed` comes next
                    await caller.say()
        due += 0.001
        if (wait := due - loop.time()) > 0.0005:
            await asyncio.sleep(wait)


async def settled(callers: Sequence[IndexedCaller], service: IndexedService, secs: float = 5.0) -> None:
    """Until each end has heard what the other said, or nobody will any more."""
    loop = asyncio.get_running_loop()
    until = loop.time() + secs

    def done(caller: IndexedCaller) -> bool:
        heard = service.heard.get(caller.call_id)
        if heard is None:
            return caller.closed.is_set()
        return heard.frames == caller.frames and caller.heard.frames == service.said[caller.call_id]

    while loop.time() < until and not all(done(caller) for caller in callers):  # noqa: ASYNC110 - two ends, two directions
        await asyncio.sleep(0.02)


def losses(callers: Sequence[IndexedCaller], service: IndexedService) -> list[str]:
    """Every way in which these calls were not carried to the sample, both ways. Empty is what we want."""
    found = []
    for caller in callers:
        heard = service.heard.get(caller.call_id)
        if heard is None:
            found.append(f"{caller.call_id}: never reached the service")
            continue
        said = service.said[caller.call_id]
        found += [f"{caller.call_id} to service: {line}" for line in heard.wrong]
        found += [f"{caller.call_id} to caller: {line}" for line in caller.heard.wrong]
        if heard.frames != caller.frames:
            found.append(f"{caller.call_id}: {heard.frames} of {caller.frames} frames reached the service")
        if caller.heard.frames != said:
            found.append(f"{caller.call_id}: {caller.heard.frames} of {said} frames reached the caller")
    return found


def latencies_ms(callers: Sequence[IndexedCaller], service: IndexedService) -> list[float]:
    """From the caller's socket to the service's hand, each frame, sorted."""
    return sorted(
        1000 * (got - said)
        for caller in callers
        for said, got in zip(caller.times, service.heard[caller.call_id].times, strict=False)
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0
