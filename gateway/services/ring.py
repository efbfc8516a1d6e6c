"""What a stream has told its service and may have to tell again: one ordered, bounded ring of audio and control. Pure.

Entries wait (`take` gives the oldest), and once taken are kept until the service has acknowledged them, so that a connection
that was lost can be taken up again. Audio is bounded by time. Beyond it the oldest goes: first what was sent already, then what
was not; that leaves one hole, which is told in its place.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from msgspec import Struct

from gateway.events import GapReason, Stop
from gateway.media import MediaFormat
from gateway.services.framed import Flags

MOST_WORD_BYTES = 256 * 1024
"""Characters of control texts that are kept; a transcript of ten seconds has a few hundred."""

MOST_RUNS = 64
"""Runs of frames that are remembered as sent, although they are no longer kept; of more, the oldest two count as one."""


class Frame(Struct, gc=False):
    """Audio. `heard` is how many bytes of the carrier's audio it stands for."""

    seq: int
    pos: int
    payload: bytes
    heard: int
    flags: int
    sent: bool = False


class Word(Struct):
    """Control: a text that is ready but for its number, or the stop, whose account is drawn up when it leaves."""

    number: int
    message: str | Stop
    at: float
    sent: bool = False

    @property
    def size(self) -> int:
        return len(self.message) if isinstance(self.message, str) else 0


class _Run(Struct):
    """Frames of following numbers, from `first` to before `end`."""

    first: int
    end: int
    heard: int


class Hole(NamedTuple):
    """Audio that was not sent and won't be, before the next frame; in bytes of the service's format."""

    size: int
    reason: GapReason


Entry = Frame | Word


