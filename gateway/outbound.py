"""What the caller of a conversation really heard, as a track: silent where nothing played, cut where the ear was cut.

Pure. The axis is the carrier's media timeline, as far as the caller's own audio tells it: our clock and the carrier's drift
apart by up to a second in a few hours, and two tracks on two clocks would.
"""

from __future__ import annotations

from collections import deque

from gateway.events import Audio, Gap
from gateway.media import MediaFormat, Track

CHUNK_MS = 20
"""While nothing else happens, the track comes in chunks of about this."""

WINDOW_SECS, WINDOWS = 10.0, 3
"""Of the caller's audio the promptest in so long tells how its timeline and our clock compare: the rest came late."""

LARGEST_SILENCE_MS = 10_000
"""A longer silence at once (the process slept, the carrier's timeline jumped) is told as a gap and not written out."""


class Outbound:
    """`sent` and `cut` follow the playout; `sync` the caller's audio. `take` gives the track up to now, and never takes back."""

    def __init__(self, media_format: MediaFormat, now: float, sent: int = 0) -> None:
        """`sent`: bytes of the playout's running generation that the carrier has already; they are no part of the track."""
        self._format = media_format
        self._rate = media_format.bytes_per_second
        self._queue: deque[tuple[float | None, bytes]] = deque()
        self._taken = sent  # bytes of this generation that were given out, or were not ours to give
        self._begun = False
        self._end = 0  # where the track ends, in bytes
        self._origin = 0.0  # where the caller's first sample stands on this track, in milliseconds
        self._offset = now  # of our clock, when the track was at 0
        self._taken_at = now
        self._promptest: deque[float] = deque(maxlen=WINDOWS)
        self._window_ends = float("-inf")

    @property
    def due(self) -> float:
        """When there will be another chunk."""
        return self._taken_at + CHUNK_MS / 1000

    def sent(self, payload: bytes, at: float, *, continues: bool) -> None:
        """The carrier was given this, to be heard from `at` on, which `continues` what it was given before."""
        self._queue.append((None if continues and self._begun else at, payload))
        self._begun = True

    def cut(self) -> None:
        """What was not taken will not be heard. Take first: the playout's position starts at 0 again."""
        self._queue.clear()
        self._taken = 0

    def sync(self, media_ms: float, now: float) -> None:
        """The caller's audio has come up to here. Its first chunk ends where this track stands then."""
        if not self._promptest:
            self._origin = max(0.0, self._format.duration_ms(self._end) - media_ms)
        offset = now - (self._origin + media_ms) / 1000
        if not self._promptest or now >= self._window_ends:
            self._promptest.append(offset)
            self._window_ends = now + WINDOW_SECS
        elif offset < self._promptest[-1]:
            self._promptest[-1] = offset
        self._offset = min(self._promptest)

    def take(self, heard: int, now: float) -> list[Audio | Gap]:
        """The track up to now. `heard`: bytes of the playout's running generation that the ear has heard."""
        out: list[Audio | Gap] = []
        self._taken_at = now
        due = heard - self._taken
        while due > 0 and self._queue:
            at, payload = self._queue.popleft()
            if at is not None:
                self._be_silent(at, out)
            if len(payload) > due:
                self._queue.appendleft((None, payload[due:]))
                payload = payload[:due]
            due -= len(payload)
            self._taken += len(payload)
            self._add(payload, out)
        if not self._queue or self._queue[0][0] is not None:
            self._be_silent(now, out)
        return out

    def _be_silent(self, until: float, out: list[Audio | Gap]) -> None:
        ms = (until - self._offset) * 1000 - self._format.duration_ms(self._end)
        if ms > LARGEST_SILENCE_MS:
            out.append(Gap(int(ms), Track.OUTBOUND))
            self._end += self._format.bytes_for(int(ms))
        elif ms > 0 and (silence := self._format.silence(ms)):
            self._add(silence, out)

    def _add(self, payload: bytes, out: list[Audio | Gap]) -> None:
        out.append(Audio(payload, Track.OUTBOUND, round(self._format.duration_ms(self._end))))
        self._end += len(payload)
