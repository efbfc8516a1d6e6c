"""Where the audio of both tracks belongs in a recording. Pure: events in, stereo samples out; no files, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from gateway.audio import Converter
from gateway.events import Audio, Event, Gap, Start
from gateway.media import Encoding, MediaFormat, Track

SAMPLE_BYTES, FRAME_BYTES = 2, 4
"""Of one track, and of both side by side."""

HOLD_MS = 30_000
"""A track that stays behind the other is waited for so long; what comes later than that has no place any more."""

LARGEST_FILL_MS = 3_600_000
"""A hole is filled with silence up to this: a timestamp of nonsense must not fill the disk."""

_BLOCK = 16_000  # samples that are put out at once


class _Side:
    """One track: what waits to be written, as samples or as a length of silence."""

    def __init__(self, source: MediaFormat, target: MediaFormat) -> None:
        self.converter = Converter(source, target)
        self.begun = False
        self.position = 0  # samples laid out
        self.written = 0
        self.debt = 0  # samples of silence that were written for it because it did not come
        self.first_timestamp_ms: int | None = None
        self.first_position = 0
        self._pieces: deque[bytes | int] = deque()

    def add(self, piece: bytes | int) -> None:
        length = piece if isinstance(piece, int) else len(piece) // SAMPLE_BYTES
        if late := min(self.debt, length):
            self.debt -= late
            length -= late
            piece = length if isinstance(piece, int) else piece[late * SAMPLE_BYTES :]
        if length:
            self._pieces.append(piece)
            self.position += length

    def read(self, samples: int) -> bytes:
        """Exactly so many samples, which must be there."""
        parts = []
        self.written += samples
        while samples:
            piece = self._pieces.popleft()
            length = piece if isinstance(piece, int) else len(piece) // SAMPLE_BYTES
            taken = min(length, samples)
            if isinstance(piece, int):
                parts.append(bytes(taken * SAMPLE_BYTES))
                rest: bytes | int = piece - taken
            else:
                parts.append(piece[: taken * SAMPLE_BYTES])
                rest = piece[taken * SAMPLE_BYTES :]
            if rest:
                self._pieces.appendleft(rest)
            samples -= taken
        return b"".join(parts)


class Layout:
    """Two tracks side by side on one axis: 16-bit stereo at the carrier's rate, the caller left, what the caller hears right.

    `add` every event of the stream in its order, then write what `frames` gives; at the end `finish`, and once more `frames`.
    The caller's track is laid out by the carrier's timestamps (as `Gap` events tell of them). In a conversation the other one is
    continuous and stands, whenever the caller's first chunk comes, at that chunk's end; on a listening stream it has timestamps
    of the same origin.
    """

    def __init__(self, start: Start) -> None:
        """`start.media_format` must not be None."""
        if start.media_format is None:
            raise ValueError("a stream of text has no audio")
        self.sample_rate = start.media_format.sample_rate
        target = MediaFormat(Encoding.PCM_S16LE, self.sample_rate)
        self._sides = {track: _Side(start.media_format, target) for track in Track}
        self._converse = bool(start.accepts)
        expected = set(Track) if self._converse else {*start.tracks} or {Track.INBOUND}
        for track, side in self._sides.items():
            side.begun = track not in expected
        self._absent = {track for track in Track if track not in expected}
        self._hold = HOLD_MS * self.sample_rate // 1000

    @property
    def position_ms(self) -> int:
        """How far the recording has come."""
        return round(max(side.position for side in self._sides.values()) * 1000 / self.sample_rate)

    def track_ms(self, track: Track) -> int:
        """How far this track has come."""
        return round(self._sides[track].position * 1000 / self.sample_rate)

    def add(self, event: Event) -> None:
        """Give every event its place; only audio and gaps take any."""
        if type(event) is Audio:
            side = self._sides[event.track]
            samples = side.converter.convert(event.payload)
            if event.track in self._absent:
                self._absent.remove(event.track)
                side.begun = False
            if not side.begun:
                self._begin(event, len(samples) // SAMPLE_BYTES)
            side.add(samples)
        elif type(event) is Gap:
            side = self._sides[event.track]
            if side.begun and event.track not in self._absent:
                side.add(min(event.lost_ms, LARGEST_FILL_MS) * self.sample_rate // 1000)

    def frames(self) -> Iterator[bytes]:
        """What can be written now, in blocks of bounded size."""
        near, far = sorted(self._sides.values(), key=lambda side: side.position)
        present = [side for track, side in self._sides.items() if track not in self._absent]
        if far.position - near.position > self._hold or len(present) < len(self._sides):
            missing = far.position - near.position - (self._hold if len(present) == len(self._sides) else 0)
            near.add(missing)
            near.debt += missing if len(present) == len(self._sides) else 0
        yield from self._read(near.position)

    def finish(self) -> None:
        """The stream is over: the shorter track ends in silence."""
        near, far = sorted(self._sides.values(), key=lambda side: side.position)
        near.debt = 0
        near.add(far.position - near.position)

    def _begin(self, audio: Audio, length: int) -> None:
        side = self._sides[audio.track]
        other = self._sides[Track.OUTBOUND if audio.track is Track.INBOUND else Track.INBOUND]
        place = other.position - length
        if not self._converse and None not in (other.first_timestamp_ms, audio.timestamp_ms):
            ahead = (audio.timestamp_ms or 0) - (other.first_timestamp_ms or 0)
            place = other.first_position + ahead * self.sample_rate // 1000
        elif self._converse and audio.track is Track.OUTBOUND:
            place = 0
        place = min(max(place, side.position), side.position + LARGEST_FILL_MS * self.sample_rate // 1000)
        side.add(place - side.position)
        side.begun = True
        side.first_timestamp_ms = audio.timestamp_ms
        side.first_position = place

    def _read(self, until: int) -> Iterator[bytes]:
        left, right = self._sides[Track.INBOUND], self._sides[Track.OUTBOUND]
        while (length := min(until - left.written, _BLOCK)) > 0:
            both = np.empty((length, 2), "<i2")
            both[:, 0] = np.frombuffer(left.read(length), "<i2")
            both[:, 1] = np.frombuffer(right.read(length), "<i2")
            yield both.tobytes()
