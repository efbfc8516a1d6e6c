"""What is on its way to the caller's ear: pacing, lead, checkpoints, and what was really heard.

Pure: `now` is an argument, seconds of any monotonic clock. Positions are bytes in the carrier's format. The estimate of the
caller's ear is one number, `_dry_at`: when the carrier will have played all that was sent. It moves only by samples sent, so the
schedule is absolute: a late wake-up is caught up and nothing drifts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil

from gateway.events import Audio, Checkpoint, Clear, Outcome
from gateway.media import MediaFormat
from gateway.outbound import Outbound
from gateway.provider import Limits

CONFIRM_SECS = 5.0
"""A checkpoint that the carrier has not confirmed this long after its due time is taken as played."""

FAREWELL_SECS = 1.0
"""The same for the private mark behind the last words before a `stop`: who confirms nothing is not waited for longer."""

LARGEST_LATENESS_SECS = 0.25
"""Echoes that are later than this tell of a fault, not of the way to the caller's ear."""

ROUNDING = 1e-3
"""Bytes that sums of times may be off; a sample counts as heard once it has been heard whole."""

MOST_PENDING = 5000
"""Checkpoints that may be pending at once."""

RESIDUE_SECS, DRY_SECS = 0.02, 0.01
"""Less than one frame of audio waits so long for the rest of its frame, but not until the carrier has nearly nothing to play."""

HOLE_SECS, PAUSE_SECS = 0.005, 0.5
"""An underrun is a hole in what was meant to be one piece: longer than a carrier's jitter buffer covers, shorter than a pause."""


@dataclass(slots=True)
class _Mark:
    name: str | None  # None: our own, which no service is told of
    wire: str
    position: int
    due: float | None = None  # when its audio will have been played; None until it was sent


