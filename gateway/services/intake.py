"""One stream's events on their way to one service: audio converted and cut into frames, control as texts, all into its ring."""

from __future__ import annotations

from gateway.audio import Converter, Reframer
from gateway.events import Audio, Event, Gap, GapReason, Start, Stop
from gateway.journal import Entry, Legacy, Word
from gateway.media import MediaFormat, Track
from gateway.services.framed import Flags
from gateway.services.native import NativeCarrier
from gateway.services.ring import Frame, Hole, Ring

LARGEST_FILL_MS = 10_000
"""A hole in the caller's audio is filled with silence up to this."""

BLOCK_MS = 20
"""What a converter's filter works on in one piece, and longer than it remembers: what is converted again from the beginning of a
block on comes out a block later as it did the first time."""


class Intake:
    """Pure. `source` is the carrier's format (None on a stream of text), `target` the service's."""

    __slots__ = (
        "_converter", "_filled_ms", "_filling_since", "_frame_bytes", "_pending", "_protocol", "_reframer", "_share",
        "_skipped", "_source", "_target", "_track", "journal", "ring",
    )  # fmt: skip

    def __init__(
        self,
        source: MediaFormat | None,
        target: MediaFormat,
        *,
        frame_ms: int,
        capacity_ms: int,
        track: Track,
        protocol: NativeCarrier,
    ) -> None:
        self.ring = Ring(target if source is not None else None, target.bytes_for(frame_ms), capacity_ms)
        self._source = source
        self._target = target
        self._track = track
        self._protocol = protocol
        self._converter = Converter(source or target, target)
        self._reframer = Reframer(target.bytes_for(frame_ms))
        self._share = (source or target).bytes_for(frame_ms)
        self._frame_bytes = target.bytes_for(frame_ms)
        self._pending = 0  # bytes of the carrier's audio that no frame stands for yet
        self._filling_since: float | None = None  # the time of the first hole
        self._filled_ms = 0
        self._skipped = 0
        self.journal: Entry | None = None
        """Is given the service's input, if it shall outlive this process."""

    @property
    def held_bytes(self) -> int:
        """The carrier's bytes that have not left; what is sent again after a loss counts too."""
        return self._pending + self.ring.waiting_bytes * self._share // self._frame_bytes

    @property
    def unsent_bytes(self) -> int:
        """The carrier's bytes that have never been sent: exact, and counted each time."""
        return self._pending + self.ring.unsent_heard

    def take(self, event: Event, now: float) -> None:
        """Put one event of the stream into the ring."""
        if type(event) is Audio:
            self.hear(event.payload)
            return
        if isinstance(event, Start):
            return  # told anew at the beginning of each connection
        if isinstance(event, Stop):
            self._finish()
            self.ring.say(event, now)
            return
        for text in self._protocol.encode(event):
            if isinstance(text, str):
                number = self.ring.next_number
                self.ring.say(text, now)
                if self.journal is not None and self.ring.next_number > number:
                    self.journal.say(Word(number, text, self.ring.next_seq))
        if isinstance(event, Gap) and event.track is self._track and self._source is not None:
            self._leave_out(event, now)

    def hear(self, payload: bytes) -> None:
        """Put the carrier's audio into the ring."""
        if self.journal is not None:
            self.journal.hear(payload)
        samples, heard = self._converter.convert(payload), len(payload)
        if heard == self._share and len(samples) == self._frame_bytes and not self._pending and not self._reframer.rest:
            self.ring.hear(samples, heard)  # one chunk is one frame
        else:
            self._frame(samples, heard)

    def adopt(self, other: Intake, now: float) -> None:
        """Take over what another intake, for a service with another format, still holds."""
        entries = other.ring.drain()
        if hole := other.ring.hole:
            self.ring.say(other.told(hole), now)
        self.ring.forwarded = other.ring.forwarded
        converter = Converter(other._target, self._target)
        for entry in entries:
            if isinstance(entry, Frame):
                self._frame(converter.convert(entry.payload), entry.heard)
                continue
            if isinstance(entry.message, Stop):
                self._finish()
            self.ring.say(entry.message, now)
        if self._source is not None:
            self._frame(converter.flush(), other._pending)

    def inherit(self, legacy: Legacy, now: float) -> None:
        """Make again what another process had for this service, bit by bit as it was. Before anything else."""
        first = legacy.acked + 1
        oldest = legacy.heard - len(legacy.audio)
        # From a filter's own block on, and from so much earlier that it has forgotten what was before.
        blocks = max(1, BLOCK_MS * self._target.bytes_per_second // 1000 // self._frame_bytes)
        begin = max(0, first - blocks) // blocks * blocks
        if begin * self._share < oldest:  # older than what is kept: the service will be told
            begin = -(-oldest // (self._share * blocks)) * blocks
            first = max(first, begin + blocks)
        samples = self._frame_bytes // self._target.sample_bytes
        words = [*legacy.standing.words]
        number = words[0].number if words else legacy.standing.next_number
        self._skipped = legacy.skipped
        self.ring.inherit(legacy.acked, first, first * samples + legacy.skipped, number)
        converted = self._converter.convert(legacy.audio[begin * self._share - oldest :])
        for frame in self._reframer.push(converted)[first - begin :]:
            while words and words[0].before <= self.ring.next_seq:
                self.ring.say(words.pop(0).text, now)
            self.ring.hear(frame, 0)
        for word in words:
            self.ring.say(word.text, now)

    def _be_silent(self, silence: bytes) -> None:
        if self.journal is not None:
            self.journal.hear(silence)
        self._frame(self._converter.convert(silence), 0)

    def _frame(self, samples: bytes, heard: int) -> None:
        self._pending += heard
        for frame in self._reframer.push(samples):
            share = min(self._pending, self._share)
            self._pending -= share
            self.ring.hear(frame, share, 0 if share else Flags.SILENCE)

    def _leave_out(self, gap: Gap, now: float) -> None:
        fill = self._fill_ms(gap.lost_ms, now) if gap.reason is GapReason.CARRIER else 0
        if fill and self._source is not None:
            self._be_silent(self._source.silence(fill))
        if gap.lost_ms > fill:
            samples = (gap.lost_ms - fill) * self._target.sample_rate // 1000
            self.ring.skip(samples)
            self._skipped += samples
            if self.journal is not None:
                self.journal.skipped(self._skipped)

    def _fill_ms(self, lost_ms: int, now: float) -> int:
        """How much of a hole becomes silence: never so much that it displaces speech, nor more than time has gone by."""
        if self._filling_since is None:
            self._filling_since = now
        passed_ms = (now - self._filling_since) * 1000 + LARGEST_FILL_MS
        room_ms = int(self._target.duration_ms(self.ring.room_bytes))
        fill = max(0, min(lost_ms, LARGEST_FILL_MS, room_ms, int(passed_ms) - self._filled_ms))
        self._filled_ms += fill
        return fill

    def _finish(self) -> None:
        if self._source is None:
            return
        self._frame(self._converter.flush(), 0)
        if rest := self._reframer.flush():
            self.ring.hear(rest, self._pending, Flags.LAST)
        else:
            self.ring.credit(self._pending)
        self._pending = 0

    def told(self, hole: Hole) -> str:
        """The text for a hole in the ring."""
        lost_ms = round(self._target.duration_ms(hole.size))
        (text,) = self._protocol.encode(Gap(lost_ms, self._track, hole.reason))
        return str(text)
