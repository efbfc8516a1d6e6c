"""Many streams without carriers: what a link sees of a stream, and a lean service that keeps a ledger of both directions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from struct import Struct
from typing import Any

import structlog
from aiohttp import WSMsgType, web

from gateway.bus import Subscription
from gateway.events import Account, Audio, Command, Fault, Start, Stop, StopReason
from gateway.media import MULAW_8K, MediaFormat
from gateway.services import ServiceLost
from gateway.services.dialler import Dialler
from gateway.services.websocket import WebsocketLink
from gateway.settings import WebsocketService

HEADER = Struct("<BBHIQ")
FRAMES = [index.to_bytes(4, "little") * 40 for index in range(20_000)]
"""Each 20 ms of mu-law says its own number."""


class Line:
    """One stream: `hear` the caller's next frame, `hang_up`; `commands` is what the service asked for."""

    provider = "test"
    kind = "test"

    def __init__(self, number: int, dialler: Dialler, media_format: MediaFormat = MULAW_8K) -> None:
        self.session_id = f"s{number}"
        self.dialler = dialler
        self.log: Any = structlog.get_logger("test")
        self.start = Start("MZ", "CA", media_format=media_format, accepts=("audio", "checkpoint", "clear", "stop"))
        self.subscription = Subscription(media_format, capacity_ms=5_000)
        self.subscription.offer(self.start)
        self.commands: list[Command] = []
        self.frames = 0
        self.times: list[float] = []
        self.link: WebsocketLink
        self._loop = asyncio.get_running_loop()

    def hear(self) -> None:
        self.times.append(self._loop.time())
        self.subscription.offer(Audio(FRAMES[self.frames]))
        self.frames += 1

    def hang_up(self) -> None:
        self.subscription.offer(Stop(StopReason.CALLER_HANGUP, account=Account()))

    def perform(self, command: Command) -> None:
        self.commands.append(command)

    def pending(self) -> tuple[int, tuple[str, ...]]:
        return 0, ()

    def fault(self, code: str, message: str, ref: str | int | None) -> None:
        self.subscription.offer(Fault(code, message, ref))

    @property
    def spoken(self) -> list[int]:
        """Numbers of the frames that the service played."""
        return [int.from_bytes(each.payload[:4], "little") for each in self.commands if isinstance(each, Audio)]


class Ledger:
    """What the service knows of one stream."""

    def __init__(self) -> None:
        self.next = 0
        self.repeated = 0
        self.wrong: list[str] = []
        self.told: list[dict[str, Any]] = []
        self.made = 0
        self.times: list[float] = []


class LedgerService:
    """Framed mode: checks each frame's number against its samples, acknowledges every ten, and says one frame for every five.

    `kill` ends all connections without a close frame and stops listening; `revive` listens again on the same port.
    """

    def __init__(self) -> None:
        self.ledgers: dict[str, Ledger] = {}
        self.port = 0
        self._sockets: set[web.WebSocketResponse] = set()
        self._transports: set[asyncio.BaseTransport] = set()
        self._runner: web.AppRunner

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    async def revive(self) -> None:
        app = web.Application()
        app.router.add_get("/", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, backlog=1024).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        for site in [*self._runner.sites]:
            await site.stop()
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]
        self._transports.clear()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(protocols=("telephony-gateway.v1",), compress=False)
        await socket.prepare(request)
        assert request.transport
        self._transports.add(request.transport)
        loop = asyncio.get_running_loop()
        start = json.loads(await socket.receive_str())
        ledger = self.ledgers.setdefault(start["session"], Ledger())
        try:
            await socket.send_json({"type": "ready", "next": ledger.next})
            if start["resume"]:
                for number in range(start["resume"]["next_out"] - start["resume"]["next_out"] % 3, ledger.made):
                    await socket.send_bytes(HEADER.pack(0x11, 1, 0, number, 0) + FRAMES[number])
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    text = json.loads(message.data)
                    if text["type"] != "ack":
                        ledger.told.append(text)
                    continue
                _, _, _, seq, pos = HEADER.unpack_from(message.data)
                if seq < ledger.next:
                    ledger.repeated += 1
                    continue
                if seq != ledger.next or pos != seq * 160 or message.data[16:] != FRAMES[seq]:
                    ledger.wrong.append(f"{seq} at {pos}, not {ledger.next}")
                ledger.next = seq + 1
                ledger.times.append(loop.time())
                if seq % 10 == 9:
                    await socket.send_json({"type": "ack", "seq": seq})
                if seq % 5 == 4:
                    ledger.made += 1
                    await socket.send_bytes(HEADER.pack(0x11, 1, 0, ledger.made - 1, 0) + FRAMES[ledger.made - 1])
        except ConnectionError:
            pass
        return socket


@asynccontextmanager
async def calls(count: int, service: LedgerService, *others: WebsocketService, **options: Any) -> AsyncIterator[list[Line]]:
    """So many streams on the service, and one on each of the `others`, whose callers speak until the end of the block."""
    dialler = Dialler("test")
    settings = [WebsocketService(url=service.url, media_format=MULAW_8K, **options)] * count + [*others]
    lines = [Line(n, dialler) for n in range(len(settings))]
    loop = asyncio.get_running_loop()
    talking = True

    async def serve(link: WebsocketLink) -> None:
        with suppress(ServiceLost):
            await link.run()

    async def talk() -> None:
        due = loop.time()
        at = 0
        while talking:
            # A few of the callers each time, as in life: all at once would be a burst.
            for line in lines[at::20]:
                line.hear()
            at = (at + 1) % 20
            due += 0.001
            if at % 5 == 0:
                await asyncio.sleep(max(0.0, due - loop.time()))
        for line in lines:
            line.hang_up()

    try:
        async with asyncio.TaskGroup() as tasks:
            for line, setting in zip(lines, settings, strict=True):
                line.link = WebsocketLink([(setting.url, setting)], line)
                tasks.create_task(serve(line.link))
            tasks.create_task(talk())
            try:
                yield lines
            finally:
                talking = False
    finally:
        await dialler.close()
