"""What reaches the caller, as a faithful carrier keeps it: the playout queue. Of a carrier of text: `gateway.voice`.

Pure: time is an argument (seconds, any origin, never backwards) and nothing here knows a wire. The simulator turns the
events these machines return into frames; what the caller heard is their truth, whatever went over the wire.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec import Struct

from gateway.events import Checkpoint, Clear, Event, Outcome
from gateway.media import MediaFormat
from gateway.provider import Habits

UNDERRUN_WINDOW_MS = 500
"""Audio that arrives this soon after the queue ran dry belongs to the same speech: the caller heard a hole."""


class Fate(Struct, frozen=True):
    """What an unfaithful carrier does with one echo: `copies` of it (0 loses it), `late_ms` after its time. Order is kept."""

    copies: int = 1
    late_ms: float = 0.0


class Mark(Struct, frozen=True):
    """The truth about one checkpoint: what became of it, how much of its audio was heard, and when that was settled.

    `echoed` — the carrier reports it as reached, which on a carrier that echoes cleared marks proves nothing.
    """

    name: str
    outcome: Outcome
    played_ms: int
    echoed: bool
    at: float


class Cut(Struct, frozen=True):
    """One clear: what it threw away and how long the caller had to wait for silence.

    `time_to_silence_ms` counts from the clear frame's arrival (a faithful carrier is silent at once), `since_barge_in_ms`
    from the instant given to `barge_in`; None where the caller had not spoken.
    """

    at: float
    played_ms: int
    cleared_ms: int
    time_to_silence_ms: float = 0.0
    since_barge_in_ms: float | None = None


class _Pending(Struct, frozen=True):
    name: str
    position: int  # on the line, in samples
    samples: int  # of audio between the previous mark and this one
    arrived: float


class Ear:
    """A carrier's FIFO of audio and marks, played in real time from the moment audio arrives.

    `jitter_ms` is the time between audio reaching a silent line and its first sample being heard: what carriers and
    telephones hold back so that a chunk a few milliseconds late is no hole. `fate` decides about each echo, for fuzzing.
    Call `advance` at `next_event()` or whenever convenient; nothing is lost if it comes late.
    """

    def __init__(
        self,
        media_format: MediaFormat,
        habits: Habits | None = None,
        *,
        jitter_ms: float = 0.0,
        fate: Callable[[str], Fate] | None = None,
    ) -> None:
        self.media_format = media_format
        self.heard = bytearray()
        """What the caller heard in the stream's format: from the first audio on, silence where the queue ran dry."""
        self.first_heard_at: float | None = None
        self.underruns = 0
        self.underrun_ms = 0.0
        self.max_buffered_ms = 0.0
        self.marks: list[Mark] = []
        """Settled checkpoints, in the order they were settled."""
        self.cuts: list[Cut] = []
        self.received = self.played = self.cleared = self.lost = 0
        """Samples: received = played + cleared + lost + buffered, at any time."""
        self._habits = habits or Habits()
        self._fate = fate
        self._rate = media_format.sample_rate
        self._width = media_format.sample_bytes
        self._jitter = round(jitter_ms * self._rate / 1000)
        self._queue = bytearray()
        self._odd = b""
        self._pending: deque[_Pending] = deque()
        self._echoes: deque[tuple[float, Event]] = deque()
        self._now = float("-inf")
        self._epoch: float | None = None  # when the line's first sample sounded
        self._end = 0  # position on the line where the queued audio ends, or where sound ended
        self._cut_dry = True  # the line is silent because nothing was due, not because audio came late
        self._queued_since_mark = 0
        self._heard_since_mark = 0
        self._barged_in_at: float | None = None

    def media(self, payload: bytes, now: float) -> None:
        """Audio arrives. An odd byte of a sample waits for its other half. Marks it overtakes come with the next `advance`."""
        self._play(now)
        payload = self._odd + payload
        whole = len(payload) // self._width * self._width
        self._odd, payload = payload[whole:], payload[:whole]
        if not payload:
            return
        count = whole // self._width
        if self._epoch is None:
            self._epoch = self._now + self._jitter / self._rate
            self.first_heard_at = self._epoch
            self._end = 0
        elif not self._queue:
            position = self._position()
            late = position - self._end
            if self._cut_dry or late > 0:
                if not self._cut_dry and self._ms(late) <= UNDERRUN_WINDOW_MS:
                    self.underruns += 1
                    self.underrun_ms += self._ms(late)
                self._end = max(self._end, position + self._jitter)
        self._cut_dry = False
        self._queue += payload
        self._end += count
        self.received += count
        self._queued_since_mark += count
        self.max_buffered_ms = max(self.max_buffered_ms, self.buffered_ms(now))

    def checkpoint(self, name: str, now: float) -> list[Event]:
        """A mark arrives. Echoed at once when nothing is buffered, otherwise when all audio before it has played."""
        self._play(now)
        self._pending.append(_Pending(name, self._end, self._queued_since_mark, self._now))
        self._queued_since_mark = 0
        return self.advance(now)

    def clear(self, now: float) -> list[Event]:
        """Cuts playback. Returns what this carrier says to that: echoes of the cut marks, an acknowledgement, or nothing."""
        self._play(now)
        silent_at = min(self._now, self._time(self._end)) if self._epoch is not None else self._now
        played_ms, thrown = self._ms(self._heard_since_mark), len(self._queue) // self._width
        since = None if self._barged_in_at is None else max(0.0, (silent_at - self._barged_in_at) * 1000)
        cut = Cut(self._now, round(played_ms), round(self._ms(thrown)), since_barge_in_ms=since)
        self.cuts.append(cut)
        self._settle_pending(Outcome.CLEARED, echo=self._habits.echoes_cleared)
        self.cleared += thrown
        self._empty()
        self._barged_in_at = None
        if self._habits.confirms_clear:
            self._echoes.append((self._due(0.0), Clear(cut.played_ms, cut.cleared_ms)))
        return self.advance(now)

    def barge_in(self, now: float) -> None:
        """The caller starts to speak: the next clear's `since_barge_in_ms` counts from here."""
        self._play(now)
        self._barged_in_at = self._now

    def advance(self, now: float) -> list[Event]:
        """What the carrier has to say by `now`: marks that were reached, in order."""
        self._play(now)
        events = []
        while self._echoes and self._echoes[0][0] <= self._now:
            events.append(self._echoes.popleft()[1])
        return events

    def next_event(self) -> float | None:
        """When `advance` will next have something to say; None if not before more arrives."""
        times = [self._echoes[0][0]] if self._echoes else []
        if self._pending and self._epoch is not None:
            times.append(self._time(self._pending[0].position))
        return min(times, default=None)

    def buffered_ms(self, now: float) -> float:
        """Audio that arrived and has not sounded yet."""
        if not self._queue or self._epoch is None:
            return 0.0
        ahead = self._end - round((max(now, self._now) - self._epoch) * self._rate)
        return self._ms(min(max(0, ahead), len(self._queue) // self._width))

    def sounding(self, now: float) -> bool:
        """The caller hears something at this moment."""
        return self.buffered_ms(now) > 0

    def end(self, now: float) -> None:
        """The stream is over: what has not sounded is lost, and so are its marks. Late echoes never come."""
        self._play(now)
        self.lost += len(self._queue) // self._width
        self._settle_pending(Outcome.LOST, echo=False)
        self._empty()
        self._echoes.clear()

    def _play(self, now: float) -> None:
        """Brings the line up to `now`: moves what has sounded from the queue to the ear and settles the marks passed."""
        self._now = max(self._now, now)
        if self._queue and self._epoch is not None:
            start = self._end - len(self._queue) // self._width
            count = min(self._position(), self._end) - start
            if count > 0:
                self.heard += self._silence(start - len(self.heard) // self._width)
                self.heard += self._queue[: count * self._width]
                del self._queue[: count * self._width]
                self.played += count
                self._heard_since_mark += count
        sounded = self._end - len(self._queue) // self._width
        while self._pending and self._pending[0].position <= sounded:
            mark = self._pending.popleft()
            reached = self._now if self._epoch is None else min(self._now, self._time(mark.position))
            self._heard_since_mark -= mark.samples
            self._settle(mark, Outcome.PLAYED, mark.samples, max(reached, mark.arrived), echo=True)

    def _settle_pending(self, outcome: Outcome, *, echo: bool) -> None:
        played = self._heard_since_mark
        while self._pending:
            self._settle(self._pending.popleft(), outcome, played, self._now, echo=echo)
            played = 0

    def _settle(self, mark: _Pending, outcome: Outcome, played: int, at: float, *, echo: bool) -> None:
        fate = self._fate(mark.name) if echo and self._fate else Fate()
        played_ms = round(self._ms(played))
        self.marks.append(Mark(mark.name, outcome, played_ms, echo and fate.copies > 0, at))
        for _ in range(fate.copies if echo else 0):
            self._echoes.append((self._due(fate.late_ms, at), Checkpoint(mark.name, outcome, played_ms)))

    def _empty(self) -> None:
        self._end -= len(self._queue) // self._width
        self._queue.clear()
        self._odd = b""
        self._queued_since_mark = self._heard_since_mark = 0
        self._cut_dry = True

    def _due(self, late_ms: float, at: float | None = None) -> float:
        due = (self._now if at is None else at) + late_ms / 1000
        return max(due, self._echoes[-1][0]) if self._echoes else due

    def _position(self) -> int:
        """Where on the line we are, in samples since the first sound."""
        assert self._epoch is not None  # noqa: S101  # only asked once audio has arrived
        return round((self._now - self._epoch) * self._rate)

    def _time(self, position: int) -> float:
        assert self._epoch is not None  # noqa: S101  # only asked once audio has arrived
        return self._epoch + position / self._rate

    def _ms(self, samples: int) -> float:
        return samples * 1000 / self._rate

    def _silence(self, samples: int) -> bytes:
        return self.media_format.silence(1000)[: self._width] * max(0, samples)
