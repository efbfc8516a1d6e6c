"""What is still to be spoken on a text-only stream, and the checkpoints between the words.

Pure: `now` is an argument, seconds of any monotonic clock. The counterpart for sound is `gateway.playout`.
"""

from __future__ import annotations

from collections import deque

from gateway.events import Checkpoint, Outcome
from gateway.playout import CONFIRM_SECS

CLIP_SECS = 10.0
"""How long a `stop` after playing waits for a clip whose length nobody tells."""

HUSH_SECS = 1.0
"""The carrier's agent must have been silent for so long before a clip counts as over."""

PAUSE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands in a recital for something that the carrier plays without ever telling that it has."""

SPEECH_SECS_PER_CHARACTER = 0.1
"""Slower than any synthesizer speaks: bounds how long a `stop` after playing waits for words that are never reported."""

SURE_CHARACTERS = 4
"""Fewer, unless they are a message whole, could begin any and prove nothing about those before it."""

HOLES = 3
"""A piece of some forty characters leaps over no more preempted messages than this."""


class Recital:
    """Playout of a text-only stream: checkpoints after words, resolved from the words the carrier reports as spoken.

    The carrier cuts its reports in pieces of its own, but put together they are the text that was said (Twilio, recorded
    2026). White space is ignored on both sides.
    """

    def __init__(self) -> None:
        self._text = ""  # what was said and is not yet known to be spoken
        self._said = 0  # characters said since the start
        self._cut = 0  # those of them that were said before the last barge-in
        self._starts: deque[int] = deque()  # where each message that has not been spoken to its end begins, likewise counted
        self._tones: deque[tuple[int, int]] = deque()  # where digits that were sent begin and end, likewise
        self._marks: deque[tuple[str, int]] = deque()
        self._quiet_at = float("-inf")
        self._hushed_at: float | None = None  # since when the carrier says that nothing is spoken
        self.ending = False

    def say(self, text: str, now: float, *, tones: bool = False) -> None:
        """Words (or, with `tones`, digits, which the carrier reports likewise) were sent."""
        text = _squeeze(text)
        if tones:
            self._tones.append((self._said, self._said + len(text)))
        self._starts.append(self._said)
        self._text += text
        self._said += len(text)
        self._quiet_at = max(now, self._quiet_at) + len(text) * SPEECH_SECS_PER_CHARACTER

    def play(self, now: float) -> None:
        """Something was sent that is never reported: later words prove it over."""
        self._text += PAUSE
        self._said += 1
        self._quiet_at = max(now, self._quiet_at) + CLIP_SECS

    def end(self) -> None:
        """Nothing more will be said."""
        self.ending = True

    def speech(self, active: bool, now: float) -> None:
        """The carrier's agent starts or stops to sound."""
        self._hushed_at = None if active else now

    def checkpoint(self, name: str) -> list[Checkpoint]:
        self._marks.append((name, self._said))
        return self._reached(self._said) if self._all_spoken else []

    def is_tones(self, text: str) -> bool:
        """Whether what the carrier reports now, before `spoken` takes it, are digits that were sent and no words."""
        piece = _squeeze(text)
        path = self._path(piece) if self._tones and piece else None
        if path is None:
            return False
        end = self._said - len(self._text) + path[-1][0]
        return any(begin <= end - len(piece) and end <= last for begin, last in self._tones)

    def spoken(self, text: str) -> list[Checkpoint]:
        """Words reached the caller. Words that nobody said (a greeting) prove nothing.

        A message that was preempted leaves a hole, and the next words are the beginning of a later message: checkpoints in
        the hole are cleared.
        """
        piece = _squeeze(text)
        if not piece:
            return []
        base, path = self._said - len(self._text), self._path(piece)
        if path is None:
            return []
        results = []
        for at, outcome in path:
            results += self._reached(base + at, outcome)
        self._text = self._text[path[-1][0] :]
        while self._starts and self._starts[0] < self._said - len(self._text):
            self._starts.popleft()
        while self._tones and self._tones[0][1] <= self._said - len(self._text):
            self._tones.popleft()
        return results

    def interrupted(self) -> list[Checkpoint]:
        """The carrier threw away all that was not yet spoken."""
        self._cut = self._said
        return self._resolve_all(Outcome.CLEARED)

    def finish(self) -> list[Checkpoint]:
        return self._resolve_all(Outcome.LOST)

    def idle(self, now: float) -> bool:
        """Whether all words were spoken, or should have been long ago."""
        return (self._all_spoken and not self._marks) or now >= self._over_at

    @property
    def pending(self) -> tuple[str, ...]:
        """Names of the checkpoints that are not resolved, the oldest first."""
        return tuple(name for name, _ in self._marks)

    def next_due(self) -> float | None:
        return self._over_at if self.ending else None

    @property
    def _over_at(self) -> float:
        """When nothing can be left to hear, whatever was reported."""
        over_at = self._quiet_at + CONFIRM_SECS
        if self._hushed_at is not None and not self._text.strip(PAUSE):
            # Only clips are left, of which the carrier never tells, and it says that nothing sounds.
            over_at = min(over_at, self._hushed_at + HUSH_SECS)
        return over_at

    @property
    def _all_spoken(self) -> bool:
        return not self._text or self._cut == self._said

    def _path(self, piece: str) -> list[tuple[int, Outcome]] | None:
        """See `_match`. After a barge-in words may come that were on their way then; what was said since goes first."""
        base = self._said - len(self._text)
        path = self._match(piece, max(0, self._cut - base), HOLES)
        return self._match(piece, 0, HOLES) if path is None and base < self._cut else path

    def _match(self, piece: str, at: int, holes: int) -> list[tuple[int, Outcome]] | None:
        """How these words continue at `at` in what is not yet spoken: up to where it was played, cut, played; None: not at all.

        Speech that was cut off is told as a piece of its own, so a hole begins where the piece or a message does.
        """
        text = self._text
        while text.startswith(PAUSE, at):
            at += 1
        if text.startswith(piece, at):
            return [(at + len(piece), Outcome.PLAYED)]
        if not holes:
            return None
        base = self._said - len(text)
        starts = [start - base for start in self._starts if start - base > at]
        for cut in (at, *starts):
            if not text.startswith(piece[: cut - at], at):
                break
            for start in starts:
                rest = piece[cut - at :]
                sure = len(rest) >= SURE_CHARACTERS or start + len(rest) in (*starts, len(text))
                if start > cut and sure and text[start : start + 1] == rest[:1] and (path := self._match(rest, start, holes - 1)):
                    return [(cut, Outcome.PLAYED), (start, Outcome.CLEARED), *path]
        return None

    def _reached(self, position: int, outcome: Outcome = Outcome.PLAYED) -> list[Checkpoint]:
        results = []
        while self._marks and self._marks[0][1] <= position:
            results.append(Checkpoint(self._marks.popleft()[0], outcome))
        return results

    def _resolve_all(self, outcome: Outcome) -> list[Checkpoint]:
        results = [Checkpoint(name, outcome) for name, _ in self._marks]
        self._marks.clear()
        return results


def _squeeze(text: str) -> str:
    return "".join(text.split())
