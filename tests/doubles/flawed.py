"""A service in both modes that does everything right, but for one flaw on order, which is called like the check that finds it."""

import asyncio
import json
import struct
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response

RAW, FRAMED = "telephony-gateway.v1.raw", "telephony-gateway.v1"
HEADER = struct.Struct("<BBHIQ")
WIDTHS = {"mulaw": 1, "alaw": 1, "pcm_s16le": 2, "pcm_f32le": 4}
UNAUTHORIZED = HTTPStatus.UNAUTHORIZED


class Broken(Exception):
    """What a service's handler dies of."""


class FlawedService:
    """`.url` listens while the block lasts. Echoes; asks for a checkpoint at a key; greets if `greeting`."""

    def __init__(self, flaw: str = "", *, framed: bool = False, token: str | None = None, greeting: bool = True) -> None:
        self.flaw, self.framed, self.token, self.greeting = flaw, framed, token, greeting
        self.handshakes = 0
        self.all: set[ServerConnection] = set()
        self.sessions: dict[str, dict[str, Any]] = {}
        self.marks = 0
        self.dead = False

    async def __aenter__(self) -> Self:
        self.server = await serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._request,
            process_response=self._response,
            select_subprotocol=lambda connection, offered: None,
            compression=None,
            ping_interval=None,
            max_size=2**24,
            close_timeout=0.2,
        )
        self.url = f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/call"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await asyncio.wait_for(self.server.wait_closed(), 5)

    def die(self) -> None:
        """As if the process were gone: nobody is answered any more."""
        self.dead = True
        for ws in self.all:
            ws.transport.abort()

    # Handshake.

    async def _request(self, ws: ServerConnection, request: Request) -> Response | None:
        headers = request.headers
        if self.dead:
            return ws.respond(HTTPStatus.SERVICE_UNAVAILABLE, "")
        if self.flaw == "no-redirect":
            return Response(302, "Found", type(headers)({"Location": "ws://127.0.0.1:1/"}), b"")
        if self.flaw == "connect":
            return ws.respond(HTTPStatus.SERVICE_UNAVAILABLE, "")
        if self.flaw == "headers" and "traceparent" in headers:
            return ws.respond(HTTPStatus.BAD_REQUEST, "")
        if request.path != "/call":
            broken = self.flaw == "unknown-path"
            return ws.respond(HTTPStatus.INTERNAL_SERVER_ERROR if broken else HTTPStatus.NOT_FOUND, "")
        if self.token and self.flaw != "authorization" and headers.get("Authorization") != f"Bearer {self.token}":
            return ws.respond(UNAUTHORIZED, "")
        return None

    def _response(self, ws: ServerConnection, request: Request, response: Response) -> Response:
        self.handshakes += 1
        mode: str | None = FRAMED if self.framed else RAW
        if self.flaw == "subprotocol":
            mode = "chat"
        if self.flaw == "same-mode" and self.handshakes % 3 == 0:
            mode = None
        if response.status_code == 101:
            if mode is not None:
                response.headers["Sec-WebSocket-Protocol"] = mode
            if self.flaw == "no-extension":
                response.headers["Sec-WebSocket-Extensions"] = "permessage-deflate"
            if self.flaw == "accept-key":
                del response.headers["Sec-WebSocket-Accept"]
                response.headers["Sec-WebSocket-Accept"] = "c" * 27 + "="
        return response

    # A call.

    async def _handle(self, ws: ServerConnection) -> None:
        self._tamper(ws)
        with suppress(ConnectionClosed):
            try:
                await self._converse(ws)
            except ConnectionClosed:
                if self.flaw in ("cut", "mass-hangup") and ws.close_code == 1006 and self.sessions:
                    self.die()
                if self.flaw == "going-away" and ws.close_code == 1001:
                    self.die()
                raise
            except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
                if self.flaw.startswith("rubbish") or self.flaw == "before-start":
                    self.die()
                await ws.close(4400)
            except Broken:
                await ws.close(1011)
            finally:
                self.all.discard(ws)

    def _tamper(self, ws: ServerConnection) -> None:
        """Change how the library treats control frames."""
        receive = ws.protocol.recv_frame

        def recv_frame(frame: Frame) -> None:
            if frame.opcode is Opcode.PING and self.flaw == "ping":
                return
            if frame.opcode is Opcode.CLOSE and self.flaw == "close-time":
                return
            if frame.opcode is Opcode.CLOSE and self.flaw == "close-code":
                frame = Frame(Opcode.CLOSE, Close(1011, "").serialize())
            receive(frame)

        ws.protocol.recv_frame = recv_frame  # type: ignore[method-assign]

    async def _converse(self, ws: ServerConnection) -> None:
        flaw = self.flaw
        first = await ws.recv()
        start = json.loads(first)
        if start["type"] != "start":
            raise ValueError(first)
        media, session = start["media_format"], start["session"]
        self._break_at_start(str(first), start)
        if media and flaw == "format" and media["encoding"] == "mulaw":
            await ws.close(4003)
            return
        state = self.sessions.setdefault(session, {"next": 0, "out": 0, "known": 0, "live": 0})
        if flaw == "resume-unknown" and start["resume"] and not state["known"]:
            raise Broken
        if flaw == "replaced" and state["live"]:
            await ws.close(4409)
            return
        state["known"] += 1
        state["live"] += 1
        if flaw == "reconnect" and state["known"] > 1:
            await ws.close(4404)
            return
        if flaw == "resume-numbers" and state["known"] > 1:
            state["out"] = 0
        try:
            await self._serve(ws, start, state)
        finally:
            state["live"] -= 1

    def _break_at_start(self, text: str, start: dict[str, Any]) -> None:
        flaw, media = self.flaw, start["media_format"]
        breaks = {
            "text-stream": media is None,
            "anonymous": not start["caller"],
            "parameters": len(text) > 5000,
            "unknown-field": "novelty" in start,
            "json-spelling": not text.startswith('{"type":"start"'),
            "resume": bool(start["resume"]) and start["resume"]["queued_ms"] >= 0 and bool(self.sessions.get(start["session"])),
        }
        if breaks.get(flaw):
            raise Broken

    async def _serve(self, ws: ServerConnection, start: dict[str, Any], state: dict[str, Any]) -> None:
        flaw, media = self.flaw, start["media_format"]
        loop = asyncio.get_running_loop()
        framed = ws.response is not None and ws.response.headers.get("Sec-WebSocket-Protocol") == FRAMED
        width = WIDTHS[media["encoding"]] if media else 1

        async def play(samples: bytes) -> None:
            if not framed or flaw == "header":
                await ws.send(samples)
                return
            await ws.send(HEADER.pack(0x11, 1, 0, state["out"], 0) + samples)
            state["out"] += 2 if flaw == "numbers" else 1

        async def say(**command: Any) -> None:
            await ws.send(json.dumps(command))

        if framed and flaw != "ready":
            wanted = 10**6 if flaw == "resume-next" and start["resume"] else state["next"]
            await say(type="ready", next=wanted)
            if flaw == "ready-once":
                await say(type="ready", next=wanted)
        if media is None and flaw == "text-silent":
            await ws.send(b"\0\0" * 160)
        if media is not None:
            self.all.add(ws)
            if flaw == "concurrent" and len(self.all) > 12:
                raise Broken
            await self._greet(play, say, start, state)
        clock, count, pausing = loop.time(), 0, False
        at_once = (0.0, 0)
        while True:
            try:
                async with asyncio.timeout(0.9 if flaw in ("idle", "close-codes") else 0.6 if flaw == "pause" and media else 60):
                    message = await ws.recv()
            except TimeoutError:
                if flaw == "close-codes":
                    await ws.close(4999)
                if flaw != "pause" or media is None:
                    raise Broken from None
                while loop.time() - clock < 4:
                    await ws.send(bytes(80_000 * width))
                    await asyncio.sleep(0.01)
                return
            if isinstance(message, bytes):
                if framed:
                    seq = HEADER.unpack_from(message)[3]
                    message = message[HEADER.size :]
                    state["next"] = max(state["next"], seq + 1)
                    count += 1
                    if flaw != "acks" and count % 10 == 0:
                        await say(type="ack", seq=seq + (500 if flaw == "ack-valid" else 0))
                if len(message) % width:
                    raise ValueError("half a sample")
                size = len(message)
                at_once = (loop.time(), 0) if loop.time() - at_once[0] > 0.5 else (at_once[0], at_once[1] + size)
                if flaw == "frame-sizes" and size == 3200:
                    raise Broken
                if flaw == "short-frame" and size == width:
                    raise Broken
                if flaw == "burst" and at_once[1] > 40_000:
                    raise Broken
                if message and not pausing:
                    if flaw == "isolation":
                        for other in list(self.all):
                            with suppress(ConnectionClosed):
                                await other.send(message)
                    else:
                        await play(message[1:] if flaw == "whole-samples" else message)
                continue
            fields = json.loads(message)
            kind = fields["type"]
            if not isinstance(kind, str):
                raise TypeError(kind)
            await self._hear(kind, fields, say)
            if kind == "flow":
                pausing = fields["state"] == "pause"

    async def _greet(self, play: Any, say: Any, start: dict[str, Any], state: dict[str, Any]) -> None:
        flaw = self.flaw
        if self.greeting and start["resume"] is None:
            await play((b"\x10\x11" if state["known"] < 2 else b"\x20\x21") * 800)
            self.marks += 1
            await say(type="checkpoint", name=f"greeting-{self.marks}")
        match flaw:
            case "commands":
                await say(type="checkpoint", nmae="x")
            case "accepts":
                await say(type="say", text="Hello")
            case "pace":
                for _ in range(300):
                    await say(type="clear")
            case "message-size":
                await play(bytes(5 * 2**20))
            case "checkpoint-names":
                await play(b"\0\0" * 8000)
                await say(type="checkpoint", name="again")
                await say(type="checkpoint", name="again")
            case "checkpoint-count":
                await play(b"\0\0" * 80_000)
                for number in range(60):
                    await say(type="checkpoint", name=f"{number}")

    async def _hear(self, kind: str, fields: dict[str, Any], say: Any) -> None:
        flaw = self.flaw
        known = {
            "start",
            "dtmf",
            "checkpoint",
            "clear",
            "transcript",
            "barge_in",
            "speech",
            "spoken",
            "gap",
            "flow",
            "fault",
            "ack",
            "stop",
        }
        breaks = {
            "unknown-type": kind not in known,
            "all-words": kind == "spoken",
            "dtmf": kind == "dtmf" and fields["digits"] == "A",
            "outcomes": kind == "checkpoint" and fields["name"].startswith("nobody"),
            "clear-told": kind == "clear",
            "gap": kind == "gap" and fields["reason"] == "carrier",
            "flow": kind == "flow",
            "barge-in": kind == "barge_in",
            "stop-reasons": kind == "stop" and fields["reason"] == "drain",
        }
        if breaks.get(flaw):
            if kind == "stop":
                self.die()
            raise Broken
        if flaw == "clear-once" and kind == "clear":
            await asyncio.sleep(0.02)
            await say(type="clear")
        if flaw == "fault" and kind == "fault":
            await asyncio.sleep(0.02)
            await say(type="say", text="sorry")
        if kind == "dtmf":
            self.marks += 1
            await say(type="checkpoint", name=f"key-{self.marks}")
