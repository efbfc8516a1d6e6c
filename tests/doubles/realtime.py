"""A voice model's server as a small, strict double of OpenAI's Realtime API: the events that a telephone bridge needs."""

import asyncio
import base64
import binascii
import json
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

KEY = "sk-local"
CHUNK = 400


class Realtime:
    """`.url` listens while the block lasts. `heard` is the caller's audio, `truncated` what was taken back of `speak`."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.sessions: list[dict[str, Any]] = []
        self.items: dict[str, int] = {}
        """Bytes of each item that was spoken."""
        self.truncated: list[tuple[str, int]] = []
        self.violations: list[str] = []
        self.closed = 0
        self._socket: ServerConnection | None = None
        self._began = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await serve(self._handle, "127.0.0.1", 0, process_request=self._request, close_timeout=1)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1/realtime?model=local"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.wait_for(self._server.wait_closed(), 5)

    async def began(self) -> None:
        """Until a session was configured."""
        await asyncio.wait_for(self._began.wait(), 5)

    async def speak(self, item_id: str, audio: bytes, *, pace: float = 0.0) -> None:
        """One item, much faster than it sounds."""
        await self._say("response.output_item.added", item={"id": item_id, "type": "message", "role": "assistant"})
        for at in range(0, len(audio), CHUNK):
            delta = base64.b64encode(audio[at : at + CHUNK]).decode()
            await self._say("response.output_audio.delta", item_id=item_id, content_index=0, delta=delta)
            self.items[item_id] = self.items.get(item_id, 0) + len(audio[at : at + CHUNK])
            await asyncio.sleep(pace)
        await self._say("response.output_audio.done", item_id=item_id, content_index=0)

    async def notice_speech(self) -> None:
        """The model's voice detector hears the caller."""
        await self._say("input_audio_buffer.speech_started", audio_start_ms=len(self.heard) // 8, item_id="item-caller")

    async def hang_up(self) -> None:
        assert self._socket
        await self._socket.close()

    async def _request(self, ws: ServerConnection, request: Request) -> Response | None:
        return None if request.headers.get("Authorization") == f"Bearer {KEY}" else ws.respond(401, "")  # type: ignore[arg-type]

    async def _say(self, kind: str, **fields: Any) -> None:
        assert self._socket
        await self._socket.send(json.dumps({"type": kind, "event_id": "event"} | fields))

    async def _handle(self, ws: ServerConnection) -> None:
        self._socket = ws
        await self._say("session.created", session={"type": "realtime"})
        try:
            async for message in ws:
                event = json.loads(message)
                if wrong := self._take(event):
                    self.violations.append(wrong)
                    await self._say("error", error={"type": "invalid_request_error", "message": wrong})
                if event["type"] == "session.update":
                    await self._say("session.updated", session=event["session"])
                    self._began.set()
                elif event["type"] == "conversation.item.truncate":
                    await self._say("conversation.item.truncated", item_id=event.get("item_id"))
        except ConnectionClosed:
            pass
        finally:
            self.closed += 1

    def _take(self, event: dict[str, Any]) -> str | None:
        match event["type"]:
            case "session.update":
                self.sessions.append(event["session"])
                audio = event["session"]["audio"]
                formats = {audio[way]["format"]["type"] for way in ("input", "output")}
                return None if formats == {"audio/pcmu"} else f"session.audio: {formats}"
            case "input_audio_buffer.append":
                if not self.sessions:
                    return "audio before session.update"
                try:
                    self.heard += base64.b64decode(event["audio"], validate=True)
                except binascii.Error:
                    return "audio: not base64"
            case "conversation.item.truncate":
                item, end = event["item_id"], event["audio_end_ms"]
                if event["content_index"] != 0 or item not in self.items:
                    return f"truncate: no such item {item!r}"
                if not isinstance(end, int) or end * 8 > self.items[item]:
                    return f"truncate: audio of {self.items[item] / 8} ms is shorter than {end} ms"
                self.truncated.append((item, end))
            case kind:
                return f"unknown event {kind!r}"
        return None
