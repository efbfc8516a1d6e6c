"""Does a carrier's audio still flow? Asked from time to time, so that a frame costs nothing."""

from __future__ import annotations

from typing import Literal

STALLED_SECS = 3.0
"""Without audio for so long, a carrier that sends all the time has stalled."""


class Stall:
    """One stream's silence on the wire, as far as looks at its counters tell."""

    __slots__ = ("_frames", "audio", "mute_secs", "silent_secs", "stalled")

    def __init__(self) -> None:
        self._frames = 0
        self.audio = 0
        """Bytes, at the last look."""
        self.silent_secs = 0.0
        """Since the last audio."""
        self.mute_secs = 0.0
        """Since the last frame of any kind: a carrier that says what was played, or which key was pressed, is there."""
        self.stalled = False

    def look(self, audio: int, frames: int, elapsed: float) -> Literal["stalled", "resumed"] | None:
        """`audio`: bytes of it so far; `frames`: of any kind; `elapsed`: seconds since the last look. Returns what is new."""
        if audio != self.audio:
            self.audio, self._frames = audio, frames
            self.silent_secs = self.mute_secs = 0.0
            if not self.stalled:
                return None
            self.stalled = False
            return "resumed"
        self.silent_secs += elapsed
        self.mute_secs += elapsed
        if frames != self._frames:
            self._frames, self.mute_secs = frames, 0.0
        if self.stalled or self.silent_secs < STALLED_SECS:
            return None
        self.stalled = True
        return "stalled"
