"""A strict double of Twilio Media Streams: the client's end, from the protocol page alone."""

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed

from .audio import AudioPeer, Mark
from .wire import misshapen, standard_base64

ACCOUNT_SID = "AC0123456789abcdef0123456789abcdef"
AUTH_TOKEN = "12345"
CONTAINERS = (b"RIFF", b"OggS", b"fLaC", b"ID3", b".snd", b"FORM")


def signature(auth_token: str, url: str, form: Mapping[str, str] | None = None) -> str:
    """`X-Twilio-Signature` of a request; an upgrade has no form."""
    text = url + "".join(name + value for name, value in sorted((form or {}).items()))
    return base64.b64encode(hmac.new(auth_token.encode(), text.encode(), hashlib.sha1).digest()).decode()


def sid(prefix: str, random: Any) -> str:
    return prefix + f"{random.getrandbits(128):032x}"


class TwilioMedia(AudioPeer):
    """One bidirectional stream, or with `bidirectional=False` a listening one on which every word of ours is 31924."""

    refused_code = "31920"
    protocol_code = "31924 protocol error:"
    overflow_code = "31930"
    bytes_per_ms = 8
    width = 1
    silence = b"\xff"

    def __init__(
        self,
        url: str,
        *,
        parameters: Mapping[str, str] | None = None,
        bidirectional: bool = True,
        auth_token: str = AUTH_TOKEN,
        public_url: str | None = None,
        start_delay: float = 0.0,
        number_counters: bool = False,
        call_sid: str | None = None,
        stream_sid: str | None = None,
        seed: int = 0,
        **audio: Any,
    ) -> None:
        signed = public_url or url.replace("ws://", "wss://", 1)
        headers = {"x-twilio-signature": signature(auth_token, signed), "accept-encoding": "gzip"}
        super().__init__(
            url, headers=headers | dict(audio.pop("headers", None) or {}), user_agent="Twilio.TmeWs/1.0", seed=seed, **audio
        )
        self.parameters, self.bidirectional = dict(parameters or {}), bidirectional
        self.start_delay, self.number_counters = start_delay, number_counters
        self.call_sid = call_sid or sid("CA", self.random)
        self.stream_sid = stream_sid or sid("MZ", self.random)
        self.started = False
        self._sequence = 0
        self._chunk = 0

    # To the gateway.

    def _count(self, number: int) -> str | int:
        return number if self.number_counters else str(number)

    async def _tell(self, frame: dict[str, Any]) -> None:
        """A message under the shared counter."""
        async with self._sending:
            if self.shuffle and self.random.random() < 0.1:
                await self._put_counted(
                    {"event": self.random.choice(("x-future", "Media", "heartbeat")), "streamSid": self.stream_sid}
                )
            await self._put_counted(frame)

    async def _put_counted(self, frame: dict[str, Any]) -> None:
        self._sequence += 1
        await self._put({"event": frame.pop("event"), "sequenceNumber": self._count(self._sequence), **frame})

    async def _begin(self) -> None:
        await self._put({"event": "connected", "protocol": "Call", "version": "1.0.0"})
        if self.start_delay:
            await asyncio.sleep(self.start_delay)
        self.started = True
        await self._tell(
            {
                "event": "start",
                "start": {
                    "accountSid": ACCOUNT_SID,
                    "streamSid": self.stream_sid,
                    "callSid": self.call_sid,
                    "tracks": list(self.tracks),
                    "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
                    "customParameters": self.parameters,
                },
                "streamSid": self.stream_sid,
            }
        )
        await super()._begin()

    async def _send_media(self, track: str, data: bytes, timestamp_ms: int) -> None:
        self._chunk += 1
        media = {"track": track, "chunk": self._count(self._chunk), "timestamp": self._count(timestamp_ms)}
        media["payload"] = base64.b64encode(data).decode()
        await self._tell({"event": "media", "media": media, "streamSid": self.stream_sid})

    async def digits(self, digits: str) -> None:
        for digit in digits:
            await self._tell({"event": "dtmf", "streamSid": self.stream_sid, "dtmf": {"track": "inbound_track", "digit": digit}})

    async def _send_mark(self, mark: Mark) -> None:
        await self._tell({"event": "mark", "streamSid": self.stream_sid, "mark": {"name": mark.name}})

    async def stop(self) -> None:
        """Say that the stream is over and leave the socket open."""
        if not self.stopped:
            self.stopped = True
            stop = {"accountSid": ACCOUNT_SID, "callSid": self.call_sid}
            await self._tell({"event": "stop", "streamSid": self.stream_sid, "stop": stop})

    async def hangup(self) -> None:
        """stop, then close 1000."""
        if not self.closed.is_set():
            try:
                await self.stop()
            except ConnectionClosed:
                await self.closed.wait()
            await self.close(1000)

    # From the gateway.

    async def _not_json(self, frame: str | bytes, why: str) -> None:
        if not self.bidirectional:
            self.violate("31924 message on a unidirectional stream", frame)
        elif isinstance(frame, bytes):
            self.violate("31950 binary frame", frame)
        else:
            self.violate(f"31951 {why}", frame)

    async def _judge(self, frame: dict[str, Any]) -> None:
        if not self.bidirectional:
            self.violate("31924 message on a unidirectional stream", frame)
        elif wrong := self._wrong(frame):
            self.violate(f"31951 {wrong}", frame)
        elif not self.stopped:
            self._obey(frame)

    def _wrong(self, frame: dict[str, Any]) -> str | None:
        if not self.started:
            return "sent before start"
        event = frame.get("event")
        match event:
            case "media":
                wrong = misshapen(frame, "media", {"event": "string", "streamSid": "string", "media": "object"}) or misshapen(
                    frame["media"], "media.media", {"payload": "string"}
                )
            case "mark":
                wrong = misshapen(frame, "mark", {"event": "string", "streamSid": "string", "mark": "object"}) or misshapen(
                    frame["mark"], "mark.mark", {"name": "string"}
                )
            case "clear":
                wrong = misshapen(frame, "clear", {"event": "string", "streamSid": "string"})
            case str():
                return f"unknown event {event!r}"
            case _:
                return "no event"
        if wrong is None and frame["streamSid"] != self.stream_sid:
            return f"{event}: streamSid of another stream"
        if wrong is None and event == "media":
            payload = frame["media"]["payload"]
            if not payload:
                return "media.payload: empty"
            data = standard_base64(payload)
            if data is None:
                return "media.payload: not standard base64"
            if data.startswith(CONTAINERS):
                return "media.payload: starts with a file header"
        return wrong

    def _obey(self, frame: dict[str, Any]) -> None:
        match frame["event"]:
            case "media":
                self._queue(base64.b64decode(frame["media"]["payload"]))
            case "mark":
                self._queue_mark(frame["mark"]["name"])
            case "clear":
                self.ear.clear(self.now())
                self._wake.set()
