"""WebSocket messages in a stream of bytes, whole and damaged. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from msgspec import Struct

LONGEST_MESSAGE = 64 * 1024 * 1024
"""Longer ones are no WebSocket messages, and pass as they are."""
PRINTABLE = bytes(range(0x20, 0x7F))


class Message(Struct):
    """One WebSocket message, in the frames it came in; `raw` is what goes over the wire."""

    raw: bytes
    opcode: int
    frames: list[tuple[int, int, bytes]] = []  # of each: where its payload begins and ends, and its mask

    @property
    def control(self) -> bool:
        return self.opcode >= 8

    def payload(self) -> bytes:
        return b"".join(_unmasked(self.raw[begin:end], mask) for begin, end, mask in self.frames)

    def corrupted(self, random: Random) -> bytes:
        """The same with one byte changed; text stays text, so that it is not the WebSocket layer that refuses it."""
        begin, end, mask = max(self.frames, key=lambda frame: frame[1] - frame[0])
        if begin == end:
            return self.raw
        at = random.randrange(begin, end)
        key = mask[(at - begin) % 4] if mask else 0
        old = self.raw[at] ^ key
        if self.opcode == 1:
            if old >= 0x80:  # in the middle of a character
                return self.raw
            new = random.choice([each for each in PRINTABLE if each != old])
        else:
            new = old ^ random.randrange(1, 256)
        return self.raw[:at] + bytes([new ^ key]) + self.raw[at + 1 :]


class Frames:
    """Cuts a byte stream into WebSocket messages (RFC 6455, section 5). Pure."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._message = Message(b"", 0, [])

    def feed(self, data: bytes) -> Iterator[Message]:
        """Whole messages, oldest first. Raises ValueError for what can't be one; `rest` then has the bytes."""
        self._buffer += data
        while (message := self._next()) is not None:
            yield message

    @property
    def rest(self) -> bytes:
        """Bytes of a message that is not whole yet."""
        return self._message.raw + bytes(self._buffer)

    def _next(self) -> Message | None:
        while True:
            buffer = self._buffer
            if len(buffer) < 2:
                return None
            opcode, length, at = buffer[0] & 0x0F, buffer[1] & 0x7F, 2
            if length == 126:
                length, at = int.from_bytes(buffer[2:4]), 4
            elif length == 127:
                length, at = int.from_bytes(buffer[2:10]), 10
            mask = b""
            if buffer[1] & 0x80:
                mask, at = bytes(buffer[at : at + 4]), at + 4
            if length > LONGEST_MESSAGE:
                raise ValueError("no WebSocket message")
            if len(buffer) < at + length:
                return None
            raw, final = bytes(buffer[: at + length]), buffer[0] & 0x80
            del buffer[: at + length]
            if opcode >= 8:
                return Message(raw, opcode, [(at, at + length, mask)])
            message = self._message
            message.opcode = opcode or message.opcode
            before = len(message.raw)
            message.raw += raw
            message.frames.append((before + at, before + at + length, mask))
            if final:
                self._message = Message(b"", 0, [])
                return message


def _unmasked(payload: bytes, mask: bytes) -> bytes:
    if not mask or not payload:
        return payload
    key = int.from_bytes((mask * (len(payload) // 4 + 1))[: len(payload)])
    return (int.from_bytes(payload) ^ key).to_bytes(len(payload))
