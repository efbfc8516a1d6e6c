"""The shape of an audio stream: encoding, rate, sizes. No samples are touched here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct


class Encoding(StrEnum):
    """How one sample is written. Multi-byte encodings are little-endian."""

    __hash__ = str.__hash__  # an enum's own is a call of Python

    MULAW = "mulaw"
    ALAW = "alaw"
    PCM_S16LE = "pcm_s16le"
    PCM_F32LE = "pcm_f32le"


class Track(StrEnum):
    """Which half of a call: `inbound` is what the caller says, `outbound` what the caller hears."""

    __hash__ = str.__hash__

    INBOUND = "inbound"
    OUTBOUND = "outbound"


_SAMPLE_BYTES = {Encoding.MULAW: 1, Encoding.ALAW: 1, Encoding.PCM_S16LE: 2, Encoding.PCM_F32LE: 4}
_SILENCE = {
    Encoding.MULAW: b"\xff",
    Encoding.ALAW: b"\xd5",
    Encoding.PCM_S16LE: b"\0\0",
    Encoding.PCM_F32LE: b"\0\0\0\0",
}


class MediaFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """Encoding, sample rate in Hz and channels (always 1) of an audio stream."""

    encoding: Encoding
    sample_rate: Annotated[int, Meta(ge=8000, le=48000)]
    channels: Annotated[int, Meta(ge=1, le=1)] = 1

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return _SAMPLE_BYTES[self.encoding]

    @property
    def bytes_per_second(self) -> int:
        return self.sample_rate * self.sample_bytes

    def bytes_for(self, ms: float) -> int:
        """Bytes of `ms` milliseconds, rounded down to whole samples."""
        return int(ms * self.sample_rate / 1000) * self.sample_bytes

    def duration_ms(self, size: int) -> float:
        """Milliseconds that `size` bytes last."""
        return size * 1000 / self.bytes_per_second

    def silence(self, ms: float) -> bytes:
        """`ms` milliseconds of silence. For mu-law that is 0xFF: 0x00 would be a full-scale click."""
        return _SILENCE[self.encoding] * int(ms * self.sample_rate / 1000)

    def __str__(self) -> str:
        return f"{self.encoding}/{self.sample_rate}"


MULAW_8K = MediaFormat(Encoding.MULAW, 8000)
