"""Numbered audio of the service protocol's framed mode: the header in front of the samples. Pure; no sockets, no clock."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct as Layout

from msgspec import Struct

from gateway.errors import MalformedFrame
from gateway.media import Track

SUBPROTOCOL_FRAMED = "telephony-gateway.v1"

_layout = Layout("<BBHIQ")
HEADER_BYTES = _layout.size
VERSION_AUDIO = 0x11
"""Version 1 in the high nibble, audio in the low one."""

_TRACKS = (Track.INBOUND, Track.OUTBOUND)


class Flags(IntEnum):
    """What is special about a frame: bits of an int. No IntFlag, whose every `|` and `&` costs as much as all else of a frame."""

    REPLAYED = 1  # from before the connection was regained: not live
    DISCONTINUITY = 2  # frames, or time, are missing before this one
    SILENCE = 4  # the gateway's own, in place of audio that the carrier never sent
    LAST = 8  # the last of an utterance


class Header(Struct, frozen=True, gc=False):
    """`seq` counts the frames of a direction from 0, across connections; `pos` is the first sample's index in the stream."""

    track: Track
    flags: int
    seq: int
    pos: int


def pack(header: Header, samples: bytes) -> bytes:
    """The message for these samples."""
    return _layout.pack(VERSION_AUDIO, _TRACKS.index(header.track), header.flags, header.seq & 0xFFFFFFFF, header.pos) + samples


def unpack(message: bytes, sample_bytes: int) -> Header:
    """The header of a message, whose samples begin at HEADER_BYTES. Raises MalformedFrame with a sentence for its author."""
    if len(message) < HEADER_BYTES:
        raise MalformedFrame("malformed_audio", f"{len(message)} bytes are shorter than the header of {HEADER_BYTES}")
    version, track, flags, seq, pos = _layout.unpack_from(message)
    if version != VERSION_AUDIO:
        raise MalformedFrame("malformed_audio", f"the first byte is 0x{version:02x} and not 0x11 (version 1, audio)")
    if track >= len(_TRACKS):
        raise MalformedFrame("malformed_audio", f"track {track} is neither 0 (inbound) nor 1 (outbound)")
    if (len(message) - HEADER_BYTES) % sample_bytes:
        size = len(message) - HEADER_BYTES
        raise MalformedFrame("malformed_audio", f"{size} bytes after the header are no whole number of samples")
    return Header(_TRACKS[track], flags, seq, pos)


class Numbers:
    """The numbering of what a service sends: each frame is taken once, however often it is sent."""

    def __init__(self) -> None:
        self.next = 0
        """The first number not yet taken: `next_out` of a resume; all below was taken."""
        self.repeated = 0
        self.skipped = 0

    def take(self, seq: int) -> bool:
        """Whether a frame of this number is new."""
        if seq < self.next:
            self.repeated += 1
            return False
        self.skipped += seq - self.next
        self.next = seq + 1
        return True
