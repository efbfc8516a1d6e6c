"""What the load generator sends, made before it sends it: WebSocket messages of both protocols, in bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator

import providers
from gateway import speech
from gateway.audio import convert_whole
from gateway.bench import TICK_MS, TICK_SECS
from gateway.events import Audio, Start, Stop
from gateway.media import Encoding, MediaFormat, Track
from gateway.provider import Carrier
from gateway.services.framed import Header, pack

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

STAND_IN = "f" * 32
"""Takes the place of a stream's id, which all calls' frames have in the same place."""


def message(opcode: int, payload: bytes, *, masked: bool) -> bytes:
    """One WebSocket message. The mask is zero: its receiver unmasks it like any other, and to make it costs nothing."""
    size, bit = len(payload), 0x80 if masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, bit | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, bit | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, bit | 127)) + size.to_bytes(8, "big")
    return head + (bytes(4) if masked else b"") + payload


def upgrade(path: str, subprotocol: str | None) -> bytes:
    """A client's request."""
    offer = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{offer}"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {'A' * 22}==\r\n\r\n"
    ).encode()


def upgraded(request: bytes, subprotocol: str | None) -> bytes:
    """A server's answer."""
    headers = dict(line.split(": ", 1) for line in request.decode("latin-1").split("\r\n")[1:] if ": " in line)
    key = next(value for name, value in headers.items() if name.lower() == "sec-websocket-key")
    accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())  # noqa: S324 RFC 6455
    chosen = f"Sec-WebSocket-Protocol: {subprotocol}\r\n" if subprotocol else ""
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{chosen}"
        f"Sec-WebSocket-Accept: {accept.decode()}\r\n\r\n"
    ).encode()


class Speech:
    """The bundled clip in one format, over and over, in pieces of 20 ms."""

    def __init__(self, media_format: MediaFormat) -> None:
        clip = speech.hello()
        sound = convert_whole(clip.pcm, clip.media_format, media_format)
        self.media_format = media_format
        self.size = media_format.bytes_for(TICK_MS)
        self.pieces = [sound[at : at + self.size] for at in range(0, len(sound) - self.size + 1, self.size)]

    def piece(self, tick: int) -> bytes:
        return self.pieces[tick % len(self.pieces)]

    def pcm(self, tick: int, ticks: int) -> bytes:
        """What is said from a tick on, as PCM at 8 kHz."""
        return to_pcm(b"".join(self.piece(each) for each in range(tick, tick + ticks)), self.media_format)


def to_pcm(sound: bytes, media_format: MediaFormat) -> bytes:
    return convert_whole(sound, media_format, MediaFormat(Encoding.PCM_S16LE, 8000))


class CarrierFrames:
    """A carrier's frames for all calls: what is alike in them is made once, and a call puts its stream's id between."""

    def __init__(self, kind: str, media_format: MediaFormat, secs: float) -> None:
        self._kind = providers.load(kind)
        self._format = media_format
        self.speech = Speech(media_format)
        self.subprotocol = self._kind.carrier().habits.subprotocol
        carrier = self._carrier(self._start(STAND_IN))[0]
        self.heads: list[bytes] = []
        self.tails: list[bytes] = []
        for tick in range(int(secs / TICK_SECS)):
            at = tick * TICK_MS
            (text,) = carrier.encode(Audio(self.speech.piece(tick), Track.INBOUND, at))
            data = text.encode() if isinstance(text, str) else text
            head, _, tail = message(TEXT, data, masked=True).partition(STAND_IN.encode())
            self.heads.append(head)
            self.tails.append(tail)

    def open(self, number: int) -> tuple[Carrier, bytes, bytes]:
        """A call's carrier half, its first messages, and what goes between heads and tails."""
        name = f"{number:032x}"
        carrier, frames = self._carrier(self._start(name))
        return carrier, b"".join(frames), name.encode()

    def close(self, carrier: Carrier) -> bytes:
        return b"".join([*self._texts(carrier.encode(Stop())), message(CLOSE, b"\x03\xe8", masked=True)])

    def _start(self, name: str) -> Start:
        call, stream, account = self._kind.carrier().habits.id_prefixes or ("", "", "")
        return Start(
            stream_id=stream + name,
            call_id=call + name,
            account_id=account + "0" * 32,
            caller="+15550100001",
            called="+15550100002",
            media_format=self._format,
        )

    def _carrier(self, start: Start) -> tuple[Carrier, list[bytes]]:
        carrier = self._kind.carrier()
        return carrier, [*self._texts(carrier.encode(start))]

    @staticmethod
    def _texts(frames: Iterable[str | bytes]) -> Iterator[bytes]:
        for text in frames:
            yield message(TEXT, text.encode() if isinstance(text, str) else text, masked=True)


def number_of(call_id: str) -> int:
    """The call that a service was told of."""
    return int(call_id[-32:], 16)


class ServiceFrames:
    """A service's audio: the same for all calls."""

    def __init__(self, media_format: MediaFormat, framed: bool, secs: float) -> None:
        self.speech = Speech(media_format)
        ticks = int(secs / TICK_SECS)
        samples = media_format.sample_rate * TICK_MS // 1000
        if not framed:
            loop = [message(BINARY, piece, masked=False) for piece in self.speech.pieces]
            self.messages = [loop[tick % len(loop)] for tick in range(ticks)]
            return
        self.messages = [
            message(BINARY, pack(Header(Track.INBOUND, 0, tick, tick * samples), self.speech.piece(tick)), masked=False)
            for tick in range(ticks)
        ]
