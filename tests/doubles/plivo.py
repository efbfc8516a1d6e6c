"""A strict double of Plivo Audio Streaming: the full dialect, and the reduced one of Plivo's own test client."""

import asyncio
import base64
import hashlib
import hmac
import re
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

from .audio import AudioPeer, Mark, Pace
from .wire import misshapen, standard_base64

ABSENT: Any = object()
"""extra_headers=ABSENT: the member does not appear at all."""
SUBPROTOCOL = "audio.plivo.com"
ACCOUNT_ID = "MAXXXXXXXXXXXXXXXXXX"
AUTH_TOKEN = "plivo-token"
FORMATS: dict[tuple[str, int], tuple[int, int, bytes]] = {
    ("audio/x-mulaw", 8000): (8, 1, b"\xff"),
    ("audio/x-l16", 8000): (16, 2, b"\0\0"),
    ("audio/x-l16", 16000): (32, 2, b"\0\0"),
}
"""(encoding, rate): bytes per ms, bytes per sample, one sample of silence."""
EXTRA_HEADERS_FORMS: list[tuple[Any, dict[str, str]]] = [
    ("userId=12345;sessionId=abc-xyz", {"userId": "12345", "sessionId": "abc-xyz"}),
    ("userId=12345,sessionId=abc-xyz", {"userId": "12345", "sessionId": "abc-xyz"}),
    (" userId = 1 ; name = J%C3%BCrgen%20K ", {"userId": "1", "name": "Jürgen K"}),
    ('{"userId":"12345"}', {"userId": "12345"}),
    ({"userId": "12345"}, {"userId": "12345"}),
    ("{}", {}),
    ("", {}),
    (None, {}),
    (ABSENT, {}),
]
"""Every form of section 3.8 and what it means."""
QUEUE_MS = 40_000
HARD_BYTES = 64 * 1024
SOFT_BASE64 = 16 * 1024
DTMF = re.compile(r"[0-9A-D*#]+")


def signature_v3(auth_token: str, url: str, nonce: str) -> str:
    """`X-Plivo-Signature-V3` of a GET."""
    parts = urlsplit(url)
    query = sorted(parse_qsl(parts.query, keep_blank_values=True))
    text = f"{parts.scheme}://{parts.netloc}{parts.path}"
    if query:
        text += "?" + "&".join(f"{name}={value}" for name, value in query)
    return base64.b64encode(hmac.new(auth_token.encode(), f"{text}.{nonce}".encode(), hashlib.sha256).digest()).decode()