class Playout:
    """The queue towards one carrier, and the account of it.

    `push`, `checkpoint` and `clear` take a service's commands. Then call `next_frame` until it returns None and send what it
    returns, in order; call it again at `next_due`. `confirm` takes the carrier's echoes. Results are events for the service.
    """

    __slots__ = (
        "_accepted", "_arrived_at", "_boundary", "_capacity", "_chunks", "_dry_at", "_generation", "_heard", "_largest",
        "_lateness", "_lead", "_marks", "_offset", "_rate", "_sent", "_total_cleared", "_total_played", "_total_queued",
        "_unit", "_unsent", "awaited", "ending", "media_format", "outbound", "queued_bytes", "refused", "sample_bytes",
        "stale_echoes", "unconfirmed", "underruns",
    )  # fmt: skip

    def __init__(self, media_format: MediaFormat, limits: Limits, *, capacity_ms: int) -> None:
        self.media_format = media_format
        self.sample_bytes = media_format.sample_bytes
        self._rate = media_format.bytes_per_second
        self._lead = limits.lead_ms / 1000
        self._unit = media_format.bytes_for(limits.frame_ms)
        self._largest = media_format.bytes_for(limits.max_frame_ms) // self._unit * self._unit
        self._capacity = media_format.bytes_for(capacity_ms)
        self._chunks: deque[bytes] = deque()
        self._offset = 0  # bytes of the first chunk that are gone already
        self._unsent: deque[_Mark] = deque()
        self.awaited: deque[_Mark] = deque()
        """Marks that were sent and not confirmed, the oldest first."""
        self._generation = 0
        self._marks = 0
        self._dry_at = float("-inf")
        self._arrived_at = float("-inf")
        # Positions of this generation: bytes since the last clear.
        self._accepted = 0
        self._sent = 0
        self.queued_bytes = 0
        """Bytes accepted and not yet sent."""
        self._boundary = 0  # position of the last checkpoint that was resolved
        self._heard = 0  # what echoes have proven to be played
        self._lateness: deque[float] = deque(maxlen=8)  # of the last echoes: to the ear and back
        # Totals of the stream in bytes; those of the running generation come on top.
        self._total_queued = 0
        self._total_played = 0
        self._total_cleared = 0
        self.refused = 0
        self.underruns = 0
        self.stale_echoes = 0
        self.unconfirmed = 0
        self.ending = False
        self.outbound: Outbound | None = None
        """Is told what is played when, if somebody listens to that."""

    # --- what a service asks for ---

    def push(self, payload: bytes, now: float) -> int:
        """Queue audio of whole samples. Returns the bytes refused (the newest) because the queue is full."""
        size, room = len(payload), self._capacity - self.queued_bytes
        refused = size - room if size > room else 0
        if refused:
            payload = payload[:room]
            size = len(payload)
            self.refused += refused
        if size:
            chunks = self._chunks
            if chunks and len(chunks[-1]) + size <= self._unit:
                chunks[-1] += payload  # tiny chunks would be bounded in time but not in number
            else:
                chunks.append(payload)
            self._accepted += size
            self.queued_bytes += size
            self._total_queued += size
            self._arrived_at = now
        return refused

    def checkpoint(self, name: str | None) -> bool:
        """Ask to be told when all that was queued before has played. False: too many are pending already."""
        if len(self._unsent) + len(self.awaited) >= MOST_PENDING and name is not None:
            return False
        self._marks += 1
        # Private and unique: a name used twice can't be credited with its predecessor's echo.
        self._unsent.append(_Mark(name, f"g{self._generation}.{self._marks}", self._accepted))
        return True

    def end(self) -> None:
        """Nothing more will be queued: the last words must not wait for company, and their end is to be confirmed."""
        self.ending = True
        marks = self._unsent or self.awaited
        if (marks[-1].position if marks else self._heard) < self._accepted:
            self.checkpoint(None)

    def clear(self, now: float) -> tuple[bool, list[Checkpoint | Clear]]:
        """Drop everything. Returns whether the carrier must be told, and what to tell the service, in order."""
        tell_carrier = self._sent > 0 or bool(self.awaited)
        heard = self.position(now)
        results: list[Checkpoint | Clear] = []
        boundary = played_until = self._boundary
        for mark in (*self.awaited, *self._unsent):
            # What has been heard whole was played, although its echo, or the mark itself, is still on the way.
            played = mark.position <= heard
            results += self._resolved(mark, Outcome.PLAYED if played else Outcome.CLEARED, boundary, heard)
            if mark.name is not None:
                boundary = mark.position
                played_until = boundary if played else played_until
        results.append(Clear(played_ms=self._ms(heard - played_until), cleared_ms=self._ms(self._accepted - heard)))
        self._total_played += heard
        self._total_cleared += self._accepted - heard
        self._empty()
        self._generation += 1
        self._dry_at = now
        self._accepted = self._sent = self._boundary = self._heard = 0
        return tell_carrier, results

    # --- what goes to the carrier ---

    def next_frame(self, now: float) -> Audio | Checkpoint | None:
        """The next thing to send now, or None until `next_due`. A checkpoint carries its wire name."""
        run = self._unsent[0].position - self._sent if self._unsent else self.queued_bytes
        if run == 0:
            if not self._unsent:
                return None
            mark = self._unsent.popleft()
            mark.due = max(now, self._dry_at)
            self.awaited.append(mark)
            return Checkpoint(mark.wire)
        if now < self._frame_due(run):
            return None
        size = run
        if run > self._unit:
            size = min(run, self._largest)
            if not self._unsent:
                size -= size % self._unit
        begins = self._dry_at < now
        if begins:
            if self._sent and HOLE_SECS < now - self._dry_at < PAUSE_SECS:
                self.underruns += 1
            self._dry_at = now
        payload = self._take(size) if self._offset or len(self._chunks[0]) != size else self._chunks.popleft()
        if self.outbound is not None:
            self.outbound.sent(payload, self._dry_at, continues=not begins and self._sent > 0)
        self._sent += size
        self.queued_bytes -= size
        self._dry_at += size / self._rate
        return Audio(payload)

    def next_due(self) -> float | None:
        """When `next_frame` or `overdue` will have something, if nothing else happens; None: never. May lie in the past."""
        due = self._frame_due(self.queued_bytes) if self.queued_bytes else None
        if self.awaited:
            confirm = _deadline(self.awaited[0])
            due = confirm if due is None else min(due, confirm)
        if due is None and self.ending and self._accepted:
            return self._dry_at
        return due

    # --- what the carrier says ---

    def confirm(self, wire: str, now: float) -> list[Checkpoint]:
        """An echo: the carrier's playout passed this mark. Echoes of an older generation or unknown names are swallowed."""
        if not any(mark.wire == wire for mark in self.awaited):
            self.stale_echoes += 1
            return []
        results: list[Checkpoint] = []
        while self.awaited:
            # The carrier plays in order, so an echo that was skipped is one that it lost.
            mark = self.awaited.popleft()
            results += self._played(mark)
            if mark.wire == wire:
                if mark.due is not None:
                    self._lateness.append(min(max(0.0, now - mark.due), LARGEST_LATENESS_SECS))
                break
        return results

    def overdue(self, now: float) -> list[Checkpoint]:
        """Checkpoints that the carrier should have confirmed long ago: by the playout clock they were played."""
        results: list[Checkpoint] = []
        while self.awaited and _deadline(self.awaited[0]) <= now:
            played = self._played(self.awaited.popleft())
            self.unconfirmed += len(played)
            results += played
        return results

    def finish(self, now: float, *, hung_up: bool = False) -> list[Checkpoint]:
        """The stream is over: every checkpoint still pending is lost, with what was heard of it.

        `hung_up`: the carrier ended it. What was on its way to the ear while that news was on its way to us was not heard.
        """
        heard = self.position(now - min(self._lateness, default=0.0) if hung_up else now)
        results: list[Checkpoint] = []
        boundary = self._boundary
        for mark in (*self.awaited, *self._unsent):
            results += self._resolved(mark, Outcome.LOST, boundary, heard)
            boundary = mark.position
        self._total_played += heard
        self._empty()
        self._accepted = self._sent = self._heard = 0
        return results

    def follow(self, now: float) -> None:
        """Keep a track of what is heard, in `outbound`, from now on."""
        if self.outbound is None:
            self.outbound = Outbound(self.media_format, now, self._sent)

    # --- figures ---

    @property
    def queued_ms(self) -> int:
        return self._ms(self.queued_bytes)

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the checkpoints that are not resolved, the oldest first."""
        return tuple(mark.name for marks in (self.awaited, self._unsent) for mark in marks if mark.name is not None)

    def ahead_ms(self, now: float) -> float:
        """Milliseconds that the carrier still has to play."""
        return max(0.0, self._dry_at - now) * 1000

    @property
    def settled(self) -> bool:
        """Whether nothing will be due unless something more is asked for, or an echo comes."""
        return not (self.queued_bytes or self._unsent or self.awaited or self.ending or self.outbound is not None)

    def idle(self, now: float) -> bool:
        """Whether all has been played and every checkpoint resolved."""
        return not (self._unsent or self.awaited or self.queued_bytes or self._dry_at > now)

    def totals(self, now: float) -> tuple[int, int, int, int]:
        """Bytes queued, played, cleared, lost. After `finish`: queued = played + cleared + lost."""
        played = self._total_played + self.position(now)
        return self._total_queued, played, self._total_cleared, self._total_queued - played - self._total_cleared

    def position(self, now: float) -> int:
        """Bytes that the caller has heard since the last clear."""
        ahead = ceil(max(0.0, self._dry_at - now) * self._rate - ROUNDING)
        ahead += -ahead % self.sample_bytes
        return max(self._heard, self._sent - ahead)

    # --- inside ---

    def _frame_due(self, run: int) -> float:
        due = self._dry_at - self._lead
        if run < self._unit and not self._unsent:  # nothing ends with this piece: it may wait for company
            patience = self._arrived_at + RESIDUE_SECS
            if self._dry_at > self._arrived_at:
                patience = min(patience, max(self._arrived_at, self._dry_at - DRY_SECS))
            due = max(due, patience)
        return due

    def _played(self, mark: _Mark) -> list[Checkpoint]:
        result = self._resolved(mark, Outcome.PLAYED, self._boundary, mark.position)
        if mark.name is not None:
            self._boundary = mark.position
        self._heard = max(self._heard, mark.position)
        return result

    def _resolved(self, mark: _Mark, outcome: Outcome, boundary: int, heard: int) -> list[Checkpoint]:
        if mark.name is None:
            return []
        return [Checkpoint(mark.name, outcome, self._ms(max(0, min(heard, mark.position) - boundary)))]

    def _take(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            first = self._chunks[0]
            part = first[self._offset : self._offset + size]
            parts.append(part)
            size -= len(part)
            self._offset += len(part)
            if self._offset == len(first):
                self._chunks.popleft()
                self._offset = 0
        return b"".join(parts)

    def _empty(self) -> None:
        if self.outbound is not None:
            self.outbound.cut()
        self._chunks.clear()
        self.queued_bytes = self._offset = 0
        self._unsent.clear()
        self.awaited.clear()

    def _ms(self, size: int) -> int:
        return round(size * 1000 / self._rate)


def _deadline(mark: _Mark) -> float:
    """When a mark that was sent is taken as played."""
    assert mark.due is not None  # noqa: S101  sent is what puts it among the unconfirmed
    return mark.due + (CONFIRM_SECS if mark.name is not None else FAREWELL_SECS)