class Ring:
    """See the module. Sizes are bytes in the service's format, but for `heard` and `forwarded`: the carrier's.

    `hear` and `say` add; `take` gives what to send next. `ack` when the service has it. After a loss `resume` (numbered),
    `live` (not numbered) or `rewind` (the service never took the call) decides what is sent again.
    """

    __slots__ = (
        "_acked_pos", "_capacity", "_capacity_secs", "_frame_bytes", "_gone", "_hole",
        "_hole_reason", "_kept", "_kept_bytes", "_sample_bytes", "_skipped", "_waiting", "_word_bytes", "acked", "audio_bytes",
        "dropped_words", "forwarded", "next_number", "next_pos", "next_seq",
    )  # fmt: skip

    def __init__(self, media_format: MediaFormat | None, frame_bytes: int, capacity_ms: int) -> None:
        self._sample_bytes = media_format.sample_bytes if media_format is not None else 1
        self._frame_bytes = frame_bytes
        self._capacity = max(media_format.bytes_for(capacity_ms), frame_bytes) if media_format is not None else 0
        self._capacity_secs = capacity_ms / 1000
        self._waiting: deque[Entry] = deque()
        self._kept: deque[Entry] = deque()
        self._kept_bytes = 0
        self._hole = 0
        self._hole_reason = GapReason.OVERFLOW
        self._skipped = False
        self._acked_pos = 0  # of the first sample that is not acknowledged
        self._gone: deque[_Run] = deque()  # sent, not acknowledged, and no longer kept
        self._word_bytes = 0
        self.acked = -1
        self.next_seq = 0
        self.next_pos = 0
        self.next_number = 0
        self.audio_bytes = 0
        """Bytes of audio in here."""
        self.forwarded = 0
        """The carrier's bytes in frames that were sent and are not known to be lost."""
        self.dropped_words = 0

    @property
    def room_bytes(self) -> int:
        """Audio that fits in without anything having to go."""
        return self._capacity - self.audio_bytes

    @property
    def waits(self) -> bool:
        """Whether `take` has something."""
        return bool(self._waiting or self._hole)

    # --- in ---

    def inherit(self, acked: int, next_seq: int, next_pos: int, next_number: int) -> None:
        """Go on where another ring was: the next frame and word have these numbers. Before anything else."""
        self.acked, self.next_seq, self.next_pos, self.next_number = acked, next_seq, next_pos, next_number
        frame = self._frame_bytes // self._sample_bytes
        self._acked_pos = max(0, next_pos - (next_seq - acked - 1) * frame)

    def hear(self, payload: bytes, heard: int, flags: int = 0) -> None:
        """Add one frame of audio."""
        if self._skipped:
            flags |= Flags.DISCONTINUITY
            self._skipped = False
        size = len(payload)
        self._waiting.append(Frame(self.next_seq, self.next_pos, payload, heard, flags))
        self.next_seq += 1
        self.next_pos += size // self._sample_bytes
        self.audio_bytes += size
        if self.audio_bytes > self._capacity:
            self._make_room()

    def skip(self, samples: int) -> None:
        """Time went by without audio."""
        self.next_pos += samples
        self._skipped = True

    def say(self, message: str | Stop, now: float) -> None:
        """Add a control text, or the stop."""
        word = Word(self.next_number, message, now)
        if self._word_bytes + word.size > MOST_WORD_BYTES:
            self._forget_words()
        if self._word_bytes + word.size > MOST_WORD_BYTES:
            self.dropped_words += 1
            return
        self.next_number += 1
        self._word_bytes += word.size
        self._waiting.append(word)
        if not self._capacity:  # a stream of text: nothing is ever acknowledged, so sent words age
            while self._kept and isinstance(old := self._kept[0], Word) and old.at < now - self._capacity_secs:
                self._forget()

    def credit(self, heard: int) -> None:
        """The latest frame stands for this much more of the carrier's audio."""
        for entries in (self._waiting, self._kept):
            for entry in reversed(entries):
                if isinstance(entry, Frame):
                    entry.heard += heard
                    self.forwarded += heard if entry.sent else 0
                    return
        if self.next_seq:
            self.forwarded += heard

    # --- out ---

    def take(self, *, keep: bool) -> Entry | Hole | None:
        """What to send next, or None. `keep` it until it is acknowledged (or `release`d)."""
        waiting = self._waiting
        if not waiting:
            return self._told_hole() if self._hole and self._hole_reason is GapReason.RESUME else None
        entry = waiting[0]
        if self._hole and (isinstance(entry, Frame) or isinstance(entry.message, Stop)):
            return self._told_hole()
        waiting.popleft()
        if isinstance(entry, Frame):
            if not entry.sent:
                self.forwarded += entry.heard
            if keep:
                self._kept_bytes += len(entry.payload)
            else:
                self.audio_bytes -= len(entry.payload)
        elif not keep:
            self._word_bytes -= entry.size
        entry.sent = True
        if keep:
            self._kept.append(entry)
        return entry

    def put_back(self, entry: Entry | Hole) -> None:
        """What was taken last could not be sent."""
        if isinstance(entry, Hole):
            self._hole, self._hole_reason = entry
            return
        if self._kept and self._kept[-1] is entry:
            self._kept.pop()
            self._kept_bytes -= len(entry.payload) if isinstance(entry, Frame) else 0
        elif isinstance(entry, Frame):
            self.audio_bytes += len(entry.payload)
        else:
            self._word_bytes += entry.size
        if isinstance(entry, Frame):
            self.forwarded -= entry.heard
        entry.sent = False
        self._waiting.appendleft(entry)

    def ack(self, seq: int) -> bool:
        """The service has every frame up to this one. Returns False if it was never sent."""
        if seq >= self.next_waiting:
            return False
        if seq <= self.acked:
            return True
        pos = self._position(seq + 1)
        while self._kept_bytes and (first := _first(self._kept)) is not None and first.seq <= seq:
            pos = first.pos + len(first.payload) // self._sample_bytes
            while self._forget() is not first:
                pass
        self._gone_arrived(seq + 1)
        self.acked = seq
        self._acked_pos = max(self._acked_pos, pos)
        return True

    def release(self) -> None:
        """Nothing that was sent will be needed again."""
        while self._kept:
            self._forget()
        self._gone.clear()
        self.acked = max(self.acked, self.next_waiting - 1)
        self._acked_pos = self._position(self.next_waiting)

    # --- after a loss ---

    def rewind(self) -> None:
        """Everything kept waits again, in its place."""
        while self._kept:
            self._waiting.appendleft(self._kept.pop())
        self._kept_bytes = 0

    def resume(self, wanted: int | None) -> int:
        """Go on from frame `wanted`, or live (None). Returns the bytes of audio that this leaves out, told as one hole."""
        self.rewind()
        self._hole = 0
        if wanted is None:
            missing = (self.next_pos - self._acked_pos) * self._sample_bytes
            self._gone_lost()
            self._drop_frames()
        else:
            wanted = min(wanted, self.next_seq)
            oldest = self.oldest
            while (first := _first(self._waiting)) is not None and first.seq < wanted:
                while (entry := self._waiting.popleft()) is not first:
                    self._word_bytes -= entry.size if isinstance(entry, Word) else 0
                self.audio_bytes -= len(first.payload)
            self.acked = max(self.acked, wanted - 1)
            self._acked_pos = max(self._acked_pos, self._position(wanted))
            missing = max(0, oldest - wanted) * self._frame_bytes
            self._gone_arrived(wanted)
            self._gone_lost()
        if missing:
            self._tell(missing, GapReason.RESUME)
        return missing

    def live(self) -> int:
        """Go on with what comes from now on; words that have not been sent still wait. Returns the bytes left out."""
        missing = self._hole + sum(len(entry.payload) for entry in self._waiting if isinstance(entry, Frame))
        self.release()
        self._drop_frames()
        self._hole = 0
        if missing:
            self._tell(missing, GapReason.RESUME)
        return missing

    def drain(self) -> list[Entry]:
        """Everything that is in here, to be put into another ring."""
        self.rewind()
        entries = [*self._waiting]
        for entry in entries:
            if isinstance(entry, Frame):
                self._uncount(entry)
        self._waiting.clear()
        self._word_bytes = 0
        return entries

    # --- figures ---

    @property
    def hole(self) -> Hole | None:
        """The hole that is still to be told."""
        return Hole(self._hole, self._hole_reason) if self._hole else None

    @property
    def oldest(self) -> int:
        """The number of the oldest frame in here; the next one's if there is none."""
        first = _first(self._kept) if self._kept_bytes else None
        if first is None:
            first = _first(self._waiting)
        return first.seq if first is not None else self.next_seq

    @property
    def next_waiting(self) -> int:
        """The number of the first frame that has not been sent (again)."""
        first = _first(self._waiting)
        return first.seq if first is not None else self.next_seq

    @property
    def unsent_heard(self) -> int:
        """The carrier's bytes in frames that have never been sent."""
        return sum(entry.heard for entry in self._waiting if isinstance(entry, Frame) and not entry.sent)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of audio that have not been sent."""
        return self.audio_bytes - self._kept_bytes

    @property
    def unacked_bytes(self) -> int:
        """Bytes of audio since the last acknowledgement, kept or not."""
        return max(0, self.next_pos - self._acked_pos) * self._sample_bytes

    # --- inside ---

    def _position(self, seq: int) -> int:
        """The index of frame `seq`'s first sample; exact unless time was skipped between it and the oldest in here."""
        first = _first(self._kept) if self._kept_bytes else None
        first = first or _first(self._waiting)
        at, pos = (first.seq, first.pos) if first is not None else (self.next_seq, self.next_pos)
        return max(0, min(self.next_pos, pos + (seq - at) * (self._frame_bytes // self._sample_bytes)))

    def _told_hole(self) -> Hole:
        hole = Hole(self._hole, self._hole_reason)
        self._hole = 0
        return hole

    def _tell(self, size: int, reason: GapReason) -> None:
        self._hole, self._hole_reason = size, reason

    def _forget(self) -> Entry:
        entry = self._kept.popleft()
        if isinstance(entry, Frame):
            self._kept_bytes -= len(entry.payload)
            self.audio_bytes -= len(entry.payload)
        else:
            self._word_bytes -= entry.size
        return entry

    def _forget_frame(self) -> Frame:
        """The oldest frame of those that were sent; there is one."""
        at, frame = next((at, entry) for at, entry in enumerate(self._kept) if isinstance(entry, Frame))
        del self._kept[at]
        self._kept_bytes -= len(frame.payload)
        self.audio_bytes -= len(frame.payload)
        return frame

    def _uncount(self, frame: Frame) -> None:
        """A frame leaves without having been received."""
        self.audio_bytes -= len(frame.payload)
        if frame.sent:
            self.forwarded -= frame.heard

    def _drop_frames(self) -> None:
        for entry in self._waiting:
            if isinstance(entry, Frame):
                self._uncount(entry)
        self._waiting = deque(entry for entry in self._waiting if isinstance(entry, Word))
        self.acked = self.next_seq - 1
        self._acked_pos = self.next_pos

    def _make_room(self) -> None:
        while self.audio_bytes > self._capacity:
            if self._kept_bytes:
                # The words around a frame that goes stay: they may not have arrived, and take no room of audio.
                gone = self._forget_frame()
                if self._gone and self._gone[-1].end == gone.seq:
                    self._gone[-1].end += 1
                    self._gone[-1].heard += gone.heard
                    continue
                self._gone.append(_Run(gone.seq, gone.seq + 1, gone.heard))
                if len(self._gone) > MOST_RUNS:
                    oldest = self._gone.popleft()
                    self._gone[0].first = oldest.first
                    self._gone[0].heard += oldest.heard
                continue
            # Audio is near the front: everything before it is a handful of words.
            at = next(i for i, each in enumerate(self._waiting) if isinstance(each, Frame))
            frame = self._waiting[at]
            del self._waiting[at]
            if isinstance(frame, Frame):
                self._uncount(frame)
                if not self._hole:
                    self._hole_reason = GapReason.OVERFLOW
                self._hole += len(frame.payload)

    def _gone_arrived(self, before: int) -> None:
        """Of what was sent and is no longer kept, the frames before this number have arrived."""
        while self._gone and self._gone[0].first < before:
            run = self._gone.popleft()
            if before < run.end:
                arrived = run.heard * (before - run.first) // (run.end - run.first)
                self._gone.appendleft(_Run(before, run.end, run.heard - arrived))

    def _gone_lost(self) -> None:
        """What was sent and is no longer kept has not arrived."""
        self.forwarded -= sum(run.heard for run in self._gone)
        self._gone.clear()

    def _forget_words(self) -> None:
        """Make room for a word: those that were sent already are the ones most likely to have arrived."""
        for entry in [entry for entry in self._kept if isinstance(entry, Word)]:
            self._word_bytes -= entry.size
        self._kept = deque(entry for entry in self._kept if isinstance(entry, Frame))


def _first(entries: deque[Entry]) -> Frame | None:
    for entry in entries:
        if isinstance(entry, Frame):
            return entry
    return None