class Plivo(AudioPeer):
    """One stream. `reduced=True` speaks as `plivo voice streams test`: no counters, no ids on media, no answers."""

    refused_code = "connection_failed"
    protocol_code = "protocol error"
    overflow_code = "DegradedStream"

    def __init__(
        self,
        url: str,
        *,
        encoding: str = "audio/x-mulaw",
        sample_rate: int = 8000,
        reduced: bool = False,
        bidirectional: bool = True,
        offer_subprotocol: bool = False,
        extra_headers: Any = "",
        late_played: bool = False,
        sends_stop: bool | None = None,
        complains: bool | None = None,
        first_sequence: int = 1,
        first_timestamp: int = 1_705_312_200_000,
        auth_token: str = AUTH_TOKEN,
        public_url: str | None = None,
        start_delay: float = 0.0,
        pace: Pace = "real",
        seed: int = 0,
        **audio: Any,
    ) -> None:
        self.encoding, self.sample_rate = encoding, sample_rate
        self.bytes_per_ms, self.width, self.silence = FORMATS[encoding, sample_rate]
        headers: dict[str, str] = {}
        if not reduced:
            nonce = f"{seed + 5429567804466091622:020d}"
            signed = signature_v3(auth_token, re.sub("^wss?://", "http://", public_url or url), nonce)
            headers = {"X-Plivo-Signature-V3": signed, "X-Plivo-Signature-Ma-V3": signed, "X-Plivo-Signature-V3-Nonce": nonce}
        super().__init__(
            url,
            headers=headers | dict(audio.pop("headers", None) or {}),
            subprotocols=[SUBPROTOCOL] if offer_subprotocol else None,
            first_timestamp=first_timestamp,
            pace=pace,
            seed=seed,
            **audio,
        )
        self.reduced, self.bidirectional = reduced, bidirectional
        self.extra_headers, self.late_played = extra_headers, late_played
        self.sends_stop = (reduced and not bidirectional) if sends_stop is None else sends_stop
        self.complains = (not reduced) if complains is None else complains
        self.start_delay = start_delay
        self.call_id = str(UUID(int=self.random.getrandbits(128), version=4))
        self.stream_id = str(UUID(int=self.random.getrandbits(128), version=4))
        self.cleared_marks: list[str] = []
        """Checkpoints a clear threw away; never acknowledged (but see late_played)."""
        self.dtmf: list[str] = []
        """Digits the gateway had us send, one string per message."""
        self.frames_read_back = 0
        self.started = False
        self._sequence = first_sequence - 1
        self._chunks: dict[str, int] = {}
        self._names: set[str] = set()

    # To the gateway.

    async def _tell(self, frame: dict[str, Any], *, extra: bool = False, stream_id: bool = True) -> None:
        async with self._sending:
            if self.shuffle and self.random.random() < 0.1:
                await self._put_counted({"event": self.random.choice(("x-future", "muteStream", "heartbeat"))}, False, True)
            await self._put_counted(frame, extra, stream_id)

    async def _put_counted(self, frame: dict[str, Any], extra: bool, stream_id: bool) -> None:
        whole: dict[str, Any] = {"event": frame.pop("event")}
        if not self.reduced:
            self._sequence += 1
            whole["sequenceNumber"] = self._sequence
            if stream_id:
                whole["streamId"] = self.stream_id
        whole |= frame
        if extra and not self.reduced and self.extra_headers is not ABSENT:
            whole["extra_headers"] = self.extra_headers
        await self._put(self.dress(whole, keep=("extra_headers",)))

    async def _begin(self) -> None:
        if self.subprotocols and self.ws.subprotocol != SUBPROTOCOL:
            self.violate(f"handshake: {SUBPROTOCOL} was offered and not selected")
        if self.start_delay:
            await asyncio.sleep(self.start_delay)
        start: dict[str, Any] = {"callId": self.call_id, "streamId": self.stream_id, "accountId": ACCOUNT_ID}
        encoding = self.encoding
        if self.reduced:
            encoding = encoding.replace("x-l16", "l16")
        else:
            start["tracks"] = list(self.tracks)
        start["mediaFormat"] = {"encoding": encoding, "sampleRate": self.sample_rate}
        self.started = True
        await self._tell({"event": "start", "start": start}, extra=True, stream_id=False)
        await super()._begin()

    async def _send_media(self, track: str, data: bytes, timestamp_ms: int) -> None:
        chunk = self._chunks[track] = self._chunks.get(track, 0) + 1
        media = {"track": track, "timestamp": str(timestamp_ms), "chunk": str(chunk) if self.reduced else chunk}
        media["payload"] = base64.b64encode(data).decode()
        await self._tell({"event": "media", "media": media}, extra=True)

    async def digits(self, digits: str) -> None:
        for digit in digits:
            dtmf = {"track": "inbound", "digit": digit, "timestamp": str(int(self._clock_ms))}
            await self._tell({"event": "dtmf", "dtmf": dtmf}, extra=True)

    async def _send_mark(self, mark: Mark) -> None:
        if not self.reduced:
            await self._tell({"event": "playedStream", "name": mark.name})

    async def stop(self) -> None:
        """The event that production may never send."""
        self.stopped = True
        frame: dict[str, Any] = {"event": "stop"}
        if not self.reduced:
            frame["stop"] = {"callId": self.call_id, "streamId": self.stream_id, "tracks": list(self.tracks)}
        await self._tell(frame)

    async def hangup(self) -> None:
        """Close 1000 without stop; the reduced client drops the connection, or when it only listens, stops first."""
        if self.closed.is_set():
            return
        if self.reduced and self.bidirectional and not self.sends_stop:
            self.drop()
            await self.closed.wait()
            return
        if self.sends_stop:
            await self.stop()
        await self.close(1000)

    # From the gateway.

    async def _not_json(self, frame: str | bytes, why: str) -> None:
        await self._refuse(why, frame)

    async def _refuse(self, why: str, frame: object) -> None:
        self.violate(why, frame)
        if self.complains and self.started:
            await self._tell({"event": "incorrectPayload"})

    async def _judge(self, frame: dict[str, Any]) -> None:
        if frame.get("event") == "playAudio":
            self.frames_read_back += 1
        if not self.bidirectional:
            self.violate("message on a unidirectional stream", frame)
        elif not self.started:
            self.violate("sent before start", frame)
        elif wrong := self._wrong(frame):
            await self._refuse(wrong, frame)
        else:
            await self._obey(frame)

    def _wrong(self, frame: dict[str, Any]) -> str | None:
        event = frame.get("event")
        match event:
            case "playAudio":
                return misshapen(frame, "playAudio", {"event": "string", "media": "object"}) or self._wrong_media(frame["media"])
            case "checkpoint":
                wrong = misshapen(frame, "checkpoint", {"event": "string", "streamId": "string", "name": "string"})
                if wrong is None and not frame["name"]:
                    return "checkpoint.name: empty"
                if wrong is None and frame["name"] in self._names:
                    self.violate("checkpoint.name: used before on this stream", frame)
            case "clearAudio":
                wrong = misshapen(frame, "clearAudio", {"event": "string", "streamId": "string"})
            case "sendDTMF":
                wrong = misshapen(frame, "sendDTMF", {"event": "string", "dtmf": "string"})
                if wrong is None and not DTMF.fullmatch(frame["dtmf"]):
                    return "sendDTMF.dtmf: not [0-9A-D*#]+"
                return wrong
            case str():
                return f"unknown event {event!r}"
            case _:
                return "no event"
        if wrong is None and frame["streamId"] != self.stream_id:
            return f"{event}: streamId of another stream"
        return wrong

    def _wrong_media(self, media: dict[str, Any]) -> str | None:
        if wrong := misshapen(media, "playAudio.media", {"contentType": "string", "sampleRate": "number", "payload": "string"}):
            return wrong
        if media["contentType"] not in {encoding for encoding, _ in FORMATS}:
            return f"playAudio.media.contentType: {media['contentType']!r}"
        if media["contentType"] != self.encoding or media["sampleRate"] != self.sample_rate:
            return "playAudio.media: not the stream's format"
        payload = media["payload"]
        if not payload:
            return "playAudio.media.payload: empty"
        data = standard_base64(payload)
        if data is None:
            return "playAudio.media.payload: not standard base64"
        if len(data) % self.width:
            return "playAudio.media.payload: half a sample"
        if data.startswith(b"RIFF"):
            return "playAudio.media.payload: starts with a file header"
        if self.frame_bytes > HARD_BYTES:
            return "playAudio: above 64 KB"
        if len(payload) > SOFT_BASE64:
            self.violate("playAudio.media.payload: above the recommended 16 KB")
        if self.buffered_ms + len(data) / self.bytes_per_ms > QUEUE_MS:
            return "buffer_overflow: more than 40 s queued"
        return None

    async def _obey(self, frame: dict[str, Any]) -> None:
        match frame["event"]:
            case "playAudio":
                self._queue(base64.b64decode(frame["media"]["payload"]))
            case "checkpoint":
                self._names.add(frame["name"])
                self._queue_mark(frame["name"])
            case "sendDTMF":
                self.dtmf.append(frame["dtmf"])
            case "clearAudio":
                cleared = self.ear.clear(self.now())
                for mark in [mark for mark in self.ear.marks if mark.outcome == "cleared"]:
                    self.ear.marks.remove(mark)
                self.cleared_marks += cleared.marks
                self._wake.set()
                if not self.reduced:
                    await self._tell({"event": "clearedAudio"})
                    if self.late_played and cleared.marks:
                        await self._tell({"event": "playedStream", "name": cleared.marks[0]})
