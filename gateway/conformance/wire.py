"""Connections without a link: for handshakes seen byte by byte, and for what a link would never do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import ssl
import uuid
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

import aiohttp
from msgspec import Struct

from gateway.conformance.call import ACCEPTS, TapDialler
from gateway.conformance.seen import housekeeping
from gateway.events import Start
from gateway.media import Track
from gateway.services.dialler import ServiceSocket
from gateway.services.framed import SUBPROTOCOL_FRAMED, Header, pack
from gateway.services.native import SUBPROTOCOL_RAW, NativeCarrier, Ready, Resume
from gateway.services.websocket import READY_SECS
from gateway.settings import WebsocketService

CONNECT_SECS = 2.0
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Wire:
    """A connection without a link, for what a link would never do."""

    def __init__(self, dialler: TapDialler, service: WebsocketService, *, framed: bool) -> None:
        self._dialler, self._service, self.framed = dialler, service, framed
        self.session = uuid.uuid4().hex
        self.socket: ServiceSocket

    async def __aenter__(self) -> Self:
        self.socket = await self._dialler.dial("conformance-wire", self._service)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.close(code=1001)  # quick where it was cut

    async def start(self, resume: Resume | None = None) -> None:
        protocol = NativeCarrier(
            session=self.session,
            provider="conformance",
            kind="conformance",
            role="speaker",
            track=Track.INBOUND,
            media_format=self._service.media_format,
            frame_ms=self._service.frame_ms,
        )
        await self.say(protocol.start(Start(f"stream-{self.session}", f"call-{self.session}", accepts=ACCEPTS), resume))

    async def begin(self) -> None:
        """A call up to its first audio."""
        await self.start()
        if self.framed:
            await self.ready()
        samples = self._service.media_format.silence(20)
        await self.say(pack(Header(Track.INBOUND, 0, 0, 0), samples) if self.framed else samples)

    async def say(self, frame: str | bytes) -> None:
        with suppress(ConnectionError):
            await (self.socket.send_str(frame) if isinstance(frame, str) else self.socket.send_bytes(frame))

    async def ready(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_SECS):
                while not self.socket.closed:
                    message = await self.socket.receive()
                    if message.type is aiohttp.WSMsgType.TEXT and isinstance(housekeeping(message.data), Ready):
                        return True
        return False


class Answer(Struct):
    status: int
    headers: dict[str, str]
    key: str

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    @property
    def key_ok(self) -> bool:
        wanted = base64.b64encode(hashlib.sha1(f"{self.key}{GUID}".encode()).digest()).decode()  # noqa: S324  RFC 6455
        return self.header("sec-websocket-accept") == wanted


async def probe(url: str, authorization: str | None, more: dict[str, str] | None = None) -> Answer | str:
    """One handshake, read byte by byte; or why there was no answer."""
    parts = urlsplit(url)
    secure = parts.scheme == "wss"
    port = parts.port or (443 if secure else 80)
    key = base64.b64encode(os.urandom(16)).decode()
    headers = {
        "Host": parts.netloc,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": f"{SUBPROTOCOL_RAW}, {SUBPROTOCOL_FRAMED}",
    }
    if authorization is not None:
        headers["Authorization"] = f"Bearer {authorization}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers | (more or {})).items()), "", ""]
    writer = None
    try:
        async with asyncio.timeout(CONNECT_SECS):
            context = ssl.create_default_context() if secure else None
            reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
            writer.write("\r\n".join(lines).encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except TimeoutError:
        return f"there was no answer within {CONNECT_SECS:g} s"
    except ConnectionRefusedError:
        return "nothing listens there: start the service, or correct the URL"
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return f"no answer: {error}"
    finally:
        if writer is not None:
            writer.transport.abort()
    first, *rest = head.split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        return f"no HTTP: {first[:80]!r}"
    pairs = (line.partition(":") for line in rest if ":" in line)
    return Answer(int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, key)


def what_it_answered(answer: Answer | str) -> str:
    return answer if isinstance(answer, str) else f"with HTTP {answer.status}"
