"""What the gateway adds to one stream's delay: one frame of EVERY is timed, the others cost a comparison. Pure.

Audio is recognised by its place in the flow: what was offered after it is behind it, so once no more than that is still here,
it has left. Times are arguments, seconds of a monotonic clock that is finer than a millisecond.
"""

from __future__ import annotations

from gateway.buckets import LATENCY_SECS, Buckets

EVERY = 11
"""A prime: a service that gets every second or fifth frame of the carrier's in one piece is not always timed at the same one."""


class Stopwatch:
    """`hear` and `heard` time the caller's audio, `say` and `left` the service's, `cut` and `left` a clear."""

    __slots__ = ("_cut_at", "_heard", "_said", "running", "to_caller", "to_service", "to_silence")

    def __init__(self) -> None:
        self.to_service = Buckets(LATENCY_SECS)
        """From the carrier's socket to the service's."""
        self.to_caller = Buckets(LATENCY_SECS)
        """From the service's socket to the carrier's, of audio before which nothing waited."""
        self.to_silence = Buckets(LATENCY_SECS)
        """From the command `clear` until the carrier was told."""
        self.running = False
        """Whether `left` wants to be asked after each frame to the carrier."""
        self._heard: tuple[float, int] | None = None
        self._said: tuple[float, int] | None = None
        self._cut_at: float | None = None

    def hear(self, at: float, offered: int) -> None:
        """Audio that came `at` is in the flow, of which so many bytes came until now. The first one counts until it has left."""
        if self._heard is None:
            self._heard = at, offered

    def heard(self, now: float, offered: int, held: int) -> bool:
        """So many bytes came until now and so many of them are still here. Returns whether the audio that is timed has left."""
        if self._heard is None:
            return True
        at, mark = self._heard
        if held > offered - mark:
            return False
        self.to_service.add(now - at)
        self._heard = None
        return True

    def say(self, at: float, queued: int) -> None:
        """A service's audio that came `at` is in the queue, into which so many bytes were put until now."""
        if self._said is None:
            self._said = at, queued
            self.running = True

    def cut(self, at: float) -> None:
        """A clear came `at` and waits to be sent; what was said before it does not leave."""
        self._said = None
        self._cut_at = at
        self.running = True

    def left(self, now: float, queued: int, held: int, *, told: bool) -> None:
        """A frame was sent. So many bytes were put into the queue until now, so many are in it; `told`: no command waits."""
        if self._cut_at is not None and told:
            self.to_silence.add(now - self._cut_at)
            self._cut_at = None
        if self._said is not None:
            at, mark = self._said
            if held <= queued - mark:
                self.to_caller.add(now - at)
                self._said = None
        self.running = self._cut_at is not None or self._said is not None
